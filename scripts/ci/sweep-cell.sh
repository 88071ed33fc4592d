#!/usr/bin/env bash
# Runs one cell of the sweep (`config=nf4`); in a workflow its report becomes the job's summary.
source "$(dirname "$0")/common.sh"
cell=${1:-${CELL:-}}
[ -n "$cell" ] || die "name a cell: scripts/ci/sweep-cell.sh config=nf4"

labpipe run pipelines/sweep.yaml --matrix "$cell"

report=$(find results/sweep -name report.md -printf '%T@ %p\n' | sort -rn | head -n 1 | cut -d ' ' -f 2-)
[ -n "$report" ] || die "the cell $cell left no report.md under results/sweep"
echo "report: $report"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
  cat "$report" >>"$GITHUB_STEP_SUMMARY"
fi
