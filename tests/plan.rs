//! Plans over a scripted world: what would run, which field is to blame, and the graph as pictures take it.

use labpipe::artifact::{Key, KeyFields};
use labpipe::inference::EngineInfo;
use labpipe::pipeline::{self, ParseOptions};
use labpipe::plan::{Facts, Located, LocatedFile, Plan, PlanError, Selection, SourceKind, build, tidy_path};
use labpipe::quantization::{self, QuantizationConfig};
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

/// What the plan may know: nothing but this is asked. All of it is in memory; no path leads anywhere.
struct World {
    /// Text of quantization configs by path; others can't be read.
    configs: BTreeMap<String, String>,
    /// By file name: another content than the first.
    changed: BTreeMap<String, String>,
    artifacts: BTreeMap<String, String>,
    last: BTreeMap<String, (Key, KeyFields)>,
    engine: EngineInfo,
}

impl Facts for World {
    fn locate(&self, kind: SourceKind, written: &str) -> Result<Located, String> {
        let name = if kind == SourceKind::Text { written.to_owned() } else { tidy_path(written) };
        let file = |name: String| LocatedFile { path: Some(Path::new("/nowhere").join(&name)), name };
        let files = match kind {
            _ if written.contains("missing") => return Err(format!("{written}: no such file")),
            SourceKind::Model => vec![file(format!("{name}/config.json")), file(format!("{name}/model.safetensors"))],
            _ => vec![file(name.clone())],
        };
        Ok(Located { name, files })
    }

    fn quantization_config(&self, path: &Path) -> Option<QuantizationConfig> {
        let path = path.strip_prefix("/nowhere").expect("a path of this world").to_string_lossy().into_owned();
        quantization::parse(self.configs.get(&path)?, &path, &path).ok()
    }

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
            computed_with: BTreeMap::from([("gemm".to_owned(), "0.19.0".to_owned())]),
        };
        let configs = BTreeMap::from([("experiments/nf4.yaml".to_owned(), "scheme: nf4\n".to_owned())]);
        World { configs, changed: BTreeMap::new(), artifacts: BTreeMap::new(), last: BTreeMap::new(), engine }
    }

    fn try_plan(&self, text: &str, selection: &Selection) -> Result<Plan, PlanError> {
        let catalogue = stages::catalogue();
        let pipeline = pipeline::parse(text, "test.yaml", &catalogue, &ParseOptions::default()).expect("a pipeline");
        build(&pipeline, &catalogue, self, selection)
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

    fn keys(&self, text: &str) -> BTreeMap<String, String> {
        let plan = self.plan(text);
        let nodes = plan.graph.node_weights();
        nodes.filter_map(|node| Some((node.stage.address.clone(), node.key.as_ref()?.0.clone()))).collect()
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
fn a_patch_upgrade_of_what_computes_reaches_all_that_computes_and_nothing_else() {
    let mut world = World::new();
    world.run(PIPELINE);
    world.engine.computed_with.insert("gemm".to_owned(), "0.19.1".to_owned());
    let expected = [
        "nf4: engine.gemm: 0.19.0 -> 0.19.1",
        "decode: engine.gemm: 0.19.0 -> 0.19.1; input model changed",
        "ppl: engine.gemm: 0.19.0 -> 0.19.1; input model changed",
        "report: depends on what decode gives",
    ];
    assert_eq!(world.misses(PIPELINE), expected);
    world.engine.computed_with = BTreeMap::from([("driver".to_owned(), "580.1".to_owned())]);
    assert_eq!(world.misses(PIPELINE)[0], "nf4: engine.driver: absent -> 580.1; engine.gemm: 0.19.0 -> absent");
    // A report of what computed nothing: no driver can change it.
    let only_loads =
        "version: 1\nname: x\nstages:\n  m: { kind: load, model: m }\n  r: { kind: report, inputs: [m] }\n";
    let before = world.keys(only_loads);
    world.engine.computed_with = BTreeMap::new();
    assert_eq!(world.keys(only_loads), before);
}

#[test]
fn texts_are_tied_to_the_exact_tokenizers_and_models_to_none() {
    let plan = World::new().plan(PIPELINE);
    let fields = |stage: &str| {
        let node = plan.graph.node_weights().find(|node| node.stage.address == stage).expect("the stage");
        node.fields.clone()
    };
    let lock = include_str!("../Cargo.lock");
    let version = fields("ppl")["text.tokenizers"].clone();
    assert!(lock.contains(&format!("name = \"tokenizers\"\nversion = \"{version}\"\n")), "{version}");
    for stage in ["base", "nf4", "decode"] {
        assert!(!fields(stage).keys().any(|name| name.starts_with("text.")), "{stage}");
    }
}

/// Returns a pipeline that quantizes with a config.
fn with_config(config: &str) -> String {
    PIPELINE.replace("experiments/nf4.yaml", config)
}

#[test]
fn spellings_of_one_meaning_have_one_key() {
    let mut world = World::new();
    let configs = [
        ("a.yaml", "name: first\nscheme: nf4\nkeep: [mlp.down_proj, layers.3]\n"),
        (
            "b.yaml",
            "# the same\nname: second\ndescription: x\nscheme: nf4\nblock_size: 64\nkeep: [3, mlp.down_proj, lm_head]\n",
        ),
        (
            "c.yaml",
            "method: bitsandbytes\nload_in_4bit: true\nbnb_4bit_use_double_quant: false\nfp16_layers: [mlp.down_proj, 3]\n",
        ),
        ("d.yaml", "scheme: nf4\nkeep: [mlp.down_proj]\n"),
    ];
    world.configs = configs.map(|(path, text)| (path.to_owned(), text.to_owned())).into();
    let key = |config: &str| world.keys(&with_config(config))["nf4"].clone();
    let first = key("a.yaml");
    for same in ["b.yaml", "./c.yaml", "{ scheme: nf4, keep: [layers.3, mlp.down_proj] }"] {
        assert_eq!(key(same), first, "{same}");
    }
    for other in ["d.yaml", "{ scheme: nf4 }", "{ scheme: fp4, keep: [layers.3, mlp.down_proj] }"] {
        assert_ne!(key(other), first, "{other}");
    }
    let keys = world.keys(PIPELINE);
    for spelling in ["./models/stories260k", "models//stories260k/", "models/./stories260k"] {
        assert_eq!(world.keys(&PIPELINE.replace("models/stories260k", spelling)), keys, "{spelling}");
    }
    // A recipe opens the model under this name: another folder with the same files is another model.
    let elsewhere = world.keys(&PIPELINE.replace("models/stories260k", "models/copy"));
    assert_ne!(elsewhere["base"], keys["base"]);
}

#[test]
fn a_text_counts_by_its_content_wherever_it_lies_and_however_it_is_written_down() {
    let mut world = World::new();
    world.changed.insert("copy.txt".to_owned(), "hash of tinystories.txt".to_owned());
    world.changed.insert("copy.parquet".to_owned(), "hash of tinystories.txt".to_owned());
    let key = |text: &str| world.keys(&PIPELINE.replace("experiments/data/tinystories.txt", text))["ppl"].clone();
    let first = key("experiments/data/tinystories.txt");
    for same in ["[experiments/data/tinystories.txt]", "{ source: experiments/data/tinystories.txt }", "other/copy.txt"]
    {
        assert_eq!(key(same), first, "{same}");
    }
    for other in ["other/copy.parquet", "other/text.txt", "{ source: other/copy.txt, n_chars: 10 }"] {
        assert_ne!(key(other), first, "{other}");
    }
}

#[test]
fn a_config_s_name_changes_the_report_alone_and_what_it_says_is_named() {
    let mut world = World::new();
    world.run(PIPELINE);
    let path = "experiments/nf4.yaml".to_owned();
    world.configs.insert(path.clone(), "name: mine\nscheme: nf4\n".to_owned());
    assert_eq!(world.misses(PIPELINE), ["report: input decode changed; input ppl changed"]);
    world.configs.insert(path.clone(), "scheme: nf4\nkeep: [layers.0]\n".to_owned());
    assert_eq!(world.misses(PIPELINE)[0], "nf4: params.config.keep: [] -> [\"layers.0\"]");
    // A damaged config keeps no other stage from being planned: it counts by its bytes.
    world.configs.clear();
    let misses = world.misses(PIPELINE);
    assert!(misses[0].contains("experiments/nf4.yaml is new"), "{misses:?}");
    let before = world.keys(PIPELINE)["nf4"].clone();
    world.changed.insert("nf4.yaml".to_owned(), "damaged otherwise".to_owned());
    assert_ne!(world.keys(PIPELINE)["nf4"], before);
}

#[test]
fn a_stage_reads_the_files_of_the_model_that_it_computes_with() {
    let plan = World::new().plan(PIPELINE);
    let reads = |stage: &str| {
        let mut nodes = plan.graph.node_indices();
        let node = nodes.find(|node| plan.graph[*node].stage.address == stage).expect("the stage");
        plan.reads(node).into_iter().map(|source| source.written.clone()).collect::<Vec<String>>()
    };
    assert_eq!(reads("base"), ["models/stories260k"]);
    assert_eq!(reads("nf4"), ["experiments/nf4.yaml", "models/stories260k"]);
    assert_eq!(reads("ppl"), ["experiments/data/tinystories.txt", "models/stories260k"]);
    assert_eq!(reads("report"), Vec::<String>::new());
}

#[test]
fn what_is_not_there_is_named_with_its_stage() {
    let error = World::new().try_plan(&PIPELINE.replace("models/stories260k", "models/missing"), &Selection::default());
    let error = error.expect_err("an error").to_string();
    assert!(error.contains("stage base: models/missing: no such file"), "{error}");
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
    // What computes is shared; a report shows its inputs, and what they were made from, by name.
    assert_eq!(world.misses(&renamed), ["report: input decode changed; input ppl changed"]);
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
