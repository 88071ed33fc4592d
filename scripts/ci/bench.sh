#!/usr/bin/env bash
# Runs the benchmarks.
source "$(dirname "$0")/common.sh"
cargo bench --locked --workspace "$@"
