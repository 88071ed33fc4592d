//! Qwen3: Qwen2's block without biases, its queries and keys normalized head by head.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_MLP_BIAS, WHOLE_HEADS, read};
use super::notes::Rules;
use super::qwen2::{WINDOWS, slide_upper_layers, stated_defaults};
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec, QkNorm};
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family =
    Family { model_type: "qwen3", rules: Rules { own: &[COMMON, DECODER, WINDOWS, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[WHOLE_HEADS, NO_MLP_BIAS, read("attention_bias"), read("hidden_act")];

const NAMES: BaseNames = BaseNames { family: "qwen3", activation: "hidden_act", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    config.refuse_null("head_dim")?;
    let config = config.with_stated_defaults(&stated_defaults()).with_defaults(&[("head_dim", json!(128))]);
    let mut spec = config.base_spec(&NAMES)?;
    let attention_bias = config.flag("attention_bias", false)?;
    spec.block.biases = LinearBiases { o: attention_bias, ..LinearBiases::qkv(attention_bias) };
    spec.block.qk_norm = Some(QkNorm::Heads);
    slide_upper_layers(&config, &mut spec)?;
    Ok(spec)
}
