//! Synthetic inputs for this room's tests.

use super::{
    NoTokens, ReportError, ReportFile, ReportRequest, ScatterFailure, ScatterPoints, ScatterSource, TokenSource, render,
};
use crate::artifact::{
    BenchCommon, BlockInterval, DecodeRecord, DecodeResult, DiffRecord, MemoryFigures, ModuleDiff, PplRecord,
    PplResult, PrefillRecord, PrefillResult, QuantizeTotals, QuantizedModule, Record, RecordBody, RecordHead,
};
use crate::bench::{decode_result, prefill_result};
use crate::inference::{LoadRecord, ModelInfo, ModelRecipe, ModelSource, QuantizeRecord, SourceAccount, StoredType};
use crate::quantization::QuantizationConfig;
use crate::stage::StageInput;
use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

/// Returns a stage input whose key is made of its address.
pub fn input(address: &str, kind: &str, body: Value, inputs: &[(&str, &Arc<StageInput>)]) -> Arc<StageInput> {
    let head = RecordHead {
        format_version: 1,
        pipeline: "sensitivity".to_owned(),
        run_id: "20260102-030405-abcd".to_owned(),
        produced_by_run: "20260102-030405-abcd".to_owned(),
        stage: address.to_owned(),
        kind: kind.to_owned(),
        key: "0123456789abcdef".repeat(4),
        cached: false,
        started_at: "2026-01-02T03:04:05Z".to_owned(),
        duration_s: 1.25,
        device: Some("cpu: a processor, 2 threads".to_owned()),
        params: Map::from_iter([("text".to_owned(), json!({"source": "experiments/data/tinystories.txt"}))]),
        read_files: BTreeMap::from([("models/x/model.safetensors".to_owned(), "ab".repeat(32))]),
        execution: None,
    };
    let Value::Object(body) = body else { panic!("a body is an object") };
    let mut lineage: BTreeMap<String, Vec<Arc<StageInput>>> = BTreeMap::new();
    for (param, input) in inputs {
        lineage.entry((*param).to_owned()).or_default().push(Arc::clone(input));
    }
    Arc::new(StageInput {
        address: address.to_owned(),
        kind: kind.to_owned(),
        key: head.key.clone(),
        record: Record { head, body },
        dir: PathBuf::from("cache").join(address),
        inputs: lineage,
    })
}

fn body(record: &impl RecordBody) -> Value {
    Value::Object(record.to_fields())
}

fn recipe(quantization: Option<QuantizationConfig>) -> ModelRecipe {
    ModelRecipe {
        source: ModelSource::Path(PathBuf::from("models/x")),
        dtype: Some(DType::F16),
        compute_dtype: None,
        quantization,
    }
}

fn model_info() -> ModelInfo {
    ModelInfo {
        family: "llama".to_owned(),
        n_layers: 5,
        hidden_size: 64,
        n_heads: 8,
        n_kv_heads: 4,
        vocab_size: 512,
        n_ctx_max: 512,
        n_params: 260_032,
        tied_embeddings: true,
        dtype: DType::F16,
        compute_dtype: DType::F32,
        linears: Vec::new(),
        tokenizer_dir: None,
        bos_token_id: Some(1),
        stored_quantization: None,
    }
}

/// Returns a model loaded in f16; the bytes of its weights are not recorded.
pub fn load(address: &str) -> Arc<StageInput> {
    let record =
        LoadRecord { recipe: recipe(None), model: model_info(), account: None, weights_bytes: None, hub: None };
    input(address, "load", body(&record), &[])
}

/// Returns a model of a file that holds it quantized already, as `load` keeps it: Q4_1 and some F32.
pub fn load_of_blocks(address: &str) -> Arc<StageInput> {
    let stored = |name: &str, n_tensors: usize, n_params: u64, bytes: u64| StoredType {
        name: name.to_owned(),
        n_tensors,
        n_params,
        bytes,
    };
    let element_types = vec![stored("Q4_1", 36, 259_328, 162_080), stored("F32", 11, 704, 20_032)];
    let mut recipe = recipe(None);
    recipe.source = ModelSource::Path("x.gguf".into());
    recipe.dtype = None;
    let record = LoadRecord {
        recipe,
        model: ModelInfo { dtype: DType::F32, ..model_info() },
        account: Some(SourceAccount { parts: Vec::new(), element_types }),
        weights_bytes: None,
        hub: None,
    };
    input(address, "load", body(&record), &[])
}

/// Returns a model quantized with a scheme; `scheme` null keeps all.
pub fn quantize(
    address: &str,
    base: &Arc<StageInput>,
    scheme: Option<(&str, Option<usize>)>,
    bytes: u64,
) -> Arc<StageInput> {
    let spec = scheme.map(|(name, block_size)| SchemeSpec { block_size, ..SchemeSpec::new(name) });
    let name = scheme.map_or("f16", |(name, _)| name);
    let config = QuantizationConfig {
        name: name.to_owned(),
        scheme: spec,
        compute_dtype: None,
        keep: Vec::new(),
        overrides: Vec::new(),
    };
    let module = QuantizedModule {
        module: "model.layers.0.mlp.up_proj".to_owned(),
        scheme: name.to_owned(),
        block_size: Some(64),
        double_quant: false,
        n_params: 11_008,
        bits_per_weight: 8.0 * bytes as f64 / 11_008.0,
        bytes,
        weight_mse: 1e-4,
        weight_sqnr_db: Some(20.5),
    };
    let totals = QuantizeTotals {
        n_quantized: 1,
        n_kept: 0,
        quantized_params: 11_008,
        quantized_bytes: bytes,
        quantized_bits_per_weight: Some(module.bits_per_weight),
        weights_bytes: bytes,
        base_bytes: 22_016,
        bits_per_weight: module.bits_per_weight,
    };
    let record = QuantizeRecord {
        recipe: recipe(Some(config.clone())),
        model: model_info(),
        config,
        weights_bytes: None,
        totals,
        modules: vec![module],
        saved: None,
    };
    input(address, "quantize", body(&record), &[("model", base)])
}

fn prefill_row(n_prompt: usize, seconds: &[f64]) -> PrefillResult {
    let starts: Vec<Vec<f64>> = seconds.iter().map(|second| vec![*second]).collect();
    prefill_result(n_prompt, false, &starts).expect("samples")
}

fn decode_row(n_gen: usize, n_depth: usize, sequences: &[Vec<f64>]) -> DecodeResult {
    let starts: Vec<Vec<Vec<f64>>> = sequences.iter().map(|sequence| vec![sequence.clone()]).collect();
    decode_result(n_gen, n_depth, &starts).expect("sequences")
}

fn bench_common(weights_bytes: u64) -> BenchCommon {
    BenchCommon {
        power: None,
        n_other_processes: None,
        other_processes_bytes: None,
        memory: MemoryFigures {
            weights_bytes: Some(weights_bytes),
            kv_cache_bytes: Some(65_536),
            process_peak_bytes: Some(weights_bytes + 20_000_000),
            process_peak_method: "peak anonymous RSS of the process".to_owned(),
            memory_bytes: Some(weights_bytes + 30_000_000),
            memory_mapped_bytes: Some(10_000_000),
            memory_rest_bytes: Some(30_000_000 - 65_536),
            memory_method: Some("resident memory of the worker".to_owned()),
            ..MemoryFigures::default()
        },
        method: "a test".to_owned(),
        clock: "a clock".to_owned(),
        engine: "an engine".to_owned(),
        compute_dtype: DType::F32,
    }
}

/// Returns a prefill-bench record of `model`.
pub fn prefill(address: &str, model: &Arc<StageInput>, seconds: &[f64], weights_bytes: u64) -> Arc<StageInput> {
    let record = PrefillRecord { results: vec![prefill_row(128, seconds)], common: bench_common(weights_bytes) };
    input(address, "prefill-bench", body(&record), &[("model", model)])
}

/// Returns a decode-bench record of `model`.
pub fn decode(address: &str, model: &Arc<StageInput>, seconds: f64, weights_bytes: u64) -> Arc<StageInput> {
    let sequences: Vec<Vec<f64>> =
        (0..3).map(|idx| (0..64).map(|token| seconds * (1.0 + 0.002 * f64::from(idx + token % 5))).collect()).collect();
    let record = DecodeRecord {
        results: [0, 256].map(|n_depth| decode_row(64, n_depth, &sequences)).to_vec(),
        decode_check_n_positions: 4,
        decode_check_relative_error_max: 1e-6,
        decode_check_budget: 0.02,
        common: bench_common(weights_bytes),
    };
    input(address, "decode-bench", body(&record), &[("model", model)])
}

/// Returns a ppl record of `model`.
pub fn ppl(address: &str, model: &Arc<StageInput>, perplexity: f64) -> Arc<StageInput> {
    input(address, "ppl", body(&ppl_record(vec![ppl_row(perplexity)])), &[("model", model)])
}

/// Returns a ppl record of those rows, without a base.
pub fn ppl_record(results: Vec<PplResult>) -> PplRecord {
    PplRecord {
        results,
        base: None,
        divergence: None,
        log_probs: None,
        token_scores: Vec::new(),
        n_tokens_run: 18_000,
        scoring_s: 2.0,
        scoring_tokens_per_second: Some(9000.0),
        scoring_method: "a test".to_owned(),
        compute_dtype: DType::F32,
    }
}

/// Returns an interval of two standard errors to either side.
pub fn interval(value: f64, stderr: f64) -> BlockInterval {
    BlockInterval {
        value,
        low: value - 2.0 * stderr,
        high: value + 2.0 * stderr,
        stderr,
        n_tokens: 9612,
        n_documents: 1,
        n_blocks: 75,
        block_tokens: 128,
        lag1_correlation: Some(0.03),
        method: "a test".to_owned(),
    }
}

/// Returns a row of a ppl record.
pub fn ppl_row(perplexity: f64) -> PplResult {
    PplResult {
        convention: "hf-strided".to_owned(),
        max_length: 512,
        stride: 256,
        n_tokens: 9613,
        n_windows: 37,
        n_scored: 9612,
        bos: "added by tokenizer (id 1)".to_owned(),
        text_hash: "ab".repeat(32),
        tokenizer_hash: "cd".repeat(32),
        nll_mean: perplexity.ln(),
        perplexity,
        nll_interval: Some(interval(perplexity.ln(), 0.021)),
        perplexity_interval: interval(perplexity.ln(), 0.021).exp(),
        stderr: Some(0.021 * perplexity),
        nll_stderr: Some(0.021),
        llama_cpp_stderr: None,
        n_documents: None,
        n_words: None,
        n_bytes: None,
        word_perplexity: None,
        word_perplexity_interval: None,
        word_perplexity_stderr: None,
        byte_perplexity: None,
        byte_perplexity_interval: None,
        byte_perplexity_stderr: None,
        bits_per_byte: None,
        bits_per_byte_interval: None,
        bits_per_byte_stderr: None,
    }
}

/// Returns a diff record of captures of two models.
pub fn diff(
    address: &str,
    reference: &Arc<StageInput>,
    candidate: &Arc<StageInput>,
    n_layers: usize,
) -> Arc<StageInput> {
    let capture = |model: &Arc<StageInput>| {
        input(&format!("acts-{}", model.address), "capture-activations", json!({"tensors": []}), &[("model", model)])
    };
    let (reference, candidate) = (capture(reference), capture(candidate));
    let record = DiffRecord {
        mode: "cumulative".to_owned(),
        n_tokens: 500,
        only_in_reference: Vec::new(),
        only_in_candidate: Vec::new(),
        modules: module_diffs(n_layers),
    };
    input(address, "diff", body(&record), &[("reference", &reference), ("candidate", &candidate)])
}

/// Returns a plausible diff: errors that grow with depth, exact embedding.
pub fn module_diffs(n_layers: usize) -> Vec<ModuleDiff> {
    let ops = [
        ("input_layernorm", "norm", 0.02),
        ("self_attn.q_proj", "q_proj", 1.3),
        ("self_attn.k_proj", "k_proj", 1.1),
        ("self_attn.v_proj", "v_proj", 0.08),
        ("self_attn", "attn", 0.03),
        ("self_attn.o_proj", "o_proj", 0.04),
        ("post_attention_layernorm", "norm", 0.02),
        ("mlp.gate_proj", "gate_proj", 0.2),
        ("mlp.up_proj", "up_proj", 0.15),
        ("mlp.act_fn", "act", 0.05),
        ("mlp.down_proj", "down_proj", 0.12),
        ("", "block", 0.5),
    ];
    let row = |module: String, layer_idx: Option<usize>, op: &str, mse: f64| {
        let loss = (mse / (mse + 12.0)).sqrt() * 0.4;
        ModuleDiff {
            module,
            layer_idx,
            op: op.to_owned(),
            n_tokens: 500,
            mse,
            cosine: 1.0 - loss,
            cosine_p01: 1.0 - 2.5 * loss,
            sqnr_db: (mse > 0.0).then(|| 18.0 - 4.0 * mse.log10()),
            rel_frobenius: Some(loss * 1.5),
            max_abs_diff: 8.0 * mse.sqrt(),
            ref_mean_abs: 0.8,
            ref_max_abs: 14.5,
        }
    };
    let mut rows = vec![row("model.embed_tokens".to_owned(), None, "embedding", 0.0)];
    for layer_idx in 0..n_layers {
        for (idx, (name, op, scale)) in ops.iter().enumerate() {
            let growth =
                0.02 * 1.35f64.powi(layer_idx.min(12) as i32) * (1.0 + 0.3 * ((layer_idx * 7 + idx * 3) % 5) as f64);
            let module = format!("model.layers.{layer_idx}.{name}");
            rows.push(row(module.trim_end_matches('.').to_owned(), Some(layer_idx), op, scale * growth));
        }
    }
    rows.push(row("model.norm".to_owned(), None, "norm", 0.09));
    rows.push(row("lm_head".to_owned(), None, "lm_head", 0.8));
    rows
}

/// Points near the y = x line for every module but norms.
pub struct NearlyEqual;

impl ScatterSource for NearlyEqual {
    fn read(&self, diff: &StageInput, take: &mut dyn FnMut(&str, ScatterPoints)) -> Result<(), ScatterFailure> {
        for row in diff.record.body["modules"].as_array().into_iter().flatten() {
            let module = row["module"].as_str().ok_or("module is no text")?;
            if !module.contains("norm") {
                let x = |idx: i32| ((idx * 7919 % 1000) as f32 / 100.0 - 5.0).powi(3) / 20.0;
                take(module, (0..300).map(|idx| (x(idx), x(idx) + ((idx * 31 % 17) as f32 - 8.0) * 0.05)).collect());
            }
        }
        Ok(())
    }
}

/// Returns fp16 against nf4: speed, perplexity, a diff over `n_layers` layers.
pub fn two_models(n_layers: usize) -> Vec<Arc<StageInput>> {
    let fp16 = load("fp16");
    let nf4 = quantize("nf4", &fp16, Some(("nf4", Some(64))), 6_200);
    let seconds = [0.0101, 0.0099, 0.0103, 0.0100, 0.0102];
    vec![
        prefill("prefill-fp16", &fp16, &seconds, 520_064),
        prefill("prefill-nf4", &nf4, &seconds.map(|second| second * 1.3), 161_220),
        decode("decode-fp16", &fp16, 0.0012, 520_064),
        decode("decode-nf4", &nf4, 0.001, 161_220),
        ppl("ppl-fp16", &fp16, 9.0614951),
        ppl("ppl-nf4", &nf4, 11.4171032),
        diff("diff", &fp16, &nf4, n_layers),
    ]
}

/// Renders with every default but the inputs.
pub fn rendered(
    inputs: &[Arc<StageInput>],
    missing: &[String],
    formats: &[&str],
) -> Result<Vec<ReportFile>, ReportError> {
    rendered_of(inputs, missing, &NoTokens, formats)
}

/// Renders inputs whose single tokens have scores.
pub fn rendered_with(
    inputs: &[Arc<StageInput>],
    tokens: &dyn TokenSource,
    formats: &[&str],
) -> Result<Vec<ReportFile>, ReportError> {
    rendered_of(inputs, &[], tokens, formats)
}

fn rendered_of(
    inputs: &[Arc<StageInput>],
    missing: &[String],
    tokens: &dyn TokenSource,
    formats: &[&str],
) -> Result<Vec<ReportFile>, ReportError> {
    let formats: Vec<String> = formats.iter().map(|format| (*format).to_owned()).collect();
    render(&ReportRequest {
        title: "FP16 against NF4, layer by layer",
        pipeline: "sensitivity",
        inputs,
        missing,
        formats: &formats,
        scatter: &NearlyEqual,
        tokens,
    })
}

/// Returns a file's text.
pub fn text_of<'a>(files: &'a [ReportFile], path: &str) -> &'a str {
    let file = files.iter().find(|file| file.path.as_os_str() == path).unwrap_or_else(|| panic!("{path} is there"));
    std::str::from_utf8(&file.bytes).unwrap()
}
