//! What both benchmarks share: the tokens that are fed.

use super::text::first_tokens;
use crate::inference::ModelInfo;
use crate::stage::{Params, StageContext, StageError};
use serde_json::Value;

/// Returns `n` tokens: of the text that the stage names, else random ones from its seed.
///
/// # Errors
/// `Param` where the text is shorter.
pub fn tokens(context: &StageContext<'_>, model: &ModelInfo, n: usize) -> Result<Vec<u32>, StageError> {
    match context.params.get("text").filter(|text| !text.is_null()) {
        None => Ok(random_tokens(seed(context.params), n, model.vocab_size)),
        Some(source) => {
            let tokens = first_tokens(context, source, model, n)?;
            if tokens.len() < n {
                let reason = format!("the text has {} tokens, {n} are asked for", tokens.len());
                return Err(StageError::Param { param: "text".to_owned(), reason });
            }
            Ok(tokens)
        }
    }
}

pub fn seed(params: &Params) -> u64 {
    params.get("seed").and_then(Value::as_u64).unwrap_or(0)
}

/// Draws token ids from 3 on where the vocabulary allows it: the first are usually special.
pub fn random_tokens(seed: u64, n: usize, vocab_size: usize) -> Vec<u32> {
    let first = if vocab_size > 16 { 3u64 } else { 0 };
    let span = (vocab_size as u64).saturating_sub(first).max(1);
    let mut state = seed ^ 0x9e37_79b9_7f4a_7c15;
    (0..n)
        .map(|_| {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let mut z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            u32::try_from(first + (z ^ (z >> 31)) % span).unwrap_or(0)
        })
        .collect()
}

/// Returns an unsigned parameter.
pub fn size(params: &Params, name: &str) -> usize {
    params.get(name).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok()).unwrap_or(0)
}

/// Returns a list parameter.
pub fn sizes(params: &Params, name: &str) -> Vec<usize> {
    let items = params.get(name).and_then(Value::as_array);
    items.into_iter().flatten().filter_map(Value::as_u64).filter_map(|n| usize::try_from(n).ok()).collect()
}

/// Says that a run needs more context than the model has.
pub fn too_long(what: &str, asked: usize, model: &ModelInfo) -> StageError {
    let reason = format!("{what} needs {asked} tokens of context, the model has {}", model.n_ctx_max);
    StageError::Param { param: what.split(' ').next().unwrap_or(what).to_owned(), reason }
}
