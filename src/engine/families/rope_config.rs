//! Rotary embeddings as configs spell them: `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5).

use super::ConfigFile;
use crate::engine::rope::{RopeScaling, RopeSpec};
use crate::inference::InferenceError;
use serde_json::Value;

const KNOWN: &str = "default, linear, dynamic, yarn, longrope and llama3";

impl ConfigFile {
    /// Returns the rotary embedding of all layers, or of those with full attention where layers differ.
    pub fn rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        let parameters = self.present("rope_parameters");
        let parameters = parameters.map(|parameters| parameters.get("full_attention").unwrap_or(parameters));
        let theta = match parameters.and_then(|parameters| parameters.get("rope_theta")) {
            Some(value) => self.finite("rope_parameters.rope_theta", value)?,
            None => self.number("rope_theta")?.unwrap_or(10_000.0),
        };
        self.rope_spec(head_dim, theta, parameters.or_else(|| self.present("rope_scaling")))
    }

    /// Returns the rotary embedding of layers whose attention slides, where those have their own.
    pub fn sliding_rope(&self, head_dim: usize, default_theta: f64) -> Result<RopeSpec, InferenceError> {
        let parameters = self.present("rope_parameters").and_then(|parameters| parameters.get("sliding_attention"));
        let theta = match parameters.and_then(|parameters| parameters.get("rope_theta")) {
            Some(value) => self.finite("rope_parameters.sliding_attention.rope_theta", value)?,
            None => self.number("rope_local_base_freq")?.unwrap_or(default_theta),
        };
        self.rope_spec(head_dim, theta, parameters)
    }

    fn rope_spec(&self, head_dim: usize, theta: f64, scaling: Option<&Value>) -> Result<RopeSpec, InferenceError> {
        if theta <= 1.0 {
            return Err(self.error(format!("rope_theta: expected a number above 1, found {theta}")));
        }
        let nested = scaling.and_then(|scaling| scaling.get("partial_rotary_factor"));
        let part = match nested.or_else(|| self.present("partial_rotary_factor")) {
            Some(value) => self.finite("partial_rotary_factor", value)?,
            None => 1.0,
        };
        if !(0.0..=1.0).contains(&part) {
            return Err(self.error(format!("partial_rotary_factor: expected a number from 0 to 1, found {part}")));
        }
        let rotary_dim = (head_dim as f64 * part) as usize;
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(self.error(format!(
                "{rotary_dim} of head_dim {head_dim} are rotated; rotary embeddings need an even number above 0"
            )));
        }
        let scaling = match scaling {
            None => RopeScaling::None,
            Some(scaling) => RopeFields { config: self, fields: scaling }.scaling(rotary_dim)?,
        };
        Ok(RopeSpec { theta, rotary_dim, scaling })
    }
}

/// The mapping that describes the scaling.
struct RopeFields<'a> {
    config: &'a ConfigFile,
    fields: &'a Value,
}

impl RopeFields<'_> {
    fn kind(&self) -> &str {
        let kind = self.fields.get("rope_type").or_else(|| self.fields.get("type"));
        kind.and_then(Value::as_str).unwrap_or("default")
    }

    fn scaling(&self, rotary_dim: usize) -> Result<RopeScaling, InferenceError> {
        match self.kind() {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.required("factor")? }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: self.required("factor")?,
                original_max_position: self.stated_context()?,
            }),
            "yarn" => self.yarn(),
            // `su` is what the first Phi-3 configs call it.
            "longrope" | "su" => self.long_rope(rotary_dim),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_max_position: self.original_context()?,
            }),
            other => Err(self.config.error(format!("rope scaling {other:?} is not supported; labpipe knows {KNOWN}"))),
        }
    }

    fn yarn(&self) -> Result<RopeScaling, InferenceError> {
        let original_max_position = self.original_context()?;
        let factor = match self.number("factor")? {
            Some(factor) => factor,
            None => self.stated_context()? / original_max_position,
        };
        let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let attention_factor =
            match (self.number("attention_factor")?, self.number("mscale")?, self.number("mscale_all_dim")?) {
                (Some(attention_factor), ..) => attention_factor,
                (None, Some(all), Some(all_dim)) if all != 0.0 && all_dim != 0.0 => mscale(all) / mscale(all_dim),
                _ => mscale(1.0),
            };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast: self.number("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("beta_slow")?.unwrap_or(1.0),
            attention_factor,
            truncate: self.fields.get("truncate").and_then(Value::as_bool).unwrap_or(true),
        })
    }

    fn long_rope(&self, rotary_dim: usize) -> Result<RopeScaling, InferenceError> {
        let original_max_position = self.original_context()?;
        let factor = match self.number("factor")? {
            Some(factor) => factor,
            None => self.stated_context()? / original_max_position,
        };
        let attention_factor = match self.number("attention_factor")? {
            Some(attention_factor) => attention_factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original_max_position.ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short_factor: self.divisors("short_factor", rotary_dim / 2)?,
            long_factor: self.divisors("long_factor", rotary_dim / 2)?,
            original_max_position,
            attention_factor,
        })
    }

    fn divisors(&self, name: &str, n: usize) -> Result<Vec<f64>, InferenceError> {
        let list = self.fields.get(name).and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
        if list.len() != n {
            return Err(self.error(&format!("{name}: expected {n} numbers, found {}", list.len())));
        }
        list.iter().map(|value| self.positive(name, value)).collect()
    }

    /// Returns the context before scaling: beside the scaling (Phi-3), in it, or else `max_position_embeddings`.
    fn original_context(&self) -> Result<f64, InferenceError> {
        let name = "original_max_position_embeddings";
        match self.config.present(name) {
            Some(value) => self.positive(name, value),
            None => self.number(name)?.map_or_else(|| self.stated_context(), Ok),
        }
    }

    fn stated_context(&self) -> Result<f64, InferenceError> {
        let name = "max_position_embeddings";
        let size = self.config.size(name)?.ok_or_else(|| self.error(&format!("{name} is missing")))?;
        Ok(size as f64)
    }

    fn required(&self, name: &str) -> Result<f64, InferenceError> {
        self.number(name)?.ok_or_else(|| self.error(&format!("{name} is missing")))
    }

    fn number(&self, name: &str) -> Result<Option<f64>, InferenceError> {
        self.fields.get(name).filter(|value| !value.is_null()).map(|value| self.positive(name, value)).transpose()
    }

    fn positive(&self, name: &str, value: &Value) -> Result<f64, InferenceError> {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| self.error(&format!("{name}: expected a number above 0, found {value}")))
    }

    fn error(&self, reason: &str) -> InferenceError {
        self.config.error(format!("rope scaling {}: {reason}", self.kind()))
    }
}
