//! The engine against values that transformers and bitsandbytes computed (tests/fixtures/README.md says how).
#![cfg(feature = "cpu")]

#[path = "support/engine.rs"]
mod test_engine;

use labpipe::event::NullProgress;
use labpipe::inference::{
    CaptureFilter, CaptureSink, CaptureSite, InferenceError, LogProbFormat, LogProbRows, LogProbSink, LogProbSource,
    Model, ModelRecipe, ModelSource, TokenScore, check_decode, decode_budget,
};
use labpipe::metrics::ActivationDiff;
use labpipe::units::DType;
use serde_json::Value;
use std::collections::BTreeMap;
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
    test_engine::engine().open(recipe, &NullProgress).expect("a model")
}

fn nf4(double_quant: bool) -> ModelRecipe {
    let text = format!("scheme: nf4\ndouble_quant: {double_quant}\n");
    let config = labpipe::quantization::parse(&text, "nf4", "nf4").expect("a config");
    ModelRecipe { quantization: Some(config), ..recipe() }
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

#[test]
fn nf4_perplexity_agrees_with_bitsandbytes_with_and_without_double_quantization() {
    let reference = reference();
    for (double_quant, case) in [(false, "nf4_bs64"), (true, "nf4_bs64_dq")] {
        let mut model = open(&nf4(double_quant));
        for (name, text) in [
            ("tinystories_first_20000_chars", "experiments/data/tinystories.txt"),
            ("wiki_first_20000_chars", "experiments/data/wikitext2-head.txt"),
        ] {
            let row = &reference[case][name]["strided"][0];
            let (found, legacy, _) = strided(model.as_mut(), &tokens(Path::new(text), 20_000), 512, 256);
            assert!(
                relative(found, row["ppl_by_valid_labels"].as_f64().expect("a number")) < 1e-3,
                "{case} {name} {found}"
            );
            assert!(
                relative(legacy, row["ppl_seed_recipe"].as_f64().expect("a number")) < 1e-3,
                "{case} {name} {legacy}"
            );
        }
    }
}

/// Keeps what a capture hands over.
#[derive(Default)]
struct Kept(BTreeMap<String, (usize, Vec<f32>)>);

impl CaptureSink for Kept {
    fn take(&mut self, site: &CaptureSite, _first: usize, width: usize, values: &[f32]) -> Result<(), String> {
        let (_, kept) = self.0.entry(site.module.clone()).or_insert((width, Vec::new()));
        kept.extend_from_slice(values);
        Ok(())
    }

    fn alias(&mut self, _site: &CaptureSite, _first: &CaptureSite) -> Result<(), String> {
        Ok(())
    }
}

fn capture(recipe: &ModelRecipe, tokens: &[u32]) -> BTreeMap<String, (usize, Vec<f32>)> {
    let mut kept = Kept::default();
    open(recipe).capture(tokens, &CaptureFilter::default(), &mut kept, &NullProgress).expect("a capture");
    kept.0
}

#[test]
fn every_linear_s_cumulative_error_agrees_with_bitsandbytes() {
    let reference = reference();
    let prompt = ids(&reference["prompt_ids"]);
    let base = capture(&recipe(), &prompt);
    for (double_quant, case) in [(false, "nf4_bs64"), (true, "nf4_bs64_dq")] {
        let quantized = capture(&nf4(double_quant), &prompt);
        let expected = reference[case]["activation_diff_prompt"].as_object().expect("a mapping");
        assert!(expected.len() >= 12);
        for (module, expected) in expected {
            let (width, values) = &base[module];
            let mut diff = ActivationDiff::new(*width);
            diff.push_rows(values, &quantized[module].1).expect("finite values");
            let found = diff.finish(module, None, "");
            let (mse, cosine) = (expected["mse"].as_f64().expect("mse"), expected["cosine"].as_f64().expect("cosine"));
            assert!(relative(found.mse, mse) < 1e-3, "{case} {module}: MSE {} against {mse}", found.mse);
            // The reference's cosine is an f32 near 1: its own rounding is 6e-8.
            let rounding = 6e-8 / (1.0 - cosine);
            let error = relative(1.0 - found.cosine, 1.0 - cosine);
            assert!(
                error < 1e-3 + rounding,
                "{case} {module}: 1 - cosine {} against {}",
                1.0 - found.cosine,
                1.0 - cosine
            );
        }
    }
}

#[test]
fn no_path_holds_more_than_a_panel_of_dequantized_weights_a_thread() {
    if test_engine::device() != "cpu" {
        return eprintln!("left out: panels are the CPU's");
    }
    let shape = root().join("tests/fixtures/smollm2-135m/config.json");
    for scheme in ["nf4", "int8", "int4"] {
        let config = labpipe::quantization::parse(&format!("scheme: {scheme}\n"), scheme, scheme).expect("a config");
        let source = ModelSource::Random { config: shape.clone(), seed: 1 };
        let mut model =
            open(&ModelRecipe { source, dtype: Some(DType::F16), compute_dtype: None, quantization: Some(config) });
        model.last_logits(&(0..64).collect::<Vec<u32>>()).expect("logits");
    }
    let largest = 1536 * 576 * 4;
    let peak = labpipe_kernels::burn_ext::peak_panel_bytes();
    assert!(peak > 0 && peak <= labpipe_kernels::burn_ext::PANEL_BYTES && peak < largest, "{peak} bytes");
}

#[test]
fn tied_weights_are_found_under_either_name_and_give_the_same_logits_in_any_stored_type() {
    let prompt: Vec<u32> = (10..40).collect();
    let logits = |folder: &str, dtype: Option<DType>| {
        let source = ModelSource::Path(root().join("models").join(folder));
        open(&ModelRecipe { source, dtype, compute_dtype: None, quantization: None })
            .last_logits(&prompt)
            .expect("logits")
    };
    let bf16 = logits("tinystories-656k", None);
    let from_head = logits("tinystories-656k-f32", Some(DType::Bf16));
    assert_eq!(bf16, from_head);
}

#[test]
fn half_precision_compute_stays_near_f32() {
    if test_engine::device() == "wgpu" {
        return eprintln!("left out: wgpu computes in f32 alone");
    }
    let tokens = tokens(Path::new("experiments/data/tinystories.txt"), 4_000);
    let perplexity = |compute| {
        strided(open(&ModelRecipe { compute_dtype: Some(compute), ..recipe() }).as_mut(), &tokens, 512, 512).0
    };
    let exact = perplexity(DType::F32);
    assert!(relative(perplexity(DType::F16), exact) < 5e-3);
    assert!(relative(perplexity(DType::Bf16), exact) < 3e-2);
}

#[test]
fn decode_is_prefill_within_the_budget_at_64_positions_and_goes_on_where_it_was() {
    let int8 = labpipe::quantization::parse("scheme: int8\noutlier_threshold: 6.0\n", "int8", "int8");
    let int8 = Some(int8.expect("a config"));
    let half = ModelRecipe { compute_dtype: Some(DType::F16), ..recipe() };
    let cases = [
        (recipe(), false, 1e-4),
        (nf4(true), false, 1e-4),
        (half, false, 2e-2),
        (ModelRecipe { quantization: int8, ..recipe() }, true, 3e-2),
    ];
    for (recipe, quantizes, reached) in cases {
        // wgpu computes in f32 alone.
        let is_half = recipe.compute_dtype == Some(DType::F16);
        if is_half && test_engine::device() == "wgpu" {
            continue;
        }
        let mut model = open(&recipe);
        let budget = decode_budget(model.info().compute_dtype, quantizes);
        model.reserve(80).expect("room");
        let check = check_decode(model.as_mut(), &[1], 64, budget).expect("decode is prefill");
        assert_eq!((check.n_positions, check.budget), (64, budget));
        assert!(check.relative_error_max < reached, "{:.2e} is over {reached:.0e}", check.relative_error_max);
        // What is kept are the tokens that are generated anyway.
        let greedy = |model: &mut dyn Model| {
            model.prefill(&[1, 20]).expect("a prefill");
            model.decode(16).expect("tokens").iter().map(|token| token.token).collect::<Vec<u32>>()
        };
        let expected = greedy(model.as_mut());
        model.prefill(&[1, 20]).expect("a prefill");
        let mut n_rows = 0;
        let mut kept = Vec::new();
        for n_gen in [5, 11] {
            let some = model.decode_keeping(n_gen, &mut |logits| {
                n_rows += logits.len() / 512;
                Ok(())
            });
            kept.extend(some.expect("tokens").iter().map(|token| token.token));
        }
        assert_eq!((kept, n_rows), (expected, 16));
    }
}

#[test]
fn bad_tokens_and_contexts_are_errors() {
    let mut model = open(&recipe());
    assert!(matches!(model.last_logits(&[600]), Err(InferenceError::TokenOutOfRange { token: 600, vocab_size: 512 })));
    assert!(matches!(model.prefill(&[1; 513]), Err(InferenceError::ContextTooLong { asked: 513, n_ctx_max: 512 })));
    model.prefill(&[1]).expect("a prefill");
    assert!(matches!(model.decode(4), Err(InferenceError::ContextTooLong { .. })));
}

/// A model that has nothing but what the port asks of every model: scores come from its defaults.
struct Plain(Box<dyn Model>);

impl Model for Plain {
    fn info(&self) -> &labpipe::inference::ModelInfo {
        self.0.info()
    }

    fn weights_bytes(&self) -> u64 {
        self.0.weights_bytes()
    }

    fn kv_cache_bytes(&self) -> u64 {
        self.0.kv_cache_bytes()
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<labpipe::inference::Prefilled, InferenceError> {
        self.0.prefill(tokens)
    }

    fn reserve(&mut self, n_ctx: usize) -> Result<(), InferenceError> {
        self.0.reserve(n_ctx)
    }

    fn decode(&mut self, n_gen: usize) -> Result<Vec<labpipe::inference::Decoded>, InferenceError> {
        self.0.decode(n_gen)
    }

    fn decode_keeping(
        &mut self,
        n_gen: usize,
        take: &mut labpipe::inference::TakeLogits<'_>,
    ) -> Result<Vec<labpipe::inference::Decoded>, InferenceError> {
        self.0.decode_keeping(n_gen, take)
    }

    fn last_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        self.0.last_logits(tokens)
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        self.0.score(tokens, first_target)
    }

    fn capture(
        &mut self,
        tokens: &[u32],
        filter: &CaptureFilter,
        sink: &mut dyn CaptureSink,
        progress: &dyn labpipe::event::Progress,
    ) -> Result<(), InferenceError> {
        self.0.capture(tokens, filter, sink, progress)
    }
}

/// Rows in memory, given back in the pieces that are asked for.
#[derive(Default)]
struct Rows(Vec<f32>, usize);

impl LogProbSink for Rows {
    fn take(&mut self, rows: LogProbRows) -> Result<(), String> {
        let LogProbRows::F32(values) = rows else { return Err("f32 was asked for".to_owned()) };
        self.0.extend(values);
        Ok(())
    }
}

impl LogProbSource for Rows {
    fn next_rows(&mut self, n_rows: usize) -> Result<LogProbRows, String> {
        let first = self.1 * 512;
        self.1 += n_rows;
        Ok(LogProbRows::F32(self.0[first..self.1 * 512].to_vec()))
    }
}

#[test]
fn the_port_s_defaults_and_the_engine_s_own_way_score_alike() {
    let tokens = &tokens(Path::new("experiments/data/tinystories.txt"), 3_000)[..140];
    let (mut plain, mut engine) = (Plain(open(&recipe())), open(&recipe()));
    let mut kept = [Rows::default(), Rows::default()];
    let own = engine.score_keeping(tokens, 70, LogProbFormat::F32, &mut kept[0]).expect("scores");
    let default = plain.score_keeping(tokens, 70, LogProbFormat::F32, &mut kept[1]).expect("scores");
    let scored = engine.score(tokens, 70).expect("scores");
    assert_eq!((own.len(), default.len()), (70, 70));
    for ((own, default), scored) in own.iter().zip(&default).zip(&scored) {
        // A device may score on its own, in its own precision.
        assert_eq!(own.argmax, scored.argmax);
        assert!((own.nll - scored.nll).abs() < 1e-5);
        assert_eq!(own.argmax, default.argmax);
        assert!((own.nll - default.nll).abs() < 1e-4);
    }
    let mut nf4 = open(&nf4(false));
    let own = nf4.score_against(tokens, 70, &mut kept[0]).expect("scores");
    let default = Plain(nf4).score_against(tokens, 70, &mut kept[1]).expect("scores");
    for (own, default) in own.iter().zip(&default) {
        assert!(own.kl > 0.0 && (own.kl - default.kl).abs() < 1e-4, "{} {}", own.kl, default.kl);
    }
}

#[test]
fn a_slice_may_be_one_token_longer_than_the_context() {
    let tokens = tokens(Path::new("experiments/data/tinystories.txt"), 3_000);
    let mut model = open(&recipe());
    let n_ctx = model.info().n_ctx_max;
    let whole = model.score(&tokens[..n_ctx + 1], n_ctx).expect("the last token is only a target");
    let logits = model.last_logits(&tokens[..n_ctx]).expect("logits");
    let expected = labpipe::inference::score_logits(&logits, logits.len(), &tokens[n_ctx..=n_ctx]).expect("finite");
    assert!((whole[0].nll - expected[0].nll).abs() < 1e-5);
    assert!(matches!(model.score(&tokens[..n_ctx + 2], n_ctx), Err(InferenceError::ContextTooLong { .. })));
    assert!(model.score(&tokens[..4], 4).is_err() && model.score(&tokens[..4], 0).is_err());
}
