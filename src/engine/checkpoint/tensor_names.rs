//! The names that a causal language model's tensors have, from those that checkpoints of its base model, or of a larger model around it,
//! use. The rules are those of transformers 5.24 (`core_model_loading.rename_source_key`, `conversion_mapping`).

/// What stands below `model.` in every family.
const BASE: [&str; 3] = ["layers.", "embed_tokens.", "norm."];

/// Prefixes of a text model inside another, and what stands for them. transformers 4 writes `language_model.model.…`, transformers 5
/// `model.language_model.…`; 5.10 to 5.23 doubled `model`.
const INNER: [(&str, &str); 5] = [
    ("language_model.model.model.", "model."),
    ("language_model.model.", "model."),
    ("model.language_model.model.", "model."),
    ("model.language_model.", "model."),
    ("language_model.", ""),
];

/// Returns a tensor's name in the causal language model, and true where it was part of a larger model.
pub fn canonical_name(name: &str) -> (String, bool) {
    let inner = INNER.iter().find_map(|(root, own)| Some(format!("{own}{}", name.strip_prefix(root)?)));
    match inner {
        Some(name) => (with_base_prefix(&name), true),
        None => (with_base_prefix(name), false),
    }
}

/// Adds `model.` where a base model left it out, and removes it where it stands before a whole model's name.
fn with_base_prefix(name: &str) -> String {
    let is_below = |name: &str| BASE.iter().any(|base| name.starts_with(base));
    if is_below(name) {
        return format!("model.{name}");
    }
    match name.strip_prefix("model.") {
        Some(rest) if rest.starts_with("lm_head.") || rest.strip_prefix("model.").is_some_and(is_below) => {
            rest.to_owned()
        }
        _ => name.to_owned(),
    }
}

/// Returns true for tensors of the parts of a larger model that see images.
pub fn is_vision(name: &str) -> bool {
    let name = name.strip_prefix("model.").unwrap_or(name);
    ["vision_tower.", "multi_modal_projector."].iter().any(|part| name.starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Expected names: what transformers 5.24 loaded without a report of missing or unexpected tensors.
    #[test]
    fn names_of_base_models_and_of_larger_ones_are_those_of_the_model_alone() {
        let q = "model.layers.0.self_attn.q_proj.weight";
        for (name, expected, is_inner) in [
            (q, q, false),
            ("layers.0.self_attn.q_proj.weight", q, false),
            ("model.model.layers.0.self_attn.q_proj.weight", q, false),
            ("language_model.model.layers.0.self_attn.q_proj.weight", q, true),
            ("model.language_model.layers.0.self_attn.q_proj.weight", q, true),
            ("model.language_model.model.layers.0.self_attn.q_proj.weight", q, true),
            ("language_model.layers.0.self_attn.q_proj.weight", q, true),
            ("norm.weight", "model.norm.weight", false),
            ("embed_tokens.weight", "model.embed_tokens.weight", false),
            ("layers.0.mlp.up_proj.weight.absmax", "model.layers.0.mlp.up_proj.weight.absmax", false),
            ("lm_head.weight", "lm_head.weight", false),
            ("model.lm_head.weight", "lm_head.weight", false),
            ("language_model.lm_head.weight", "lm_head.weight", true),
            ("vision_tower.x", "vision_tower.x", false),
            ("transformer.layers.0.x", "transformer.layers.0.x", false),
        ] {
            assert_eq!(canonical_name(name), (expected.to_owned(), is_inner), "{name}");
        }
    }
}
