//! Reads one stage's mapping against the parameter types of its kind.

use super::diagnostics::Problems;
use super::suggest::did_you_mean;
use crate::quantization;
use crate::stage::{Catalogue, ParamDefault, ParamDesc, ParamType, Params, Stage};
use crate::yaml::{Key, Node, NodeValue, Place, is_yaml_1_1_bool, resolve_plain};
use serde_json::{Map, Value, json};

/// A stage as it was read: references are still names.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    pub kind: String,
    pub params: Params,
    pub refs: Vec<Reference>,
    pub after: Vec<(String, Place)>,
}

/// A parameter that names stages.
#[derive(Debug, Clone, PartialEq)]
pub struct Reference {
    pub param: &'static str,
    pub kinds: &'static [&'static str],
    pub gathers: bool,
    pub targets: Vec<(String, Place)>,
}

/// Reads a stage whose variables are already substituted.
pub fn read_stage(name: &Key, node: &Node, catalogue: &Catalogue, problems: &mut Problems) -> Option<Draft> {
    let Some(entries) = node.as_map() else {
        let message =
            format!("stage {:?}: expected a mapping with kind: and parameters, found {}", name.text, node.describe());
        problems.add(node.at, message, None);
        return None;
    };
    let stage = stage_of(name, node, catalogue, problems)?;
    let description = stage.description();
    for (key, _) in entries {
        let known = ["kind", "after"].contains(&key.text.as_str()) || description.param(&key.text).is_some();
        if !known {
            let names = description.params.iter().map(|param| param.name).chain(["kind", "after"]);
            let message = format!("stage {:?}: {} has no parameter {:?}", name.text, description.kind, key.text);
            problems.add(key.at, message, did_you_mean(&key.text, names));
        }
    }
    let mut draft = Draft {
        kind: description.kind.to_owned(),
        params: Map::new(),
        refs: Vec::new(),
        after: node.get("after").map(|after| names(after, "after", problems)).unwrap_or_default(),
    };
    let mut is_whole = true;
    for param in description.params {
        match read_param(name, param, node, &mut draft.refs, problems) {
            Some(value) => {
                draft.params.insert(param.name.to_owned(), value);
            }
            None => is_whole = false,
        }
    }
    if !is_whole {
        return None;
    }
    stage.complete(&mut draft.params);
    for (param, message, hint) in stage.check(&draft.params) {
        let at = node.get(param).map_or(name.at, |value| value.at);
        problems.add(at, format!("stage {:?}: {message}", name.text), hint);
    }
    Some(draft)
}

fn stage_of<'a>(
    name: &Key,
    node: &Node,
    catalogue: &'a Catalogue,
    problems: &mut Problems,
) -> Option<&'a std::sync::Arc<dyn Stage>> {
    let Some(kind) = node.get("kind") else {
        let hint = Some(format!("kinds are: {}", catalogue.kinds().collect::<Vec<_>>().join(", ")));
        problems.add(name.at, format!("stage {:?} has no kind", name.text), hint);
        return None;
    };
    let text = kind.as_text().unwrap_or_default();
    let stage = catalogue.get(text);
    if stage.is_none() {
        let found = kind.as_text().map_or_else(|| kind.describe(), |text| format!("{text:?}"));
        let message = format!("stage {:?}: unknown kind {found}", name.text);
        problems.add(kind.at, message, did_you_mean(text, catalogue.kinds()));
    }
    stage
}

fn read_param(
    stage: &Key,
    param: &'static ParamDesc,
    node: &Node,
    refs: &mut Vec<Reference>,
    problems: &mut Problems,
) -> Option<Value> {
    // From outside, the word null is nothing to a number and a text to a path.
    let takes_text = matches!(
        param.ty,
        ParamType::Word | ParamType::Model | ParamType::TextSource | ParamType::QuantizationConfig | ParamType::Globs
    );
    let is_given = |value: &&Node| if takes_text { !value.is_null() } else { !value.is_null_word() };
    let Some(value) = node.get(param.name).filter(is_given) else {
        return match &param.default {
            ParamDefault::Required => {
                let message =
                    format!("stage {:?}: parameter {} is missing ({})", stage.text, param.name, expected(param));
                problems.add(stage.at, message, Some(param.help.to_owned()));
                None
            }
            ParamDefault::Absent => Some(Value::Null),
            ParamDefault::Json(text) => Some(serde_json::from_str(text).unwrap_or(Value::Null)),
        };
    };
    if let ParamType::StageRef(kinds) | ParamType::StageRefs(kinds) = param.ty {
        let gathers = matches!(param.ty, ParamType::StageRefs(_));
        let targets = names(value, param.name, problems);
        if targets.len() != 1 && !gathers {
            problems.add(value.at, format!("{}: expected the name of one stage", param.name), None);
            return None;
        }
        let listed = targets.iter().map(|(name, _)| Value::from(name.as_str())).collect();
        refs.push(Reference { param: param.name, kinds, gathers, targets });
        return Some(listed);
    }
    match convert(param, value) {
        Ok(value) => Some(value),
        Err((at, found, hint)) => {
            let message =
                format!("stage {:?}: {}: expected {}, found {found}", stage.text, param.name, expected(param));
            problems.add(at, message, hint);
            None
        }
    }
}

/// Reads a name or a list of names.
fn names(node: &Node, what: &str, problems: &mut Problems) -> Vec<(String, Place)> {
    let items = node.as_list().unwrap_or(std::slice::from_ref(node));
    let mut found = Vec::new();
    for item in items {
        match item.scalar_text() {
            Some(text) => found.push((text, item.at)),
            None => {
                problems.add(item.at, format!("{what}: expected the name of a stage, found {}", item.describe()), None)
            }
        }
    }
    found
}

/// What a parameter takes, in words, its unit included.
pub fn expected(param: &ParamDesc) -> String {
    let unit = param.unit.map(|unit| format!(" {unit}")).unwrap_or_default();
    let range =
        |min: i64, max: i64| if max == i64::MAX { format!("from {min}") } else { format!("from {min} to {max}") };
    match &param.ty {
        ParamType::Bool => "true or false".to_owned(),
        ParamType::Integer { min, max } => {
            format!("a whole number of{unit} {}", range(*min, *max)).replace("of from", "from")
        }
        ParamType::Integers { min, max } => {
            format!("a whole number of{unit} {}, or a list of them", range(*min, *max)).replace("of from", "from")
        }
        ParamType::Float { min, max } => format!("a number of{unit} from {min} to {max}").replace("of from", "from"),
        ParamType::Word => "a text".to_owned(),
        ParamType::OneOf(words) => format!("one of {}", words.join(", ")),
        ParamType::SomeOf(words) => format!("one or several of {}", words.join(", ")),
        ParamType::Globs => "a glob over module names, or a list of them".to_owned(),
        ParamType::StageRef(kinds) => format!("the name of a stage of kind {}", kinds.join(" or ")),
        ParamType::StageRefs(kinds) => format!("names of stages of kind {}", kinds.join(", ")),
        ParamType::Model => "a model folder, a GGUF file or a hub id".to_owned(),
        ParamType::RandomModel => "{config: FILE, seed: N}".to_owned(),
        ParamType::TextSource => {
            "a text file, a list of them, or {source: FILE or list, n_chars or n_tokens: N, separator, column, join}; chat: true puts it through the model's chat template"
                .to_owned()
        }
        ParamType::QuantizationConfig => "a quantization config file, or the config itself".to_owned(),
    }
}

type Mismatch = (Place, String, Option<String>);

fn convert(param: &ParamDesc, node: &Node) -> Result<Value, Mismatch> {
    let mismatch = || (node.at, node.describe(), spelling_hint(&param.ty, node));
    let int_within = |item: &Node, min: i64, max: i64| item.as_int().filter(|value| (min..=max).contains(value));
    match &param.ty {
        ParamType::Bool => node.as_bool().map(Value::from).ok_or_else(mismatch),
        ParamType::Integer { min, max } => int_within(node, *min, *max).map(Value::from).ok_or_else(mismatch),
        ParamType::Integers { min, max } => {
            each(node, |item| int_within(item, *min, *max).map(Value::from), |item| spelling_hint(&param.ty, item))
        }
        ParamType::Float { min, max } => {
            let value = node.as_float().filter(|value| value.is_finite() && (*min..=*max).contains(value));
            value.map(Value::from).ok_or_else(mismatch)
        }
        ParamType::Word | ParamType::Model => {
            node.scalar_text().filter(|text| !text.is_empty()).map(Value::from).ok_or_else(mismatch)
        }
        ParamType::OneOf(words) => {
            let text = node.as_text().unwrap_or_default();
            let unknown = || (node.at, node.describe(), nearest(text, words));
            words.contains(&text).then(|| Value::from(text)).ok_or_else(unknown)
        }
        ParamType::SomeOf(words) => {
            let known = |item: &Node| item.as_text().filter(|text| words.contains(text)).map(Value::from);
            each(node, known, |item| item.as_text().and_then(|text| nearest(text, words)))
        }
        ParamType::Globs => {
            let glob =
                |item: &Node| item.scalar_text().filter(|text| globset::Glob::new(text).is_ok()).map(Value::from);
            let hint = |item: &Node| item.as_text().map(|_| "a [ or { of a glob is not closed".to_owned());
            each(node, glob, hint)
        }
        ParamType::RandomModel => match node.as_map() {
            Some(entries) => random_model(node, entries),
            None => Err(mismatch()),
        },
        ParamType::TextSource => text_source(node),
        ParamType::QuantizationConfig if node.as_map().is_some() => {
            let value = node.to_json();
            match quantization::from_value(&value, "inline") {
                Ok(_) => Ok(value),
                Err(error) => Err((node.at, "a config with an error".to_owned(), Some(error.to_string()))),
            }
        }
        ParamType::QuantizationConfig => {
            node.scalar_text().filter(|text| !text.is_empty()).map(Value::from).ok_or_else(mismatch)
        }
        // Names of stages are read before.
        ParamType::StageRef(_) | ParamType::StageRefs(_) => Err(mismatch()),
    }
}

/// Returns how to write what was likely meant, where a value has another type than it looks like.
fn spelling_hint(ty: &ParamType, node: &Node) -> Option<String> {
    let wants_number = matches!(ty, ParamType::Integer { .. } | ParamType::Integers { .. } | ParamType::Float { .. });
    let is_number = |text: &str| matches!(resolve_plain(text), NodeValue::Int(_) | NodeValue::Float(_));
    match (ty, &node.value) {
        (ParamType::Bool, _) => {
            let text = node.as_text()?;
            if ["true", "false"].contains(&text) {
                return Some(format!("in quotes it is a text: write {text}"));
            }
            is_yaml_1_1_bool(text).then(|| format!("YAML 1.2 reads {text} as a text: write true or false"))
        }
        (_, NodeValue::Text(text)) if wants_number && is_number(text) => {
            Some(format!("in quotes it is a text: write {text}"))
        }
        (_, NodeValue::Text(_) | NodeValue::Untyped(_)) if wants_number => {
            let bare = node.as_text()?.replace('_', "");
            is_number(&bare).then(|| format!("YAML 1.2 has no underscores in numbers: write {bare}"))
        }
        (_, NodeValue::Float(value)) if wants_number && !value.is_finite() => {
            Some("a finite number is wanted".to_owned())
        }
        _ => None,
    }
}

fn nearest(text: &str, words: &[&'static str]) -> Option<String> {
    did_you_mean(text, words.iter().copied())
}

/// Reads a value, or a list of them, as a list.
fn each(
    node: &Node,
    read: impl Fn(&Node) -> Option<Value>,
    hint: impl Fn(&Node) -> Option<String>,
) -> Result<Value, Mismatch> {
    let items = node.as_list().unwrap_or(std::slice::from_ref(node));
    if items.is_empty() {
        return Err((node.at, "an empty list".to_owned(), None));
    }
    let place = |item: &Node| if item.at == Place::default() { node.at } else { item.at };
    items.iter().map(|item| read(item).ok_or_else(|| (place(item), item.describe(), hint(item)))).collect()
}

fn known_keys(entries: &[(Key, Node)], known: &[&'static str]) -> Result<(), Mismatch> {
    match entries.iter().find(|(key, _)| !known.contains(&key.text.as_str())) {
        Some((key, _)) => Err((key.at, format!("the key {:?}", key.text), nearest(&key.text, known))),
        None => Ok(()),
    }
}

fn random_model(node: &Node, entries: &[(Key, Node)]) -> Result<Value, Mismatch> {
    known_keys(entries, &["config", "seed"])?;
    let config = node.get("config").and_then(Node::scalar_text).filter(|config| !config.is_empty());
    let config = config.ok_or((node.at, "no config".to_owned(), None))?;
    let seed = match node.get("seed") {
        None => 0,
        Some(seed) => match seed.as_int().filter(|seed| *seed >= 0) {
            Some(seed) => seed,
            None => return Err((seed.at, format!("seed of {}, no whole number from 0", seed.describe()), None)),
        },
    };
    Ok(json!({ "config": config, "seed": seed }))
}

/// Reads a text: a file, a list of files, or a mapping that says more.
fn text_source(node: &Node) -> Result<Value, Mismatch> {
    const KEYS: [&str; 7] = ["source", "n_chars", "n_tokens", "separator", "column", "join", "chat"];
    let Some(entries) = node.as_map() else {
        let source = source_files(node)?;
        return Ok(json!({
            "source": source, "n_chars": null, "n_tokens": null, "separator": null, "column": "text", "join": "\n\n",
            "chat": null
        }));
    };
    known_keys(entries, &KEYS)?;
    let source = source_files(node.get("source").ok_or((node.at, "no source".to_owned(), None))?)?;
    let count = |name: &str| match node.get(name).filter(|count| !count.is_null_word()) {
        None => Ok(Value::Null),
        Some(node) => match node.as_int().filter(|count| *count > 0) {
            Some(count) => Ok(Value::from(count)),
            None => {
                let hint = spelling_hint(&ParamType::Integer { min: 1, max: i64::MAX }, node);
                Err((node.at, format!("{name} of {}", node.describe()), hint))
            }
        },
    };
    let (n_chars, n_tokens) = (count("n_chars")?, count("n_tokens")?);
    if !n_chars.is_null() && !n_tokens.is_null() {
        return Err((node.at, "both n_chars and n_tokens".to_owned(), Some("keep one of them".to_owned())));
    }
    let words = |name: &str, default: Value, may_be_empty: bool| match node.get(name).filter(|text| !text.is_null()) {
        None => Ok(default),
        Some(node) => match node.scalar_text().filter(|text| may_be_empty || !text.is_empty()) {
            Some(text) => Ok(Value::from(text)),
            None => Err((node.at, format!("{name} of {}", node.describe()), None)),
        },
    };
    let separator = words("separator", Value::Null, false)?;
    let column = words("column", Value::from("text"), false)?;
    let join = words("join", Value::from("\n\n"), true)?;
    let chat = node.get("chat").map_or(Ok(Value::Null), chat_option)?;
    if !chat.is_null() && !n_tokens.is_null() {
        let hint = "n_tokens would cut off the end of the chat template: use n_chars".to_owned();
        return Err((node.at, "both chat and n_tokens".to_owned(), Some(hint)));
    }
    Ok(json!({
        "source": source, "n_chars": n_chars, "n_tokens": n_tokens, "separator": separator, "column": column,
        "join": join, "chat": chat
    }))
}

/// Reads the name of a file, or a list of them; a list of one is that one.
fn source_files(node: &Node) -> Result<Value, Mismatch> {
    let file = |item: &Node| item.scalar_text().filter(|text| !text.is_empty()).map(Value::from);
    match each(node, file, |_| None)? {
        Value::Array(items) if items.len() == 1 => Ok(items.into_iter().next().unwrap_or_default()),
        files => Ok(files),
    }
}

/// Reads whether a text goes through the chat template: true, or what the system says; null where it doesn't.
fn chat_option(node: &Node) -> Result<Value, Mismatch> {
    if node.is_null_word() || node.as_bool() == Some(false) {
        return Ok(Value::Null);
    }
    if node.as_bool() == Some(true) {
        return Ok(json!({ "system": null }));
    }
    let Some(entries) = node.as_map() else {
        let hint = spelling_hint(&ParamType::Bool, node);
        let hint = hint.or_else(|| Some("chat: true, or chat: {system: TEXT}".to_owned()));
        return Err((node.at, format!("chat of {}", node.describe()), hint));
    };
    known_keys(entries, &["system"])?;
    match node.get("system").filter(|system| !system.is_null()) {
        None => Ok(json!({ "system": null })),
        Some(system) => match system.scalar_text() {
            Some(text) => Ok(json!({ "system": text })),
            None => Err((system.at, format!("system of {}", system.describe()), None)),
        },
    }
}
