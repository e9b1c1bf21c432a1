#!/usr/bin/env bash
# `make kind-test`: the image and the manifests on real clusters of three nodes, made by kind. One
# cluster after the other; on each, the checks of checks.sh. Prints a table. Of a check that fails it
# keeps the logs and the rulesets.
#
# usage: engine.sh test.sh [CLUSTER...]
#   ipv4      without kube-proxy, IPv4
#   dual      without kube-proxy, both families
#   takeover  with kube-proxy, which is replaced under load
#
# environment:
#   KEEP=1               the last cluster stays, and so does an engine that was started for it
#   ONLY=NAME            runs the checks whose names contain NAME
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
# What checks.sh uses, and what is called by its name alone:
# shellcheck disable=SC2034,SC2317
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}

# The name of the cluster. manifests/overlays/kind has it, too.
readonly NAME=portcullis
readonly control_plane=$NAME-control-plane
readonly workers="$NAME-worker $NAME-worker2"
readonly nodes="$control_plane $workers"

# The checks of each cluster, in their order.
readonly SERVING='cluster_ip_from_pods cluster_ip_from_nodes hairpin node_port_from_outside firewall
    revocation external_traffic_policy_local load_balancer_address session_affinity dns no_endpoints
    rights audit'
readonly CHECKS_ipv4="$SERVING rolling_update api_server_away audit"
readonly CHECKS_dual="$SERVING rolling_update audit"
readonly CHECKS_takeover="takeover $SERVING"

say() { printf '%s\n' "test.sh: $*" >&2; }

# shellcheck source=/dev/null
source "$here/checks.sh"

# eventually SECONDS COMMAND...: tries it every quarter of a second.
eventually() {
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        ((SECONDS < end)) || return 1
        sleep 0.25
    done
}

kubectl() { "$binaries/kubectl" "$@"; }

kind() { "$binaries/kind" "$@"; }

# ip CONTAINER FAMILY
ip() {
    local field=IPAddress
    [[ $2 == 6 ]] && field=GlobalIPv6Address
    docker inspect --format "{{(index .NetworkSettings.Networks \"kind\").$field}}" "$1"
}

main() {
    local cluster failed=0
    for cluster in "$@"; do
        [[ -n $(checks_of "$cluster") ]] || { say "no such cluster: $cluster"; exit 2; }
    done
    binaries=$("$here/build.sh")
    node_image=$("$here/image.sh")
    archive=$root/$(cd "$root" && image/build.sh)
    program=$(cd "$root" && image/compile.sh 2>/dev/null)
    work=$(mktemp -d "$cache/test.XXXXXX")
    failures=$root/target/kind
    rm -rf "$failures"
    export KUBECONFIG=$work/kubeconfig
    results=$work/results
    : >"$results"
    if kind get clusters 2>/dev/null | grep -qx "$NAME"; then
        say "there is a cluster $NAME already: kind delete cluster --name $NAME"
        exit 1
    fi
    trap clean_up EXIT
    for cluster in "$@"; do
        run "$cluster" || failed=1
    done
    table
    ((failed == 0)) || say "logs and rulesets of what failed are in $failures"
    exit $failed
}

checks_of() {
    local list=CHECKS_$1
    echo "${!list:-}"
}

clean_up() {
    if [[ -n ${KEEP:-} && $(kind get clusters 2>/dev/null) == *$NAME* ]]; then
        say "the cluster stays; its kubeconfig is $KUBECONFIG"
        return
    fi
    delete_cluster
    rm -rf "$work"
}

delete_cluster() {
    docker rm --force --volumes "$ALLOWED" "$REFUSED" >/dev/null 2>&1 || true
    kind delete cluster --name "$NAME" >/dev/null 2>&1 || true
}

# run CLUSTER: makes it, checks it and deletes it.
run() {
    local cluster=$1 check failed=0 began
    families=4
    [[ $cluster == ipv4 ]] || families='4 6'
    delete_cluster
    for check in create settle install $(checks_of "$cluster"); do
        case $check in create | settle | install) ;; *${ONLY:-}*) ;; *) continue ;; esac
        [[ $cluster$check == takeoverinstall ]] && check=install_kube_proxy
        began=$(date +%s%N)
        # In the background, because in a condition the shell would not stop at the first failure.
        step "$cluster" "$check" >"$work/log" 2>&1 &
        if wait $!; then
            record "$cluster" "$check" ok "$began"
        else
            failed=1
            record "$cluster" "$check" FAILED "$began"
            keep "$cluster" "$check"
            # Without a cluster there is nothing to check.
            case $check in create | settle | install*) break ;; esac
        fi
    done
    if [[ -z ${KEEP:-} || $cluster != "${clusters[-1]}" ]]; then
        delete_cluster
    fi
    return $failed
}

# step CLUSTER CHECK: what it says about itself is in the file `detail` afterwards.
step() {
    detail=
    trap 'printf %s "$detail" >"$work/detail"' EXIT
    case $2 in
        create | settle | install | install_kube_proxy) "$2" "$1" ;;
        *) "check_$2" ;;
    esac
}

record() {
    local took=$((($(date +%s%N) - $4) / 100000000))
    printf '%s\t%s\t%s\t%s s\t%s\n' "$1" "${2//_/ }" "$3" "$((took / 10)).$((took % 10))" "$(<"$work/detail")" |
        tee -a "$results" >&2
}

table() {
    echo
    echo '| cluster | check | result | time | |'
    echo '|---|---|---|---|---|'
    sed -e 's/\t/ | /g' -e 's/^/| /' -e 's/$/ |/' "$results"
}

# keep CLUSTER CHECK: what there is to say about a failure.
keep() {
    local directory=$failures/$1-$2 node
    mkdir -p "$directory"
    cp "$work/log" "$directory/check.log"
    cp "$work"/{audit,cleanup} "$directory/" 2>/dev/null || true
    kind export logs --name "$NAME" "$directory/kind" >/dev/null 2>&1 || true
    timeout 20 "$binaries/kubectl" get all,endpointslices,events --all-namespaces --output wide \
        >"$directory/objects" 2>&1 || true
    timeout 20 "$binaries/kubectl" --namespace portcullis logs --selector app.kubernetes.io/name=portcullis \
        --prefix --tail -1 >"$directory/portcullis.log" 2>&1 || true
    for node in $nodes; do
        docker exec "$node" nft list ruleset >"$directory/ruleset-$node" 2>&1 || true
        docker exec "$node" conntrack -L >"$directory/connections-$node" 2>&1 || true
    done
    say "$1, $2: see $directory"
}

# A cluster of three nodes with a network for Pods and without a proxy.
create() {
    local family=ipv4
    [[ $1 == ipv4 ]] || family=dual
    kind create cluster --name "$NAME" --image "$node_image" --config /dev/stdin <<END
kind: Cluster
apiVersion: kind.x-k8s.io/v1alpha4
networking: {disableDefaultCNI: true, kubeProxyMode: none, ipFamily: $family}
nodes: [{role: control-plane}, {role: worker}, {role: worker}]
kubeadmConfigPatches:
  - |
    kind: KubeletConfiguration
    # Neither needs the other one; the node image works with both.
    failCgroupV1: false
    cgroupDriver: cgroupfs
    oomScoreAdj: 0
    resolvConf: /kind/resolv.conf
END
    kind get kubeconfig --internal --name "$NAME" >"$work/kubeconfig-internal"
}

# The network of the Pods, the names of the nodes, and two clients outside.
settle() {
    local node name
    eventually 60 have_ranges
    for node in $nodes; do
        network "$node"
        # Pods on the node's network look names up where the node does; this one names no server.
        docker exec "$node" sh -c 'echo "$1 $2" >>/etc/hosts' sh "$(ip "$control_plane" 4)" "$control_plane"
    done
    kubectl wait --for condition=Ready nodes --all --timeout 120s
    for name in $ALLOWED $REFUSED; do
        docker run --detach --name "$name" --hostname "$name" --network kind --cap-add NET_ADMIN \
            --entrypoint sleep "$node_image" infinity
    done
    kind load image-archive --name "$NAME" "$archive"
}

# ranges NODE: the addresses of its Pods.
ranges() {
    kubectl get node "$1" --output jsonpath='{.spec.podCIDRs[*]}'
}

have_ranges() {
    local node
    for node in $nodes; do
        [[ -n $(ranges "$node") ]] || return 1
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

# Portcullis, as docs/cluster.md has it; then what is served.
install() {
    kubectl apply --kustomize "$root/manifests/overlays/kind"
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 120s
    serve_something
}

# kube-proxy, as kubeadm has it; then what is served.
install_kube_proxy() {
    local image=portcullis-kube-proxy:test
    "$here/kube-proxy.sh" "$binaries" "$node_image" "$work/kube-proxy.tar" "$image"
    kind load image-archive --name "$NAME" "$work/kube-proxy.tar"
    rm "$work/kube-proxy.tar"
    sed -e "s|@IMAGE@|$image|" -e "s|@SERVER@|https://$control_plane:6443|" "$here/kube-proxy.yaml" |
        kubectl apply --filename -
    kubectl --namespace kube-system rollout status daemonset kube-proxy --timeout 120s
    cp -r "$root/manifests" "$work/"
    sed -i "s/^KUBERNETES_SERVICE_HOST=.*/KUBERNETES_SERVICE_HOST=$control_plane/" \
        "$work/manifests/overlays/cluster/api-server.env"
    serve_something
}

serve_something() {
    kubectl apply --filename "$here/workload.yaml"
    kubectl --namespace kube-system rollout status deployment coredns --timeout 120s
    kubectl --namespace shop rollout status deployment web --timeout 60s
    kubectl --namespace shop rollout status deployment local --timeout 60s
    kubectl --namespace shop rollout status daemonset client --timeout 60s
}

clusters=("$@")
((${#clusters[@]})) || clusters=(ipv4 dual takeover)
main "${clusters[@]}"
