//! Special and added tokens that the side files name, by the precedence of transformers 5.24 (`tokenization_utils_base.py`,
//! `_from_pretrained`; `tokenization_utils_tokenizers.py`, `__init__`).

use super::class::Class;
use super::side_files::{Fields, SideFiles};
use crate::stage::StageError;
use serde_json::{Map, Value};
use std::collections::{BTreeMap, BTreeSet};
use tokenizers::AddedToken;

/// The names that every tokenizer of transformers knows, in the order in which it adds their tokens.
pub const STANDARD: &[&str] =
    &["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// What the side files say of tokens.
#[derive(Debug, Clone, Default)]
pub struct SpecialTokens {
    /// Tokens by name (`bos_token`); a name that is null has none.
    pub names: BTreeMap<String, String>,
    /// Tokens to add to tokenizer.json's, in order, each with the id that its file gives it.
    pub to_add: Vec<(AddedToken, Option<u64>)>,
    /// Those of `to_add` that no file names, only the tokenizer's class.
    pub of_class: BTreeSet<String>,
    /// What a user must hear of special_tokens_map.json.
    pub map_warnings: Vec<String>,
}

/// Returns what the side files say; `own` are tokenizer.json's added tokens.
///
/// # Errors
/// `Tokenize`, naming the file, for entries that are no tokens.
pub fn special_tokens(side: &SideFiles, class: &Class, own: &[Value]) -> Result<SpecialTokens, StageError> {
    let none = Map::new();
    let config = side.tokenizer_config.as_ref().map_or(&none, |file| &file.fields);
    let decoder = config.get("added_tokens_decoder");
    let mut found = Found::default();
    for (name, value) in config {
        found.take(name, value);
    }
    match (config.get("extra_special_tokens"), config.get("additional_special_tokens")) {
        (Some(extra), _) if is_given(extra) => found.take_extra(extra, false),
        (_, Some(extra)) if is_given(extra) => found.take_extra(extra, false),
        _ => {}
    }
    let mut map_warnings = Vec::new();
    if let Some(map) = &side.special_tokens_map {
        map_warnings = compare(map, &found, decoder.is_some());
        if decoder.is_none() {
            found.take_map(&map.fields);
        }
    }
    let by_files: BTreeSet<String> =
        found.names.values().flatten().chain(&found.extra).map(|token| token.content.clone()).collect();
    for (name, token) in class.defaults {
        found.names.entry((*name).to_owned()).or_insert_with(|| Some(AddedToken::from(*token, true)));
    }
    let listed = match (decoder, &side.added_tokens) {
        (Some(decoder), _) => listed_in_decoder(side, decoder)?,
        (None, Some(file)) => listed_in_added_tokens(file, &found, own)?,
        (None, None) => Vec::new(),
    };
    let mut names: Vec<&String> = found.names.keys().collect();
    names.sort_by_key(|name| STANDARD.iter().position(|standard| standard == name).unwrap_or(STANDARD.len()));
    let named = names.into_iter().filter_map(|name| found.names[name].clone());
    let extra =
        found.extra.iter().cloned().chain(class.extra_tokens.iter().map(|token| AddedToken::from(*token, true)));
    let mut known: Vec<String> = own.iter().filter_map(|token| token["content"].as_str()).map(str::to_owned).collect();
    known.extend(listed.iter().map(|(token, _)| token.content.clone()));
    let mut of_class: BTreeSet<String> = class
        .defaults
        .iter()
        .map(|(_, token)| *token)
        .chain(class.extra_tokens.iter().copied())
        .map(str::to_owned)
        .collect();
    of_class.retain(|token| !by_files.contains(token) && !known.contains(token));
    let mut to_add = listed;
    for token in named.chain(extra) {
        if !known.contains(&token.content) {
            known.push(token.content.clone());
            to_add.push((AddedToken { special: true, ..token }, None));
        }
    }
    let text = |token: Option<AddedToken>| token.map(|token| token.content);
    let names = found.names.into_iter().filter_map(|(name, token)| Some((name, text(token)?))).collect();
    Ok(SpecialTokens { names, to_add, of_class, map_warnings })
}

/// Names and further tokens as files give them; a name that is null keeps a class from giving one.
#[derive(Default)]
struct Found {
    names: BTreeMap<String, Option<AddedToken>>,
    extra: Vec<AddedToken>,
    has_extra: bool,
}

impl Found {
    fn take(&mut self, name: &str, value: &Value) {
        if !name.ends_with("_token") {
            return;
        }
        match token_of(value) {
            Some(token) => _ = self.names.insert(name.to_owned(), Some(token)),
            None if value.is_null() && STANDARD.contains(&name) => _ = self.names.insert(name.to_owned(), None),
            None => {}
        }
    }

    /// Takes a list of tokens, or a mapping of names to them.
    fn take_extra(&mut self, value: &Value, adds: bool) {
        match value {
            Value::Array(items) => {
                if !adds {
                    self.extra.clear();
                }
                self.has_extra = true;
                for token in items.iter().filter_map(token_of) {
                    if self.extra.iter().all(|known| known.content != token.content) {
                        self.extra.push(token);
                    }
                }
            }
            Value::Object(named) if token_of(value).is_none() => {
                for (name, value) in named {
                    if let Some(token) = token_of(value) {
                        self.names.insert(name.clone(), Some(token));
                    }
                }
            }
            _ => {}
        }
    }

    /// Takes special_tokens_map.json, whose names go before tokenizer_config.json's.
    fn take_map(&mut self, map: &Map<String, Value>) {
        let had_extra = self.has_extra;
        for (name, value) in map {
            match name.as_str() {
                "extra_special_tokens" => self.take_extra(value, true),
                "additional_special_tokens" if !had_extra => self.take_extra(value, true),
                name => self.take(name, value),
            }
        }
    }
}

fn is_given(value: &Value) -> bool {
    match value {
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        _ => false,
    }
}

/// Returns a token that is written as its text or as a mapping that describes it.
fn token_of(value: &Value) -> Option<AddedToken> {
    let flag = |name: &str| value[name].as_bool();
    match value {
        Value::String(text) => Some(AddedToken::from(text.clone(), true)),
        Value::Object(fields) => {
            let content = fields.get("content")?.as_str()?;
            let special = flag("special").unwrap_or(false);
            Some(AddedToken {
                content: content.to_owned(),
                single_word: flag("single_word").unwrap_or(false),
                lstrip: flag("lstrip").unwrap_or(false),
                rstrip: flag("rstrip").unwrap_or(false),
                normalized: flag("normalized").unwrap_or(!special),
                special,
            })
        }
        _ => None,
    }
}

/// Returns the tokens of `added_tokens_decoder`, by id.
fn listed_in_decoder(side: &SideFiles, decoder: &Value) -> Result<Vec<(AddedToken, Option<u64>)>, StageError> {
    let path = side.tokenizer_config.as_ref().map(|file| file.path.clone()).unwrap_or_default();
    let fail = |reason: String| StageError::Tokenize { path: path.clone(), reason };
    let mut listed = BTreeMap::new();
    for (id, value) in decoder.as_object().into_iter().flatten() {
        let number: u64 = id.parse().map_err(|_| fail(format!("added_tokens_decoder: {id:?} is no token id")))?;
        let token = Some(value).filter(|value| value.is_object()).and_then(token_of);
        let token = token.ok_or_else(|| {
            fail(format!(
                "added_tokens_decoder: {id} is {value}; a mapping with content, special, lstrip, … belongs there"
            ))
        })?;
        listed.insert(number, token);
    }
    Ok(listed.into_iter().map(|(id, token)| (token, Some(id))).collect())
}

/// Returns the tokens of added_tokens.json, by id. Where tokenizer.json has the same id, it goes first.
fn listed_in_added_tokens(
    file: &Fields,
    found: &Found,
    own: &[Value],
) -> Result<Vec<(AddedToken, Option<u64>)>, StageError> {
    let is_special = |token: &str| {
        let standard = STANDARD.iter().filter_map(|name| found.names.get(*name)?.as_ref());
        standard.chain(&found.extra).any(|special| special.content == token)
    };
    let own_ids: Vec<u64> = own.iter().filter_map(|token| token["id"].as_u64()).collect();
    let mut listed = BTreeMap::new();
    for (token, id) in &file.fields {
        let id = id.as_u64().ok_or_else(|| StageError::Tokenize {
            path: file.path.clone(),
            reason: format!("{token:?} is {id}, a token id belongs there"),
        })?;
        if !own_ids.contains(&id) {
            listed.insert(id, AddedToken::from(token.clone(), is_special(token)));
        }
    }
    Ok(listed.into_iter().map(|(id, token)| (token, Some(id))).collect())
}

/// Says where special_tokens_map.json and tokenizer_config.json name different tokens, and which is taken.
fn compare(map: &Fields, config: &Found, is_ignored: bool) -> Vec<String> {
    let mut warnings = Vec::new();
    for name in STANDARD {
        let Some(value) = map.fields.get(*name) else { continue };
        let (own, other) = (token_of(value).map(|token| token.content), config.names.get(*name));
        let Some(Some(other)) = other.map(|token| token.as_ref().map(|token| token.content.clone())) else {
            if is_ignored && own.is_some() {
                let own = own.unwrap_or_default();
                warnings.push(format!(
                    "its {name} {own:?} is not used: tokenizer_config.json has added_tokens_decoder, and names alone count then, as in \
                     transformers"
                ));
            }
            continue;
        };
        if own.as_ref() != Some(&other) {
            let own = own.map_or_else(|| "null".to_owned(), |own| format!("{own:?}"));
            warnings.push(if is_ignored {
                format!("its {name} {own} is not used: tokenizer_config.json says {other:?} and has added_tokens_decoder, as in transformers")
            } else {
                format!("its {name} {own} is used and tokenizer_config.json's {other:?} is not, as in transformers")
            });
        }
    }
    warnings
}
