#!/usr/bin/env bash
# Opens captured activations with DuckDB and Polars, and checks that both read the same values.
source "$(dirname "$0")/common.sh"

venv=target/parquet-venv
python3 -m venv "$venv"
"$venv/bin/pip" install --quiet --disable-pip-version-check duckdb polars
"$venv/bin/python" - <<'PYTHON'
import glob
import sys

import duckdb
import polars

files = sorted(glob.glob("cache/*/activations/model.layers.0.mlp.up_proj.output.parquet"))
if not files:
    sys.exit("no captured activations under cache/: run pipelines/sensitivity.yaml first")
for name in files:
    rows, width, mean = duckdb.sql(
        f"select count(*), any_value(len(values)), avg(list_avg(values)) from '{name}'"
    ).fetchall()[0]
    frame = polars.read_parquet(name)
    other = frame["values"].explode().mean()
    assert rows == frame.height and rows > 0, (rows, frame.height)
    assert abs(mean - other) <= 1e-9 * max(1.0, abs(mean)), (mean, other)
    print(f"{name}: {rows} rows of {width} values, mean {mean:.6f} by DuckDB and Polars")
PYTHON
