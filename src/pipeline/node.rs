//! YAML as a tree in which every value and key knows its place.

use super::types::Diagnostic;
use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_yaml::Spanned;
use std::fmt;

/// A place in the text: line and column, counted from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Place {
    pub line: usize,
    pub column: usize,
}

/// A value with its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    pub value: NodeValue,
    pub at: Place,
}

/// A key with its place.
#[derive(Debug, Clone, PartialEq)]
pub struct Key {
    pub text: String,
    pub at: Place,
}

#[derive(Debug, Clone, PartialEq)]
pub enum NodeValue {
    Null,
    Bool(bool),
    Int(i64),
    Float(f64),
    Text(String),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

impl Node {
    /// Parses a YAML document.
    ///
    /// # Errors
    /// One diagnostic: a syntax error, a key given twice, or a document beyond the budget (alias bombs).
    pub fn parse(text: &str) -> Result<Node, Diagnostic> {
        let options = serde_yaml::options! { duplicate_keys: serde_yaml::DuplicateKeyPolicy::Error };
        match serde_yaml::from_str_with_options::<Spanned<Raw>>(text, options) {
            Ok(raw) => Ok(raw.into()),
            Err(error) => Err(syntax_error(&error)),
        }
    }

    /// Returns the tree without places: it does not stand in the file.
    pub fn unplaced(self) -> Node {
        let value = match self.value {
            NodeValue::List(items) => NodeValue::List(items.into_iter().map(Node::unplaced).collect()),
            NodeValue::Map(entries) => {
                let strip = |(key, node): (Key, Node)| (Key { at: Place::default(), ..key }, node.unplaced());
                NodeValue::Map(entries.into_iter().map(strip).collect())
            }
            other => other,
        };
        Node { value, at: Place::default() }
    }

    /// Describes the value for a message: `the text "abc"`, `a list`.
    pub fn describe(&self) -> String {
        match &self.value {
            NodeValue::Null => "nothing".to_owned(),
            NodeValue::Bool(value) => value.to_string(),
            NodeValue::Int(value) => value.to_string(),
            NodeValue::Float(value) => value.to_string(),
            NodeValue::Text(text) => format!("the text {text:?}"),
            NodeValue::List(_) => "a list".to_owned(),
            NodeValue::Map(_) => "a mapping".to_owned(),
        }
    }

    pub fn as_map(&self) -> Option<&[(Key, Node)]> {
        match &self.value {
            NodeValue::Map(entries) => Some(entries),
            _ => None,
        }
    }

    pub fn as_list(&self) -> Option<&[Node]> {
        match &self.value {
            NodeValue::List(items) => Some(items),
            _ => None,
        }
    }

    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            NodeValue::Text(text) => Some(text),
            _ => None,
        }
    }

    /// Returns the value under a key of a mapping.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.as_map()?.iter().find(|(name, _)| name.text == key).map(|(_, node)| node)
    }

    /// Returns the value as JSON; positions are lost.
    pub fn to_json(&self) -> Value {
        match &self.value {
            NodeValue::Null => Value::Null,
            NodeValue::Bool(value) => Value::from(*value),
            NodeValue::Int(value) => Value::from(*value),
            NodeValue::Float(value) => Value::from(*value),
            NodeValue::Text(text) => Value::from(text.as_str()),
            NodeValue::List(items) => items.iter().map(Node::to_json).collect(),
            NodeValue::Map(entries) => {
                Value::Object(entries.iter().map(|(key, node)| (key.text.clone(), node.to_json())).collect())
            }
        }
    }

    /// Returns the scalar as it is inserted into a longer text; nothing for lists and mappings.
    pub fn scalar_text(&self) -> Option<String> {
        match &self.value {
            NodeValue::Text(text) => Some(text.clone()),
            NodeValue::Bool(_) | NodeValue::Int(_) | NodeValue::Float(_) => Some(self.describe()),
            NodeValue::Null | NodeValue::List(_) | NodeValue::Map(_) => None,
        }
    }
}

fn syntax_error(error: &serde_yaml::Error) -> Diagnostic {
    let place = error.location().filter(|location| location.line() > 0);
    let message = error.without_snippet().to_string();
    // The place stands below the message, and what the parser says of its own settings helps nobody here.
    let message = message.split(" at line ").next().unwrap_or_default();
    let message = message.split(", set DuplicateKeyPolicy").next().unwrap_or_default();
    let is_duplicate = message.starts_with("duplicate mapping key");
    Diagnostic {
        line: place.as_ref().map(|place| place.line() as usize),
        column: place.as_ref().map(|place| place.column() as usize),
        message: format!("read as YAML: {}", message.lines().next().unwrap_or_default()),
        hint: is_duplicate.then(|| "a mapping has each key once".to_owned()),
    }
}

/// A value whose parts know their places, but which doesn't know its own yet.
struct Raw(NodeValue);

impl From<Spanned<Raw>> for Node {
    fn from(raw: Spanned<Raw>) -> Node {
        Node { at: place(&raw), value: raw.value.0 }
    }
}

fn place<T>(spanned: &Spanned<T>) -> Place {
    Place { line: spanned.referenced.line() as usize, column: spanned.referenced.column() as usize }
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Raw, D::Error> {
        struct RawVisitor;
        impl<'de> Visitor<'de> for RawVisitor {
            type Value = Raw;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a YAML value")
            }

            fn visit_unit<E>(self) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Null))
            }

            fn visit_none<E>(self) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Null))
            }

            fn visit_bool<E>(self, value: bool) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Bool(value)))
            }

            fn visit_i64<E>(self, value: i64) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Int(value)))
            }

            fn visit_u64<E>(self, value: u64) -> Result<Raw, E> {
                Ok(Raw(i64::try_from(value).map_or(NodeValue::Float(value as f64), NodeValue::Int)))
            }

            fn visit_f64<E>(self, value: f64) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Float(value)))
            }

            fn visit_str<E>(self, value: &str) -> Result<Raw, E> {
                Ok(Raw(NodeValue::Text(value.to_owned())))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Raw, A::Error> {
                let mut items = Vec::new();
                while let Some(item) = seq.next_element::<Spanned<Raw>>()? {
                    items.push(item.into());
                }
                Ok(Raw(NodeValue::List(items)))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut entries = Vec::new();
                while let Some((key, value)) = map.next_entry::<Spanned<String>, Spanned<Raw>>()? {
                    entries.push((Key { at: place(&key), text: key.value }, value.into()));
                }
                Ok(Raw(NodeValue::Map(entries)))
            }
        }
        deserializer.deserialize_any(RawVisitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_and_keys_know_their_places() {
        let root = Node::parse("a: 1\nb:\n  - x\n  - 2.5\n").expect("a tree");
        let list = root.get("b").expect("b").as_list().expect("a list");
        assert_eq!(list[1].at, Place { line: 4, column: 5 });
        assert_eq!(list[1].value, NodeValue::Float(2.5));
        assert_eq!(root.as_map().expect("a mapping")[1].0.at, Place { line: 2, column: 1 });
    }

    #[test]
    fn an_alias_bomb_ends_in_one_error() {
        let mut text = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
        for level in 1..12 {
            let previous = format!("*a{}", level - 1);
            let items = vec![previous; 9].join(", ");
            text.push_str(&format!("a{level}: &a{level} [{items}]\n"));
        }
        let diagnostic = Node::parse(&text).expect_err("an error");
        assert!(diagnostic.message.starts_with("read as YAML"), "{}", diagnostic.message);
    }

    #[test]
    fn a_key_given_twice_is_an_error_with_its_place() {
        let diagnostic = Node::parse("a: 1\na: 2\n").expect_err("an error");
        assert_eq!(diagnostic.line, Some(2));
        assert_eq!(diagnostic.message, "read as YAML: duplicate mapping key: a");
    }
}
