//! Rotary embeddings as GGUF files describe them.
//!
//! llama.cpp divides every frequency by `rope.scaling.factor` unless the type is `none` (a file without a type is `linear`), divides it
//! again by the file's own divisors where it has some, and multiplies cosines and sines by `rope.scaling.attn_factor`.

use super::config::DEFAULT_THETA;
use super::metadata::as_written;
use super::tensors::GgufCheckpoint;
use crate::engine::checkpoint::to_f32;
use crate::engine::rope::{RopeScaling, RopeSpec};
use crate::inference::InferenceError;

/// Divides the rotary frequencies one by one: how files hold Llama 3.1's scaling.
pub(super) const DIVISORS: &str = "rope_freqs.weight";
/// The same up to the original context, and beyond it: LongRoPE.
pub(super) const SHORT_DIVISORS: &str = "rope_factors_short.weight";
pub(super) const LONG_DIVISORS: &str = "rope_factors_long.weight";

const FACTOR: &str = "rope.scaling.factor";
/// What files of 2023 call it.
const OLD_FACTOR: &str = "rope.scale_linear";
const TYPE: &str = "rope.scaling.type";
pub(super) const ATTN_FACTOR: &str = "rope.scaling.attn_factor";

/// Values of `rope.scaling.type`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Linear,
    Yarn,
    LongRope,
}

/// What LongRoPE divides frequencies by, up to the original context and beyond it, `[rotary_dim / 2]` each.
struct LongRopeDivisors {
    short: Vec<f64>,
    long: Vec<f64>,
}

impl GgufCheckpoint {
    /// Returns the rotary embedding of layers that see the whole context, and of all where layers are alike.
    ///
    /// # Errors
    /// `File` where a key is of the wrong type or value, `Tensor` where divisors are.
    pub(super) fn rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        let theta = as_written(self.number("rope.freq_base")?.unwrap_or(DEFAULT_THETA));
        let rotary_dim = self.rotary_dim(head_dim)?;
        let kind = self.scaling_kind()?;
        let factor = self.factor(kind)?;
        let attn_factor = self.positive(ATTN_FACTOR)?.unwrap_or(1.0);
        let plain = |scaling| RopeSpec { theta, rotary_dim, scaling };
        if let Some(LongRopeDivisors { short, long }) = self.long_rope_divisors(kind, rotary_dim)? {
            if kind == Kind::Yarn {
                return Err(self.wrong(TYPE, format!("yarn beside {LONG_DIVISORS} is not supported")));
            }
            let times_factor = |divisors: Vec<f64>| divisors.into_iter().map(|divisor| divisor * factor).collect();
            return Ok(plain(RopeScaling::LongRope {
                short_factor: times_factor(short),
                long_factor: times_factor(long),
                original_max_position: self.original_context()?,
                attention_factor: attn_factor,
            }));
        }
        let base = match kind {
            Kind::Yarn => self.yarn(factor)?,
            _ if factor != 1.0 => RopeScaling::Linear { factor },
            _ => RopeScaling::None,
        };
        let divisors = self.divisors(DIVISORS, rotary_dim / 2)?;
        if divisors.is_none() && attn_factor == 1.0 {
            return Ok(plain(base));
        }
        let base = plain(base);
        let scaled = base.inverse_frequencies(1);
        let by = plain(RopeScaling::None)
            .inverse_frequencies(1)
            .iter()
            .zip(&scaled)
            .enumerate()
            .map(|(i, (plain, scaled))| plain / scaled * divisors.as_ref().map_or(1.0, |divisors| divisors[i]))
            .collect();
        let attention_factor = base.attention_factor() * attn_factor;
        Ok(plain(RopeScaling::Divided { by, attention_factor }))
    }

    /// Returns the rotary embedding of layers whose attention slides.
    ///
    /// # Errors
    /// As [`rope`](Self::rope).
    pub(super) fn sliding_rope(&self, full: &RopeSpec) -> Result<RopeSpec, InferenceError> {
        let key = "rope.freq_base_swa";
        let stated = self.positive(key)?.map(as_written);
        match self.architecture.sliding_theta {
            Some(theta) => {
                let theta = stated.unwrap_or(theta);
                Ok(RopeSpec { theta, rotary_dim: full.rotary_dim, scaling: RopeScaling::None })
            }
            None => match stated {
                Some(theta) if theta != full.theta => {
                    if matches!(full.scaling, RopeScaling::Divided { .. } | RopeScaling::Yarn { .. }) {
                        return Err(self.wrong(key, "another base beside this scaling is not supported"));
                    }
                    Ok(RopeSpec { theta, ..full.clone() })
                }
                _ => Ok(full.clone()),
            },
        }
    }

    /// Returns the context that the file allows: `context_length`, stretched by linear scaling and by YaRN, as for a config.json.
    ///
    /// # Errors
    /// As [`rope`](Self::rope).
    pub(super) fn n_ctx_max(&self, rope: &RopeSpec) -> Result<usize, InferenceError> {
        let stated = self.required("context_length")?;
        if self.architecture.sliding_theta.is_some() {
            return Ok(stated);
        }
        let kind = self.scaling_kind()?;
        let factor = self.factor(kind)?;
        let stretched = match kind {
            Kind::Yarn => factor * self.original_context()?,
            Kind::Linear if !matches!(rope.scaling, RopeScaling::LongRope { .. }) => factor * stated as f64,
            _ => stated as f64,
        };
        Ok((stretched.min(f64::from(1 << 24)) as usize).max(stated))
    }

    fn rotary_dim(&self, head_dim: usize) -> Result<usize, InferenceError> {
        let key = "rope.dimension_count";
        let rotary_dim = match self.whole(key)? {
            None => head_dim,
            Some(n) => n,
        };
        if rotary_dim == 0 || rotary_dim % 2 != 0 || rotary_dim > head_dim {
            let reason = format!("expected an even number from 2 to {head_dim}, found {rotary_dim}");
            return Err(self.wrong(key, reason));
        }
        if self.architecture.has_interleaved_rope && rotary_dim != head_dim {
            let reason = format!("{rotary_dim} of {head_dim} dimensions are rotated; only whole heads are supported");
            return Err(self.wrong(key, reason));
        }
        let sliding = "rope.dimension_count_swa";
        match self.whole(sliding)? {
            Some(n) if n != rotary_dim => Err(self.wrong(
                sliding,
                format!("it is {n} where rope.dimension_count is {rotary_dim}; layers that differ are not supported"),
            )),
            _ => Ok(rotary_dim),
        }
    }

    fn scaling_kind(&self) -> Result<Kind, InferenceError> {
        match self.text(TYPE)? {
            Some("none") => Ok(Kind::None),
            None | Some("linear") => Ok(Kind::Linear),
            Some("yarn") => Ok(Kind::Yarn),
            Some("longrope") => Ok(Kind::LongRope),
            Some(other) => {
                Err(self.wrong(TYPE, format!("{other:?} is not known; none, linear, yarn and longrope are")))
            }
        }
    }

    /// Returns what frequencies are divided by; 0 stands for 1.
    fn factor(&self, kind: Kind) -> Result<f64, InferenceError> {
        let (name, factor) = match self.number(FACTOR)? {
            Some(factor) => (FACTOR, Some(factor)),
            None => (OLD_FACTOR, self.number(OLD_FACTOR)?),
        };
        match factor {
            Some(factor) if factor < 0.0 => Err(self.wrong(name, format!("expected a number above 0, found {factor}"))),
            _ if kind == Kind::None => Ok(1.0),
            None | Some(0.0) => Ok(1.0),
            Some(factor) => Ok(as_written(factor)),
        }
    }

    /// Returns the context before scaling.
    pub(super) fn original_context(&self) -> Result<f64, InferenceError> {
        let original = self.whole("rope.scaling.original_context_length")?.filter(|n| *n > 0);
        let n = original.map_or_else(|| self.required("context_length"), Ok)?;
        Ok(n as f64)
    }

    /// Converters write config.json's `attention_factor`, `beta_fast` and `beta_slow` where it has them.
    fn yarn(&self, factor: f64) -> Result<RopeScaling, InferenceError> {
        let stated = self.positive("rope.scaling.yarn_attn_factor")?;
        let default = if factor <= 1.0 { 1.0 } else { 0.1 * factor.ln() + 1.0 };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position: self.original_context()?,
            beta_fast: self.positive("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.positive("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            attention_factor: stated.unwrap_or(default),
            truncate: true,
        })
    }

    fn long_rope_divisors(&self, kind: Kind, rotary_dim: usize) -> Result<Option<LongRopeDivisors>, InferenceError> {
        let short = self.divisors(SHORT_DIVISORS, rotary_dim / 2)?;
        let long = self.divisors(LONG_DIVISORS, rotary_dim / 2)?;
        match (short, long) {
            (Some(short), Some(long)) if self.file.tensor(DIVISORS).is_none() => {
                Ok(Some(LongRopeDivisors { short, long }))
            }
            (Some(_), Some(_)) => Err(self.wrong(TYPE, format!("{DIVISORS} beside {LONG_DIVISORS} is not supported"))),
            (None, None) if kind != Kind::LongRope => Ok(None),
            _ => Err(self.wrong(TYPE, format!("longrope needs the tensors {SHORT_DIVISORS} and {LONG_DIVISORS}"))),
        }
    }

    /// Returns what each rotary frequency is divided by, where the file has that tensor.
    fn divisors(&self, name: &str, n: usize) -> Result<Option<Vec<f64>>, InferenceError> {
        let Some(tensor) = self.file.tensor(name) else { return Ok(None) };
        let stored = self.stored(name, tensor, &[n], None)?;
        let values = to_f32(stored.dtype, stored.bytes.as_slice());
        match values.iter().find(|value| !value.is_finite() || **value <= 0.0) {
            None => Ok(Some(values.into_iter().map(f64::from).collect())),
            Some(value) => Err(self.tensor_error(name, "positive numbers".to_owned(), value.to_string())),
        }
    }
}
