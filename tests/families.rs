//! Model families against values that transformers computed with tiny random models (tests/fixtures/families/README.md says how).
#![cfg(feature = "cpu")]

#[path = "support/engine.rs"]
mod test_engine;

use labpipe::engine::BurnEngine;
use labpipe::event::NullProgress;
use labpipe::inference::{CaptureFilter, CaptureSink, CaptureSite, Engine, Model, ModelRecipe, ModelSource};
use labpipe::units::DType;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// The fixtures and the family each belongs to.
const CASES: [(&str, &str); 16] = [
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("gemma3-vision", "gemma3"),
    ("llama", "llama"),
    ("llama-dynamic", "llama"),
    ("llama-linear", "llama"),
    ("llama-llama3", "llama"),
    ("llama-yarn", "llama"),
    ("mistral", "mistral"),
    ("olmo2", "olmo2"),
    ("phi3", "phi3"),
    ("phi3-longrope", "phi3"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("smollm3", "smollm3"),
    ("smollm3-sliding", "smollm3"),
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

fn open(recipe: &ModelRecipe) -> Box<dyn Model> {
    test_engine::engine().open(recipe, &NullProgress).expect("a model")
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

/// What a hook on the module `lm_head` sees in transformers: its caps are applied behind the module.
#[test]
fn a_captured_head_is_the_module_s_output_before_the_soft_cap() {
    struct Head(Vec<f32>);
    impl CaptureSink for Head {
        fn take(&mut self, site: &CaptureSite, _first: usize, _width: usize, values: &[f32]) -> Result<(), String> {
            assert_eq!(site.module, "lm_head");
            self.0.extend_from_slice(values);
            Ok(())
        }

        fn alias(&mut self, _site: &CaptureSite, _source: &CaptureSite) -> Result<(), String> {
            Ok(())
        }
    }
    for (case, cap) in [("gemma2", true), ("llama", false)] {
        let config: Value =
            serde_json::from_str(&std::fs::read_to_string(folder(case).join("config.json")).expect("a config"))
                .expect("JSON");
        let tokens = ids(&expected(case)["tokens"]);
        let mut model = model(case);
        let mut head = Head(Vec::new());
        let filter = CaptureFilter { modules: vec!["lm_head".to_owned()], inputs: false };
        model.capture(&tokens, &filter, &mut head, &NullProgress).expect("a capture");
        let mut logits = Vec::new();
        let mut take = |chunk: &[f32]| {
            logits.extend(chunk.iter().map(|logit| f64::from(*logit)));
            Ok(())
        };
        model.logits(&tokens, 0..tokens.len(), &mut take).expect("logits");
        let cap = cap.then(|| config["final_logit_softcapping"].as_f64().expect("a cap"));
        let capped = |value: f64| cap.map_or(value, |cap| cap * (value / cap).tanh());
        let by_hand: Vec<f32> = head.0.iter().map(|value| capped(f64::from(*value)) as f32).collect();
        let difference = largest_difference(&by_hand, &logits);
        assert!(difference < 1e-4, "{case}: {difference}");
        let beyond = largest_difference(&head.0, &logits);
        assert_eq!(beyond > 0.1, cap.is_some(), "{case}: {beyond}");
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
    if test_engine::device() == "wgpu" {
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
        (
            "olmo2",
            vec!["self_attn.q_norm", "self_attn.k_norm", "post_attention_layernorm", "post_feedforward_layernorm"],
        ),
    ] {
        let mut names = Names::default();
        model(case).capture(&[3, 4, 5], &CaptureFilter::default(), &mut names, &NullProgress).expect("a capture");
        for leaf in own {
            let name = format!("model.layers.1.{leaf}");
            assert_eq!(names.0.iter().filter(|found| **found == name).count(), 1, "{case}: {name}");
        }
    }
}

/// Without a norm before a sublayer its projections read the residual stream, which is no norm's output.
#[test]
fn inputs_of_projections_without_a_norm_before_them_are_kept_once() {
    type Port = (String, &'static str);
    #[derive(Default)]
    struct Inputs {
        taken: BTreeMap<Port, Vec<f32>>,
        aliases: BTreeMap<String, Port>,
    }
    impl CaptureSink for Inputs {
        fn take(&mut self, site: &CaptureSite, _: usize, _: usize, values: &[f32]) -> Result<(), String> {
            self.taken.insert((site.module.clone(), site.port), values.to_vec());
            Ok(())
        }

        fn alias(&mut self, site: &CaptureSite, source: &CaptureSite) -> Result<(), String> {
            self.aliases.insert(site.module.clone(), (source.module.clone(), source.port));
            Ok(())
        }
    }
    let mut found = Inputs::default();
    let filter = CaptureFilter { modules: Vec::new(), inputs: true };
    model("olmo2").capture(&[3, 4, 5], &filter, &mut found, &NullProgress).expect("a capture");
    let port = |module: &str, port| (format!("model.{module}"), port);
    for (module, source) in [("self_attn.k_proj", "self_attn.q_proj"), ("mlp.up_proj", "mlp.gate_proj")] {
        let source = port(&format!("layers.1.{source}"), "input");
        assert_eq!(found.aliases[&format!("model.layers.1.{module}")], source);
        assert!(found.taken.contains_key(&source));
    }
    assert!(found.aliases.values().all(|source| found.taken.contains_key(source)), "{:?}", found.aliases);
    let values = |module: &str, name| &found.taken[&port(module, name)];
    assert_eq!(values("layers.0.self_attn.q_proj", "input"), values("embed_tokens", "output"));
    assert_eq!(values("layers.1.self_attn.q_proj", "input"), values("layers.0", "output"));
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

/// A config written where an engine can read it.
fn written(config: &Value) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("config.json");
    std::fs::write(&path, config.to_string()).expect("a file");
    (dir, path)
}

fn real_config(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/configs").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).expect("the config")).expect("JSON")
}

#[test]
fn llama_3_2_3b_and_qwen_2_5_3b_run_at_full_width() {
    if test_engine::device() == "wgpu" {
        return eprintln!("left out: the embedding is larger than a software Vulkan binds");
    }
    for (name, n_params, n_ctx_max) in
        [("Llama-3.2-3B-Instruct.json", 3_212_749_824, 131_072), ("Qwen2.5-3B-Instruct.json", 3_085_938_688, 32_768)]
    {
        let mut config = real_config(name);
        let (_dir, path) = written(&config);
        let source = |config: &Path| recipe(ModelSource::Random { config: config.to_owned(), seed: 1 });
        let info = BurnEngine::cpu().inspect(&source(&path)).expect("a model");
        assert_eq!((info.n_params, info.n_ctx_max, info.dtype), (n_params, n_ctx_max, DType::Bf16), "{name}");
        config["num_hidden_layers"] = Value::from(1);
        let (_dir, path) = written(&config);
        let quantization = labpipe::quantization::parse("scheme: nf4\n", "nf4", "nf4").expect("a config");
        let mut model = open(&ModelRecipe { quantization: Some(quantization), ..source(&path) });
        let prefilled = model.prefill(&[1, 2, 3, 4]).expect("a prefill");
        assert!((prefilled.next_token as usize) < info.vocab_size);
        let scores = model.score(&[1, 2, 3, 4], 1).expect("scores");
        // Random weights know nothing: every token is about as likely as any other.
        let uniform = (info.vocab_size as f64).ln();
        assert!(scores.iter().all(|score| (score.nll - uniform).abs() < 4.0), "{name}: {scores:?}");
    }
}

#[test]
fn models_of_every_family_have_the_parameters_that_their_cards_state() {
    let cases = [
        // mistralai/Mistral-7B-v0.1
        (
            r#"{"model_type": "mistral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 32000,
                "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "rms_norm_eps": 1e-5,
                "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": false}"#,
            7_241_732_096,
            32_768,
        ),
        // Qwen/Qwen3-0.6B
        (
            r#"{"model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "vocab_size": 151936,
                "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
                "rms_norm_eps": 1e-6, "rope_theta": 1000000, "rope_scaling": null, "sliding_window": null, "max_window_layers": 28,
                "use_sliding_window": false, "attention_bias": false, "tie_word_embeddings": true}"#,
            596_049_920,
            40_960,
        ),
        // google/gemma-2-2b
        (
            r#"{"model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "vocab_size": 256000,
                "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
                "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256, "sliding_window": 4096,
                "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "rope_theta": 10000.0}"#,
            2_614_341_888,
            8_192,
        ),
        // google/gemma-3-1b-it
        (
            r#"{"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "vocab_size": 262144,
                "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "max_position_embeddings": 32768,
                "query_pre_attn_scalar": 256, "sliding_window": 512, "sliding_window_pattern": 6, "rope_local_base_freq": 10000,
                "rope_theta": 1000000, "rope_scaling": null, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6}"#,
            999_885_952,
            32_768,
        ),
        // google/gemma-3-4b-it: 4,300,079,472 with its 419,816,304 for images
        (
            r#"{"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
                "num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
                "vision_config": {"hidden_size": 1152}, "torch_dtype": "bfloat16", "image_token_index": 262144}"#,
            3_880_263_168,
            131_072,
        ),
        // microsoft/Phi-3-mini-4k-instruct
        (
            r#"{"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32, "vocab_size": 32064,
                "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096,
                "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": null,
                "sliding_window": 2047, "tie_word_embeddings": false}"#,
            3_821_079_552,
            4_096,
        ),
        // HuggingFaceTB/SmolLM3-3B
        (
            r#"{"model_type": "smollm3", "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "vocab_size": 128256,
                "num_attention_heads": 16, "num_key_value_heads": 4, "max_position_embeddings": 65536, "max_window_layers": 28,
                "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "rope_scaling": null, "no_rope_layer_interval": 4,
                "use_sliding_window": false, "sliding_window": null, "attention_bias": false, "mlp_bias": false}"#,
            3_075_098_624,
            65_536,
        ),
        // allenai/OLMo-2-1124-7B
        (
            r#"{"model_type": "olmo2", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 100352,
                "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-6,
                "rope_theta": 500000, "rope_scaling": null, "attention_bias": false, "tie_word_embeddings": false}"#,
            7_298_617_344,
            4_096,
        ),
    ];
    for (config, n_params, n_ctx_max) in cases {
        let (_dir, config) = written(&serde_json::from_str(config).expect("JSON"));
        // Stored as f16: what does not fit this machine's memory is refused before anything is said of it.
        let recipe = ModelRecipe { dtype: Some(DType::F16), ..recipe(ModelSource::Random { config, seed: 0 }) };
        let info = BurnEngine::cpu().inspect(&recipe).expect("a model");
        assert_eq!((info.n_params, info.n_ctx_max), (n_params, n_ctx_max), "{}", info.family);
    }
}

// The files are what the hub's configs and transformers 5.24 write, so that none of their fields may be news.
#[test]
fn configs_of_every_family_leave_no_field_unused() {
    for (case, _) in CASES {
        for name in ["config.json", "config-transformers5.json"] {
            let recipe = recipe(ModelSource::Random { config: folder(case).join(name), seed: 0 });
            let account = BurnEngine::cpu().account(&recipe).expect("an account");
            assert_eq!(account.warnings(), Vec::<String>::new(), "{case}/{name}");
            assert!(account.parts[0].n_used > 10, "{case}/{name}: {} fields", account.parts[0].n_used);
        }
    }
}

#[test]
fn fields_that_no_model_can_have_are_errors_that_name_them() {
    let base = |case: &str| -> Value {
        serde_json::from_str(&std::fs::read_to_string(folder(case).join("config.json")).expect("the config"))
            .expect("JSON")
    };
    for (case, field, value, named) in [
        ("llama", "rope_theta", "0.5", "rope_theta"),
        ("llama", "rope_scaling", r#"{"type": "spiral"}"#, "spiral"),
        ("llama", "rope_scaling", r#"{"type": "linear"}"#, "factor"),
        ("llama", "rope_scaling", r#"{"type": "linear", "factor": -4}"#, "factor"),
        ("llama", "num_hidden_layers", "5000000", "num_hidden_layers"),
        ("phi3", "partial_rotary_factor", "1.5", "partial_rotary_factor"),
        ("mistral", "sliding_window", "-1", "sliding_window"),
        ("gemma2", "attn_logit_softcapping", "0", "attn_logit_softcapping"),
        ("gemma2", "query_pre_attn_scalar", "-3", "query_pre_attn_scalar"),
        ("gemma2", "layer_types", r#"["full_attention"]"#, "layer_types"),
        ("gemma2", "layer_types", r#"["a", "b", "c", "d"]"#, "layer_types"),
        ("gemma3", "use_bidirectional_attention", "true", "use_bidirectional_attention"),
        ("phi3", "rope_scaling", r#"{"type": "linear", "factor": 2}"#, "longrope"),
        ("smollm3", "no_rope_layers", "[1, 0, 1]", "no_rope_layers has 3 entries for 4 layers"),
        ("smollm3", "no_rope_layers", "[1, 0, 1, true]", "no_rope_layers"),
        ("smollm3-sliding", "no_rope_layer_interval", "0", "no_rope_layer_interval"),
        ("smollm3-sliding", "sliding_window", "null", "sliding_window"),
        (
            "phi3-longrope",
            "rope_scaling",
            r#"{"type": "longrope", "short_factor": [1.0], "long_factor": [1.0]}"#,
            "short_factor",
        ),
    ] {
        let mut config = base(case);
        config[field] = serde_json::from_str(value).expect("JSON");
        let (_dir, path) = written(&config);
        let recipe = recipe(ModelSource::Random { config: path, seed: 0 });
        let error = BurnEngine::cpu().inspect(&recipe).expect_err("an error").to_string();
        assert!(error.contains(named), "{case} {field} {value}: {error}");
    }
}

#[test]
fn every_part_that_a_family_has_of_its_own_shows_in_the_logits() {
    for (case, field, value) in [
        ("llama-llama3", "rope_scaling", "null"),
        ("llama-linear", "rope_scaling", "null"),
        ("llama-dynamic", "rope_scaling", r#"{"type": "dynamic", "factor": 8.0}"#),
        ("llama-yarn", "rope_scaling", "null"),
        ("mistral", "sliding_window", "null"),
        ("qwen2", "use_sliding_window", "false"),
        ("gemma2", "sliding_window", "4096"),
        ("gemma2", "attn_logit_softcapping", "null"),
        ("gemma2", "final_logit_softcapping", "null"),
        ("gemma2", "query_pre_attn_scalar", "16"),
        ("gemma2", "layer_types", r#"["full_attention", "sliding_attention", "full_attention", "sliding_attention"]"#),
        ("gemma2", "hidden_activation", r#""silu""#),
        ("gemma3", "rope_local_base_freq", "1000000.0"),
        ("gemma3", "rope_scaling", "null"),
        ("gemma3", "sliding_window_pattern", "6"),
        ("phi3", "sliding_window", "null"),
        ("phi3-longrope", "original_max_position_embeddings", "200"),
        ("smollm3", "no_rope_layers", "[1, 1, 1, 1]"),
        ("smollm3", "no_rope_layers", "[1, 0, 1, 0]"),
        ("smollm3-sliding", "no_rope_layer_interval", "4"),
        ("smollm3-sliding", "sliding_window", "150"),
        (
            "smollm3-sliding",
            "layer_types",
            r#"["full_attention", "sliding_attention", "full_attention", "full_attention"]"#,
        ),
        ("olmo2", "rope_theta", "10000.0"),
    ] {
        let mut config: Value =
            serde_json::from_str(&std::fs::read_to_string(folder(case).join("config.json")).expect("the config"))
                .expect("JSON");
        config[field] = serde_json::from_str(value).expect("JSON");
        let (dir, _path) = written(&config);
        std::fs::copy(folder(case).join("model.safetensors"), dir.path().join("model.safetensors")).expect("a copy");
        let expected = expected(case);
        let mut model = open(&recipe(ModelSource::Path(dir.path().to_owned())));
        let logits = model.last_logits(&ids(&expected["tokens"])).expect("logits");
        let difference = largest_difference(&logits, &numbers(&expected["last_logits"]));
        assert!(difference > 1e-2, "{case}: {field} of {value} changes logits by {difference} only");
    }
}
