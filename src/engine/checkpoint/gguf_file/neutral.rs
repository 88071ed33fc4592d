//! Keys that would change the numbers in a way that labpipe does not compute: each must hold the value that changes nothing.

use super::tensors::GgufCheckpoint;
use crate::engine::spec::ModelSpec;
use crate::gguf::MetaValue;
use crate::inference::InferenceError;

/// A key and the values that change nothing, with what any other value asks for.
struct Neutral {
    name: &'static str,
    values: &'static [f64],
    asks_for: &'static str,
}

const fn neutral(name: &'static str, values: &'static [f64], asks_for: &'static str) -> Neutral {
    Neutral { name, values, asks_for }
}

static NEUTRAL: &[Neutral] = &[
    neutral("expert_count", &[0.0], "a mixture of experts"),
    neutral("nextn_predict_layers", &[0.0], "layers that predict further tokens"),
    neutral("logit_scale", &[0.0, 1.0], "scaled logits"),
    neutral("residual_scale", &[0.0, 1.0], "a scaled residual stream"),
    neutral("embedding_scale", &[0.0, 1.0], "scaled embeddings"),
    neutral("attention.clamp_kqv", &[0.0], "clamped queries, keys and values"),
    neutral("attention.max_alibi_bias", &[0.0], "ALiBi"),
    neutral("attention.temperature_length", &[0.0], "a temperature of attention"),
    neutral("attention.temperature_scale", &[0.0], "a temperature of attention"),
    neutral("attention.shared_kv_layers", &[0.0], "layers that share keys and values"),
    neutral("attention.q_lora_rank", &[0.0], "low-rank queries"),
    neutral("attention.kv_lora_rank", &[0.0], "low-rank keys and values"),
    neutral("rope.scaling.alpha", &[0.0, 1.0], "NTK-aware scaling"),
    neutral("rope.scaling.yarn_log_multiplier", &[0.0], "YaRN with another attention factor"),
    neutral("rope.scaling.yarn_ext_factor", &[1.0, -1.0], "YaRN with another ramp"),
    neutral("use_parallel_residual", &[0.0], "attention and MLP side by side"),
];

/// Caps that some architectures have and others do not.
const CAPS: [&str; 2] = ["attn_logit_softcapping", "final_logit_softcapping"];

impl GgufCheckpoint {
    /// Checks every key of the architecture that must hold a value that changes nothing.
    ///
    /// # Errors
    /// `File`, naming the key and what it asks for.
    pub(super) fn check_neutral(&self, spec: &ModelSpec) -> Result<(), InferenceError> {
        let is_yarn = self.text("rope.scaling.type")? == Some("yarn");
        for one in NEUTRAL.iter().filter(|one| is_yarn || !one.name.starts_with("rope.scaling.yarn_")) {
            self.check_value(one.name, one.values, one.asks_for)?;
        }
        let caps = [self.architecture.attn_softcap, self.architecture.logit_softcap];
        for (name, _) in CAPS.iter().zip(caps).filter(|(_, cap)| cap.is_none()) {
            self.check_value(name, &[0.0], "a soft cap, which the architecture does not have")?;
        }
        match self.value("attention.causal") {
            None | Some(MetaValue::Bool(true)) => {}
            Some(MetaValue::Bool(false)) => {
                return Err(self.wrong("attention.causal", "it is false: labpipe runs causal models only"));
            }
            Some(_) => return Err(self.wrong("attention.causal", "expected true or false")),
        }
        self.check_scales()?;
        let scale = self.number("attention.scale")?.filter(|scale| *scale != 0.0);
        match scale {
            Some(scale) if (scale / spec.block.attn_scale - 1.0).abs() > 1e-5 => {
                let reason = format!(
                    "it is {scale}; labpipe computes with {:.6}, as llama.cpp does for this architecture",
                    spec.block.attn_scale
                );
                Err(self.wrong("attention.scale", reason))
            }
            _ => Ok(()),
        }
    }

    /// llama.cpp multiplies a projection's product by such a tensor.
    fn check_scales(&self) -> Result<(), InferenceError> {
        let is_scale = |name: &str| name.ends_with(".scale") || name.ends_with(".input_scale");
        match self.file.tensors().find(|(name, _)| name.starts_with("blk.") && is_scale(name)) {
            None => Ok(()),
            Some((name, _)) => {
                let expected = "no scale beside a weight, which is not supported".to_owned();
                Err(self.tensor_error(name, expected, "one".to_owned()))
            }
        }
    }

    fn check_value(&self, name: &str, neutral: &[f64], asks_for: &str) -> Result<(), InferenceError> {
        let value = match self.value(name) {
            None => return Ok(()),
            Some(MetaValue::Bool(flag)) => Some(f64::from(u8::from(*flag))),
            Some(value) => value.as_f64(),
        };
        match value {
            Some(value) if neutral.contains(&value) => Ok(()),
            Some(value) => Err(self.wrong(name, format!("it is {value}: {asks_for} is not supported"))),
            None => Err(self.wrong(name, "expected a number")),
        }
    }

    /// Returns true for a key that [`check_neutral`](Self::check_neutral) has looked at.
    pub(super) fn is_neutral(&self, name: &str) -> bool {
        NEUTRAL.iter().any(|one| one.name == name)
            || CAPS.contains(&name)
            || ["attention.causal", "attention.scale"].contains(&name)
    }
}
