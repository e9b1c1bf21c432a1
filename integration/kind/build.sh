#!/usr/bin/env bash
# Builds what a kind cluster consists of from Go modules, and prints the directory with the binaries:
# Kubernetes, etcd, CoreDNS, containerd, crictl and kind; and agnhost, which is what the Pods of the
# test run. What is built already is not built again: the directory's name has a hash of everything
# that decides what comes out.
#
# usage: build.sh [e2e]
#   e2e  builds upstream's test suite, too, and what runs it
#
# environment:
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
controlplane=$here/../controlplane

say() { printf '%s\n' "build.sh: $*" >&2; }

retry() {
    local try
    for try in 1 2 3 4 5; do
        "$@" && return
        say "failed (attempt $try of 5): $*"
        sleep $((try * 2))
    done
    return 1
}

# compile BINARY MODULE PACKAGE [LINKER FLAGS]: it gets its name when it is complete.
compile() {
    local binary=$1 module=$2 package=$3 flags=${4:-} command=(build)
    [[ $binary == *.test ]] && command=(test -c -vet=off)
    [[ -x $directory/$binary ]] && return
    say "building $binary"
    (
        cd "$module"
        retry go list -mod=readonly -deps -test "$package" >/dev/null
        CGO_ENABLED=0 go "${command[@]}" -mod=readonly -trimpath \
            -tags 'no_aufs no_zfs no_btrfs no_devmapper' -ldflags "-s -w $flags" \
            -o "$directory/.$binary" "$package"
    ) >&2
    mv "$directory/.$binary" "$directory/$binary"
}

command -v go >/dev/null || { say 'there is no go in PATH'; exit 1; }
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
fingerprint=$(
    cd "$here" && sha256sum build.sh pause.c ./*/*/go.mod ./*/*/go.sum ./*/*/*.go \
        ../controlplane/*/go.mod ../controlplane/*/go.sum ../controlplane/*/*.go |
        sha256sum | cut -c 1-16
)
directory=$cache/bin-$fingerprint
mkdir -p "$directory"
exec {lock}>"$directory/.lock"
flock "$lock"

kubernetes=$(cd "$controlplane/kubernetes" && go list -m -f '{{.Version}}' k8s.io/kubernetes)
minor=${kubernetes#v1.}
minor=${minor%%.*}
# Without a stamp they call themselves v0.0.0-master, and refuse to work with each other.
prefix=k8s.io/component-base/version
stamp="-X $prefix.gitVersion=$kubernetes -X $prefix.gitMajor=1 -X $prefix.gitMinor=$minor"
stamp+=" -X $prefix.gitTreeState=clean"
for binary in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubeadm kubelet kubectl; do
    compile "$binary" "$controlplane/kubernetes" "k8s.io/kubernetes/cmd/$binary" "$stamp"
done
compile agnhost "$controlplane/kubernetes" k8s.io/kubernetes/test/images/agnhost
compile etcd "$controlplane/etcd" .
compile coredns "$here/go/coredns" .
containerd=github.com/containerd/containerd/v2
version=$(cd "$here/go/containerd" && go list -m -f '{{.Version}}' $containerd)
for binary in containerd containerd-shim-runc-v2 ctr; do
    compile "$binary" "$here/go/containerd" "$containerd/cmd/$binary" \
        "-X $containerd/version.Version=$version"
done
compile crictl "$here/go/crictl" sigs.k8s.io/cri-tools/cmd/crictl
compile kind "$here/go/kind" sigs.k8s.io/kind
[[ -x $directory/pause ]] || cc -Os -static -s -o "$directory/pause" "$here/pause.c"
if [[ ${1:-} == e2e ]]; then
    compile ginkgo "$controlplane/kubernetes" github.com/onsi/ginkgo/v2/ginkgo
    compile e2e.test "$controlplane/kubernetes" k8s.io/kubernetes/test/e2e "$stamp"
    compile regression-issue-74839 "$controlplane/kubernetes" \
        k8s.io/kubernetes/test/images/regression-issue-74839
fi
echo "$directory"
