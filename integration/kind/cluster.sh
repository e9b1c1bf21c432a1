# shellcheck shell=bash
# A cluster of kind: its nodes, a network for its Pods and a Service proxy. test.sh and e2e.sh source
# this file.
#
# environment:
#   NODE_IMAGE           a node image of kind to be used, which the engine has or can get, instead of one that
#                        is made here; kind and kubectl are then those in PATH
#   AGNHOST              with NODE_IMAGE: the image of upstream's test server
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
# From who sources it: work, a directory. What the others use:
# shellcheck disable=SC2034,SC2154

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}

# The name of the cluster. manifests/overlays/kind has it, too.
readonly NAME=portcullis
readonly control_plane=$NAME-control-plane
workers=$NAME-worker
for ((number = 2; number <= ${WORKERS:-2}; number++)); do
    workers+=" $NAME-worker$number"
done
readonly workers
readonly nodes="$control_plane $workers"
# The clients outside of the cluster.
readonly ALLOWED=$NAME-client-a REFUSED=$NAME-client-b
# What Pods of the test run, by the name that workload.yaml has for it.
readonly SERVER=agnhost:portcullis

say() { printf '%s\n' "${0##*/}: $*" >&2; }

# eventually SECONDS COMMAND...: tries it every quarter of a second.
eventually() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.25
    done
}

kubectl() { "${binaries:+$binaries/}kubectl" "$@"; }

kind() { "${binaries:+$binaries/}kind" "$@"; }

# ip CONTAINER FAMILY
ip() {
    local field=IPAddress
    [[ $2 == 6 ]] && field=GlobalIPv6Address
    docker inspect --format "{{(index .NetworkSettings.Networks \"kind\").$field}}" "$1"
}

# prepare [e2e]: builds or finds everything that a cluster takes. `binaries` is empty where programs are
# those in PATH.
prepare() {
    if [[ -n ${NODE_IMAGE:-} ]]; then
        binaries=''
        node_image=$NODE_IMAGE
        server=${AGNHOST:-registry.k8s.io/e2e-test-images/agnhost:2.63.0}
        local image
        for image in "$node_image" "$server"; do
            docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" >&2
        done
    else
        binaries=$("$here/build.sh" "$@")
        node_image=$("$here/image.sh")
        server=
    fi
    archive=$root/$(cd "$root" && image/build.sh)
    program=$(cd "$root" && image/compile.sh 2>/dev/null)
    generator=$(cd "$root" && PROGRAM=portcullis-load image/compile.sh)
}

# members: the containers of the cluster.
members() { docker ps --all --quiet --filter "label=io.x-k8s.kind.cluster=$NAME"; }

# One at a time, because there is one name.
must_be_alone() {
    [[ -z $(members) ]] || {
        say "there is a cluster $NAME already: make kind-delete"
        exit 1
    }
}

delete_cluster() {
    local container
    for container in $(members) "$ALLOWED" "$REFUSED"; do
        docker rm --force --volumes "$container" >/dev/null 2>&1 || true
    done
}

# For a trap: deletes the cluster unless it is to be kept.
clean_up() {
    if [[ -n ${KEEP:-} && -n $(members) ]]; then
        say "the cluster stays; its kubeconfig is $KUBECONFIG. To delete it: make kind-delete"
        return
    fi
    delete_cluster
    rm -rf "$work"
}

# create ipv4|dual|...: a cluster without a network for Pods and without a proxy.
create() {
    local family=ipv4 patches='' roles='{role: control-plane}' worker
    [[ $1 == ipv4 ]] || family=dual
    # What the node image of ours needs, also on machines with cgroup v1. kind's own needs none of it.
    [[ -n ${NODE_IMAGE:-} ]] || patches='
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    failCgroupV1: false
    cgroupDriver: cgroupfs
    oomScoreAdj: 0
    resolvConf: /kind/resolv.conf'
    for worker in $workers; do
        roles+=', {role: worker}'
    done
    kind create cluster --name "$NAME" --image "$node_image" --config /dev/stdin <<END
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking: {disableDefaultCNI: true, kubeProxyMode: none, ipFamily: $family}
nodes: [$roles]$patches
END
    kind get kubeconfig --internal --name "$NAME" >"$work/kubeconfig-internal"
}

# The network of the Pods, the names of the nodes, and two clients outside.
settle() {
    local node name
    eventually 60 have_ranges
    for node in $nodes; do
        network "$node"
        name_control_plane "$node"
        # As docs/cluster.md has it: the daemon's container cannot.
        docker exec "$node" sysctl --quiet --write net.netfilter.nf_conntrack_tcp_timeout_established=86400 \
            net.netfilter.nf_conntrack_tcp_timeout_close_wait=3600
    done
    kubectl wait --for condition=Ready nodes --all --timeout 120s
    for name in $ALLOWED $REFUSED; do
        docker run --detach --name "$name" --hostname "$name" --network kind --cap-add NET_ADMIN \
            --entrypoint sleep "$node_image" infinity
    done
    kind load image-archive --name "$NAME" "$archive"
    if [[ -n $server ]]; then
        docker tag "$server" "$SERVER"
        kind load docker-image --name "$NAME" "$SERVER"
    fi
}

# Pods on the node's network look names up where the node does, and it may not know this one.
name_control_plane() {
    docker exec "$1" sh -c 'echo "$1 $2" >>/etc/hosts' sh "$(ip "$control_plane" 4)" "$control_plane"
}

# ranges NODE: the addresses of its Pods.
ranges() {
    kubectl get node "$1" --output jsonpath='{.spec.podCIDRs[*]}'
}

have_ranges() {
    local node
    for node in $nodes; do
        [[ -n $(ranges "$node" 2>/dev/null) ]] || return 1
    done
}

# Gives the Pods of a node addresses, and routes to those of the others.
network() {
    local node=$1 range address other list='' routes=''
    for range in $(ranges "$node"); do
        list+=",[{\"subnet\": \"$range\"}]"
        case $range in
            *:*) routes+=',{"dst": "::/0"}' ;;
            *) routes+=',{"dst": "0.0.0.0/0"}' ;;
        esac
    done
    docker exec --interactive "$node" sh -c 'cat >/etc/cni/net.d/10-portcullis.conflist' <<END
{"cniVersion": "0.3.1", "name": "portcullis", "plugins": [
  {"type": "ptp", "mtu": 1500, "ipMasq": false,
   "ipam": {"type": "host-local", "dataDir": "/run/cni-ipam", "ranges": [${list#,}], "routes": [${routes#,}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
END
    for other in $nodes; do
        [[ $other == "$node" ]] && continue
        for range in $(ranges "$other"); do
            case $range in
                *:*) address=$(ip "$other" 6) ;;
                *) address=$(ip "$other" 4) ;;
            esac
            docker exec "$node" ip route replace "$range" via "$address"
        done
    done
}

# Portcullis, as docs/cluster.md has it.
install_portcullis() {
    kubectl apply --kustomize "$root/manifests/overlays/kind"
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 120s
    kubectl --namespace kube-system rollout status deployment coredns --timeout 120s
}

# kube-proxy, as kubeadm has it.
install_kube_proxy() {
    local image=portcullis-kube-proxy:test
    if [[ -n ${NODE_IMAGE:-} ]]; then
        # It comes with the node.
        image=$(docker exec "$control_plane" kubeadm config images list 2>/dev/null | grep /kube-proxy:)
    else
        "$here/kube-proxy.sh" "$binaries" "$node_image" "$work/kube-proxy.tar" "$image"
        kind load image-archive --name "$NAME" "$work/kube-proxy.tar"
        rm "$work/kube-proxy.tar"
    fi
    sed -e "s|@IMAGE@|$image|" -e "s|@SERVER@|https://$control_plane:6443|" "$here/kube-proxy.yaml" |
        kubectl apply --filename -
    kubectl --namespace kube-system rollout status daemonset kube-proxy --timeout 120s
    kubectl --namespace kube-system rollout status deployment coredns --timeout 120s
}

# evidence DIRECTORY: logs, objects, rulesets and tracked connections of the cluster.
evidence() {
    local directory=$1 node
    kind export logs --name "$NAME" "$directory/kind" >/dev/null 2>&1 || true
    kubectl --request-timeout 20s get all,endpointslices,events --all-namespaces --output wide \
        >"$directory/objects" 2>&1 || true
    kubectl --request-timeout 20s --namespace portcullis logs --prefix --tail -1 \
        --selector app.kubernetes.io/name=portcullis >"$directory/portcullis.log" 2>&1 || true
    for node in $nodes; do
        docker exec "$node" nft list ruleset >"$directory/ruleset-$node" 2>&1 || true
        docker exec "$node" conntrack -L >"$directory/connections-$node" 2>&1 || true
    done
}
