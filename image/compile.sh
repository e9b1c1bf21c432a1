#!/usr/bin/env bash
# Compiles the static program of the container image and prints its path.
#
# usage: compile.sh [--install-cross] [amd64|arm64]
#   --install-cross  do not compile; install what it takes to compile for another architecture (apt
#                    and rustup, as root)
#
# Without an architecture it is that of this machine.
#
# environment:
#   PROGRAM  another program of this workspace, which is called as its package is
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "compile.sh: $*" >&2; }

own_architecture() {
    case $(uname -m) in
        x86_64) echo amd64 ;;
        aarch64) echo arm64 ;;
        *) say "no image for $(uname -m)"; exit 2 ;;
    esac
}

install_cross=
if [[ ${1:-} == --install-cross ]]; then
    install_cross=yes
    shift
fi
own=$(own_architecture)
architecture=${1:-$own}

case $architecture in
    amd64) cpu=x86_64 package=x86-64 ;;
    arm64) cpu=aarch64 package=aarch64 ;;
    *) say "no image for $architecture"; exit 2 ;;
esac
target=$cpu-unknown-linux-gnu

if [[ -n $install_cross ]]; then
    if [[ $architecture != "$own" ]]; then
        apt-get update -qq
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
            "gcc-$package-linux-gnu" "libc6-dev-$architecture-cross" >/dev/null
        rustup target add "$target"
    fi
    exit
fi

if [[ $architecture != "$own" ]]; then
    compiler=$cpu-linux-gnu-gcc
    if ! command -v "$compiler" >/dev/null; then
        say "there is no $compiler; $0 --install-cross $architecture installs it"
        exit 1
    fi
    variable=${target//-/_}
    export "CC_$variable=$compiler" "CARGO_TARGET_${variable^^}_LINKER=$compiler"
fi

# One flag a field: paths may have spaces. The image is not to tell of the machine that made it.
flags=(-C target-feature=+crt-static
    --remap-path-prefix "$PWD=/src" --remap-path-prefix "${CARGO_HOME:-$HOME/.cargo}=/cargo")
CARGO_ENCODED_RUSTFLAGS=$(IFS=$'\x1f' && printf '%s' "${flags[*]}")
export CARGO_ENCODED_RUSTFLAGS CARGO_PROFILE_RELEASE_STRIP=symbols
program=${PROGRAM:-portcullis}
directory=${CARGO_TARGET_DIR:-$PWD/target}
"${CARGO:-cargo}" build --locked --release --target "$target" --target-dir "$directory" \
    --package "$program" --bin "$program" >&2
echo "$directory/$target/release/$program"
