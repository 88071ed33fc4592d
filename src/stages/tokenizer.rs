//! A model's tokenizer: tokenizer.json, and what tokenizer_config.json says of BOS, EOS and chats.

use super::chat::{ChatTemplate, Message};
use crate::gguf::{GgufFile, tokenizer_config, tokenizer_json};
use crate::stage::StageError;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::Tokenizer;

/// A tokenizer with its model's conventions.
pub struct ModelTokenizer {
    tokenizer: Tokenizer,
    /// tokenizer.json or a GGUF file, for error messages.
    path: PathBuf,
    hash: String,
    config: TokenizerConfig,
}

/// What tokenizer_config.json says; a folder without one says nothing.
#[derive(Debug, Clone, Default, PartialEq)]
struct TokenizerConfig {
    /// Whether BOS and EOS are added; where nothing is said, tokenizer.json's own post-processor decides.
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    /// By name (`bos_token`, `eos_token`, `pad_token`, …), the tokens that a chat template may name.
    special_tokens: BTreeMap<String, String>,
    chat_template: Option<String>,
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    /// The special token that was put before the text, where one was.
    pub bos_id: Option<u32>,
}

impl ModelTokenizer {
    /// Reads the tokenizer of a model folder, or that which a GGUF file carries.
    ///
    /// # Errors
    /// `Tokenize`, naming the file that is missing or damaged; `Other` for a GGUF file's.
    pub fn load(model: &Path) -> Result<ModelTokenizer, StageError> {
        if model.is_file() {
            let parts = GgufFile::open(model).and_then(|file| Ok((tokenizer_json(&file)?, tokenizer_config(&file)?)));
            let (json, config) = parts.map_err(|error| StageError::Other(error.to_string()))?;
            return ModelTokenizer::from_json(model.to_owned(), json.as_bytes(), &config);
        }
        let path = model.join("tokenizer.json");
        let bytes = std::fs::read(&path)
            .map_err(|error| StageError::Tokenize { path: path.clone(), reason: error.to_string() })?;
        ModelTokenizer::from_json(path, &bytes, &read_config(model)?)
    }

    /// Makes a tokenizer from the content of tokenizer.json and of tokenizer_config.json, wherever they come from.
    ///
    /// # Errors
    /// `Tokenize`, naming `path`.
    pub fn from_json(path: PathBuf, tokenizer: &[u8], config: &Value) -> Result<ModelTokenizer, StageError> {
        let fail = |reason: String| StageError::Tokenize { path: path.clone(), reason };
        // Of a file that is no JSON the tokenizers crate (0.23) panics in places where it means to return an error.
        serde_json::from_slice::<serde::de::IgnoredAny>(tokenizer)
            .map_err(|error| fail(format!("not valid JSON: {error}")))?;
        let hash = blake3::hash(tokenizer).to_hex().to_string();
        let mut tokenizer =
            Tokenizer::from_bytes(tokenizer).map_err(|error| fail(format!("not a readable tokenizer ({error})")))?;
        tokenizer.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        tokenizer.with_padding(None);
        Ok(ModelTokenizer { tokenizer, path, hash, config: TokenizerConfig::of(config) })
    }

    /// Returns blake3 of tokenizer.json, or of what stands for it in a GGUF file.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Returns an error that names the file.
    pub fn error(&self, reason: impl Into<String>) -> StageError {
        StageError::Tokenize { path: self.path.clone(), reason: reason.into() }
    }

    /// Tokenizes a text and adds BOS and EOS as tokenizer_config.json says, or else as tokenizer.json does by itself.
    ///
    /// # Errors
    /// `Tokenize` where a token to add is not in the vocabulary.
    pub fn encode(&self, text: &str) -> Result<Encoded, StageError> {
        let (own_bos, own_eos) = self.own_special_tokens()?;
        let bos = self.added("bos_token", self.config.add_bos_token, own_bos)?;
        let eos = self.added("eos_token", self.config.add_eos_token, own_eos)?;
        if (bos, eos) == (own_bos, own_eos) {
            let ids = self.ids(text, true)?;
            return Ok(Encoded { ids, bos_id: bos });
        }
        let mut ids: Vec<u32> = bos.into_iter().collect();
        ids.extend(self.ids(text, false)?);
        ids.extend(eos);
        Ok(Encoded { ids, bos_id: bos })
    }

    /// Tokenizes a text in which special tokens are already written out, as a chat template does: nothing is added.
    ///
    /// # Errors
    /// `Tokenize`.
    pub fn encode_as_is(&self, text: &str) -> Result<Encoded, StageError> {
        let ids = self.ids(text, false)?;
        let bos = self.special_token_id("bos_token");
        let bos_id = ids.first().copied().filter(|first| bos == Some(*first));
        Ok(Encoded { ids, bos_id })
    }

    /// Renders a conversation with the model's chat template, up to where its answer begins.
    ///
    /// # Errors
    /// `Tokenize` where the model has no chat template, or it refuses the messages.
    pub fn chat(&self, messages: &[Message]) -> Result<String, StageError> {
        let template = self.config.chat_template.as_deref().ok_or_else(|| {
            self.error(
                "chat: neither chat_template.jinja nor tokenizer_config.json has a chat template; is this an instruct model?",
            )
        })?;
        let template = ChatTemplate { source: template, special_tokens: &self.config.special_tokens };
        template.render(messages).map_err(|error| self.error(error.to_string()))
    }

    /// Returns the id of a token that tokenizer_config.json names: `bos_token`, `eos_token`, ….
    pub fn special_token_id(&self, name: &str) -> Option<u32> {
        self.config.special_tokens.get(name).and_then(|token| self.tokenizer.token_to_id(token))
    }

    fn ids(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, StageError> {
        let encoding =
            self.tokenizer.encode(text, add_special_tokens).map_err(|error| self.error(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// Returns what tokenizer.json's post-processor puts before and behind a text.
    fn own_special_tokens(&self) -> Result<(Option<u32>, Option<u32>), StageError> {
        let encoding = self.tokenizer.encode("a", true).map_err(|error| self.error(error.to_string()))?;
        let (ids, special) = (encoding.get_ids(), encoding.get_special_tokens_mask());
        let at = |index: usize| ids.get(index).copied().filter(|_| special.get(index) == Some(&1));
        let before = at(0);
        let behind = ids.len().checked_sub(1).filter(|last| *last > 0).and_then(at);
        Ok((before, behind))
    }

    /// Returns the token to add: the one that tokenizer.json adds by itself unless the config says otherwise.
    fn added(&self, name: &str, wanted: Option<bool>, own: Option<u32>) -> Result<Option<u32>, StageError> {
        match (wanted, own) {
            (Some(false), _) => Ok(None),
            (None, own) => Ok(own),
            (Some(true), own) => {
                let Some(token) = self.config.special_tokens.get(name) else {
                    return Ok(own);
                };
                let id = self.tokenizer.token_to_id(token).ok_or_else(|| {
                    self.error(format!(
                        "tokenizer_config.json adds the {name} {token:?}, which is not in the vocabulary"
                    ))
                })?;
                Ok(Some(id))
            }
        }
    }
}

impl TokenizerConfig {
    fn of(config: &Value) -> TokenizerConfig {
        let mut special_tokens = BTreeMap::new();
        for (name, value) in config.as_object().into_iter().flatten().filter(|(name, _)| name.ends_with("_token")) {
            // Either the text itself or a mapping that describes the token.
            if let Some(token) = value.as_str().or_else(|| value["content"].as_str()) {
                special_tokens.insert(name.clone(), token.to_owned());
            }
        }
        TokenizerConfig {
            add_bos_token: config["add_bos_token"].as_bool(),
            add_eos_token: config["add_eos_token"].as_bool(),
            special_tokens,
            chat_template: chat_template(&config["chat_template"]),
        }
    }
}

/// Returns tokenizer_config.json; null where there is none.
fn read_config(dir: &Path) -> Result<Value, StageError> {
    let path = dir.join("tokenizer_config.json");
    let mut config = match read_optional(&path)? {
        None => Value::Null,
        Some(text) => serde_json::from_str(&text)
            .map_err(|error| StageError::Tokenize { path, reason: format!("not valid JSON: {error}") })?,
    };
    // A file of its own goes before the config's field, as in transformers.
    if let Some(template) = read_optional(&dir.join("chat_template.jinja"))? {
        match config.as_object_mut() {
            Some(fields) => _ = fields.insert("chat_template".to_owned(), Value::String(template)),
            None => config = json!({ "chat_template": template }),
        }
    }
    Ok(config)
}

/// Returns the template, or that named `default` of several.
fn chat_template(value: &Value) -> Option<String> {
    let named = |item: &Value| {
        let is_default = item["name"].as_str() == Some("default");
        item["template"].as_str().filter(|_| is_default).map(str::to_owned)
    };
    match value {
        Value::String(template) => Some(template.clone()),
        Value::Array(templates) => templates.iter().find_map(named),
        _ => None,
    }
}

fn read_optional(path: &Path) -> Result<Option<String>, StageError> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StageError::Tokenize { path: path.to_owned(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What transformers makes of texts and chats (tests/fixtures/tokenizers/README.md says how).
    fn expected() -> Value {
        let text =
            std::fs::read_to_string(root().join("tests/fixtures/tokenizers/expected.json")).expect("the fixture");
        serde_json::from_str(&text).expect("JSON")
    }

    fn root() -> PathBuf {
        PathBuf::from(env!("CARGO_MANIFEST_DIR"))
    }

    fn own() -> PathBuf {
        root().join("tests/fixtures/tokenizers/bytes-512")
    }

    fn ids(value: &Value) -> Vec<u32> {
        value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
    }

    fn list(value: &Value) -> &[Value] {
        value.as_array().expect("a list")
    }

    fn messages(chat: &Value) -> Vec<Message> {
        let message = |item: &Value| Message {
            role: if item["role"] == "system" { "system" } else { "user" },
            content: item["content"].as_str().expect("a text").to_owned(),
        };
        list(chat).iter().map(message).collect()
    }

    fn check(name: &str, tokenizer: &ModelTokenizer, expected: &Value, case: &Value) {
        for (text, found) in list(&expected["texts"]).iter().zip(list(&case["ids"])) {
            let text = text.as_str().expect("a text");
            assert_eq!(tokenizer.encode(text).expect("tokens").ids, ids(found), "{name}: {text:?}");
        }
        for (chat, found) in list(&expected["chats"]).iter().zip(list(&case["chat_ids"])) {
            let text = tokenizer.chat(&messages(chat)).expect("a text");
            assert_eq!(tokenizer.encode_as_is(&text).expect("tokens").ids, ids(found), "{name}: {text:?}");
        }
    }

    /// Every text comes back as it was, but for what a tokenizer that begins words with a space does to leading ones.
    fn check_round_trip(name: &str, tokenizer: &ModelTokenizer, expected: &Value) {
        for text in list(&expected["texts"]).iter().map(|text| text.as_str().expect("a text")) {
            let ids = tokenizer.encode(text).expect("tokens").ids;
            let has_special = text.contains("<|");
            let back = tokenizer.tokenizer.decode(&ids, !has_special).expect("a text");
            let bos = tokenizer.config.special_tokens.get("bos_token").map_or("", String::as_str);
            let back = if has_special { back.strip_prefix(bos).unwrap_or(&back) } else { &back };
            assert_eq!(back, text, "{name}");
        }
    }

    #[test]
    fn bos_and_eos_are_added_as_the_config_says_and_chats_as_the_template_says() {
        let expected = expected();
        let cases = expected["own"].as_object().expect("a mapping");
        assert_eq!(cases.len(), 4);
        for (name, case) in cases {
            let mut tokenizer = ModelTokenizer::load(&own()).expect("a tokenizer");
            tokenizer.config.add_bos_token = case["config"]["add_bos_token"].as_bool();
            tokenizer.config.add_eos_token = case["config"]["add_eos_token"].as_bool();
            check(name, &tokenizer, &expected, case);
        }
    }

    #[test]
    fn a_bos_is_told_apart_from_a_text_that_has_none() {
        let mut tokenizer = ModelTokenizer::load(&own()).expect("a tokenizer");
        assert_eq!(tokenizer.encode("a").expect("tokens").bos_id, Some(0));
        let chat = tokenizer.chat(&[Message { role: "user", content: "a".to_owned() }]).expect("a text");
        assert_eq!(tokenizer.encode_as_is(&chat).expect("tokens").bos_id, Some(0));
        assert_eq!(tokenizer.encode_as_is("a").expect("tokens").bos_id, None);
        tokenizer.config.add_bos_token = Some(false);
        assert_eq!(tokenizer.encode("a").expect("tokens").bos_id, None);
    }

    #[test]
    fn texts_come_back_from_their_tokens() {
        check_round_trip("bytes-512", &ModelTokenizer::load(&own()).expect("a tokenizer"), &expected());
    }

    #[test]
    fn sentencepiece_style_tokenizers_agree_with_transformers() {
        let expected = expected();
        for name in ["stories260k", "tinystories-656k"] {
            let tokenizer = ModelTokenizer::load(&root().join("models").join(name)).expect("a tokenizer");
            check(name, &tokenizer, &expected, &expected["others"][name]);
        }
    }

    /// Their files are not ours to copy: the test needs them beside the checkout.
    #[test]
    fn tokenizers_of_llama_3_qwen_2_5_and_gpt_2_agree_with_transformers_and_round_trip() {
        let expected = expected();
        for name in ["gpt2", "llama3_nobos", "qwen2_5"] {
            let dir = root().join("../shared/tokenizers").join(name);
            if !dir.is_dir() {
                eprintln!("skipped: {} is not there", dir.display());
                continue;
            }
            let mut tokenizer = ModelTokenizer::load(&dir).expect("a tokenizer");
            check(name, &tokenizer, &expected, &expected["others"][name]);
            check_round_trip(name, &tokenizer, &expected);
            if name == "llama3_nobos" {
                let without = tokenizer.encode("Once").expect("tokens").ids;
                tokenizer.config.add_bos_token = Some(true);
                assert_eq!(tokenizer.encode("Once").expect("tokens").ids, [&[128_000], without.as_slice()].concat());
            }
        }
    }

    #[test]
    fn files_that_are_missing_or_damaged_are_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let error = |dir: &Path| ModelTokenizer::load(dir).err().expect("an error").to_string();
        assert!(error(dir.path()).contains("tokenizer.json"));
        std::fs::copy(own().join("tokenizer.json"), dir.path().join("tokenizer.json")).expect("a copy");
        let tokenizer = ModelTokenizer::load(dir.path()).expect("a tokenizer without a config");
        let refused = tokenizer.chat(&[]).expect_err("no template").to_string();
        assert!(refused.contains("chat_template.jinja"), "{refused}");
        std::fs::write(
            dir.path().join("tokenizer_config.json"),
            "{\"add_bos_token\": true, \"bos_token\": \"<|none|>\"}",
        )
        .expect("a file");
        let missing =
            ModelTokenizer::load(dir.path()).expect("a tokenizer").encode("a").expect_err("an error").to_string();
        assert!(missing.contains("<|none|>") && missing.contains("bos_token"), "{missing}");
        std::fs::write(dir.path().join("tokenizer_config.json"), "{").expect("a file");
        assert!(error(dir.path()).contains("tokenizer_config.json"));
    }

    #[test]
    fn templates_are_found_in_the_config_by_name_too() {
        let config = json!({
            "chat_template": [{"name": "tool_use", "template": "T"}, {"name": "default", "template": "D"}],
            "eos_token": {"content": "</s>"}, "bos_token": null
        });
        let config = TokenizerConfig::of(&config);
        assert_eq!(config.chat_template.as_deref(), Some("D"));
        assert_eq!(config.special_tokens, BTreeMap::from([("eos_token".to_owned(), "</s>".to_owned())]));
    }
}
