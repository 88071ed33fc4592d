//! What benchmarks record beside their times, with a scripted engine: energy over the timed regions alone, who else used the device,
//! what the allocator held, and the checks that come before and after.

use labpipe::artifact::{MemoryFigures, QuantizedModule, Record, RecordHead};
use labpipe::event::{Level, Progress};
use labpipe::inference::{
    CaptureFilter, CaptureSink, Decoded, DeviceFigures, DeviceProbe, Engine, EngineInfo, InferenceError, MemoryProbe,
    Model, ModelInfo, ModelRecipe, ModelSource, OtherProcesses, Prefilled, TakeLogits, TokenScore,
};
use labpipe::stage::{ModelLease, ModelPool, StageContext, StageError, StageInput, StageOutput, Start};
use labpipe::units::DType;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

/// What happened, in order.
#[derive(Default)]
struct Log(Mutex<Vec<String>>);

impl Log {
    fn add(&self, what: &str) {
        self.0.lock().expect("the log").push(what.to_owned());
    }

    /// Returns what happened as one line, and forgets it.
    fn taken(&self) -> String {
        std::mem::take(&mut *self.0.lock().expect("the log")).join(" ")
    }
}

/// What is wrong with a fake model.
#[derive(Clone, Copy, PartialEq)]
enum Fault {
    None,
    /// Decode's logits are not prefill's.
    Decode,
    /// Decode goes wrong once the check is over.
    NotFinite,
}

struct Script {
    log: Arc<Log>,
    /// What the board tells; nothing for a device without one.
    figures: Option<DeviceFigures>,
    fault: Fault,
}

struct FakeModel {
    log: Arc<Log>,
    info: ModelInfo,
    fault: Fault,
}

/// Logits whose largest is token `n % 8`.
fn logits(n: usize) -> Vec<f32> {
    (0..8).map(|token| if token == n % 8 { 2.0 } else { 1.0 }).collect()
}

impl Model for FakeModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn weights_bytes(&self) -> u64 {
        400
    }

    fn kv_cache_bytes(&self) -> u64 {
        80
    }

    fn prefill(&mut self, tokens: &[u32]) -> Result<Prefilled, InferenceError> {
        self.log.add("prefill");
        Ok(Prefilled { duration_s: 0.5, next_token: tokens.len() as u32 % 8 })
    }

    fn reserve(&mut self, _n_ctx: usize) -> Result<(), InferenceError> {
        Ok(())
    }

    fn decode(&mut self, n_gen: usize) -> Result<Vec<Decoded>, InferenceError> {
        self.log.add("decode");
        if self.fault == Fault::NotFinite {
            return Err(InferenceError::NotFiniteResult { what: "logits".to_owned() });
        }
        Ok(vec![Decoded { token: 1, duration_s: 0.25 }; n_gen])
    }

    fn decode_keeping(&mut self, n_gen: usize, take: &mut TakeLogits<'_>) -> Result<Vec<Decoded>, InferenceError> {
        self.log.add("check");
        // The prompt of the check is one token, its answer the second.
        (0..n_gen)
            .map(|position| {
                let mut row = logits(position + 2);
                if self.fault == Fault::Decode && position == 2 {
                    row[0] += 1.0;
                }
                take(&row)?;
                Ok(Decoded { token: (position + 2) as u32 % 8, duration_s: 0.25 })
            })
            .collect()
    }

    fn last_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        Ok(logits(tokens.len()))
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        self.log.add(&format!("score{}", tokens.len()));
        if self.fault == Fault::NotFinite {
            return Err(InferenceError::NotFiniteResult { what: "logits".to_owned() });
        }
        Ok(vec![TokenScore { nll: 2.0, argmax: 1 }; tokens.len() - first_target])
    }

    fn score_timed(&mut self, tokens: &[u32], first_target: usize) -> Result<(f64, Vec<TokenScore>), InferenceError> {
        Ok((0.25, self.score(tokens, first_target)?))
    }

    fn capture(
        &mut self,
        _tokens: &[u32],
        _filter: &CaptureFilter,
        _sink: &mut dyn CaptureSink,
        _progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        Err(InferenceError::Unsupported("capture".to_owned()))
    }
}

struct Board {
    log: Arc<Log>,
    figures: DeviceFigures,
}

impl DeviceProbe for Board {
    fn begin(&mut self) {
        self.log.add("begin");
    }

    fn end(&mut self) {
        self.log.add("end");
    }

    fn take(&mut self) -> DeviceFigures {
        self.log.add("take");
        self.figures.clone()
    }
}

/// An allocator that holds 100 bytes more whenever it is asked.
#[derive(Default)]
struct Pool(u64);

impl MemoryProbe for Pool {
    fn mark(&mut self) {
        self.0 += 100;
    }

    fn finish(self: Box<Self>) -> MemoryFigures {
        let pool_peak_method = Some("scripted".to_owned());
        MemoryFigures { pool_peak_bytes: Some(self.0), pool_peak_method, ..MemoryFigures::default() }
    }
}

impl Engine for Script {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            backend: "fake".to_owned(),
            device: "fake device".to_owned(),
            numerics_version: 1,
            clock: "scripted".to_owned(),
            is_host: false,
            computed_with: BTreeMap::new(),
        }
    }

    fn inspect(&self, _recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        Ok(ModelInfo {
            family: "fake".to_owned(),
            n_layers: 1,
            hidden_size: 4,
            n_heads: 1,
            n_kv_heads: 1,
            vocab_size: 8,
            n_ctx_max: 64,
            n_params: 100,
            tied_embeddings: false,
            dtype: DType::F16,
            compute_dtype: DType::F16,
            linears: Vec::new(),
            tokenizer_dir: None,
            bos_token_id: None,
            stored_quantization: None,
        })
    }

    fn open(&self, recipe: &ModelRecipe, _progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        Ok(Box::new(FakeModel { log: Arc::clone(&self.log), info: self.inspect(recipe)?, fault: self.fault }))
    }

    fn survey(
        &self,
        _recipe: &ModelRecipe,
        _progress: &dyn Progress,
        _each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError> {
        Ok(())
    }

    fn memory_probe(&self) -> Box<dyn MemoryProbe> {
        Box::new(Pool::default())
    }

    fn device_probe(&self) -> Option<Box<dyn DeviceProbe>> {
        let figures = self.figures.clone()?;
        Some(Box::new(Board { log: Arc::clone(&self.log), figures }))
    }
}

struct Lease(Box<dyn Model>);

impl Deref for Lease {
    type Target = dyn Model + 'static;

    fn deref(&self) -> &Self::Target {
        self.0.as_ref()
    }
}

impl DerefMut for Lease {
    fn deref_mut(&mut self) -> &mut Self::Target {
        self.0.as_mut()
    }
}

struct Opens<'a>(&'a Script);

impl ModelPool for Opens<'_> {
    fn acquire(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<ModelLease<'_>, InferenceError> {
        Ok(Box::new(Lease(self.0.open(recipe, progress)?)))
    }
}

#[derive(Default)]
struct Notes(Mutex<Vec<(Level, String)>>);

impl Progress for Notes {
    fn begin(&self, _total: Option<u64>, _unit: &str) {}
    fn advance(&self, _n: u64) {}
    fn note(&self, level: Level, text: &str) {
        self.0.lock().expect("the notes").push((level, text.to_owned()));
    }
    fn is_cancelled(&self) -> bool {
        false
    }
}

fn script(figures: Option<DeviceFigures>, fault: Fault) -> Script {
    Script { log: Arc::default(), figures, fault }
}

fn figures() -> DeviceFigures {
    DeviceFigures {
        window_s: 2.0,
        energy_j: Some(600.0),
        energy_method: "counted".to_owned(),
        power_limit_w: Some(700.0),
        sm_clock_mhz_min: Some(1755.0),
        sm_clock_mhz_median: Some(1980.0),
        n_samples: 40,
        throttle_reasons: vec!["sw_power_cap".to_owned()],
        others: Some(OtherProcesses { n: 2, bytes: Some(3 << 20) }),
        ..DeviceFigures::default()
    }
}

/// Runs a benchmark of the real catalogue in one start.
fn run(kind: &str, params: Value, script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run_start(kind, params, script, Start::ONLY)
}

fn run_start(
    kind: &str,
    params: Value,
    script: &Script,
    start: Start,
) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    let source = ModelSource::Random { config: PathBuf::from("c"), seed: 1 };
    let recipe = ModelRecipe { source, dtype: None, compute_dtype: None, quantization: None };
    let head = RecordHead {
        format_version: 1,
        pipeline: "fake".to_owned(),
        run_id: "r".to_owned(),
        produced_by_run: "r".to_owned(),
        stage: "base".to_owned(),
        kind: "load".to_owned(),
        key: "0".repeat(64),
        cached: false,
        started_at: "2026-01-02T03:04:05Z".to_owned(),
        duration_s: 0.0,
        device: None,
        params: Map::new(),
        read_files: BTreeMap::new(),
    };
    let load = StageInput {
        address: "base".to_owned(),
        kind: "load".to_owned(),
        key: head.key.clone(),
        record: Record { head, body: Map::from_iter([("recipe".to_owned(), json!(recipe))]) },
        dir: PathBuf::new(),
        inputs: BTreeMap::new(),
    };
    let inputs = BTreeMap::from([("model".to_owned(), vec![Arc::new(load)])]);
    let (notes, params) = (Notes::default(), params.as_object().cloned().expect("a mapping"));
    let context = StageContext {
        address: "bench",
        params: &params,
        root: Path::new("."),
        inputs: &inputs,
        missing_inputs: &[],
        out_dir: Path::new("."),
        start,
        engine: script,
        models: &Opens(script),
        progress: &notes,
    };
    let catalogue = labpipe::stages::catalogue();
    let result = catalogue.get(kind).expect("a benchmark").run(&context);
    (result, notes.0.into_inner().expect("the notes"))
}

fn prefill(script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run("prefill-bench", json!({"n_prompt": [10, 20], "samples": 3, "warmup": 1, "seed": 0}), script)
}

fn decode(script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run("decode-bench", json!({"n_gen": 4, "n_depth": [0, 8], "samples": 2, "warmup": 1, "seed": 0}), script)
}

fn scoring(n_prompt: Value) -> Value {
    json!({"n_prompt": n_prompt, "samples": 2, "warmup": 1, "seed": 0, "score": true})
}

#[test]
fn a_prefill_that_scores_times_passes_to_every_tokens_likelihood() {
    let script = script(Some(figures()), Fault::None);
    let (output, _) = run("prefill-bench", scoring(json!([10, 20])), &script);
    let output = output.expect("a record");
    assert_eq!(script.log.taken(), "score10 begin score10 begin score10 take score20 begin score20 begin score20 take");
    let row = &output.body["results"][1];
    assert_eq!((row["label"].as_str(), row["scores"].as_bool()), (Some("pp20+nll"), Some(true)));
    assert_eq!((row["samples_s"].clone(), row["tokens_per_second"].as_f64()), (json!([0.25, 0.25]), Some(80.0)));
    assert_eq!(output.body["power"][1]["label"].as_str(), Some("pp20+nll"));
    let method = output.body["method"].as_str().expect("a method");
    assert!(method.contains("negative log-likelihoods"), "{method}");
    assert!(output.summary.starts_with("pp10+nll 40 t/s, 1 start"), "{}", output.summary);
}

#[test]
fn samples_are_spread_over_starts_and_their_records_become_one() {
    let catalogue = labpipe::stages::catalogue();
    for (kind, params, n_first) in [
        ("prefill-bench", json!({"n_prompt": [10, 20], "samples": 5, "warmup": 1, "seed": 0}), 3),
        ("decode-bench", json!({"n_gen": 4, "n_depth": [0, 8], "samples": 5, "warmup": 1, "seed": 0}), 3 * 4),
    ] {
        let stage = catalogue.get(kind).expect("a benchmark");
        let script = script(Some(figures()), Fault::None);
        let outputs: Vec<StageOutput> = (0..2)
            .map(|idx| run_start(kind, params.clone(), &script, Start { idx, n: 2 }).0.expect("a record"))
            .collect();
        assert_eq!(outputs[0].body["results"][0]["samples_s"].as_array().map(Vec::len), Some(n_first));
        let whole = stage.combine(outputs).expect("one record");
        let row = &whole.body["results"][1];
        let n_samples: Vec<u64> =
            row["starts"].as_array().into_iter().flatten().filter_map(|start| start["n_samples"].as_u64()).collect();
        assert_eq!(n_samples, [3, 2], "{kind}");
        // Energy and tokens of both starts are added up.
        assert_eq!(whole.body["power"][1]["energy_j"].as_f64(), Some(1200.0));
        assert_eq!(whole.body["pool_peak_bytes"], 200);
        assert!(whole.summary.contains("t/s, 2 starts"), "{}", whole.summary);
    }
}

#[test]
fn there_are_no_more_starts_than_samples() {
    let catalogue = labpipe::stages::catalogue();
    let params = |value: Value| value.as_object().cloned().expect("a mapping");
    for kind in ["prefill-bench", "decode-bench"] {
        let stage = catalogue.get(kind).expect("a benchmark");
        let n_starts = |value: Value, is_host: bool| stage.n_starts(&params(value), is_host);
        assert_eq!(n_starts(json!({"samples": 20, "starts": null}), true), 5);
        assert_eq!(n_starts(json!({"samples": 20, "starts": null}), false), 3);
        assert_eq!(n_starts(json!({"samples": 2, "starts": null}), true), 2);
        assert_eq!(n_starts(json!({"samples": 20, "starts": 8}), false), 8);
        let found = stage.check(&params(json!({"samples": 3, "starts": 4, "n_prompt": [8]})));
        assert_eq!(found.iter().map(|problem| problem.0).collect::<Vec<_>>(), ["starts"]);
    }
}

#[test]
fn a_prefill_that_can_not_score_says_why() {
    let (output, _) = run("prefill-bench", scoring(json!([10])), &script(None, Fault::NotFinite));
    let error = output.expect_err("no record").to_string();
    assert!(error.contains("pp10+nll"), "{error}");
    let catalogue = labpipe::stages::catalogue();
    let params = scoring(json!([1, 2])).as_object().cloned().expect("a mapping");
    let found = catalogue.get("prefill-bench").expect("the kind").check(&params);
    assert_eq!(found.first().map(|problem| problem.0), Some("n_prompt"));
}

#[test]
fn energy_is_told_for_each_case_over_its_tokens_with_clocks_limits_and_a_warning_of_others() {
    let script = script(Some(figures()), Fault::None);
    let (output, notes) = prefill(&script);
    let output = output.expect("a record");
    let row = &output.body["power"][1];
    assert_eq!((row["label"].as_str(), row["n_tokens"].as_u64()), (Some("pp20"), Some(60)));
    assert_eq!((row["energy_per_token_j"].as_f64(), row["power_w_mean"].as_f64()), (Some(10.0), Some(300.0)));
    assert_eq!((row["sm_clock_mhz_median"].as_f64(), row["power_limit_w"].as_f64()), (Some(1980.0), Some(700.0)));
    assert_eq!((&row["memory_clock_mhz_min"], &row["throttle_reasons"]), (&Value::Null, &json!(["sw_power_cap"])));
    assert_eq!(
        (&output.body["n_other_processes"], &output.body["other_processes_bytes"]),
        (&json!(2), &json!(3 << 20))
    );
    assert_eq!(output.body["pool_peak_bytes"], 200, "asked after each of two cases");
    assert_eq!(output.body["pool_peak_method"], "scripted");
    assert!(output.summary.contains("pp10 20 t/s, 1 start, 20.000 J/token"), "{}", output.summary);
    let [(Level::Warning, note)] = notes.as_slice() else { panic!("one warning: {notes:?}") };
    assert!(note.starts_with("2 other process(es) used the device while it was measured and held 3.00 MiB"), "{note}");
}

#[test]
fn prefills_are_one_region_and_what_fills_a_context_is_in_none() {
    let script = script(Some(figures()), Fault::None);
    prefill(&script).0.expect("a record");
    let case = "prefill begin prefill begin prefill begin prefill take";
    assert_eq!(script.log.taken(), format!("{case} {case}"));
    decode(&script).0.expect("a record");
    let case = "prefill decode end prefill begin decode end prefill begin decode end take";
    assert_eq!(script.log.taken(), format!("prefill check {case} {case}"));
}

#[test]
fn a_device_that_tells_nothing_leaves_nulls_and_no_warning() {
    let (output, notes) = decode(&script(None, Fault::None));
    let output = output.expect("a record");
    for name in ["power", "n_other_processes", "other_processes_bytes"] {
        assert_eq!(output.body.get(name), Some(&Value::Null), "{name}");
    }
    let warnings = notes.iter().filter(|(level, _)| *level == Level::Warning).count();
    assert!(warnings == 0 && !output.summary.contains("J/token"), "{notes:?} {}", output.summary);
    assert_eq!(output.body["decode_check_n_positions"], 4);
    assert_eq!(output.body["decode_check_relative_error_max"], 0.0);
    assert_eq!(output.body["decode_check_budget"], 0.02);
}

#[test]
fn a_decode_that_is_not_prefills_is_refused_before_anything_is_timed() {
    let script = script(Some(figures()), Fault::Decode);
    let error = decode(&script).0.expect_err("a mismatch");
    assert!(matches!(&error, StageError::Inference(InferenceError::DecodeMismatch { .. })), "{error}");
    assert!(error.to_string().contains("at position 2"), "{error}");
    assert_eq!(script.log.taken(), "prefill check");
}

#[test]
fn a_result_that_is_not_finite_names_the_case() {
    let error = decode(&script(None, Fault::NotFinite)).0.expect_err("not finite").to_string();
    assert_eq!(error, "compute logits (tg4): the result is not finite");
}
