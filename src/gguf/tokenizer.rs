//! The tokenizer that a GGUF file carries, as the text of a tokenizer.json: byte-level BPE (`gpt2`) and SentencePiece's (`llama`).

use super::error::GgufError;
use super::file::GgufFile;
use super::metadata::MetaValue;
use super::pre_tokenizer::Rule;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;

/// A vocabulary of more entries than this is taken for damage.
const MAX_TOKENS: usize = 1 << 22;
/// The longest piece of a SentencePiece vocabulary: its merges are found by trying every way to cut it.
const MAX_PIECE_BYTES: usize = 512;

// Values of `tokenizer.ggml.token_type`.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;

/// What SentencePiece writes for a space.
const SPACE: &str = "\u{2581}";

/// Returns the tokenizer of a file as the text of a tokenizer.json.
///
/// # Errors
/// `Tokenizer` where there is none or it is of a kind that labpipe doesn't know, `Metadata` where its parts don't fit together.
pub fn tokenizer_json(file: &GgufFile) -> Result<String, GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    let tokenizer = match file.text("tokenizer.ggml.model") {
        Some("gpt2") => vocabulary.byte_level()?,
        Some("llama") => vocabulary.sentence_piece()?,
        Some(other) => {
            return Err(fail(
                file,
                format!("its kind {other:?} is not read; labpipe reads gpt2 (BPE) and llama (SPM)"),
            ));
        }
        None => return Err(fail(file, "tokenizer.ggml.model is missing".to_owned())),
    };
    Ok(tokenizer.to_string())
}

/// Returns what a tokenizer_config.json would say of a file: `bos_token`, `eos_token` and `chat_template`, those that it has. Whether
/// BOS and EOS are added stands in [`tokenizer_json`].
///
/// # Errors
/// As [`tokenizer_json`].
pub fn tokenizer_config(file: &GgufFile) -> Result<Value, GgufError> {
    let vocabulary = Vocabulary::read(file)?;
    let mut config = Map::new();
    for (name, key) in [("bos_token", "tokenizer.ggml.bos_token_id"), ("eos_token", "tokenizer.ggml.eos_token_id")] {
        // Some files hold ids outside their vocabulary for tokens that they don't have, and say that those aren't added.
        if let Ok(Some((token, _))) = vocabulary.special(key) {
            config.insert(name.to_owned(), Value::from(token));
        }
    }
    if let Some(template) = file.text("tokenizer.chat_template") {
        config.insert("chat_template".to_owned(), Value::from(template));
    }
    Ok(Value::Object(config))
}

fn fail(file: &GgufFile, reason: String) -> GgufError {
    GgufError::Tokenizer { path: file.path().to_owned(), reason }
}

struct Vocabulary<'a> {
    file: &'a GgufFile,
    /// By id.
    tokens: Vec<&'a str>,
    /// By id; `NORMAL` where the file has no types.
    types: Vec<u64>,
    /// A text's first id: some files hold one twice.
    ids: BTreeMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read(file: &'a GgufFile) -> Result<Vocabulary<'a>, GgufError> {
        const TOKENS: &str = "tokenizer.ggml.tokens";
        const TYPES: &str = "tokenizer.ggml.token_type";
        let tokens = file.texts(TOKENS)?.ok_or_else(|| fail(file, format!("{TOKENS} is missing")))?;
        if tokens.is_empty() || tokens.len() > MAX_TOKENS {
            return Err(file.metadata_error(TOKENS, format!("{} tokens are no vocabulary", tokens.len())));
        }
        let types = match file.numbers(TYPES)? {
            Some(types) if types.len() == tokens.len() => types.iter().map(|ty| ty.as_u64().unwrap_or(0)).collect(),
            Some(types) => {
                let reason = format!("{} types for {} tokens", types.len(), tokens.len());
                return Err(file.metadata_error(TYPES, reason));
            }
            None => vec![NORMAL; tokens.len()],
        };
        let mut ids = BTreeMap::new();
        for (id, token) in tokens.iter().enumerate() {
            ids.entry(*token).or_insert(id);
        }
        Ok(Vocabulary { file, tokens, types, ids })
    }

    fn flag(&self, key: &str, default: bool) -> Result<bool, GgufError> {
        match self.file.get(key) {
            None => Ok(default),
            Some(MetaValue::Bool(value)) => Ok(*value),
            Some(_) => Err(self.file.metadata_error(key, "expected true or false")),
        }
    }

    /// Returns the special token whose id stands under a key.
    fn special(&self, key: &str) -> Result<Option<(&'a str, usize)>, GgufError> {
        let Some(value) = self.file.get(key) else { return Ok(None) };
        let id = value.as_u64().and_then(|id| usize::try_from(id).ok());
        let token = id.and_then(|id| Some((*self.tokens.get(id)?, id)));
        token.map(Some).ok_or_else(|| self.file.metadata_error(key, "it is no id of the vocabulary"))
    }

    fn vocab_json(&self) -> Value {
        let mut by_id: Vec<(&str, usize)> = self.ids.iter().map(|(token, id)| (*token, *id)).collect();
        by_id.sort_by_key(|(_, id)| *id);
        Value::Object(by_id.into_iter().map(|(token, id)| (token.to_owned(), Value::from(id))).collect())
    }

    /// Returns the tokens that are found in a text as they stand.
    fn added_tokens(&self) -> Value {
        let is_added = |id: usize| [UNKNOWN, CONTROL, USER_DEFINED].contains(&self.types[id]);
        let added = self
            .tokens
            .iter()
            .enumerate()
            .filter(|(id, token)| is_added(*id) && !token.is_empty() && self.ids.get(*token) == Some(id));
        let is_phi3 = self.is_phi3();
        let token = |(id, content): (usize, &&str)| {
            let rstrip = is_phi3 && !["<unk>", "<s>", "<|endoftext|>"].contains(content);
            json!({
                "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": rstrip, "normalized": false,
                "special": self.types[id] != USER_DEFINED,
            })
        };
        Value::Array(added.map(token).collect())
    }

    /// Returns true for Phi-3's SentencePiece vocabulary: its special tokens take the white space behind them. No key says so; llama.cpp
    /// too goes by the model's name.
    fn is_phi3(&self) -> bool {
        let name = self.file.text("general.name").unwrap_or_default().to_lowercase();
        let is_named = self.file.text("general.architecture") == Some("phi3")
            || ["phi-3", "phi3", "phi 3"].iter().any(|part| name.contains(part));
        is_named && self.file.text("tokenizer.ggml.model") == Some("llama")
    }

    /// Returns what puts BOS before and EOS after a text; null where neither is added.
    fn post_processor(&self, adds_bos: bool) -> Result<Value, GgufError> {
        let mut template = vec![json!({ "Sequence": { "id": "A", "type_id": 0 } })];
        let mut special_tokens = Map::new();
        for (flag, default, key, at_front) in [
            ("tokenizer.ggml.add_bos_token", adds_bos, "tokenizer.ggml.bos_token_id", true),
            ("tokenizer.ggml.add_eos_token", false, "tokenizer.ggml.eos_token_id", false),
        ] {
            if !self.flag(flag, default)? {
                continue;
            }
            let Some((token, id)) = self.special(key)? else { continue };
            let piece = json!({ "SpecialToken": { "id": token, "type_id": 0 } });
            if at_front {
                template.insert(0, piece);
            } else {
                template.push(piece);
            }
            special_tokens.insert(token.to_owned(), json!({ "id": token, "ids": [id], "tokens": [token] }));
        }
        if special_tokens.is_empty() {
            return Ok(Value::Null);
        }
        let second = json!([{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }]);
        Ok(json!({
            "type": "TemplateProcessing", "single": template, "pair": second, "special_tokens": special_tokens,
        }))
    }

    fn byte_level(&self) -> Result<Value, GgufError> {
        const MERGES: &str = "tokenizer.ggml.merges";
        const PRE: &str = "tokenizer.ggml.pre";
        let name = self.file.text(PRE).unwrap_or_default();
        let rule = Rule::named(name).ok_or_else(|| {
            let known = Rule::known_names();
            fail(self.file, format!("{PRE} {name:?}, the rule that cuts text into words, is not known ({known} are)"))
        })?;
        let merges = self.file.texts(MERGES)?.ok_or_else(|| fail(self.file, format!("{MERGES} is missing")))?;
        let pairs: Option<Vec<Value>> =
            merges.iter().map(|merge| merge.split_once(' ').map(|(left, right)| json!([left, right]))).collect();
        let pairs = pairs.ok_or_else(|| self.file.metadata_error(MERGES, "a merge is not two tokens"))?;
        let normalizer = if rule.composes { json!({ "type": "NFC" }) } else { Value::Null };
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false,
            "ignore_merges": rule.ignores_merges, "vocab": self.vocab_json(), "merges": pairs,
        });
        let decoder = json!({ "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true });
        self.assemble(normalizer, rule.to_json(), self.post_processor(rule.adds_bos)?, decoder, model)
    }

    fn sentence_piece(&self) -> Result<Value, GgufError> {
        let prefixes = self.flag("tokenizer.ggml.add_space_prefix", true)?;
        let mut normalizers = vec![json!({ "type": "Replace", "pattern": { "String": " " }, "content": SPACE })];
        let mut decoders = vec![
            json!({ "type": "Replace", "pattern": { "String": SPACE }, "content": " " }),
            json!({ "type": "ByteFallback" }),
            json!({ "type": "Fuse" }),
        ];
        if prefixes {
            normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
            decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
        }
        let unknown = match self.special("tokenizer.ggml.unknown_token_id")? {
            Some((token, _)) => Some(token),
            None => self.types.iter().position(|ty| *ty == UNKNOWN).map(|id| self.tokens[id]),
        };
        let model = json!({
            "type": "BPE", "dropout": null, "unk_token": unknown, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": self.ids.contains_key("<0x00>"),
            "ignore_merges": false, "vocab": self.vocab_json(), "merges": self.merges()?,
        });
        let normalizer = json!({ "type": "Sequence", "normalizers": normalizers });
        let decoder = json!({ "type": "Sequence", "decoders": decoders });
        self.assemble(normalizer, Value::Null, self.post_processor(true)?, decoder, model)
    }

    fn assemble(
        &self,
        normalizer: Value,
        pre_tokenizer: Value,
        post_processor: Value,
        decoder: Value,
        model: Value,
    ) -> Result<Value, GgufError> {
        Ok(json!({
            "version": "1.0", "truncation": null, "padding": null, "added_tokens": self.added_tokens(),
            "normalizer": normalizer, "pre_tokenizer": pre_tokenizer, "post_processor": post_processor,
            "decoder": decoder, "model": model,
        }))
    }

    /// Returns the merges that a SentencePiece vocabulary implies: it joins the two neighbours whose union has the best score. So
    /// every way to cut a piece into two pieces is a merge, ranked by the score of the whole.
    fn merges(&self) -> Result<Vec<Value>, GgufError> {
        const SCORES: &str = "tokenizer.ggml.scores";
        let scores = self.file.numbers(SCORES)?.unwrap_or_default();
        if scores.len() != self.tokens.len() {
            let reason = format!("{} scores for {} tokens", scores.len(), self.tokens.len());
            return Err(self.file.metadata_error(SCORES, reason));
        }
        let is_piece = |id: usize| self.types[id] == NORMAL;
        let mut merges = Vec::new();
        for (id, piece) in self.tokens.iter().enumerate().filter(|(id, _)| is_piece(*id)) {
            if piece.len() > MAX_PIECE_BYTES {
                return Err(fail(self.file, format!("token {id} has {} bytes; no piece is that long", piece.len())));
            }
            let score = scores[id].as_f64().filter(|score| !score.is_nan());
            let score = score.ok_or_else(|| self.file.metadata_error(SCORES, format!("the score of {id} is NaN")))?;
            for (at, _) in piece.char_indices().skip(1) {
                let (left, right) = piece.split_at(at);
                if let (Some(l), Some(r)) = (self.ids.get(left), self.ids.get(right))
                    && is_piece(*l)
                    && is_piece(*r)
                {
                    merges.push((score, *l, *r, left, right));
                }
            }
        }
        merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((a.1, a.2).cmp(&(b.1, b.2))));
        Ok(merges.into_iter().map(|(_, _, _, left, right)| json!([left, right])).collect())
    }
}
