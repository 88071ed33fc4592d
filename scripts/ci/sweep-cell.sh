#!/usr/bin/env bash
# Runs one cell of the sweep. Named by arguments (`config=nf4`, one for each matrix variable), or, in a workflow, by $NARROW: the
# ready-made options that `labpipe matrix --format github` gives each cell. The report becomes the job's summary.
source "$(dirname "$0")/common.sh"
narrow=()
for value in "$@"; do
  narrow+=(--matrix "$value")
done
if [ "${#narrow[@]}" -eq 0 ]; then
  read -r -a narrow <<<"${NARROW:-}"
fi
[ "${#narrow[@]}" -gt 0 ] || die "name a cell: scripts/ci/sweep-cell.sh config=nf4"

labpipe run pipelines/sweep.yaml "${narrow[@]}" --accept-disturbed

report=$(newest results/sweep report.md)
[ -n "$report" ] || die "${narrow[*]} left no report.md under results/sweep"
echo "report: $report"
if [ -n "${GITHUB_STEP_SUMMARY:-}" ]; then
  cat "$report" >>"$GITHUB_STEP_SUMMARY"
fi
