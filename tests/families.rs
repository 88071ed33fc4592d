//! Model families against values that transformers computed with tiny random models (tests/fixtures/families/README.md says how).
#![cfg(feature = "cpu")]

use labpipe::engine;
use labpipe::event::NullProgress;
use labpipe::inference::{CaptureFilter, CaptureSink, CaptureSite, Engine, Model, ModelRecipe, ModelSource};
use labpipe::units::DType;
use serde_json::Value;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// The fixtures and the family each belongs to.
const CASES: [(&str, &str); 12] = [
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("llama", "llama"),
    ("llama-dynamic", "llama"),
    ("llama-linear", "llama"),
    ("llama-llama3", "llama"),
    ("llama-yarn", "llama"),
    ("mistral", "mistral"),
    ("phi3", "phi3"),
    ("phi3-longrope", "phi3"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
];

fn folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(case)
}

fn expected(case: &str) -> Value {
    let text = std::fs::read_to_string(folder(case).join("expected.json")).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn recipe(source: ModelSource) -> ModelRecipe {
    ModelRecipe { source, dtype: None, compute_dtype: Some(DType::F32), quantization: None }
}

/// The device that these tests run on: the CPU, or what `LABPIPE_TEST_DEVICE` names.
fn device() -> String {
    std::env::var("LABPIPE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

fn open(recipe: &ModelRecipe) -> Box<dyn Model> {
    let (engine, _) = engine::build(&device()).expect("the device");
    engine.open(recipe, &NullProgress).expect("a model")
}

fn model(case: &str) -> Box<dyn Model> {
    open(&recipe(ModelSource::Path(folder(case))))
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn numbers(value: &Value) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn n_prompt(expected: &Value) -> usize {
    expected["n_prompt"].as_u64().expect("a count") as usize
}

/// Largest difference to the reference; its logits deviate by 1 to 2.
fn largest_difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(found, expected)| (f64::from(*found) - expected).abs()).fold(0.0, f64::max)
}

#[test]
fn every_fixture_is_a_case_here() {
    let there: BTreeSet<String> = std::fs::read_dir(folder(""))
        .expect("the fixtures")
        .map(|entry| entry.expect("an entry"))
        .filter(|entry| entry.path().is_dir())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    let tested: BTreeSet<String> = CASES.iter().map(|(case, _)| (*case).to_owned()).collect();
    assert_eq!(there, tested);
    for family in labpipe::engine::FAMILIES {
        let known = CASES.iter().any(|(_, name)| family.model_type.trim_end_matches("_text") == *name);
        assert!(known, "{} has no fixture", family.model_type);
    }
}

#[test]
fn logits_agree_with_transformers_at_both_lengths() {
    for (case, family) in CASES {
        let expected = expected(case);
        let tokens = ids(&expected["tokens"]);
        let mut model = model(case);
        assert_eq!(model.info().family, family);
        let short = model.last_logits(&tokens[..n_prompt(&expected)]).expect("logits");
        let long = model.last_logits(&tokens).expect("logits");
        let short = largest_difference(&short, &numbers(&expected["prompt_last_logits"]));
        let long = largest_difference(&long, &numbers(&expected["last_logits"]));
        println!("{case}: largest difference of logits {short:.1e} after 40 tokens, {long:.1e} after 150");
        assert!(short < 1e-4 && long < 1e-4, "{case}: {short} and {long}");
    }
}

#[test]
fn every_token_s_likelihood_and_the_perplexity_agree_with_transformers() {
    for (case, _) in CASES {
        let expected = expected(case);
        let scores = model(case).score(&ids(&expected["tokens"]), 1).expect("scores");
        let nll: Vec<f32> = scores.iter().map(|score| score.nll as f32).collect();
        let difference = largest_difference(&nll, &numbers(&expected["nll"]));
        assert!(difference < 1e-4, "{case}: {difference}");
        let mean = scores.iter().map(|score| score.nll).sum::<f64>() / scores.len() as f64;
        let relative = mean.exp() / expected["perplexity"].as_f64().expect("a number") - 1.0;
        println!("{case}: perplexity {:.4}, {relative:+.1e} relative", mean.exp());
        assert!(relative.abs() < 1e-5, "{case}: {relative}");
    }
}

#[test]
fn greedy_tokens_through_the_kv_cache_are_those_of_transformers() {
    for (case, _) in CASES {
        let expected = expected(case);
        let (prompt, greedy) = (ids(&expected["tokens"]), ids(&expected["greedy"]));
        let prompt = &prompt[..n_prompt(&expected)];
        let mut model = model(case);
        model.reserve(prompt.len() + greedy.len()).expect("room");
        let mut found = vec![model.prefill(prompt).expect("a prefill").next_token];
        found.extend(model.decode(greedy.len() - 1).expect("tokens").iter().map(|decoded| decoded.token));
        assert_eq!(found, greedy, "{case}");
    }
}

#[test]
fn a_config_saved_by_transformers_5_means_the_same() {
    for (case, _) in CASES {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(folder(case).join("model.safetensors"), dir.path().join("model.safetensors")).expect("a copy");
        std::fs::copy(folder(case).join("config-transformers5.json"), dir.path().join("config.json")).expect("a copy");
        let tokens = ids(&expected(case)["tokens"]);
        let logits = open(&recipe(ModelSource::Path(dir.path().to_owned()))).last_logits(&tokens).expect("logits");
        assert_eq!(logits, model(case).last_logits(&tokens).expect("logits"), "{case}");
    }
}

#[test]
fn half_precision_compute_stays_near_f32_in_every_family() {
    if device() == "wgpu" {
        return eprintln!("left out: wgpu computes in f32 alone");
    }
    for (case, _) in CASES {
        let tokens = ids(&expected(case)["tokens"]);
        let source = ModelSource::Path(folder(case));
        let mut half = open(&ModelRecipe { compute_dtype: Some(DType::F16), ..recipe(source) });
        let exact: Vec<f64> =
            model(case).last_logits(&tokens).expect("logits").iter().map(|logit| f64::from(*logit)).collect();
        let difference = largest_difference(&half.last_logits(&tokens).expect("logits"), &exact);
        assert!(difference > 0.0 && difference < 0.1, "{case}: {difference}");
    }
}

/// Collects the names of captured modules.
#[derive(Default)]
struct Names(Vec<String>);

impl CaptureSink for Names {
    fn take(&mut self, site: &CaptureSite, _: usize, width: usize, values: &[f32]) -> Result<(), String> {
        assert_eq!(values.len() % width, 0);
        self.0.push(site.module.clone());
        Ok(())
    }

    fn alias(&mut self, _: &CaptureSite, _: &CaptureSite) -> Result<(), String> {
        Ok(())
    }
}

#[test]
fn captured_modules_bear_the_names_that_the_family_s_weights_have() {
    for (case, own) in [
        ("phi3", vec!["self_attn.qkv_proj", "mlp.gate_up_proj"]),
        ("qwen3", vec!["self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj"]),
        ("gemma2", vec!["post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"]),
    ] {
        let mut names = Names::default();
        model(case).capture(&[3, 4, 5], &CaptureFilter::default(), &mut names, &NullProgress).expect("a capture");
        for leaf in own {
            let name = format!("model.layers.1.{leaf}");
            assert_eq!(names.0.iter().filter(|found| **found == name).count(), 1, "{case}: {name}");
        }
    }
}

#[test]
fn linears_of_every_family_can_be_quantized() {
    for (case, _) in CASES {
        let config = labpipe::quantization::parse("scheme: int8\n", "int8", "int8").expect("a config");
        let recipe = ModelRecipe { quantization: Some(config), ..recipe(ModelSource::Path(folder(case))) };
        let tokens = ids(&expected(case)["tokens"]);
        let exact: Vec<f64> =
            model(case).last_logits(&tokens).expect("logits").iter().map(|logit| f64::from(*logit)).collect();
        let difference = largest_difference(&open(&recipe).last_logits(&tokens).expect("logits"), &exact);
        assert!(difference > 0.0 && difference < 1.0, "{case}: {difference}");
    }
}
