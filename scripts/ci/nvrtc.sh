#!/usr/bin/env bash
# Compiles every GPU kernel with NVRTC, which needs no GPU, for each architecture, and checks what it takes of a multiprocessor.
# NVRTC and the headers that kernels include are wheels of PyPI (90 MB), in the version of the Dockerfile's CUDA.
source "$(dirname "$0")/common.sh"

venv=target/nvrtc-venv
wheels=(nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-crt==13.0.88 nvidia-cuda-cccl==13.0.85)
if python3 -m venv "$venv" && "$venv/bin/pip" install --quiet --disable-pip-version-check --no-deps "${wheels[@]}"; then
  LABPIPE_NVRTC=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia/cu13
  export LABPIPE_NVRTC
else
  echo "compiling is left out: python3 could not install ${wheels[*]}" >&2
fi
# The features and the profile of gpu-kernels.sh, so that one build serves both.
cargo test --profile quick --locked --package labpipe --package labpipe-kernels --features labpipe/wgpu,labpipe-kernels/cuda-source \
  --test nvrtc -- --nocapture
