//! Every family from a GGUF file: the fixtures of tests/fixtures/families written as llama.cpp's converter writes them, against the
//! values that transformers computed from the folders.
#![cfg(feature = "cpu")]

#[path = "support/gguf.rs"]
mod gguf;

#[path = "support/engine.rs"]
mod test_engine;

use gguf::{Gguf, Value, family_folder, of_family};
use labpipe::event::NullProgress;
use labpipe::inference::{Model, ModelRecipe, ModelSource, SourceAccount};
use labpipe::units::DType;
use serde_json::Value as Json;
use std::path::Path;

/// The fixtures that a GGUF file can hold, and the family each belongs to: it has no dynamic scaling, and no key for layers without
/// rotary embedding.
const CASES: [(&str, &str); 14] = [
    ("gemma2", "gemma2"),
    ("gemma3", "gemma3"),
    ("gemma3-vision", "gemma3"),
    ("llama", "llama"),
    ("llama-linear", "llama"),
    ("llama-llama3", "llama"),
    ("llama-yarn", "llama"),
    ("mistral", "llama"),
    ("olmo2", "olmo2"),
    ("phi3", "phi3"),
    ("phi3-longrope", "phi3"),
    ("qwen2", "qwen2"),
    ("qwen3", "qwen3"),
    ("smollm3", "smollm3"),
];

fn recipe(path: &Path) -> ModelRecipe {
    let source = ModelSource::Path(path.to_owned());
    ModelRecipe { source, dtype: None, compute_dtype: Some(DType::F32), quantization: None }
}

/// Opens a file that is written for it.
fn open(gguf: &Gguf) -> Box<dyn Model> {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.gguf");
    gguf.write(&path);
    test_engine::engine().open(&recipe(&path), &NullProgress).expect("a model")
}

fn account(gguf: &Gguf) -> SourceAccount {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.gguf");
    gguf.write(&path);
    test_engine::engine().account(&recipe(&path)).expect("an account")
}

#[track_caller]
fn refusal(gguf: &Gguf) -> String {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("model.gguf");
    gguf.write(&path);
    test_engine::engine().inspect(&recipe(&path)).expect_err("an error").to_string()
}

fn expected(case: &str) -> Json {
    let text = std::fs::read_to_string(family_folder(case).join("expected.json")).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn ids(value: &Json) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

fn numbers(value: &Json) -> Vec<f64> {
    value.as_array().expect("a list").iter().map(|number| number.as_f64().expect("a number")).collect()
}

fn largest_difference(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    found.iter().zip(expected).map(|(found, expected)| (f64::from(*found) - expected).abs()).fold(0.0, f64::max)
}

/// Returns the logits after all tokens of a fixture.
fn logits(gguf: &Gguf, case: &str) -> Vec<f32> {
    open(gguf).last_logits(&ids(&expected(case)["tokens"])).expect("logits")
}

/// Returns tokens that a model generates one by one after a fixture's prompt.
fn generated(gguf: &Gguf, case: &str) -> Vec<u32> {
    let tokens = ids(&expected(case)["tokens"]);
    let mut model = open(gguf);
    model.reserve(60).expect("room");
    model.prefill(&tokens[..40]).expect("a prefill");
    model.decode(20).expect("tokens").iter().map(|decoded| decoded.token).collect()
}

fn as_f64(values: &[f32]) -> Vec<f64> {
    values.iter().map(|value| f64::from(*value)).collect()
}

#[test]
fn every_family_gives_the_logits_and_likelihoods_of_transformers() {
    for (case, family) in CASES {
        let expected = expected(case);
        let tokens = ids(&expected["tokens"]);
        let n_prompt = expected["n_prompt"].as_u64().expect("a count") as usize;
        let mut model = open(&of_family(case));
        assert_eq!(model.info().family, family);
        let short = model.last_logits(&tokens[..n_prompt]).expect("logits");
        let long = model.last_logits(&tokens).expect("logits");
        let short = largest_difference(&short, &numbers(&expected["prompt_last_logits"]));
        let long = largest_difference(&long, &numbers(&expected["last_logits"]));
        println!("{case}: largest difference of logits {short:.1e} after 40 tokens, {long:.1e} after 150");
        assert!(short < 1e-4 && long < 1e-4, "{case}: {short} and {long}");
        let nll: Vec<f32> = model.score(&tokens, 1).expect("scores").iter().map(|score| score.nll as f32).collect();
        let difference = largest_difference(&nll, &numbers(&expected["nll"]));
        assert!(difference < 1e-4, "{case}: {difference}");
    }
}

#[test]
fn greedy_tokens_of_every_family_are_those_of_transformers() {
    for (case, _) in CASES {
        let expected = expected(case);
        let (prompt, greedy) = (ids(&expected["tokens"]), ids(&expected["greedy"]));
        let prompt = &prompt[..expected["n_prompt"].as_u64().expect("a count") as usize];
        let mut model = open(&of_family(case));
        model.reserve(prompt.len() + greedy.len()).expect("room");
        let mut found = vec![model.prefill(prompt).expect("a prefill").next_token];
        found.extend(model.decode(greedy.len() - 1).expect("tokens").iter().map(|decoded| decoded.token));
        assert_eq!(found, greedy, "{case}");
    }
}

#[test]
fn a_file_says_of_a_model_what_its_folder_says() {
    for (case, _) in CASES {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("model.gguf");
        of_family(case).write(&path);
        let from_file = test_engine::engine().inspect(&recipe(&path)).expect("a model");
        let from_folder = test_engine::engine().inspect(&recipe(&family_folder(case))).expect("a model");
        assert_eq!((from_file.n_params, from_file.n_ctx_max), (from_folder.n_params, from_folder.n_ctx_max), "{case}");
        assert_eq!(from_file.linears, from_folder.linears, "{case}");
    }
}

/// Says of a tensor's name whether it is left out.
type Drop<'a> = &'a dyn Fn(&str) -> bool;

/// Fills the biases of a file's projections that `drop` names with what changes nothing, and returns the file without them.
fn with_and_without(case: &str, drop: Drop<'_>) -> (Gguf, Gguf) {
    let mut zeroed = of_family(case);
    let mut without = zeroed.clone();
    for (name, tensor) in &mut zeroed.tensors {
        if name.ends_with(".bias") && drop(name) {
            tensor.values.fill(0.0);
            without.tensors.remove(name);
        }
    }
    (zeroed, without)
}

#[test]
fn each_projection_has_its_own_bias_in_each_layer() {
    let cases: [(&str, Drop<'_>); 5] = [
        ("no bias on the output projection", &|name| name.contains("attn_output")),
        ("a bias on the query alone", &|name| !name.contains("attn_q")),
        ("no bias on query and key", &|name| name.contains("attn_q.") || name.contains("attn_k.")),
        ("a bias on the down projection in layer 1 alone", &|name| name != "blk.1.ffn_down.bias"),
        ("no biases in layer 0", &|name| name.starts_with("blk.0.")),
    ];
    let all = logits(&of_family("llama"), "llama");
    for (what, drop) in cases {
        let (zeroed, without) = with_and_without("llama", drop);
        let found = logits(&without, "llama");
        assert_eq!(found, logits(&zeroed, "llama"), "{what}");
        assert_eq!(generated(&without, "llama"), generated(&zeroed, "llama"), "{what}");
        assert!(largest_difference(&found, &as_f64(&all)) > 1e-2, "{what}: the biases that are gone counted");
        assert!(account(&without).warnings().is_empty());
    }
    let (zeroed, without) = with_and_without("llama", &|_| true);
    assert_eq!(logits(&without, "llama"), logits(&zeroed, "llama"));
}

#[test]
fn a_fused_projection_of_interleaved_heads_is_that_of_its_parts() {
    let apart = of_family("llama");
    let mut fused = apart.clone();
    for layer in 0..3 {
        for kind in ["weight", "bias"] {
            let parts = ["attn_q", "attn_k", "attn_v"]
                .map(|part| fused.tensors.remove(&format!("blk.{layer}.{part}.{kind}")).expect("a projection"));
            let mut shape = parts[0].shape.clone();
            shape[0] = parts.iter().map(|part| part.shape[0]).sum();
            fused.tensor(&format!("blk.{layer}.attn_qkv.{kind}"), &shape, parts.map(|part| part.values).concat());
        }
    }
    let difference = largest_difference(&logits(&fused, "llama"), &as_f64(&logits(&apart, "llama")));
    assert!(difference < 1e-5, "{difference}");
}

#[test]
fn a_rope_factor_without_a_type_is_linear() {
    let linear = of_family("llama-linear");
    let of_transformers = numbers(&expected("llama-linear")["last_logits"]);
    let mut untyped = linear.clone();
    untyped.metadata.remove("llama.rope.scaling.type");
    let mut old = untyped.clone();
    old.metadata.remove("llama.rope.scaling.factor");
    old.set("llama.rope.scale_linear", Value::F32(4.0));
    for (what, gguf) in [("without a type", &untyped), ("by the old key", &old)] {
        let difference = largest_difference(&logits(gguf, "llama-linear"), &of_transformers);
        assert!(difference < 1e-4, "{what}: {difference}");
        assert!(account(gguf).warnings().is_empty(), "{what}");
    }
    let mut none = linear.clone();
    none.set("llama.rope.scaling.type", Value::Text("none".to_owned()));
    let mut plain = linear.clone();
    plain.metadata.retain(|key, _| !key.contains("scaling"));
    assert_eq!(logits(&none, "llama-linear"), logits(&plain, "llama-linear"), "a factor of type none changes nothing");
    let mut zero = plain.clone();
    zero.set("llama.rope.scaling.factor", Value::F32(0.0));
    assert_eq!(logits(&zero, "llama-linear"), logits(&plain, "llama-linear"), "a factor of 0 stands for none");
}

#[test]
fn a_factor_beside_rope_divisors_counts_as_well() {
    // Divisors of 4 are linear scaling by 4; with a factor of 2 beside them, divisors of 2 are.
    let of_transformers = numbers(&expected("llama-linear")["last_logits"]);
    let mut divided = of_family("llama-linear");
    divided.tensor("rope_freqs.weight", &[4], vec![2.0; 4]);
    divided.set("llama.rope.scaling.factor", Value::F32(2.0));
    let difference = largest_difference(&logits(&divided, "llama-linear"), &of_transformers);
    assert!(difference < 1e-4, "{difference}");
}

#[test]
fn an_attention_factor_multiplies_cosines_and_sines_of_every_scaling() {
    // Rotated queries and keys times 1.25 are scores times 1.25²: what queries that are as much longer give.
    let plain = of_family("llama-linear");
    let mut scaled = plain.clone();
    scaled.set("llama.rope.scaling.attn_factor", Value::F32(1.25));
    let mut longer = plain.clone();
    for (name, tensor) in &mut longer.tensors {
        if name.contains("attn_q.") {
            tensor.values.iter_mut().for_each(|value| *value *= 1.25 * 1.25);
        }
    }
    let found = logits(&scaled, "llama-linear");
    let difference = largest_difference(&found, &as_f64(&logits(&longer, "llama-linear")));
    assert!(difference < 1e-4, "{difference}");
    assert!(largest_difference(&found, &as_f64(&logits(&plain, "llama-linear"))) > 1e-2);
}

#[test]
fn yarn_takes_the_file_s_attention_factor_times_that_of_every_scaling() {
    // The factor that YaRN implies at 4 is 0.1 ln 4 + 1; here it is given in two ways.
    let implied = (0.1 * 4.0f64.ln() + 1.0) as f32;
    let of_transformers = numbers(&expected("llama-yarn")["last_logits"]);
    for (yarn, every) in [(implied, 1.0), (1.0, implied), (2.0 * implied, 0.5)] {
        let mut gguf = of_family("llama-yarn");
        gguf.set("llama.rope.scaling.yarn_attn_factor", Value::F32(yarn));
        gguf.set("llama.rope.scaling.attn_factor", Value::F32(every));
        let difference = largest_difference(&logits(&gguf, "llama-yarn"), &of_transformers);
        assert!(difference < 1e-4, "{yarn} and {every}: {difference}");
    }
}

#[test]
fn sliding_layers_of_gemma_have_the_base_that_the_file_gives_them() {
    let stated = logits(&of_family("gemma3"), "gemma3");
    let mut gguf = of_family("gemma3");
    gguf.set("gemma3.rope.freq_base_swa", Value::F32(10_000.0));
    assert_eq!(logits(&gguf, "gemma3"), stated, "10,000 is the default");
    gguf.set("gemma3.rope.freq_base_swa", Value::F32(1_000_000.0));
    assert!(largest_difference(&logits(&gguf, "gemma3"), &as_f64(&stated)) > 1e-2);
    assert!(account(&gguf).warnings().is_empty());
}

#[test]
fn layers_slide_by_period_or_by_a_flag_each() {
    let case = "gemma2";
    let stated = logits(&of_family(case), case);
    let mut flags = of_family(case);
    flags.set("gemma2.attention.sliding_window_pattern", Value::Bools(vec![true, false, true, false]));
    assert_eq!(logits(&flags, case), stated);
    flags.set("gemma2.attention.sliding_window_pattern", Value::Bools(vec![false, true, false, true]));
    assert!(largest_difference(&logits(&flags, case), &as_f64(&stated)) > 1e-2);
    flags.set("gemma2.attention.sliding_window_pattern", Value::Bools(vec![true]));
    assert!(refusal(&flags).contains("1 entries for 4 layers"));
}

#[test]
fn keys_that_ask_for_what_labpipe_lacks_are_errors_that_name_them() {
    let text = |text: &str| Value::Text(text.to_owned());
    for (case, key, value, named) in [
        ("llama", "llama.expert_count", Value::U32(8), "mixture of experts"),
        ("llama", "llama.rope.scaling.type", text("spiral"), "spiral"),
        ("llama", "llama.rope.scaling.type", Value::U32(1), "expected a text"),
        ("llama", "llama.rope.scaling.type", text("longrope"), "rope_factors_short.weight"),
        ("llama", "llama.rope.scaling.factor", Value::F32(-2.0), "above 0"),
        ("llama", "llama.rope.scaling.attn_factor", Value::F32(0.0), "above 0"),
        ("llama", "llama.rope.dimension_count", Value::U32(4), "4 of 8 dimensions"),
        ("qwen2", "qwen2.rope.dimension_count", Value::U32(5), "even number"),
        ("llama", "llama.attention.value_length", Value::U32(4), "heads of several sizes"),
        ("llama", "llama.attention.causal", Value::Bool(false), "causal"),
        ("llama", "llama.attention.causal", Value::U32(0), "expected true or false"),
        ("llama", "llama.rope.dimension_count", Value::U32(0), "even number from 2"),
        ("llama", "llama.attention.scale", Value::F32(0.5), "attention.scale"),
        ("llama", "llama.logit_scale", Value::F32(0.25), "scaled logits"),
        ("llama", "llama.attn_logit_softcapping", Value::F32(50.0), "soft cap"),
        ("llama", "llama.attention.max_alibi_bias", Value::F32(8.0), "ALiBi"),
        ("llama", "llama.use_parallel_residual", Value::Bool(true), "side by side"),
        ("llama", "llama.feed_forward_length", Value::U32s(vec![64, 64, 32]), "layers differ"),
        ("llama", "general.type", text("adapter"), "adapter"),
        ("llama", "split.count", Value::U32(2), "merge them first"),
        ("llama-yarn", "llama.rope.scaling.yarn_log_multiplier", Value::F32(0.1), "yarn_log_multiplier"),
        ("qwen3", "qwen3.attention.sliding_window", Value::U32(24), "which layers slide"),
        ("gemma2", "gemma2.attn_logit_softcapping", Value::F32(-1.0), "above 0"),
        ("olmo2", "olmo2.attention.sliding_window", Value::U32(24), "OLMo 3"),
        ("smollm3", "smollm3.attention.sliding_window", Value::U32(24), "which layers slide"),
    ] {
        let mut gguf = of_family(case);
        gguf.set(key, value);
        let error = refusal(&gguf);
        assert!(error.contains(named) && error.contains(key), "{key}: {error}");
    }
    for key in ["context_length", "attention.layer_norm_rms_epsilon", "feed_forward_length"] {
        let mut gguf = of_family("llama");
        gguf.metadata.remove(&format!("llama.{key}"));
        let error = refusal(&gguf);
        assert!(error.contains(key) && error.contains("missing"), "{key}: {error}");
    }
    let mut gguf = of_family("llama");
    gguf.tensor("blk.1.attn_q.scale", &[1], vec![2.0]);
    assert!(refusal(&gguf).contains("blk.1.attn_q.scale"));
}

#[test]
fn values_that_change_nothing_are_taken_without_a_word() {
    let plain = of_family("llama");
    let mut gguf = plain.clone();
    gguf.set("llama.expert_count", Value::U32(0))
        .set("llama.expert_used_count", Value::U32(0))
        .set("llama.logit_scale", Value::F32(1.0))
        .set("llama.attention.causal", Value::Bool(true))
        .set("llama.attention.scale", Value::F32(1.0 / 8.0f32.sqrt()))
        .set("llama.attention.head_count_kv", Value::U32s(vec![2, 2, 2]))
        .set("llama.feed_forward_length", Value::U32s(vec![64; 3]))
        .set("llama.attention.sliding_window", Value::U32(0))
        .set("llama.rope.scaling.attn_factor", Value::F32(1.0))
        .set("general.file_type", Value::U32(2))
        .set("general.type", Value::Text("model".to_owned()))
        .set("quantize.imatrix.entries_count", Value::U32(7))
        .set("split.count", Value::U32(1));
    assert_eq!(logits(&gguf, "llama"), logits(&plain, "llama"));
    assert_eq!(account(&gguf).warnings(), Vec::<String>::new());
}

#[test]
fn what_is_not_used_is_named_in_one_warning_per_part() {
    let mut gguf = of_family("llama");
    gguf.set("mistral.attention.sliding_window", Value::U32(8))
        .set("llama.future_key", Value::F32(1.0))
        .set("tokenizer.ggml.precompiled_charsmap", Value::Text("x".to_owned()))
        .tensor("blk.3.attn_q.weight", &[1, 1], vec![1.0])
        .tensor("blk.0.attn_rot_embd.weight", &[4], vec![1.0; 4])
        .tensor("output.bias", &[96], vec![1.0; 96]);
    let account = account(&gguf);
    let [metadata, tensors] = account.parts.as_slice() else { panic!("two parts: {account:?}") };
    assert_eq!((metadata.source.as_str(), tensors.source.as_str()), ("GGUF metadata", "tensors"));
    assert_eq!(
        metadata.unused,
        ["llama.future_key", "mistral.attention.sliding_window", "tokenizer.ggml.precompiled_charsmap"]
    );
    assert_eq!(tensors.unused, ["blk.3.attn_q.weight", "output.bias"]);
    // Two norms, seven weights and as many biases in each of three layers; embedding, norm and head.
    assert_eq!((tensors.n_used, tensors.n_harmless), (3 * 16 + 3, 1));
    assert_eq!(account.warnings().len(), 2);
    let [stored] = account.element_types.as_slice() else { panic!("one type: {account:?}") };
    assert_eq!((stored.name.as_str(), stored.n_tensors, stored.bytes), ("F32", 51, 4 * stored.n_params));
}

#[test]
fn a_window_that_llama_cpp_leaves_out_is_applied_and_told() {
    for case in ["mistral", "phi3"] {
        let warnings = account(&of_family(case)).warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("llama.cpp leaves it out"), "{case}: {warnings:?}");
    }
    for (case, _) in CASES.iter().filter(|(case, _)| !["mistral", "phi3", "qwen2"].contains(case)) {
        assert_eq!(account(&of_family(case)).warnings(), Vec::<String>::new(), "{case}");
    }
}
