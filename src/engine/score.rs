//! Log-likelihoods and divergences from logits: this engine's rows come to the host some at a time, and the port's own
//! arithmetic (`inference::score_logits`, `inference::diverge_logits`) does the rest.

use super::forward::Executor;
use super::tap::Tap;
use crate::inference::{InferenceError, TakeLogits};
use burn::tensor::{DType as BurnDType, Tensor};
use std::ops::Range;

/// Rows of logits that are on the host at once: bounds them to 64 · vocab_size values.
pub const LOGIT_ROWS: usize = 64;

/// Runs `tokens` and hands the logits of the positions `rows` to `take`, [`LOGIT_ROWS`] at a time.
///
/// # Errors
/// What the pass or `take` returns.
pub fn logits_in_chunks(
    executor: &Executor,
    tokens: &[u32],
    rows: Range<usize>,
    take: &mut TakeLogits<'_>,
) -> Result<(), InferenceError> {
    let hidden = executor.hidden_states(tokens, None, &mut Tap::closed())?;
    let [_, width] = hidden.dims();
    for first in rows.clone().step_by(LOGIT_ROWS) {
        let chunk = hidden.clone().slice([first..(first + LOGIT_ROWS).min(rows.end), 0..width]);
        take(&values(executor.logits(chunk))?)?;
    }
    Ok(())
}

/// Returns a tensor's values in f32 on the host.
///
/// # Errors
/// `NotFiniteResult` where they can't be read.
pub fn values(tensor: Tensor<2>) -> Result<Vec<f32>, InferenceError> {
    tensor
        .into_data_dtype(BurnDType::F32)
        .try_into_vec::<f32>()
        .map_err(|error| InferenceError::NotFiniteResult { what: format!("logits ({error:?})") })
}
