//! OLMo 2: Llama's block with norms after attention and MLP instead of before them, and with one RMSNorm over all queries of a token and
//! one over all keys.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_MLP_BIAS, NO_WINDOWS, WHOLE_HEADS, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec, QkNorm};
use crate::inference::InferenceError;
use serde_json::json;

pub const FAMILY: Family =
    Family { model_type: "olmo2", rules: Rules { own: &[COMMON, DECODER, NO_WINDOWS, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[WHOLE_HEADS, NO_MLP_BIAS, read("attention_bias"), read("hidden_act")];

const NAMES: BaseNames = BaseNames { family: "olmo2", activation: "hidden_act", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config
        .with_stated_defaults(&[("max_position_embeddings", json!(2048))])
        .with_defaults(&[("rms_norm_eps", json!(1e-5))]);
    let mut spec = config.base_spec(&NAMES)?;
    config.note_full_layers();
    let attention_bias = config.flag("attention_bias", false)?;
    spec.block.biases = LinearBiases { o: attention_bias, ..LinearBiases::qkv(attention_bias) };
    spec.block.in_norms = false;
    spec.block.out_norms = true;
    spec.block.qk_norm = Some(QkNorm::Projections);
    Ok(spec)
}
