//! Runs from the outside: the program on real models, its records, its exit codes, its cache.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use support::Lab;

/// A pipeline that is quick and has every kind of stage.
const SMALL: &str = r#"
version: 1
name: small
vars:
  model: models/stories260k
  config: { scheme: nf4 }
  text: { source: experiments/data/tinystories.txt, n_chars: 3000 }
stages:
  base:    { kind: load, model: "${model}", dtype: f16 }
  small:   { kind: quantize, model: base, config: "${config}" }
  prefill: { kind: prefill-bench, model: small, n_prompt: [16, 32], samples: 3, warmup: 1 }
  decode:  { kind: decode-bench, model: small, n_gen: 4, n_depth: [0, 8], samples: 2, warmup: 0 }
  ppl:     { kind: ppl, model: small, text: "${text}", convention: [hf-strided, hf-strided-legacy, disjoint], max_length: 64, stride: 32 }
  acts-a:  { kind: capture-activations, model: base, text: "${text}", n_tokens: 40 }
  acts-b:  { kind: capture-activations, model: small, text: "${text}", n_tokens: 40 }
  diff:    { kind: diff, reference: acts-a, candidate: acts-b, scatter_points: 50 }
  report:  { kind: report, inputs: [small, prefill, decode, ppl, diff] }
"#;

/// A prefill, and one that goes on to the likelihood of every token.
const SCORED: &str = r#"
version: 1
name: scored
stages:
  base:    { kind: load, model: models/stories260k, dtype: f16 }
  prefill: { kind: prefill-bench, model: base, n_prompt: 16, samples: 2, warmup: 0 }
  scored:  { kind: prefill-bench, model: base, n_prompt: [16, 40], score: true, samples: 2, warmup: 1 }
  report:  { kind: report, inputs: [prefill, scored] }
"#;

fn lab() -> Lab {
    let lab = Lab::new();
    lab.write("small.yaml", SMALL);
    lab
}

fn has_fields(value: &Value, fields: &[&str]) {
    for field in fields {
        assert!(value.get(field).is_some(), "field {field} is missing in {value}");
    }
}

#[test]
fn every_record_has_the_fields_of_the_contract() {
    let lab = lab();
    lab.expect(0, &["run", "small.yaml"]);
    let head = [
        "format_version",
        "pipeline",
        "run_id",
        "produced_by_run",
        "stage",
        "kind",
        "key",
        "cached",
        "started_at",
        "duration_s",
        "device",
        "params",
    ];
    for stage in ["base", "small", "prefill", "decode", "ppl", "acts-a", "acts-b", "diff", "report"] {
        has_fields(&lab.record(stage), &head);
    }
    let ppl = lab.record("ppl");
    assert_eq!(ppl["results"].as_array().expect("rows").len(), 3);
    has_fields(
        &ppl["results"][0],
        &[
            "convention",
            "max_length",
            "stride",
            "n_tokens",
            "n_windows",
            "n_scored",
            "bos",
            "text_hash",
            "tokenizer_hash",
            "nll_mean",
            "perplexity",
            "nll_interval",
            "perplexity_interval",
        ],
    );
    has_fields(&ppl, &["scoring_s", "scoring_tokens_per_second", "scoring_method"]);
    let n_scored = |row: usize| ppl["results"][row]["n_scored"].as_u64().expect("a count");
    assert!(ppl["n_tokens_run"].as_u64().expect("a count") > n_scored(0) + n_scored(2), "{ppl}");
    let statistics = ["mean", "stdev", "median", "p90", "p95", "p99", "min", "max"];
    let memory = ["weights_bytes", "pool_peak_bytes", "process_peak_bytes", "method"];
    let prefill = lab.record("prefill");
    has_fields(&prefill, &memory);
    has_fields(&prefill["results"][0], &["label", "n_prompt", "samples_s", "tokens_per_second", "starts"]);
    let (shown, _) = lab.expect(0, &["show", "prefill"]);
    assert!(shown.contains("│ label ") && shown.contains("┆ pp16 ") && shown.contains("│ ttft_s_median "), "{shown}");
    let decode = lab.record("decode");
    has_fields(&decode, &memory);
    has_fields(&decode["results"][1], &["label", "n_gen", "n_depth", "samples_s", "tokens_per_second"]);
    for statistic in statistics {
        has_fields(&prefill["results"][0], &[&format!("ttft_s_{statistic}")]);
        has_fields(&decode["results"][0], &[&format!("token_latency_s_{statistic}")]);
    }
    assert_eq!(decode["results"][1]["label"], "tg4 @ d8");
    has_fields(
        &lab.record("small")["modules"][0],
        &["module", "scheme", "block_size", "bits_per_weight", "bytes", "weight_mse", "weight_sqnr_db"],
    );
    has_fields(
        &lab.record("small")["totals"],
        &["n_quantized", "n_kept", "weights_bytes", "base_bytes", "bits_per_weight"],
    );
    let diff = lab.record("diff");
    assert_eq!(diff["mode"], "cumulative");
    has_fields(
        &diff["modules"][0],
        &[
            "module",
            "layer_idx",
            "op",
            "n_tokens",
            "mse",
            "cosine",
            "cosine_p01",
            "sqnr_db",
            "rel_frobenius",
            "max_abs_diff",
            "ref_mean_abs",
            "ref_max_abs",
        ],
    );
    assert!(lab.path("results/latest/report/report.md").is_file());
    assert!(lab.path("results/latest/report/lbl_analysis.md").is_file());
}

#[test]
fn a_prompt_whose_tokens_are_scored_is_timed_beside_prefill_and_not_taken_for_it() {
    let lab = Lab::new();
    lab.write("scored.yaml", SCORED);
    lab.expect(0, &["run", "scored.yaml"]);
    let scored = lab.record("scored");
    assert_eq!((&scored["results"][1]["label"], &scored["results"][1]["scores"]), (&"pp40+nll".into(), &true.into()));
    assert!(scored["results"][1]["ttft_s_min"].as_f64().expect("a time") > 0.0, "{scored}");
    let read = |file: &str| std::fs::read_to_string(lab.path("results/latest/report").join(file)).expect("a report");
    let rows = read("report.csv");
    let metrics = |metric: &str| rows.lines().filter(|row| row.contains(metric)).count();
    assert_eq!((metrics("scoring_tokens_per_second,pp"), metrics("prefill_tokens_per_second,pp")), (2, 1), "{rows}");
    assert!(read("report.md").contains("Where a label ends with `+nll`"));
    lab.write("short.yaml", &SCORED.replace("[16, 40]", "[1, 40]"));
    let (_, told) = lab.expect(2, &["validate", "short.yaml"]);
    assert!(told.contains("two tokens at least"), "{told}");
}

#[test]
fn a_second_run_computes_nothing_and_rerun_from_a_stage_only_what_follows_it() {
    let lab = lab();
    lab.expect(0, &["run", "small.yaml"]);
    lab.expect(0, &["run", "small.yaml"]);
    assert!(lab.outcomes().iter().all(|(_, outcome)| outcome == "cached"), "{:?}", lab.outcomes());
    assert_eq!(lab.record("ppl")["cached"], true);
    lab.expect(0, &["rerun", "--from", "diff"]);
    let done: Vec<String> =
        lab.outcomes().into_iter().filter(|(_, outcome)| outcome == "done").map(|(stage, _)| stage).collect();
    assert_eq!(done, ["diff", "report"]);
}

#[test]
fn verbose_says_why_a_stage_runs_and_what_loading_took_and_quiet_says_nothing() {
    let lab = lab();
    let (_, told) = lab.expect(0, &["run", "small.yaml", "-v", "--until", "ppl"]);
    assert!(told.contains("ppl: key ") && told.contains("; why: never computed before"), "{told}");
    assert!(told.contains("model loaded in") && told.contains("of weights"), "{told}");
    let (_, told) = lab.expect(0, &["run", "small.yaml", "--until", "ppl", "--force"]);
    assert!(told.contains("done   ppl") && !told.contains("why:") && !told.contains("model loaded"), "{told}");
    let (_, told) = lab.expect(0, &["run", "small.yaml", "--until", "ppl", "--force", "--quiet"]);
    assert_eq!(told, "");
}

#[test]
fn a_changed_variable_is_named_by_plan_and_remeasuring_reaches_the_report() {
    let lab = lab();
    lab.expect(0, &["run", "small.yaml"]);
    let (plan, _) = lab.expect(0, &["plan", "small.yaml", "--set", "config={scheme: int8}"]);
    assert!(plan.contains("params.config") && plan.contains("input model changed"), "{plan}");
    lab.expect(0, &["run", "small.yaml", "--remeasure=prefill"]);
    let done: Vec<String> =
        lab.outcomes().into_iter().filter(|(_, outcome)| outcome == "done").map(|(stage, _)| stage).collect();
    assert_eq!(done, ["prefill", "report"]);
    let (_, error) = lab.expect(2, &["rerun", "--from", "nope"]);
    assert!(error.contains("nope"), "{error}");
}

#[test]
fn rerun_stops_where_an_ancestor_is_gone_and_rebuilds_it_when_told() {
    let lab = lab();
    lab.expect(0, &["run", "small.yaml"]);
    let key = lab.record("acts-b")["key"].as_str().expect("a key").to_owned();
    std::fs::remove_dir_all(lab.path("cache").join(key)).expect("the artifact");
    let (_, error) = lab.expect(2, &["rerun", "--from", "diff"]);
    assert!(error.contains("acts-b") && error.contains("--rebuild-upstream"), "{error}");
    lab.expect(0, &["rerun", "--from", "diff", "--rebuild-upstream"]);
}

#[test]
fn a_stage_that_fails_leaves_the_others_running_and_the_cache_whole() {
    let lab = lab();
    lab.write("bad.yaml", &SMALL.replace("n_prompt: [16, 32]", "n_prompt: [16, 3000]"));
    let (_, error) = lab.expect(3, &["run", "bad.yaml"]);
    assert!(error.contains("prefill failed to") && error.contains("512"), "{error}");
    let outcomes = lab.outcomes();
    let of = |name: &str| outcomes.iter().find(|(stage, _)| stage == name).expect("the stage").1.clone();
    assert_eq!((of("prefill").as_str(), of("ppl").as_str(), of("diff").as_str()), ("failed", "done", "done"));
    // The report gathers: it goes on without the one that failed, and says so.
    assert_eq!(of("report"), "done");
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.md")).expect("a report");
    assert!(report.contains("prefill"), "the report names what is missing");
    lab.expect(0, &["cache", "verify"]);
    lab.expect(0, &["run", "small.yaml"]);
}

#[test]
fn pipeline_errors_end_with_code_2_before_any_stage_starts() {
    let lab = lab();
    for (from, to, expected) in [
        ("kind: diff", "kind: dif", "did you mean \"diff\"?"),
        ("scatter_points: 50", "scater_points: 50", "did you mean \"scatter_points\"?"),
        ("model: small, n_gen", "model: smal, n_gen", "did you mean \"small\"?"),
        ("samples: 3", "samples: three", "expected a whole number"),
        ("  base:  ", "  ba/se:  ", "expected a letter or digit"),
        ("model: \"${model}\"", "model: \"${modle}\"", "did you mean \"model\"?"),
        ("models/stories260k", "models/nowhere", "no such model folder"),
        (
            "kind: load, model: \"${model}\"",
            "kind: quantize, model: small, config: {scheme: nf4}",
            "base -> small -> base",
        ),
    ] {
        assert!(SMALL.contains(from), "{from}");
        lab.write("bad.yaml", &SMALL.replace(from, to));
        let (_, error) = lab.expect(2, &["run", "bad.yaml"]);
        assert!(error.contains(expected), "{from} -> {to}:\n{error}");
    }
    assert!(!lab.path("results").exists(), "nothing has run");
    let two = SMALL.replace("samples: 3", "samples: three").replace("n_gen: 4", "n_gen: 0");
    lab.write("bad.yaml", &two);
    let (_, error) = lab.expect(2, &["validate", "bad.yaml"]);
    assert!(error.contains("2 errors") && error.contains("bad.yaml:"), "{error}");
    assert_eq!(lab.run(&["run", "nowhere.yaml"]).status.code(), Some(2));
    assert_eq!(lab.run(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(lab.run(&["run", "small.yaml", "--device", "cuda"]).status.code(), Some(4));
}

#[test]
fn saved_metrics_have_a_row_per_model_measured() {
    let lab = lab();
    let output = lab.command(&["run", "small.yaml"]).env("SAVE_EVAL_RESULTS", "1").output().expect("labpipe starts");
    assert!(output.status.success());
    let csv = std::fs::read_to_string(lab.path("results/metrics.csv")).expect("metrics.csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.len(), 2, "{csv}");
    assert!(lines[0].starts_with("ts,model,quant_method,load_8bit,load_4bit,quant_type,prompt_length"));
    assert!(lines[1].contains(",small,") && lines[1].contains("nf4"));
    let mut reader = csv_rows(&csv);
    let row = reader.pop().expect("a row");
    let run_id = lab.run_json()["run_id"].as_str().expect("an id").to_owned();
    let hash = "model_blake3";
    assert_eq!((row["model_file"].as_str(), row["source_types"].as_str(), row[hash].len()), ("stories260k", "f32", 64));
    assert!(row["run_id"] == run_id && row["device"].starts_with("cpu") && row["gpu_name"].is_empty(), "{row:?}");
}

/// Returns a CSV's rows by the names of its columns.
fn csv_rows(text: &str) -> Vec<std::collections::BTreeMap<String, String>> {
    csv::Reader::from_reader(text.as_bytes()).deserialize().map(|row| row.expect("a whole row")).collect()
}

#[test]
fn the_cache_is_checked_cleared_and_filled_again() {
    let lab = lab();
    lab.expect(0, &["run", "small.yaml", "--until", "acts-b"]);
    let folder = lab.path("cache").join(lab.record("acts-b")["key"].as_str().expect("a key"));
    let file = folder.join("activations/lm_head.output.parquet");
    let mut bytes = std::fs::read(&file).expect("a captured tensor");
    bytes[100] ^= 1;
    std::fs::write(&file, &bytes).expect("damage");
    let (told, _) = lab.expect(5, &["cache", "verify"]);
    assert!(told.contains("acts-b: activations/lm_head.output.parquet") && told.contains("1 damaged"), "{told}");
    // A file of another length is noticed without hashing: the stage is computed again and replaces it.
    std::fs::write(&file, &bytes[..50]).expect("more damage");
    let (plan, _) = lab.expect(0, &["plan", "small.yaml", "--until", "acts-b"]);
    assert!(plan.contains("its artifact is gone or damaged"), "{plan}");
    lab.expect(0, &["run", "small.yaml", "--until", "acts-b"]);
    lab.expect(0, &["cache", "verify"]);
    // What a run refers to stays; without its results nothing does.
    assert!(lab.expect(0, &["cache", "gc"]).0.contains("removed 0 "));
    std::fs::remove_dir_all(lab.path("results")).expect("the results");
    lab.write("cache/notes.txt", "not labpipe's");
    // It can't be told what is referred to: a folder that is not mounted looks the same.
    let (_, told) = lab.expect(5, &["cache", "gc"]);
    assert!(told.contains("/results: ") && told.contains("--force"), "{told}");
    let gc = ["cache", "gc", "--force"];
    assert!(lab.expect(0, &[&gc[..], &["--older-than", "1"]].concat()).0.contains("removed 0 "), "they are from today");
    let (told, _) = lab.expect(0, &[&gc[..], &["--dry-run"]].concat());
    assert!(told.contains("would remove 3 ") && folder.is_dir(), "{told}");
    lab.expect(0, &gc);
    assert!(!folder.exists() && lab.path("cache/notes.txt").is_file());
    lab.expect(0, &["run", "small.yaml", "--until", "acts-b"]);
}

const SWEEP: &str = r#"
version: 1
name: sweep
matrix:
  config: [experiments/nf4.yaml, experiments/int8.yaml, missing.yaml]
stages:
  base:   { kind: load, model: models/stories260k, dtype: f16 }
  small:  { kind: quantize, model: base, config: "${config}" }
  ppl:    { kind: ppl, model: small, text: { source: experiments/data/tinystories.txt, n_chars: 2000 }, max_length: 64, stride: 64 }
  report: { kind: report, inputs: [small, ppl] }
"#;

#[test]
fn matrix_cells_share_what_does_not_depend_on_them_and_one_report_gathers_all() {
    let lab = lab();
    // The third config is a directory's worth of nonsense: it is there when planned, and fails when quantized.
    lab.write("missing.yaml", "scheme: nf9\n");
    lab.write("sweep.yaml", SWEEP);
    let (_, error) = lab.expect(3, &["run", "sweep.yaml"]);
    assert!(error.contains("small[config=missing] failed to"), "{error}");
    let outcomes = lab.outcomes();
    let n = |name: &str| outcomes.iter().filter(|(stage, _)| stage.split('[').next() == Some(name)).count();
    assert_eq!((n("base"), n("small"), n("ppl"), n("report")), (1, 3, 3, 1));
    assert!(outcomes.contains(&("ppl[config=int8]".to_owned(), "done".to_owned())), "{outcomes:?}");
    assert!(outcomes.contains(&("ppl[config=missing]".to_owned(), "skipped".to_owned())), "{outcomes:?}");
    assert!(lab.path("results/latest/config=int8/ppl/record.json").is_file());
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.md")).expect("a report");
    assert!(report.contains("config=int8") && report.contains("config=missing"), "{report}");
    let (json, _) = lab.expect(0, &["matrix", "sweep.yaml", "--format", "github"]);
    let matrix: Value = serde_json::from_str(&json).expect("JSON");
    assert_eq!(json.trim().lines().count(), 1);
    let narrow = matrix["include"][1]["narrow"].as_str().expect("arguments").to_owned();
    let mut args = vec!["run", "sweep.yaml"];
    args.extend(narrow.split(' '));
    lab.expect(0, &args);
    assert_eq!(lab.outcomes().iter().filter(|(_, outcome)| outcome == "cached").count(), 3);
}

#[test]
fn information_commands_work_without_any_run() {
    let lab = lab();
    assert!(lab.expect(0, &["stages"]).0.contains("capture-activations"));
    let schema: Value = serde_json::from_str(&lab.expect(0, &["schema"]).0).expect("JSON");
    assert_eq!(schema["properties"]["version"]["const"], 1);
    assert!(lab.expect(0, &["graph", "small.yaml"]).0.starts_with("digraph"));
    assert!(lab.expect(0, &["graph", "small.yaml", "--format", "mermaid"]).0.contains("-->|model|"));
    assert!(lab.expect(0, &["doctor"]).0.contains("engine:"));
    let (tested, _) = lab.expect(0, &["doctor", "--self-test", "--device", "cpu"]);
    assert!(tested.contains("all within their budgets") && tested.contains("wide llama"), "{tested}");
    assert!(!tested.contains("FAILED") && tested.contains("smollm3-sliding"), "{tested}");
    assert!(lab.expect(0, &["completions", "bash"]).0.contains("_labpipe"));
    assert!(lab.expect(2, &["show", "ppl"]).1.contains("run a pipeline first"));
    assert!(lab.expect(0, &["cache", "ls"]).0.contains("0 artifacts"));
}

#[test]
fn a_prompt_goes_through_the_model_s_chat_template() {
    let lab = Lab::new();
    let fixtures = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizers/bytes-512");
    std::fs::create_dir(lab.path("model")).expect("a folder");
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(lab.path("models/stories260k").join(name), lab.path("model").join(name)).expect("a copy");
    }
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        std::fs::copy(fixtures.join(name), lab.path("model").join(name)).expect("a copy");
    }
    lab.write("prompt.txt", "Tell me a story about a tree.");
    let pipeline = |model: &str, chat: &str| {
        format!(
            "version: 1\nname: chat\nstages:\n  base: {{ kind: load, model: {model} }}\n  \
             ppl: {{ kind: ppl, model: base, text: {{ source: prompt.txt, {chat} }}, max_length: 128, stride: 128, allow_short: true }}\n"
        )
    };
    let n_tokens = |chat: &str| {
        lab.write("chat.yaml", &pipeline("model", chat));
        lab.expect(0, &["run", "chat.yaml"]);
        let row = lab.record("ppl")["results"][0].clone();
        (row["n_tokens"].as_u64().expect("a count"), row["bos"].as_str().expect("a text").to_owned())
    };
    let (plain, bos) = n_tokens("chat: false");
    assert_eq!(bos, "added by the tokenizer (id 0)");
    let (chat, bos) = n_tokens("chat: true");
    assert_eq!(bos, "added by the chat template (id 0)");
    let (with_system, _) = n_tokens("chat: { system: Be brief. }");
    assert!(plain < chat && chat < with_system, "{plain}, {chat} and {with_system} tokens");

    // A template that doubles a list takes no steps for it, only memory.
    let doubling =
        "{% set ns = namespace(x=['a']) %}{% for i in range(64) %}{% set ns.x = ns.x + ns.x %}{% endfor %}{{ ns.x }}";
    lab.write("model/chat_template.jinja", doubling);
    lab.write("chat.yaml", &pipeline("model", "chat: true"));
    let (_, err) = lab.expect(3, &["run", "chat.yaml"]);
    assert!(err.contains("chat_template.jinja: gave up after 1.00 GiB of memory"), "{err}");

    lab.write("chat.yaml", &pipeline("models/stories260k", "chat: true"));
    let (_, error) = lab.expect(3, &["run", "chat.yaml"]);
    assert!(error.contains("instruct model"), "{error}");
    lab.write("chat.yaml", &pipeline("model", "n_tokens: 9, chat: true"));
    let (_, error) = lab.expect(2, &["run", "chat.yaml"]);
    assert!(error.contains("n_chars"), "{error}");
}

#[test]
fn an_accepted_disturbance_is_in_no_key_and_nothing_is_measured_again_for_it() {
    let lab = Lab::new();
    lab.write("small.yaml", SMALL);
    lab.expect(0, &["run", "small.yaml", "--until", "prefill", "--accept-disturbed"]);
    let run = lab.run_json();
    assert_eq!(run["selection"]["accept_disturbed"], true);
    let record = lab.record("prefill");
    for row in record["results"].as_array().expect("rows") {
        let seen = &row["disturbance"];
        assert_eq!((&seen["repeated"], &seen["discarded"]), (&Value::Bool(false), &Value::Null), "{seen}");
        if cfg!(target_os = "linux") {
            assert!(
                seen["host"]["others_cpu_share"].is_number() && seen["host"]["waiting_share"].is_number(),
                "{seen}"
            );
        }
    }
    lab.expect(0, &["run", "small.yaml", "--until", "prefill"]);
    let cached = |stage: &Value| stage["stage"] != "prefill" || stage["outcome"] == "cached";
    assert!(lab.run_json()["stages"].as_array().expect("stages").iter().all(cached));
}
