//! What a `ppl` stage was asked, with what it takes from its base.

use crate::inference::{LogProbFormat, ModelInfo};
use crate::metrics::Convention;
use crate::stage::{Params, StageContext, StageError, StageInput};
use crate::units::{GIB, format_bytes};
use serde_json::{Value, json};

const DEFAULT_MAX_LENGTH: u64 = 512;
const DEFAULT_STRIDE: u64 = 256;
/// Parameters that a base decides.
const SHARED: [&str; 6] = ["text", "convention", "max_length", "stride", "allow_short", "add_bos_token"];
/// Those of them that are never absent: a candidate that leaves them alone takes the base's.
const FLAGS: [&str; 2] = ["allow_short", "add_bos_token"];

/// A stage's parameters, its base's where it names none.
pub struct Settings<'a> {
    pub base: Option<&'a StageInput>,
    pub text: Value,
    pub conventions: Vec<Convention>,
    pub max_length: usize,
    pub stride: usize,
    pub allow_short: bool,
    /// lm-eval: documents are tokenized with what the tokenizer adds by itself.
    pub add_bos_token: bool,
    pub keep: Option<LogProbFormat>,
    max_bytes: f64,
}

fn given<'p>(params: &'p Params, name: &str) -> Option<&'p Value> {
    params.get(name).filter(|value| !value.is_null())
}

/// Fills in what a stage without a base goes by.
pub fn complete(params: &mut Params) {
    if given(params, "base").is_some() {
        return;
    }
    for (name, default) in [
        ("convention", json!([Convention::HfStrided.name()])),
        ("max_length", json!(DEFAULT_MAX_LENGTH)),
        ("stride", json!(DEFAULT_STRIDE)),
    ] {
        if given(params, name).is_none() {
            params.insert(name.to_owned(), default);
        }
    }
}

/// Returns the most tokens that a window has, by a stage's own parameters or its base's.
pub fn max_length(params: &Params, base: Option<&Params>) -> usize {
    let asked = given(params, "max_length").or_else(|| given(base?, "max_length"));
    asked.and_then(Value::as_u64).unwrap_or(DEFAULT_MAX_LENGTH) as usize
}

/// Returns what is wrong with parameters together.
pub fn check(params: &Params) -> Vec<(&'static str, String, Option<String>)> {
    let mut found = Vec::new();
    let number = |name: &str| given(params, name).and_then(Value::as_u64);
    let has_base = given(params, "base").is_some();
    if !has_base && given(params, "text").is_none() {
        let hint = Some("text: FILE, or base: the base model's ppl stage".to_owned());
        found.push(("text", "neither text nor base is given".to_owned(), hint));
    }
    if let (Some(stride), Some(max_length)) = (number("stride"), number("max_length"))
        && stride > max_length
    {
        let message = format!("stride {stride} is more than max_length {max_length}: tokens would be left out");
        found.push(("stride", message, None));
    }
    if has_base && params.get("keep_log_probs").is_some_and(|keep| keep != "none") {
        let message = "a stage with a base keeps no log-probabilities of its own".to_owned();
        found.push(("keep_log_probs", message, Some("name the same base in every candidate".to_owned())));
    }
    let has_lm_eval = given(params, "convention")
        .and_then(Value::as_array)
        .is_some_and(|list| list.iter().any(|convention| convention == Convention::LmEval.name()));
    if has_lm_eval && given(params, "text").is_some_and(|text| !text["n_tokens"].is_null()) {
        let message = "lm-eval counts words and bytes of whole documents".to_owned();
        found.push(("text", message, Some("cut the text with n_chars instead of n_tokens".to_owned())));
    }
    found
}

impl<'a> Settings<'a> {
    /// Reads a stage's parameters; those that a base decides are the base's, and where they are given too they must be equal.
    ///
    /// # Errors
    /// `Param` where they are not.
    pub fn of(context: &'a StageContext<'_>) -> Result<Settings<'a>, StageError> {
        let params = context.params;
        let base = context.inputs.get("base").and_then(|inputs| inputs.first()).map(AsRef::as_ref);
        let mut shared = params.clone();
        if let Some(base) = base {
            for name in SHARED {
                let theirs = base.record.head.params.get(name).cloned().ok_or_else(|| StageError::Input {
                    address: base.address.clone(),
                    reason: format!("its record has no parameter {name}; run it again with --force"),
                })?;
                if let Some(ours) = given(params, name).filter(|ours| **ours != theirs && !FLAGS.contains(&name)) {
                    let reason =
                        format!("{ours} is not the base's {theirs}; leave it to the base stage {}", base.address);
                    return Err(StageError::Param { param: name.to_owned(), reason });
                }
                shared.insert(name.to_owned(), theirs);
            }
        }
        complete(&mut shared);
        let size = |name: &str| shared[name].as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(0);
        let named = shared["convention"].as_array().into_iter().flatten().filter_map(Value::as_str);
        let mut conventions: Vec<Convention> = Vec::new();
        for convention in named.filter_map(Convention::parse) {
            if !conventions.contains(&convention) {
                conventions.push(convention);
            }
        }
        let keep = match params.get("keep_log_probs").and_then(Value::as_str) {
            Some("f16") => Some(LogProbFormat::F16),
            Some("f32") => Some(LogProbFormat::F32),
            Some("top-k") => Some(LogProbFormat::TopK(size("top_k"))),
            _ => None,
        };
        Ok(Settings {
            base,
            text: shared["text"].clone(),
            conventions,
            max_length: size("max_length"),
            stride: size("stride"),
            allow_short: shared["allow_short"].as_bool().unwrap_or(false),
            add_bos_token: shared["add_bos_token"].as_bool().unwrap_or(false),
            keep,
            max_bytes: params.get("log_probs_max_gib").and_then(Value::as_f64).unwrap_or(0.0) * GIB,
        })
    }

    /// Checks that windows fit the model.
    ///
    /// # Errors
    /// `Param`.
    pub fn fits(&self, info: &ModelInfo) -> Result<(), StageError> {
        if self.max_length > info.n_ctx_max {
            let reason = format!("{} tokens are more than the model's context of {}", self.max_length, info.n_ctx_max);
            return Err(StageError::Param { param: "max_length".to_owned(), reason });
        }
        Ok(())
    }

    /// Checks that what is kept stays below the limit, before anything is scored.
    ///
    /// # Errors
    /// `Param` with what it would take, and what takes less.
    pub fn fits_disk(&self, n_scored: usize, vocab_size: usize) -> Result<(), StageError> {
        let Some(format) = self.keep else { return Ok(()) };
        let per_token = format.bytes_per_token(vocab_size);
        let bytes = per_token.saturating_mul(n_scored as u64);
        if bytes as f64 <= self.max_bytes {
            return Ok(());
        }
        let reason = format!(
            "{n_scored} tokens at {per_token} bytes each take {}, more than log_probs_max_gib allows ({}); score a shorter text, keep top-k, or raise log_probs_max_gib",
            format_bytes(bytes),
            format_bytes(self.max_bytes as u64)
        );
        Err(StageError::Param { param: "keep_log_probs".to_owned(), reason })
    }
}

/// Returns a format as records name it: `f16`, `top-64`.
pub fn format_name(format: LogProbFormat) -> String {
    match format {
        LogProbFormat::TopK(k) => format!("top-{k}"),
        other => other.name().to_owned(),
    }
}

/// Reads [`format_name`] back.
pub fn parse_format(name: &str) -> Option<LogProbFormat> {
    match name {
        "f16" => Some(LogProbFormat::F16),
        "f32" => Some(LogProbFormat::F32),
        _ => name.strip_prefix("top-")?.parse().ok().map(LogProbFormat::TopK),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn params(value: Value) -> Params {
        match value {
            Value::Object(params) => params,
            _ => panic!("parameters are an object"),
        }
    }

    #[test]
    fn defaults_are_filled_in_unless_a_base_decides() {
        let mut alone =
            params(json!({"base": null, "text": "t", "convention": null, "max_length": 128, "stride": null}));
        complete(&mut alone);
        assert_eq!(alone["convention"], json!(["hf-strided"]));
        assert_eq!((&alone["max_length"], &alone["stride"]), (&json!(128), &json!(256)));
        assert_eq!(check(&alone).len(), 1, "stride 256 in windows of 128");
        let mut candidate = params(json!({"base": ["b"], "convention": null, "max_length": null, "stride": null}));
        complete(&mut candidate);
        assert_eq!(candidate["convention"], Value::Null);
        assert!(check(&candidate).is_empty());
    }

    #[test]
    fn parameters_that_contradict_are_told() {
        let bad = params(json!({"base": null, "text": null, "keep_log_probs": "f16"}));
        assert_eq!(check(&bad)[0].0, "text");
        let bad = params(json!({"base": ["b"], "keep_log_probs": "f16"}));
        assert_eq!(check(&bad)[0].0, "keep_log_probs");
        let bad = params(json!({"text": {"n_tokens": 5}, "convention": ["llama-cpp", "lm-eval"]}));
        assert_eq!(check(&bad)[0].0, "text");
    }

    #[test]
    fn formats_have_names_that_are_read_back() {
        for format in [LogProbFormat::F16, LogProbFormat::F32, LogProbFormat::TopK(64)] {
            assert_eq!(parse_format(&format_name(format)), Some(format));
        }
        assert_eq!(parse_format("top-"), None);
    }
}
