//! What a model will take on a device, told before any of it is loaded.

use crate::inference::{InferenceError, ModelInfo, ModelRecipe};
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
