//! Reads one stage's mapping against the parameter types of its kind.

use super::diagnostics::Problems;
use super::matrix::is_null;
use super::node::{Key, Node, NodeValue, Place};
use super::suggest::did_you_mean;
use crate::quantization;
use crate::stage::{Catalogue, ParamDefault, ParamDesc, ParamType, Params, Stage};
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
    let Some(value) = node.get(param.name).filter(|value| !is_null(value)) else {
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
        match item.as_text() {
            Some(text) => found.push((text.to_owned(), item.at)),
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
        ParamType::Float { min, max } => format!("a number{unit} from {min} to {max}"),
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
    let mismatch = || Err((node.at, node.describe(), None));
    match (&param.ty, &node.value) {
        (ParamType::Bool, NodeValue::Bool(value)) => Ok(Value::from(*value)),
        (ParamType::Integer { min, max }, NodeValue::Int(value)) if (min..=max).contains(&value) => {
            Ok(Value::from(*value))
        }
        (ParamType::Integers { min, max }, _) => {
            each(node, |item| matches!(&item.value, NodeValue::Int(value) if (min..=max).contains(&value)))
        }
        (ParamType::Float { min, max }, NodeValue::Float(value)) if (*min..=*max).contains(value) => {
            Ok(Value::from(*value))
        }
        (ParamType::Float { min, max }, NodeValue::Int(value)) if (*min..=*max).contains(&(*value as f64)) => {
            Ok(Value::from(*value as f64))
        }
        (ParamType::Word | ParamType::Model, _) => match node.scalar_text().filter(|text| !text.is_empty()) {
            Some(text) => Ok(Value::from(text)),
            None => mismatch(),
        },
        (ParamType::OneOf(words), NodeValue::Text(text)) => {
            let known = words.contains(&text.as_str());
            if known { Ok(Value::from(text.as_str())) } else { Err((node.at, node.describe(), nearest(text, words))) }
        }
        (ParamType::SomeOf(words), _) => each(node, |item| item.as_text().is_some_and(|text| words.contains(&text)))
            .map_err(|(at, found, _)| (at, found, node.as_text().and_then(|text| nearest(text, words)))),
        (ParamType::Globs, _) => each(node, |item| item.as_text().is_some_and(|text| globset::Glob::new(text).is_ok())),
        (ParamType::RandomModel, NodeValue::Map(entries)) => random_model(node, entries),
        (ParamType::TextSource, _) => text_source(node),
        (ParamType::QuantizationConfig, NodeValue::Text(text)) if !text.is_empty() => Ok(Value::from(text.as_str())),
        (ParamType::QuantizationConfig, NodeValue::Map(_)) => {
            let value = node.to_json();
            match quantization::from_value(&value, "inline") {
                Ok(_) => Ok(value),
                Err(error) => Err((node.at, "a config with an error".to_owned(), Some(error.to_string()))),
            }
        }
        _ => mismatch(),
    }
}

fn nearest(text: &str, words: &[&'static str]) -> Option<String> {
    did_you_mean(text, words.iter().copied())
}

/// Reads a value, or a list of them, as a list.
fn each(node: &Node, fits: impl Fn(&Node) -> bool) -> Result<Value, Mismatch> {
    let items = node.as_list().unwrap_or(std::slice::from_ref(node));
    match items.iter().find(|item| !fits(item)) {
        Some(item) => Err((item.at, item.describe(), None)),
        None if items.is_empty() => Err((node.at, "an empty list".to_owned(), None)),
        None => Ok(items.iter().map(Node::to_json).collect()),
    }
}

fn known_keys(entries: &[(Key, Node)], known: &[&'static str]) -> Result<(), Mismatch> {
    match entries.iter().find(|(key, _)| !known.contains(&key.text.as_str())) {
        Some((key, _)) => Err((key.at, format!("the key {:?}", key.text), nearest(&key.text, known))),
        None => Ok(()),
    }
}

fn random_model(node: &Node, entries: &[(Key, Node)]) -> Result<Value, Mismatch> {
    known_keys(entries, &["config", "seed"])?;
    let config = node.get("config").and_then(Node::as_text).ok_or((node.at, "no config".to_owned(), None))?;
    let seed = match node.get("seed").map(|seed| &seed.value) {
        None => 0,
        Some(NodeValue::Int(seed)) if *seed >= 0 => *seed,
        Some(_) => return Err((node.at, "a seed that is no whole number from 0".to_owned(), None)),
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
    let count = |name: &str| match node.get(name).map(|count| (&count.value, count)) {
        None | Some((NodeValue::Null, _)) => Ok(Value::Null),
        Some((NodeValue::Int(count), _)) if *count > 0 => Ok(Value::from(*count)),
        Some((_, count)) => Err((count.at, format!("{name} of {}", count.describe()), None)),
    };
    let (n_chars, n_tokens) = (count("n_chars")?, count("n_tokens")?);
    if !n_chars.is_null() && !n_tokens.is_null() {
        return Err((node.at, "both n_chars and n_tokens".to_owned(), Some("keep one of them".to_owned())));
    }
    let words = |name: &str, default: Value, may_be_empty: bool| match node.get(name).map(|text| (&text.value, text)) {
        None | Some((NodeValue::Null, _)) => Ok(default),
        Some((NodeValue::Text(text), _)) if may_be_empty || !text.is_empty() => Ok(Value::from(text.as_str())),
        Some((_, text)) => Err((text.at, format!("{name} of {}", text.describe()), None)),
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
    let fits = |item: &Node| item.as_text().is_some_and(|text| !text.is_empty());
    match each(node, fits)? {
        Value::Array(items) if items.len() == 1 => Ok(items.into_iter().next().unwrap_or_default()),
        files => Ok(files),
    }
}

/// Reads whether a text goes through the chat template: true, or what the system says; null where it doesn't.
fn chat_option(node: &Node) -> Result<Value, Mismatch> {
    match &node.value {
        NodeValue::Null | NodeValue::Bool(false) => Ok(Value::Null),
        NodeValue::Bool(true) => Ok(json!({ "system": null })),
        NodeValue::Map(entries) => {
            known_keys(entries, &["system"])?;
            match node.get("system").map(|system| (&system.value, system)) {
                None | Some((NodeValue::Null, _)) => Ok(json!({ "system": null })),
                Some((NodeValue::Text(text), _)) => Ok(json!({ "system": text })),
                Some((_, system)) => Err((system.at, format!("system of {}", system.describe()), None)),
            }
        }
        _ => Err((
            node.at,
            format!("chat of {}", node.describe()),
            Some("chat: true, or chat: {system: TEXT}".to_owned()),
        )),
    }
}
