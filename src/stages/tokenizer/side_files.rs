//! The files beside tokenizer.json: reads them whole, a byte order mark or not, and tells what lies there where tokenizer.json does not.

use crate::stage::StageError;
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// A JSON object with the file that it comes from.
#[derive(Debug, Clone, Default)]
pub struct Fields {
    pub path: PathBuf,
    pub fields: Map<String, Value>,
}

/// A chat template with the file that it comes from.
#[derive(Debug, Clone)]
pub struct TemplateFile {
    pub path: PathBuf,
    pub source: String,
}

/// What lies beside a tokenizer.json.
#[derive(Debug, Clone, Default)]
pub struct SideFiles {
    /// tokenizer_config.json, or what stands for it in a GGUF file.
    pub tokenizer_config: Option<Fields>,
    pub special_tokens_map: Option<Fields>,
    pub added_tokens: Option<Fields>,
    pub generation_config: Option<Fields>,
    /// config.json: `model_type` and `tokenizer_class` choose the tokenizer's class.
    pub config: Option<Fields>,
    pub chat_template: Option<TemplateFile>,
    /// Files that hold chat templates and are not read.
    pub other_templates: Vec<String>,
}

impl SideFiles {
    /// Reads a model folder's.
    ///
    /// # Errors
    /// `Tokenize`, naming the file that is damaged.
    pub fn read(dir: &Path) -> Result<SideFiles, StageError> {
        let object = |name: &str| read_object(&dir.join(name));
        let chat_template = read_optional(&dir.join("chat_template.jinja"))?
            .map(|bytes| text_of(&dir.join("chat_template.jinja"), bytes))
            .transpose()?;
        let mut other_templates = Vec::new();
        if dir.join("chat_template.json").is_file() {
            other_templates.push("chat_template.json".to_owned());
        }
        if dir.join("additional_chat_templates").is_dir() {
            other_templates.push("additional_chat_templates".to_owned());
        }
        Ok(SideFiles {
            tokenizer_config: object("tokenizer_config.json")?,
            special_tokens_map: object("special_tokens_map.json")?,
            added_tokens: object("added_tokens.json")?,
            generation_config: object("generation_config.json")?,
            config: object("config.json")?,
            chat_template: chat_template.map(|source| TemplateFile { path: dir.join("chat_template.jinja"), source }),
            other_templates,
        })
    }

    /// Makes side files of what stands for tokenizer_config.json elsewhere.
    pub fn of_config(path: &Path, config: &Value) -> SideFiles {
        let fields = config.as_object().cloned().unwrap_or_default();
        let tokenizer_config = Some(Fields { path: path.to_owned(), fields });
        SideFiles { tokenizer_config, ..SideFiles::default() }
    }

    /// Returns a field of tokenizer_config.json; null where it has none.
    pub fn setting(&self, name: &str) -> &Value {
        field(self.tokenizer_config.as_ref(), name)
    }

    /// Returns a field of config.json; null where it has none.
    pub fn model_setting(&self, name: &str) -> &Value {
        field(self.config.as_ref(), name)
    }

    /// Returns the number of embeddings that config.json gives the model, where it says so.
    pub fn n_rows(&self) -> Option<u64> {
        let own = self.model_setting("vocab_size");
        own.as_u64().or_else(|| self.model_setting("text_config")["vocab_size"].as_u64())
    }
}

fn field<'a>(file: Option<&'a Fields>, name: &str) -> &'a Value {
    file.and_then(|file| file.fields.get(name)).unwrap_or(&Value::Null)
}

/// Returns the object that a file holds; none where there is no such file.
fn read_object(path: &Path) -> Result<Option<Fields>, StageError> {
    let Some(bytes) = read_optional(path)? else { return Ok(None) };
    let fail = |reason: String| StageError::Tokenize { path: path.to_owned(), reason };
    let value: Value =
        serde_json::from_slice(json_bytes(path, &bytes)?).map_err(|error| fail(format!("not valid JSON: {error}")))?;
    match value {
        Value::Object(fields) => Ok(Some(Fields { path: path.to_owned(), fields })),
        other => Err(fail(format!("it holds {}, a JSON object belongs there", kind_of(&other)))),
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Array(_) => "a list",
        Value::String(_) => "a text",
        Value::Null => "null",
        _ => "a single value",
    }
}

/// Returns JSON text without the byte order mark that some editors write before it.
///
/// # Errors
/// `Tokenize` for UTF-16, which JSON files are not read in.
pub fn json_bytes<'a>(path: &Path, bytes: &'a [u8]) -> Result<&'a [u8], StageError> {
    if bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]) {
        let reason = "it is UTF-16 text; save it as UTF-8".to_owned();
        return Err(StageError::Tokenize { path: path.to_owned(), reason });
    }
    Ok(bytes.strip_prefix(b"\xef\xbb\xbf").unwrap_or(bytes))
}

fn text_of(path: &Path, bytes: Vec<u8>) -> Result<String, StageError> {
    let text = json_bytes(path, &bytes)?;
    let fail = |error: std::str::Utf8Error| StageError::Tokenize {
        path: path.to_owned(),
        reason: format!("not UTF-8 text ({error})"),
    };
    std::str::from_utf8(text).map(str::to_owned).map_err(fail)
}

fn read_optional(path: &Path) -> Result<Option<Vec<u8>>, StageError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StageError::Tokenize { path: path.to_owned(), reason: error.to_string() }),
    }
}

/// Returns the name of the tokenizer file: tokenizer.json, or the newest version in `fast_tokenizer_files` that transformers 5.24 takes.
pub fn tokenizer_file_name(side: &SideFiles) -> String {
    const NEWEST: [u64; 3] = [5, 24, 0];
    let version = |name: &str| -> Option<[u64; 3]> {
        let numbers = name.strip_prefix("tokenizer.")?.strip_suffix(".json")?;
        let mut parts = numbers.split('.').map(|part| part.parse::<u64>().ok());
        Some([parts.next()??, parts.next().unwrap_or(Some(0))?, parts.next().unwrap_or(Some(0))?])
    };
    let names = side.setting("fast_tokenizer_files").as_array().into_iter().flatten().filter_map(Value::as_str);
    let versions = names.filter_map(|name| Some((version(name)?, name))).filter(|(version, _)| *version <= NEWEST);
    versions.max().map_or_else(|| "tokenizer.json".to_owned(), |(_, name)| name.to_owned())
}

/// Says why there is no tokenizer.json, what lies there instead and how to convert it.
pub fn missing(path: &Path, dir: &Path) -> StageError {
    let names: Vec<String> = std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let has = |name: &str| names.iter().any(|found| found == name);
    let ending = |end: &str| names.iter().find(|name| name.ends_with(end)).cloned();
    let found = if has("tokenizer.model") {
        Some("tokenizer.model (SentencePiece or tiktoken)".to_owned())
    } else if has("tekken.json") {
        Some("tekken.json (Mistral's own form)".to_owned())
    } else if has("vocab.json") && has("merges.txt") {
        Some("vocab.json and merges.txt".to_owned())
    } else {
        ending(".tiktoken").or_else(|| ending(".model")).or_else(|| has("vocab.txt").then(|| "vocab.txt".to_owned()))
    };
    let dir = dir.display();
    let reason = match found {
        Some(found) => format!(
            "there is no such file; the folder has {found}, which labpipe does not read. Convert it once: python -c \"from transformers import \
             AutoTokenizer; AutoTokenizer.from_pretrained('{dir}').save_pretrained('{dir}')\""
        ),
        None => "there is no such file, nor another tokenizer's; copy tokenizer.json and tokenizer_config.json from the model's \
                 origin"
            .to_owned(),
    };
    StageError::Tokenize { path: path.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_tokenizer_files_are_named_with_the_command_that_converts_them() {
        for (files, named) in [
            (&["tokenizer.model"][..], "tokenizer.model"),
            (&["vocab.json", "merges.txt"], "vocab.json and merges.txt"),
            (&["tekken.json"], "tekken.json"),
            (&["qwen.tiktoken"], "qwen.tiktoken"),
            (&["spiece.model"], "spiece.model"),
        ] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            for file in files {
                std::fs::write(dir.path().join(file), "x").expect("a file");
            }
            let error = missing(&dir.path().join("tokenizer.json"), dir.path()).to_string();
            assert!(error.contains(named) && error.contains("save_pretrained"), "{error}");
        }
        let dir = tempfile::tempdir().expect("a temporary folder");
        let error = missing(&dir.path().join("tokenizer.json"), dir.path()).to_string();
        assert!(!error.contains("save_pretrained") && error.contains("copy tokenizer.json"), "{error}");
    }

    #[test]
    fn versioned_tokenizer_files_are_chosen_as_transformers_chooses() {
        let named = |files: Value| {
            let config = serde_json::json!({ "fast_tokenizer_files": files });
            tokenizer_file_name(&SideFiles::of_config(Path::new("x"), &config))
        };
        assert_eq!(named(Value::Null), "tokenizer.json");
        let files =
            serde_json::json!(["tokenizer.json", "tokenizer.4.0.0.json", "tokenizer.4.10.json", "tokenizer.6.0.json"]);
        assert_eq!(named(files), "tokenizer.4.10.json");
    }

    #[test]
    fn byte_order_marks_are_taken_off_and_utf_16_is_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("tokenizer_config.json");
        std::fs::write(&path, b"\xef\xbb\xbf{\"bos_token\": \"<s>\"}").expect("a file");
        std::fs::write(dir.path().join("chat_template.jinja"), b"\xef\xbb\xbf{{ x }}").expect("a file");
        let side = SideFiles::read(dir.path()).expect("side files");
        assert_eq!(side.setting("bos_token"), "<s>");
        assert_eq!(side.chat_template.expect("a template").source, "{{ x }}");
        let utf_16: Vec<u8> = [0xfeff].into_iter().chain("{}".encode_utf16()).flat_map(u16::to_le_bytes).collect();
        std::fs::write(&path, utf_16).expect("a file");
        let error = SideFiles::read(dir.path()).expect_err("an error").to_string();
        assert!(error.contains("UTF-16") && error.contains("tokenizer_config.json"), "{error}");
        std::fs::write(&path, "[1]").expect("a file");
        assert!(SideFiles::read(dir.path()).expect_err("an error").to_string().contains("a list"));
    }
}
