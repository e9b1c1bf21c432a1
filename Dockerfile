# The container image of portcullis: one static program, no shell, no root.
#
#   docker buildx build --platform linux/amd64,linux/arm64 --tag portcullis:0.1.0 .
#
# `make image` makes the same image, for the architecture of the machine, without an engine and
# without a base image. Keep what is said at the end here in step with image/build.sh.

ARG RUST=1.91-bookworm

# Compiles on the architecture of the builder, for the architecture of the image.
FROM --platform=$BUILDPLATFORM rust:${RUST} AS build
ARG TARGETARCH
WORKDIR /src
RUN apt-get update \
    && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends libcap2-bin \
    && rm -rf /var/lib/apt/lists/*
COPY image/compile.sh image/
RUN image/compile.sh --install-cross "$TARGETARCH" && rm -rf /var/lib/apt/lists/*
COPY Cargo.toml Cargo.lock README.md LICENSE ./
COPY integration/Cargo.toml integration/
COPY integration/load/Cargo.toml integration/load/
COPY benches benches
COPY src src
# The workspace has other members, which are not built.
RUN mkdir integration/src integration/load/src \
    && touch integration/src/lib.rs integration/load/src/lib.rs \
    && mkdir /image \
    && cp "$(image/compile.sh "$TARGETARCH")" /image/portcullis \
    && cp LICENSE /image/LICENSE \
    && setcap cap_net_admin=p /image/portcullis

FROM scratch
LABEL org.opencontainers.image.title="portcullis" \
      org.opencontainers.image.description="Kubernetes Service proxy for nftables with a firewall on every NodePort" \
      org.opencontainers.image.version="0.1.0" \
      org.opencontainers.image.licenses="Apache-2.0"
COPY --from=build /image/ /
USER 65532:65532
ENTRYPOINT ["/portcullis"]
