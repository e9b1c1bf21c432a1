#!/usr/bin/env bash
# prepare.sh [--install] image|demo|test|kind|bench|bench-peer|lint
#
# Checks that this machine has what a make target needs and says plainly what is missing. With
# --install, or in CI (CI=true), installs the missing packages with apt.
set -euo pipefail

install=no
[ "${CI:-}" = true ] && install=yes
if [ "${1:-}" = --install ]; then
  install=yes
  shift
fi
target=${1:?usage: prepare.sh [--install] image|demo|test|kind|bench|bench-peer|lint}

# Rust as of rust-version in Cargo.toml.
rust_wanted=1.91

packages=() # Debian packages to install
problems=() # what only the user can mend

# need COMMAND PACKAGE: the command must be there.
need() {
  command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] || packages+=("$2")
}

need_root() {
  [ "$(id -u)" = 0 ] || problems+=("not root: network namespaces and nftables need it; try: sudo make $target")
}

need_rust() {
  need cc gcc
  local version
  version=$(rustc --version 2>/dev/null | cut -d ' ' -f 2) || true
  if [ -z "$version" ]; then
    problems+=("no Rust: install it with rustup (https://rustup.rs), $rust_wanted or newer, and have cargo in PATH")
  elif [ "$(printf '%s\n' "$rust_wanted" "$version" | sort -V | head -n 1)" != "$rust_wanted" ]; then
    problems+=("Rust $version is too old, $rust_wanted or newer is needed: rustup update")
  fi
}

need_lints() {
  local component
  for component in fmt clippy; do
    cargo "$component" --version >/dev/null 2>&1 ||
      problems+=("no cargo $component: rustup component add rustfmt clippy")
  done
}

need_go() {
  # What is built from Go modules: the build scripts get Go themselves where there is none (go.sh).
  command -v go >/dev/null || { need python3 python3; need python3-config python3-venv; }
}

case $target in
  demo | bench) need_root; need_rust; need nft nftables; need ip iproute2 ;;
  bench-peer) need_root; need_rust; need nft nftables; need ip iproute2; need_go ;;
  test) need_root; need_rust; need nft nftables; need ip iproute2; need iptables iptables; need setcap libcap2-bin; need_go ;;
  image) need_rust; need python3 python3; need readelf binutils ;;
  kind)
    need_rust; need python3 python3; need readelf binutils
    command -v docker >/dev/null || packages+=(docker.io)
    if [ -n "${NODE_IMAGE:-}" ]; then
      # The rest is in that image.
      command -v kind >/dev/null || problems+=("no kind in PATH: https://kind.sigs.k8s.io")
      command -v kubectl >/dev/null || problems+=("no kubectl in PATH")
    else
      need_root; need debootstrap debootstrap
      if [ "${CI:-}" = true ]; then need_go
      else command -v go >/dev/null || problems+=("no Go: a cluster is built from Go modules"); fi
    fi
    ;;
  lint) need_rust; need_lints; need git git; need shellcheck shellcheck ;;
  *) echo "prepare.sh: no such target: $target" >&2; exit 2 ;;
esac

if [ ${#packages[@]} -gt 0 ]; then
  if [ "$install" = yes ] && command -v apt-get >/dev/null && [ "$(id -u)" = 0 ]; then
    echo "installing: ${packages[*]}"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null
  else
    problems+=("missing packages: ${packages[*]}; install them yourself, or let it be done: make $target INSTALL=1")
  fi
fi

if [ ${#problems[@]} -gt 0 ]; then
  echo "make $target cannot start:" >&2
  printf '  - %s\n' "${problems[@]}" >&2
  exit 2
fi
