//! Rows for `results/metrics.csv`: one a model that a run measured.

use crate::artifact::{DecodeResult, PplResult, PrefillResult};
use crate::stage::StageInput;
use crate::store::MetricsRow;
use serde::de::DeserializeOwned;
use serde_json::Value;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Returns a row for every model that any of the results measured.
pub fn metrics_rows(results: &BTreeMap<String, Arc<StageInput>>, ts: &str) -> Vec<MetricsRow> {
    let mut rows: BTreeMap<String, MetricsRow> = BTreeMap::new();
    for result in results.values() {
        let Some(model) =
            result.input("model").filter(|_| ["prefill-bench", "decode-bench", "ppl"].contains(&result.kind.as_str()))
        else {
            continue;
        };
        let row = rows.entry(model.address.clone()).or_insert_with(|| start(model, ts));
        match result.kind.as_str() {
            "prefill-bench" => {
                let prefills = list::<PrefillResult>(result).into_iter().filter(|row| !row.scores);
                if let Some(longest) = prefills.max_by_key(|row| row.n_prompt) {
                    row.prompt_length = Some(longest.n_prompt as u64);
                    row.avg_prefill_tps = Some(longest.tokens_per_second_mean);
                }
            }
            "decode-bench" => {
                row.avg_decode_tps = list::<DecodeResult>(result).first().map(|row| row.tokens_per_second)
            }
            _ => row.perplexity = list::<PplResult>(result).first().map(|row| row.perplexity),
        }
    }
    rows.into_values().collect()
}

fn list<T: DeserializeOwned>(result: &StageInput) -> Vec<T> {
    let value = result.record.body.get("results").cloned().unwrap_or_default();
    serde_json::from_value(value).unwrap_or_default()
}

fn start(model: &StageInput, ts: &str) -> MetricsRow {
    let config = model.record.body.get("config").unwrap_or(&Value::Null);
    // A model whose files hold it quantized has no config of ours.
    let stored = model.record.body.get("model").map_or(&Value::Null, |info| &info["stored_quantization"]);
    let scheme =
        config["scheme"]["scheme"].as_str().or_else(|| stored["schemes"][0]["scheme"].as_str()).unwrap_or_default();
    MetricsRow {
        ts: ts.to_owned(),
        model: model.address.clone(),
        quant_method: config["name"].as_str().or_else(|| stored["format"].as_str()).unwrap_or("none").to_owned(),
        load_8bit: scheme.ends_with('8'),
        load_4bit: scheme.ends_with('4'),
        quant_type: scheme.to_owned(),
        ..MetricsRow::default()
    }
}
