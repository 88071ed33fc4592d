//! What a config means, apart from how it is written.

use super::{ALWAYS_KEPT, QuantizationConfig};

impl QuantizationConfig {
    /// Returns the config that all spellings of the same meaning have in common: without a name; `keep` sorted, each pattern once, and
    /// without what is kept anyway; without overrides that an earlier one of the same pattern hides. Where nothing is quantized but by
    /// overrides, `keep` says nothing. The order of overrides stays: the first match wins. Patterns are compared as texts, not by the
    /// modules that they match.
    pub fn canonical(&self) -> QuantizationConfig {
        let mut keep: Vec<String> = match self.scheme {
            Some(_) => self.keep.iter().filter(|glob| !ALWAYS_KEPT.contains(&glob.as_str())).cloned().collect(),
            None => Vec::new(),
        };
        keep.sort();
        keep.dedup();
        let mut overrides = Vec::new();
        for (idx, special) in self.overrides.iter().enumerate() {
            if self.overrides[..idx].iter().all(|earlier| earlier.glob != special.glob) {
                overrides.push(special.clone());
            }
        }
        QuantizationConfig {
            name: String::new(),
            scheme: self.scheme.clone(),
            compute_dtype: self.compute_dtype,
            keep,
            overrides,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::parse;
    use super::*;

    fn read(text: &str) -> QuantizationConfig {
        parse(text, "test.yaml", "test").expect("a config")
    }

    #[test]
    fn configs_that_mean_the_same_have_one_canonical_form() {
        let plain = read("scheme: nf4\nkeep: [mlp.down_proj, layers.3]\n").canonical();
        for same in [
            "name: other\ndescription: a longer story\nscheme: nf4\nkeep: [layers.3, mlp.down_proj]\n",
            "scheme: nf4\nkeep: [3, mlp.down_proj, layers.3]\n",
            "scheme: nf4\nblock_size: 64\ndouble_quant: false\nkeep: [mlp.down_proj]\nfp16_layers: [3]\noverrides: []\n",
            "load_in_4bit: true\nllm_int8_skip_modules: [lm_head, layers.3, mlp.down_proj]\n",
            "# a comment\nmethod: bitsandbytes\nload_in_4bit: true\nbnb_4bit_use_double_quant: no\nkeep: [layers.3, \
             '*norm*', mlp.down_proj]\n"
                .replace("no\n", "false\n")
                .as_str(),
        ] {
            assert_eq!(read(same).canonical(), plain, "{same}");
        }
        for other in [
            "scheme: nf4\nkeep: [mlp.down_proj]\n",
            "scheme: fp4\nkeep: [mlp.down_proj, layers.3]\n",
            "scheme: nf4\nblock_size: 128\nkeep: [mlp.down_proj, layers.3]\n",
            "scheme: nf4\ncompute_dtype: f16\nkeep: [mlp.down_proj, layers.3]\n",
        ] {
            assert_ne!(read(other).canonical(), plain, "{other}");
        }
    }

    #[test]
    fn overrides_keep_their_order_and_those_that_never_match_are_left_out() {
        let config = read(
            "scheme: none\nkeep: [x]\noverrides:\n  - {match: b, scheme: int8}\n  - {match: a, scheme: nf4}\n  - {match: b, scheme: none}\n",
        );
        let canonical = config.canonical();
        let globs: Vec<&str> = canonical.overrides.iter().map(|special| special.glob.as_str()).collect();
        assert_eq!((globs, canonical.keep.len()), (vec!["b", "a"], 0));
        for module in ["a", "b", "c", "x", "lm_head", "model.layers.0.b"] {
            assert_eq!(config.scheme_for(module), canonical.scheme_for(module), "{module}");
        }
    }
}
