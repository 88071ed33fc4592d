#!/usr/bin/env bash
# Measures how often the 95 % intervals of 500 draws from a long text cover the whole text's value, for mean NLL, ln perplexity ratio, KL
# and top-1 agreement of NF4 against its base: contiguous draws of 4,000 tokens, the same number in eight stretches from all over the
# text, and draws of 10 and 20 whole documents.
# Usage: .ci/extended/interval_coverage.sh [WIKI_TEST_RAW]; LP names the binary. Without a file only TinyStories is measured (some 3
# minutes on two cores); with WikiText-2's wiki.test.raw some 20 minutes more. docs/definitions.md has results.
set -euo pipefail
cd "$(dirname "$0")/../.."
project=$PWD
LP=${LP:-$project/target/release/labpipe}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ln -s "$project/models" "$work/models"
ln -s "$project/experiments" "$work/experiments"

# measure TEXT: TEXT is a source with a separator.
measure() {
  cat > "$work/coverage.yaml" <<Y
version: 1
name: coverage
stages:
  base:     { kind: load, model: models/stories260k, dtype: f32 }
  nf4:      { kind: quantize, model: base, config: experiments/nf4.yaml }
  ppl-base: { kind: ppl, model: base, text: $1, max_length: 512, stride: 512, keep_log_probs: f16 }
  ppl-nf4:  { kind: ppl, model: nf4, base: ppl-base }
Y
  (cd "$work" && "$LP" run coverage.yaml -q >/dev/null)
  local scores
  scores=$(cd "$work" && "$LP" show ppl-nf4 --json | python3 -c 'import json, sys; print(json.load(sys.stdin)["key"])')
  LABPIPE_TOKEN_SCORES="$work/cache/$scores/tokens-strided-512-512.parquet" \
    cargo test --release --lib coverage_of_intervals_on_a_text -- --ignored --nocapture | grep -E 'tokens in|contiguous|^(nll|ln ratio|kl|same top)'
}

echo "TinyStories, documents are stories"
measure '{ source: experiments/data/tinystories.txt, separator: "<|endoftext|>" }'
if [ $# -gt 0 ]; then
  # A row is a line with its line break, a blank one the empty string; articles begin with a heading of one level.
  python3 - "$1" "$work/wiki.txt" <<'P'
import re, sys
rows = open(sys.argv[1], encoding="utf-8").read().splitlines(keepends=True)
articles = [[]]
for row in rows:
    if re.fullmatch(r" = [^=].*[^=] = \n", row):
        articles.append([])
    articles[-1].append("" if row.strip() == "" else row)
open(sys.argv[2], "w", encoding="utf-8").write("\x1e".join("\n\n".join(article) for article in articles))
P
  echo "WikiText-2's test split, documents are articles"
  measure '{ source: wiki.txt, separator: "\x1e" }'
fi
