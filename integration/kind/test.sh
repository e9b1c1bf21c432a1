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
#   ONLY="NAME..."       runs the checks whose names contain one of these
#   RATE=2000            so many new connections a second, while the proxy is replaced or killed
#   and those of cluster.sh
# What checks.sh uses, what comes from cluster.sh, and what is called by its name alone:
# shellcheck disable=SC2034,SC2154,SC2317
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
source "$here/cluster.sh"
# shellcheck source=/dev/null
source "$here/checks.sh"

# The checks of each cluster, in their order.
readonly SERVING='cluster_ip_from_pods cluster_ip_from_nodes hairpin node_port_from_outside firewall
    revocation said external_traffic_policy_local load_balancer_address session_affinity dns no_endpoints
    odd_service rights audit'
readonly CHECKS_ipv4="$SERVING rolling_update killed api_server_away node_away audit"
readonly CHECKS_dual="$SERVING rolling_update killed audit"
readonly CHECKS_takeover="takeover $SERVING"
readonly RATE=${RATE:-2000}

main() {
    local cluster code failed=0
    for cluster in "$@"; do
        [[ -n $(checks_of "$cluster") ]] || { say "no such cluster: $cluster"; exit 2; }
    done
    prepare
    work=$(mktemp -d "$cache/test.XXXXXX")
    failures=$root/target/kind
    rm -rf "$failures"
    export KUBECONFIG=$work/kubeconfig
    results=$work/results
    : >"$results"
    must_be_alone
    trap clean_up EXIT
    for cluster in "$@"; do
        run "$cluster" || { code=$?; ((failed == 1)) || failed=$code; }
    done
    table
    ((failed == 0)) || say "logs and rulesets of what failed are in $failures"
    exit $failed
}

checks_of() {
    local list=CHECKS_$1
    echo "${!list:-}"
}

# run CLUSTER: makes it, checks it and deletes it.
run() {
    local cluster=$1 check failed=0 began
    families=4
    [[ $cluster == ipv4 ]] || families='4 6'
    delete_cluster
    for check in create settle install $(checks_of "$cluster"); do
        wanted "$check" || continue
        began=$(date +%s%N)
        # In the background, because in a condition the shell would not stop at the first failure.
        step "$cluster" "$check" >"$work/log" 2>&1 &
        if wait $!; then
            record "$cluster" "$check" ok "$began"
        else
            failed=1
            # Nothing of ours ran: sysexits.h, EX_UNAVAILABLE.
            [[ $check == create ]] && failed=69
            record "$cluster" "$check" FAILED "$began"
            keep "$cluster" "$check"
            # Without a cluster there is nothing to check.
            case $check in create | settle | install) break ;; esac
        fi
    done
    if [[ -z ${KEEP:-} || $cluster != "${clusters[-1]}" ]]; then
        delete_cluster
    fi
    return $failed
}

wanted() {
    local name
    case $1 in create | settle | install) return ;; esac
    for name in ${ONLY:-"$1"}; do
        [[ $1 != *$name* ]] || return 0
    done
    return 1
}

# step CLUSTER CHECK: what it says about itself is in the file `detail` afterwards.
step() {
    detail=
    trap 'printf %s "$detail" >"$work/detail"' EXIT
    case $2 in
        create | settle | install) "$2" "$1" ;;
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
    local directory=$failures/$1-$2
    mkdir -p "$directory"
    cp "$work/log" "$directory/check.log"
    cp "$work"/{audit,cleanup} "$directory/" 2>/dev/null || true
    evidence "$directory"
    say "$1, $2: see $directory"
}

# What a cluster begins with: a proxy, and what it serves.
install() {
    if [[ $1 == takeover ]]; then
        install_kube_proxy
        # For the takeover, with the edit that docs/cluster.md asks for.
        cp -r "$root/manifests" "$work/"
        sed -i "s/^KUBERNETES_SERVICE_HOST=.*/KUBERNETES_SERVICE_HOST=$control_plane/" \
            "$work/manifests/overlays/cluster/api-server.env"
    else
        install_portcullis
    fi
    kubectl apply --filename "$here/workload.yaml"
    kubectl --namespace shop rollout status deployment web --timeout 60s
    kubectl --namespace shop rollout status deployment local --timeout 60s
    kubectl --namespace shop rollout status daemonset client --timeout 60s
}

clusters=("$@")
((${#clusters[@]})) || clusters=(ipv4 dual takeover)
main "${clusters[@]}"
