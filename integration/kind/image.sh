#!/usr/bin/env bash
# Makes the image of a kind node from Debian packages and the binaries of build.sh, where the engine
# does not have it yet, and prints its name. Needs root, debootstrap and a container engine.
#
# usage: image.sh
#
# environment: as build.sh
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}

# Of systemd, what a node needs of it; of the rest, what the kubelet, kubeadm, kind and the test run.
readonly PACKAGES=systemd,systemd-sysv,dbus,iproute2,nftables,iptables,conntrack,socat,ethtool,kmod,mount,procps,ca-certificates,util-linux,curl,jq,iputils-ping,libseccomp2,runc,containernetworking-plugins

say() { printf '%s\n' "image.sh: $*" >&2; }

main() {
    local binaries name
    binaries=$("$here/build.sh")
    name=portcullis-kind-node:$(fingerprint "$binaries")
    if ! docker image inspect "$name" >/dev/null 2>&1; then
        say "making $name"
        work=$(mktemp -d "$cache/node.XXXXXX")
        trap 'rm -rf "$work"' EXIT
        "$here/debian.sh" "$PACKAGES" "$work/root"
        container_images "$binaries" "$work/root/kind/images"
        node "$binaries" "$work/root"
        tar -C "$work/root" -c . |
            docker import --change 'ENV container=docker' \
                --change 'ENTRYPOINT ["/usr/local/bin/entrypoint","/sbin/init"]' - "$name" >/dev/null
        say "$name: $(du -sh "$work/root" | cut -f 1)"
    fi
    echo "$name"
}

fingerprint() {
    {
        basename "$1"
        cd "$here" && find image.sh debian.sh node ../../image/archive.py -type f -print0 | sort -z | xargs -0 sha256sum
    } | sha256sum | cut -c 1-16
}

# The images that kubeadm asks for, by the names that it has for them.
container_images() {
    local binaries=$1 directory=$2 name
    mkdir -p "$directory/all" "$directory/control-plane"
    while read -r name; do
        case $name in
            */kube-apiserver:*) of "$directory/control-plane" "$name" kube-apiserver /usr/local/bin ;;
            */kube-controller-manager:*) of "$directory/control-plane" "$name" kube-controller-manager /usr/local/bin ;;
            */kube-scheduler:*) of "$directory/control-plane" "$name" kube-scheduler /usr/local/bin ;;
            */etcd:*) of "$directory/control-plane" "$name" etcd /usr/local/bin ;;
            */coredns:*) of "$directory/all" "$name" coredns / --entrypoint /coredns ;;
            */pause:*) of "$directory/all" "$name" pause / --entrypoint /pause --user 65535:65535 ;;
        esac
    done < <(image_names "$binaries")
    of "$directory/all" agnhost:portcullis agnhost / --entrypoint /agnhost
}

image_names() {
    local version
    version=$("$1/kubeadm" version --output short)
    "$1/kubeadm" config images list --kubernetes-version "$version"
}

# of DIRECTORY NAME BINARY WHERE [OPTION...]: an image of one binary.
of() {
    local directory=$1 name=$2 binary=$3 where=${4%/}
    shift 4
    "$here/../../image/archive.py" "$directory/$binary.tar" "$name" --level 1 "$@" \
        "$where/$binary=$binaries/$binary" >/dev/null
}

# Everything else on the node.
node() {
    local binaries=$1 root=$2 pause unit wants
    pause=$(image_names "$binaries" | grep /pause:)
    cd "$root"
    rm -f usr/bin/containerd* usr/bin/ctr lib/systemd/system/containerd.service
    # What a container neither needs nor may do.
    rm -f etc/systemd/system/*.wants/* lib/systemd/system/{multi-user,local-fs,basic}.target.wants/* \
        lib/systemd/system/sockets.target.wants/*{udev,initctl}* \
        lib/systemd/system/timers.target.wants/* lib/systemd/system/sysinit.target.wants/*.mount \
        lib/systemd/system/sysinit.target.wants/systemd-{tmpfiles-setup,sysctl,binfmt,firstboot,hwdb-update}*
    echo ReadKMsg=no >>etc/systemd/journald.conf
    mkdir -p opt/cni/bin etc/kubernetes/manifests var/lib/kubelet usr/local/bin
    mv usr/lib/cni/{ptp,host-local,loopback,portmap} opt/cni/bin/
    rm -rf usr/lib/cni
    cp "$binaries"/{containerd,containerd-shim-runc-v2,ctr,crictl} usr/local/bin/
    cp "$binaries"/{kubeadm,kubectl,kubelet} usr/bin/
    cp -r "$here/node/." .
    sed -i "s|@PAUSE@|$pause|" etc/containerd/config.toml
    "$binaries/kubeadm" version --output short >kind/version
    wants=etc/systemd/system/multi-user.target.wants
    mkdir -p "$wants"
    for unit in containerd preload kubelet; do
        ln -s "/etc/systemd/system/$unit.service" "$wants/$unit.service"
    done
    for unit in systemd-logind.service getty.target console-getty.service systemd-binfmt.service \
        systemd-sysctl.service systemd-remount-fs.service; do
        ln -sf /dev/null "etc/systemd/system/$unit"
    done
    rm -f etc/resolv.conf etc/hostname
    : >etc/machine-id
    cd "$here"
}

main
