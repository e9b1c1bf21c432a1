#!/usr/bin/env bash
# `make kind-e2e`: upstream's own tests of the network on a cluster of kind whose Services Portcullis serves.
# Prints a table; the report in JUnit's format, the log and what is to be said about failures are in a
# directory for each kind of cluster in target/kind-e2e. No test is tried again.
#
# usage: engine.sh e2e.sh [FOCUS]
#   FOCUS  a regular expression of names (default: every test of the network)
#
# What is left out: tests that disturb others or that upstream calls unreliable, those of features that the
# cluster does not have, and those that e2e-skip.txt names, with the reason.
#
# environment:
#   CLUSTER=dual   both families (default: ipv4)
#   LOAD_BALANCER=1  brings a load balancer along, for upstream's tests of such, some of which take a quarter of an
#                  hour; only with an engine that engine.sh started, because it sets routes
#   KUBE_PROXY=1   kube-proxy in nftables mode serves, to compare with
#   WORKERS=5      so many nodes besides the control plane (default: 2). They are in three zones, and some
#                  tests want two in each.
#   PROCESSES=N    how many tests run at once (default: 3)
#   KEEP=1         the cluster stays, and so does an engine that was started for it. A cluster that is there
#                  is used again.
#   and those of cluster.sh
# From cluster.sh, what is called by its name alone, and what is meant for sed:
# shellcheck disable=SC2154,SC2317,SC2016
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=/dev/null
source "$here/cluster.sh"

readonly FOCUS=${1:-'\[sig-network\]'} CLUSTER=${CLUSTER:-ipv4} LIMIT=${LIMIT:-75m}
readonly PROXY=${KUBE_PROXY:+kube_proxy}
readonly reports=$root/target/kind-e2e/$CLUSTER${KUBE_PROXY:+-kube-proxy}

main() {
    local code=0
    [[ -z ${NODE_IMAGE:-} ]] || { say 'upstream'"'"'s tests run on the node image that is made here'; exit 2; }
    prepare e2e
    images=$("$here/e2e-images.sh" "$binaries")
    work=$cache/e2e.kept
    mkdir -p "$work"
    export KUBECONFIG=$work/kubeconfig
    rm -rf "$reports"
    mkdir -p "$reports"
    trap clean_up EXIT
    set_up >"$reports/cluster.log" 2>&1 || { tail -n 20 "$reports/cluster.log" >&2; exit 1; }
    suite || code=$?
    "$here/e2e-report.py" "$reports/junit.xml" || code=1
    if ((code != 0)); then
        evidence "$reports/evidence"
        say "the tests ended with $code; logs and rulesets are in $reports"
    fi
    exit "$code"
}

set_up() {
    local archive_of_tests
    local kind_of="$CLUSTER $PROXY $nodes"
    if [[ -n $(members) && $(cat "$work/kind" 2>/dev/null) == "$kind_of" ]]; then
        kubectl wait --for condition=Ready nodes --all --timeout 60s
        return
    fi
    must_be_alone
    create "$CLUSTER"
    settle
    widen
    for archive_of_tests in "$images"/*.tar; do
        kind load image-archive --name "$NAME" "$archive_of_tests"
    done
    "install_${PROXY:-portcullis}"
    echo "$kind_of" >"$work/kind"
}

# Some tests want three nodes that Pods may run on, in three zones. What distributes endpoints over zones
# leaves a node out that is labelled as a control plane.
widen() {
    local node number=0
    kubectl taint nodes "$control_plane" node-role.kubernetes.io/control-plane:NoSchedule-
    kubectl label node "$control_plane" node-role.kubernetes.io/control-plane-
    for node in $nodes; do
        kubectl label node "$node" "topology.kubernetes.io/zone=zone-$((number++ % 3))"
    done
}

# Of the tests for a feature, those for what the cluster has: two families or one, and a load balancer.
suite() {
    local node code=0 skip balancer='' addresses=() features=()
    [[ $CLUSTER != dual ]] || features+=(IPv6DualStack)
    if [[ -n ${LOAD_BALANCER:-} ]]; then
        [[ -n ${OWN_NETWORK:-} ]] || { say 'no load balancer: the network of this engine is not ours'; return 2; }
        features+=(LoadBalancer)
        for node in $nodes; do
            addresses+=("$(ip "$node" 4)")
        done
        PATH=$binaries:$PATH "$here/load-balancer.py" "${addresses[@]}" >"$reports/load-balancer.log" 2>&1 &
        balancer=$!
    fi
    local set="${features[*]}" feature='Feature: isEmpty'
    # There is no empty set.
    [[ -z $set ]] || feature="Feature: isSubsetOf {${set// /, }}"
    local labels="!Serial && !Disruptive && !Flaky && $feature"
    local options=(--procs "${PROCESSES:-3}" --no-color --timeout "$LIMIT" --flake-attempts 1
        --focus "$FOCUS" --label-filter "$labels" --output-dir "$reports" --junit-report junit.xml)
    skip=$(skipped)
    [[ -z $skip ]] || options+=(--skip "$skip")
    PATH=$binaries:$PATH ginkgo "${options[@]}" "$binaries/e2e.test" -- -kubeconfig "$KUBECONFIG" \
        -provider skeleton -num-nodes "$(wc -w <<<"$nodes")" >"$reports/e2e.log" 2>&1 || code=$?
    [[ -z $balancer ]] || kill "$balancer"
    return "$code"
}

# The names in e2e-skip.txt, as one regular expression that means them literally.
skipped() {
    sed -E -e '/^(#|$)/d' -e 's/[][\.*^$()+?{}|]/\\&/g' "$here/e2e-skip.txt" | paste -s -d '|'
}

main
