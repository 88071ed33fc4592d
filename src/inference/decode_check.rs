//! Whether tokens generated one by one are those that whole sequences give: checked before decode is timed.

use super::{InferenceError, Model, argmax};
use crate::units::DType;
use serde::{Deserialize, Serialize};

/// Positions that are checked at most.
pub const CHECKED_POSITIONS: usize = 64;

/// How far decode's logits were from prefill's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DecodeCheck {
    pub n_positions: usize,
    /// max over positions of ‖decode − prefill‖/‖prefill‖ over the vocabulary.
    pub relative_error_max: f64,
    /// What it may be.
    pub budget: f64,
}

/// Returns how far decode's logits may be from prefill's, relative to their norm. The two add in another order, and a GPU's
/// prefill keeps activations in the compute dtype where its decode keeps f32: both grow with depth, so that f16's 2⁻¹¹ and
/// bf16's 2⁻⁸ a rounding may come to some twenty times that. Where activations are quantized to 8 bits (LLM.int8()) a last-bit
/// difference moves a code by one of 127.
pub fn decode_budget(compute_dtype: DType, quantizes_activations: bool) -> f64 {
    let rounding = match compute_dtype {
        DType::F32 => 1e-3,
        DType::F16 => 2e-2,
        DType::Bf16 => 1e-1,
    };
    if quantizes_activations { f64::max(rounding, 3e-2) } else { rounding }
}

/// Generates `n_positions` tokens after `prompt` and compares the logits of each with those of one pass over the whole sequence.
/// The cache then holds what the check left.
///
/// # Errors
/// `DecodeMismatch` where they are further apart than `budget`, or where a generated token is further from
/// prefill's first choice than the two differ; `NotFiniteResult`, and the model's own errors.
pub fn check_decode(
    model: &mut dyn Model,
    prompt: &[u32],
    n_positions: usize,
    budget: f64,
) -> Result<DecodeCheck, InferenceError> {
    let vocab_size = model.info().vocab_size;
    let first = model.prefill(prompt)?.next_token;
    let mut decoded_logits: Vec<f32> = Vec::with_capacity(n_positions * vocab_size);
    let decoded = model.decode_keeping(n_positions, &mut |logits| {
        decoded_logits.extend_from_slice(logits);
        Ok(())
    })?;
    let chosen: Vec<u32> = decoded.iter().map(|token| token.token).collect();
    if chosen.len() != n_positions || decoded_logits.len() != n_positions * vocab_size {
        let reason = format!("{n_positions} tokens were asked for, {} came", chosen.len());
        return Err(InferenceError::DecodeMismatch { reason });
    }
    // The last token predicts nothing here.
    let tokens: Vec<u32> =
        prompt.iter().chain([&first]).chain(&chosen[..n_positions.saturating_sub(1)]).copied().collect();
    let (mut position, mut largest) = (0, 0.0f64);
    model.logits(&tokens, prompt.len()..tokens.len(), &mut |rows| {
        for row in rows.chunks_exact(vocab_size) {
            let decoded = &decoded_logits[position * vocab_size..][..vocab_size];
            let error = compare(row, decoded, chosen[position], position, budget)?;
            (position, largest) = (position + 1, largest.max(error));
        }
        Ok(())
    })?;
    Ok(DecodeCheck { n_positions, relative_error_max: largest, budget })
}

/// Returns the relative error of one position's logits.
fn compare(prefill: &[f32], decode: &[f32], chosen: u32, position: usize, budget: f64) -> Result<f64, InferenceError> {
    let not_finite = |what: &str| InferenceError::NotFiniteResult { what: format!("{what} at position {position}") };
    let first = argmax(prefill).ok_or_else(|| not_finite("prefill's logits"))?;
    argmax(decode).ok_or_else(|| not_finite("decode's logits"))?;
    let (mut difference, mut norm, mut largest) = (0.0f64, 0.0f64, 0.0f64);
    for (a, b) in prefill.iter().zip(decode) {
        let apart = f64::from(*a) - f64::from(*b);
        difference += apart.powi(2);
        norm += f64::from(*a).powi(2);
        largest = largest.max(apart.abs());
    }
    let error = if difference == 0.0 { 0.0 } else { (difference / norm).sqrt() };
    // NaN is refused too: infinite logits have no difference.
    if error.is_nan() || error > budget {
        return Err(InferenceError::DecodeMismatch {
            reason: format!(
                "its logits at position {position} are {error:.2e} of their norm away from prefill's, {budget:.0e} is the budget; \
                 please report this with the model and the device"
            ),
        });
    }
    // A token that decode's logits have first is behind prefill's first by no more than both logits differ.
    let gap = prefill
        .get(chosen as usize)
        .map_or(f64::INFINITY, |logit| f64::from(prefill[first as usize]) - f64::from(*logit));
    if gap > 2.0 * largest {
        let reason =
            format!("at position {position} it chose token {chosen} where prefill's logits have {first} first");
        return Err(InferenceError::DecodeMismatch { reason });
    }
    Ok(error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_is_that_of_the_norm_and_beyond_the_budget_it_is_an_error_that_names_the_position() {
        let error = compare(&[3.0, 4.0], &[3.0, 4.5], 1, 7, 0.2).expect("within the budget");
        assert!((error - 0.1).abs() < 1e-12, "{error}");
        let refused = compare(&[3.0, 4.0], &[3.0, 4.5], 1, 7, 0.01).expect_err("beyond it").to_string();
        assert!(refused.contains("position 7 are 1.00e-1") && refused.contains("1e-2 is the budget"), "{refused}");
    }

    #[test]
    fn a_token_that_prefill_does_not_put_first_is_refused_unless_the_two_differ_by_as_much() {
        assert!(compare(&[3.0, 4.0], &[3.0, 4.0], 0, 0, 0.01).is_err());
        assert!(compare(&[3.99, 4.0], &[4.0, 3.99], 0, 0, 0.01).is_ok());
        assert!(compare(&[3.0, 4.0], &[3.0, 4.0], 9, 0, 0.5).is_err(), "no such token");
    }

    #[test]
    fn nan_is_told_apart_from_a_mismatch() {
        let error = compare(&[1.0, 2.0], &[f32::NAN, 2.0], 1, 3, 0.1).expect_err("not a number");
        assert!(
            matches!(&error, InferenceError::NotFiniteResult { what } if what == "decode's logits at position 3"),
            "{error}"
        );
    }
}
