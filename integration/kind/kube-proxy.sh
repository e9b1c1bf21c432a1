#!/usr/bin/env bash
# Writes a container image of kube-proxy: the program, and nft with its libraries from the image of a
# kind node.
#
# usage: kube-proxy.sh BINARIES NODE-IMAGE ARCHIVE NAME
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
binaries=$1 node_image=$2 archive=$3 name=$4

work=$(mktemp -d)
container=$(docker create "$node_image")
trap 'docker rm "$container" >/dev/null; rm -rf "$work"' EXIT
content=("/usr/local/bin/kube-proxy=$binaries/kube-proxy")
number=0
for file in /usr/sbin/nft $(docker run --rm --entrypoint ldd "$node_image" /usr/sbin/nft | grep -oE '/[^ ]+'); do
    docker cp --follow-link "$container:$file" "$work/$((++number))" >/dev/null
    content+=("$file=$work/$number")
done
chmod +x "$work"/*
"$here/../../image/archive.py" "$archive" "$name" --level 1 "${content[@]}"
