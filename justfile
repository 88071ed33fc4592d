# What developers, CI and the workflows on GitHub run. Each recipe is one script in scripts/ci/, which `.ci/run` calls too:
# nothing is checked there that can't be repeated here, and none of it needs `just` itself.

# Lists the recipes.
default:
    @just --list

# Checks the formatting of all Rust code (`cargo fmt --all` mends it).
fmt:
    scripts/ci/fmt.sh

# Lints everything; warnings are errors.
clippy:
    scripts/ci/clippy.sh

# Runs all tests, the engine's and those with real processes among them.
test:
    scripts/ci/test.sh

# Compiles and tests the rooms that need no engine, without burn: the fast loop.
test-pure:
    scripts/ci/test-pure.sh

# Tests the quantization schemes alone.
kernels:
    scripts/ci/kernels.sh

# Tests the GPU kernels and the GPU engine on a software Vulkan.
gpu-kernels:
    scripts/ci/gpu-kernels.sh

# Compiles every GPU kernel with NVRTC for each architecture, without a GPU.
nvrtc:
    scripts/ci/nvrtc.sh

# Tests the kernels and the engine on an NVIDIA GPU, where there is one.
cuda:
    scripts/ci/cuda.sh

# Checks licences, advisories, bans and sources of all dependencies.
deny:
    scripts/ci/deny.sh

# Runs the main job, checks that its report is there, and times a cached rerun.
main-job:
    scripts/ci/main-job.sh

# Opens captured activations with DuckDB and Polars.
parquet:
    scripts/ci/parquet.sh

# Prints the sweep's cells as a GitHub Actions matrix.
matrix:
    scripts/ci/matrix.sh

# Runs one cell of the sweep, e.g. `just sweep-cell config=nf4`; without arguments the one that $NARROW names.
sweep-cell *values:
    scripts/ci/sweep-cell.sh {{ values }}

# Runs the benchmarks (numbers worth reading only on an otherwise idle machine).
bench:
    scripts/ci/bench.sh

# Everything that CI checks, in CI's order.
ci:
    .ci/run
