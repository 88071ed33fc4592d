//! Gemma 3, the part that reads text: Gemma 2's block with normalized queries and keys in place of the soft cap on scores; five layers of six slide, with
//! rotary frequencies of their own.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, harmless, harmless_as, read};
use super::gemma2::{GEMMA, gemma_spec, shared_defaults};
use super::notes::Rules;
use super::{ConfigFile, Family};
use crate::engine::spec::{ModelSpec, QkNorm};
use crate::inference::InferenceError;
use serde_json::{Value, json};

const TEXT: &[&[FieldRule]] = &[COMMON, DECODER, GEMMA, FIELDS];

pub const FAMILY: Family =
    Family { model_type: "gemma3_text", rules: Rules { own: TEXT, section: &[] }, spec: text_spec };

/// Models that see images too (4B and larger): the text model is a part of them, and labpipe runs that part.
pub const WITH_VISION: Family = Family {
    model_type: "gemma3",
    rules: Rules { own: &[COMMON, WITH_VISION_FIELDS], section: TEXT },
    spec: inner_spec,
};

const FIELDS: &[FieldRule] = &[
    // transformers' class has it and does not apply it.
    harmless_as("attn_logit_softcapping", &[]),
    // Written beside the layers' types that were made from it.
    harmless("_sliding_window_pattern"),
    read("rope_local_base_freq"),
    read("sliding_window_pattern"),
];

const WITH_VISION_FIELDS: &[FieldRule] = &[
    read("dtype"),
    read("model_type"),
    read("quantization_config"),
    read("text_config"),
    read("tie_word_embeddings"),
    read("torch_dtype"),
    // Fields of the text model count in `text_config` alone.
    harmless_as("head_dim", &[]),
    harmless_as("hidden_size", &[]),
    harmless_as("layer_types", &[]),
    harmless_as("original_max_position_embeddings", &[]),
    harmless_as("partial_rotary_factor", &[]),
    harmless_as("rope_parameters", &[]),
    harmless_as("rope_scaling", &[]),
    harmless_as("rope_theta", &[]),
    harmless_as("sliding_window", &[]),
    harmless_as("vocab_size", &[]),
    harmless("boi_token_index"),
    harmless("bos_token_id"),
    harmless("eoi_token_index"),
    harmless("image_token_index"),
    harmless("mm_tokens_per_image"),
    harmless("vision_config"),
];

const NAMES: BaseNames =
    BaseNames { family: "gemma3", activation: "hidden_activation", rope: ConfigFile::full_attention_rope };

fn text_spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let mut defaults = shared_defaults();
    defaults.extend([("vocab_size", json!(262_208)), ("max_position_embeddings", json!(131_072))]);
    let config = config.with_defaults(&defaults);
    let mut spec = gemma_spec(&config, &NAMES)?;
    // `max_position_embeddings` is already what the linear scaling allows.
    spec.n_ctx_max = config.size("max_position_embeddings")?.unwrap_or(spec.n_ctx_max);
    spec.block.qk_norm = Some(QkNorm::Heads);
    config.refuse_null("sliding_window_pattern")?;
    let pattern = config.size("sliding_window_pattern")?.unwrap_or(6);
    let sliding = config.sliding_layers(spec.n_layers, |layer_idx| !(layer_idx + 1).is_multiple_of(pattern))?;
    let rope = config.sliding_attention_rope(spec.head_dim)?;
    spec.set_sliding(&sliding, config.window(&sliding)?, Some(rope));
    Ok(spec)
}

/// Builds the spec of the text model inside a larger one, whose class decides about the output head.
fn inner_spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let text = config.section("text_config")?;
    text.check_supported(TEXT)?;
    let mut spec = text_spec(&text)?;
    let tied = match config.get("tie_word_embeddings") {
        Some(Value::Null) => false,
        _ => config.flag("tie_word_embeddings", true)?,
    };
    if tied != spec.tied_embeddings {
        let inner = text.path_of("tie_word_embeddings");
        config.overrule(&inner, &json!(spec.tied_embeddings), "tie_word_embeddings", &json!(tied));
        spec.tied_embeddings = tied;
    }
    if let Some(cap) = spec.logit_softcap.take() {
        let class = "the class with vision";
        config.overrule(&text.path_of("final_logit_softcapping"), &json!(cap), class, &json!("no cap"));
    }
    Ok(spec)
}
