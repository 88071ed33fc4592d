//! The entries of a mapping of rotary parameters, and the scaling that they describe.

use super::config::{ConfigFile, shown};
use super::notes::Mark;
use crate::engine::rope::RopeScaling;
use crate::inference::InferenceError;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

const KNOWN: &str = "default, linear, dynamic, yarn, longrope and llama3";

/// Rotary parameters, taken from one mapping or laid over those of another.
pub struct RopeFields<'a> {
    config: &'a ConfigFile,
    /// Where they stand, for errors.
    name: String,
    /// By name: the path in the file, and the value.
    entries: BTreeMap<String, (String, &'a Value)>,
    /// A kind that counts instead of those in the entries.
    kind: Option<&'static str>,
    /// They are those of some of the layers only.
    is_nested: bool,
}

impl<'a> RopeFields<'a> {
    pub fn new(config: &'a ConfigFile, name: &str) -> RopeFields<'a> {
        let (is_nested, name) = (name.contains('.'), config.path_of(name));
        RopeFields { config, name, entries: BTreeMap::new(), kind: None, is_nested }
    }

    /// Lays a mapping's entries over those that are there.
    pub fn take(&mut self, name: &str, entries: &'a Map<String, Value>) {
        self.name = self.config.path_of(name);
        for (key, value) in entries {
            let path = format!("{}.{key}", self.name);
            if let Some((lost_path, lost)) = self.entries.insert(key.clone(), (path.clone(), value)) {
                self.config.overrule(&lost_path, lost, &path, value);
            }
        }
        // A type that is spelled out counts again.
        if entries.get("rope_type").is_some_and(|kind| !kind.is_null()) {
            self.kind = None;
        }
    }

    /// Sets the kind that counts unless a mapping names a `rope_type`.
    pub fn set_kind(&mut self, kind: &'static str) {
        self.kind = Some(kind);
    }

    /// Takes other names for a kind.
    pub fn rename_kind(&mut self, old: &[&str], new: &'static str) {
        if self.kind().is_ok_and(|kind| old.contains(&kind)) {
            self.kind = Some(new);
        }
    }

    /// Returns an entry and its path, and notes that it is used.
    pub fn get(&self, key: &str) -> Option<(String, &'a Value)> {
        let (path, value) = self.entries.get(key)?;
        self.config.mark(path, Mark::Used);
        Some((path.clone(), *value))
    }

    /// Returns an entry without noting it.
    pub fn peek(&self, key: &str) -> Option<&'a Value> {
        self.entries.get(key).map(|(_, value)| *value)
    }

    pub fn mark_harmless(&self, key: &str) {
        if let Some((path, _)) = self.entries.get(key) {
            self.config.mark(path, Mark::Harmless);
        }
    }

    /// Returns the kind of scaling: `rope_type`, or else `type`, or else none. A null counts as missing.
    pub fn kind(&self) -> Result<&'a str, InferenceError> {
        if let Some(kind) = self.kind {
            self.mark_harmless("rope_type");
            return Ok(kind);
        }
        let named = |key: &str| self.entries.get(key).filter(|(_, value)| !value.is_null());
        let (path, value) = match (named("rope_type"), named("type")) {
            (Some((path, value)), old) => {
                if let Some((old_path, old)) = old {
                    self.config.overrule(old_path, old, path, value);
                }
                (path, value)
            }
            (None, Some((path, value))) => (path, value),
            (None, None) => return self.no_kind(),
        };
        self.config.mark(path, Mark::Used);
        value.as_str().ok_or_else(|| self.config.error(format!("{path}: expected a text, found {}", shown(value))))
    }

    /// A type that is missing means no scaling, as in transformers. One that is null beside parameters that need one is an
    /// error there, too.
    fn no_kind(&self) -> Result<&'a str, InferenceError> {
        let is_type = |key: &str| matches!(key, "rope_type" | "type" | "rope_theta" | "partial_rotary_factor");
        let has_more = self.entries.iter().any(|(key, (_, value))| !is_type(key) && !value.is_null());
        if self.entries.contains_key("rope_type") && has_more {
            let name = &self.name;
            return Err(self.config.error(format!("{name}.rope_type is null; labpipe knows {KNOWN}")));
        }
        Ok("default")
    }

    pub fn scaling(&self, rotary_dim: usize) -> Result<RopeScaling, InferenceError> {
        match self.kind()? {
            "default" => Ok(RopeScaling::None),
            "linear" => Ok(RopeScaling::Linear { factor: self.required("factor")? }),
            "dynamic" => Ok(RopeScaling::Dynamic {
                factor: self.required("factor")?,
                original_max_position: self.stated_context()?,
            }),
            "yarn" => self.yarn(),
            "longrope" => self.long_rope(rotary_dim),
            "llama3" => Ok(RopeScaling::Llama3 {
                factor: self.required("factor")?,
                low_freq_factor: self.required("low_freq_factor")?,
                high_freq_factor: self.required("high_freq_factor")?,
                original_max_position: self.original_context()?,
            }),
            other => {
                let name = &self.name;
                Err(self.config.error(format!("{name}: rope type {other:?} is not supported; labpipe knows {KNOWN}")))
            }
        }
    }

    fn yarn(&self) -> Result<RopeScaling, InferenceError> {
        let original_max_position = self.original_context()?;
        // The entry must be there; null asks for the quotient of both contexts.
        let factor = match self.peek("factor") {
            None => return Err(self.error("factor is missing")),
            Some(_) => self.factor_or_stretch(original_max_position)?,
        };
        let mscale = |weight: f64| if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 };
        let attention_factor =
            match (self.number("attention_factor")?, self.not_zero("mscale")?, self.not_zero("mscale_all_dim")?) {
                (Some(attention_factor), ..) => attention_factor,
                (None, Some(all), Some(all_dim)) => mscale(all) / mscale(all_dim),
                _ => mscale(1.0),
            };
        Ok(RopeScaling::Yarn {
            factor,
            original_max_position,
            beta_fast: self.not_zero("beta_fast")?.unwrap_or(32.0),
            beta_slow: self.not_zero("beta_slow")?.unwrap_or(1.0),
            attention_factor,
            truncate: self.truncate()?,
        })
    }

    /// Returns whether the ramp's ends are rounded. Null counts as false there; transformers does not find the entry where
    /// layers differ.
    fn truncate(&self) -> Result<bool, InferenceError> {
        if self.is_nested {
            return Ok(true);
        }
        match self.get("truncate") {
            None => Ok(true),
            Some((_, Value::Null)) => Ok(false),
            Some((_, Value::Bool(truncate))) => Ok(*truncate),
            Some((_, other)) => Err(self.error(&format!("truncate: expected true or false, found {}", shown(other)))),
        }
    }

    fn long_rope(&self, rotary_dim: usize) -> Result<RopeScaling, InferenceError> {
        let original_max_position = self.original_context()?;
        let factor = self.factor_or_stretch(original_max_position)?;
        let attention_factor = match self.number("attention_factor")? {
            Some(attention_factor) => attention_factor,
            None if factor <= 1.0 => 1.0,
            None => (1.0 + factor.ln() / original_max_position.ln()).sqrt(),
        };
        Ok(RopeScaling::LongRope {
            short_factor: self.divisors("short_factor", rotary_dim / 2)?,
            long_factor: self.divisors("long_factor", rotary_dim / 2)?,
            original_max_position,
            attention_factor,
        })
    }

    fn factor_or_stretch(&self, original_max_position: f64) -> Result<f64, InferenceError> {
        self.number("factor")?.map_or_else(|| Ok(self.stated_context()? / original_max_position), Ok)
    }

    fn divisors(&self, key: &str, n: usize) -> Result<Vec<f64>, InferenceError> {
        let Some((_, value)) = self.get(key).filter(|(_, value)| !value.is_null()) else {
            return Err(self.error(&format!("{key} is missing")));
        };
        let list = value
            .as_array()
            .ok_or_else(|| self.error(&format!("{key}: expected a list of numbers, found {}", shown(value))))?;
        if list.len() != n {
            return Err(self.error(&format!("{key}: expected {n} numbers, found {}", list.len())));
        }
        list.iter().map(|value| self.positive(key, value)).collect()
    }

    /// Returns the context before scaling: the field beside the mapping, or else the one in it, or `max_position_embeddings`.
    /// Where layers differ, transformers does not look beside it.
    fn original_context(&self) -> Result<f64, InferenceError> {
        let key = "original_max_position_embeddings";
        let outer = if self.is_nested { None } else { self.config.get(key) };
        match (outer, self.entries.get(key)) {
            (Some(outer), inner) => {
                if let Some((path, inner)) = inner {
                    self.config.overrule(path, inner, &self.config.path_of(key), outer);
                }
                self.positive(key, outer)
            }
            (None, _) => self.number(key)?.map_or_else(|| self.stated_context(), Ok),
        }
    }

    fn stated_context(&self) -> Result<f64, InferenceError> {
        Ok(self.config.required_size("max_position_embeddings")? as f64)
    }

    fn required(&self, key: &str) -> Result<f64, InferenceError> {
        self.number(key)?.ok_or_else(|| self.error(&format!("{key} is missing")))
    }

    /// Returns a number above 0, or `None` if it is missing or null.
    fn number(&self, key: &str) -> Result<Option<f64>, InferenceError> {
        let value = self.get(key).map(|(_, value)| value).filter(|value| !value.is_null());
        value.map(|value| self.positive(key, value)).transpose()
    }

    /// As [`number`](Self::number); 0 counts as missing.
    fn not_zero(&self, key: &str) -> Result<Option<f64>, InferenceError> {
        match self.get(key) {
            Some((_, value)) if value.as_f64() == Some(0.0) => Ok(None),
            _ => self.number(key),
        }
    }

    fn positive(&self, key: &str, value: &Value) -> Result<f64, InferenceError> {
        let number = value.as_f64().filter(|number| number.is_finite() && *number > 0.0);
        number.ok_or_else(|| self.error(&format!("{key}: expected a number above 0, found {}", shown(value))))
    }

    /// Returns an error that names the mapping and its kind.
    pub fn error(&self, reason: &str) -> InferenceError {
        let kind = self.kind().unwrap_or("default");
        self.config.error(format!("{} (rope type {kind}): {reason}", self.name))
    }
}
