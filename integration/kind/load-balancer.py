#!/usr/bin/env python3
"""A load balancer for upstream's tests: gives every Service of type LoadBalancer an IPv4 address, and routes it,
in the network namespace that this runs in, to the nodes that say that they can serve. With
`externalTrafficPolicy: Local` these are the ones whose health check for the Service passes, otherwise the
ones whose proxy is healthy. With session affinity all connections go to one node. The connections of this
machine come from an address outside of the nodes' network, as those of a client far away.

It runs until it is ended, and needs `kubectl` with its KUBECONFIG, `ip`, and root.

usage: load-balancer.py NODE-ADDRESS...
"""

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request

FINALIZER = "service.kubernetes.io/load-balancer-cleanup"
# Both are for documentation (RFC 5737), so they are nobody's.
SOURCE = "192.0.2.1"
ADDRESSES = [f"203.0.113.{host}" for host in range(1, 255)]
PROXY_HEALTH = 10256


def main():
    nodes = sys.argv[1:]
    given, routes = {}, {}
    # Connections, and not only clients, are spread over the nodes.
    run("sysctl", "--quiet", "--write", "net.ipv4.fib_multipath_hash_policy=1")
    run("ip", "address", "replace", f"{SOURCE}/32", "dev", "lo")
    while True:
        try:
            turn(nodes, given, routes)
        except (subprocess.CalledProcessError, json.JSONDecodeError) as error:
            # The API server, or somebody was faster; next time.
            print(f"load-balancer.py: {error}", file=sys.stderr, flush=True)
        time.sleep(0.5)


def turn(nodes, given, routes):
    services = json.loads(kubectl("get", "services", "--all-namespaces", "--output", "json"))["items"]
    for service in services:
        uid = service["metadata"]["uid"]
        if wanted(service):
            if uid not in given:
                given[uid] = next(address for address in ADDRESSES if address not in given.values())
            offer(service, given[uid])
            route(given[uid], healthy(nodes, service), routes)
        elif FINALIZER in service["metadata"].get("finalizers", []):
            withdraw(service)
    alive = {service["metadata"]["uid"] for service in services if wanted(service)}
    for uid in [uid for uid in given if uid not in alive]:
        unroute(given.pop(uid), routes)


def wanted(service):
    spec = service["spec"]
    return (
        spec["type"] == "LoadBalancer"
        and not spec.get("loadBalancerClass")
        and "IPv4" in spec.get("ipFamilies", [])
        and "deletionTimestamp" not in service["metadata"]
    )


def offer(service, address):
    finalizers = service["metadata"].get("finalizers", [])
    if FINALIZER not in finalizers:
        patch(service, {"metadata": {"finalizers": [*finalizers, FINALIZER]}})
    ingress = service["status"].get("loadBalancer", {}).get("ingress", [])
    if [entry.get("ip") for entry in ingress] != [address]:
        status = {"status": {"loadBalancer": {"ingress": [{"ip": address}]}}}
        patch(service, status, "--subresource", "status")


def withdraw(service):
    patch(service, {"status": {"loadBalancer": None}}, "--subresource", "status")
    others = [name for name in service["metadata"]["finalizers"] if name != FINALIZER]
    patch(service, {"metadata": {"finalizers": others}})


def healthy(nodes, service):
    port = PROXY_HEALTH
    if service["spec"].get("externalTrafficPolicy") == "Local":
        port = service["spec"].get("healthCheckNodePort", port)
    able = [node for node in nodes if passes(f"http://{node}:{port}/healthz")]
    return able[:1] if service["spec"]["sessionAffinity"] == "ClientIP" else able


def passes(url):
    try:
        with urllib.request.urlopen(url, timeout=1) as answer:
            return answer.status == 200
    except (urllib.error.URLError, OSError):
        return False


def route(address, nodes, routes):
    if routes.get(address) == nodes:
        return
    hops = [word for node in nodes for word in ("nexthop", "via", node)]
    # Nobody there: refused, as a load balancer without targets does.
    arguments = [address, "src", SOURCE, *hops] if hops else ["unreachable", address]
    run("ip", "route", "replace", *arguments)
    routes[address] = nodes


def unroute(address, routes):
    if address in routes:
        run("ip", "route", "del", address)
        del routes[address]


def patch(service, change, *options):
    metadata = service["metadata"]
    kubectl(
        *("--namespace", metadata["namespace"], "patch", "service", metadata["name"]),
        *("--type", "merge", "--patch", json.dumps(change), *options),
    )


def kubectl(*arguments):
    return run("kubectl", "--request-timeout", "10s", *arguments)


def run(*command):
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return done.stdout


if __name__ == "__main__":
    main()
