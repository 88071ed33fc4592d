//! What a model will take on a device, told before any of it is loaded.

use super::attention::QUERY_CHUNK;
use super::model::FILLED_TOKENS;
use super::score::LOGIT_ROWS;
use super::spec::ModelSpec;
use crate::inference::{InferenceError, ModelInfo, ModelRecipe, Workload};
use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use labpipe_kernels::burn_ext::PANEL_BYTES;
use labpipe_kernels::schemes;

/// Copies of a captured tensor that there are at once, by measurement.
const CAPTURED_COPIES: u64 = 7;

/// What a Parquet writer takes beside them, by measurement.
const WRITER_BYTES: u64 = 1 << 20;

/// What a tokenizer leaves behind in the heap for each entry of the vocabulary, by measurement.
const TOKENIZER_BYTES: u64 = 400;

/// What the allocator and threads keep once weights were quantized or converted, by measurement.
const KEPT_BYTES: u64 = 5 << 17;

/// Rows that are packed to learn what a scheme stores for one.
const N_ROWS: usize = 4;

/// Returns the bytes that a model's weights take as its recipe stores them. Second-level scales may take more on a device.
///
/// # Errors
/// `Quantize` where a scheme does not take a module's shape.
pub fn weights_bytes(info: &ModelInfo, recipe: &ModelRecipe) -> Result<u64, InferenceError> {
    let mut bytes = info.weights_bytes();
    let Some(config) = &recipe.quantization else { return Ok(bytes) };
    for (module, [n_out, n_in]) in &info.linears {
        let Some(spec) = config.scheme_for(module) else { continue };
        let whole = (n_out * n_in * info.dtype.size_bytes()) as u64;
        let packed = packed_bytes(spec, *n_out, *n_in)
            .map_err(|error| InferenceError::Quantize { module: module.clone(), reason: error.to_string() })?;
        bytes = bytes.saturating_sub(whole) + packed;
    }
    Ok(bytes)
}

/// Returns the bytes of a key-value cache of `n_ctx` positions: 2 · n_layers · n_kv_heads · head_dim · n_ctx · bytes of an element.
pub fn cache_bytes(spec: &ModelSpec, compute: DType, n_ctx: usize) -> u64 {
    2 * spec.n_layers as u64 * n_ctx as u64 * (spec.kv_width() * compute.size_bytes()) as u64
}

/// Returns the most that the activations of a pass on the host take: `n` tokens that see `n_keys` keys, `n_rows` rows of whose logits
/// are computed.
pub fn pass_bytes(spec: &ModelSpec, compute: DType, n: usize, n_keys: usize, n_rows: usize) -> u64 {
    let size = compute.size_bytes();
    let (hidden, q, kv, ffn) = (spec.hidden_size, spec.q_width(), spec.kv_width(), spec.ffn_size);
    // Scores of a chunk of queries and their softmax, in f32; the masks of all chunks are made before the first layer.
    let scores = 4 * spec.n_heads * n.min(QUERY_CHUNK) * n_keys;
    let masks = 4 * spec.attentions.len() * n * (n_keys - n / 2);
    let attention = size * n * (2 * hidden + 3 * q + 2 * kv) + 2 * scores;
    // The residual stream, the norm's rows, gate, its activation, up, and their product.
    let mlp = size * n * (2 * hidden + 4 * ffn);
    let logits = size * n * hidden + logit_bytes(spec, n_rows) * 6 / 5;
    (masks + attention.max(mlp).max(logits)) as u64
}

/// Returns the bytes of the logits that are on the host at a time.
fn logit_bytes(spec: &ModelSpec, n_rows: usize) -> usize {
    4 * n_rows.min(LOGIT_ROWS) * spec.vocab_size
}

/// Returns the most that a stage takes on the host beside weights and cache: activations, what waits to be written, scratch of products.
/// `is_converted` where weights are not used as their files have them.
/// Held against measured runs: docs/definitions.md, "Prediction".
pub fn host_work_bytes(spec: &ModelSpec, compute: DType, is_converted: bool, work: &Workload) -> u64 {
    let n = if work.n_gen > 0 { work.n_pass.min(FILLED_TOKENS) } else { work.n_pass };
    let pass = pass_bytes(spec, compute, n, work.n_pass, work.n_logits);
    let step = if work.n_gen > 0 { 4 * (2 * spec.n_layers * spec.hidden_size + 2 * spec.vocab_size) as u64 } else { 0 };
    let widest = spec.hidden_size.max(spec.q_width()).max(spec.ffn_size);
    // A tensor as it is computed, as it is handed over, two that wait, one that is written, and its encoded and compressed pages.
    let captured = logit_bytes(spec, work.n_logits).max(4 * n * widest) as u64;
    let captured = if work.captures { CAPTURED_COPIES * captured } else { 0 };
    // Stages that keep no cache write Parquet files.
    let written = if work.n_ctx == 0 { WRITER_BYTES } else { 0 };
    let text = if work.reads_text { TOKENIZER_BYTES * spec.vocab_size as u64 } else { 0 };
    let kept = if is_converted { KEPT_BYTES } else { KEPT_BYTES * 2 / 5 };
    pass + step + captured + written + text + kept + scratch_bytes(spec)
}

/// Returns what products take beside activations: for each thread a panel of decoded rows and what gemm packs of it.
fn scratch_bytes(spec: &ModelSpec) -> u64 {
    let n_threads = rayon::current_num_threads();
    let panel = |[n_out, n_in]: [usize; 2]| (4 * n_out.div_ceil(n_threads) * n_in).min(PANEL_BYTES);
    let panel = spec.linears().into_iter().map(|(_, shape)| panel(shape)).max().unwrap_or(0);
    (2 * n_threads * panel) as u64
}

/// Returns the bytes of a packed matrix, from those of its first rows.
fn packed_bytes(spec: &SchemeSpec, n_out: usize, n_in: usize) -> Result<u64, labpipe_kernels::SchemeError> {
    let (scheme, n_rows) = (schemes::scheme(&spec.scheme)?, N_ROWS.min(n_out));
    let packed = scheme.pack(&scheme.normalize(spec)?, &vec![0.0; n_rows * n_in], n_rows, n_in)?;
    Ok(scheme.stored_bytes(&packed) * n_out as u64 / n_rows.max(1) as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::BurnEngine;
    use crate::event::NullProgress;
    use crate::inference::{Engine, ModelSource};
    use crate::quantization;
    use crate::units::DType;
    use std::path::Path;

    #[test]
    fn what_is_told_before_loading_is_what_loading_takes() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let engine = BurnEngine::cpu();
        for config in [None, Some("nf4"), Some("fp4"), Some("int8"), Some("int4"), Some("mxfp4")] {
            for dtype in [None, Some(DType::F16)] {
                let quantization = config.map(|scheme| {
                    quantization::from_value(&serde_json::json!({"scheme": scheme}), scheme).expect("a config")
                });
                let source = ModelSource::Path(root.join("models/stories260k"));
                let recipe = ModelRecipe { source, dtype, compute_dtype: None, quantization };
                let told = weights_bytes(&engine.inspect(&recipe).expect("a model"), &recipe).expect("a size");
                let taken = engine.open(&recipe, &NullProgress).expect("a model").weights_bytes();
                let difference = (told as f64 - taken as f64).abs() / taken as f64;
                assert!(difference < 0.01, "{config:?} {dtype:?}: {told} told, {taken} taken");
            }
        }
    }
}
