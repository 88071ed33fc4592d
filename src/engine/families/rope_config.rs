//! Rotary embeddings as configs spell them: `rope_theta` and `rope_scaling`, or `rope_parameters` (transformers 5). Which of them
//! counts is what transformers 5.24 does (`modeling_rope_utils.py`, and Gemma 3's and Phi-3's own configuration classes).

use super::config::{ConfigFile, shown};
use super::notes::Mark;
use super::rope_fields::RopeFields;
use crate::engine::rope::{RopeScaling, RopeSpec};
use crate::inference::InferenceError;
use serde_json::{Map, Value};

const DEFAULT_THETA: f64 = 10_000.0;
const LAYER_KINDS: [&str; 2] = ["full_attention", "sliding_attention"];

impl ConfigFile {
    /// Returns the rotary embedding of a family that rotates whole heads and has one embedding for all layers.
    pub fn rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        self.rope_with_theta(head_dim, DEFAULT_THETA)
    }

    /// As [`rope`](Self::rope), for a family with a theta of its own where the config has none.
    pub fn rope_with_theta(&self, head_dim: usize, default_theta: f64) -> Result<RopeSpec, InferenceError> {
        self.one_rope(&|config, fields| {
            let theta = config.theta(&fields, "rope_theta", default_theta)?;
            config.whole_heads(&fields)?;
            config.rope_spec(theta, head_dim, fields)
        })
    }

    /// Returns the rotary embedding of Phi-3, which may rotate a part of each head, by LongRoPE or as it is.
    pub fn phi3_rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        self.one_rope(&|config, mut fields| {
            // What early configs call it.
            fields.rename_kind(&["su", "yarn"], "longrope");
            if !matches!(fields.kind()?, "default" | "longrope") {
                return Err(fields.error("a phi3 model has longrope or default"));
            }
            let theta = config.theta(&fields, "rope_theta", DEFAULT_THETA)?;
            let part = config.rotated_part(&fields)?;
            config.rope_spec(theta, (head_dim as f64 * part) as usize, fields)
        })
    }

    /// Returns the rotary embedding of Gemma 3's layers with full attention.
    pub fn full_attention_rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        let parameters = self.rope_mapping("rope_parameters")?;
        let mut fields = RopeFields::new(self, "rope_parameters.full_attention");
        match self.layer_rope("full_attention")? {
            Some(own) => fields.take("rope_parameters.full_attention", own),
            // transformers fills in the type before it adds `rope_scaling`, so that `type` does not count there.
            None if parameters.is_none() => fields.set_kind("default"),
            None => {}
        }
        if let Some(scaling) = self.rope_mapping("rope_scaling")? {
            if parameters.is_some_and(|parameters| !parameters.contains_key("full_attention")) {
                return Err(self.error("rope_scaling beside rope_parameters without full_attention: keep one of them"));
            }
            fields.take("rope_scaling", scaling);
        }
        let theta = self.theta(&fields, "rope_theta", 1_000_000.0)?;
        self.whole_heads(&fields)?;
        self.rope_spec(theta, head_dim, fields)
    }

    /// Returns the rotary embedding of Gemma 3's layers whose attention slides.
    pub fn sliding_attention_rope(&self, head_dim: usize) -> Result<RopeSpec, InferenceError> {
        let mut fields = RopeFields::new(self, "rope_parameters.sliding_attention");
        if let Some(own) = self.layer_rope("sliding_attention")? {
            fields.take("rope_parameters.sliding_attention", own);
        }
        let theta = self.theta(&fields, "rope_local_base_freq", DEFAULT_THETA)?;
        self.whole_heads(&fields)?;
        self.rope_spec(theta, head_dim, fields)
    }

    fn layer_rope(&self, kind: &str) -> Result<Option<&Map<String, Value>>, InferenceError> {
        let path = format!("rope_parameters.{kind}");
        match self.rope_mapping("rope_parameters")?.and_then(|parameters| parameters.get(kind)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(own)) => {
                self.mark(&self.path_of(&path), Mark::Used);
                Ok(Some(own))
            }
            Some(other) => {
                Err(self.error(format!("{}: expected a mapping, found {}", self.path_of(&path), shown(other))))
            }
        }
    }

    /// Returns a mapping of rotary parameters; null and an empty one count as none.
    fn rope_mapping(&self, field: &str) -> Result<Option<&Map<String, Value>>, InferenceError> {
        match self.get(field) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(entries)) => Ok(Some(entries).filter(|entries| !entries.is_empty())),
            Some(other) => {
                Err(self.error(format!("{}: expected a mapping, found {}", self.path_of(field), shown(other))))
            }
        }
    }

    /// Reads the one embedding of all layers: `rope_scaling`, where there is one, replaces `rope_parameters`.
    fn one_rope(
        &self,
        read: &dyn Fn(&ConfigFile, RopeFields<'_>) -> Result<RopeSpec, InferenceError>,
    ) -> Result<RopeSpec, InferenceError> {
        let scaling = self.rope_mapping("rope_scaling")?;
        // What is replaced is not read.
        let parameters = if scaling.is_some() { self.apart().rope_mapping("rope_parameters")?.cloned() } else { None };
        let fields = match (scaling, &parameters) {
            (Some(scaling), _) => self.flat_fields(self, "rope_scaling", scaling)?,
            (None, _) => match self.rope_mapping("rope_parameters")? {
                Some(own) => self.flat_fields(self, "rope_parameters", own)?,
                None => RopeFields::new(self, "rope_parameters"),
            },
        };
        let rope = read(self, fields)?;
        if let (Some(scaling), Some(parameters)) = (scaling, parameters) {
            let apart = self.apart();
            let other =
                self.flat_fields(&apart, "rope_parameters", &parameters).and_then(|fields| read(&apart, fields));
            let path = self.path_of("rope_parameters");
            if other.is_ok_and(|other| other == rope) {
                self.mark(&path, Mark::Harmless);
            } else {
                let (lost, won) = (Value::Object(parameters), Value::Object(scaling.clone()));
                self.overrule(&path, &lost, &self.path_of("rope_scaling"), &won);
            }
        }
        Ok(rope)
    }

    fn flat_fields<'a>(
        &self,
        notes: &'a ConfigFile,
        name: &str,
        entries: &'a Map<String, Value>,
    ) -> Result<RopeFields<'a>, InferenceError> {
        if let Some(kind) = LAYER_KINDS.iter().find(|kind| entries.contains_key(**kind)) {
            let path = self.path_of(name);
            return Err(
                self.error(format!("{path}.{kind}: models of this family have one rotary embedding for all layers"))
            );
        }
        let mut fields = RopeFields::new(notes, name);
        fields.take(name, entries);
        Ok(fields)
    }

    /// Returns theta: the one among the rotary parameters, or else the field beside them, or else the default.
    fn theta(&self, fields: &RopeFields<'_>, beside: &str, default: f64) -> Result<f64, InferenceError> {
        let theta = match (fields.get("rope_theta"), self.peek(beside)) {
            (Some((path, inner)), outer) => {
                if let Some(outer) = outer {
                    self.overrule(&self.path_of(beside), outer, &path, inner);
                }
                inner
                    .as_f64()
                    .ok_or_else(|| self.error(format!("{path}: expected a number, found {}", shown(inner))))?
            }
            (None, _) => self.number(beside)?.unwrap_or(default),
        };
        if theta <= 1.0 {
            return Err(self.error(format!("{}: expected a number above 1, found {theta}", self.path_of(beside))));
        }
        Ok(theta)
    }

    /// Returns the rotated part of each head: the number among the rotary parameters, or else the field beside them, or 1.
    fn rotated_part(&self, fields: &RopeFields<'_>) -> Result<f64, InferenceError> {
        let field = "partial_rotary_factor";
        let part = match (fields.get(field), self.peek(field)) {
            (Some((path, inner)), outer) => {
                if let Some(outer) = outer {
                    self.overrule(&self.path_of(field), outer, &path, inner);
                }
                self.finite(field, inner)?
            }
            (None, _) => self.number(field)?.unwrap_or(1.0),
        };
        if !(0.0..=1.0).contains(&part) {
            return Err(self.error(format!("{field}: expected a number from 0 to 1, found {part}")));
        }
        Ok(part)
    }

    /// Checks that no part of a head is left out. Without scaling, transformers ignores `partial_rotary_factor` in these
    /// families; with scaling it computes too few frequencies and fails.
    fn whole_heads(&self, fields: &RopeFields<'_>) -> Result<(), InferenceError> {
        let field = "partial_rotary_factor";
        let found = fields.peek(field).or_else(|| self.peek(field));
        let is_whole = found.is_none_or(|value| value.is_null() || value.as_f64() == Some(1.0));
        if is_whole {
            fields.mark_harmless(field);
        } else if fields.kind()? != "default" {
            let found = found.map(shown).unwrap_or_default();
            return Err(fields.error(&format!("{field} is {found}, and models of this family rotate whole heads")));
        }
        Ok(())
    }

    fn rope_spec(&self, theta: f64, rotary_dim: usize, fields: RopeFields<'_>) -> Result<RopeSpec, InferenceError> {
        if rotary_dim == 0 || !rotary_dim.is_multiple_of(2) {
            return Err(self.error(format!(
                "{rotary_dim} values of each head are rotated; rotary embeddings need an even number above 0"
            )));
        }
        let scaling = fields.scaling(rotary_dim)?;
        if rotary_dim == 2 && matches!(scaling, RopeScaling::Dynamic { .. }) {
            return Err(fields.error("it needs heads of more than 2 rotated values"));
        }
        Ok(RopeSpec { theta, rotary_dim, scaling })
    }
}
