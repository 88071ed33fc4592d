#!/usr/bin/env bash
# Tests the GPU kernels and the GPU engine without a GPU: through wgpu on a software Vulkan.
source "$(dirname "$0")/common.sh"
if ! ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1 && command -v apt-get >/dev/null; then
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends mesa-vulkan-drivers libvulkan1
fi
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
export LABPIPE_TEST_DEVICE=wgpu
cargo test --release --locked --package labpipe-kernels --features wgpu --lib --test cube_kernels --test cube_quantize
# One thread: what one test launches while another records a step would be recorded too.
cargo test --release --locked --features wgpu --test families --test damaged_weights --test survey -- --test-threads 1
cargo test --release --locked --features wgpu --lib gpu:: -- --test-threads 1
cargo test --release --locked --features wgpu --test engine_reference -- --test-threads 1 logits greedy longer
