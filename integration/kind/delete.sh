#!/usr/bin/env bash
# `make kind-delete`: deletes the cluster that a test with KEEP=1 has left, and what belongs to it.
#
# usage: engine.sh delete.sh
# From cluster.sh:
# shellcheck disable=SC2154
set -euo pipefail

# shellcheck source=/dev/null
source "$(dirname "${BASH_SOURCE[0]}")/cluster.sh"

delete_cluster
for directory in "$cache"/test.* "$cache"/e2e.*; do
    [[ ! -d $directory ]] || rm -rf "$directory"
done
say "there is no cluster $NAME any more"
