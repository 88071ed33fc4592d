//! Classes of transformers 5 that make their own normalizer and pre-tokenizer. labpipe uses tokenizer.json as it is, as transformers
//! 4.57 does; what the class would do otherwise is told, and the one setting that both versions apply, `add_prefix_space`, is applied.

use super::class::{Class, unfollowed};
use super::limits::Head;
use super::side_files::SideFiles;
use serde_json::{Value, json};
use tokenizers::{NormalizerWrapper, Tokenizer};

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Applies `add_prefix_space` to a tokenizer, and returns what a user must hear of the class.
///
/// # Errors
/// What the tokenizer makes of the changed normalizer.
pub fn adapt(
    class: &Class,
    side: &SideFiles,
    head: &mut Head,
    tokenizer: &mut Tokenizer,
) -> Result<Vec<String>, String> {
    if let Some(name) = unfollowed(side) {
        return Ok(vec![format!(
            "tokenizer_class {name}: transformers 5.24 makes that class's own normalizer, pre-tokenizer and post-processor; labpipe uses those of \
             tokenizer.json, so tokens and numbers differ (tokenizer_class: TokenizersBackend in tokenizer_config.json makes both use the file's)"
        )]);
    }
    if !class.rebuilds {
        return Ok(Vec::new());
    }
    let mut warnings = Vec::new();
    let flag = side.setting("add_prefix_space").as_bool();
    if matches!(class.name, "LlamaTokenizer" | "CodeLlamaTokenizer") {
        if flag == Some(false) && without_prefix(head) {
            let changed: Option<NormalizerWrapper> =
                serde_json::from_value(head.normalizer.clone()).map_err(|error| error.to_string())?;
            tokenizer.with_normalizer(changed).map_err(|error| error.to_string())?;
        }
    } else if let Some(flag) = flag {
        set_prefix(&mut head.pre_tokenizer, flag);
    }
    if let Some(difference) = difference(class, head) {
        warnings.push(format!(
            "{} of transformers 5.24 makes its own {difference} in place of this file's, so its tokens may differ; labpipe uses the file's, \
             as transformers 4.57 does (tokenizer_class: TokenizersBackend in tokenizer_config.json says so to both)",
            class.name
        ));
    }
    Ok(warnings)
}

/// Takes the space away that stands before a text; returns whether there was one.
fn without_prefix(head: &mut Head) -> bool {
    let mut found = false;
    if head.normalizer["type"] == "Prepend" {
        head.normalizer = Value::Null;
        found = true;
    }
    if let Some(members) = head.normalizer.get_mut("normalizers").and_then(Value::as_array_mut) {
        let n = members.len();
        members.retain(|member| member["type"] != "Prepend");
        found |= members.len() < n;
    }
    if head.pre_tokenizer["type"] == "Metaspace" {
        head.pre_tokenizer["prepend_scheme"] = json!("never");
        found = true;
    }
    found
}

/// Sets what `ByteLevel` puts before a text.
fn set_prefix(pre_tokenizer: &mut Value, flag: bool) {
    if pre_tokenizer["type"] == "ByteLevel" {
        pre_tokenizer["add_prefix_space"] = json!(flag);
    }
    for member in pre_tokenizer.get_mut("pretokenizers").and_then(Value::as_array_mut).into_iter().flatten() {
        set_prefix(member, flag);
    }
}

/// Returns which part of tokenizer.json is not what the class would make; none where both cut texts alike.
fn difference(class: &Class, head: &Head) -> Option<&'static str> {
    let (normalizer, pre_tokenizer) = (&head.normalizer, &head.pre_tokenizer);
    let replaces_spaces =
        |step: &Value| step["type"] == "Replace" && step["pattern"]["String"] == " " && step["content"] == SPACE;
    let words = |step: &Value| step["type"] == "ByteLevel" && step["use_regex"].as_bool().unwrap_or(true);
    let members = |value: &'static str, of: &Value| of[value].as_array().cloned().unwrap_or_default();
    let normalizes = match class.name {
        "LlamaTokenizer" | "CodeLlamaTokenizer" => {
            normalizer.is_null()
                || replaces_spaces(normalizer)
                || members("normalizers", normalizer)
                    .iter()
                    .all(|step| replaces_spaces(step) || (step["type"] == "Prepend" && step["prepend"] == SPACE))
                    && normalizer["type"] == "Sequence"
        }
        "GemmaTokenizer" => replaces_spaces(normalizer),
        "GPT2Tokenizer" => normalizer.is_null(),
        _ => normalizer["type"] == "NFC",
    };
    if !normalizes {
        return Some("normalizer");
    }
    let splits = match class.name {
        "LlamaTokenizer" | "CodeLlamaTokenizer" => {
            pre_tokenizer.is_null() != normalizer.is_null()
                && (pre_tokenizer.is_null() || pre_tokenizer["type"] == "Metaspace" && pre_tokenizer["split"] == false)
        }
        // No space is left to split at.
        "GemmaTokenizer" => {
            pre_tokenizer.is_null() || pre_tokenizer["type"] == "Split" && pre_tokenizer["pattern"]["String"] == " "
        }
        "Qwen2Tokenizer" => {
            let steps = members("pretokenizers", pre_tokenizer);
            steps.len() == 2 && steps[0]["pattern"]["Regex"] == QWEN2_WORDS && steps[1]["type"] == "ByteLevel"
        }
        "CohereTokenizer" => {
            let steps = members("pretokenizers", pre_tokenizer);
            steps.len() == 2 && steps[0]["type"] == "Digits" && words(&steps[1])
        }
        _ => words(pre_tokenizer),
    };
    (!splits).then_some("pre_tokenizer")
}

/// How Qwen2's class cuts words (transformers 5.24, models/qwen2/tokenization_qwen2.py).
const QWEN2_WORDS: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
