//! From the parser's events to the tree. Nothing here recurses, so that no input exhausts the stack.

use super::error::YamlError;
use super::node::{Key, Node, NodeValue, Place};
use super::scalar::resolve_plain;
use super::text::{MAX_TEXT_BYTES, check_characters};
use granit_parser::{Event, Parser, ScalarStyle, Span, Tag};
use std::collections::{HashMap, HashSet};

/// Most values, keys and ends of lists and mappings: bounds the memory that a short text can ask for.
const MAX_EVENTS: usize = 1 << 22;
/// Most levels of lists and mappings, those that aliases bring included.
pub const MAX_DEPTH: usize = 64;
/// Most values, and most bytes of text, that aliases and merge keys add.
const MAX_ALIAS_NODES: usize = 1 << 20;
const MAX_ALIAS_BYTES: usize = 16 << 20;

/// Parses a text that holds one YAML document.
///
/// # Errors
/// The first problem: a syntax error, a key given twice, a second document, a tree beyond the limits.
pub fn parse(text: &str) -> Result<Node, YamlError> {
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    if text.len() > MAX_TEXT_BYTES {
        let message = format!("{} bytes, {MAX_TEXT_BYTES} are allowed", text.len());
        return Err(YamlError::new(Place::default(), message, None));
    }
    check_characters(text)?;
    let options = granit_parser::options! {
        flow_nesting_limit: MAX_DEPTH,
        block_nesting_limit: MAX_DEPTH,
        emit_comments: false,
    };
    let mut events = Vec::new();
    let (mut second, mut n_documents, mut failure) = (Place::default(), 0usize, None);
    for event in Parser::new_from_str_with_options(text, options) {
        match event {
            Ok((event, span)) => {
                if matches!(event, Event::DocumentStart(..)) {
                    n_documents += 1;
                    second = if n_documents == 2 { place(&span) } else { second };
                }
                events.push((event, span));
                if events.len() > MAX_EVENTS {
                    let at = events.last().map(|(_, span)| place(span)).unwrap_or_default();
                    return Err(YamlError::new(at, "more values than any pipeline has", None));
                }
            }
            Err(error) => {
                failure = Some(error);
                break;
            }
        }
    }
    if n_documents > 1 {
        let n = if failure.is_none() { n_documents.to_string() } else { "several".to_owned() };
        let hint = "keep one; a line that is --- begins another document";
        return Err(YamlError::new(second, format!("the file holds {n} YAML documents"), Some(hint)));
    }
    match failure {
        Some(error) => Err(YamlError::syntax(&error, text)),
        None => Builder::new(&events).build(&events),
    }
}

fn place(span: &Span) -> Place {
    Place { line: span.start.line(), column: span.start.col() + 1 }
}

/// A list or mapping whose end has not come yet.
enum Frame {
    List {
        at: Place,
        anchor: usize,
        items: Vec<Node>,
    },
    Map {
        at: Place,
        anchor: usize,
        entries: Vec<(Key, Node)>,
        key: Option<Key>,
        seen: HashMap<String, Place>,
        merged: Vec<Node>,
    },
}

struct Builder {
    frames: Vec<Frame>,
    anchors: HashMap<usize, Node>,
    /// Anchors that an alias names: no others are kept.
    aliased: HashSet<usize>,
    alias_nodes: usize,
    alias_bytes: usize,
    root: Option<Node>,
}

impl Builder {
    fn new(events: &[(Event<'_>, Span)]) -> Builder {
        let aliased = events.iter().filter_map(|(event, _)| match event {
            Event::Alias(id) => Some(*id),
            _ => None,
        });
        Builder {
            frames: Vec::new(),
            anchors: HashMap::new(),
            aliased: aliased.collect(),
            alias_nodes: 0,
            alias_bytes: 0,
            root: None,
        }
    }

    fn build(mut self, events: &[(Event<'_>, Span)]) -> Result<Node, YamlError> {
        for (event, span) in events {
            let at = place(span);
            match event {
                Event::Scalar(text, style, anchor, tag) => {
                    let node = scalar(text, *style, tag.as_deref(), at)?;
                    let is_merge = *style == ScalarStyle::Plain && text == "<<";
                    self.keep(*anchor, &node, at)?;
                    self.put(node, text, is_merge)?;
                }
                Event::SequenceStart(_, anchor, tag) => {
                    check_tag(tag.as_deref(), "seq", at)?;
                    self.check_place(at)?;
                    self.frames.push(Frame::List { at, anchor: *anchor, items: Vec::new() });
                }
                Event::MappingStart(_, anchor, tag) => {
                    check_tag(tag.as_deref(), "map", at)?;
                    self.check_place(at)?;
                    let (entries, key, seen, merged) = (Vec::new(), None, HashMap::new(), Vec::new());
                    self.frames.push(Frame::Map { at, anchor: *anchor, entries, key, seen, merged });
                }
                Event::SequenceEnd | Event::MappingEnd => self.close()?,
                Event::Alias(id) => self.alias(*id, at)?,
                _ => {}
            }
        }
        Ok(self.root.unwrap_or_else(|| Node::new(NodeValue::Null, Place { line: 1, column: 1 })))
    }

    /// Fails where a list or mapping stands for a key.
    fn check_place(&self, at: Place) -> Result<(), YamlError> {
        match self.frames.last() {
            Some(Frame::Map { key: None, .. }) => {
                let hint = "put quotes around a text that begins with [ or {; is a ${variable} meant?";
                Err(YamlError::new(at, "a list or mapping stands for a key", Some(hint)))
            }
            _ => Ok(()),
        }
    }

    /// Adds a value to the list or mapping that is open. `text` is what a key is called.
    fn put(&mut self, node: Node, text: &str, is_merge: bool) -> Result<(), YamlError> {
        match self.frames.last_mut() {
            None => self.root = Some(node),
            Some(Frame::List { items, .. }) => items.push(node),
            Some(Frame::Map { entries, key, seen, merged, .. }) => match key.take() {
                None if is_merge => *key = Some(Key { text: String::new(), at: Place::default() }),
                None => {
                    if let Some(first) = seen.insert(text.to_owned(), node.at) {
                        let message = format!(
                            "the key {text:?} stands twice in one mapping, first in line {}, column {}",
                            first.line, first.column
                        );
                        return Err(YamlError::new(node.at, message, Some("a mapping has each key once")));
                    }
                    *key = Some(Key { text: text.to_owned(), at: node.at });
                }
                // The place of a merge key is none: its entries have their own.
                Some(Key { at, .. }) if at == Place::default() => merged.push(node),
                Some(key) => entries.push((key, node)),
            },
        }
        Ok(())
    }

    fn close(&mut self) -> Result<(), YamlError> {
        let (node, anchor) = match self.frames.pop() {
            Some(Frame::List { at, anchor, items }) => (Node::new(NodeValue::List(items), at), anchor),
            Some(Frame::Map { at, anchor, mut entries, mut seen, merged, .. }) => {
                for source in merged {
                    merge(source, &mut entries, &mut seen)?;
                }
                (Node::new(NodeValue::Map(entries), at), anchor)
            }
            None => return Ok(()),
        };
        let at = node.at;
        self.keep(anchor, &node, at)?;
        self.put(node, "", false)
    }

    /// Keeps an anchor's value for its aliases.
    fn keep(&mut self, anchor: usize, node: &Node, at: Place) -> Result<(), YamlError> {
        if self.aliased.contains(&anchor) {
            self.count(node, at)?;
            self.anchors.insert(anchor, node.clone());
        }
        Ok(())
    }

    fn alias(&mut self, id: usize, at: Place) -> Result<(), YamlError> {
        let Some(node) = self.anchors.remove(&id) else {
            return Err(YamlError::new(at, "an alias stands inside its own anchor", None));
        };
        self.count(&node, at)?;
        if self.frames.len() + node.size().depth > MAX_DEPTH {
            return Err(YamlError::new(at, "aliases nest lists and mappings too deeply", None));
        }
        let is_key = matches!(self.frames.last(), Some(Frame::Map { key: None, .. }));
        let text = node.scalar_text();
        if is_key && text.is_none() {
            return Err(YamlError::new(
                at,
                "an alias of a list or mapping stands for a key",
                Some("a mapping is merged with <<: *name"),
            ));
        }
        // What a merge or an alias repeats keeps the place where it is written: that is where it can be mended.
        self.put(node.clone(), text.as_deref().unwrap_or_default(), false)?;
        self.anchors.insert(id, node);
        Ok(())
    }

    fn count(&mut self, node: &Node, at: Place) -> Result<(), YamlError> {
        let size = node.size();
        self.alias_nodes += size.n_nodes;
        self.alias_bytes += size.n_bytes;
        if self.alias_nodes > MAX_ALIAS_NODES || self.alias_bytes > MAX_ALIAS_BYTES {
            let message =
                format!("aliases repeat more than {MAX_ALIAS_NODES} values or {} MiB of text", MAX_ALIAS_BYTES >> 20);
            return Err(YamlError::new(at, message, None));
        }
        Ok(())
    }
}

/// Adds the entries of `<<: source` that a mapping has not itself.
fn merge(source: Node, entries: &mut Vec<(Key, Node)>, seen: &mut HashMap<String, Place>) -> Result<(), YamlError> {
    let at = source.at;
    let sources = match source.value {
        NodeValue::List(items) => items,
        _ => vec![source],
    };
    for source in sources {
        let NodeValue::Map(more) = source.value else {
            let message = "<<: expected a mapping (an alias of one) or a list of them";
            return Err(YamlError::new(at, message, Some("a key that is really called << needs quotes")));
        };
        for (key, node) in more {
            if !seen.contains_key(&key.text) {
                seen.insert(key.text.clone(), key.at);
                entries.push((key, node));
            }
        }
    }
    Ok(())
}

fn scalar(text: &str, style: ScalarStyle, tag: Option<&Tag>, at: Place) -> Result<Node, YamlError> {
    let as_text = || Node::new(NodeValue::Text(text.to_owned()), at);
    let plain = || {
        let value = resolve_plain(text);
        let written = (!matches!(value, NodeValue::Text(_) | NodeValue::Null)).then(|| text.to_owned());
        Node { value, at, written }
    };
    let Some(tag) = tag else {
        return Ok(if style == ScalarStyle::Plain { plain() } else { as_text() });
    };
    let fits = |value: &NodeValue, name: &str| match name {
        "null" => matches!(value, NodeValue::Null),
        "bool" => matches!(value, NodeValue::Bool(_)),
        "int" => matches!(value, NodeValue::Int(_)),
        "float" => matches!(value, NodeValue::Float(_) | NodeValue::Int(_)),
        _ => false,
    };
    match tag.core_suffix() {
        Some("str") => Ok(as_text()),
        _ if tag.handle() == "!" && tag.suffix().is_empty() => Ok(as_text()),
        Some(name) if fits(&resolve_plain(text), name) => Ok(plain()),
        Some(name) => Err(YamlError::new(at, format!("{text:?} is tagged as {name} and is none"), None)),
        None => Err(unknown_tag(tag, at)),
    }
}

fn check_tag(tag: Option<&Tag>, name: &str, at: Place) -> Result<(), YamlError> {
    match tag {
        Some(tag) if tag.core_suffix() != Some(name) => Err(unknown_tag(tag, at)),
        _ => Ok(()),
    }
}

fn unknown_tag(tag: &Tag, at: Place) -> YamlError {
    YamlError::new(
        at,
        format!("the tag {} has no meaning here", tag.original()),
        Some("put quotes around a text that begins with !"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn message(text: &str) -> (usize, usize, String) {
        let error = parse(text).expect_err("an error");
        (error.at.line, error.at.column, error.message)
    }

    #[test]
    fn values_and_keys_know_their_places() {
        let root = parse("a: 1\nb:\n  - x\n  - 2.5\n").expect("a tree");
        let list = root.get("b").expect("b").as_list().expect("a list");
        assert_eq!(list[1].at, Place { line: 4, column: 5 });
        assert_eq!(list[1].value, NodeValue::Float(2.5));
        assert_eq!(root.as_map().expect("a mapping")[1].0.at, Place { line: 2, column: 1 });
    }

    #[test]
    fn merge_keys_add_what_a_mapping_lacks() {
        let text =
            "a: &a { x: 1, y: 2 }\nb: &b { y: 3, z: 4 }\nc: { <<: *a, y: 9 }\nd: { <<: [*a, *b] }\ne: { '<<': 1 }\n";
        let json = parse(text).expect("a tree").to_json();
        // What PyYAML and ruamel.yaml make of it.
        assert_eq!(json["c"], json!({"x": 1, "y": 9}));
        assert_eq!(json["d"], json!({"x": 1, "y": 2, "z": 4}));
        assert_eq!(json["e"], json!({"<<": 1}));
        assert!(parse("a: { <<: 3 }").is_err());
    }

    #[test]
    fn the_same_text_in_windows_dress_is_the_same_tree() {
        let text = "a: 1\nb: [x, y]\n";
        let expected = parse(text).expect("a tree");
        assert_eq!(parse(&format!("\u{feff}{text}")), Ok(expected.clone()));
        assert_eq!(parse(&text.replace('\n', "\r\n")), Ok(expected.clone()));
        assert_eq!(parse(&format!("---\n{text}...\n")).expect("a tree").to_json(), expected.to_json());
        for empty in ["", "# nothing\n", "~\n", "\n\n"] {
            assert!(parse(empty).expect("nothing").is_null(), "{empty:?}");
        }
    }

    #[test]
    fn problems_are_told_in_words_with_their_places() {
        let (line, column, text) = message("a: 1\nb: 2\na: 3\n");
        assert_eq!((line, column), (3, 1));
        assert_eq!(text, "read as YAML: the key \"a\" stands twice in one mapping, first in line 1, column 1");
        let (line, _, text) = message("a: 1\n---\nb: 2\n---\nc: 3\n");
        assert_eq!((line, text.as_str()), (2, "read as YAML: the file holds 3 YAML documents"));
        assert_eq!(message("a:\n\tb: 1\n"), (2, 1, "read as YAML: a tab indents this line".to_owned()));
        assert_eq!(message("a: x\0y\n"), (1, 5, "read as YAML: the control character U+0000".to_owned()));
        assert_eq!(message("a: [1, 2\n").2, "read as YAML: a bracket is not closed");
        assert_eq!(message("a: *b\n").2, "read as YAML: an alias (*name) without an anchor (&name) before it");
        assert_eq!(message("a: !x 1\n").2, "read as YAML: the tag !x has no meaning here");
        assert_eq!(message("{a: 1}: 2\n").2, "read as YAML: a list or mapping stands for a key");
    }

    #[test]
    fn an_alias_bomb_and_deep_nesting_end_in_one_error() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let items = vec![format!("*a{}", level - 1); 9].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{items}]\n"));
        }
        assert!(message(&text).2.contains("aliases repeat more than"));
        let chain: String = (1..100_000).map(|i| format!("a{i}: &a{i} [*a{}]\n", i - 1)).collect();
        assert!(message(&format!("a0: &a0 [x]\n{chain}")).2.contains("too deeply"));
        for text in [
            "[".repeat(20_000),
            "{a: ".repeat(20_000),
            "- ".repeat(20_000),
            format!("a: {}{}", "[".repeat(500), "]".repeat(500)),
        ] {
            assert!(message(&text).2.contains("too deeply"), "{}", message(&text).2);
        }
        let text = format!("a: &a {}\nb: *a\nc: [*a, *a]\n", "x".repeat(6 << 20));
        assert!(message(&text).2.contains("MiB of text"));
    }
}
