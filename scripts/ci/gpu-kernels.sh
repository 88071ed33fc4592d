#!/usr/bin/env bash
# Tests the GPU kernels and the GPU engine without a GPU: through wgpu on a software Vulkan.
source "$(dirname "$0")/common.sh"
if ! ls /usr/share/vulkan/icd.d/*.json >/dev/null 2>&1 && command -v apt-get >/dev/null; then
  apt-get update -qq
  apt-get install -qq -y --no-install-recommends mesa-vulkan-drivers libvulkan1
fi
export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
export LABPIPE_TEST_DEVICE=wgpu
# One set of features for both packages and for nvrtc.sh, so that what all need is built once. The time of these tests is the software Vulkan's.
tests() { cargo test --profile quick --locked --package labpipe --package labpipe-kernels --features labpipe/wgpu,labpipe-kernels/cuda-source "$@"; }
tests --test cube_kernels --test cube_quantize --test burn_linear
# One thread: what one test launches while another records a step would be recorded too.
tests --test families --test damaged_weights --test survey -- --test-threads 1
tests --lib -- --test-threads 1 gpu:: simd:: weight:: schemes:: strips:: token::
tests --test engine_reference -- --test-threads 1 logits greedy longer
# The other path through the device: burn's operations, for every family and scheme.
export LABPIPE_TEST_EXECUTION=burn
tests --test families -- --test-threads 1
tests --test engine_reference -- --test-threads 1 logits greedy longer decode
