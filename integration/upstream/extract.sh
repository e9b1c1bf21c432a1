#!/usr/bin/env bash
# Extracts the facts of upstream Kubernetes' own tables for Service proxies and writes them below
# facts/: what goes into each case and what is expected to come out. It takes a Go toolchain and a
# few minutes. What differs from the facts at hand, `git diff` shows.
#
# usage: extract.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

if ! command -v go >/dev/null; then
    echo "extract.sh: there is no go in PATH" >&2
    exit 1
fi
export CGO_ENABLED=0
go run -mod=readonly . -out facts
