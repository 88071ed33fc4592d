//! Reads quantization configs, labpipe's own keys and those of bitsandbytes, into the canonical form.

use super::{Override, QuantizationConfig, QuantizationError};
use crate::units::DType;
use crate::yaml::is_yaml_1_1_bool;
use globset::GlobBuilder;
use labpipe_kernels::{SCHEMES, SchemeSpec, scheme};
use serde_json::{Map, Value};

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

/// Reads the keys of a config.
pub struct Reader<'a> {
    /// Names the file in errors.
    pub origin: &'a str,
}

impl Reader<'_> {
    fn error<T>(&self, reason: impl Into<String>, hint: Option<String>) -> Result<T, QuantizationError> {
        Err(QuantizationError { origin: self.origin.to_owned(), reason: reason.into(), hint })
    }

    /// Reads a whole config.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn config(&self, value: &Value, fallback_name: &str) -> Result<QuantizationConfig, QuantizationError> {
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
            Some(value) => match whole_number(value) {
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

    /// Reads the keys of bitsandbytes configs; `None` if there are none.
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
                if let Some(glob) = item.get("match").and_then(Value::as_str) {
                    self.glob("match", glob)?;
                }
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
            Some(other @ (Value::Number(_) | Value::Bool(_))) => {
                let hint = format!("in quotes it is a text: {key}: \"{other}\"");
                self.error(format!("{key}: expected a text, found {other}"), Some(hint))
            }
            Some(other) => self.error(format!("{key}: expected a text, found {other}"), None),
        }
    }

    fn flag(&self, map: &Map<String, Value>, key: &str) -> Result<Option<bool>, QuantizationError> {
        match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Bool(value)) => Ok(Some(*value)),
            Some(other) => {
                let text = other.as_str().filter(|text| is_yaml_1_1_bool(text));
                let hint = text.map(|text| format!("YAML 1.2 reads {text} as a text: write true or false"));
                self.error(format!("{key}: expected true or false, found {other}"), hint)
            }
        }
    }

    fn number(&self, map: &Map<String, Value>, key: &str) -> Result<Option<f32>, QuantizationError> {
        match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => match value.as_f64().map(|number| number as f32).filter(|number| number.is_finite()) {
                Some(number) => Ok(Some(number)),
                None => self.error(format!("{key}: expected a finite number of 32 bits, found {value}"), None),
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
                Value::String(text) if !text.is_empty() => self.glob(key, text),
                Value::Number(_) if whole_number(item).is_some() => {
                    Ok(format!("layers.{}", whole_number(item).unwrap_or_default()))
                }
                other => {
                    self.error(format!("{key}: expected module names, globs or layer numbers, found {other}"), None)
                }
            })
            .collect()
    }

    /// Refuses a glob that could match nothing because it is none.
    fn glob(&self, key: &str, pattern: &str) -> Result<String, QuantizationError> {
        match GlobBuilder::new(pattern).literal_separator(false).build() {
            Ok(_) => Ok(pattern.to_owned()),
            Err(_) => {
                let hint = "a [ or { is not closed, or a range runs backwards".to_owned();
                self.error(format!("{key}: {pattern:?} is no glob"), Some(hint))
            }
        }
    }
}

/// Returns a whole number, also one that is written as `64.0`.
fn whole_number(value: &Value) -> Option<usize> {
    let from_float = |value: f64| (value.fract() == 0.0 && (0.0..1e15).contains(&value)).then_some(value as u64);
    value.as_u64().or_else(|| value.as_f64().and_then(from_float)).and_then(|n| usize::try_from(n).ok())
}

fn scheme_names() -> String {
    SCHEMES.iter().map(|scheme| scheme.name()).collect::<Vec<_>>().join(", ")
}
