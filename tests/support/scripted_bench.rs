//! A scripted engine, and benchmarks of the real catalogue run on it.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use labpipe::artifact::{HostFigures, MemoryFigures, QuantizedModule, Record, RecordHead};
use labpipe::event::{Level, Progress};
use labpipe::inference::{
    CaptureFilter, CaptureSink, Decoded, DeviceFigures, DeviceProbe, EnergyWindow, Engine, EngineInfo, HostProbe,
    InferenceError, MemoryProbe, Model, ModelInfo, ModelRecipe, ModelSource, OtherProcesses, Prefilled, TakeLogits,
    Threads, TokenScore,
};
use labpipe::stage::{ModelLease, ModelPool, StageContext, StageError, StageInput, StageOutput, Start};
use labpipe::units::DType;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What happened, in order.
#[derive(Default)]
pub struct Log(Mutex<Vec<String>>);

impl Log {
    pub fn add(&self, what: &str) {
        self.0.lock().expect("the log").push(what.to_owned());
    }

    /// Returns what happened as one line, and forgets it.
    pub fn taken(&self) -> String {
        std::mem::take(&mut *self.0.lock().expect("the log")).join(" ")
    }
}

/// What is wrong with a fake model.
#[derive(Clone, Copy, PartialEq)]
pub enum Fault {
    None,
    /// Decode's logits are not prefill's.
    Decode,
    /// Decode goes wrong once the check is over.
    NotFinite,
}

pub struct Script {
    pub log: Arc<Log>,
    /// What the board tells; nothing for a device without one.
    pub figures: Option<DeviceFigures>,
    pub fault: Fault,
    pub is_host: bool,
    /// Share of the processors that others take during each attempt, one after the other; nothing after the last.
    pub others: Arc<Mutex<Vec<f64>>>,
    /// The processors' speeds, one each time that they are asked for; the last stays. Unknown where there is none.
    pub speeds: Arc<Mutex<Vec<f64>>>,
    pub accept_disturbed: bool,
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
    n_asked: AtomicUsize,
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

    fn begin_energy(&mut self) {
        self.log.add("energy");
        self.n_asked.store(0, Ordering::Relaxed);
    }

    /// Has enough once asked twice.
    fn energy_so_far(&self) -> EnergyWindow {
        window(if self.n_asked.fetch_add(1, Ordering::Relaxed) == 0 { 0.5 } else { 2.5 })
    }

    fn end_energy(&mut self) -> EnergyWindow {
        self.energy_so_far()
    }
}

/// A board that draws 300 W and whose counter moves every 100 ms.
pub fn window(window_s: f64) -> EnergyWindow {
    let updates = (1..(window_s * 10.0) as usize).map(|n| (n as f64 / 10.0, n as f64 * 30.0)).collect();
    EnergyWindow { window_s, updates, method: "counted".to_owned(), has_source: true }
}

/// A host that is busy or quiet as each attempt's turn has it.
struct Host {
    log: Arc<Log>,
    others: Arc<Mutex<Vec<f64>>>,
    speeds: Arc<Mutex<Vec<f64>>>,
}

impl HostProbe for Host {
    fn begin(&mut self) {}

    fn end(&mut self) {}

    fn take(&mut self) -> HostFigures {
        let mut others = self.others.lock().expect("the script");
        let share = if others.is_empty() { 0.0 } else { others.remove(0) };
        HostFigures { window_s: 1.0, n_cpus: 2, others_cpu_share: Some(share), ..HostFigures::default() }
    }

    fn wait_until_quiet(&mut self, _keep_waiting: &dyn Fn() -> bool) {
        self.log.add("wait");
    }

    fn processor_speed(&mut self, _threads: Threads) -> Option<f64> {
        let mut speeds = self.speeds.lock().expect("the script");
        if speeds.len() > 1 { Some(speeds.remove(0)) } else { speeds.first().copied() }
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
            is_host: self.is_host,
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
        Some(Box::new(Board { log: Arc::clone(&self.log), figures, n_asked: AtomicUsize::new(0) }))
    }

    fn host_probe(&self) -> Option<Box<dyn HostProbe>> {
        let (log, others, speeds) = (Arc::clone(&self.log), Arc::clone(&self.others), Arc::clone(&self.speeds));
        Some(Box::new(Host { log, others, speeds }))
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

pub fn script(figures: Option<DeviceFigures>, fault: Fault) -> Script {
    Script {
        log: Arc::default(),
        figures,
        fault,
        is_host: false,
        others: Arc::default(),
        speeds: Arc::default(),
        accept_disturbed: false,
    }
}

pub fn figures() -> DeviceFigures {
    DeviceFigures {
        window_s: 0.2,
        power_limit_w: Some(700.0),
        sm_clock_mhz_min: Some(1755.0),
        sm_clock_mhz_median: Some(1980.0),
        n_samples: 40,
        throttle_reasons: vec!["sw_power_cap".to_owned()],
        others: Some(OtherProcesses::default()),
        ..DeviceFigures::default()
    }
}

/// Runs a benchmark of the real catalogue.
pub fn run(kind: &str, params: Value, script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run_start(kind, params, script, Start::ONLY)
}

/// Runs one start of a benchmark.
pub fn run_start(
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
        execution: None,
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
        accept_disturbed: script.accept_disturbed,
        may_repeat: true,
    };
    let catalogue = labpipe::stages::catalogue();
    let result = catalogue.get(kind).expect("a benchmark").run(&context);
    (result, notes.0.into_inner().expect("the notes"))
}

pub fn prefill(script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run("prefill-bench", json!({"n_prompt": [10, 20], "samples": 3, "warmup": 1, "seed": 0}), script)
}

pub fn decode(script: &Script) -> (Result<StageOutput, StageError>, Vec<(Level, String)>) {
    run("decode-bench", json!({"n_gen": 4, "n_depth": [0, 8], "samples": 2, "warmup": 1, "seed": 0}), script)
}

pub fn scoring(n_prompt: Value) -> Value {
    json!({"n_prompt": n_prompt, "samples": 2, "warmup": 1, "seed": 0, "score": true})
}
