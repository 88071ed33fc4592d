//! The tree: values with their places, and what each can be taken for.

use super::scalar::resolve_plain;
use serde_json::Value;

/// A place in the text: line and column, counted from 1; 0 for what does not stand in the text.
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
    /// A plain scalar that is no text, as it is written: `3.10`, `0x100`.
    pub written: Option<String>,
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
    Untyped(Untyped),
    List(Vec<Node>),
    Map(Vec<(Key, Node)>),
}

/// A value from outside of the text (the command line, the environment). Whoever takes it decides its type: a path takes the text
/// as it is, a number parses it.
#[derive(Debug, Clone, PartialEq)]
pub struct Untyped {
    pub text: String,
    /// `--set model`, `environment variable MODEL`.
    pub origin: String,
    /// What the text is as a flow list or mapping, where the whole of it is one.
    pub flow: Option<Box<Node>>,
}

/// How large a tree is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TreeSize {
    pub n_nodes: usize,
    /// Bytes of keys and texts.
    pub n_bytes: usize,
    /// Levels of lists and mappings.
    pub depth: usize,
}

/// Whole numbers up to here have a float of their own.
const MAX_EXACT_FLOAT: f64 = 9_007_199_254_740_992.0;

impl Untyped {
    /// Returns a value from outside. A text that is as a whole one flow list or mapping can also be taken for that.
    pub fn new(text: &str, origin: String) -> Untyped {
        let is_bracketed = |open: char, close: char| text.starts_with(open) && text.ends_with(close);
        let flow = (is_bracketed('[', ']') || is_bracketed('{', '}')).then(|| super::parse(text)).and_then(Result::ok);
        let flow = flow.filter(|node| matches!(node.value, NodeValue::List(_) | NodeValue::Map(_)));
        Untyped { text: text.to_owned(), origin, flow: flow.map(|node| Box::new(node.unplaced())) }
    }

    /// Returns what YAML reads the text as.
    fn typed(&self) -> Node {
        match &self.flow {
            Some(flow) => Node::clone(flow),
            None => Node { value: resolve_plain(&self.text), at: Place::default(), written: Some(self.text.clone()) },
        }
    }
}

impl Node {
    /// Returns a value that was not read from the text.
    pub fn new(value: NodeValue, at: Place) -> Node {
        Node { value, at, written: None }
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
        Node { value, at: Place::default(), written: self.written }
    }

    /// Returns how large the tree is.
    pub fn size(&self) -> TreeSize {
        let mut size = TreeSize { n_nodes: 1, n_bytes: 0, depth: 0 };
        let mut add = |child: &Node| {
            let of_child = child.size();
            size.n_nodes += of_child.n_nodes;
            size.n_bytes += of_child.n_bytes;
            size.depth = size.depth.max(of_child.depth + 1);
        };
        match &self.value {
            NodeValue::Text(text) => size.n_bytes = text.len(),
            NodeValue::Untyped(outside) => size.n_bytes = outside.text.len(),
            NodeValue::List(items) => items.iter().for_each(add),
            NodeValue::Map(entries) => {
                entries.iter().for_each(|(_, node)| add(node));
                size.n_bytes += entries.iter().map(|(key, _)| key.text.len()).sum::<usize>();
            }
            NodeValue::Null | NodeValue::Bool(_) | NodeValue::Int(_) | NodeValue::Float(_) => {}
        }
        size
    }

    /// Describes the value for a message: `the text "abc"`, `a list`.
    pub fn describe(&self) -> String {
        let as_written = |value: String| self.written.clone().unwrap_or(value);
        match &self.value {
            NodeValue::Null => "nothing".to_owned(),
            NodeValue::Bool(value) => as_written(value.to_string()),
            NodeValue::Int(value) => as_written(value.to_string()),
            NodeValue::Float(value) => as_written(value.to_string()),
            NodeValue::Text(text) => format!("the text {text:?}"),
            NodeValue::Untyped(Untyped { text, origin, .. }) => format!("{text:?} (from {origin})"),
            NodeValue::List(_) => "a list".to_owned(),
            NodeValue::Map(_) => "a mapping".to_owned(),
        }
    }

    pub fn is_null(&self) -> bool {
        self.value == NodeValue::Null
    }

    /// Returns the entries of a mapping.
    pub fn as_map(&self) -> Option<&[(Key, Node)]> {
        match &self.value {
            NodeValue::Map(entries) => Some(entries),
            NodeValue::Untyped(outside) => outside.flow.as_ref()?.as_map(),
            _ => None,
        }
    }

    /// Returns the items of a list.
    pub fn as_list(&self) -> Option<&[Node]> {
        match &self.value {
            NodeValue::List(items) => Some(items),
            NodeValue::Untyped(outside) => outside.flow.as_ref()?.as_list(),
            _ => None,
        }
    }

    /// Returns a text; none for what YAML reads as a number, a boolean or null.
    pub fn as_text(&self) -> Option<&str> {
        match &self.value {
            NodeValue::Text(text) => Some(text),
            NodeValue::Untyped(outside) => Some(&outside.text),
            _ => None,
        }
    }

    /// Returns a whole number, also one that is written as `256.0` or `2.56e2`.
    pub fn as_int(&self) -> Option<i64> {
        match &self.value {
            NodeValue::Int(value) => Some(*value),
            NodeValue::Float(value) if value.fract() == 0.0 && value.abs() <= MAX_EXACT_FLOAT => Some(*value as i64),
            NodeValue::Untyped(outside) if outside.flow.is_none() => outside.typed().as_int(),
            _ => None,
        }
    }

    /// Returns a number.
    pub fn as_float(&self) -> Option<f64> {
        match &self.value {
            NodeValue::Int(value) => Some(*value as f64),
            NodeValue::Float(value) => Some(*value),
            NodeValue::Untyped(outside) if outside.flow.is_none() => outside.typed().as_float(),
            _ => None,
        }
    }

    pub fn as_bool(&self) -> Option<bool> {
        match &self.value {
            NodeValue::Bool(value) => Some(*value),
            NodeValue::Untyped(outside) if outside.flow.is_none() => outside.typed().as_bool(),
            _ => None,
        }
    }

    /// Returns true where a value that is no text is given as nothing: null, or from outside the word for it.
    pub fn is_null_word(&self) -> bool {
        match &self.value {
            NodeValue::Untyped(outside) => outside.flow.is_none() && outside.typed().is_null(),
            other => *other == NodeValue::Null,
        }
    }

    /// Returns the value under a key of a mapping.
    pub fn get(&self, key: &str) -> Option<&Node> {
        self.as_map()?.iter().find(|(name, _)| name.text == key).map(|(_, node)| node)
    }

    /// Returns the value as JSON; positions are lost. JSON has no `.inf` and `.nan`: they become texts.
    pub fn to_json(&self) -> Value {
        match &self.value {
            NodeValue::Null => Value::Null,
            NodeValue::Bool(value) => Value::from(*value),
            NodeValue::Int(value) => Value::from(*value),
            NodeValue::Float(value) if !value.is_finite() => Value::from(self.describe()),
            NodeValue::Float(value) => Value::from(*value),
            NodeValue::Text(text) => Value::from(text.as_str()),
            NodeValue::Untyped(outside) => outside.typed().to_json(),
            NodeValue::List(items) => items.iter().map(Node::to_json).collect(),
            NodeValue::Map(entries) => {
                Value::Object(entries.iter().map(|(key, node)| (key.text.clone(), node.to_json())).collect())
            }
        }
    }

    /// Returns the scalar as it is written: what is inserted into a longer text, and what a text parameter takes. None for null,
    /// lists and mappings.
    pub fn scalar_text(&self) -> Option<String> {
        match &self.value {
            NodeValue::Text(text) => Some(text.clone()),
            NodeValue::Untyped(outside) => Some(outside.text.clone()),
            NodeValue::Bool(_) | NodeValue::Int(_) | NodeValue::Float(_) => Some(self.describe()),
            NodeValue::Null | NodeValue::List(_) | NodeValue::Map(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outside(text: &str) -> Node {
        Node::new(NodeValue::Untyped(Untyped::new(text, "--set x".to_owned())), Place::default())
    }

    #[test]
    fn a_value_from_outside_is_what_its_taker_wants() {
        for text in [
            "[1].txt",
            "{a}.txt",
            "007",
            "1e3",
            "yes",
            "null",
            "~",
            "*a.txt",
            " lead.txt",
            "tale #2.txt",
            "a: b",
            "- x",
        ] {
            assert_eq!(outside(text).as_text(), Some(text));
            assert_eq!(outside(text).scalar_text().as_deref(), Some(text));
            assert!(outside(text).as_list().is_none() && outside(text).as_map().is_none(), "{text}");
        }
        assert_eq!(
            (outside("256").as_int(), outside("2.56e2").as_int(), outside("0x10").as_int()),
            (Some(256), Some(256), Some(16))
        );
        assert_eq!(
            (outside("1e-5").as_float(), outside("true").as_bool(), outside("yes").as_bool()),
            (Some(1e-5), Some(true), None)
        );
        assert_eq!(outside("[1, 2]").as_list().map(<[Node]>::len), Some(2));
        assert_eq!(outside("{a: 1}").get("a").and_then(Node::as_int), Some(1));
        assert_eq!(outside("[1, 2] [3]").as_list(), None);
        assert_eq!(outside("007").to_json(), 7);
        assert!(outside("null").is_null_word() && !outside("null").is_null() && !outside("x").is_null_word());
    }

    #[test]
    fn whole_numbers_may_be_written_as_floats() {
        let int = |text: &str| super::super::parse(text).expect("YAML").as_int();
        assert_eq!(
            [int("256.0"), int("2.56e2"), int("-0.0"), int("0x100")],
            [Some(256), Some(256), Some(0), Some(256)]
        );
        assert_eq!([int("256.5"), int(".inf"), int(".nan"), int("1e20"), int("'256'")], [None; 5]);
    }
}
