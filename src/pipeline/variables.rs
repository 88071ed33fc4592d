//! Substitution of `${name}` and `${env:NAME}`. A scalar that is exactly `${x}` takes x's value, whatever its type.

use super::diagnostics::Problems;
use super::suggest::did_you_mean;
use crate::yaml::{Key, MAX_DEPTH, Node, NodeValue, Place, TreeSize, Untyped};
use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};

/// Most values, and most bytes of text, that references bring into one variable or stage.
const MAX_NODES: usize = 1 << 17;
const MAX_BYTES: usize = 8 << 20;
/// The same for a whole pipeline, all cells of its matrix together.
const MAX_NODES_OF_ALL: usize = 1 << 23;
const MAX_BYTES_OF_ALL: usize = 512 << 20;

/// What every scope of a pipeline shares.
#[derive(Debug)]
pub struct Surroundings<'a> {
    pub env: &'a BTreeMap<String, String>,
    /// Every name the file declares, those without a value in a scope included: what a misspelt one may have meant.
    pub declared: BTreeSet<String>,
    n_nodes: Cell<usize>,
    n_bytes: Cell<usize>,
}

/// Values that names stand for.
#[derive(Debug, Clone)]
pub struct Scope<'a> {
    pub values: BTreeMap<String, Node>,
    /// Where names are looked up that have no value here.
    outer: Option<&'a Scope<'a>>,
    surroundings: &'a Surroundings<'a>,
}

/// What references brought into one tree.
#[derive(Debug, Default)]
struct Growth {
    size: TreeSize,
    is_exceeded: bool,
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

impl<'a> Surroundings<'a> {
    pub fn new(env: &'a BTreeMap<String, String>, declared: BTreeSet<String>) -> Surroundings<'a> {
        Surroundings { env, declared, n_nodes: Cell::new(0), n_bytes: Cell::new(0) }
    }

    /// Counts what a reference brings; false beyond the limit.
    fn count(&self, size: TreeSize) -> bool {
        self.n_nodes.set(self.n_nodes.get().saturating_add(size.n_nodes));
        self.n_bytes.set(self.n_bytes.get().saturating_add(size.n_bytes));
        self.n_nodes.get() <= MAX_NODES_OF_ALL && self.n_bytes.get() <= MAX_BYTES_OF_ALL
    }
}

impl<'a> Scope<'a> {
    pub fn new(surroundings: &'a Surroundings<'a>) -> Scope<'a> {
        Scope { values: BTreeMap::new(), outer: None, surroundings }
    }

    /// Returns an empty scope inside this one.
    pub fn inner(&'a self) -> Scope<'a> {
        Scope { values: BTreeMap::new(), outer: Some(self), surroundings: self.surroundings }
    }

    /// Returns the tree with every reference replaced; what can't be replaced is a problem and stays as it is.
    pub fn substitute(&self, node: &Node, problems: &mut Problems) -> Node {
        self.replace_in(node, 0, &mut Growth::default(), problems)
    }

    fn replace_in(&self, node: &Node, depth: usize, growth: &mut Growth, problems: &mut Problems) -> Node {
        let value = match &node.value {
            NodeValue::Text(text) if text.contains("${") => {
                let replaced = self.replace(text, node.at, depth, growth, problems);
                return Node { at: node.at, ..replaced.unwrap_or_else(|| node.clone()) };
            }
            NodeValue::List(items) => {
                NodeValue::List(items.iter().map(|item| self.replace_in(item, depth + 1, growth, problems)).collect())
            }
            NodeValue::Map(entries) => {
                let mut replace =
                    |(key, value): &(Key, Node)| (key.clone(), self.replace_in(value, depth + 1, growth, problems));
                NodeValue::Map(entries.iter().map(&mut replace).collect())
            }
            other => other.clone(),
        };
        Node { value, at: node.at, written: node.written.clone() }
    }

    fn replace(
        &self,
        text: &str,
        at: Place,
        depth: usize,
        growth: &mut Growth,
        problems: &mut Problems,
    ) -> Option<Node> {
        let pieces = match pieces(text) {
            Ok(pieces) => pieces,
            Err(message) => {
                problems.add(at, message, Some("write $${ for a plain ${".to_owned()));
                return None;
            }
        };
        if let [Piece::Name(name)] = pieces.as_slice() {
            return self.look_up(name, at, depth, growth, problems);
        }
        let mut out = String::new();
        for piece in pieces {
            match piece {
                Piece::Plain(plain) => out.push_str(plain),
                Piece::Name(name) => match self.look_up(name, at, depth, growth, problems)?.scalar_text() {
                    Some(scalar) => out.push_str(&scalar),
                    None => {
                        let message = format!("${{{name}}} is no scalar and can't stand inside a longer text");
                        problems.add(at, message, Some(format!("let the value be exactly \"${{{name}}}\"")));
                        return None;
                    }
                },
            }
        }
        Some(Node::new(NodeValue::Text(out), at))
    }

    fn find(&self, name: &str) -> Option<&Node> {
        self.values.get(name).or_else(|| self.outer?.find(name))
    }

    fn look_up(
        &self,
        name: &str,
        at: Place,
        depth: usize,
        growth: &mut Growth,
        problems: &mut Problems,
    ) -> Option<Node> {
        if growth.is_exceeded {
            return None;
        }
        if let Some(variable) = name.strip_prefix("env:") {
            let Some(value) = self.surroundings.env.get(variable) else {
                problems.add(at, format!("environment variable {variable} is not set, or is no UTF-8 text"), None);
                return None;
            };
            let value = Untyped::new(value, format!("environment variable {variable}"));
            let value = Node::new(NodeValue::Untyped(value), at);
            return self.admit(name, value.size(), at, depth, growth, problems).then_some(value);
        }
        let Some(value) = self.find(plain_name(name)) else {
            let known = self.surroundings.declared.iter().map(String::as_str);
            let hint = did_you_mean(plain_name(name), known).unwrap_or_else(|| "declare it under vars:".to_owned());
            problems.add(at, format!("unknown variable {name:?}"), Some(hint));
            return None;
        };
        // Looked at before it is copied: variables that name one another twice each double from one to the next.
        self.admit(name, value.size(), at, depth, growth, problems).then(|| value.clone())
    }

    /// Counts a value that is about to be inserted; false where it makes the tree too large.
    fn admit(
        &self,
        name: &str,
        size: TreeSize,
        at: Place,
        depth: usize,
        growth: &mut Growth,
        problems: &mut Problems,
    ) -> bool {
        growth.size.n_nodes += size.n_nodes;
        growth.size.n_bytes += size.n_bytes;
        let is_small = growth.size.n_nodes <= MAX_NODES && growth.size.n_bytes <= MAX_BYTES;
        let message = if depth + size.depth > MAX_DEPTH {
            format!("${{{name}}} nests lists and mappings deeper than {MAX_DEPTH} levels")
        } else if !is_small || !self.surroundings.count(size) {
            format!(
                "${{{name}}} makes this too large: references may bring {MAX_NODES} values and {} MiB of text into one variable or stage",
                MAX_BYTES >> 20
            )
        } else {
            return true;
        };
        growth.is_exceeded = true;
        problems.add(at, message, Some("variables that name others more than once multiply".to_owned()));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::yaml::parse;

    fn substitute(text: &str) -> (Node, bool) {
        let env = BTreeMap::from([("HOME".to_owned(), "/home/x".to_owned()), ("N".to_owned(), "7".to_owned())]);
        let surroundings = Surroundings::new(&env, BTreeSet::new());
        let vars = parse("n: 4\nname: nf4\nlist: [1, 2]\nversion: 3.10\n").expect("a tree");
        let mut scope = Scope::new(&surroundings);
        for (key, node) in vars.as_map().expect("a mapping") {
            scope.values.insert(key.text.clone(), node.clone());
        }
        let mut problems = Problems::default();
        let node = Node::new(NodeValue::Text(text.to_owned()), Place { line: 1, column: 1 });
        let value = scope.inner().substitute(&node, &mut problems);
        (value, problems.is_empty())
    }

    #[test]
    fn an_exact_reference_takes_the_value_s_type_and_others_are_text() {
        let of = |text: &str| substitute(text).0;
        assert_eq!(of("${n}").value, NodeValue::Int(4));
        assert!(matches!(of("${list}").value, NodeValue::List(_)));
        assert_eq!(of("x/${name}-${n}.yaml").value, NodeValue::Text("x/nf4-4.yaml".to_owned()));
        assert_eq!(of("${env:HOME}/m").value, NodeValue::Text("/home/x/m".to_owned()));
        assert_eq!(of("$${n}").value, NodeValue::Text("${n}".to_owned()));
        assert_eq!(of("v${version}").value, NodeValue::Text("v3.10".to_owned()));
        assert_eq!((of("${env:N}").as_int(), of("${env:N}").as_text()), (Some(7), Some("7")));
    }

    #[test]
    fn unknown_names_unset_environment_and_open_references_are_problems() {
        for text in ["${nam}", "${env:NOPE}", "${n", "a${list}"] {
            assert!(!substitute(text).1, "{text}");
        }
    }
}
