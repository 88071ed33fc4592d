#!/usr/bin/env bash
# Injects faults into runs and caches and checks that nothing is lost and nothing wrong is served.
# Usage: .ci/extended/cache_faults.sh [KILLS [FLIPS [FAILURES]]]; LP names the binary. Takes a C compiler and python3.
#   1. kills at every n-th call that changes the disk, and at random moments, while measurements are repeated: none is lost;
#   2. flipped bits in all files of a cache: cache verify or the run notices, and the numbers stay right;
#   3. cache gc beside runs: nothing that a run planned is removed;
#   4. calls that fail: no locks, no links, no fsync, a full disk, I/O errors.
# Prints a line per failure and `N passed, M failed` at the end.
set -uo pipefail
cd "$(dirname "$0")/../.."
project=$PWD
LP=${LP:-$project/target/release/labpipe}
n_kills=${1:-40} n_flips=${2:-120} n_failures=${3:-40}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
passed=0 failed=0
RANDOM=${SEED:-1}

pass() { passed=$((passed + 1)); }
fail() { failed=$((failed + 1)); printf 'failed: %s\n' "$*"; }
# check NAME COMMAND..: counts whether a command succeeds.
check() { local name=$1; shift; if "$@" >"$work/last.txt" 2>&1; then pass; else fail "$name: $(tail -n 2 "$work/last.txt" | tr '\n' ' ')"; fi; }

cc -shared -fPIC -w -o "$work/shim.so" tests/support/shim.c -ldl || { echo "a C compiler is needed" >&2; exit 77; }
shim() { env LD_PRELOAD="$work/shim.so" "$@"; }

# lab NAME: an empty folder with the repository's models and texts.
lab() {
  rm -rf "${work:?}/$1"; mkdir "$work/$1"; cd "$work/$1" || exit 1
  ln -s "$project/models" models; ln -s "$project/experiments" experiments
  cat > p.yaml <<'Y'
version: 1
name: faults
vars: { text: { source: experiments/data/tinystories.txt, n_chars: 2000 } }
stages:
  base:    { kind: load, model: models/stories260k, dtype: f16 }
  nf4:     { kind: quantize, model: base, config: { scheme: nf4 } }
  prefill: { kind: prefill-bench, model: nf4, n_prompt: 16, samples: 2, warmup: 0 }
  decode:  { kind: decode-bench, model: nf4, n_gen: 2, samples: 1, warmup: 0 }
  ppl:     { kind: ppl, model: nf4, text: "${text}", max_length: 64, stride: 64 }
  acts-a:  { kind: capture-activations, model: base, text: "${text}", n_tokens: 12 }
  acts-b:  { kind: capture-activations, model: nf4, text: "${text}", n_tokens: 12 }
  diff:    { kind: diff, reference: acts-a, candidate: acts-b, scatter_points: 20 }
  report:  { kind: report, inputs: [prefill, ppl, diff], formats: [md] }
Y
}
run() { timeout 120 "$LP" run p.yaml "$@" >out.txt 2>err.txt; }
# cached STAGE..: succeeds if the plan finds all of them in the cache.
cached() {
  "$LP" plan p.yaml --json | python3 -c '
import json, sys
rows = {row["stage"]: row["action"] for row in json.load(sys.stdin)}
gone = [stage for stage in sys.argv[1:] if rows[stage] != "cached"]
sys.exit(f"not cached: {gone}" if gone else 0)' "$@"
}
# numbers: what does not depend on the clock.
numbers() {
  for stage in diff ppl; do "$LP" show $stage --json; done | python3 -c '
import json, sys
text, records = sys.stdin.read(), []
decoder = json.JSONDecoder()
while text.strip():
    record, end = decoder.raw_decode(text.lstrip()); text = text.lstrip()[end:]; records.append(record)
print(json.dumps([records[0]["modules"], records[1]["results"]]))'
}

lab kills
run || { cat err.txt; exit 1; }
numbers > want.json
measured="prefill decode"
# How many calls change the disk while two stages are measured again.
last=0
for at in 400 300 200 150 100; do
  shim env SHIM_KILL=$at "$LP" run p.yaml --remeasure --quiet >/dev/null 2>&1
  [ $? -eq 137 ] && { last=$at; break; }
done
for ((i = 1; i <= n_kills; i++)); do
  at=$((1 + (i - 1) * (last > 0 ? last : 200) / n_kills))
  shim env SHIM_KILL=$at "$LP" run p.yaml --remeasure --quiet >/dev/null 2>&1
  check "kill at call $at" cached $measured
  "$LP" run p.yaml --remeasure --quiet >/dev/null 2>&1 & pid=$!
  sleep "0.$(printf '%03d' $((RANDOM % 600)))"
  kill -9 $pid 2>/dev/null; wait $pid 2>/dev/null
  check "random kill $i" cached $measured
done
check "verify after the kills" "$LP" cache verify
"$LP" cache gc >/dev/null 2>&1
check "no staging folder is left" test -z "$(ls cache/tmp)"
check "no temporary file is left" test -z "$(find cache -name '.*.[0-9]*.[0-9]*' | head -1)"
run; check "the numbers after the kills" cmp want.json <(numbers)

lab flips
run || exit 1
numbers > want.json
diff_key=$("$LP" show diff --json | python3 -c 'import json,sys; print(json.load(sys.stdin)["key"])')
# A run in which diff reads its inputs once more.
mv "cache/$diff_key" "$work/diff-artifact"
cp -r cache whole
mapfile -t files < <(cd whole && find . -type f ! -path './locks/*' ! -path './used/*' -size +0 | sort)
for ((i = 0; i < n_flips; i++)); do
  file=${files[$((i * ${#files[@]} / n_flips))]}
  rm -rf cache; cp -r whole cache
  python3 - "cache/$file" $RANDOM$RANDOM <<'P'
import sys
path, seed = sys.argv[1], int(sys.argv[2])
data = bytearray(open(path, "rb").read()); bit = seed % (len(data) * 8)
data[bit // 8] ^= 1 << (bit % 8); open(path, "wb").write(data)
P
  "$LP" cache verify >verify.txt 2>&1; verdict=$?
  case $file in
    ./[0-9a-f]*/*) check "cache verify finds the flip in $file" test $verdict -eq 5 ;;
    *) check "cache verify minds artifacts alone ($file)" test $verdict -eq 0 ;;
  esac
  check "the run after the flip in $file" run
  check "the numbers after the flip in $file" cmp want.json <(numbers)
done

lab gc
run || exit 1
for ((i = 0; i < 8; i++)); do
  # Nothing refers to the artifacts but the run that goes on.
  rm -rf results/faults err.txt
  "$LP" run p.yaml --remeasure >out.txt 2>err.txt & pid=$!
  # From the moment on which it has planned; before that nothing would be in use.
  while kill -0 $pid 2>/dev/null && ! grep -qs '^run ' err.txt; do sleep 0.01; done
  while kill -0 $pid 2>/dev/null; do
    "$LP" cache gc >gc.txt 2>&1 || fail "gc beside a run: $(tail -n 1 gc.txt)"
  done
  if wait $pid; then pass; else fail "the run beside gc: $(tail -n 2 err.txt | tr '\n' ' ')"; fi
  check "nothing was computed again but measurements" test "$(grep -c '^done ' err.txt)" -le 4
done

lab failures
run || exit 1
numbers > want.json
for spec in flock:38 flock:37 flock:95 symlink:1 symlink:95 fsync:22 fsync:38 fsync:95; do
  rm -rf cache results
  check "a run with $spec" shim env SHIM_FAIL=$spec timeout 120 "$LP" run p.yaml
  check "one warning with $spec" test "$(grep -c 'warning: ' "$work/last.txt")" -eq 1
  check "the numbers with $spec" cmp want.json <(numbers)
  check "verify with $spec" shim env SHIM_FAIL=$spec "$LP" cache verify
  check "gc with $spec" shim env SHIM_FAIL=$spec "$LP" cache gc
  check "a run from the cache with $spec" shim env SHIM_FAIL=$spec timeout 120 "$LP" run p.yaml
done
for ((i = 1; i <= n_failures; i++)); do
  for spec in write:28 fsync:5 rename:5 mkdir:28; do
    at=$((1 + RANDOM % 60))
    rm -rf cache results
    shim env SHIM_FAIL=$spec:$at timeout 120 "$LP" run p.yaml >out.txt 2>err.txt; code=$?
    check "an exit code for $spec:$at ($code)" test $code -eq 0 -o $code -eq 2 -o $code -eq 3
    check "no panic with $spec:$at" bash -c '! grep -q panicked err.txt'
    check "the run after $spec:$at" run
    check "the numbers after $spec:$at" cmp want.json <(numbers)
    check "verify after $spec:$at" "$LP" cache verify
  done
done

printf '%d passed, %d failed\n' "$passed" "$failed"
[ "$failed" -eq 0 ]
