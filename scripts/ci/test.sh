#!/usr/bin/env bash
# Runs all tests: the pure rooms, the kernels, the engine, and those that start labpipe itself.
source "$(dirname "$0")/common.sh"
cargo test --release --locked --workspace
