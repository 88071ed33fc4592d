//! Plans over a scripted world: what would run, which field is to blame, and the graph as pictures take it.

use labpipe::artifact::{Key, KeyFields};
use labpipe::inference::EngineInfo;
use labpipe::pipeline::{self, ParseOptions};
use labpipe::plan::{Facts, Plan, PlanError, Selection, build};
use labpipe::stages;
use std::collections::BTreeMap;
use std::path::Path;

const PIPELINE: &str = r#"
version: 1
name: small
vars: { n_gen: 4 }
stages:
  base:    { kind: load, model: models/stories260k, dtype: f16 }
  nf4:     { kind: quantize, model: base, config: experiments/nf4.yaml }
  decode:  { kind: decode-bench, model: nf4, n_gen: "${n_gen}" }
  ppl:     { kind: ppl, model: nf4, text: experiments/data/tinystories.txt, after: decode }
  report:  { kind: report, inputs: [decode, ppl] }
"#;

/// What the plan may know: nothing but this is asked.
struct World {
    /// By file name: another content than the first.
    changed: BTreeMap<String, String>,
    artifacts: BTreeMap<String, String>,
    last: BTreeMap<String, (Key, KeyFields)>,
    engine: EngineInfo,
}

impl Facts for World {
    fn file_hash(&self, path: &Path) -> Result<String, String> {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        Ok(self.changed.get(&name).cloned().unwrap_or(format!("hash of {name}")))
    }

    fn artifact(&self, key: &Key) -> Option<String> {
        self.artifacts.get(&key.0).cloned()
    }

    fn last(&self, stage: &str) -> Option<(Key, KeyFields)> {
        self.last.get(stage).cloned()
    }

    fn engine(&self) -> EngineInfo {
        self.engine.clone()
    }
}

impl World {
    fn new() -> World {
        let engine = EngineInfo {
            backend: "fake".to_owned(),
            device: "cpu: one".to_owned(),
            numerics_version: 1,
            clock: "scripted".to_owned(),
            is_host: true,
        };
        World { changed: BTreeMap::new(), artifacts: BTreeMap::new(), last: BTreeMap::new(), engine }
    }

    fn try_plan(&self, text: &str, selection: &Selection) -> Result<Plan, PlanError> {
        let catalogue = stages::catalogue();
        let pipeline = pipeline::parse(text, "test.yaml", &catalogue, &ParseOptions::default()).expect("a pipeline");
        build(&pipeline, &catalogue, Path::new(env!("CARGO_MANIFEST_DIR")), self, selection)
    }

    fn plan(&self, text: &str) -> Plan {
        self.try_plan(text, &Selection::default()).expect("a plan")
    }

    /// Plans and commits what has a key, until everything has: the second time the measurement is there.
    fn run(&mut self, text: &str) {
        for _ in 0..2 {
            for node in self.plan(text).graph.node_weights() {
                if let Some(key) = &node.key {
                    self.artifacts.entry(key.0.clone()).or_insert_with(|| format!("digest of {}", key.short()));
                    self.last.insert(node.stage.address.clone(), (key.clone(), node.fields.clone()));
                }
            }
        }
    }

    /// What would run, and why.
    fn misses(&self, text: &str) -> Vec<String> {
        let rows = self.plan(text).rows();
        rows.iter().filter(|row| row[2] == "run").map(|row| format!("{}: {}", row[0], row[3])).collect()
    }
}

#[test]
fn at_first_everything_is_new_and_afterwards_everything_is_cached() {
    let mut world = World::new();
    let expected = ["base", "nf4", "decode", "ppl"].map(|stage| format!("{stage}: never computed before"));
    let misses = world.misses(PIPELINE);
    assert_eq!(misses[..4], expected);
    assert_eq!(misses[4], "report: depends on what decode gives");
    world.run(PIPELINE);
    assert_eq!(world.misses(PIPELINE), Vec::<String>::new());
}

#[test]
fn a_changed_parameter_is_named_with_its_values_and_nothing_else_runs() {
    let mut world = World::new();
    world.run(PIPELINE);
    let misses = world.misses(&PIPELINE.replace("n_gen: 4", "n_gen: 8"));
    assert_eq!(misses, ["decode: params.n_gen: 4 -> 8", "report: depends on what decode gives"]);
}

#[test]
fn a_changed_file_is_named_and_what_follows_names_its_input() {
    let mut world = World::new();
    world.run(PIPELINE);
    world.changed.insert("model.safetensors".to_owned(), "other".to_owned());
    assert_eq!(
        world.misses(PIPELINE),
        [
            "base: models/stories260k/model.safetensors changed",
            "nf4: input model changed",
            "decode: input model changed",
            "ppl: input model changed",
            "report: depends on what decode gives",
        ]
    );
    world.changed = BTreeMap::from([("tinystories.txt".to_owned(), "other".to_owned())]);
    assert_eq!(world.misses(PIPELINE), ["ppl: experiments/data/tinystories.txt changed", "report: input ppl changed"]);
}

#[test]
fn another_engine_reaches_what_computes_and_another_device_what_measures() {
    let mut world = World::new();
    world.run(PIPELINE);
    world.engine.device = "cpu: two".to_owned();
    assert_eq!(
        world.misses(PIPELINE),
        ["decode: device: cpu: one -> cpu: two", "report: depends on what decode gives"]
    );
    world.engine.device = "cpu: one".to_owned();
    world.engine.numerics_version = 2;
    let misses = world.misses(PIPELINE);
    assert_eq!(misses[0], "base: engine.numerics: 1 -> 2");
    assert_eq!(misses.len(), 5);
}

#[test]
fn new_numbers_of_a_measurement_reach_the_report_and_equal_ones_do_not() {
    let mut world = World::new();
    world.run(PIPELINE);
    let (key, _) = world.last["decode"].clone();
    let before = world.artifacts.insert(key.0.clone(), "other numbers".to_owned()).expect("it was there");
    assert_eq!(world.misses(PIPELINE), ["report: input decode changed"]);
    world.artifacts.insert(key.0, before);
    assert_eq!(world.misses(PIPELINE), Vec::<String>::new());
}

#[test]
fn a_stage_s_own_name_changes_no_key_and_a_lost_artifact_is_told_from_a_new_one() {
    let mut world = World::new();
    world.run(PIPELINE);
    let renamed = PIPELINE.replace("nf4:  ", "four: ").replace("model: nf4", "model: four");
    assert_eq!(world.misses(&renamed), Vec::<String>::new());
    let (key, _) = world.last["base"].clone();
    world.artifacts.remove(&key.0);
    assert_eq!(world.misses(PIPELINE), ["base: its artifact is gone or damaged"]);
}

#[test]
fn what_is_left_out_must_be_in_the_cache_and_the_error_says_what_to_do() {
    let world = World::new();
    let only = Selection { only: vec!["ppl".to_owned()], ..Selection::default() };
    let error = world.try_plan(PIPELINE, &only).expect_err("an error").to_string();
    assert!(error.contains("reuse stage base") && error.contains("--until"), "{error}");
    let from = Selection { from: vec!["ppl".to_owned()], ..Selection::default() };
    let error = world.try_plan(PIPELINE, &from).expect_err("an error").to_string();
    assert!(error.contains("reuse stage base") && error.contains("--rebuild-upstream"), "{error}");
    let mut changed = World::new();
    changed.run(PIPELINE);
    let error = changed.try_plan(&PIPELINE.replace("f16", "f32"), &from).expect_err("an error").to_string();
    assert!(error.contains("it changed (params.dtype: \"f16\" -> \"f32\")"), "{error}");
}

#[test]
fn the_graph_is_drawn_as_it_was() {
    let plan = World::new().plan(PIPELINE);
    insta::assert_snapshot!("dot", plan.to_dot());
    insta::assert_snapshot!("mermaid", plan.to_mermaid());
}
