//! Texts as tokens: reads a text source and tokenizes it with the model's own tokenizer.json.

use super::chat::Message;
use super::tokenizer::{Encoded, ModelTokenizer};
use crate::dataset::fetch;
use crate::inference::ModelInfo;
use crate::metrics::TextUnits;
use crate::stage::{StageContext, StageError};
use crate::store::read_text_column;
use serde_json::Value;
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A tokenized text.
#[derive(Debug, Clone)]
pub struct TokenizedText {
    pub tokens: Vec<u32>,
    /// blake3 of the text that was tokenized.
    pub text_hash: String,
    /// blake3 of tokenizer.json.
    pub tokenizer_hash: String,
    /// How the text begins: `added by the tokenizer (id 1)`, `added by the chat template (id 1)` or `none`.
    pub bos: String,
    /// The token that the tokenizer or the chat template put before the text, where one did.
    pub bos_id: Option<u32>,
}

/// A text's documents, each tokenized by itself.
#[derive(Debug, Clone)]
pub struct TokenizedDocuments {
    /// One list a document; an empty document has none.
    pub documents: Vec<Vec<u32>>,
    /// What each document's first token is predicted from: the tokenizer's BOS, else its EOS.
    pub prefix_id: u32,
    /// Of all documents.
    pub units: TextUnits,
}

/// Reads the text that a parameter names (canonical `{source, n_chars, n_tokens, …}`) and tokenizes it for a model.
///
/// # Errors
/// `Read` for a file that isn't there, isn't UTF-8 or is empty; `Tokenize` for a tokenizer that is missing, damaged, or doesn't
/// fit the model; `Param` where the text is shorter than `n_tokens`.
pub fn tokenize(context: &StageContext<'_>, source: &Value, model: &ModelInfo) -> Result<TokenizedText, StageError> {
    TextForModel::read(context.root, source, model)?.whole()
}

/// A text and the tokenizer of the model that it is for.
pub struct TextForModel<'a> {
    source: &'a Value,
    model: &'a ModelInfo,
    text: Text,
    tokenizer: ModelTokenizer,
}

impl<'a> TextForModel<'a> {
    /// Reads both.
    ///
    /// # Errors
    /// As [`tokenize`].
    pub fn read(root: &Path, source: &'a Value, model: &'a ModelInfo) -> Result<TextForModel<'a>, StageError> {
        let text = Text::read(root, source)?;
        let dir = model.tokenizer_dir.as_ref().ok_or_else(|| StageError::Tokenize {
            path: PathBuf::from(source["source"].as_str().unwrap_or("the text")),
            reason: "a model with random weights has no tokenizer; leave the text out to use random tokens".to_owned(),
        })?;
        Ok(TextForModel { source, model, text, tokenizer: ModelTokenizer::load(dir)? })
    }

    /// Tokenizes the whole text, its documents joined, with the tokenizer's special tokens or as a chat.
    ///
    /// # Errors
    /// As [`tokenize`].
    pub fn whole(&self) -> Result<TokenizedText, StageError> {
        let chat = &self.source["chat"];
        let (encoded, by) = if chat.is_null() {
            (self.encode(&self.text.joined, true)?, "tokenizer")
        } else {
            let text = self.tokenizer.chat(&conversation(&self.text.joined, chat))?;
            (self.encode(&text, false)?, "chat template")
        };
        let Encoded { ids: mut tokens, bos_id } = encoded;
        if let Some(n_tokens) = self.source["n_tokens"].as_u64().and_then(|n| usize::try_from(n).ok()) {
            if n_tokens > tokens.len() {
                let reason = format!("n_tokens {n_tokens} is more than the text's {} tokens", tokens.len());
                return Err(StageError::Param { param: "text".to_owned(), reason });
            }
            tokens.truncate(n_tokens);
        }
        Ok(TokenizedText {
            tokens,
            text_hash: blake3::hash(self.text.joined.as_bytes()).to_hex().to_string(),
            tokenizer_hash: self.tokenizer.hash().to_owned(),
            bos: bos_id.map_or_else(|| "none".to_owned(), |id| format!("added by the {by} (id {id})")),
            bos_id,
        })
    }

    /// Tokenizes each document by itself, with the tokenizer's special tokens or without.
    ///
    /// # Errors
    /// `Tokenize` as [`tokenize`], and where neither tokenizer nor model names a token to begin with; `Param` for
    /// `n_tokens`, which cuts through words whose number would then be unknown, and for `chat`.
    pub fn documents(&self, add_special_tokens: bool) -> Result<TokenizedDocuments, StageError> {
        if !self.source["n_tokens"].is_null() {
            let reason =
                "lm-eval counts words and bytes of whole documents; cut the text with n_chars instead of n_tokens";
            return Err(StageError::Param { param: "text".to_owned(), reason: reason.to_owned() });
        }
        if !self.source["chat"].is_null() {
            let reason = "lm-eval scores documents as they are, not as chats; leave out chat";
            return Err(StageError::Param { param: "text".to_owned(), reason: reason.to_owned() });
        }
        let mut documents = Vec::with_capacity(self.text.documents.len());
        let mut units = TextUnits::default();
        for span in &self.text.documents {
            let document = &self.text.joined[span.clone()];
            units = units.plus(TextUnits::of(document));
            documents.push(self.encode(document, add_special_tokens)?.ids);
        }
        Ok(TokenizedDocuments { documents, prefix_id: self.prefix_id()?, units })
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded, StageError> {
        let tokenizer = &self.tokenizer;
        let encoded = if add_special_tokens { tokenizer.encode(text)? } else { tokenizer.encode_as_is(text)? };
        let vocab_size = self.model.vocab_size;
        match encoded.ids.iter().find(|token| **token as usize >= vocab_size) {
            None => Ok(encoded),
            Some(token) => Err(tokenizer.error(format!(
                "it gives token id {token}, but the model's vocabulary has {vocab_size} entries; it belongs to another model"
            ))),
        }
    }

    /// Returns what lm-evaluation-harness puts before a document: `bos_token`, else `eos_token` of tokenizer_config.json;
    /// without such a file what the tokenizer itself adds, else the config's `bos_token_id`.
    fn prefix_id(&self) -> Result<u32, StageError> {
        let named = |name: &str| self.tokenizer.special_token_id(name);
        if let Some(id) = named("bos_token").or_else(|| named("eos_token")) {
            return Ok(id);
        }
        self.encode("a", true)?.bos_id.or(self.model.bos_token_id).ok_or_else(|| {
            self.tokenizer.error("lm-eval begins documents with BOS or EOS, but neither tokenizer nor model names one")
        })
    }
}

/// Returns the conversation that `chat` (canonical `{system}`) makes of a text: the text is what the user says.
fn conversation(text: &str, chat: &Value) -> Vec<Message> {
    let system = chat["system"].as_str().map(|system| Message { role: "system", content: system.to_owned() });
    system.into_iter().chain([Message { role: "user", content: text.to_owned() }]).collect()
}

/// A text with the places of its documents in it.
#[derive(Debug, Clone, Default, PartialEq)]
struct Text {
    joined: String,
    /// Byte ranges, in order; what lies between is `join`.
    documents: Vec<Range<usize>>,
}

impl Text {
    /// Reads every file of a canonical source. A Parquet file's rows are documents, and so are the parts of a text file
    /// between separators; parts of white space alone are none.
    fn read(root: &Path, source: &Value) -> Result<Text, StageError> {
        let names: Vec<&str> = match &source["source"] {
            Value::Array(names) => names.iter().filter_map(Value::as_str).collect(),
            one => one.as_str().into_iter().collect(),
        };
        let n_chars = source["n_chars"].as_u64().and_then(|n| usize::try_from(n).ok());
        let mut gather =
            Gather { text: Text::default(), join: source["join"].as_str().unwrap_or("\n\n"), n_chars, n: 0 };
        let mut path = PathBuf::new();
        for name in &names {
            path = fetch(name, root)
                .map_err(|error| StageError::Read { path: PathBuf::from(name), reason: error.to_string() })?;
            gather.file(&path, source["column"].as_str().unwrap_or("text"), source["separator"].as_str())?;
        }
        let fail = |reason: String| StageError::Read { path, reason };
        match n_chars {
            Some(n) if gather.n < n => {
                Err(fail(format!("n_chars {n} is more than the text's {} characters", gather.n)))
            }
            _ if gather.text.joined.is_empty() => Err(fail("the text is empty".to_owned())),
            _ => Ok(gather.text),
        }
    }
}

/// Puts documents together until there are enough characters.
struct Gather<'a> {
    text: Text,
    join: &'a str,
    n_chars: Option<usize>,
    /// Characters so far.
    n: usize,
}

impl Gather<'_> {
    fn file(&mut self, path: &Path, column: &str, separator: Option<&str>) -> Result<(), StageError> {
        let fail = |reason: String| StageError::Read { path: path.to_owned(), reason };
        if path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case("parquet")) {
            return read_text_column(path, column, &mut |row| self.push(row))
                .map_err(|error| StageError::Other(error.to_string()));
        }
        let bytes = std::fs::read(path).map_err(|error| fail(error.to_string()))?;
        let text = String::from_utf8(bytes).map_err(|error| fail(format!("not UTF-8 text ({error})")))?;
        match separator {
            None => {
                self.push(&text);
            }
            Some(separator) => {
                if !text.contains(separator) {
                    return Err(fail(format!("the separator {separator:?} is nowhere in it")));
                }
                for document in text.split(separator).filter(|document| !document.trim().is_empty()) {
                    self.push(document);
                }
            }
        }
        Ok(())
    }

    /// Appends a document; returns whether more is wanted.
    fn push(&mut self, document: &str) -> bool {
        if self.is_full() {
            return false;
        }
        if !self.text.documents.is_empty() {
            let join = self.join;
            self.append(join);
        }
        // Where the last of the characters was the join's, no document begins any more.
        if !self.is_full() {
            let begin = self.text.joined.len();
            self.append(document);
            self.text.documents.push(begin..self.text.joined.len());
        }
        !self.is_full()
    }

    fn is_full(&self) -> bool {
        self.n_chars.is_some_and(|n_chars| self.n >= n_chars)
    }

    fn append(&mut self, piece: &str) {
        let room = self.n_chars.map_or(usize::MAX, |n_chars| n_chars - self.n);
        match piece.char_indices().nth(room) {
            Some((end, _)) => {
                self.text.joined.push_str(&piece[..end]);
                self.n += room;
            }
            None => {
                self.text.joined.push_str(piece);
                self.n += piece.chars().count();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn read(dir: &Path, mut source: Value) -> Result<Text, StageError> {
        for (name, default) in [("join", json!("\n\n")), ("column", json!("text"))] {
            if source[name].is_null() {
                source[name] = default;
            }
        }
        Text::read(dir, &source)
    }

    fn documents(text: &Text) -> Vec<&str> {
        text.documents.iter().map(|span| &text.joined[span.clone()]).collect()
    }

    #[test]
    fn texts_are_cut_by_characters_and_empty_or_short_ones_are_errors() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.txt");
        std::fs::write(&path, "grüße").expect("a file");
        assert_eq!(read(dir.path(), json!({"source": "t.txt", "n_chars": 3})).expect("a text").joined, "grü");
        let error = |source: Value| read(dir.path(), source).expect_err("an error").to_string();
        assert!(error(json!({"source": "t.txt", "n_chars": 9})).contains("5 characters"));
        assert!(error(json!({"source": "t.txt", "separator": "@"})).contains("nowhere"));
        assert!(error(json!({"source": "u.txt"})).contains("no such file"));
        std::fs::write(&path, "").expect("a file");
        assert!(error(json!({"source": "t.txt"})).contains("empty"));
        std::fs::write(&path, [0xff, 0xfe]).expect("a file");
        assert!(error(json!({"source": "t.txt"})).contains("UTF-8"));
    }

    #[test]
    fn lists_and_separators_make_documents_that_are_joined() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("a.txt"), "one<|end|>two<|end|>\n").expect("a file");
        std::fs::write(dir.path().join("b.txt"), "three<|end|>four").expect("a file");
        let source = json!({"source": ["a.txt", "b.txt"], "separator": "<|end|>", "join": " + "});
        let text = read(dir.path(), source.clone()).expect("a text");
        assert_eq!(text.joined, "one + two + three + four");
        assert_eq!(documents(&text), ["one", "two", "three", "four"]);
        // Cut within a join and within a document.
        for (n_chars, expected, last) in [(10, "one + two ", "two"), (15, "one + two + thr", "thr")] {
            let mut source = source.clone();
            source["n_chars"] = json!(n_chars);
            let text = read(dir.path(), source).expect("a text");
            assert_eq!((text.joined.as_str(), documents(&text).last().copied()), (expected, Some(last)));
        }
        let text = read(dir.path(), json!({"source": ["a.txt", "b.txt"]})).expect("a text");
        assert_eq!(documents(&text), ["one<|end|>two<|end|>\n", "three<|end|>four"]);
    }
}
