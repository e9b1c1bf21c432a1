# shellcheck shell=bash
# The checks of the test on kind. test.sh sources this file and runs each function whose name begins
# with `check_`, as the table has it. A check passes if its function returns 0; what it puts into
# `detail` stands in the table.
#
# From cluster.sh: kubectl, nodes, workers, control_plane, ALLOWED, REFUSED, program, generator, ip
# NODE FAMILY, eventually. From test.sh: families, work, RATE.
# shellcheck disable=SC2154

# A function of bash: asks over file descriptor 3, and reads the whole answer.
# shellcheck disable=SC2016
readonly ASK='ask() {
    printf "GET /hostname HTTP/1.1\r\nHost: shop\r\n\r\n" >&3
    read -r -t 3 line <&3 && [[ $line == HTTP/1.1\ 200* ]] || return 1
    while read -r -t 0.5 -n 1 <&3; do :; done
}'

# url ADDRESS PORT [PATH]
url() { echo "http://$(socket_address "$1" "$2")/${3:-hostname}"; }

# socket_address ADDRESS PORT
socket_address() {
    case $1 in
        *:*) echo "[$1]:$2" ;;
        *) echo "$1:$2" ;;
    esac
}

# fetch CONTAINER URL: from a client outside, or from a node. Globbing would take the brackets.
fetch() {
    docker exec "$1" curl --silent --globoff --fail --max-time 3 "$2"
}

# times COUNT COMMAND...: the different answers, one a line. Fails if one attempt does.
times() {
    local count=$1 answer answers=''
    shift
    for ((; count > 0; count--)); do
        answer=$("$@") || return 1
        answers+=$answer$'\n'
    done
    sort -u <<<"${answers%$'\n'}"
}

# cluster_ip SERVICE FAMILY
cluster_ip() {
    local address
    for address in $(kubectl --namespace shop get service "$1" --output jsonpath='{.spec.clusterIPs[*]}'); do
        case $2$address in
            4*.* | 6*:*) echo "$address" ;;
        esac
    done
}

# pods APP: name, node and first address of each Pod, one a line.
pods() {
    kubectl --namespace shop get pods --selector "app=$1" --output \
        jsonpath='{range .items[*]}{.metadata.name} {.spec.nodeName} {.status.podIP}{"\n"}{end}'
}

# dial NODE POD-ADDRESS HOST PORT [PROTOCOL [TRIES]]: lets a Pod connect, and gives the different
# answers that it got, one a line. Fails if one attempt does.
dial() {
    local query="host=$3&port=$4&protocol=${5:-http}&request=hostname&tries=${6:-1}"
    docker exec "$1" curl --silent --globoff --max-time 60 "$(url "$2" 8080 "dial?$query")" |
        docker exec --interactive "$1" jq --raw-output --exit-status \
            'if .errors or (.responses // []) == [] then error("\(.)") else .responses[] end' | sort -u
}

lines() { grep -c . <<<"$1"; }

# comes PATTERN: whether it is in what is read. Reads to the end: with `pipefail` a reader that stops early is
# a failure of who writes.
comes() { grep "$1" >/dev/null; }

check_cluster_ip_from_pods() {
    local family address name node pod answers count=0
    for family in $families; do
        address=$(cluster_ip web "$family")
        while read -r name node pod; do
            answers=$(dial "$node" "$pod" "$address" 80 http 20) || return 1
            (($(lines "$answers") == 2)) || { detail="$name: $answers"; return 1; }
            answers=$(dial "$node" "$pod" "$address" 80 udp 20) || return 1
            (($(lines "$answers") == 2)) || { detail="$name, UDP: $answers"; return 1; }
            ((count += 40))
        done < <(pods client)
    done
    detail="$count connections and datagrams from 3 nodes, 2 endpoints each"
}

check_cluster_ip_from_nodes() {
    local family node answers count=0
    for family in $families; do
        for node in $nodes; do
            answers=$(times 10 fetch "$node" "$(url "$(cluster_ip web "$family")" 80)") || return 1
            (($(lines "$answers") == 2)) || { detail="$node: $answers"; return 1; }
            ((count += 10))
        done
    done
    detail="$count connections"
}

check_hairpin() {
    local family name node pod answers
    for family in $families; do
        while read -r name node pod; do
            answers=$(dial "$node" "$pod" "$(cluster_ip web "$family")" 80 http 20) || return 1
            grep -q "$name" <<<"$answers" || { detail="$name never reached itself"; return 1; }
        done < <(pods web)
    done
    detail='both servers reach themselves'
}

check_node_port_from_outside() {
    local family node answers count=0
    for family in $families; do
        for node in $nodes; do
            answers=$(times 20 fetch "$ALLOWED" "$(url "$(ip "$node" "$family")" 30080)") || return 1
            (($(lines "$answers") == 2)) || { detail="$node: $answers"; return 1; }
            answers=$(times 20 datagram "$ALLOWED" "$(ip "$node" "$family")" 30080) || return 1
            (($(lines "$answers") == 2)) || { detail="$node, UDP: $answers"; return 1; }
            ((count += 40))
        done
    done
    detail="$count connections and datagrams to 3 nodes, 2 endpoints each"
}

# datagram CONTAINER HOST PORT: asks for the server's name over UDP, from a socket of its own.
datagram() {
    docker exec "$1" bash -c '
        exec 3<>"/dev/udp/$1/$2" && echo hostname >&3 &&
            timeout 3 dd bs=512 count=1 status=none <&3 && echo' bash "$2" "$3"
}

# allow VALUE: the annotation.
allow() {
    kubectl --namespace shop annotate --overwrite service guarded \
        "portcullis.dev/allowed-source-cidrs=$1" >/dev/null
}

# reaches CONTAINER yes|no: whether it gets an answer at every node, in every family.
reaches() {
    local family node got
    for family in $families; do
        for node in $nodes; do
            got=no
            fetch "$1" "$(url "$(ip "$node" "$family")" 30090)" >/dev/null && got=yes
            [[ $got == "$2" ]] || return 1
        done
    done
}

addresses() {
    local family list=''
    for family in $families; do
        list+=,$(ip "$1" "$family")
    done
    echo "${list#,}"
}

check_firewall() {
    allow "$(addresses "$ALLOWED")"
    eventually 15 reaches "$ALLOWED" yes || { detail='the allowed client is refused'; return 1; }
    reaches "$REFUSED" no || { detail='the refused client is let in'; return 1; }
    allow "$(addresses "$REFUSED")"
    eventually 15 reaches "$REFUSED" yes || { detail='a change is not followed'; return 1; }
    reaches "$ALLOWED" no || { detail='a source that was taken out is let in'; return 1; }
    allow "$(addresses "$ALLOWED"), nonsense"
    eventually 15 reaches "$REFUSED" no || { detail='nonsense does not close'; return 1; }
    reaches "$ALLOWED" no || { detail='nonsense does not close'; return 1; }
    kubectl --namespace shop annotate service guarded portcullis.dev/allowed-source-cidrs- >/dev/null
    eventually 15 reaches "$REFUSED" yes || { detail='closed without the annotation'; return 1; }
    reaches "$ALLOWED" yes || { detail='closed without the annotation'; return 1; }
    detail='allowed, refused, swapped, nonsense, none; at 3 nodes'
}

# Who wants to know why finds it: in the log of the node that refused, and as an Event of the Service.
check_said() {
    local node=${workers%% *} listener
    allow "$(addresses "$ALLOWED")"
    eventually 15 reaches "$ALLOWED" yes || return 1
    fetch "$REFUSED" "$(url "$(ip "$node" 4)" 30090)" >/dev/null && return 1
    eventually 15 logged "$node" "refused a connection.*shop/guarded.*source=$(ip "$REFUSED" 4) .*30090" ||
        { detail='the log does not tell of a refused client'; return 1; }
    allow 'nonsense'
    eventually 15 logged "$node" 'Service shop/guarded.*allowed-source-cidrs.*nonsense' ||
        { detail='the log does not tell of a bad annotation'; return 1; }
    kubectl --namespace shop annotate service guarded portcullis.dev/allowed-source-cidrs- >/dev/null
    # A process where a node port is gets nothing, and only this node knows.
    docker exec "$node" socat TCP-LISTEN:30080,reuseaddr,fork /dev/null &
    listener=$!
    eventually 30 described web "NodePortInUse.*node $node: .*30080" ||
        { detail='no Event tells of a process at the node port'; stop_socat "$node" "$listener"; return 1; }
    stop_socat "$node" "$listener"
    detail='refused client and bad annotation in the log, process at a node port as an Event'
}

# logged NODE PATTERN: whether the daemon of this node has written it.
logged() {
    local pod
    pod=$(kubectl --namespace portcullis get pods --field-selector "spec.nodeName=$1" --output name)
    kubectl --namespace portcullis logs "$pod" | comes "$2"
}

# described SERVICE PATTERN
described() {
    kubectl --namespace shop describe service "$1" | comes "$2"
}

stop_socat() {
    docker exec "$1" pkill -x socat
    wait "$2" || true
}

# An open connection ends with the permission.
check_revocation() {
    local client answer
    allow "$(addresses "$ALLOWED")"
    eventually 15 reaches "$ALLOWED" yes || return 1
    docker exec "$ALLOWED" rm -f /run/go
    # One connection, asked twice: before and after. /run/go says that it is after.
    docker exec "$ALLOWED" bash -c "$ASK"'
        exec 3<>"/dev/tcp/$1/30090"
        ask || { echo never; exit; }
        touch /run/asked
        for ((i = 0; i < 300; i++)); do [[ -e /run/go ]] && break; sleep 0.1; done
        if ask; then echo open; else echo cut; fi' bash "$(ip "${workers%% *}" 4)" >"$work/revocation" &
    client=$!
    eventually 15 docker exec "$ALLOWED" test -e /run/asked || { detail='no connection'; wait $client; return 1; }
    allow "$(addresses "$REFUSED")"
    eventually 15 reaches "$REFUSED" yes || return 1
    docker exec "$ALLOWED" touch /run/go
    wait $client
    answer=$(<"$work/revocation")
    detail="the open connection is $answer"
    [[ $answer == cut ]]
}

check_external_traffic_policy_local() {
    local family node address got here=${workers%% *} seen
    for family in $families; do
        for node in $nodes; do
            address=$(ip "$node" "$family")
            seen=$(fetch "$ALLOWED" "$(url "$address" 30110 clientip)") && got=yes || got=no
            case $node$got in
                "${here}yes")
                    # The server sees who it is.
                    [[ $seen == *"$(ip "$ALLOWED" "$family")"* ]] || { detail="source is $seen"; return 1; }
                    ;;
                "${here}no") detail="$node has an endpoint and does not answer"; return 1 ;;
                *yes) detail="$node has no endpoint and answers"; return 1 ;;
            esac
            # A load balancer asks here.
            fetch "$ALLOWED" "$(url "$address" 30119 '')" >/dev/null && got=yes || got=no
            case $node$got in
                "${here}yes" | "${control_plane}no" | "${workers##* }no") ;;
                *) detail="$node: the health check says $got"; return 1 ;;
            esac
        done
    done
    detail="answered by $here only, with the client's address"
}

check_load_balancer_address() {
    local node=${workers%% *} address=203.0.113.10
    kubectl --namespace shop patch service local --subresource status --type merge --patch \
        "{\"status\": {\"loadBalancer\": {\"ingress\": [{\"ip\": \"$address\"}]}}}" >/dev/null
    docker exec "$ALLOWED" ip route replace "$address" via "$(ip "$node" 4)"
    eventually 15 fetch "$ALLOWED" "$(url $address 80)" >/dev/null || { detail='no answer'; return 1; }
    detail='answered through the node with the endpoint'
}

check_session_affinity() {
    local family answers name node pod
    for family in $families; do
        answers=$(times 20 fetch "$ALLOWED" "$(url "$(ip "${workers%% *}" "$family")" 30100)") || return 1
        (($(lines "$answers") == 1)) || { detail="from outside: $answers"; return 1; }
        while read -r name node pod; do
            answers=$(dial "$node" "$pod" "$(cluster_ip sticky "$family")" 80 http 20) || return 1
            (($(lines "$answers") == 1)) || { detail="$name: $answers"; return 1; }
        done < <(pods client)
    done
    detail='one endpoint for each client'
}

check_dns() {
    local name node pod answers
    while read -r name node pod; do
        answers=$(dial "$node" "$pod" web.shop.svc.cluster.local 80 http 5) || return 1
        kubectl --namespace shop exec "$name" -- /agnhost connect --timeout 3s \
            kubernetes.default.svc.cluster.local:443 || { detail="$name: the API server"; return 1; }
    done < <(pods client)
    detail='looked up and reached from 3 nodes'
}

check_no_endpoints() {
    local node=${workers%% *} code=0
    kubectl --namespace shop scale deployment web --replicas 0 >/dev/null
    # Refused, not dropped: curl ends with 7 and not with 28.
    eventually 60 refused "$node" || { detail='not refused'; code=1; }
    kubectl --namespace shop scale deployment web --replicas 2 >/dev/null
    kubectl --namespace shop rollout status deployment web --timeout 60s >/dev/null || code=1
    eventually 15 fetch "$node" "$(url "$(cluster_ip web 4)" 80)" >/dev/null || code=1
    ((code == 0)) && detail='refused without endpoints, served again with them'
    return $code
}

refused() {
    local code=0
    fetch "$1" "$(url "$(cluster_ip web 4)" 80)" >/dev/null || code=$?
    ((code == 7))
}

# load CONTAINER COMMAND...: runs a command in a loop until /run/stop is there, at most for ten minutes,
# and prints how many times it succeeded and failed.
load() {
    local container=$1
    shift
    docker exec "$container" bash -c '
        end=$((SECONDS + 600)) well=0 failed=0
        while [[ ! -e /run/stop ]] && ((SECONDS < end)); do
            if "$@" >/dev/null 2>&1; then ((++well)); else ((++failed)); fi
        done
        echo "$well $failed"' bash "$@"
}

# connect_at CONTAINER CONNECTIONS-A-SECOND ADDRESS:PORT...: opens new connections at this rate until
# /run/stop is there, and prints what integration/load says of them. What the container could not open is no
# failure of the proxy, but this fails: then nothing is known.
connect_at() {
    local container=$1 number=$2
    shift 2
    docker exec "$container" /run/load --until /run/stop --rate "$number" "$@"
}

# hold CONTAINER HOST PORT: asks over one and the same connection until /run/stop is there, at most for ten
# minutes, and prints how many answers came and how many did not.
hold() {
    docker exec "$1" bash -c "$ASK"'
        exec 3<>"/dev/tcp/$1/$2" || { echo "0 1"; exit; }
        end=$((SECONDS + 600)) well=0
        while [[ ! -e /run/stop ]] && ((SECONDS < end)); do
            ask || { echo "$well 1"; exit; }
            ((++well))
        done
        echo "$well 0"' bash "$2" "$3"
}

# under_load COMMAND...: runs it while two clients outside open RATE connections a second to the node ports of
# all nodes, and a Pod connects to a ClusterIP; fails if one connection does, or one that was open before.
# The rate that the machine really reached is in `detail`.
under_load() {
    local name node pod container job jobs=() code=0 family query targets=() all failed first
    rm -f "$work"/{rate,failures,load,hold}-*
    for container in $ALLOWED $REFUSED $nodes; do
        docker exec "$container" rm -f /run/stop
    done
    for family in $families; do
        for node in $nodes; do
            targets+=("$(socket_address "$(ip "$node" "$family")" 30080)")
        done
    done
    for container in $ALLOWED $REFUSED; do
        docker cp --quiet "$generator" "$container:/run/load"
        connect_at "$container" $((RATE / 2)) "${targets[@]}" >"$work/rate-$container" 2>"$work/failures-$container" &
        jobs+=($!)
    done
    # Not one of the control plane, which may be paused, and its Pods with it.
    read -r name node pod < <(pods client | awk -v other="$control_plane" '$2 != other')
    for family in $families; do
        query="host=$(cluster_ip web "$family")&port=80&protocol=http&request=hostname"
        # shellcheck disable=SC2016
        load "$node" bash -c 'curl --silent --globoff --fail --max-time 10 "$1" | grep -q responses' \
            bash "$(url "$pod" 8080 "dial?$query")" >"$work/load-$family" &
        jobs+=($!)
        hold "$ALLOWED" "$(ip "${workers%% *}" "$family")" 30080 >"$work/hold-$family" &
        jobs+=($!)
    done
    sleep 2
    "$@" || code=1
    sleep 2
    for container in $ALLOWED $REFUSED $nodes; do
        docker exec "$container" touch /run/stop
    done
    for job in "${jobs[@]}"; do
        wait "$job" || code=1
    done
    failed=$(sum 2 "$work"/rate-*)
    all=$(($(sum 1 "$work"/rate-*) + failed))
    first=$(cat "$work"/failures-* | head -n 1)
    detail="$all connections at $(sum 3 "$work"/rate-*)/s, $failed failed${first:+ ($first)};"
    detail+=" $(sum 4 "$work"/rate-*) took more than 0.9 s;"
    detail+=" $(sum 1 "$work"/load-*) from a Pod, $(sum 2 "$work"/load-*) failed;"
    detail+=" $(sum 2 "$work"/hold-*) open ones lost, $(sum 1 "$work"/hold-*) answers over them"
    cat "$work"/failures-* >&2
    ((code == 0 && all > 100 && $(sum 2 "$work"/{rate,load,hold}-*) == 0)) &&
        (($(sum 1 "$work"/load-*) > 10 && $(sum 1 "$work"/hold-*) > 10))
}

# sum COLUMN FILE...
sum() { awk -v column="$1" '{ sum += $column } END { print sum + 0 }' "${@:2}"; }

rolling_update() {
    kubectl --namespace portcullis rollout restart daemonset portcullis >/dev/null
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 180s >/dev/null
}

check_rolling_update() {
    under_load rolling_update
}

# The daemon of each node is killed, one after the other. Nothing is left to it to do in its last moment.
check_killed() {
    under_load kill_daemons
}

kill_daemons() {
    local node daemon
    for node in $nodes; do
        daemon=$(docker exec "$node" pgrep -x portcullis) || return 1
        docker exec "$node" kill -9 "$daemon" || return 1
        eventually 60 ready_again "$node" "$daemon" || return 1
    done
}

# ready_again NODE PROCESS: whether there is a daemon, it is ready, and it is another process.
ready_again() {
    local daemon
    daemon=$(docker exec "$1" pgrep -x portcullis) || return 1
    [[ $daemon != "$2" ]] && docker exec "$1" curl --silent --fail http://127.0.0.1:10256/readyz >/dev/null
}

# A node loses its power and is deleted; then it boots and is a node again.
check_node_away() {
    local node=${workers##* } other=${workers%% *} address
    address=$(ip "$node" 4)
    docker kill "$node" >/dev/null
    kubectl delete node "$node" --timeout 60s >/dev/null
    eventually 120 endpoints web 1 || { detail='endpoints of the deleted node stay'; return 1; }
    sleep 1
    times 20 fetch "$other" "$(url "$(cluster_ip web 4)" 80)" >/dev/null ||
        { detail='the ClusterIP fails without the node'; return 1; }
    times 20 fetch "$ALLOWED" "$(url "$(ip "$other" 4)" 30080)" >/dev/null ||
        { detail='the node port fails without the node'; return 1; }
    docker start "$node" >/dev/null
    # Before its Pods start, which get a copy.
    name_control_plane "$node"
    [[ $(ip "$node" 4) == "$address" ]] || { detail='the engine gave it another address'; return 1; }
    eventually 90 have_ranges || { detail='it does not come back'; return 1; }
    for other in $nodes; do
        network "$other"
    done
    kubectl wait --for condition=Ready "node/$node" --timeout 60s >/dev/null || return 1
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 120s >/dev/null ||
        { detail='the daemon does not get ready'; return 1; }
    kubectl --namespace shop rollout status deployment web --timeout 120s >/dev/null ||
        { detail='no server comes back'; return 1; }
    eventually 15 spread "$node" || { detail='it does not serve as the others do'; return 1; }
    detail='2 nodes serve without it, 3 with it again'
}

# endpoints SERVICE COUNT: whether so many are ready.
endpoints() {
    local ready
    ready=$(kubectl --namespace shop get endpointslices --selector "kubernetes.io/service-name=$1" --output json |
        docker exec --interactive "$control_plane" jq \
            '[.items[] | select(.addressType == "IPv4") | .endpoints[]? | select(.conditions.ready)] | length')
    ((ready == $2))
}

# spread NODE: whether both endpoints answer at its node port.
spread() {
    local answers
    answers=$(times 20 fetch "$ALLOWED" "$(url "$(ip "$1" 4)" 30080)") && (($(lines "$answers") == 2))
}

# The API server stands still; what it has said stays in force. Then a change is followed.
check_api_server_away() {
    under_load pause_control_plane || return 1
    local before=$detail
    eventually 60 kubectl get --raw /readyz >/dev/null 2>&1 || { detail='it does not come back'; return 1; }
    allow "$(addresses "$ALLOWED")"
    eventually 60 reaches "$ALLOWED" yes || { detail='a change is not followed'; return 1; }
    detail=$before
}

pause_control_plane() {
    docker pause "$control_plane" >/dev/null
    sleep 10
    docker unpause "$control_plane" >/dev/null
}

# A Service that has what the API server takes and few expect: it is served, and gone when it is deleted.
check_odd_service() {
    kubectl --namespace shop create service clusterip odd --tcp 80 >/dev/null
    kubectl --namespace shop patch service odd --subresource status --type merge --patch '{"status": {"conditions":
        [{"type": "Odd", "status": "True", "reason": "Test", "message": "", "lastTransitionTime": null}]}}' >/dev/null
    eventually 15 known odd yes || { detail='it is not served'; return 1; }
    kubectl --namespace shop delete service odd >/dev/null
    eventually 15 known odd no || { detail='it is still served'; return 1; }
    detail='a condition without a time harms nobody'
}

# known SERVICE yes|no: whether the kernel has it on every node.
known() {
    local node got
    for node in $nodes; do
        got=no
        docker exec "$node" nft list ruleset 2>/dev/null | comes "\"shop/$1\"" && got=yes
        [[ $got == "$2" ]] || return 1
    done
}

# What the process is allowed to do, as the kernel has it.
check_rights() {
    local node status
    for node in $nodes; do
        status=$(docker exec "$node" bash -c 'cat "/proc/$(pgrep -x portcullis)/status"') || return 1
        grep -q '^Uid:.65532.65532' <<<"$status" || { detail="$node: $(grep Uid <<<"$status")"; return 1; }
        grep -q '^CapEff:.0000000000001000$' <<<"$status" || { detail="$node: $(grep Cap <<<"$status")"; return 1; }
        grep -q '^CapBnd:.0000000000001000$' <<<"$status" || { detail="$node: $(grep Cap <<<"$status")"; return 1; }
        grep -q '^NoNewPrivs:.1$' <<<"$status" || { detail="$node: NoNewPrivs"; return 1; }
        grep -q '^Seccomp:.2$' <<<"$status" || { detail="$node: Seccomp"; return 1; }
    done
    detail='user 65532, CAP_NET_ADMIN and nothing else, seccomp'
}

# Another eye than ours looks: `audit` reads the kernel with nft.
check_audit() {
    local node
    for node in $nodes; do
        docker cp --quiet "$program" "$node:/kind/portcullis"
        docker cp --quiet "$work/kubeconfig-internal" "$node:/kind/kubeconfig"
        eventually 15 audited "$node" || { detail="$node: $(grep -v '^ ' "$work/audit" | head -n 3)"; return 1; }
    done
    detail='the kernel holds what it should on 3 nodes'
}

audited() {
    docker exec "$1" /kind/portcullis audit --kubeconfig /kind/kubeconfig --node-name "$1" >"$work/audit" 2>&1
}

# The whole way from kube-proxy, as docs/cluster.md has it.
check_takeover() {
    under_load take_over
}

take_over() {
    local pod node
    kubectl apply --kustomize "$work/manifests/overlays/replace-kube-proxy" >/dev/null || return 1
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 120s >/dev/null || return 1
    kubectl --namespace kube-system delete daemonset kube-proxy >/dev/null || return 1
    kubectl --namespace kube-system wait --for=delete pod --selector k8s-app=kube-proxy \
        --timeout 120s >/dev/null || return 1
    for pod in $(kubectl --namespace portcullis get pods --output name); do
        kubectl --namespace portcullis exec "$pod" -- /portcullis cleanup --kube-proxy >>"$work/cleanup" || return 1
    done
    kubectl apply --kustomize "$work/manifests/overlays/cluster" >/dev/null || return 1
    kubectl --namespace portcullis rollout status daemonset portcullis --timeout 180s >/dev/null || return 1
    for node in $nodes; do
        docker exec "$node" nft list tables | comes kube-proxy && return 1
        docker exec "$node" curl --silent --fail http://127.0.0.1:10256/healthz >/dev/null || return 1
    done
}
