# Portcullis: `make help` lists what there is.
#
# Commands that need root and packages say what is missing; with INSTALL=1 (or in CI) they install
# it first.

CARGO ?= cargo
INSTALL ?=
PREPARE := integration/prepare.sh $(if $(INSTALL),--install)
ARCH ?=
CLUSTERS ?=
FOCUS ?=

.DEFAULT_GOAL := help
.PHONY: help build image demo test kind-image kind-test kind-e2e kind-delete unit lint fmt bench bench-peer deny clean

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: ## Build the release binary: target/release/portcullis
	$(CARGO) build --locked --release --bin portcullis

image: ## Make the container image, without an engine: target/image/*.tar (ARCH=arm64 for another one)
	@$(PREPARE) image
	@image/build.sh $(ARCH)

demo: ## Show allowed and refused clients on a NodePort, in network namespaces; no cluster (root)
	@$(PREPARE) demo
	@$(CARGO) build --locked --quiet --workspace --bin portcullis --bin demo
	@target/debug/demo

test: ## Run every test: unit, golden, laws, real kernel, real API server (root)
	@$(PREPARE) test
	$(CARGO) test --locked --workspace

kind-image: ## Make the image of a kind node, from Debian packages and Go modules (root)
	@$(PREPARE) kind
	@integration/kind/engine.sh integration/kind/image.sh

kind-test: ## Test image and manifests on clusters of kind; CLUSTERS="ipv4 dual takeover", KEEP=1 (root)
	@$(PREPARE) kind
	@integration/kind/engine.sh integration/kind/test.sh $(CLUSTERS)

kind-e2e: ## Run upstream's network tests on kind; FOCUS=REGEX, CLUSTER=dual, KUBE_PROXY=1, KEEP=1 (root)
	@$(PREPARE) kind
	@integration/kind/engine.sh integration/kind/e2e.sh $(if $(FOCUS),'$(FOCUS)')

kind-delete: ## Delete the cluster that KEEP=1 left, and the engine that was started for it (root)
	@integration/kind/engine.sh integration/kind/delete.sh
	@integration/kind/engine.sh --end

unit: ## Run the tests that need no root: unit, golden and laws
	$(CARGO) test --locked --package portcullis

lint: ## Check format, lints, links of the documentation, licences and shell scripts
	@$(PREPARE) lint
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets -- --deny warnings
	RUSTDOCFLAGS='--deny warnings' $(CARGO) doc --locked --workspace --no-deps --document-private-items --quiet
	git ls-files -z '*.sh' .ci/run 'integration/kind/node/*/bin/*' | xargs -0 shellcheck
	@if command -v cargo-deny >/dev/null; then $(CARGO) deny check bans licenses sources; \
	else echo "cargo-deny is not installed (cargo install --locked cargo-deny): licences and sources are not checked"; fi

fmt: ## Format the code
	$(CARGO) fmt --all

bench: BENCH_ARGS ?= --json docs/benchmarks/ruleset.json --markdown docs/benchmarks.md
bench: ## Measure, beside a ruleset of kube-proxy's shape; writes docs/benchmarks.md (root)
	@$(PREPARE) bench
	$(CARGO) bench --locked --bench ruleset -- $(BENCH_ARGS)

# Cargo runs a benchmark in the directory of its package.
bench-peer: BENCH_ARGS ?= --json $(CURDIR)/docs/benchmarks/peer.json --markdown $(CURDIR)/docs/benchmarks.md --plots $(CURDIR)/docs/benchmarks
bench-peer: ## Measure beside kube-proxy, on a real API server; writes docs/benchmarks.md (root)
	@$(PREPARE) bench-peer
	$(CARGO) bench --locked --package portcullis-integration --bench peer -- $(BENCH_ARGS)

deny: ## Check dependencies for licences, sources and advisories (cargo-deny; needs GitHub for these)
	$(CARGO) deny check

clean: ## Remove what was built
	$(CARGO) clean
