#!/usr/bin/env bash
# Checks the formatting of all Rust code.
source "$(dirname "$0")/common.sh"
cargo fmt --all --check
