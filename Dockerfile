# syntax=docker/dockerfile:1
#
# Two images:
#
#   docker build --target cpu  -t labpipe:cpu  .
#   docker build --target cuda -t labpipe:cuda .
#
#   docker run --rm -v "$PWD/results:/lab/results" labpipe:cpu run pipelines/sensitivity.yaml
#
# `cuda` holds a binary with the CUDA backend on CUDA's development image: kernels are compiled when they are first used, by NVRTC, which
# reads the toolkit's headers.

ARG RUST_VERSION=1.95
ARG CUDA_VERSION=13.0.1

# --- build: bookworm's glibc (2.36) is older than that of either runtime image --------------------------------------
FROM rust:${RUST_VERSION}-slim-bookworm AS build
WORKDIR /src
# What run.json calls the program's revision: --build-arg LABPIPE_GIT_REVISION="$(git rev-parse HEAD)".
ARG LABPIPE_GIT_REVISION
COPY . .
# The registry and the target folder are caches of the builder, not layers: hence the copy in the same step.
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --bin labpipe \
    && install -D target/release/labpipe /out/labpipe

FROM build AS build-cuda
RUN --mount=type=cache,target=/usr/local/cargo/registry \
    --mount=type=cache,target=/src/target \
    cargo build --release --locked --features cuda --bin labpipe \
    && install -D target/release/labpipe /out/labpipe

# --- what both images hold beside the binary: pipelines, configs, sample text, small models ----------------------------
FROM scratch AS house
COPY --from=build /out/labpipe /usr/local/bin/labpipe
COPY pipelines /lab/pipelines
COPY experiments /lab/experiments
COPY models /lab/models
COPY LICENSE README.md /lab/

# --- CUDA --------------------------------------------------------------------------------------------------------
FROM nvidia/cuda:${CUDA_VERSION}-devel-ubuntu24.04 AS cuda
COPY --from=house / /
COPY --from=build-cuda /out/labpipe /usr/local/bin/labpipe
# The uid is free in both bases (ubuntu's own user has 1000).
RUN useradd --uid 10001 --home-dir /lab labpipe \
    && mkdir -p /lab/cache /lab/results \
    && chown -R labpipe /lab
USER labpipe
WORKDIR /lab
VOLUME ["/lab/cache", "/lab/results"]
ENTRYPOINT ["labpipe"]
CMD ["--help"]

# --- CPU: the default target --------------------------------------------------------------------------------------
FROM debian:bookworm-slim AS cpu
COPY --from=house / /
RUN useradd --uid 10001 --home-dir /lab labpipe \
    && mkdir -p /lab/cache /lab/results \
    && chown -R labpipe /lab
USER labpipe
WORKDIR /lab
VOLUME ["/lab/cache", "/lab/results"]
ENTRYPOINT ["labpipe"]
CMD ["--help"]
