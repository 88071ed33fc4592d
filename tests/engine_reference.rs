//! The engine against values that transformers and bitsandbytes computed (tests/fixtures/README.md says how).
#![cfg(feature = "cpu")]

use labpipe::engine::BurnEngine;
use labpipe::event::NullProgress;
use labpipe::inference::{Engine, Model, ModelRecipe, ModelSource};
use labpipe::units::DType;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn reference() -> Value {
    let text = std::fs::read_to_string(root().join("tests/fixtures/stories260k.json")).expect("the fixture");
    serde_json::from_str::<Value>(&text).expect("JSON")["stories260K"].clone()
}

fn recipe() -> ModelRecipe {
    ModelRecipe {
        source: ModelSource::Path(root().join("models/stories260k")),
        dtype: Some(DType::F32),
        compute_dtype: None,
        quantization: None,
    }
}

fn open(recipe: &ModelRecipe) -> Box<dyn Model> {
    BurnEngine::cpu().open(recipe, &NullProgress).expect("a model")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn tokens(text: &Path, n_chars: usize) -> Vec<u32> {
    let tokenizer =
        tokenizers::Tokenizer::from_file(root().join("models/stories260k/tokenizer.json")).expect("a tokenizer");
    let text: String = std::fs::read_to_string(root().join(text)).expect("the text").chars().take(n_chars).collect();
    tokenizer.encode(text, true).expect("tokens").get_ids().to_vec()
}

fn relative(found: f64, expected: f64) -> f64 {
    (found / expected - 1.0).abs()
}

#[test]
fn logits_of_the_prompt_agree_with_transformers() {
    let reference = reference();
    let mut model = open(&recipe());
    let logits = model.last_logits(&ids(&reference["prompt_ids"])).expect("logits");
    let expected = reference["last_logits_first16"].as_array().expect("a list");
    assert_eq!(expected.len(), 16);
    for (found, expected) in logits.iter().zip(expected) {
        assert!((f64::from(*found) - expected.as_f64().expect("a number")).abs() < 1e-4, "{found} against {expected}");
    }
}

#[test]
fn forty_eight_greedy_tokens_are_the_same_through_the_kv_cache() {
    let reference = reference();
    let prompt = ids(&reference["prompt_ids"]);
    let mut model = open(&recipe());
    model.reserve(64).expect("room");
    let first = model.prefill(&prompt).expect("a prefill");
    let mut found = prompt.clone();
    found.push(first.next_token);
    found.extend(model.decode(47).expect("tokens").iter().map(|decoded| decoded.token));
    assert_eq!(found, ids(&reference["greedy_48"]));
}

/// Hugging Face's strided recipe; returns perplexity by valid targets, by the legacy weighting, and the targets' number.
fn strided(model: &mut dyn Model, tokens: &[u32], max_length: usize, stride: usize) -> (f64, f64, usize) {
    let (mut nll, mut legacy, mut n_scored, mut previous_end) = (0.0, 0.0, 0usize, 0);
    for begin in (0..tokens.len()).step_by(stride) {
        let end = (begin + max_length).min(tokens.len());
        let first_target = (previous_end - begin).max(1);
        let scores = model.score(&tokens[begin..end], first_target).expect("scores");
        let sum: f64 = scores.iter().map(|score| score.nll).sum();
        nll += sum;
        n_scored += scores.len();
        legacy += sum / scores.len() as f64 * (end - previous_end) as f64;
        previous_end = end;
        if end == tokens.len() {
            break;
        }
    }
    ((nll / n_scored as f64).exp(), (legacy / previous_end as f64).exp(), n_scored)
}

#[test]
fn strided_perplexity_agrees_with_transformers_on_both_texts() {
    let reference = reference();
    let mut model = open(&recipe());
    for (name, text) in [
        ("tinystories_first_20000_chars", "experiments/data/tinystories.txt"),
        ("wiki_first_20000_chars", "experiments/data/wikitext2-head.txt"),
    ] {
        let tokens = tokens(Path::new(text), 20_000);
        assert_eq!(tokens.len() as u64, reference[name]["n_ids"].as_u64().expect("a number"));
        for row in reference[name]["strided"].as_array().expect("a list") {
            let size = |field: &str| row[field].as_u64().expect("a number") as usize;
            let (by_targets, legacy, n_scored) = strided(model.as_mut(), &tokens, size("max_length"), size("stride"));
            assert_eq!(n_scored, size("n_scored"));
            assert!(
                relative(by_targets, row["ppl_by_valid_labels"].as_f64().expect("a number")) < 1e-4,
                "{name} {row}"
            );
            assert!(relative(legacy, row["ppl_seed_recipe"].as_f64().expect("a number")) < 1e-4, "{name} {row}");
        }
    }
}
