//! A config.json with typed, checked access: every error names the file and the field.

use super::fields::{FieldRole, FieldRule, rule_of};
use super::notes::{Mark, Notes, Rules};
use crate::inference::{AccountPart, InferenceError};
use crate::json_file::parse_json_with_repeats;
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Larger dimensions than this are taken for damage: they would ask for absurd allocations.
pub(super) const MAX_DIM: usize = 1 << 24;
/// Characters of a value that a message shows.
const MAX_SHOWN: usize = 120;

/// A parsed config.json. It notes what is read of it.
#[derive(Debug, Clone)]
pub struct ConfigFile {
    path: PathBuf,
    root: Map<String, Value>,
    /// What holds for fields that the file leaves out.
    defaults: BTreeMap<&'static str, Value>,
    /// The path of the section, with a dot at its end; empty for the file itself.
    prefix: String,
    notes: Arc<Mutex<Notes>>,
}

impl ConfigFile {
    /// Reads and parses the file.
    ///
    /// # Errors
    /// `File` where it is missing or no JSON object.
    pub fn read(path: &Path) -> Result<ConfigFile, InferenceError> {
        let fail = |reason: String| InferenceError::File { path: path.to_owned(), reason };
        let bytes = std::fs::read(path).map_err(|error| {
            let hint = "; a model folder in Hugging Face layout has config.json, tokenizer.json and *.safetensors";
            fail(format!("{error}{}", if error.kind() == std::io::ErrorKind::NotFound { hint } else { "" }))
        })?;
        let (root, repeated) = parse_json_with_repeats(&bytes).map_err(fail)?;
        let Value::Object(root) = root else {
            return Err(fail("expected a JSON object".to_owned()));
        };
        let config = ConfigFile::with_fields(path, root);
        for key in repeated {
            let (first, last) = (shown(&key.first), shown(&key.last));
            config.warn(format!("{} stands twice: {last} counts and {first} does not, as in transformers", key.path));
        }
        Ok(config)
    }

    /// Takes the config that a file of another format stands for.
    pub fn of(path: &Path, root: Value) -> ConfigFile {
        let root = if let Value::Object(root) = root { root } else { Map::new() };
        ConfigFile::with_fields(path, root)
    }

    fn with_fields(path: &Path, root: Map<String, Value>) -> ConfigFile {
        ConfigFile {
            path: path.to_owned(),
            root,
            defaults: BTreeMap::new(),
            prefix: String::new(),
            notes: Arc::default(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Returns the config with values for fields that it leaves out; a field that is null stays so.
    pub fn with_defaults(&self, defaults: &[(&'static str, Value)]) -> ConfigFile {
        let mut config = self.clone();
        config.defaults.extend(defaults.iter().cloned());
        config
    }

    /// Returns the config with values for fields that it leaves out, and warns of each that it does leave out: configs of
    /// these families have them.
    pub fn with_stated_defaults(&self, defaults: &[(&'static str, Value)]) -> ConfigFile {
        for (field, value) in defaults.iter().filter(|(field, _)| !self.root.contains_key(*field)) {
            let path = self.path_of(field);
            self.warn(format!("{path} is missing: {value} is used, transformers' default for this model_type"));
        }
        self.with_defaults(defaults)
    }

    /// Returns the config that stands in a field of this one.
    pub fn section(&self, field: &str) -> Result<ConfigFile, InferenceError> {
        match self.get(field) {
            Some(Value::Object(section)) => Ok(ConfigFile {
                root: section.clone(),
                defaults: BTreeMap::new(),
                prefix: format!("{}.", self.path_of(field)),
                ..self.clone()
            }),
            other => Err(self.wrong_type(field, "a mapping", other.unwrap_or(&Value::Null))),
        }
    }

    /// Returns the same config with notes of its own, to try something out.
    pub(super) fn apart(&self) -> ConfigFile {
        ConfigFile { notes: Arc::default(), ..self.clone() }
    }

    /// Returns an error that names this file.
    pub fn error(&self, reason: impl Into<String>) -> InferenceError {
        InferenceError::File { path: self.path.clone(), reason: reason.into() }
    }

    pub(super) fn wrong_type(&self, field: &str, expected: &str, found: &Value) -> InferenceError {
        self.error(format!("{}: expected {expected}, found {}", self.path_of(field), shown(found)))
    }

    /// Returns a field's path in the file.
    pub(super) fn path_of(&self, field: &str) -> String {
        format!("{}{field}", self.prefix)
    }

    pub(super) fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn warn(&self, sentence: String) {
        self.notes().warn(sentence);
    }

    /// Marks an entry by its path.
    pub(super) fn mark(&self, path: &str, mark: Mark) {
        self.notes().mark(path, mark);
    }

    /// Notes that one entry counts and another does not, which says something else. The paths are those in the file.
    pub fn overrule(&self, loser: &str, lost: &Value, winner: &str, won: &Value) {
        if is_same(lost, won) {
            self.mark(loser, Mark::Harmless);
        } else {
            self.mark(loser, Mark::Ignored);
            let (lost, won) = (shown(lost), shown(won));
            self.warn(format!("{loser} {lost} is ignored: {winner} {won} counts, as in transformers"));
        }
    }

    /// Returns what became of the fields, by the rules of the family that read them.
    pub fn account(&self, rules: &Rules) -> AccountPart {
        let notes = self.notes();
        let mut part = AccountPart { source: "config.json".to_owned(), ..AccountPart::default() };
        notes.count(&self.root, &self.prefix, rules, &mut part);
        part.unused.sort();
        part.warnings = notes.warnings().iter().map(|sentence| format!("config.json: {sentence}")).collect();
        part
    }

    /// Checks that no field asks for what transformers does and labpipe does not.
    ///
    /// # Errors
    /// `File` that names the field.
    pub fn check_supported(&self, rules: &[&[FieldRule]]) -> Result<(), InferenceError> {
        for (name, value) in &self.root {
            match rule_of(rules, name) {
                Some(rule @ FieldRule { role: FieldRole::Only(known), .. }) if !rule.is_without_effect(value) => {
                    let known = if known.is_empty() { "null" } else { known[0] };
                    let path = self.path_of(name);
                    return Err(self.error(format!(
                        "{path}: {} changes what transformers computes; labpipe supports {known} only",
                        shown(value)
                    )));
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Returns true if the file itself has the field.
    pub fn has(&self, field: &str) -> bool {
        self.root.contains_key(field)
    }

    /// Returns a field, or what holds where the file leaves it out, and notes that it was used.
    pub(super) fn get(&self, field: &str) -> Option<&Value> {
        match self.root.get(field) {
            Some(value) => {
                self.mark(&self.path_of(field), Mark::Used);
                Some(value)
            }
            None => self.defaults.get(field),
        }
    }

    /// Returns a field that is not null.
    pub(super) fn present(&self, field: &str) -> Option<&Value> {
        self.get(field).filter(|value| !value.is_null())
    }

    /// Returns a field without noting it.
    pub(super) fn peek(&self, field: &str) -> Option<&Value> {
        self.root.get(field).or_else(|| self.defaults.get(field))
    }

    /// Returns a text, or `None` if the field is missing or null.
    pub fn text(&self, field: &str) -> Result<Option<String>, InferenceError> {
        self.present(field)
            .map(|value| value.as_str().map(str::to_owned).ok_or_else(|| self.wrong_type(field, "a text", value)))
            .transpose()
    }

    /// Returns the first of `architectures`.
    pub fn architecture(&self) -> Option<String> {
        self.root.get("architectures")?.get(0)?.as_str().map(str::to_owned)
    }

    /// Returns a true/false field, or the default if it is missing. Null is an error, as in transformers.
    pub fn flag(&self, field: &str, default: bool) -> Result<bool, InferenceError> {
        self.get(field)
            .map_or(Ok(default), |value| value.as_bool().ok_or_else(|| self.wrong_type(field, "true or false", value)))
    }

    /// Returns a finite number, or `None` if the field is missing. Null is an error, as in transformers.
    pub fn number(&self, field: &str) -> Result<Option<f64>, InferenceError> {
        self.get(field).map(|value| self.finite(field, value)).transpose()
    }

    pub(super) fn finite(&self, field: &str, value: &Value) -> Result<f64, InferenceError> {
        value.as_f64().filter(|number| number.is_finite()).ok_or_else(|| self.wrong_type(field, "a number", value))
    }

    fn whole(&self, field: &str, value: &Value, least: usize) -> Result<usize, InferenceError> {
        value
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .filter(|size| (least..=MAX_DIM).contains(size))
            .ok_or_else(|| self.wrong_type(field, &format!("a whole number from {least} to {MAX_DIM}"), value))
    }

    /// Returns a size of at least 1, or `None` if the field is missing or null.
    pub fn size(&self, field: &str) -> Result<Option<usize>, InferenceError> {
        self.present(field).map(|value| self.whole(field, value, 1)).transpose()
    }

    /// Returns a number of layers or the like, which may be 0.
    pub fn count(&self, field: &str, default: usize) -> Result<usize, InferenceError> {
        self.get(field).map_or(Ok(default), |value| self.whole(field, value, 0))
    }

    /// Refuses a null where transformers does, for a field whose absence means something else.
    pub fn refuse_null(&self, field: &str) -> Result<(), InferenceError> {
        match self.root.get(field) {
            Some(Value::Null) => Err(self.wrong_type(field, "a whole number", &Value::Null)),
            _ => Ok(()),
        }
    }

    /// Returns a size that the file must have.
    pub fn required_size(&self, field: &str) -> Result<usize, InferenceError> {
        match self.get(field) {
            Some(value) => self.whole(field, value, 1),
            None => Err(self.error(format!("{} is missing", self.path_of(field)))),
        }
    }
}

/// Returns true for equal values, numbers compared as numbers.
fn is_same(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

/// Returns a value as JSON, cut short where it is long.
pub(super) fn shown(value: &Value) -> String {
    let text = value.to_string();
    match text.char_indices().nth(MAX_SHOWN) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::super::{account_of, spec_of};
    use super::*;
    use crate::engine::rope::RopeScaling;
    use crate::engine::spec::{LinearBiases, ModelSpec};

    const TINY: &str = r#""hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 8, "vocab_size": 96,
        "num_key_value_heads": 4, "max_position_embeddings": 64"#;

    fn config(text: impl AsRef<[u8]>) -> Result<ConfigFile, InferenceError> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("config.json");
        std::fs::write(&path, text).expect("a file in it");
        ConfigFile::read(&path)
    }

    fn read_spec(text: impl AsRef<[u8]>) -> Result<ModelSpec, InferenceError> {
        spec_of(&config(text)?)
    }

    fn error_of(text: impl AsRef<[u8]>) -> String {
        read_spec(text).expect_err("an error").to_string()
    }

    #[test]
    fn llama_3_2_3b_is_read_with_its_rope_scaling() {
        let spec = read_spec(
            r#"{"model_type": "llama", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28,
                "num_attention_heads": 24, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256,
                "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "tie_word_embeddings": true,
                "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "bos_token_id": 128000}"#,
        )
        .expect("a spec");
        assert_eq!(spec.n_params(), 3_212_749_824);
        let rope = spec.attentions[0].rope.as_ref().expect("a rotary embedding");
        assert!(matches!(rope.scaling, RopeScaling::Llama3 { factor: 32.0, .. }));
    }

    #[test]
    fn qwen2_has_biases_on_query_key_and_value() {
        let spec = read_spec(
            r#"{"model_type": "qwen2", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
                "num_attention_heads": 16, "num_key_value_heads": 2, "vocab_size": 151936, "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": true, "use_sliding_window": false}"#,
        )
        .expect("a spec");
        assert_eq!(spec.n_params(), 3_085_938_688);
        assert!(spec.block.biases == LinearBiases::qkv(true));
    }

    #[test]
    fn an_unknown_architecture_is_named_with_those_that_are_known() {
        let error = read_spec(r#"{"model_type": "mamba"}"#).expect_err("an error");
        assert!(matches!(&error, InferenceError::UnknownArchitecture { found, .. } if found == "mamba"));
        assert!(error.to_string().contains("llama, qwen2"));
        assert!(error_of(r#"{"model_type": 5}"#).contains("model_type: expected a text, found 5"));
    }

    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        let error = error_of(r#"{"model_type": "llama", "hidden_size": 99999999999, "num_attention_heads": 8}"#);
        assert!(error.contains("hidden_size"));
        let error = error_of(
            r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 9000000}"#,
        );
        assert!(error.contains("num_hidden_layers"));
    }

    #[test]
    fn a_size_that_only_the_weights_could_tell_is_never_guessed() {
        for field in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"] {
            let text = format!(r#"{{"model_type": "llama", {}}}"#, TINY.replace(&format!("\"{field}\""), "\"other\""));
            let error = error_of(&text);
            assert!(error.ends_with(&format!("{field} is missing")), "{error}");
        }
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_a_config() {
        let text = format!("\u{feff}{{\"model_type\": \"llama\", {TINY}}}");
        assert_eq!(read_spec(&text).expect("a spec").hidden_size, 64);
    }

    #[test]
    fn what_json_does_not_have_is_named() {
        let error = error_of(format!(r#"{{"model_type": "llama", "rope_theta": Infinity, {TINY}}}"#));
        assert!(error.contains("not valid JSON: Infinity at line 1"), "{error}");
        let tagged = error_of(format!(r#"{{"model_type": "llama", "rope_theta": {{"__float__": "NaN"}}, {TINY}}}"#));
        assert!(tagged.contains(r#"rope_theta: expected a number, found {"__float__":"NaN"}"#), "{tagged}");
    }

    #[test]
    fn a_field_that_stands_twice_counts_as_it_stands_last() {
        let file = config(format!(r#"{{"rope_theta": 5e5, "model_type": "llama", {TINY}, "rope_theta": 7e4}}"#));
        let file = file.expect("a config");
        let rope = spec_of(&file).expect("a spec").attentions[0].rope.clone();
        assert_eq!(rope.expect("a rotary embedding").theta, 7e4);
        let expected = "config.json: rope_theta stands twice: 70000.0 counts and 500000.0 does not, as in transformers";
        assert_eq!(account_of(&file).expect("an account").warnings, [expected]);
    }

    #[test]
    fn fields_of_a_wrong_type_are_errors_that_name_what_was_expected() {
        for (field, expected) in [
            (r#""tie_word_embeddings": "yes""#, r#"tie_word_embeddings: expected true or false, found "yes""#),
            (r#""attention_bias": 1"#, "attention_bias: expected true or false, found 1"),
            (r#""rms_norm_eps": "1e-5""#, r#"rms_norm_eps: expected a number, found "1e-5""#),
            (r#""rms_norm_eps": -1e-5"#, "rms_norm_eps: expected a number of at least 0, found -0.00001"),
            (r#""hidden_act": ["silu"]"#, r#"hidden_act: expected the name of an activation, found ["silu"]"#),
            (r#""head_dim": "8""#, r#"head_dim: expected a whole number from 1 to 16777216, found "8""#),
            (r#""bos_token_id": [1]"#, "bos_token_id: expected the id of a token, found [1]"),
            (r#""rope_scaling": "linear""#, r#"rope_scaling: expected a mapping, found "linear""#),
        ] {
            let error = error_of(format!(r#"{{"model_type": "llama", {TINY}, {field}}}"#));
            assert!(error.ends_with(expected), "{error}");
        }
    }

    #[test]
    fn a_first_token_beyond_the_vocabulary_is_none() {
        for id in [-1, 96] {
            let file = config(format!(r#"{{"model_type": "llama", {TINY}, "bos_token_id": {id}}}"#)).expect("a config");
            assert_eq!(spec_of(&file).expect("a spec").bos_token_id, None);
            let part = account_of(&file).expect("an account");
            assert_eq!(part.warnings, [format!("config.json: bos_token_id {id} is no token: the vocabulary has 96")]);
        }
    }
}
