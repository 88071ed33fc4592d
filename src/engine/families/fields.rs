//! Which fields of a `config.json` a family reads, which are known to change nothing, and which would change what transformers
//! computes in a way that labpipe does not. `scripts/fixtures/compare_config_fields.py` compares the lists with transformers.

use serde_json::Value;

/// What a field means to labpipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FieldRole {
    /// It decides what is computed.
    Read,
    /// It changes nothing that labpipe computes, whatever its value.
    Harmless,
    /// It changes nothing with one of these values, written as JSON; with another one it is named in the warning.
    HarmlessAs(&'static [&'static str]),
    /// transformers computes something else unless it has one of these values; another one is an error.
    Only(&'static [&'static str]),
}

/// A field of a `config.json` and what it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FieldRule {
    pub name: &'static str,
    pub role: FieldRole,
}

impl FieldRule {
    /// Returns true if the value is one of those that change nothing. Null is always one.
    pub fn is_without_effect(&self, value: &Value) -> bool {
        match self.role {
            FieldRole::Read => false,
            FieldRole::Harmless => true,
            FieldRole::HarmlessAs(values) | FieldRole::Only(values) => {
                value.is_null() || values.contains(&value.to_string().as_str())
            }
        }
    }
}

pub const fn read(name: &'static str) -> FieldRule {
    FieldRule { name, role: FieldRole::Read }
}

pub const fn harmless(name: &'static str) -> FieldRule {
    FieldRule { name, role: FieldRole::Harmless }
}

pub const fn harmless_as(name: &'static str, values: &'static [&'static str]) -> FieldRule {
    FieldRule { name, role: FieldRole::HarmlessAs(values) }
}

pub const fn only(name: &'static str, values: &'static [&'static str]) -> FieldRule {
    FieldRule { name, role: FieldRole::Only(values) }
}

const FALSE: &[&str] = &["false"];
const ONE: &[&str] = &["1", "1.0"];

/// Fields that every decoder's spec is made from.
pub const DECODER: &[FieldRule] = &[
    read("bos_token_id"),
    read("dtype"),
    read("head_dim"),
    read("hidden_size"),
    read("intermediate_size"),
    read("max_position_embeddings"),
    read("model_type"),
    read("num_attention_heads"),
    read("num_hidden_layers"),
    read("num_key_value_heads"),
    read("original_max_position_embeddings"),
    read("quantization_config"),
    read("rms_norm_eps"),
    read("rope_parameters"),
    read("rope_scaling"),
    read("rope_theta"),
    read("tie_word_embeddings"),
    read("torch_dtype"),
    read("vocab_size"),
];

/// Fields that all of transformers' config classes share, and what else is often found in configs.
pub const COMMON: &[FieldRule] = &[
    // Another config, other weights, other layers or another mask than labpipe would compute with.
    only("configuration_files", &["[]"]),
    only("is_causal", &["true"]),
    only("per_layer_config", &["{}"]),
    only("transformers_weights", &[]),
    // The key and value cache alone reads them: they change nothing while whole sequences are computed.
    harmless_as("attention_chunk_size", &[]),
    harmless_as("kv_sharing_modes", &[]),
    // Parts that these families don't have.
    harmless_as("add_cross_attention", FALSE),
    harmless_as("fusion_config", &["{}"]),
    harmless_as("is_encoder_decoder", FALSE),
    harmless_as("lm_head_bias", FALSE),
    harmless_as("pruned_heads", &["{}"]),
    harmless_as("rope_interleaved", FALSE),
    harmless_as("use_mrope", FALSE),
    // Where a config comes from, and what it is for.
    harmless("_attn_implementation"),
    harmless("_attn_implementation_autoset"),
    harmless("_commit_hash"),
    harmless("_name_or_path"),
    harmless("_pre_quantization_dtype"),
    harmless("architectures"),
    harmless("attn_implementation"),
    harmless("auto_map"),
    harmless("experts_implementation"),
    harmless("finetuning_task"),
    harmless("id2label"),
    harmless("is_llama_config"),
    harmless("label2id"),
    harmless("name_or_path"),
    harmless("num_labels"),
    harmless("prefix"),
    harmless("problem_type"),
    harmless("task_specific_params"),
    harmless("tokenizer_class"),
    harmless("transformers.js_config"),
    harmless("transformers_version"),
    harmless("unsloth_fixed"),
    harmless("unsloth_version"),
    // Training, and what a call returns.
    harmless("attention_dropout"),
    harmless("cache_implementation"),
    harmless("chunk_size_feed_forward"),
    harmless("cross_attention_hidden_size"),
    harmless("distributed_config"),
    harmless("embd_pdrop"),
    harmless("gradient_checkpointing"),
    harmless("init_std"),
    harmless("initializer_factor"),
    harmless("initializer_range"),
    harmless("is_decoder"),
    harmless("output_attentions"),
    harmless("output_hidden_states"),
    harmless("output_scores"),
    harmless("pretraining_tp"),
    harmless("resid_pdrop"),
    harmless("return_dict"),
    harmless("return_dict_in_generate"),
    harmless("tf_legacy_loss"),
    harmless("tie_encoder_decoder"),
    harmless("torchscript"),
    harmless("use_bfloat16"),
    harmless("use_cache"),
    // Ids of tokens that no computation depends on.
    harmless("decoder_start_token_id"),
    harmless("eos_token_id"),
    harmless("pad_token_id"),
    harmless("sep_token_id"),
    // How text is sampled.
    harmless("assistant_confidence_threshold"),
    harmless("assistant_lookbehind"),
    harmless("bad_words_ids"),
    harmless("begin_suppress_tokens"),
    harmless("diversity_penalty"),
    harmless("do_sample"),
    harmless("early_stopping"),
    harmless("encoder_no_repeat_ngram_size"),
    harmless("encoder_repetition_penalty"),
    harmless("epsilon_cutoff"),
    harmless("eta_cutoff"),
    harmless("exponential_decay_length_penalty"),
    harmless("forced_bos_token_id"),
    harmless("forced_eos_token_id"),
    harmless("length_penalty"),
    harmless("max_length"),
    harmless("min_length"),
    harmless("no_repeat_ngram_size"),
    harmless("num_assistant_tokens"),
    harmless("num_assistant_tokens_schedule"),
    harmless("num_beam_groups"),
    harmless("num_beams"),
    harmless("num_return_sequences"),
    harmless("remove_invalid_values"),
    harmless("repetition_penalty"),
    harmless("suppress_tokens"),
    harmless("target_lookbehind"),
    harmless("temperature"),
    harmless("top_k"),
    harmless("top_p"),
    harmless("typical_p"),
];

/// The rotated share of each head, for families that rotate whole heads whatever it says.
pub const WHOLE_HEADS: FieldRule = harmless_as("partial_rotary_factor", ONE);

/// Which layers slide, for families none of whose layers do while whole sequences are computed.
pub const NO_WINDOWS: &[FieldRule] = &[
    // A list of full attention alone is marked as harmless when it is read.
    harmless_as("layer_types", &[]),
    harmless_as("sliding_window", &[]),
    harmless_as("use_sliding_window", FALSE),
];

/// Biases that a family's projections never have.
pub const NO_ATTENTION_BIAS: FieldRule = harmless_as("attention_bias", FALSE);
pub const NO_MLP_BIAS: FieldRule = harmless_as("mlp_bias", FALSE);

/// Returns the rule of a field; a list's rules count before those of the lists ahead of it.
pub fn rule_of<'a>(lists: &[&'a [FieldRule]], name: &str) -> Option<&'a FieldRule> {
    lists.iter().rev().find_map(|list| list.iter().find(|rule| rule.name == name))
}
