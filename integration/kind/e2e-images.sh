#!/usr/bin/env bash
# Makes the container images that upstream's tests of the network run, as archives, and prints the
# directory with them: the test server agnhost in a Debian with the tools that the tests call in it, which
# goes by the names of some other images, too; and a client of one regression test. Needs root and
# debootstrap.
#
# usage: e2e-images.sh BINARIES
#
# environment:
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
binaries=$1

# What the tests run in their Pods. GNU's wget, because busybox' of this Debian crashes with a timeout.
readonly PACKAGES=wget,curl,netcat-openbsd,iproute2,bind9-dnsutils,iperf,procps,iputils-ping,ca-certificates,iptables,conntrack

fingerprint=$(
    {
        basename "$binaries"
        cd "$here" && sha256sum e2e-images.sh debian.sh ../../image/archive.py
    } | sha256sum | cut -c 1-16
)
directory=$cache/e2e-images-$fingerprint
if [[ -d $directory ]]; then
    echo "$directory"
    exit
fi
work=$(mktemp -d "$cache/images.XXXXXX")
trap 'rm -rf "$work"' EXIT
mkdir "$work/images"
names=$("$binaries/e2e.test" --list-images)

# named NAME|...: how the suite calls these images, of which it may use several releases.
named() { grep -E "(^|/)($1):" <<<"$names"; }

server=$work/server
"$here/debian.sh" "$PACKAGES" "$server"
cp "$binaries/agnhost" "$binaries/coredns" "$server/"
ln -s agnhost "$server/agnhost-2"
mkdir "$server/uploads"
rm -f "$server/etc/resolv.conf"
echo 'user-defined-in-image:x:1000:1000::/:/bin/sh' >>"$server/etc/passwd"
kubernetes=$(cd "$here/../controlplane/kubernetes" && go list -m -f '{{.Dir}}' k8s.io/kubernetes)
cp "$kubernetes"/test/images/agnhost/porter/localhost.{crt,key} "$server/"
chmod 644 "$server"/localhost.*
also=()
while read -r name; do
    also+=(--also "$name")
done < <(named 'agnhost|busybox|glibc-dns-testing|distroless-iptables')
"$here/../../image/archive.py" "$work/images/agnhost.tar" agnhost:e2e "${also[@]}" --level 1 \
    --entrypoint /agnhost --cmd pause "/=$server" >&2
"$here/../../image/archive.py" "$work/images/regression.tar" "$(named regression-issue-74839)" --level 1 \
    --entrypoint /regression-issue-74839 "/regression-issue-74839=$binaries/regression-issue-74839" >&2
mv "$work/images" "$directory"
echo "$directory"
