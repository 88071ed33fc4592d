#!/usr/bin/env bash
# Compiles and tests everything but the engine, without burn: the proof that the pure rooms are pure.
source "$(dirname "$0")/common.sh"
if cargo tree --locked --no-default-features --edges normal --prefix none | grep -E '^burn(-| )'; then
  die "a build without default features must not depend on burn"
fi
# These tests take no time worth optimizing for; dependencies are those that were built already.
cargo test --release --locked --no-default-features --config profile.release.package.labpipe.opt-level=1
