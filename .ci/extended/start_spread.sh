#!/usr/bin/env bash
# Measures how well verdicts on speeds hold on this machine: one config under two names, its starts taking turns, cut into pairs of runs.
# Prints the share of identical pairs that would be flagged, and of slowdowns (by 10 % on a CPU, 5 % on a GPU) that would be found.
# Usage: .ci/extended/start_spread.sh [STARTS [DEVICE [MODEL]]]; by default 200, cpu and models/stories260k. LP names the binary, OUT a
# file for the rates of all starts. Other work on the machine shows in the result.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=$PWD
LP=${LP:-$project/target/release/labpipe}
starts=${1:-200} device=${2:-cpu} model=${3:-models/stories260k}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
out=${OUT:-$work/starts.json}
# As many in each start as in pipelines/sensitivity.yaml.
passes=${PASSES:-8} sequences=${SEQUENCES:-4}
cat > "$work/pairs.yaml" <<Y
version: 1
name: pairs
stages:
  # Two names of one model: their workers take turns. Another seed gives the same work another key.
  a: { kind: load, model: $model, dtype: f16 }
  b: { kind: load, model: $model, dtype: f16 }
  prefill-a: { kind: prefill-bench, model: a, n_prompt: [64, 128, 256], samples: $((starts * passes)), starts: $starts, warmup: 2, seed: 1 }
  prefill-b: { kind: prefill-bench, model: b, n_prompt: [64, 128, 256], samples: $((starts * passes)), starts: $starts, warmup: 2, seed: 2 }
  decode-a:  { kind: decode-bench, model: a, n_gen: 64, n_depth: [0, 128], samples: $((starts * sequences)), starts: $starts, warmup: 1, seed: 1 }
  decode-b:  { kind: decode-bench, model: b, n_gen: 64, n_depth: [0, 128], samples: $((starts * sequences)), starts: $starts, warmup: 1, seed: 2 }
Y
"$LP" --cache "$work/cache" --results "$work/results" run "$work/pairs.yaml" --device "$device" >/dev/null
python3 - "$work/results/latest" "$out" <<'PY'
import json, math, statistics, sys
folder, out = sys.argv[1:]
kept = {}
for kind in ("prefill", "decode"):
    for name in ("a", "b"):
        record = json.load(open(f"{folder}/{kind}-{name}/record.json"))
        for row in record["results"]:
            rates = [None if start["is_left_out"] else round(start["tokens_per_second"], 2) for start in row["starts"]]
            kept.setdefault(f"{kind} {row['label']}", {})[name] = rates
            logs = [math.log(rate) for rate in rates if rate]
            print(f"{kind}-{name} {row['label']}: {len(rates)} starts, {len(rates) - len(logs)} disturbed and left out, the others spread by "
                  f"{100 * statistics.stdev(logs):.1f} %")
json.dump({"device": record["device"], "figures": kept}, open(out, "w"))
PY
STARTS_JSON=$out cargo test --release --lib speeds_of_this_machine -- --ignored --nocapture 2>/dev/null | grep -E "pairs|slowdowns"
