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

# shellcheck source=/dev/null
source "$here/../go.sh"
# For go.sh:
# shellcheck disable=SC2034
readonly tags='no_aufs no_zfs no_btrfs no_devmapper'

cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
install_go=''
[[ ${CI:-} != true ]] || install_go=yes
find_go "${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis" "$install_go" ''
fingerprint=$(
    cd "$here" && sha256sum build.sh ../go.sh pause.c ./*/*/go.mod ./*/*/go.sum ./*/*/*.go \
        ../controlplane/*/go.mod ../controlplane/*/go.sum ../controlplane/*/*.go |
        sha256sum | cut -c 1-16
)
directory=$cache/bin-$fingerprint
mkdir -p "$directory"
exec {lock}>"$directory/.lock"
flock "$lock"

stamp=$(stamp "$controlplane/kubernetes")
for binary in kube-apiserver kube-controller-manager kube-scheduler kube-proxy kubeadm kubelet kubectl; do
    compile "$directory" "$binary" "$controlplane/kubernetes" "k8s.io/kubernetes/cmd/$binary" "$stamp"
done
compile "$directory" agnhost "$controlplane/kubernetes" k8s.io/kubernetes/test/images/agnhost
compile "$directory" etcd "$controlplane/etcd" .
compile "$directory" coredns "$here/go/coredns" .
containerd=github.com/containerd/containerd/v2
version=$(cd "$here/go/containerd" && go list -m -f '{{.Version}}' $containerd)
for binary in containerd containerd-shim-runc-v2 ctr; do
    compile "$directory" "$binary" "$here/go/containerd" "$containerd/cmd/$binary" \
        "-X $containerd/version.Version=$version"
done
compile "$directory" crictl "$here/go/crictl" sigs.k8s.io/cri-tools/cmd/crictl
compile "$directory" kind "$here/go/kind" sigs.k8s.io/kind
[[ -x $directory/pause ]] || cc -Os -static -s -o "$directory/pause" "$here/pause.c"
if [[ ${1:-} == e2e ]]; then
    compile "$directory" ginkgo "$controlplane/kubernetes" github.com/onsi/ginkgo/v2/ginkgo
    compile "$directory" e2e.test "$controlplane/kubernetes" k8s.io/kubernetes/test/e2e "$stamp"
    compile "$directory" regression-issue-74839 "$controlplane/kubernetes" \
        k8s.io/kubernetes/test/images/regression-issue-74839
fi
echo "$directory"
