//! Texts as tokens: reads a text source and tokenizes it with the model's own tokenizer.json.

mod chunks;
mod source;

use super::chat::Message;
use super::tokenizer::{Encoded, ModelTokenizer};
use crate::event::{Level, Progress};
use crate::inference::ModelInfo;
use crate::metrics::TextUnits;
use crate::stage::{StageContext, StageError};
use serde_json::Value;
use source::{Text, Wanted};
use std::cell::OnceCell;
use std::path::{Path, PathBuf};

/// Bytes of a text that are tokenized at first where only its beginning is wanted.
const MIN_HEAD_BYTES: usize = 1 << 16;
/// Bytes tried at first per token that is wanted.
const HEAD_BYTES_PER_TOKEN: usize = 8;
/// Tokens that must follow those that are wanted: the last ones before a cut may be others than in the whole text.
const MARGIN_TOKENS: usize = 64;

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
    /// Index of the first token of each of the text's documents; the first is 0.
    pub document_starts: Vec<usize>,
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

/// Returns the first `n` tokens of a text, or all where it has fewer. No more of it is read than they need.
///
/// # Errors
/// As [`tokenize`].
pub fn first_tokens(
    context: &StageContext<'_>,
    source: &Value,
    model: &ModelInfo,
    n: usize,
) -> Result<Vec<u32>, StageError> {
    let mut tokens = TextForModel::open(context, source, model)?.tokens(Some(n), false)?.tokens;
    tokens.truncate(n);
    Ok(tokens)
}

/// Reads the text that a parameter names (canonical `{source, n_chars, n_tokens, …}`) and tokenizes it for a model: all of it, or as
/// much as `at_most` tokens need.
///
/// # Errors
/// `Read` for a file that isn't there, isn't UTF-8 or is empty; `Tokenize` for a tokenizer that is missing, damaged, or doesn't
/// fit the model; `Param` where the text is shorter than `n_tokens`; `Cancelled`.
pub fn tokenize(
    context: &StageContext<'_>,
    source: &Value,
    model: &ModelInfo,
    at_most: Option<usize>,
) -> Result<TokenizedText, StageError> {
    TextForModel::open(context, source, model)?.tokens(at_most, true)
}

/// A text and the tokenizer of the model that it is for.
pub struct TextForModel<'a> {
    root: &'a Path,
    source: &'a Value,
    model: &'a ModelInfo,
    tokenizer: ModelTokenizer,
    progress: &'a dyn Progress,
    /// Read when first needed.
    text: OnceCell<Text>,
}

impl<'a> TextForModel<'a> {
    /// Reads the tokenizer.
    ///
    /// # Errors
    /// As [`tokenize`].
    pub fn open(
        context: &StageContext<'a>,
        source: &'a Value,
        model: &'a ModelInfo,
    ) -> Result<TextForModel<'a>, StageError> {
        let dir = model.tokenizer_dir.as_ref().ok_or_else(|| StageError::Tokenize {
            path: PathBuf::from(source["source"].as_str().unwrap_or("the text")),
            reason: "a model with random weights has no tokenizer; leave the text out to use random tokens".to_owned(),
        })?;
        let tokenizer = ModelTokenizer::load(dir)?;
        let (root, progress) = (context.root, context.progress);
        Ok(TextForModel { root, source, model, tokenizer, progress, text: OnceCell::new() })
    }

    /// Tokenizes the whole text, its documents joined, with the tokenizer's special tokens or as a chat; no more of it than its
    /// `n_tokens`.
    ///
    /// # Errors
    /// As [`tokenize`].
    pub fn whole(&self) -> Result<TokenizedText, StageError> {
        self.tokens(None, true)
    }

    /// Tokenizes as much of the text as `n_tokens`, else `at_most`, ask for. A chat is always rendered whole. Without `hash` the text's
    /// hash may be missing.
    fn tokens(&self, at_most: Option<usize>, hash: bool) -> Result<TokenizedText, StageError> {
        let n_tokens = self.source["n_tokens"].as_u64().and_then(|n| usize::try_from(n).ok());
        let chat = &self.source["chat"];
        let (encoded, by, text_hash, document_starts) = if !chat.is_null() {
            let text = self.text()?;
            let rendered = self.tokenizer.chat(conversation(&text.joined, chat), self.progress)?;
            (self.encode(&rendered, false)?, "chat template", text.hash.clone(), vec![0])
        } else if let Some(n) = n_tokens.or(at_most) {
            let (encoded, found) = self.head(n, hash)?;
            // A text without a hash is not scored.
            let starts = if hash { self.document_starts(&found)? } else { vec![0] };
            (encoded, "tokenizer", found.hash, starts)
        } else {
            let text = self.text()?;
            (self.encode(&text.joined, true)?, "tokenizer", text.hash.clone(), self.document_starts(text)?)
        };
        let Encoded { ids: mut tokens, bos_id } = encoded;
        if let Some(n_tokens) = n_tokens {
            if n_tokens > tokens.len() {
                let reason = format!("n_tokens {n_tokens} is more than the text's {} tokens", tokens.len());
                return Err(StageError::Param { param: "text".to_owned(), reason });
            }
            tokens.truncate(n_tokens);
        }
        Ok(TokenizedText {
            tokens,
            text_hash: text_hash.unwrap_or_default(),
            tokenizer_hash: self.tokenizer.hash().to_owned(),
            bos: bos_id.map_or_else(|| "none".to_owned(), |id| format!("added by the {by} (id {id})")),
            bos_id,
            document_starts,
        })
    }

    /// Returns the index of each document's first token; what joins two documents belongs to the first of them, and rows
    /// of white space alone are none.
    fn document_starts(&self, text: &Text) -> Result<Vec<usize>, StageError> {
        let is_text = |span: &&std::ops::Range<usize>| !text.joined[(*span).clone()].trim().is_empty();
        let spans: Vec<_> = text.documents.iter().filter(is_text).collect();
        if spans.len() < 2 {
            return Ok(vec![0]);
        }
        let starts = self.tokenizer.starts(&text.joined, self.progress)?;
        let later = spans[1..].iter().map(|span| starts.partition_point(|start| *start < span.start));
        Ok([0].into_iter().chain(later).collect())
    }

    /// Returns the whole text.
    fn text(&self) -> Result<&Text, StageError> {
        if let Some(text) = self.text.get() {
            return Ok(text);
        }
        let text = self.read(Wanted::ALL)?;
        self.tell(&text);
        Ok(self.text.get_or_init(|| text))
    }

    fn read(&self, wanted: Wanted) -> Result<Text, StageError> {
        Text::read(self.root, self.source, wanted, self.progress)
    }

    fn tell(&self, text: &Text) {
        for warning in &text.warnings {
            self.progress.note(Level::Warning, warning);
        }
    }

    /// Returns the first `n` tokens of the whole text, or all where there are fewer, and what was read of the text, with the whole
    /// text's hash. It tokenizes a
    /// beginning that gives more than `n` tokens, then one of twice the length, until both begin with the same `n` tokens.
    fn head(&self, n: usize, with_hash: bool) -> Result<(Encoded, Text), StageError> {
        let mut n_bytes = n.saturating_mul(HEAD_BYTES_PER_TOKEN).max(MIN_HEAD_BYTES);
        let (mut before, mut hash, mut is_first): (Option<Vec<u32>>, Option<String>, bool) = (None, None, true);
        loop {
            let mut text = self.read(Wanted { n_bytes: Some(n_bytes), hash: with_hash && is_first })?;
            if std::mem::take(&mut is_first) {
                self.tell(&text);
                hash = text.hash.take();
            }
            let mut encoded = self.encode(&text.joined, true)?;
            text.hash.clone_from(&hash);
            if text.is_whole {
                return Ok((encoded, text));
            }
            if encoded.ids.len() >= n.saturating_add(MARGIN_TOKENS) {
                encoded.ids.truncate(n);
                if before.as_ref() == Some(&encoded.ids) {
                    return Ok((encoded, text));
                }
                before = Some(encoded.ids);
            }
            n_bytes = n_bytes.saturating_mul(2);
        }
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
        let text = self.text()?;
        let mut documents = Vec::with_capacity(text.documents.len());
        let mut units = TextUnits::default();
        for span in &text.documents {
            let document = &text.joined[span.clone()];
            units = units.plus(TextUnits::of(document));
            documents.push(self.encode(document, add_special_tokens)?.ids);
        }
        Ok(TokenizedDocuments { documents, prefix_id: self.prefix_id()?, units })
    }

    fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Encoded, StageError> {
        let tokenizer = &self.tokenizer;
        let encoded = if add_special_tokens {
            tokenizer.encode(text, self.progress)?
        } else {
            tokenizer.encode_as_is(text, self.progress)?
        };
        encoded.ids.iter().try_for_each(|token| self.check_id(*token, "a text holds"))?;
        Ok(encoded)
    }

    fn check_id(&self, token: u32, what: &str) -> Result<(), StageError> {
        let vocab_size = self.model.vocab_size;
        if (token as usize) < vocab_size {
            return Ok(());
        }
        Err(self.tokenizer.error(format!(
            "{what} token id {token}, but the model's vocabulary has {vocab_size} entries (vocab_size of config.json); the tokenizer belongs to \
             another model, or names tokens that this one was not trained with"
        )))
    }

    /// Returns what lm-evaluation-harness puts before a document: the tokenizer's `bos_token`, else its `eos_token`; where no file names
    /// them what the tokenizer itself adds, else the config's `bos_token_id`.
    fn prefix_id(&self) -> Result<u32, StageError> {
        let named = |name: &str| self.tokenizer.special_token_id(name);
        let found = named("bos_token").or_else(|| named("eos_token"));
        let id = found.or_else(|| self.tokenizer.bos_id()).or(self.model.bos_token_id).ok_or_else(|| {
            self.tokenizer.error("lm-eval begins documents with BOS or EOS, but neither tokenizer nor model names one")
        })?;
        self.check_id(id, "lm-eval begins documents with")?;
        Ok(id)
    }
}

/// Returns the conversation that `chat` (canonical `{system}`) makes of a text: the text is what the user says.
fn conversation(text: &str, chat: &Value) -> Vec<Message> {
    let system = chat["system"].as_str().map(|system| Message { role: "system", content: system.to_owned() });
    system.into_iter().chain([Message { role: "user", content: text.to_owned() }]).collect()
}
