//! What was done with a config's fields while a spec was made of them.

use super::fields::{FieldRole, FieldRule, rule_of};
use crate::inference::AccountPart;
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// What was done with an entry that a file has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mark {
    /// It says what another entry says, or what holds anyway.
    Harmless,
    Used,
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
    /// Marks an entry. A mark gives way to those that come later in the order of [`Mark`].
    pub fn mark(&mut self, path: &str, mark: Mark) {
        let known = self.marks.entry(path.to_owned()).or_insert(mark);
        *known = mark.max(*known);
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

#[cfg(test)]
mod tests {
    use super::super::fields::{FieldRole, rule_of};
    use super::super::{ConfigFile, FAMILIES, account_of, family_of, spec_of};
    use super::*;
    use serde_json::json;
    use std::path::Path;

    fn config(model_type: &str, more: Value) -> ConfigFile {
        let mut fields = json!({ "model_type": model_type, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 96, "max_position_embeddings": 64 });
        for (name, value) in more.as_object().expect("a mapping") {
            fields[name] = value.clone();
        }
        ConfigFile::of(Path::new("config.json"), fields)
    }

    fn account(model_type: &str, more: Value) -> AccountPart {
        account_of(&config(model_type, more)).expect("an account")
    }

    #[test]
    fn fields_that_nothing_is_made_of_are_named() {
        let part = account(
            "llama",
            json!({ "logit_scale": 0.25, "rope_scaling": { "rope_type": "linear", "factor": 2.0, "beta_fast": 8, "extra": null },
                "pad_token_id": 0, "use_cache": true, "sliding_window": 16, "no_such_field": null, "mlp_bias": false }),
        );
        assert_eq!(part.unused, ["logit_scale", "rope_scaling.beta_fast", "sliding_window"]);
        // The eight fields that every config here has, mlp_bias, and type and factor; the ids, the cache and what is null.
        assert_eq!((part.n_used, part.n_harmless), (11, 4));
        assert!(account("llama", json!({})).unused.is_empty());
    }

    #[test]
    fn a_rotated_part_is_named_by_families_that_rotate_whole_heads() {
        for family in ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "olmo2"] {
            let inside = json!({ "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5 });
            let beside = account(family, json!({ "partial_rotary_factor": 0.5 }));
            assert_eq!(beside.unused, ["partial_rotary_factor"], "{family}");
            assert!(account(family, json!({ "partial_rotary_factor": 1.0 })).unused.is_empty(), "{family}");
            if family != "gemma3_text" {
                let inside = account(family, json!({ "rope_parameters": inside }));
                assert_eq!(inside.unused, ["rope_parameters.partial_rotary_factor"], "{family}");
            }
        }
        assert!(account("phi3", json!({ "partial_rotary_factor": 0.5 })).unused.is_empty());
    }

    #[test]
    fn the_loser_of_two_fields_is_named_with_both_values() {
        let linear = json!({ "rope_type": "linear", "factor": 4.0 });
        let plain = json!({ "rope_type": "default", "rope_theta": 500000.0 });
        let part = account("llama", json!({ "rope_scaling": linear, "rope_parameters": plain }));
        assert_eq!(part.unused, ["rope_parameters"]);
        let ignored = r#"config.json: rope_parameters {"rope_type":"default","rope_theta":500000.0} is ignored: "#;
        let counts = r#"rope_scaling {"rope_type":"linear","factor":4.0} counts, as in transformers"#;
        assert_eq!(part.warnings, [format!("{ignored}{counts}")]);
        let part = account("llama", json!({ "rope_theta": 70000, "rope_parameters": plain }));
        assert_eq!(part.unused, ["rope_theta"]);
        assert!(part.warnings[0].contains("rope_theta 70000 is ignored: rope_parameters.rope_theta 500000.0 counts"));
        let part =
            account("gemma2", json!({ "hidden_act": "gelu", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 8 }));
        assert_eq!(part.unused, ["hidden_act"]);
        let part = account(
            "qwen2",
            json!({ "use_sliding_window": false, "layer_types": ["sliding_attention", "sliding_attention"] }),
        );
        assert_eq!(part.unused, ["layer_types"]);
        let full = json!(["full_attention", "full_attention"]);
        let part = account(
            "smollm3",
            json!({ "no_rope_layers": [1, 0], "no_rope_layer_interval": 4, "use_sliding_window": true, "sliding_window": 8, "layer_types": full }),
        );
        assert_eq!(part.unused, ["no_rope_layer_interval", "use_sliding_window"]);
    }

    #[test]
    fn two_fields_that_say_the_same_are_no_news() {
        let linear = json!({ "rope_type": "linear", "factor": 4.0 });
        let saved = json!({ "type": "linear", "factor": 4.0, "rope_theta": 10000.0 });
        let part = account("llama", json!({ "rope_scaling": linear, "rope_parameters": saved, "rope_theta": 10000 }));
        assert!(part.unused.is_empty() && part.warnings.is_empty(), "{part:?}");
        let part = account("gemma2", json!({ "hidden_act": "gelu_pytorch_tanh", "head_dim": 8 }));
        assert!(part.unused.is_empty() && part.warnings.is_empty(), "{part:?}");
        let full = json!(["full_attention", "full_attention"]);
        let unused_window = json!({ "use_sliding_window": true, "sliding_window": null, "layer_types": null });
        assert!(account("smollm3", unused_window).warnings.is_empty());
        let part = account(
            "smollm3",
            json!({ "no_rope_layers": [1, 0], "no_rope_layer_interval": 2, "use_sliding_window": false, "layer_types": full }),
        );
        assert!(part.unused.is_empty() && part.warnings.is_empty(), "{part:?}");
    }

    #[test]
    fn fields_of_a_section_are_counted_by_their_path() {
        let text = json!({ "hidden_size": 64, "head_dim": 8, "num_hidden_layers": 2, "extra": 3, "pad_token_id": 0 });
        let file =
            json!({ "model_type": "gemma3", "text_config": text, "vision_config": { "hidden_size": 8 }, "other": [1] });
        let part = account_of(&ConfigFile::of(Path::new("config.json"), file)).expect("an account");
        assert_eq!(part.unused, ["other", "text_config.extra"]);
        assert_eq!((part.n_used, part.n_harmless), (4, 2));
    }

    #[test]
    fn a_field_that_changes_what_transformers_computes_is_an_error() {
        for (field, value) in [
            ("is_causal", json!(false)),
            ("per_layer_config", json!({ "0": { "intermediate_size": 8 } })),
            ("configuration_files", json!(["config.5.0.0.json"])),
            ("transformers_weights", json!("other.safetensors")),
        ] {
            for family in FAMILIES.iter().filter(|family| family.model_type != "gemma3") {
                let error = spec_of(&config(family.model_type, json!({ field: value }))).expect_err("an error");
                assert!(error.to_string().contains(&format!("{field}: {value} changes what")), "{error}");
            }
        }
        let inside = json!({ "model_type": "gemma3", "text_config": { "is_causal": false } });
        let error = spec_of(&ConfigFile::of(Path::new("config.json"), inside)).expect_err("an error");
        assert!(error.to_string().contains("text_config.is_causal"), "{error}");
    }

    #[test]
    fn every_field_that_is_read_is_listed_as_read() {
        let text = include_str!("../../../tests/fixtures/config_cases.json");
        let file: Value = serde_json::from_str(text).expect("JSON");
        let mut n_reads = 0;
        for case in file["cases"].as_array().expect("a list") {
            let config = ConfigFile::of(Path::new("config.json"), case["config"].clone());
            let (Ok(family), Ok(_)) = (family_of(&config), spec_of(&config)) else { continue };
            let marks = config.notes().marks.clone();
            for (path, mark) in marks.iter().filter(|(path, _)| !path.contains('.')) {
                let rule = rule_of(family.rules.own, path).map(|rule| rule.role);
                let is_listed = rule == Some(FieldRole::Read) || *mark != Mark::Used;
                assert!(is_listed, "{}: {path} is read and listed as {rule:?}", case["name"]);
                n_reads += usize::from(*mark == Mark::Used);
            }
        }
        assert!(n_reads > 3000, "{n_reads} reads");
    }
}
