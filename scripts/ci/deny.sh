#!/usr/bin/env bash
# Checks licences, advisories, bans and sources of all dependencies (deny.toml).
source "$(dirname "$0")/common.sh"
if ! cargo deny --version >/dev/null 2>&1; then
  die "cargo-deny is not installed: cargo install --locked cargo-deny"
fi
cargo deny check "$@"
