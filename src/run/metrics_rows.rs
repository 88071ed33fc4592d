//! Rows for `results/metrics.csv`: one a model that a run measured.

use crate::artifact::{DecodeRecord, PplRecord, PrefillRecord, RecordError};
use crate::inference::{LoadRecord, QuantizeRecord, stored_words};
use crate::report::Model;
use crate::stage::StageInput;
use crate::store::MetricsRow;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Returns a row for every model that any of the results measured.
///
/// # Errors
/// Where a record lacks what its kind promises.
pub fn metrics_rows(results: &BTreeMap<String, Arc<StageInput>>, ts: &str) -> Result<Vec<MetricsRow>, RecordError> {
    let mut rows: BTreeMap<String, MetricsRow> = BTreeMap::new();
    for result in results.values() {
        let Some(model) =
            result.input("model").filter(|_| ["prefill-bench", "decode-bench", "ppl"].contains(&result.kind.as_str()))
        else {
            continue;
        };
        if !rows.contains_key(&model.address) {
            rows.insert(model.address.clone(), start(model, ts)?);
        }
        let Some(row) = rows.get_mut(&model.address) else { continue };
        let head = &result.record.head;
        row.run_id.clone_from(&head.run_id);
        row.pipeline.clone_from(&head.pipeline);
        row.device = head.device.clone().unwrap_or_default();
        match result.kind.as_str() {
            "prefill-bench" => {
                let record: PrefillRecord = result.record.read()?;
                note_memory(row, result, record.common.memory.memory_bytes);
                let prefills = record.results.into_iter().filter(|row| !row.scores);
                if let Some(longest) = prefills.max_by_key(|row| row.n_prompt) {
                    row.prompt_length = Some(longest.n_prompt as u64);
                    row.avg_prefill_tps = Some(longest.tokens_per_second);
                }
            }
            "decode-bench" => {
                let record: DecodeRecord = result.record.read()?;
                note_memory(row, result, record.common.memory.memory_bytes);
                row.avg_decode_tps = record.results.first().map(|row| row.tokens_per_second);
            }
            _ => row.perplexity = result.record.read::<PplRecord>()?.results.first().map(|row| row.perplexity),
        }
    }
    Ok(rows.into_values().collect())
}

/// Keeps the most of what the model's measurements took.
fn note_memory(row: &mut MetricsRow, result: &StageInput, memory_bytes: Option<u64>) {
    row.memory_bytes = row.memory_bytes.max(memory_bytes);
    // `cuda:0: NVIDIA H200`; a CPU's name stands in `device` alone.
    let device = result.record.head.device.as_deref().and_then(|device| device.split_once(": "));
    if let Some((_, name)) = device.filter(|(device, _)| *device != "cpu") {
        row.gpu_name = name.to_owned();
        row.max_vram_gb = row.memory_bytes.map(|bytes| bytes as f64 / 1e9);
    }
}

fn start(model: &StageInput, ts: &str) -> Result<MetricsRow, RecordError> {
    let shown = Model::read(model)?;
    let (config, info) = if model.kind == "quantize" {
        let record: QuantizeRecord = model.record.read()?;
        (Some(record.config), record.model)
    } else {
        (None, model.record.read::<LoadRecord>()?.model)
    };
    // A model whose files hold it quantized has no config of ours.
    let stored = info.stored_quantization;
    let of_config = config.as_ref().and_then(|config| config.scheme.as_ref());
    let of_files = stored.as_ref().and_then(|stored| stored.schemes.first());
    let scheme = of_config.or(of_files).map(|spec| spec.scheme.clone()).unwrap_or_default();
    let method = config.map(|config| config.name).or(stored.map(|stored| stored.format));
    Ok(MetricsRow {
        ts: ts.to_owned(),
        model: model.address.clone(),
        quant_method: method.unwrap_or_else(|| "none".to_owned()),
        load_8bit: scheme.ends_with('8'),
        load_4bit: scheme.ends_with('4'),
        quant_type: scheme,
        cell: shown.cell.clone().unwrap_or_default(),
        model_file: shown.file.clone(),
        model_blake3: shown.file_blake3.clone().unwrap_or_default(),
        source_types: stored_words(&shown.source_types).unwrap_or_default(),
        ..MetricsRow::default()
    })
}
