#!/usr/bin/env bash
# Prints the sweep's cells as a GitHub Actions matrix; in a workflow it is the step's output `matrix` too.
source "$(dirname "$0")/common.sh"
matrix=$(labpipe matrix pipelines/sweep.yaml --format github)
printf '%s\n' "$matrix"
if [ -n "${GITHUB_OUTPUT:-}" ]; then
  printf 'matrix=%s\n' "$matrix" >>"$GITHUB_OUTPUT"
fi
