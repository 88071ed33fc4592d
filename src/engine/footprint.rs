//! What a model will take on a device, told before any of it is loaded.

use super::attention::QUERY_CHUNK;
use super::score::LOGIT_ROWS;
use super::spec::ModelSpec;
use crate::inference::{InferenceError, ModelInfo, ModelRecipe, Workload};
use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use labpipe_kernels::schemes;

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
    let query_chunk = n.min(QUERY_CHUNK);
    let scores = 4 * spec.n_heads * query_chunk * n_keys;
    let masks = 4 * n * n_keys / 2;
    let attention = size * n * (2 * hidden + 3 * q + 2 * kv) + 2 * scores;
    let mlp = size * n * (2 * hidden + 3 * ffn);
    let rows = n_rows.min(LOGIT_ROWS);
    let logits = size * n * hidden + 2 * 4 * rows * spec.vocab_size;
    (masks + attention.max(mlp).max(logits)) as u64
}

/// Returns the most that a stage's activations take on the host.
pub fn host_work_bytes(spec: &ModelSpec, compute: DType, work: &Workload) -> u64 {
    let pass = pass_bytes(spec, compute, work.n_pass, work.n_pass, work.n_logits);
    let decode =
        if work.n_gen > 0 { 4 * (spec.n_layers * 2 * spec.hidden_size + 2 * spec.vocab_size) as u64 } else { 0 };
    pass + decode
}

/// Returns what products take beside activations: panels of decoded rows and what gemm packs, for each thread.
pub fn host_scratch_bytes(_spec: &ModelSpec) -> u64 {
    0
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
