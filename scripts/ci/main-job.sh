#!/usr/bin/env bash
# Runs the main job as a user would, checks that it left a report, then runs it again from the cache.
source "$(dirname "$0")/common.sh"

labpipe run pipelines/sensitivity.yaml --accept-disturbed

report=$(newest results/sensitivity report.md)
[ -n "$report" ] || die "the main job left no report.md under results/sensitivity"
folder=$(dirname "$report")
for name in lbl_analysis.md images/summary.png; do
  [ -s "$folder/$name" ] || die "the main job's report lacks $name: $folder"
done
echo "report: $report ($(wc -l <"$report") lines)"

# The build is not part of what is timed: `cargo run` above left nothing to do.
events=$(mktemp)
trap 'rm -f "$events"' EXIT
started_ns=$(date +%s%N)
labpipe --log-format json run pipelines/sensitivity.yaml 2>"$events" >/dev/null
ended_ns=$(date +%s%N)
echo "cached rerun: $(((ended_ns - started_ns) / 1000000)) ms"
finished=$(grep '"event":"run_finished"' "$events") || die "the rerun did not tell how it ended"
grep -q '"n_done":0' <<<"$finished" || die "a rerun of an unchanged pipeline computed something again: $finished"
