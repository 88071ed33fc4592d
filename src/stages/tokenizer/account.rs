//! The account of a tokenizer's files: which fields count, which have no effect on what labpipe computes, and which are neither.

use super::class::{AroundText, Class};
use super::limits::Head;
use super::side_files::{Fields, SideFiles};
use super::special::SpecialTokens;
use crate::inference::AccountPart;
use serde::de::IgnoredAny;
use serde_json::Value;
use std::collections::BTreeMap;
use tokenizers::{AddedToken, Tokenizer};

/// Fields of tokenizer.json that are used.
const TOKENIZER_USED: &[&str] = &["added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model"];
/// Fields of tokenizer.json without effect: texts are never cut or filled up, nor made from tokens.
const TOKENIZER_HARMLESS: &[&str] = &["version", "truncation", "padding", "decoder"];
/// Fields of tokenizer_config.json that are used, beside names that end in `_token`.
const CONFIG_USED: &[&str] = &[
    "tokenizer_class",
    "added_tokens_decoder",
    "extra_special_tokens",
    "additional_special_tokens",
    "chat_template",
    "split_special_tokens",
    "fast_tokenizer_files",
    "add_prefix_space",
];
/// Fields of tokenizer_config.json without effect: transformers reads them for decoding, for batches, for tokenizers without a
/// tokenizer.json, or not at all.
const CONFIG_HARMLESS: &[&str] = &[
    "add_bos_token",
    "add_eos_token",
    "backend",
    "chat_control_tokens",
    "clean_up_tokenization_spaces",
    "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output",
    "device_map",
    "errors",
    "files_loaded",
    "from_slow",
    "init_inputs",
    "is_local",
    "legacy",
    "local_files_only",
    "max_len",
    "max_length",
    "model_input_names",
    "model_max_length",
    "model_type",
    "name_or_path",
    "pad_to_multiple_of",
    "pad_token_type_id",
    "padding",
    "padding_side",
    "processor_class",
    "response_schema",
    "response_template",
    "sp_model_kwargs",
    "special_tokens_map_file",
    "spaces_between_special_tokens",
    "stride",
    "tokenizer_file",
    "tokenizer_type",
    "tokenize_chinese_chars",
    "torch_dtype",
    "transformers_version",
    "truncation",
    "truncation_side",
    "truncation_strategy",
    "trust_remote_code",
    "unk_id",
    "use_default_system_prompt",
    "use_fast",
    "verbose",
    "vocab_file",
    "merges_file",
    "vocab_size",
];

/// Tokens that the side files added to tokenizer.json's.
#[derive(Debug, Default)]
pub struct Added {
    /// Tokens that no vocabulary had, with their ids.
    new: Vec<(String, u32)>,
    /// Tokens whose id is not the one that the file gives.
    moved: Vec<(String, u64, u32)>,
    /// Tokens that only the class names and that are left out: the model has no rows for their ids.
    left_out: Vec<(String, u32)>,
    class: &'static str,
}

impl Added {
    /// Adds the tokens that side files name, in their order, as transformers does. A token that no file names, only the class, is left
    /// out where its id would lie beyond the model's `n_rows` embeddings: no such model can have been trained with it.
    ///
    /// # Errors
    /// What the tokenizer refuses.
    pub fn add(
        tokenizer: &mut Tokenizer,
        special: &SpecialTokens,
        class: &Class,
        n_rows: Option<u64>,
    ) -> Result<Added, String> {
        let mut added = Added { class: class.name, ..Added::default() };
        let mut next = next_id(tokenizer);
        let mut tokens = Vec::new();
        for (token, _) in &special.to_add {
            if !token.content.is_empty() && tokenizer.token_to_id(&token.content).is_none() {
                if special.of_class.contains(&token.content) && n_rows.is_some_and(|n_rows| u64::from(next) >= n_rows) {
                    added.left_out.push((token.content.clone(), next));
                    continue;
                }
                added.new.push((token.content.clone(), 0));
                next += 1;
            }
            tokens.push(token.clone());
        }
        tokenizer.add_tokens(tokens).map_err(|error| error.to_string())?;
        if class.name == "Qwen2Tokenizer" {
            // The class adds every special token once more, without the flags that a file gives it.
            let is_left_out = |token: &&String| added.left_out.iter().any(|(left_out, _)| left_out == *token);
            let again = special.names.values().filter(|token| !is_left_out(token));
            let again = again.map(|token| AddedToken::from(token.clone(), true));
            tokenizer.add_tokens(again).map_err(|error| error.to_string())?;
        }
        for (token, id) in &mut added.new {
            *id = tokenizer.token_to_id(token).unwrap_or_default();
        }
        for (token, given) in &special.to_add {
            if let (Some(given), Some(id)) = (*given, tokenizer.token_to_id(&token.content))
                && given != u64::from(id)
            {
                added.moved.push((token.content.clone(), given, id));
            }
        }
        Ok(added)
    }

    fn warnings(&self) -> Vec<String> {
        let mut warnings = Vec::new();
        if let (Some(first), Some(last)) = (self.new.first(), self.new.last()) {
            let ids =
                if first.1 == last.1 { format!("id {}", first.1) } else { format!("ids {} to {}", first.1, last.1) };
            let named: Vec<String> = self.new.iter().take(4).map(|(token, _)| format!("{token:?}")).collect();
            let more = if self.new.len() > 4 { format!(" and {} more", self.new.len() - 4) } else { String::new() };
            warnings.push(format!(
                "{}{more} stand in no vocabulary and are added with {ids}, as in transformers; a model needs rows for them",
                named.join(", ")
            ));
        }
        if let Some((_, first)) = self.left_out.first() {
            let named: Vec<String> = self.left_out.iter().map(|(token, _)| format!("{token:?}")).collect();
            warnings.push(format!(
                "{} is left out: only transformers' class {} names it, no file does, and the model has no row for its id {first}; a text that \
                 holds it gets ordinary tokens there",
                named.join(", "),
                self.class
            ));
        }
        for (token, given, id) in self.moved.iter().take(4) {
            warnings.push(format!(
                "{token:?} is token {given} here and {id} in the vocabulary; {id} is used, as in transformers"
            ));
        }
        warnings
    }
}

/// Returns the id that the tokenizers crate gives the next token that is in no vocabulary.
fn next_id(tokenizer: &Tokenizer) -> u32 {
    let n_own = u32::try_from(tokenizer.get_vocab_size(false)).unwrap_or(u32::MAX);
    let added = tokenizer.get_added_tokens_decoder().keys().max().map_or(0, |id| id + 1);
    added.max(n_own)
}

/// Accounts for tokenizer.json.
pub fn of_tokenizer_json(json: &[u8], head: &Head, tokenizer: &Tokenizer) -> AccountPart {
    let keys: BTreeMap<String, IgnoredAny> = serde_json::from_slice(json).unwrap_or_default();
    let mut part = AccountPart { source: "tokenizer.json".to_owned(), ..AccountPart::default() };
    for key in keys.keys() {
        match key.as_str() {
            key if TOKENIZER_USED.contains(&key) => part.n_used += 1,
            key if TOKENIZER_HARMLESS.contains(&key) => part.n_harmless += 1,
            key => part.unused.push(key.to_owned()),
        }
    }
    let moved = head.added_tokens.iter().filter_map(|token| {
        let (content, given) = (token["content"].as_str()?, token["id"].as_u64()?);
        let id = tokenizer.token_to_id(content).filter(|id| u64::from(*id) != given)?;
        Some(format!(
            "its added token {content:?} is {given} there and {id} in its vocabulary; {id} is used, as in transformers"
        ))
    });
    part.warnings.extend(moved.take(4));
    part
}

/// Accounts for the files beside it. `around` is what is put around a text, and what transformers 4.57 would put there.
pub fn of_side_files(
    side: &SideFiles,
    special: &SpecialTokens,
    added: &Added,
    around: (&AroundText, &AroundText),
    bos_id: Option<u32>,
) -> Vec<AccountPart> {
    let mut parts = Vec::new();
    let has_none = side.tokenizer_config.is_none() && side.added_tokens.is_none();
    if has_none && !(added.new.is_empty() && added.left_out.is_empty()) {
        let source = "tokenizer class".to_owned();
        parts.push(AccountPart { source, warnings: added.warnings(), ..AccountPart::default() });
    }
    if let Some(file) = &side.tokenizer_config {
        let mut part = of_tokenizer_config(file);
        part.warnings.extend(added.warnings());
        part.warnings.extend(differs_from_4_57(around));
        part.warnings.extend(differs_from_config(side, bos_id));
        parts.push(part);
    }
    let of_whole = |file: &Fields, used: bool, warnings: Vec<String>| {
        let source = file.path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let (n_used, n_harmless) = if used { (file.fields.len(), 0) } else { (0, file.fields.len()) };
        AccountPart { source, n_used, n_harmless, unused: Vec::new(), warnings }
    };
    let has_decoder = !side.setting("added_tokens_decoder").is_null();
    parts.extend(
        side.special_tokens_map.as_ref().map(|file| of_whole(file, !has_decoder, special.map_warnings.clone())),
    );
    parts.extend(side.added_tokens.as_ref().map(|file| {
        let warnings = if side.tokenizer_config.is_none() { added.warnings() } else { Vec::new() };
        of_whole(file, !has_decoder, warnings)
    }));
    // What `generate` of transformers stops at and samples by; nothing here is generated so.
    parts.extend(side.generation_config.as_ref().map(|file| of_whole(file, false, Vec::new())));
    if side.chat_template.is_some() {
        parts.push(AccountPart { source: "chat_template.jinja".to_owned(), n_used: 1, ..AccountPart::default() });
    }
    if !side.other_templates.is_empty() {
        let unused = side.other_templates.clone();
        parts.push(AccountPart { source: "chat templates".to_owned(), unused, ..AccountPart::default() });
    }
    parts
}

fn of_tokenizer_config(file: &Fields) -> AccountPart {
    let mut part = AccountPart { source: "tokenizer_config.json".to_owned(), ..AccountPart::default() };
    for (name, value) in &file.fields {
        let is_token = name.ends_with("_token") && (value.is_string() || value.is_object() || value.is_null());
        if is_token || CONFIG_USED.contains(&name.as_str()) {
            part.n_used += 1;
        } else if is_off(value) || name.starts_with('_') || CONFIG_HARMLESS.contains(&name.as_str()) {
            part.n_harmless += 1;
        } else {
            part.unused.push(name.clone());
        }
    }
    part.unused.sort();
    if file.fields.get("chat_template").is_some_and(|template| template.as_array().is_some_and(|list| list.len() > 1)) {
        part.warnings.push("of its chat templates the one named default is used".to_owned());
    }
    part
}

/// A setting that is not set.
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        _ => false,
    }
}

fn differs_from_4_57((now, before): (&AroundText, &AroundText)) -> Option<String> {
    let told = |around: &AroundText| match (around.before.is_empty(), around.behind.is_empty()) {
        (true, true) => "nothing".to_owned(),
        (false, true) => format!("{:?} before them", around.before),
        (true, false) => format!("{:?} behind them", around.behind),
        (false, false) => format!("{:?} before and {:?} behind them", around.before, around.behind),
    };
    (now != before).then(|| {
        format!(
            "texts get {} as in transformers 5.24, which ignores add_bos_token and add_eos_token beside a tokenizer.json; transformers 4.57 gives \
             them {}, so its perplexities differ",
            told(now),
            told(before)
        )
    })
}

fn differs_from_config(side: &SideFiles, bos_id: Option<u32>) -> Option<String> {
    let (own, of_model) = (u64::from(bos_id?), side.model_setting("bos_token_id").as_u64()?);
    (own != of_model).then(|| {
        format!("bos_token is token {own}, config.json's bos_token_id is {of_model}; {own} is used, as in transformers")
    })
}
