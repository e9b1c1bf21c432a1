#!/usr/bin/env bash
# Runs a command with a container engine: the one that is there, or else a Docker engine of its own,
# which ends with the command. That one, and everything that it runs, is in a network namespace of
# its own: the machine's network stays as it is.
#
# usage: engine.sh COMMAND...
#        engine.sh --end       ends an engine that was kept
#
# The exit code is that of the command, and 69 where this machine has no engine and cannot run one.
#
# environment:
#   KEEP=1               an engine that was started for the command goes on after it
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
set -euo pipefail

cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
directory=$cache/engine
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# sysexits.h: EX_UNAVAILABLE
readonly UNAVAILABLE=69

# What the kubelets of a cluster set for the whole machine, and what is raised below. It is put back at
# the end.
readonly SETTINGS=(kernel.panic kernel.panic_on_oops vm.overcommit_memory vm.panic_on_oom
    kernel.keys.root_maxkeys kernel.keys.root_maxbytes
    fs.inotify.max_user_instances fs.inotify.max_user_watches
    net.ipv4.neigh.default.gc_thresh2 net.ipv4.neigh.default.gc_thresh3
    net.ipv6.neigh.default.gc_thresh2 net.ipv6.neigh.default.gc_thresh3)
# What is raised to at least this: systemd in several containers needs many inotify instances, and
# neighbours are counted over all network namespaces of the machine.
readonly WANTED=(fs.inotify.max_user_instances=1024
    net.ipv4.neigh.default.gc_thresh3=32768 net.ipv4.neigh.default.gc_thresh2=16384
    net.ipv6.neigh.default.gc_thresh3=32768 net.ipv6.neigh.default.gc_thresh2=16384)

say() { printf '%s\n' "engine.sh: $*" >&2; }

unavailable() {
    say "$*"
    exit $UNAVAILABLE
}

main() {
    # One that was kept is used again.
    if kept; then
        exec nsenter --target "$(<"$directory/pid")" --net --mount \
            env --chdir "$PWD" OWN_NETWORK=1 "DOCKER_HOST=unix://$directory/docker.sock" "$@"
    fi
    if answers "${DOCKER_HOST:-}"; then
        exec "$@"
    fi
    if [[ $(id -u) != 0 ]]; then
        unavailable 'no container engine answers, and it takes root to start one'
    fi
    if ! command -v dockerd >/dev/null; then
        unavailable 'there is neither an engine that answers nor a dockerd to start (Debian: docker.io)'
    fi
    unshare --net --mount true || unavailable 'namespaces for an engine cannot be made here'
    # Some settings are in the first network namespace alone.
    exec {outside}</proc/self/ns/net
    export outside
    exec unshare --net --mount "${BASH_SOURCE[0]}" --inside "$@"
}

kept() { [[ -f $directory/pid ]] && answers "unix://$directory/docker.sock"; }

# Ends one that was kept, and with it everything that runs in it.
end() {
    if ! kept; then
        say 'there is none of this script to be ended'
        return
    fi
    engine=$(<"$directory/pid")
    before=$(cat "$directory/before")
    stop
}

# answers HOST: whether an engine answers there; an empty HOST is the default of docker.
answers() {
    if [[ -n $1 ]]; then
        timeout 10 docker --host "$1" version >/dev/null 2>&1
    else
        timeout 10 docker version >/dev/null 2>&1
    fi
}

# In namespaces of its own: starts the engine, runs the command, ends the engine. `before` and `engine`
# are what it began with, and the process.
inside() {
    local code=0
    before=$(settings)
    engine=
    mkdir -p "$directory"
    printf '%s\n' "$before" >"$directory/before"
    trap stop EXIT
    ip link set lo up
    see_own_network || unavailable 'the file system of an engine cannot be set up here'
    start
    # The command may set routes here.
    export DOCKER_HOST=unix://$directory/docker.sock OWN_NETWORK=1
    runs || unavailable 'an engine starts here, but a privileged container does not run in it'
    raise
    # A child, so that a signal to it ends it and not this.
    "$@" || code=$?
    if [[ -n ${KEEP:-} ]]; then
        trap - EXIT
        say "the engine goes on (process $engine). To work with it: nsenter --target $engine --net --mount" \
            "env DOCKER_HOST=$DOCKER_HOST bash"
        say "To end it: make kind-delete"
    fi
    exit $code
}

settings() {
    local name
    for name in "${SETTINGS[@]}"; do
        machine "$name" | tr -d ' ' || true
    done
}

# machine ARGUMENT...: sysctl, in the network namespace that this was called in.
machine() {
    if [[ -n ${outside:-} ]]; then
        nsenter --net="/proc/self/fd/$outside" sysctl "$@" 2>/dev/null
    else
        sysctl "$@" 2>/dev/null
    fi
}

raise() {
    local wanted now
    for wanted in "${WANTED[@]}"; do
        now=$(machine -n "${wanted%=*}") || continue
        ((now >= ${wanted#*=})) || machine -qw "$wanted" || say "cannot set $wanted"
    done
}

# /sys shows the network that it was mounted in.
see_own_network() {
    local groups=$directory/cgroup
    mkdir -p "$groups" &&
        mount --rbind /sys/fs/cgroup "$groups" &&
        mount -t sysfs sysfs /sys &&
        mount --rbind "$groups" /sys/fs/cgroup &&
        umount --lazy "$groups"
}

start() {
    local options=(--host "unix://$directory/docker.sock" --data-root "$directory/data"
        --exec-root "$directory/exec" --pidfile "$directory/pid" --storage-driver overlay2
        --exec-opt native.cgroupdriver=cgroupfs)
    # In a machine that lacks a capability, a privileged container cannot be given all of them.
    if ((0x$(awk '/^CapBnd/ {print $2}' /proc/self/status) >> 24 & 1)); then
        :
    else
        options+=(--add-runtime "limited=$here/runc-limited.sh" --default-runtime limited)
    fi
    rm -f "$directory/pid"
    setsid dockerd "${options[@]}" >"$directory/log" 2>&1 </dev/null &
    engine=$!
    local try
    for ((try = 0; try < 120; try++)); do
        answers "unix://$directory/docker.sock" && return
        kill -0 "$engine" 2>/dev/null || break
        sleep 0.5
    done
    tail -n 20 "$directory/log" >&2
    unavailable 'the engine does not start'
}

# Whether it runs a privileged container, as the nodes of a cluster are. The smallest there is.
runs() {
    local image container
    cc -Os -static -s -o "$directory/pause" "$here/pause.c" &&
        image=$(tar -C "$directory" -c pause | docker import --change 'ENTRYPOINT ["/pause"]' -) &&
        container=$(docker run --detach --privileged "$image") &&
        docker rm --force "$container" >/dev/null &&
        docker rmi "$image" >/dev/null
}

stop() {
    local try line
    if [[ -n $engine ]] && kill "$engine" 2>/dev/null; then
        for ((try = 0; try < 60; try++)); do
            kill -0 "$engine" 2>/dev/null || break
            sleep 0.5
        done
    fi
    while read -r line; do
        [[ -z $line ]] || machine -qw "$line" || true
    done <<<"$before"
}

case ${1:?a command is missing} in
    --inside) shift && inside "$@" ;;
    --end) end ;;
    *) main "$@" ;;
esac
