//! What was done with a config's fields while a spec was made of them.

use super::fields::{FieldRole, FieldRule, rule_of};
use crate::inference::AccountPart;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What was done with an entry that a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    Used,
    /// It says what another entry says, or what holds anyway.
    Harmless,
    /// It would have changed something, and something else counts.
    Ignored,
}

/// Lists of rules; those of a later list count before those of an earlier one.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    pub own: &'static [&'static [FieldRule]],
    /// Those of the section that the text model is in, where it is in one.
    pub section: &'static [&'static [FieldRule]],
}

/// Marks by an entry's path (`rope_scaling.factor`), and sentences for the user.
#[derive(Debug, Clone, Default)]
pub struct Notes {
    marks: BTreeMap<String, Mark>,
    warnings: Vec<String>,
}

impl Notes {
    /// Marks an entry. Something that was used stays so.
    pub fn mark(&mut self, path: &str, mark: Mark) {
        let known = self.marks.entry(path.to_owned()).or_insert(mark);
        if *known != Mark::Used {
            *known = mark;
        }
    }

    /// Adds a sentence, once.
    pub fn warn(&mut self, sentence: String) {
        if !self.warnings.contains(&sentence) {
            self.warnings.push(sentence);
        }
    }

    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Counts the fields of a config, or of a section of it whose path is `prefix`.
    pub fn count(&self, fields: &Map<String, Value>, prefix: &str, rules: &Rules, part: &mut AccountPart) {
        for (name, value) in fields {
            let path = format!("{prefix}{name}");
            match (self.marks.get(&path), value) {
                (Some(Mark::Used), Value::Object(inner)) if is_rope(name) => self.count_rope(inner, &path, part),
                (Some(Mark::Used), Value::Object(inner)) if name == "text_config" => {
                    let rules = Rules { own: rules.section, section: &[] };
                    self.count(inner, &format!("{path}."), &rules, part);
                }
                (Some(Mark::Used), _) => part.n_used += 1,
                (Some(Mark::Harmless), _) => part.n_harmless += 1,
                (Some(Mark::Ignored), _) => part.unused.push(path),
                (None, value) => {
                    let rule = rule_of(rules.own, name);
                    // A field that this config switches off changes nothing; nor does one without a value.
                    let is_off = rule.is_some_and(|rule| rule.role == FieldRole::Read || rule.is_without_effect(value));
                    if is_off || value.is_null() {
                        part.n_harmless += 1;
                    } else {
                        part.unused.push(path);
                    }
                }
            }
        }
    }

    /// Counts the entries of a mapping of rotary parameters; transformers, too, names those that it does not know.
    fn count_rope(&self, entries: &Map<String, Value>, prefix: &str, part: &mut AccountPart) {
        for (name, value) in entries {
            let path = format!("{prefix}.{name}");
            match (self.marks.get(&path), value) {
                (Some(Mark::Used), Value::Object(inner)) => self.count_rope(inner, &path, part),
                (Some(Mark::Used), _) => part.n_used += 1,
                (Some(Mark::Harmless), _) | (None, Value::Null) => part.n_harmless += 1,
                (Some(Mark::Ignored) | None, _) => part.unused.push(path),
            }
        }
    }
}

fn is_rope(name: &str) -> bool {
    matches!(name, "rope_scaling" | "rope_parameters")
}
