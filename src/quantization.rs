//! Quantization configs: which scheme each module gets, as `experiments/*.yaml` and bitsandbytes-style files say it.

mod meaning;

use crate::units::DType;
use globset::GlobBuilder;
use labpipe_kernels::{SCHEMES, SchemeSpec, scheme};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// Modules that no config quantizes unless an override names them: embeddings, norms, the output head.
pub const ALWAYS_KEPT: [&str; 3] = ["*embed_tokens*", "*norm*", "lm_head"];

/// A quantization config in canonical form.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QuantizationConfig {
    /// The file's own name for it, e.g. `nf4-double`.
    pub name: String,
    /// What every linear gets; null keeps all in the base dtype (`scheme: none`).
    pub scheme: Option<SchemeSpec>,
    /// Overrides the recipe's compute dtype.
    pub compute_dtype: Option<DType>,
    /// Globs over module names that stay in the base dtype, beside `ALWAYS_KEPT`.
    pub keep: Vec<String>,
    /// The first match wins, before `keep`.
    pub overrides: Vec<Override>,
}

/// A scheme for the modules that a glob matches.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Override {
    #[serde(rename = "match")]
    pub glob: String,
    /// Null keeps the base dtype.
    pub scheme: Option<SchemeSpec>,
}

/// Why a config can't be used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("read quantization config {origin}: {reason}{}", hint.as_ref().map(|hint| format!(" ({hint})")).unwrap_or_default())]
pub struct QuantizationError {
    pub origin: String,
    pub reason: String,
    pub hint: Option<String>,
}

const KEYS: [&str; 19] = [
    "name",
    "description",
    "scheme",
    "block_size",
    "double_quant",
    "symmetric",
    "outlier_threshold",
    "compute_dtype",
    "keep",
    "overrides",
    "method",
    "load_in_4bit",
    "load_in_8bit",
    "bnb_4bit_quant_type",
    "bnb_4bit_compute_dtype",
    "bnb_4bit_use_double_quant",
    "llm_int8_threshold",
    "llm_int8_skip_modules",
    "fp16_layers",
];
const OVERRIDE_KEYS: [&str; 6] = ["match", "scheme", "block_size", "double_quant", "symmetric", "outlier_threshold"];

/// Reads a config file's text. Its name is its own `name:`, else `fallback_name`.
///
/// # Errors
/// What is wrong with it: YAML, an unknown key, a setting its scheme lacks, two keys that contradict each other.
pub fn parse(text: &str, origin: &str, fallback_name: &str) -> Result<QuantizationConfig, QuantizationError> {
    let value: Value = serde_yaml::from_str(text).map_err(|error| QuantizationError {
        origin: origin.to_owned(),
        reason: format!("not valid YAML: {}", error.without_snippet()),
        hint: None,
    })?;
    Reader { origin }.config(&value, fallback_name)
}

/// Reads a config given inline, as JSON.
///
/// # Errors
/// As [`parse`].
pub fn from_value(value: &Value, name: &str) -> Result<QuantizationConfig, QuantizationError> {
    Reader { origin: name }.config(value, name)
}

impl QuantizationConfig {
    /// Returns the scheme a module gets: the first override that matches, else none where it is kept, else the config's.
    pub fn scheme_for(&self, module: &str) -> Option<&SchemeSpec> {
        if let Some(special) = self.overrides.iter().find(|special| covers(&special.glob, module)) {
            return special.scheme.as_ref();
        }
        let kept = self.keep.iter().map(String::as_str).chain(ALWAYS_KEPT).any(|glob| covers(glob, module));
        if kept { None } else { self.scheme.as_ref() }
    }

    /// Returns the globs of `keep` and `overrides` that match none of the modules: likely misspelt.
    pub fn unmatched<'a>(&'a self, modules: &[(String, [usize; 2])]) -> Vec<&'a str> {
        let globs = self.keep.iter().chain(self.overrides.iter().map(|special| &special.glob));
        globs.map(String::as_str).filter(|glob| !modules.iter().any(|(module, _)| covers(glob, module))).collect()
    }
}

/// Returns true if a pattern covers a module. A pattern with glob characters must match the whole name; a plain one matches
/// the module of that name, everything below it, and the same as a suffix (`mlp.down_proj`, `layers.0`).
fn covers(pattern: &str, module: &str) -> bool {
    if pattern.contains(['*', '?', '[', '{']) {
        let glob = GlobBuilder::new(pattern).literal_separator(false).build();
        return glob.is_ok_and(|glob| glob.compile_matcher().is_match(module));
    }
    format!(".{module}.").contains(&format!(".{pattern}."))
}

struct Reader<'a> {
    origin: &'a str,
}

impl Reader<'_> {
    fn error<T>(&self, reason: impl Into<String>, hint: Option<String>) -> Result<T, QuantizationError> {
        Err(QuantizationError { origin: self.origin.to_owned(), reason: reason.into(), hint })
    }

    fn config(&self, value: &Value, fallback_name: &str) -> Result<QuantizationConfig, QuantizationError> {
        let Value::Object(map) = value else {
            return self.error("expected a mapping with scheme: or method:", None);
        };
        self.known(map, &KEYS)?;
        let bits = self.bitsandbytes_scheme(map)?;
        let own = map.get("scheme").is_some().then(|| self.scheme(map)).transpose()?;
        let scheme = match (own, bits) {
            (Some(_), Some(_)) => {
                return self.error("both scheme and load_in_4bit/load_in_8bit are given", Some("keep one".to_owned()));
            }
            (Some(own), None) => own,
            (None, Some(bits)) => bits,
            (None, None) => {
                return self.error("scheme is missing", Some(format!("schemes are: none, {}", scheme_names())));
            }
        };
        let compute_dtype = match (self.dtype(map, "compute_dtype")?, self.dtype(map, "bnb_4bit_compute_dtype")?) {
            (Some(_), Some(_)) => {
                return self
                    .error("both compute_dtype and bnb_4bit_compute_dtype are given", Some("keep one".to_owned()));
            }
            (own, bits) => own.or(bits),
        };
        let mut keep = self.patterns(map, "keep")?;
        keep.extend(self.patterns(map, "fp16_layers")?);
        keep.extend(self.patterns(map, "llm_int8_skip_modules")?);
        Ok(QuantizationConfig {
            name: self.text(map, "name")?.unwrap_or_else(|| fallback_name.to_owned()),
            scheme,
            compute_dtype,
            keep,
            overrides: self.overrides(map)?,
        })
    }

    fn known(&self, map: &Map<String, Value>, keys: &[&str]) -> Result<(), QuantizationError> {
        match map.keys().find(|key| !keys.contains(&key.as_str())) {
            None => Ok(()),
            Some(key) => {
                let nearest = keys.iter().min_by_key(|known| strsim::damerau_levenshtein(known, key));
                self.error(format!("unknown key {key:?}"), nearest.map(|known| format!("did you mean {known:?}?")))
            }
        }
    }

    /// Reads `scheme` and its settings; the inner nothing is `scheme: none`.
    fn scheme(&self, map: &Map<String, Value>) -> Result<Option<SchemeSpec>, QuantizationError> {
        let name = self.text(map, "scheme")?.unwrap_or_default();
        if ["none", "fp16", "f16", "bf16", "f32"].contains(&name.as_str()) {
            let settings = ["block_size", "double_quant", "symmetric", "outlier_threshold"];
            return match settings.iter().find(|key| map.contains_key(**key)) {
                Some(key) => self.error(format!("{key} does not apply to scheme {name}"), None),
                None => Ok(None),
            };
        }
        let block_size = match map.get("block_size") {
            None | Some(Value::Null) => None,
            Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
                Some(size) if size > 0 => Some(size),
                _ => return self.error(format!("block_size: expected a whole number from 1, found {value}"), None),
            },
        };
        let spec = SchemeSpec {
            scheme: name,
            block_size,
            double_quant: self.flag(map, "double_quant")?.unwrap_or(false),
            symmetric: self.flag(map, "symmetric")?.unwrap_or(false),
            outlier_threshold: self.number(map, "outlier_threshold")?,
        };
        self.normalized(&spec).map(Some)
    }

    fn normalized(&self, spec: &SchemeSpec) -> Result<SchemeSpec, QuantizationError> {
        match scheme(&spec.scheme).and_then(|scheme| scheme.normalize(spec)) {
            Ok(spec) => Ok(spec),
            Err(error) => self.error(error.to_string(), Some(format!("schemes are: none, {}", scheme_names()))),
        }
    }

    /// Reads the keys of bitsandbytes configs; nothing where there are none.
    fn bitsandbytes_scheme(&self, map: &Map<String, Value>) -> Result<Option<Option<SchemeSpec>>, QuantizationError> {
        let method = self.text(map, "method")?;
        let four = self.flag(map, "load_in_4bit")?;
        let eight = self.flag(map, "load_in_8bit")?;
        if let Some(key) = ["llm_int8_threshold", "llm_int8_skip_modules"].iter().find(|key| map.contains_key(**key))
            && !four.unwrap_or(false)
            && !eight.unwrap_or(false)
        {
            return self.error(format!("{key} needs load_in_8bit: true or load_in_4bit: true"), None);
        }
        match (method.as_deref(), four.unwrap_or(false), eight.unwrap_or(false)) {
            (Some("bitsandbytes"), false, false) if four.is_none() && eight.is_none() => {
                self.error("method: bitsandbytes needs load_in_4bit: true or load_in_8bit: true", None)
            }
            (Some("bitsandbytes" | "none") | None, false, false) => {
                Ok((method.is_some() || four.is_some() || eight.is_some()).then_some(None))
            }
            (Some("none"), _, _) => self.error("method: none contradicts load_in_4bit and load_in_8bit", None),
            (Some("bitsandbytes") | None, true, true) => {
                self.error("both load_in_4bit and load_in_8bit are true", Some("keep one".to_owned()))
            }
            (Some("bitsandbytes") | None, false, true) => {
                let outlier_threshold = self.number(map, "llm_int8_threshold")?;
                self.normalized(&SchemeSpec { outlier_threshold, ..SchemeSpec::new("int8") })
                    .map(|spec| Some(Some(spec)))
            }
            (Some("bitsandbytes") | None, true, false) => {
                let kind = self.text(map, "bnb_4bit_quant_type")?.unwrap_or_else(|| "nf4".to_owned());
                if !["nf4", "fp4"].contains(&kind.as_str()) {
                    let hint = Some("nf4 and fp4 are".to_owned());
                    return self.error(format!("bnb_4bit_quant_type {kind:?} is not known"), hint);
                }
                // The Python lab's loader turned double quantization on unless told otherwise.
                let double_quant = self.flag(map, "bnb_4bit_use_double_quant")?.unwrap_or(method.is_some());
                let spec = SchemeSpec { double_quant, ..SchemeSpec::new(kind) };
                self.normalized(&spec).map(|spec| Some(Some(spec)))
            }
            (Some(other), _, _) => {
                self.error(format!("method {other:?} is not known"), Some("bitsandbytes and none are".to_owned()))
            }
        }
    }

    fn overrides(&self, map: &Map<String, Value>) -> Result<Vec<Override>, QuantizationError> {
        let items = match map.get("overrides") {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(items)) => items,
            Some(_) => return self.error("overrides: expected a list of {match, scheme, ...}", None),
        };
        items
            .iter()
            .map(|item| {
                let Value::Object(item) = item else {
                    return self.error("overrides: expected a list of {match, scheme, ...}", None);
                };
                self.known(item, &OVERRIDE_KEYS)?;
                let Some(glob) = self.text(item, "match")?.filter(|glob| !glob.is_empty()) else {
                    return self.error("overrides: match is missing", Some("a glob over module names".to_owned()));
                };
                if item.get("scheme").is_none() {
                    return self.error(format!("overrides: the one that matches {glob} has no scheme"), None);
                }
                Ok(Override { glob, scheme: self.scheme(item)? })
            })
            .collect()
    }

    fn text(&self, map: &Map<String, Value>, key: &str) -> Result<Option<String>, QuantizationError> {
        match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(other) => self.error(format!("{key}: expected a text, found {other}"), None),
        }
    }

    fn flag(&self, map: &Map<String, Value>, key: &str) -> Result<Option<bool>, QuantizationError> {
        match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => self.error(format!("{key}: expected true or false, found {other}"), None),
        }
    }

    fn number(&self, map: &Map<String, Value>, key: &str) -> Result<Option<f32>, QuantizationError> {
        match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64() {
                Some(number) => Ok(Some(number as f32)),
                None => self.error(format!("{key}: expected a number, found {value}"), None),
            },
        }
    }

    fn dtype(&self, map: &Map<String, Value>, key: &str) -> Result<Option<DType>, QuantizationError> {
        let Some(name) = self.text(map, key)? else { return Ok(None) };
        match DType::parse(&name) {
            Some(dtype) => Ok(Some(dtype)),
            None => self.error(format!("{key}: {name:?} is no element type"), Some("f32, f16 and bf16 are".to_owned())),
        }
    }

    /// Reads a list of patterns; a number is the index of a layer.
    fn patterns(&self, map: &Map<String, Value>, key: &str) -> Result<Vec<String>, QuantizationError> {
        let items = match map.get(key) {
            None | Some(Value::Null) => return Ok(Vec::new()),
            Some(Value::Array(items)) => items.clone(),
            Some(single) => vec![single.clone()],
        };
        items
            .iter()
            .map(|item| match item {
                Value::String(text) if !text.is_empty() => Ok(text.clone()),
                Value::Number(index) if index.is_u64() => Ok(format!("layers.{index}")),
                other => {
                    self.error(format!("{key}: expected module names, globs or layer numbers, found {other}"), None)
                }
            })
            .collect()
    }
}

fn scheme_names() -> String {
    SCHEMES.iter().map(|scheme| scheme.name()).collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> QuantizationConfig {
        parse(text, "test.yaml", "test").expect("a config")
    }

    fn reason(text: &str) -> String {
        parse(text, "test.yaml", "test").expect_err("an error").to_string()
    }

    #[test]
    fn the_lab_s_bitsandbytes_file_means_nf4_with_double_quantization() {
        let config = read(
            "method: bitsandbytes\nload_in_4bit: true\nbnb_4bit_quant_type: nf4\nbnb_4bit_compute_dtype: float16\n\
             fp16_layers: [model.layers.0, mlp.down_proj, 3]\n",
        );
        assert_eq!(config.compute_dtype, Some(DType::F16));
        let scheme = config.scheme_for("model.layers.1.mlp.up_proj").expect("a scheme");
        assert!(scheme.scheme == "nf4" && scheme.double_quant && scheme.block_size == Some(64));
        for kept in
            ["model.layers.0.mlp.up_proj", "model.layers.7.mlp.down_proj", "model.layers.3.self_attn.q_proj", "lm_head"]
        {
            assert_eq!(config.scheme_for(kept), None, "{kept}");
        }
        assert!(config.scheme_for("model.layers.30.self_attn.q_proj").is_some());
    }

    #[test]
    fn overrides_come_before_keep_and_the_first_wins() {
        let config = read(
            "scheme: nf4\nkeep: ['*.o_proj']\noverrides:\n  - {match: '*.0.*', scheme: int8}\n  - {match: lm_head, scheme: int8}\n",
        );
        assert_eq!(config.scheme_for("model.layers.0.self_attn.o_proj").map(|s| s.scheme.as_str()), Some("int8"));
        assert_eq!(config.scheme_for("model.layers.1.self_attn.o_proj"), None);
        assert!(config.scheme_for("lm_head").is_some());
        let modules = vec![("model.layers.1.self_attn.o_proj".to_owned(), [1, 1])];
        assert_eq!(config.unmatched(&modules), ["*.0.*", "lm_head"]);
    }

    #[test]
    fn contradictions_and_misspelt_keys_are_named() {
        assert!(reason("load_in_4bit: true\nload_in_8bit: true\n").contains("both load_in_4bit and load_in_8bit"));
        assert!(reason("scheme: nf4\nload_in_8bit: true\n").contains("both scheme and"));
        assert!(reason("scheme: nf4\nblok_size: 64\n").contains("did you mean \"block_size\"?"));
        assert!(reason("scheme: nf5\n").contains("schemes are: none, nf4, fp4, "));
        assert!(reason("scheme: int8\nblock_size: 64\n").contains("one scale a row"));
        assert!(reason("load_in_4bit: true\nbnb_4bit_quant_type: fp8\n").contains("nf4 and fp4 are"));
        assert!(reason("scheme: nf4\noutlier_threshold: 6\n").contains("does not apply to nf4"));
        assert!(reason("scheme: int8\noutlier_threshold: -1\n").contains("number from 0"));
        assert!(reason("scheme: int8\nllm_int8_threshold: 6\n").contains("needs load_in_8bit"));
        assert!(reason("name: x\n").contains("scheme is missing"));
    }

    #[test]
    fn bitsandbytes_threshold_type_and_skipped_modules_are_read() {
        let config = read("load_in_8bit: true\nllm_int8_threshold: 6.0\nllm_int8_skip_modules: [mlp.up_proj]\n");
        let scheme = config.scheme_for("model.layers.0.mlp.down_proj").expect("a scheme");
        assert_eq!((scheme.scheme.as_str(), scheme.outlier_threshold), ("int8", Some(6.0)));
        assert_eq!(config.scheme_for("model.layers.0.mlp.up_proj"), None);
        // Off unless asked for: the weights alone are quantized.
        assert_eq!(read("load_in_8bit: true\n").scheme.expect("a scheme").outlier_threshold, None);
        let config = read("load_in_4bit: true\nbnb_4bit_quant_type: fp4\n");
        assert_eq!(config.scheme, Some(SchemeSpec { block_size: Some(64), ..SchemeSpec::new("fp4") }));
        let written = serde_json::to_string(&config.scheme).expect("JSON");
        assert!(!written.contains("outlier_threshold"), "records of schemes without it stay as they were: {written}");
    }

    #[test]
    fn without_a_scheme_everything_stays_in_the_base_dtype() {
        assert_eq!(read("scheme: none\n").scheme_for("model.layers.0.mlp.up_proj"), None);
        assert_eq!(read("method: none\n").scheme, None);
    }
}
