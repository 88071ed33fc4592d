#!/usr/bin/env bash
# Lints everything; warnings are errors. The release profile is CI's only profile, so that dependencies are built once.
source "$(dirname "$0")/common.sh"
cargo clippy --release --locked --workspace --all-targets -- -D warnings
