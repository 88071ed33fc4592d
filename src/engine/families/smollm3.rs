//! SmolLM3: Llama's block without rotary embedding in some layers, every fourth unless the config says otherwise. Those layers may have
//! a sliding window.

use super::decoder::BaseNames;
use super::fields::{COMMON, DECODER, FieldRule, WHOLE_HEADS, harmless, read};
use super::notes::{Mark, Rules};
use super::{ConfigFile, Family};
use crate::engine::rope::RopeSpec;
use crate::engine::spec::{AttentionSpec, LinearBiases, ModelSpec};
use crate::inference::InferenceError;
use serde_json::{Value, json};

pub const FAMILY: Family =
    Family { model_type: "smollm3", rules: Rules { own: &[COMMON, DECODER, FIELDS], section: &[] }, spec };

const FIELDS: &[FieldRule] = &[
    WHOLE_HEADS,
    // In configs on the hub, and read by nothing.
    harmless("max_window_layers"),
    read("attention_bias"),
    read("hidden_act"),
    read("layer_types"),
    read("mlp_bias"),
    read("no_rope_layer_interval"),
    read("no_rope_layers"),
    read("sliding_window"),
    read("use_sliding_window"),
];

const NAMES: BaseNames = BaseNames { family: "smollm3", activation: "hidden_act", rope };

fn rope(config: &ConfigFile, head_dim: usize) -> Result<RopeSpec, InferenceError> {
    config.rope_with_theta(head_dim, 2_000_000.0)
}

fn spec(config: &ConfigFile) -> Result<ModelSpec, InferenceError> {
    let config = config
        .with_stated_defaults(&[("max_position_embeddings", json!(32_768)), ("num_key_value_heads", json!(4))])
        .with_defaults(&[("tie_word_embeddings", json!(true))]);
    let mut spec = config.base_spec(&NAMES)?;
    let attention_bias = config.flag("attention_bias", false)?;
    let mlp = config.flag("mlp_bias", false)?;
    spec.block.biases =
        LinearBiases { o: attention_bias, gate: mlp, up: mlp, down: mlp, ..LinearBiases::qkv(attention_bias) };
    let rotated = rotated_layers(&config, spec.n_layers)?;
    let sliding = sliding_layers(&config, &rotated)?;
    let window = if sliding.contains(&true) { config.window(&sliding)? } else { None };
    let rope = spec.attentions[0].rope.take();
    let layers = rotated.iter().zip(&sliding).map(|(is_rotated, is_sliding)| AttentionSpec {
        window: window.filter(|_| *is_sliding),
        rope: rope.clone().filter(|_| *is_rotated),
    });
    spec.set_attentions(layers.collect());
    Ok(spec)
}

/// Returns for each layer whether it has a rotary embedding: where `no_rope_layers` is not 0, or in all layers but every n-th by
/// `no_rope_layer_interval`.
fn rotated_layers(config: &ConfigFile, n_layers: usize) -> Result<Vec<bool>, InferenceError> {
    let (list, interval) = ("no_rope_layers", "no_rope_layer_interval");
    config.refuse_null(interval)?;
    let by_interval = |period: usize| (1..=n_layers).map(|n| !n.is_multiple_of(period)).collect::<Vec<bool>>();
    let Some(flags) = config.present(list) else {
        return Ok(by_interval(config.size(interval)?.unwrap_or(4)));
    };
    let is_rotated = |flag: &Value| flag.as_i64().map(|flag| flag != 0);
    let rotated: Vec<bool> = flags
        .as_array()
        .and_then(|flags| flags.iter().map(is_rotated).collect())
        .ok_or_else(|| config.wrong_type(list, "a list of 0 and 1", flags))?;
    if rotated.len() < n_layers {
        let path = config.path_of(list);
        return Err(config.error(format!("{path} has {} entries for {n_layers} layers", rotated.len())));
    }
    let rotated = rotated[..n_layers].to_vec();
    if let Some(lost) = config.peek(interval) {
        let path = config.path_of(interval);
        let says_the_same = lost.as_u64().is_some_and(|n| n > 0 && by_interval(n as usize) == rotated);
        if says_the_same {
            config.mark(&path, Mark::Harmless);
        } else {
            config.overrule(&path, lost, &config.path_of(list), flags);
        }
    }
    Ok(rotated)
}

/// Returns for each layer whether its attention slides: by `layer_types`, or else the layers without rotary embedding if
/// `use_sliding_window` is true.
fn sliding_layers(config: &ConfigFile, rotated: &[bool]) -> Result<Vec<bool>, InferenceError> {
    let is_used = config.flag("use_sliding_window", false)?;
    let has_window = is_used && config.size("sliding_window")?.is_some();
    let by_flag: Vec<bool> = rotated.iter().map(|is_rotated| has_window && !is_rotated).collect();
    let sliding = config.sliding_layers(rotated.len(), |layer_idx| by_flag[layer_idx])?;
    let types = config.peek("layer_types").filter(|types| !types.is_null());
    if let (Some(types), Some(flag)) = (types, config.peek("use_sliding_window"))
        && sliding.contains(&true) != is_used
    {
        config.overrule(&config.path_of("use_sliding_window"), flag, &config.path_of("layer_types"), types);
    }
    Ok(sliding)
}
