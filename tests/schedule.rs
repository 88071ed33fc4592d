//! The executor with fake stages and a fake engine: who runs when, with which model, and what a failure stops. Nothing sleeps.

use labpipe::artifact::{MemoryFigures, QuantizedModule};
use labpipe::event::{NullSink, Progress};
use labpipe::inference::{
    CaptureFilter, CaptureSink, Decoded, Engine, EngineInfo, InferenceError, MemoryProbe, Model, ModelInfo,
    ModelRecipe, ModelSource, Prefilled, TakeLogits, TokenScore,
};
use labpipe::pipeline::{ParseOptions, parse};
use labpipe::plan::{Selection, build};
use labpipe::run::{InProcess, RunFile, RunOutcome, RunRequest, Sources, StoreFacts, execute, planned_keys, timestamp};
use labpipe::stage::{
    Catalogue, ParamDefault, ParamDesc, ParamType, Params, Stage, StageContext, StageDescription, StageError,
    StageOutput,
};
use labpipe::store::{FileHashes, Results, Store};
use labpipe::units::DType;
use proptest::prelude::*;
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

/// What the fakes saw.
#[derive(Default)]
struct Seen {
    running: AtomicUsize,
    models_alive: AtomicUsize,
    most_models: AtomicUsize,
    opened: Mutex<Vec<String>>,
    order: Mutex<Vec<String>>,
    /// Stages that ran beside a measurement.
    disturbed: AtomicUsize,
    cancel: Arc<AtomicBool>,
}

struct FakeEngine(Arc<Seen>);

struct FakeModel {
    seen: Arc<Seen>,
    info: ModelInfo,
    /// Scripted latencies, in seconds; taken in turn.
    latencies_s: Vec<f64>,
    next: usize,
}

impl Drop for FakeModel {
    fn drop(&mut self) {
        self.seen.models_alive.fetch_sub(1, Ordering::SeqCst);
    }
}

struct NoProbe;

impl MemoryProbe for NoProbe {
    fn finish(self: Box<Self>) -> MemoryFigures {
        MemoryFigures { process_peak_method: "not measured: a fake engine".to_owned(), ..MemoryFigures::default() }
    }
}

fn info() -> ModelInfo {
    ModelInfo {
        family: "fake".to_owned(),
        n_layers: 1,
        hidden_size: 4,
        n_heads: 1,
        n_kv_heads: 1,
        vocab_size: 32,
        n_ctx_max: 64,
        n_params: 100,
        tied_embeddings: false,
        dtype: DType::F32,
        compute_dtype: DType::F32,
        linears: vec![("model.layers.0.mlp.up_proj".to_owned(), [4, 4])],
        tokenizer_dir: None,
        bos_token_id: None,
        stored_quantization: None,
    }
}

impl Engine for FakeEngine {
    fn info(&self) -> EngineInfo {
        EngineInfo {
            backend: "fake".to_owned(),
            device: "fake device".to_owned(),
            numerics_version: 1,
            clock: "scripted".to_owned(),
            is_host: true,
            computed_with: BTreeMap::new(),
        }
    }

    fn inspect(&self, _recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        Ok(info())
    }

    fn open(&self, recipe: &ModelRecipe, _progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        let alive = self.0.models_alive.fetch_add(1, Ordering::SeqCst) + 1;
        self.0.most_models.fetch_max(alive, Ordering::SeqCst);
        let ModelSource::Random { seed, .. } = &recipe.source else { panic!("fakes are random") };
        self.0.opened.lock().expect("the list").push(format!("m{seed}"));
        Ok(Box::new(FakeModel {
            seen: Arc::clone(&self.0),
            info: info(),
            latencies_s: vec![0.5, 0.25, 0.125],
            next: 0,
        }))
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
        Box::new(NoProbe)
    }

    fn free_bytes(&self) -> Option<u64> {
        Some(5 << 20)
    }
}

impl FakeModel {
    fn latency_s(&mut self) -> f64 {
        self.next += 1;
        self.latencies_s[(self.next - 1) % self.latencies_s.len()]
    }
}

impl Model for FakeModel {
    fn info(&self) -> &ModelInfo {
        &self.info
    }

    fn weights_bytes(&self) -> u64 {
        400
    }

    fn kv_cache_bytes(&self) -> u64 {
        0
    }

    fn prefill(&mut self, _tokens: &[u32]) -> Result<Prefilled, InferenceError> {
        Ok(Prefilled { duration_s: self.latency_s(), next_token: 1 })
    }

    fn reserve(&mut self, _n_ctx: usize) -> Result<(), InferenceError> {
        Ok(())
    }

    fn decode(&mut self, n_gen: usize) -> Result<Vec<Decoded>, InferenceError> {
        Ok((0..n_gen).map(|_| Decoded { token: 1, duration_s: self.latency_s() }).collect())
    }

    fn decode_keeping(&mut self, n_gen: usize, take: &mut TakeLogits<'_>) -> Result<Vec<Decoded>, InferenceError> {
        let decoded = self.decode(n_gen)?;
        decoded.iter().try_for_each(|_| take(&[0.0; 32]))?;
        Ok(decoded)
    }

    fn last_logits(&mut self, _tokens: &[u32]) -> Result<Vec<f32>, InferenceError> {
        Ok(vec![0.0; 32])
    }

    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError> {
        Ok(vec![TokenScore { nll: 1.0, argmax: 0 }; tokens.len() - first_target])
    }

    fn capture(
        &mut self,
        _tokens: &[u32],
        _filter: &CaptureFilter,
        _sink: &mut dyn CaptureSink,
        _progress: &dyn Progress,
    ) -> Result<(), InferenceError> {
        Ok(())
    }
}

/// A stage that does what its kind says.
struct Fake {
    description: &'static StageDescription,
    seen: Arc<Seen>,
}

const MODEL: ParamDesc = ParamDesc {
    name: "model",
    ty: ParamType::StageRef(&["make"]),
    unit: None,
    default: ParamDefault::Required,
    help: "a model",
};
const SEED: ParamDesc = ParamDesc {
    name: "seed",
    ty: ParamType::Integer { min: 0, max: 100 },
    unit: None,
    default: ParamDefault::Json("0"),
    help: "which",
};
const NEEDS: ParamDesc = ParamDesc {
    name: "needs",
    ty: ParamType::StageRef(&["make", "use", "measure", "full", "fail", "panic", "cancel", "gather"]),
    unit: None,
    default: ParamDefault::Absent,
    help: "an input",
};
const INPUTS: ParamDesc = ParamDesc {
    name: "inputs",
    ty: ParamType::StageRefs(&["make", "use", "measure", "full", "fail", "panic", "cancel"]),
    unit: None,
    default: ParamDefault::Required,
    help: "inputs",
};

const fn kind(kind: &'static str, measures: bool, computes: bool, params: &'static [ParamDesc]) -> StageDescription {
    StageDescription { kind, summary: "Pretends.", version: 1, measures, computes, params }
}

static KINDS: [StageDescription; 8] = [
    kind("make", false, true, &[SEED]),
    kind("use", false, true, &[MODEL, SEED]),
    kind("measure", true, true, &[MODEL, SEED]),
    kind("full", true, true, &[MODEL]),
    kind("fail", false, false, &[NEEDS]),
    kind("panic", false, false, &[NEEDS]),
    kind("cancel", false, false, &[NEEDS]),
    kind("gather", false, false, &[INPUTS]),
];

impl Stage for Fake {
    fn description(&self) -> &'static StageDescription {
        self.description
    }

    /// As many as a measurement's seed says.
    fn n_starts(&self, params: &Params, _is_host: bool) -> usize {
        let seed = params.get("seed").and_then(Value::as_u64).unwrap_or(0);
        if self.description.measures { seed.max(1) as usize } else { 1 }
    }

    fn combine(&self, outputs: Vec<StageOutput>) -> Result<StageOutput, StageError> {
        let latencies: Vec<Value> = outputs.iter().map(|output| output.body["latency_s"].clone()).collect();
        let body = Map::from_iter([("latencies_s".to_owned(), json!(latencies))]);
        Ok(StageOutput::new(body, "combined"))
    }

    fn run(&self, context: &StageContext<'_>) -> Result<StageOutput, StageError> {
        let beside = self.seen.running.fetch_add(1, Ordering::SeqCst);
        let result = self.act(context, beside);
        self.seen.running.fetch_sub(1, Ordering::SeqCst);
        let start = if context.start.n > 1 { format!("/{}", context.start.idx) } else { String::new() };
        self.seen.order.lock().expect("the list").push(format!("{}{start}", context.address));
        result
    }
}

impl Fake {
    fn act(&self, context: &StageContext<'_>, beside: usize) -> Result<StageOutput, StageError> {
        let mut body = Map::new();
        match self.description.kind {
            "make" => {
                let seed = context.params["seed"].as_u64().unwrap_or(0);
                let source = ModelSource::Random { config: PathBuf::from("c"), seed };
                let recipe = ModelRecipe { source, dtype: None, compute_dtype: None, quantization: None };
                body.insert("recipe".to_owned(), json!(recipe));
            }
            "use" | "measure" => {
                let recipe = context.recipe("model")?;
                let mut model = context.models.acquire(&recipe, context.progress)?;
                body.insert("latency_s".to_owned(), json!(model.prefill(&[1])?.duration_s));
                let beside = beside + self.seen.running.load(Ordering::SeqCst) - 1;
                if self.description.measures && beside > 0 {
                    self.seen.disturbed.fetch_add(1, Ordering::SeqCst);
                }
            }
            "full" => {
                let _lease = context.models.acquire(&context.recipe("model")?, context.progress)?;
                return Err(InferenceError::out_of_memory("a cache", 7 << 30, None).into());
            }
            "fail" => return Err(StageError::Other("do what it should".to_owned())),
            "panic" => panic!("a bug of the test's own"),
            "cancel" => self.seen.cancel.store(true, Ordering::SeqCst),
            _ => {
                body.insert("missing".to_owned(), json!(context.missing_inputs));
            }
        }
        Ok(StageOutput::new(body, "done"))
    }
}

struct Bench {
    dir: tempfile::TempDir,
    seen: Arc<Seen>,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: tempfile::tempdir().expect("a temporary folder"), seen: Arc::default() }
    }

    fn run(&self, stages: &str, jobs: usize) -> RunOutcome {
        self.run_with(stages, jobs, &Selection::default())
    }

    fn run_with(&self, stages: &str, jobs: usize, selection: &Selection) -> RunOutcome {
        let fake = |description| Arc::new(Fake { description, seen: Arc::clone(&self.seen) }) as Arc<dyn Stage>;
        let catalogue = Catalogue::new(KINDS.iter().map(fake));
        let text = format!("version: 1\nname: fake\nstages:\n{stages}");
        let pipeline = parse(&text, "fake.yaml", &catalogue, &ParseOptions::default()).expect("a pipeline");
        let engine: Arc<dyn Engine> = Arc::new(FakeEngine(Arc::clone(&self.seen)));
        let store = Store::open(&self.dir.path().join("cache")).expect("a store");
        let hub = labpipe::hub::HubSettings::from_env();
        let sources = Sources::new(self.dir.path(), hub, FileHashes::open(store.dir()));
        let facts =
            StoreFacts { store: store.clone(), sources: &sources, pipeline: "fake".to_owned(), engine: engine.info() };
        let plan = build(&pipeline, &catalogue, &facts, selection).expect("a plan");
        let run_file = RunFile {
            run_id: labpipe::run::run_id(),
            pipeline: "fake".to_owned(),
            pipeline_path: PathBuf::from("fake.yaml"),
            root: self.dir.path().to_owned(),
            command: Vec::new(),
            selection: serde_json::Value::Null,
            jobs,
            plan: serde_json::Value::Null,
            files: serde_json::Value::Null,
            inputs_verified: serde_json::Value::Null,
            pipeline_text: text,
            set: Vec::new(),
            matrix: Vec::new(),
            memory_limit_asked: None,
            memory_limit_bytes: None,
            device_asked: None,
            execution_asked: None,
            execution: "auto".to_owned(),
            device: "fake device".to_owned(),
            device_reason: "asked for".to_owned(),
            environment: Value::Null,
            started_at: timestamp(),
            ended_at: None,
            load_average_after: None,
            status: "running".to_owned(),
            stages: Vec::new(),
        };
        let results = Results::new(&self.dir.path().join("results"));
        let run_dir = results.reserve("fake", &run_file.run_id).expect("a run's folder");
        let run_file = RunFile { run_id: run_dir.run_id(), ..run_file };
        results.start(&run_dir, &run_file.to_json()).expect("a run");
        let active = store.list_run(&run_file.run_id, "fake", planned_keys(&plan)).expect("a run that is listed");
        let request = RunRequest {
            plan: &plan,
            catalogue: &catalogue,
            root: self.dir.path(),
            store: &store,
            active: &active,
            sources: &sources,
            run_dir: &run_dir,
            run_file,
            runner: Arc::new(InProcess::new(engine)),
            events: Arc::new(NullSink),
            cancel: Arc::clone(&self.seen.cancel),
            jobs,
        };
        execute(&request).expect("a run")
    }
}

fn outcomes(outcome: &RunOutcome) -> BTreeMap<&str, &str> {
    outcome.stages.iter().map(|stage| (stage.stage.as_str(), stage.outcome.as_deref().unwrap_or("none"))).collect()
}

const TWO_MODELS: &str = "
  a:  { kind: make, seed: 1 }
  b:  { kind: make, seed: 2 }
  ma: { kind: measure, model: a }
  mb: { kind: measure, model: b }
  ua: { kind: use, model: a }
  ub: { kind: use, model: b }
  va: { kind: use, model: a, seed: 7 }
  vb: { kind: use, model: b, seed: 7 }
";

#[test]
fn a_measurement_has_the_machine_alone_and_no_two_models_are_ever_loaded() {
    for jobs in [1, 4] {
        let bench = Bench::new();
        let outcome = bench.run(TWO_MODELS, jobs);
        assert_eq!(outcome.exit_code, 0, "{:?}", outcome.stages);
        assert_eq!(bench.seen.disturbed.load(Ordering::SeqCst), 0);
        assert_eq!(bench.seen.most_models.load(Ordering::SeqCst), 1);
        assert_eq!(bench.seen.models_alive.load(Ordering::SeqCst), 0, "dropped after the last consumer");
    }
}

#[test]
fn work_is_ordered_by_model_so_that_each_is_loaded_once() {
    let bench = Bench::new();
    bench.run(TWO_MODELS, 1);
    // A start of a measurement loads its model anew, and what is loaded then serves the model's other stages first.
    assert_eq!(*bench.seen.opened.lock().expect("the list"), ["m1", "m2", "m1"]);
    let bench = Bench::new();
    bench.run(&TWO_MODELS.replace("kind: measure", "kind: use"), 1);
    assert_eq!(*bench.seen.opened.lock().expect("the list"), ["m1", "m2"]);
}

const STARTS: &str = "
  a:  { kind: make, seed: 1 }
  b:  { kind: make, seed: 2 }
  ma: { kind: measure, model: a, seed: 3 }
  na: { kind: measure, model: a, seed: 2 }
  mb: { kind: measure, model: b, seed: 3 }
  all: { kind: gather, inputs: [ma, na, mb] }
";

#[test]
fn starts_take_turns_over_the_models_and_each_loads_its_model_anew() {
    for jobs in [1, 3] {
        let bench = Bench::new();
        let outcome = bench.run(STARTS, jobs);
        assert_eq!(outcome.exit_code, 0, "{:?}", outcome.stages);
        let order: Vec<String> = bench.seen.order.lock().expect("the list").clone();
        let measured: Vec<&str> = order.iter().map(String::as_str).filter(|name| name.contains('/')).collect();
        assert_eq!(measured, ["ma/0", "na/0", "mb/0", "mb/1", "ma/1", "na/1", "ma/2", "mb/2"]);
        assert_eq!(*bench.seen.opened.lock().expect("the list"), ["m1", "m2", "m2", "m1", "m1", "m2"]);
        assert_eq!(
            (bench.seen.most_models.load(Ordering::SeqCst), bench.seen.disturbed.load(Ordering::SeqCst)),
            (1, 0)
        );
        // Each start has a model of its own, whose first latency is 0.5 s and second 0.25 s.
        assert_eq!(outcome.results["ma"].record.body["latencies_s"], json!([0.5, 0.5, 0.5]));
        assert_eq!(outcome.results["na"].record.body["latencies_s"], json!([0.25, 0.25]));
        assert!(outcomes(&bench.run(STARTS, jobs)).values().all(|outcome| *outcome == "cached"));
    }
}

#[test]
fn a_stage_that_fails_in_one_start_is_gone_and_the_others_go_on() {
    let bench = Bench::new();
    let outcome = bench.run(&STARTS.replace("na: { kind: measure", "na: { kind: full").replace("a, seed: 2", "a"), 1);
    let found = outcomes(&outcome);
    assert_eq!((found["na"], found["ma"], found["mb"], found["all"]), ("failed", "done", "done", "done"));
    assert_eq!(outcome.results["mb"].record.body["latencies_s"], json!([0.5, 0.5, 0.5]));
}

#[test]
fn two_measurements_with_one_key_are_taken_once() {
    let bench = Bench::new();
    let stages = "  a: { kind: make, seed: 1 }\n  ma: { kind: measure, model: a, seed: 2 }\n  na: { kind: measure, model: a, seed: 2 }\n";
    let outcome = bench.run(stages, 2);
    assert_eq!(outcomes(&outcome), BTreeMap::from([("a", "done"), ("ma", "done"), ("na", "cached")]));
}

#[test]
fn a_failure_skips_what_needs_it_and_nothing_else_and_gathering_goes_on_without_it() {
    let bench = Bench::new();
    let outcome = bench.run(
        "
  a: { kind: make, seed: 1 }
  f: { kind: fail }
  g: { kind: fail, needs: f }
  u: { kind: use, model: a }
  all: { kind: gather, inputs: [u, f] }
  none: { kind: gather, inputs: [f] }
",
        2,
    );
    let found = outcomes(&outcome);
    assert_eq!(outcome.exit_code, 3);
    assert_eq!(
        (found["f"], found["g"], found["u"], found["all"], found["none"]),
        ("failed", "skipped", "done", "done", "skipped")
    );
    assert_eq!(outcome.results["all"].record.body["missing"], json!(["f"]));
}

#[test]
fn a_device_without_room_ends_the_stage_with_sizes_and_exit_code_4_and_the_next_stage_has_a_new_model() {
    let bench = Bench::new();
    let stages = "  a: { kind: make, seed: 1 }\n  f: { kind: full, model: a }\n  z: { kind: use, model: a }\n";
    let outcome = bench.run(stages, 1);
    let found = outcomes(&outcome);
    assert_eq!((found["f"], found["z"], outcome.exit_code), ("failed", "done", 4));
    let error = outcome.stages.iter().find(|stage| stage.stage == "f").and_then(|stage| stage.error.clone());
    let error = error.expect("an error");
    assert!(error.contains("a cache on fake device: 7.00 GiB asked for, 5.00 MiB free; close other"), "{error}");
    assert_eq!(*bench.seen.opened.lock().expect("the list"), ["m1", "m1"]);
    assert_eq!(outcomes(&bench.run("  a: { kind: make, seed: 1 }\n  z: { kind: use, model: a }\n", 1))["z"], "cached");
}

#[test]
fn a_panic_is_caught_counts_as_the_worst_and_leaves_the_others_running() {
    let bench = Bench::new();
    let outcome = bench.run("  p: { kind: panic }\n  f: { kind: fail }\n  a: { kind: make }\n", 2);
    let found = outcomes(&outcome);
    assert_eq!((found["p"], found["f"], found["a"], outcome.exit_code), ("failed", "failed", "done", 1));
    let error = outcome.stages.iter().find(|stage| stage.stage == "p").and_then(|stage| stage.error.clone());
    assert!(error.expect("an error").contains("a bug of the test's own"));
}

#[test]
fn a_cancelled_run_starts_nothing_more_and_the_next_goes_on_from_what_is_committed() {
    let bench = Bench::new();
    let stages = "
  a: { kind: make, seed: 1 }
  c: { kind: cancel, needs: a }
  z: { kind: fail, needs: c }
  u: { kind: use, model: a }
";
    let outcome = bench.run(stages, 1);
    assert!(outcome.was_cancelled && outcome.exit_code == 130);
    let found = outcomes(&outcome);
    assert_eq!((found["a"], found["c"]), ("done", "cancelled"));
    assert!(!bench.seen.order.lock().expect("the list").contains(&"z".to_owned()));
    bench.seen.cancel.store(false, Ordering::SeqCst);
    let again = bench.run("  a: { kind: make, seed: 1 }\n  u: { kind: use, model: a }\n", 1);
    assert_eq!(outcomes(&again)["a"], "cached");
}

#[test]
fn selections_run_what_they_say() {
    let bench = Bench::new();
    let stages = "  a: { kind: make }\n  u: { kind: use, model: a }\n  g: { kind: gather, inputs: [u] }\n";
    let until = Selection { until: vec!["u".to_owned()], ..Selection::default() };
    let first = bench.run_with(stages, 1, &until);
    assert_eq!(outcomes(&first), BTreeMap::from([("a", "done"), ("u", "done"), ("g", "skipped")]));
    let only = Selection { only: vec!["g".to_owned()], ..Selection::default() };
    assert_eq!(outcomes(&bench.run_with(stages, 1, &only))["g"], "done");
    let force = Selection { force: true, ..Selection::default() };
    assert!(outcomes(&bench.run_with(stages, 1, &force)).values().all(|outcome| *outcome == "done"));
    assert!(outcomes(&bench.run(stages, 1)).values().all(|outcome| *outcome == "cached"));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn stages_run_after_their_inputs_whatever_the_graph(edges in prop::collection::vec((0usize..8, 0usize..8), 0..20), jobs in 1usize..4) {
        let bench = Bench::new();
        let mut stages = String::new();
        for i in 0..8 {
            // Edges lead from lower to higher numbers: no cycles.
            let needs: Vec<String> = edges.iter().filter(|(from, to)| from < to && *to == i).map(|(from, _)| format!("s{from}")).collect();
            stages.push_str(&format!("  s{i}: {{ kind: make, seed: {i}, after: [{}] }}\n", needs.join(", ")));
        }
        let outcome = bench.run(&stages.replace(", after: []", ""), jobs);
        prop_assert_eq!(outcome.exit_code, 0);
        let order = bench.seen.order.lock().expect("the list").clone();
        let at = |i: usize| order.iter().position(|name| *name == format!("s{i}")).expect("it ran");
        for (from, to) in edges.iter().filter(|(from, to)| from < to) {
            prop_assert!(at(*from) < at(*to), "s{} before s{}: {:?}", from, to, order);
        }
    }
}
