//! Texts as tokens: reads a text source and tokenizes it with the model's own tokenizer.json.

use crate::inference::ModelInfo;
use crate::stage::{StageContext, StageError};
use serde_json::Value;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// A tokenized text.
#[derive(Debug, Clone)]
pub struct TokenizedText {
    pub tokens: Vec<u32>,
    /// blake3 of the text that was tokenized.
    pub text_hash: String,
    /// blake3 of tokenizer.json.
    pub tokenizer_hash: String,
    /// How the text begins: `added by the tokenizer (id 1)` or `none`.
    pub bos: String,
}

/// Reads the text that a parameter names (canonical `{source, n_chars, n_tokens}`) and tokenizes it for a model.
///
/// # Errors
/// `Read` for a file that isn't there, isn't UTF-8 or is empty; `Tokenize` for a tokenizer that is missing, damaged, or doesn't
/// fit the model; `Param` where the text is shorter than `n_tokens`.
pub fn tokenize(context: &StageContext<'_>, source: &Value, model: &ModelInfo) -> Result<TokenizedText, StageError> {
    let path = context.root.join(source["source"].as_str().unwrap_or_default());
    let text = read(&path, source["n_chars"].as_u64())?;
    let dir = model.tokenizer_dir.as_ref().ok_or_else(|| StageError::Tokenize {
        path: path.clone(),
        reason: "a model with random weights has no tokenizer; leave the text out to use random tokens".to_owned(),
    })?;
    let (tokenizer, tokenizer_path, tokenizer_hash) = load(dir)?;
    let fail = |reason: String| StageError::Tokenize { path: tokenizer_path.clone(), reason };
    let encoding = tokenizer.encode(text.as_str(), true).map_err(|error| fail(error.to_string()))?;
    let mut tokens = encoding.get_ids().to_vec();
    if let Some(token) = tokens.iter().find(|token| **token as usize >= model.vocab_size) {
        let vocab_size = model.vocab_size;
        return Err(fail(format!(
            "it gives token id {token}, but the model's vocabulary has {vocab_size} entries; it belongs to another model"
        )));
    }
    if let Some(n_tokens) = source["n_tokens"].as_u64().and_then(|n| usize::try_from(n).ok()) {
        if n_tokens > tokens.len() {
            let reason = format!("n_tokens {n_tokens} is more than the text's {} tokens", tokens.len());
            return Err(StageError::Param { param: "text".to_owned(), reason });
        }
        tokens.truncate(n_tokens);
    }
    let first_is_special = encoding.get_special_tokens_mask().first() == Some(&1);
    let bos = match tokens.first() {
        Some(id) if first_is_special => format!("added by the tokenizer (id {id})"),
        _ => "none".to_owned(),
    };
    Ok(TokenizedText { tokens, text_hash: blake3::hash(text.as_bytes()).to_hex().to_string(), tokenizer_hash, bos })
}

fn read(path: &Path, n_chars: Option<u64>) -> Result<String, StageError> {
    let fail = |reason: String| StageError::Read { path: path.to_owned(), reason };
    let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
    let text = String::from_utf8(bytes).map_err(|error| fail(format!("not UTF-8 text ({error})")))?;
    let text = match n_chars.and_then(|n| usize::try_from(n).ok()) {
        None => text,
        Some(n) => match text.chars().count() {
            have if have < n => return Err(fail(format!("n_chars {n} is more than the text's {have} characters"))),
            _ => text.chars().take(n).collect(),
        },
    };
    if text.is_empty() { Err(fail("the text is empty".to_owned())) } else { Ok(text) }
}

fn load(dir: &Path) -> Result<(Tokenizer, PathBuf, String), StageError> {
    let path = dir.join("tokenizer.json");
    let fail = |reason: String| StageError::Tokenize { path: path.clone(), reason };
    let bytes = std::fs::read(&path).map_err(|error| fail(error.to_string()))?;
    // Of a file that is no JSON the tokenizers crate (0.23) panics in places where it means to return an error.
    serde_json::from_slice::<serde::de::IgnoredAny>(&bytes)
        .map_err(|error| fail(format!("not valid JSON: {error}")))?;
    let mut tokenizer =
        Tokenizer::from_bytes(&bytes).map_err(|error| fail(format!("not a readable tokenizer ({error})")))?;
    tokenizer.with_truncation(None).map_err(|error| fail(error.to_string()))?;
    tokenizer.with_padding(None);
    let hash = blake3::hash(&bytes).to_hex().to_string();
    Ok((tokenizer, path, hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_by_characters_and_empty_or_short_ones_are_errors() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.txt");
        std::fs::write(&path, "grüße").expect("a file");
        assert_eq!(read(&path, Some(3)).expect("a text"), "grü");
        assert!(read(&path, Some(9)).expect_err("an error").to_string().contains("5 characters"));
        std::fs::write(&path, "").expect("a file");
        assert!(read(&path, None).expect_err("an error").to_string().contains("empty"));
        std::fs::write(&path, [0xff, 0xfe]).expect("a file");
        assert!(read(&path, None).expect_err("an error").to_string().contains("UTF-8"));
    }
}
