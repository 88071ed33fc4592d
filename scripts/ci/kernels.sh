#!/usr/bin/env bash
# Tests the quantization schemes: packing against reference vectors, and the kernels against their host reference.
source "$(dirname "$0")/common.sh"
cargo test --release --locked --package labpipe-kernels --features burn
