#!/usr/bin/env bash
# Tests the kernels and the engine on an NVIDIA GPU. Continuous integration has none: run it by hand where there is one.
# One thread: what one test launches while another records a graph would be recorded too.
source "$(dirname "$0")/common.sh"
export LABPIPE_TEST_DEVICE=cuda
cargo test --release --locked --package labpipe-kernels --features cuda --test cube_kernels --test cube_quantize --test cube_gemv --test kernel_store -- --test-threads 1
cargo test --release --locked --package labpipe --package labpipe-kernels --features labpipe/cuda --test burn_linear -- --test-threads 1
cargo test --release --locked --features cuda --test families --test damaged_weights --test survey --test engine_reference -- --test-threads 1
cargo test --release --locked --features cuda --lib gpu:: -- --test-threads 1
# The other path through the device: burn's operations.
export LABPIPE_TEST_EXECUTION=burn
cargo test --release --locked --features cuda --test families --test engine_reference -- --test-threads 1
