#!/usr/bin/env bash
# Makes the container image, as an archive, without an engine and without a base image: the static
# program and the licence are all that is in it. Prints the archive's path. The Dockerfile makes the
# same image where there is an engine.
#
# usage: build.sh [amd64|arm64 [NAME:TAG]]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

say() { printf '%s\n' "build.sh: $*" >&2; }

# What an image may take, compressed.
readonly MOST=$((15 * 1000 * 1000))

case $(uname -m) in
    aarch64) own=arm64 ;;
    *) own=amd64 ;;
esac
architecture=${1:-$own}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' Cargo.toml | head -n 1)
name=${2:-portcullis:$version}
command -v python3 >/dev/null || { say 'there is no python3, which writes the archive'; exit 1; }

binary=$(image/compile.sh "$architecture")
# A program that needs a loader does not start where there is none.
if LC_ALL=C readelf --program-headers --wide "$binary" | grep -q INTERP; then
    say "$binary is not static"
    exit 1
fi
mkdir -p target/image
archive=target/image/portcullis-$version-$architecture.tar
written=$(image/archive.py "$archive" "$name" --architecture "$architecture" \
    --label org.opencontainers.image.title=portcullis \
    --label "org.opencontainers.image.description=$(sed -n 's/^description = "\(.*\)"$/\1/p' Cargo.toml)" \
    --label "org.opencontainers.image.version=$version" \
    --label org.opencontainers.image.licenses=Apache-2.0 \
    --user 65532:65532 --entrypoint /portcullis --net-admin /portcullis \
    "/LICENSE=LICENSE" "/portcullis=$binary")
read -r _ size digest <<<"$written"
say "$name: $size bytes compressed, $(stat -c %s "$binary") bytes of program, $digest"
if ((size > MOST)); then
    say "that is more than $MOST bytes"
    exit 1
fi
echo "$archive"
