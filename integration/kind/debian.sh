#!/usr/bin/env bash
# Puts a small Debian with some packages into a directory, without documentation and translations.
# What debootstrap makes is kept as an archive: it takes the longest, and changes with the list of
# packages alone. Needs root.
#
# usage: debian.sh PACKAGE,PACKAGE... DIRECTORY
#
# environment:
#   PORTCULLIS_KIND_DIR  where everything of kind is kept (default: portcullis/kind in the cache)
set -euo pipefail

readonly SUITE=bookworm

say() { printf '%s\n' "debian.sh: $*" >&2; }

packages=$1 directory=$2
cache=${PORTCULLIS_KIND_DIR:-${XDG_CACHE_HOME:-${HOME:?}/.cache}/portcullis/kind}
mkdir -p "$cache" "$directory"
archive=$cache/rootfs-$(sha256sum <<<"$SUITE $packages" | cut -c 1-16).tar.gz
if [[ -f $archive ]]; then
    tar -C "$directory" -xz -f "$archive"
    exit
fi

# A mirror fails now and then.
for try in 1 2 3; do
    say "installing Debian $SUITE with $packages"
    debootstrap --variant=minbase --include="$packages" "$SUITE" "$directory" >"$archive.log" && break
    tail -n 20 "$archive.log" >&2
    ((try < 3)) || exit 1
    # It may have stopped with these mounted.
    umount --recursive "$directory/proc" "$directory/sys" 2>/dev/null || true
    rm -rf --one-file-system "${directory:?}"
done
rm -f "$archive.log"
(
    cd "$directory"
    rm -rf var/cache/apt/* var/lib/apt/lists/* usr/share/{doc,man,locale,info,perl,i18n,zoneinfo} \
        usr/lib/*/perl* dev/*
)
tar -C "$directory" -cz -f "$archive.tmp" .
mv "$archive.tmp" "$archive"
