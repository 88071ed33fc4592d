//! A model's tokenizer: tokenizer.json, and what the files beside it say of special tokens and chats. Precedence and defaults are those
//! of transformers 5.24.

mod account;
mod class;
mod limits;
mod rebuilt;
mod side_files;
mod special;
mod steps;

use super::chat::{ChatTemplate, Message};
use crate::event::Progress;
use crate::gguf::{GgufFile, tokenizer_config, tokenizer_json};
use crate::inference::AccountPart;
use crate::stage::StageError;
use crate::units::format_bytes;
use class::{AroundText, Class, Ends, around_in_4_57, class_of};
use limits::{Abandoned, CHAT_MEMORY_BYTES, Head, complaint, in_background, in_background_within};
use serde_json::Value;
use side_files::{SideFiles, TemplateFile, json_bytes, missing, tokenizer_file_name};
use special::special_tokens;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use steps::{StepError, Steps};
use tokenizers::Tokenizer;

/// A tokenizer with its model's conventions.
pub struct ModelTokenizer {
    steps: Arc<Steps>,
    /// tokenizer.json or a GGUF file, for error messages.
    path: PathBuf,
    hash: String,
    /// By name (`bos_token`, `eos_token`, `pad_token`, …), the tokens that a chat template may name.
    names: BTreeMap<String, String>,
    /// What is put around a text.
    around: AroundText,
    chat_template: Option<TemplateFile>,
    account: Vec<AccountPart>,
}

/// A text as tokens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Encoded {
    pub ids: Vec<u32>,
    /// The special token that was put before the text, where one was.
    pub bos_id: Option<u32>,
}

/// Accounts for the tokenizer of a model. One that cannot be read is no error: a stage may not need it.
pub fn account(model: &Path) -> Vec<AccountPart> {
    match ModelTokenizer::load(model) {
        Ok(tokenizer) => tokenizer.account,
        Err(error) => {
            let warnings = vec![format!("a stage that reads a text will fail to {error}")];
            vec![AccountPart { source: "tokenizer".to_owned(), warnings, ..AccountPart::default() }]
        }
    }
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
            let side = SideFiles::of_config(model, &config);
            let tokenizer = ModelTokenizer::new(model.to_owned(), json.as_bytes(), &side)?;
            // The keys of a GGUF file are the engine's to account for.
            return Ok(ModelTokenizer { account: Vec::new(), ..tokenizer });
        }
        let side = SideFiles::read(model)?;
        let path = model.join(tokenizer_file_name(&side));
        let bytes = match std::fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(missing(&path, model)),
            Err(error) => return Err(StageError::Tokenize { path, reason: error.to_string() }),
        };
        ModelTokenizer::new(path, &bytes, &side)
    }

    /// Makes a tokenizer from the content of tokenizer.json and of the files beside it.
    fn new(path: PathBuf, bytes: &[u8], side: &SideFiles) -> Result<ModelTokenizer, StageError> {
        let fail = |reason: String| StageError::Tokenize { path: path.clone(), reason };
        let hash = blake3::hash(bytes).to_hex().to_string();
        let json = json_bytes(&path, bytes)?;
        // Of a file that is no JSON the tokenizers crate (0.23) panics in places where it means to return an error.
        serde_json::from_slice::<serde::de::IgnoredAny>(json)
            .map_err(|error| fail(format!("not valid JSON: {error}")))?;
        let mut head: Head =
            serde_json::from_slice(json).map_err(|error| fail(format!("not a readable tokenizer ({error})")))?;
        if let Some(complaint) = complaint(&head) {
            return Err(fail(complaint));
        }
        let mut tokenizer =
            Tokenizer::from_bytes(json).map_err(|error| fail(format!("not a readable tokenizer ({error})")))?;
        tokenizer.with_truncation(None).map_err(|error| fail(error.to_string()))?;
        tokenizer.with_padding(None);
        tokenizer.set_encode_special_tokens(side.setting("split_special_tokens").as_bool().unwrap_or(false));
        let class = class_of(side, json.windows(11).any(|bytes| bytes == b"\"ByteLevel\""));
        let mut part = account::of_tokenizer_json(json, &head, &tokenizer);
        part.warnings.extend(rebuilt::adapt(&class, side, &mut head, &mut tokenizer).map_err(&fail)?);
        let special = special_tokens(side, &class, &head.added_tokens)?;
        let added = account::Added::add(&mut tokenizer, &special, &class, side.n_rows()).map_err(&fail)?;
        let id = |name: &str| special.names.get(name).and_then(|token| tokenizer.token_to_id(token));
        let (bos, eos) = (id("bos_token"), id("eos_token"));
        let own = around_by_post_processor(&tokenizer).map_err(&fail)?;
        let around = around(&class, own.clone(), bos);
        let in_4_57 = around_in_4_57(side, &own, bos, eos);
        let mut account = vec![part];
        account.extend(account::of_side_files(side, &special, &added, (&around, &in_4_57), bos));
        let steps = Steps::new(tokenizer, &head.normalizer, &head.pre_tokenizer).map_err(fail)?;
        Ok(ModelTokenizer {
            steps: Arc::new(steps),
            hash,
            names: special.names,
            around,
            chat_template: chat_template(side),
            account,
            path,
        })
    }

    /// Returns blake3 of tokenizer.json, or of what stands for it in a GGUF file.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// Returns an error that names the file.
    pub fn error(&self, reason: impl Into<String>) -> StageError {
        StageError::Tokenize { path: self.path.clone(), reason: reason.into() }
    }

    /// Tokenizes a text and puts around it what transformers puts there.
    ///
    /// # Errors
    /// `Tokenize` for a text that the tokenizer cannot encode within its bounds; `Cancelled`.
    pub fn encode(&self, text: &str, progress: &dyn Progress) -> Result<Encoded, StageError> {
        let mut ids = self.around.before.clone();
        ids.extend(self.ids(text, progress)?);
        ids.extend(&self.around.behind);
        Ok(Encoded { ids, bos_id: self.bos_id() })
    }

    /// Returns the first token that is put before a text.
    pub fn bos_id(&self) -> Option<u32> {
        self.around.before.first().copied()
    }

    /// Tokenizes a text in which special tokens are already written out, as a chat template does: nothing is added.
    ///
    /// # Errors
    /// As [`ModelTokenizer::encode`].
    pub fn encode_as_is(&self, text: &str, progress: &dyn Progress) -> Result<Encoded, StageError> {
        let ids = self.ids(text, progress)?;
        let bos = self.special_token_id("bos_token");
        let bos_id = ids.first().copied().filter(|first| bos == Some(*first));
        Ok(Encoded { ids, bos_id })
    }

    /// Renders a conversation with the model's chat template, up to where its answer begins.
    ///
    /// # Errors
    /// `Tokenize` where the model has no chat template, or it refuses the messages; `Cancelled`.
    pub fn chat(&self, messages: Vec<Message>, progress: &dyn Progress) -> Result<String, StageError> {
        let template = self.chat_template.clone().ok_or_else(|| {
            self.error(
                "chat: neither chat_template.jinja nor tokenizer_config.json has a chat template; is this an instruct model?",
            )
        })?;
        let fail = |reason: String| StageError::Tokenize { path: template.path.clone(), reason };
        let (source, special_tokens) = (template.source.clone(), self.names.clone());
        let n_bytes = messages.iter().map(|message| message.content.len()).sum();
        let rendered = in_background_within(progress, n_bytes, CHAT_MEMORY_BYTES, move |_| {
            ChatTemplate { source: &source, special_tokens: &special_tokens }.render(&messages)
        });
        match rendered {
            Ok(text) => text.map_err(|error| fail(error.to_string())),
            Err(abandoned) => Err(self.abandoned(abandoned, fail)),
        }
    }

    /// Returns the id of a token that a file names: `bos_token`, `eos_token`, ….
    pub fn special_token_id(&self, name: &str) -> Option<u32> {
        self.names.get(name).and_then(|token| self.steps.tokenizer().token_to_id(token))
    }

    /// Returns the byte of the text at which each token of [`ModelTokenizer::encode`] begins: those before the text at 0, those behind
    /// it at its end.
    ///
    /// # Errors
    /// As [`ModelTokenizer::encode`].
    pub fn starts(&self, text: &str, progress: &dyn Progress) -> Result<Vec<usize>, StageError> {
        let (steps, owned) = (Arc::clone(&self.steps), text.to_owned());
        let of_text = self.watched(text.len(), progress, move |stop| steps.starts(&owned, stop))?;
        let before = self.around.before.iter().map(|_| 0);
        Ok(before.chain(of_text).chain(self.around.behind.iter().map(|_| text.len())).collect())
    }

    fn ids(&self, text: &str, progress: &dyn Progress) -> Result<Vec<u32>, StageError> {
        let (steps, owned) = (Arc::clone(&self.steps), text.to_owned());
        self.watched(text.len(), progress, move |stop| steps.ids(&owned, stop))
    }

    /// Takes steps on a text of so many bytes in the background.
    fn watched<T: Send + 'static>(
        &self,
        n_bytes: usize,
        progress: &dyn Progress,
        steps: impl FnOnce(&AtomicBool) -> Result<T, StepError> + Send + 'static,
    ) -> Result<T, StageError> {
        match in_background(progress, n_bytes, steps) {
            Ok(Ok(found)) => Ok(found),
            Ok(Err(StepError::Stopped)) => Err(StageError::Cancelled),
            Ok(Err(error)) => Err(self.error(error.to_string())),
            Err(abandoned) => Err(self.abandoned(abandoned, |reason| self.error(reason))),
        }
    }

    fn abandoned(&self, abandoned: Abandoned, fail: impl Fn(String) -> StageError) -> StageError {
        match abandoned {
            Abandoned::Cancelled => StageError::Cancelled,
            // The thread goes on: its process is to end.
            Abandoned::TimedOut(limit) => StageError::Unstoppable(
                fail(format!(
                    "gave up after {} s: it takes far longer per MiB of text than other tokenizers",
                    limit.as_secs()
                ))
                .to_string(),
            ),
            Abandoned::OutOfBudget(bytes) => StageError::Unstoppable(
                fail(format!("gave up after {} of memory; does the template double a list?", format_bytes(bytes)))
                    .to_string(),
            ),
            Abandoned::Failed => fail("it cannot be applied to this text: its parts contradict each other".to_owned()),
        }
    }
}

/// Returns what is put around a text: by the post-processor, or by a class that decides itself.
fn around(class: &Class, own: AroundText, bos: Option<u32>) -> AroundText {
    match class.ends {
        Ends::PostProcessor => own,
        Ends::Bos => AroundText { before: bos.into_iter().collect(), behind: Vec::new() },
        Ends::Nothing => AroundText::default(),
    }
}

/// Returns what tokenizer.json's post-processor puts around a text.
fn around_by_post_processor(tokenizer: &Tokenizer) -> Result<AroundText, String> {
    let processor = serde_json::to_value(tokenizer.get_post_processor()).map_err(|error| error.to_string())?;
    let mut around = AroundText::default();
    add_around(&processor, &mut around)?;
    Ok(around)
}

fn add_around(processor: &Value, around: &mut AroundText) -> Result<(), String> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match processor["type"].as_str().unwrap_or_default() {
        "Sequence" => {
            processor["processors"].as_array().into_iter().flatten().try_for_each(|member| add_around(member, around))
        }
        "TemplateProcessing" => {
            let (mut before, mut behind, mut n_texts) = (Vec::new(), Vec::new(), 0);
            for piece in processor["single"].as_array().into_iter().flatten() {
                if let Some(token) = piece["SpecialToken"]["id"].as_str() {
                    let ids = processor["special_tokens"][token]["ids"].as_array().into_iter().flatten().filter_map(id);
                    if n_texts == 0 { before.extend(ids) } else { behind.extend(ids) }
                } else {
                    n_texts += 1;
                }
            }
            if n_texts != 1 {
                return Err(format!(
                    "its post_processor writes a text {n_texts} times; one that is written once is read"
                ));
            }
            before.append(&mut around.before);
            around.behind.append(&mut behind);
            around.before = before;
            Ok(())
        }
        "BertProcessing" | "RobertaProcessing" => {
            let token = |name: &str| id(&processor[name][1]);
            around.before.splice(0..0, token("cls"));
            around.behind.extend(token("sep"));
            Ok(())
        }
        _ => Ok(()),
    }
}

/// Returns the chat template: a file of its own goes before tokenizer_config.json's field, as in transformers.
fn chat_template(side: &SideFiles) -> Option<TemplateFile> {
    let named = |item: &Value| {
        let is_default = item["name"].as_str() == Some("default");
        item["template"].as_str().filter(|_| is_default).map(str::to_owned)
    };
    let of_config = || {
        let source = match side.setting("chat_template") {
            Value::String(template) => Some(template.clone()),
            Value::Array(templates) => templates.iter().find_map(named),
            _ => None,
        };
        let path = side.tokenizer_config.as_ref().map(|file| file.path.clone()).unwrap_or_default();
        source.map(|source| TemplateFile { path, source })
    };
    side.chat_template.clone().or_else(of_config)
}

#[cfg(test)]
mod tests;
