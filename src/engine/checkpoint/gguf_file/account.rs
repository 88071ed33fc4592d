//! The account of a GGUF file: which of its metadata keys and tensors were used, and in what types it stores its weights.

use super::rope::{ATTN_FACTOR, DIVISORS, LONG_DIVISORS, SHORT_DIVISORS};
use super::tensors::GgufCheckpoint;
use crate::engine::spec::ModelSpec;
use crate::inference::{AccountPart, InferenceError, StoredType};
use std::collections::{BTreeMap, BTreeSet};

/// Keys of an architecture that the model is made from.
static USED: &[&str] = &[
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.dimension_count_swa",
    "rope.freq_base",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "attention.sliding_window_pattern",
];
/// Keys that count where YaRN or LongRoPE is used; elsewhere they change nothing.
static LONG_CONTEXT: &[&str] = &[
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_attn_factor",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
];
/// Keys without an effect on a forward pass.
static HARMLESS: &[&str] =
    &["vocab_size", "pooling_type", "rope.scaling.finetuned", "tensor_data_layout", "leading_dense_block_count"];
/// Keys outside of an architecture that say where a file comes from, how it was made and how it is cut.
static HARMLESS_PREFIXES: &[&str] = &["general.", "quantize.", "split.", "imatrix.", "tokenizer.chat_template"];
/// Keys that a tokenizer is made from.
static TOKENIZER_USED: &[&str] = &[
    "model",
    "pre",
    "tokens",
    "token_type",
    "scores",
    "merges",
    "bos_token_id",
    "eos_token_id",
    "unknown_token_id",
    "add_bos_token",
    "add_eos_token",
    "add_space_prefix",
];
/// Ids of tokens that are not added to a text, and settings of other kinds of tokenizer.
static TOKENIZER_HARMLESS: &[&str] = &[
    "token_type_count",
    "seperator_token_id",
    "padding_token_id",
    "mask_token_id",
    "cls_token_id",
    "eot_token_id",
    "eom_token_id",
    "fim_pre_token_id",
    "fim_suf_token_id",
    "fim_mid_token_id",
    "fim_pad_token_id",
    "fim_rep_token_id",
    "fim_sep_token_id",
    "prefix_token_id",
    "suffix_token_id",
    "middle_token_id",
    "remove_extra_whitespaces",
    "add_sep_token",
];

/// What a key is to the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Use {
    Used,
    Harmless,
    Unused,
}

impl GgufCheckpoint {
    /// Returns the parts `GGUF metadata` and `tensors` of the account of a file, and its weights by element type.
    ///
    /// # Errors
    /// As [`complete`](Self::complete).
    pub fn account(&self, spec: &ModelSpec) -> Result<(Vec<AccountPart>, Vec<StoredType>), InferenceError> {
        let used = self.used_tensors(spec);
        let parts = vec![self.metadata_account(spec)?, self.tensor_account(&used)];
        Ok((parts, self.stored_types(&used)))
    }

    fn metadata_account(&self, spec: &ModelSpec) -> Result<AccountPart, InferenceError> {
        let mut part = AccountPart { source: "GGUF metadata".to_owned(), ..AccountPart::default() };
        for key in self.file.keys() {
            match self.use_of(key) {
                Use::Used => part.n_used += 1,
                Use::Harmless => part.n_harmless += 1,
                Use::Unused => part.unused.push(key.to_owned()),
            }
        }
        let window = self.window(spec.n_ctx_max)?;
        if let (Some(window), false) = (window, self.architecture.has_out_norms) {
            let key = self.key("attention.sliding_window");
            part.warnings.push(format!("{key}: a window of {window} tokens is applied; llama.cpp leaves it out"));
        }
        let is_long_rope = self.file.tensor(LONG_DIVISORS).is_some();
        if is_long_rope && self.value(ATTN_FACTOR).is_none() {
            part.warnings.push(format!("{} is missing: 1 is taken, as in llama.cpp", self.key(ATTN_FACTOR)));
        }
        Ok(part)
    }

    fn use_of(&self, key: &str) -> Use {
        if key == "general.architecture" || key == "general.alignment" || key == "tokenizer.chat_template" {
            return Use::Used;
        }
        if HARMLESS_PREFIXES.iter().any(|prefix| key.starts_with(prefix)) {
            return Use::Harmless;
        }
        if let Some(name) = key.strip_prefix("tokenizer.ggml.") {
            return match name {
                _ if TOKENIZER_USED.contains(&name) => Use::Used,
                _ if TOKENIZER_HARMLESS.contains(&name) => Use::Harmless,
                _ => Use::Unused,
            };
        }
        if key == "tokenizer.huggingface.json" {
            return Use::Harmless;
        }
        let prefix = format!("{}.", self.architecture.name);
        match key.strip_prefix(prefix.as_str()) {
            Some(name) => self.use_of_own(name),
            None => Use::Unused,
        }
    }

    /// Returns what a key of the file's own architecture is to the model.
    fn use_of_own(&self, name: &str) -> Use {
        let own_caps = [self.architecture.attn_softcap, self.architecture.logit_softcap];
        match name {
            "attn_logit_softcapping" if own_caps[0].is_some() => Use::Used,
            "final_logit_softcapping" if own_caps[1].is_some() => Use::Used,
            "rope.freq_base_swa" if self.architecture.has_out_norms => Use::Used,
            // The old key counts where the new one is missing.
            "rope.scale_linear" if self.value("rope.scaling.factor").is_none() => Use::Used,
            _ if USED.contains(&name) => Use::Used,
            _ if LONG_CONTEXT.contains(&name) && self.stretches_context() => Use::Used,
            _ if LONG_CONTEXT.contains(&name) || HARMLESS.contains(&name) || self.is_neutral(name) => Use::Harmless,
            // A file with experts was refused.
            _ if name.starts_with("expert_") => Use::Harmless,
            _ => Use::Unused,
        }
    }

    fn stretches_context(&self) -> bool {
        let kind = self.file.text(&self.key("rope.scaling.type"));
        matches!(kind, Some("yarn" | "longrope")) || self.file.tensor(LONG_DIVISORS).is_some()
    }

    /// Returns the tensors that the model is made from, by GGUF's names.
    fn used_tensors(&self, spec: &ModelSpec) -> BTreeSet<String> {
        let mut names = vec!["model.embed_tokens.weight".to_owned(), "model.norm.weight".to_owned()];
        if !spec.tied_embeddings {
            names.push("lm_head.weight".to_owned());
        }
        for layer_idx in 0..spec.n_layers {
            let name = |module: &str, kind: &str| format!("model.layers.{layer_idx}.{module}.{kind}");
            names.extend(spec.block_norms().iter().map(|norm| name(norm.name, "weight")));
            for linear in spec.block_linears() {
                names.push(name(linear.name, "weight"));
                if linear.bias {
                    names.push(name(linear.name, "bias"));
                }
            }
        }
        let rotary = [DIVISORS, SHORT_DIVISORS, LONG_DIVISORS].map(str::to_owned);
        let named = names.iter().filter_map(|name| self.architecture.tensor_name(name));
        named.chain(rotary).filter(|name| self.file.tensor(name).is_some()).collect()
    }

    fn tensor_account(&self, used: &BTreeSet<String>) -> AccountPart {
        let mut part = AccountPart { source: "tensors".to_owned(), n_used: used.len(), ..AccountPart::default() };
        for (name, _) in self.file.tensors().filter(|(name, _)| !used.contains(*name)) {
            // Frequencies that are computed anew; llama.cpp skips the tensor too.
            if name.ends_with(".attn_rot_embd.weight") {
                part.n_harmless += 1;
            } else {
                part.unused.push(name.to_owned());
            }
        }
        part
    }

    fn stored_types(&self, used: &BTreeSet<String>) -> Vec<StoredType> {
        let mut types: BTreeMap<&str, StoredType> = BTreeMap::new();
        for (_, tensor) in self.file.tensors().filter(|(name, _)| used.contains(*name)) {
            let name = tensor.ty.name;
            let empty = || StoredType { name: name.to_owned(), n_tensors: 0, n_params: 0, bytes: 0 };
            let stored = types.entry(name).or_insert_with(empty);
            stored.n_tensors += 1;
            stored.n_params += tensor.n_values() as u64;
            stored.bytes += tensor.n_bytes() as u64;
        }
        let mut types: Vec<StoredType> = types.into_values().collect();
        types.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.name.cmp(&b.name)));
        types
    }
}
