#!/usr/bin/env bash
# Runs sensitivity.yaml, benchmark.yaml and llama-3.2-3b.yaml at Llama-3.2-3B's shape with random weights under a memory limit, and
# prints what each stage was predicted to take, what it took, and the most that was in use on the device.
# Usage: .ci/extended/memory_limit.sh [LIMIT [DEVICE]]; by default 7.5GiB and cuda. LP names the binary (built with the feature of the
# device), SHAPE another config.json, WORK a folder that is kept. Takes python3 and, at the default shape, 7 GB of disk in WORK or TMPDIR.
set -uo pipefail
cd "$(dirname "$0")/../.."
project=$PWD
LP=${LP:-$project/target/release/labpipe}
limit=${1:-7.5GiB} device=${2:-cuda}
shape=${SHAPE:-experiments/shapes/llama-3.2-3b.json}
if [[ -n ${WORK:-} ]]; then work=$WORK; mkdir -p "$work"; else work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; fi
status=0

# A folder of the shape with random weights: one block of 2^20 values, repeated, norms of ones, the small model's tokenizer.
python3 - "$shape" "$work/model" <<'PY' || exit 1
import json, os, random, shutil, struct, sys
shape, out = sys.argv[1:]
os.makedirs(out, exist_ok=True)
config = json.load(open(shape))
hidden, ffn, vocab, layers = (config[name] for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers"))
heads = config["num_attention_heads"]
head_dim = config.get("head_dim") or hidden // heads
kv = config.get("num_key_value_heads", heads) * head_dim
tensors = [("model.embed_tokens.weight", [vocab, hidden])]
for layer in range(layers):
    linears = [("self_attn.q_proj", heads * head_dim, hidden), ("self_attn.k_proj", kv, hidden), ("self_attn.v_proj", kv, hidden),
               ("self_attn.o_proj", hidden, heads * head_dim), ("mlp.gate_proj", ffn, hidden), ("mlp.up_proj", ffn, hidden),
               ("mlp.down_proj", hidden, ffn)]
    tensors += [(f"model.layers.{layer}.{name}.weight", [n_out, n_in]) for name, n_out, n_in in linears]
    tensors += [(f"model.layers.{layer}.{name}.weight", [hidden]) for name in ("input_layernorm", "post_attention_layernorm")]
tensors.append(("model.norm.weight", [hidden]))
if not config.get("tie_word_embeddings"):
    tensors.append(("lm_head.weight", [vocab, hidden]))
size = lambda dims: 2 * dims[0] * (dims[1] if len(dims) > 1 else 1)
header, at = {}, 0
for name, dims in tensors:
    header[name] = {"dtype": "F16", "shape": dims, "data_offsets": [at, at + size(dims)]}
    at += size(dims)
head = json.dumps(header).encode()
head += b" " * (-len(head) % 8)
random.seed(1)
block = struct.pack("<1048576e", *(random.gauss(0.0, 0.02) for _ in range(1 << 20)))
with open(f"{out}/model.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(head)) + head)
    for name, dims in tensors:
        n_bytes = size(dims)
        if len(dims) == 1:
            file.write(struct.pack("<e", 1.0) * dims[0])
            continue
        while n_bytes > 0:
            file.write(block[:n_bytes])
            n_bytes -= min(n_bytes, len(block))
json.dump(config | {"torch_dtype": "float16"}, open(f"{out}/config.json", "w"))
for name in ("tokenizer.json", "tokenizer_config.json"):
    if os.path.exists(f"models/stories260k/{name}"):
        shutil.copy(f"models/stories260k/{name}", out)
PY

[[ $device == cuda ]] && watch_id=0 || watch_id=${device#cuda:}

run() {
  local name=$1; shift
  echo "== $name under $limit on $device"
  "$LP" plan "$name" "$@" --memory-limit "$limit" --device "$device" --cache "$work/cache" --results "$work/results" --json >"$work/plan.json"
  local watcher=
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits --loop-ms=50 --id="$watch_id" >"$work/device.txt" 2>/dev/null &
    watcher=$!
  fi
  "$LP" run "$name" "$@" --memory-limit "$limit" --device "$device" --cache "$work/cache" --results "$work/results" --force \
    --verbose --log-format json >"$work/out.txt" 2>"$work/events.jsonl"
  local code=$?
  if [[ -n $watcher ]]; then kill "$watcher"; wait "$watcher" 2>/dev/null; fi
  if ((code != 0)); then status=1; echo "exit code $code"; tail -n 30 "$work/out.txt"; grep -v '"progress"' "$work/events.jsonl" | tail -n 20; fi
  python3 - "$work" "$limit" <<'PY' || status=1
import json, os, re, sys
work, limit = sys.argv[1:]
units = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
measured, method = {}, set()
for folder, _, files in os.walk(os.path.realpath(f"{work}/results/latest")):
    for name in files:
        if name == "record.json":
            record = json.load(open(os.path.join(folder, name)))
            if record.get("memory_bytes"):
                measured[record["stage"]] = record["memory_bytes"]
                method.add(record["memory_method"])
for line in open(f"{work}/events.jsonl"):
    found = re.search(r"peak memory ([0-9.]+) ([KMGT]?i?B)", line)
    if found:
        stage = json.loads(line).get("stage")
        measured.setdefault(stage, float(found[1]) * units[found[2]])
bad = 0
print(f"{'stage':<16} {'predicted':>12} {'measured':>12} {'measured/predicted':>19}")
for row in json.load(open(f"{work}/plan.json")):
    predicted = (row.get("memory") or {}).get("peak_bytes")
    if "memory" not in row:
        continue
    took = measured.get(row["stage"])
    cell = lambda n: "-" if n is None else f"{n / 2**20:.1f} MiB"
    ratio = f"{took / predicted:.3f}" if took and predicted else "-"
    print(f"{row['stage']:<16} {cell(predicted):>12} {cell(took):>12} {ratio:>19}")
    bad |= took is None or (row["memory"].get("limit_bytes") or 0) < took
    bad |= bool(took and predicted) and not 0.9 <= took / predicted <= 1.1
print("how:", "; ".join(sorted(method)) or "not measured")
device = f"{work}/device.txt"
if os.path.exists(device):
    used = [int(word) for word in open(device).read().split() if word.isdigit()]
    if used:
        print(f"the device, all processes: at most {max(used)} MiB, {used[0]} MiB before")
sys.exit(1 if bad else 0)
PY
}

lengths=(--set "n_prompt=${N_PROMPT:-[512, 2048]}" --set "n_depth=${N_DEPTH:-[0, 512]}")
windows=(--set "max_length=${MAX_LENGTH:-2048}" --set "stride=${STRIDE:-512}")
wanted=" ${PIPELINES:-sensitivity benchmark llama-3.2-3b} "
for name in sensitivity benchmark; do
  [[ $wanted == *" $name "* ]] && run "pipelines/$name.yaml" --set "model=$work/model" "${lengths[@]}" "${windows[@]}"
done
long=()
[[ -n ${N_PROMPT:-} ]] && long+=(--set "n_prompt=$N_PROMPT" --set "n_score=${MAX_LENGTH:-2048}" --set samples=2)
[[ -n ${N_DEPTH:-} ]] && long+=(--set "n_depth=$N_DEPTH")
[[ $wanted == *" llama-3.2-3b "* ]] && run pipelines/llama-3.2-3b.yaml --set "shape=$shape" "${long[@]}"
((status == 0)) && echo "all stages stayed below $limit, predictions within 10 %" || echo "failed: see above"
exit $status
