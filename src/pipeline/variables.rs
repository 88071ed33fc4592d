//! Substitution of `${name}` and `${env:NAME}`. A scalar that is exactly `${x}` takes x's value, whatever its type.

use super::diagnostics::Problems;
use super::node::{Key, Node, NodeValue, Place};
use super::suggest::did_you_mean;
use std::collections::{BTreeMap, BTreeSet};

/// Values that names stand for.
#[derive(Debug, Clone, Default)]
pub struct Scope {
    pub values: BTreeMap<String, Node>,
    pub env: BTreeMap<String, String>,
    /// Every name the file declares, those without a value here included: what a misspelt one may have meant.
    pub declared: BTreeSet<String>,
}

/// A piece of a text: plain, or the name inside `${…}`.
#[derive(Debug, PartialEq)]
enum Piece<'a> {
    Plain(&'a str),
    Name(&'a str),
}

/// Splits a text at its references; `$${` stands for a plain `${`.
fn pieces(text: &str) -> Result<Vec<Piece<'_>>, &'static str> {
    let mut pieces = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            pieces.push(Piece::Plain(&rest[..at - 1]));
            pieces.push(Piece::Plain("${"));
            rest = &rest[at + 2..];
            continue;
        }
        let end = rest[at..].find('}').ok_or("a reference that begins with ${ is not closed by }")?;
        pieces.push(Piece::Plain(&rest[..at]));
        pieces.push(Piece::Name(rest[at + 2..at + end].trim()));
        rest = &rest[at + end + 1..];
    }
    pieces.push(Piece::Plain(rest));
    pieces.retain(|piece| *piece != Piece::Plain(""));
    Ok(pieces)
}

/// Collects the names that a tree refers to.
pub fn mentioned(node: &Node, names: &mut BTreeSet<String>) {
    match &node.value {
        NodeValue::Text(text) => {
            for piece in pieces(text).unwrap_or_default() {
                if let Piece::Name(name) = piece {
                    names.insert(plain_name(name).to_owned());
                }
            }
        }
        NodeValue::List(items) => items.iter().for_each(|item| mentioned(item, names)),
        NodeValue::Map(entries) => entries.iter().for_each(|(_, value)| mentioned(value, names)),
        _ => {}
    }
}

/// `matrix.x` and `x` are the same variable.
fn plain_name(name: &str) -> &str {
    name.strip_prefix("matrix.").unwrap_or(name)
}

impl Scope {
    /// Returns the tree with every reference replaced; what can't be replaced is a problem and stays as it is.
    pub fn substitute(&self, node: &Node, problems: &mut Problems) -> Node {
        let value = match &node.value {
            NodeValue::Text(text) if text.contains("${") => self.replace(text, node.at, problems),
            NodeValue::List(items) => {
                NodeValue::List(items.iter().map(|item| self.substitute(item, problems)).collect())
            }
            NodeValue::Map(entries) => {
                let replace = |(key, value): &(Key, Node)| (key.clone(), self.substitute(value, problems));
                NodeValue::Map(entries.iter().map(replace).collect())
            }
            other => other.clone(),
        };
        Node { value, at: node.at }
    }

    fn replace(&self, text: &str, at: Place, problems: &mut Problems) -> NodeValue {
        let unchanged = || NodeValue::Text(text.to_owned());
        let pieces = match pieces(text) {
            Ok(pieces) => pieces,
            Err(message) => {
                problems.add(at, message, Some("write $${ for a plain ${".to_owned()));
                return unchanged();
            }
        };
        if let [Piece::Name(name)] = pieces.as_slice() {
            return self.look_up(name, at, problems).unwrap_or_else(unchanged);
        }
        let mut out = String::new();
        for piece in pieces {
            match piece {
                Piece::Plain(plain) => out.push_str(plain),
                Piece::Name(name) => {
                    let Some(value) = self.look_up(name, at, problems) else { return unchanged() };
                    match (Node { value, at }).scalar_text() {
                        Some(scalar) => out.push_str(&scalar),
                        None => {
                            let message = format!("${{{name}}} is no scalar and can't stand inside a longer text");
                            problems.add(at, message, Some(format!("let the value be exactly \"${{{name}}}\"")));
                            return unchanged();
                        }
                    }
                }
            }
        }
        NodeValue::Text(out)
    }

    fn look_up(&self, name: &str, at: Place, problems: &mut Problems) -> Option<NodeValue> {
        if let Some(variable) = name.strip_prefix("env:") {
            let value = self.env.get(variable).map(|value| NodeValue::Text(value.clone()));
            if value.is_none() {
                problems.add(at, format!("environment variable {variable} is not set"), None);
            }
            return value;
        }
        let value = self.values.get(plain_name(name)).map(|node| node.value.clone());
        if value.is_none() {
            let known: BTreeSet<&str> = self.values.keys().chain(&self.declared).map(String::as_str).collect();
            let hint = did_you_mean(plain_name(name), known).unwrap_or_else(|| "declare it under vars:".to_owned());
            problems.add(at, format!("unknown variable {name:?}"), Some(hint));
        }
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scope() -> Scope {
        let vars = Node::parse("n: 4\nname: nf4\nlist: [1, 2]\n").expect("a tree");
        let values =
            vars.as_map().expect("a mapping").iter().map(|(key, node)| (key.text.clone(), node.clone())).collect();
        Scope { values, env: BTreeMap::from([("HOME".to_owned(), "/home/x".to_owned())]), ..Scope::default() }
    }

    fn substitute(text: &str) -> (NodeValue, bool) {
        let mut problems = Problems::default();
        let node = Node { value: NodeValue::Text(text.to_owned()), at: Place { line: 1, column: 1 } };
        let value = scope().substitute(&node, &mut problems).value;
        (value, problems.is_empty())
    }

    #[test]
    fn an_exact_reference_takes_the_value_s_type_and_others_are_text() {
        assert_eq!(substitute("${n}"), (NodeValue::Int(4), true));
        assert!(matches!(substitute("${list}").0, NodeValue::List(_)));
        assert_eq!(substitute("x/${name}-${n}.yaml").0, NodeValue::Text("x/nf4-4.yaml".to_owned()));
        assert_eq!(substitute("${env:HOME}/m").0, NodeValue::Text("/home/x/m".to_owned()));
        assert_eq!(substitute("$${n}").0, NodeValue::Text("${n}".to_owned()));
    }

    #[test]
    fn unknown_names_unset_environment_and_open_references_are_problems() {
        for text in ["${nam}", "${env:NOPE}", "${n", "a${list}"] {
            assert!(!substitute(text).1, "{text}");
        }
    }
}
