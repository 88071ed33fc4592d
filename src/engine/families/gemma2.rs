//! Gemma 2: norms before and behind attention and MLP, GeGLU, soft caps on scores and logits, and a sliding window in every other
//! layer.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, NO_MLP_BIAS, WHOLE_HEADS, read};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::{LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use serde_json::{Value, json};

pub const FAMILY: Family =
    Family { model_type: "gemma2", rules: Rules { own: &[COMMON, DECODER, GEMMA, FIELDS], section: &[] }, spec };

/// What Gemma 2 and 3 read.
pub const GEMMA: &[FieldRule] = &[
    WHOLE_HEADS,
    NO_MLP_BIAS,
    read("attention_bias"),
    read("final_logit_softcapping"),
    // Its place in other families' configs; compared with `hidden_activation`.
    read("hidden_act"),
    read("hidden_activation"),
    read("layer_types"),
    read("query_pre_attn_scalar"),
    read("sliding_window"),
    read("use_bidirectional_attention"),
];

const FIELDS: &[FieldRule] = &[read("attn_logit_softcapping")];

const NAMES: BaseNames = BaseNames { family: "gemma2", activation: "hidden_activation", rope: ConfigFile::rope };

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut defaults = shared_defaults();
    defaults.extend([
        ("vocab_size", json!(256_000)),
        ("max_position_embeddings", json!(8192)),
        ("attn_logit_softcapping", json!(50.0)),
        ("final_logit_softcapping", json!(30.0)),
    ]);
    let config = config.with_defaults(&defaults);
    let mut spec = gemma_spec(&config, &NAMES)?;
    spec.block.attn_softcap = config.softcap("attn_logit_softcapping")?;
    let sliding = config.sliding_layers(spec.n_layers, |layer_idx| layer_idx % 2 == 0)?;
    let rope = spec.attentions[0].rope.clone();
    spec.set_sliding(&sliding, config.window(&sliding)?, rope);
    Ok(spec)
}

/// Returns what Gemma 2 and 3 take for fields that a config leaves out.
pub fn shared_defaults() -> Vec<(&'static str, Value)> {
    vec![
        ("hidden_size", json!(2304)),
        ("intermediate_size", json!(9216)),
        ("num_hidden_layers", json!(26)),
        ("num_attention_heads", json!(8)),
        ("num_key_value_heads", json!(4)),
        ("head_dim", json!(256)),
        ("hidden_activation", json!("gelu_pytorch_tanh")),
        ("query_pre_attn_scalar", json!(256)),
        ("sliding_window", json!(4096)),
        ("tie_word_embeddings", json!(true)),
    ]
}

/// Builds what Gemma 2 and 3 share.
pub fn gemma_spec(config: &ConfigFile, names: &BaseNames) -> Result<ModelSpec, InferenceError> {
    let both_ways = "use_bidirectional_attention";
    if config.present(both_ways).is_some() && config.flag(both_ways, false)? {
        return Err(config.error("use_bidirectional_attention is true: labpipe runs causal models only"));
    }
    for field in ["head_dim", "num_key_value_heads"] {
        config.refuse_null(field)?;
    }
    let mut spec = config.base_spec(names)?;
    let other = config.peek("hidden_act").filter(|other| !other.is_null());
    if let (Some(other), Some(own)) = (other, config.peek("hidden_activation")) {
        config.overrule(&config.path_of("hidden_act"), other, &config.path_of("hidden_activation"), own);
    }
    spec.embedding_scale = (spec.hidden_size as f64).sqrt();
    spec.logit_softcap = config.softcap("final_logit_softcapping")?;
    let attention_bias = config.flag("attention_bias", false)?;
    spec.block.biases = LinearBiases { o: attention_bias, ..LinearBiases::qkv(attention_bias) };
    spec.block.norm_unit_offset = true;
    spec.block.out_norms = true;
    if let Some(scalar) = config.number("query_pre_attn_scalar")? {
        if scalar <= 0.0 {
            return Err(config.error(format!("query_pre_attn_scalar: expected a number above 0, found {scalar}")));
        }
        spec.block.attn_scale = 1.0 / scalar.sqrt();
    }
    Ok(spec)
}
