#!/usr/bin/env bash
# Runs a command with a container engine: the one that is there, or else a Docker engine of its own,
# which ends with the command. That one, and everything that it runs, is in a network namespace of
# its own: the machine's network stays as it is.
#
# usage: engine.sh COMMAND...
#
# environment:
#   KEEP=1               an engine that was started for the command goes on after it
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
set -euo pipefail

cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
directory=$cache/engine
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# What the kubelets of a cluster set for the whole machine, and what systemd in several containers
# needs of it. It is put back at the end.
readonly SETTINGS=(kernel.panic kernel.panic_on_oops vm.overcommit_memory vm.panic_on_oom
    kernel.keys.root_maxkeys kernel.keys.root_maxbytes
    fs.inotify.max_user_instances fs.inotify.max_user_watches)
readonly WATCHERS=1024

say() { printf '%s\n' "engine.sh: $*" >&2; }

main() {
    # One that was kept is used again.
    if [[ -f $directory/pid ]] && answers "unix://$directory/docker.sock"; then
        exec nsenter --target "$(<"$directory/pid")" --net --mount \
            env "DOCKER_HOST=unix://$directory/docker.sock" "$@"
    fi
    if answers "${DOCKER_HOST:-}"; then
        exec "$@"
    fi
    if [[ $(id -u) != 0 ]]; then
        say 'no container engine answers, and it takes root to start one'
        exit 1
    fi
    if ! command -v dockerd >/dev/null; then
        say 'there is neither an engine that answers nor a dockerd to start (Debian: docker.io)'
        exit 1
    fi
    exec unshare --net --mount "${BASH_SOURCE[0]}" --inside "$@"
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
    trap stop EXIT
    ip link set lo up
    see_own_network
    start
    (($(sysctl -n fs.inotify.max_user_instances) >= WATCHERS)) ||
        sysctl -qw "fs.inotify.max_user_instances=$WATCHERS"
    export DOCKER_HOST=unix://$directory/docker.sock
    # A child, so that a signal to it ends it and not this.
    "$@" || code=$?
    if [[ -n ${KEEP:-} ]]; then
        trap - EXIT
        say "the engine goes on (process $engine). To work with it: nsenter --target $engine --net --mount" \
            "env DOCKER_HOST=$DOCKER_HOST bash"
        say "To end it: kill $engine. What was set for the machine before: ${before//$'\n'/ }"
    fi
    exit $code
}

settings() {
    local name
    for name in "${SETTINGS[@]}"; do
        sysctl "$name" 2>/dev/null | tr -d ' ' || true
    done
}

# /sys shows the network that it was mounted in.
see_own_network() {
    local groups=$directory/cgroup
    mkdir -p "$groups"
    mount --rbind /sys/fs/cgroup "$groups"
    mount -t sysfs sysfs /sys
    mount --rbind "$groups" /sys/fs/cgroup
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
    say 'the engine does not start:'
    tail -n 20 "$directory/log" >&2
    exit 1
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
        [[ -z $line ]] || sysctl -qw "$line" || true
    done <<<"$before"
}

if [[ ${1:-} == --inside ]]; then
    shift
    inside "$@"
else
    main "$@"
fi
