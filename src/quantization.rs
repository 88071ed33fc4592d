//! Quantization configs: which scheme each module gets, as `experiments/*.yaml` and bitsandbytes-style files say it.

mod meaning;
mod reader;

use crate::units::DType;
use crate::yaml;
use globset::GlobBuilder;
use labpipe_kernels::SchemeSpec;
use reader::Reader;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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

/// Reads a config file's text. Its name is its own `name:`, else `fallback_name`.
///
/// # Errors
/// What is wrong with it: YAML, an unknown key, a setting its scheme lacks, two keys that contradict each other.
pub fn parse(text: &str, origin: &str, fallback_name: &str) -> Result<QuantizationConfig, QuantizationError> {
    let node = yaml::parse(text).map_err(|error| QuantizationError {
        origin: format!("{origin}:{}:{}", error.at.line, error.at.column),
        reason: error.message,
        hint: error.hint,
    })?;
    Reader { origin }.config(&node.to_json(), fallback_name)
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
    fn yaml_s_traps_are_told_with_a_remedy() {
        assert!(
            reason("scheme: nf4\n---\nscheme: int8\n")
                .contains("test.yaml:2:1: read as YAML: the file holds 2 YAML documents")
        );
        assert!(reason("scheme: nf4\ndouble_quant: yes\n").contains("write true or false"));
        assert!(reason("scheme: nf4\nname: 7\n").contains("name: \"7\""));
        assert!(reason("scheme: nf4\nkeep: ['[a']\n").contains("is no glob"));
        assert!(reason("scheme: nf4\noverrides: [{match: '{a', scheme: int8}]\n").contains("is no glob"));
        for threshold in [".inf", ".nan", "1e39"] {
            let text = format!("scheme: int8\noutlier_threshold: {threshold}\n");
            assert!(reason(&text).contains("expected a finite number"), "{threshold}");
        }
        assert_eq!(read("scheme: nf4\nblock_size: 128.0\n"), read("scheme: nf4\nblock_size: 0x80\n"));
    }

    #[test]
    fn without_a_scheme_everything_stays_in_the_base_dtype() {
        assert_eq!(read("scheme: none\n").scheme_for("model.layers.0.mlp.up_proj"), None);
        assert_eq!(read("method: none\n").scheme, None);
    }
}
