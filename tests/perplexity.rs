//! Perplexity and divergence from the outside, against values of transformers, llama.cpp's recipe, lm-evaluation-harness and
//! bitsandbytes (tests/fixtures/README.md says how those were made).
#![cfg(feature = "cpu")]

mod support;

use arrow::array::{ArrayRef, StringArray};
use arrow::record_batch::RecordBatch;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::Value;
use std::path::Path;
use std::sync::Arc;
use support::Lab;

const TEXTS: [(&str, &str); 2] = [
    ("tinystories_first_20000_chars", "experiments/data/tinystories.txt"),
    ("wiki_first_20000_chars", "experiments/data/wikitext2-head.txt"),
];

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    serde_json::from_str(&std::fs::read_to_string(path).expect("the fixture")).expect("JSON")
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or_else(|| panic!("{value} is no number"))
}

#[track_caller]
fn close(found: &Value, expected: &Value, tolerance: f64) {
    let (found, expected) = (number(found), number(expected));
    assert!((found / expected - 1.0).abs() < tolerance, "{found} against {expected}");
}

fn row<'a>(record: &'a Value, rows: &str, convention: &str) -> &'a Value {
    let rows = record[rows].as_array().unwrap_or_else(|| panic!("no {rows} in {record}"));
    rows.iter().find(|row| row["convention"] == convention).unwrap_or_else(|| panic!("no row for {convention}"))
}

#[test]
fn every_convention_agrees_with_its_reference_on_both_texts() {
    let (reference, lm_eval) = (fixture("stories260k.json")["stories260K"].clone(), fixture("lm_eval.json"));
    for (name, text) in TEXTS {
        let lab = Lab::new();
        lab.write(
            "all.yaml",
            &format!(
                "version: 1\nname: all\nvars: {{ text: {{ source: {text}, n_chars: 20000 }} }}\nstages:\n  \
                 base: {{ kind: load, model: models/stories260k, dtype: f32 }}\n  \
                 ppl: {{ kind: ppl, model: base, text: \"${{text}}\", convention: [lm-eval, llama-cpp, hf-strided, hf-strided-legacy, disjoint] }}\n  \
                 narrow: {{ kind: ppl, model: base, text: \"${{text}}\", convention: [hf-strided, hf-strided-legacy], max_length: 256, stride: 128 }}\n  \
                 with-bos: {{ kind: ppl, model: base, text: \"${{text}}\", convention: lm-eval, add_bos_token: true }}\n"
            ),
        );
        lab.expect(0, &["run", "all.yaml"]);
        let record = lab.record("ppl");
        let named: Vec<&str> =
            record["results"].as_array().expect("rows").iter().filter_map(|row| row["convention"].as_str()).collect();
        assert_eq!(named, ["lm-eval", "llama-cpp", "hf-strided", "hf-strided-legacy", "disjoint"]);

        let halves = &reference[name]["halves"][0];
        let found = row(&record, "results", "llama-cpp");
        assert_eq!((&found["n_scored"], &found["n_windows"]), (&halves["n_scored"], &halves["chunks"]));
        close(&found["perplexity"], &halves["ppl"], 1e-4);
        close(&found["llama_cpp_stderr"], &halves["stderr"], 1e-4);
        // Blocks of text are fewer than its tokens: the interval is wider than llama.cpp's own ± makes it.
        let interval = &found["perplexity_interval"];
        assert!(number(&interval["stderr"]) > number(&halves["stderr"]), "{interval}");
        assert!(
            number(&interval["low"]) < number(&halves["ppl"]) && number(&halves["ppl"]) < number(&interval["high"])
        );
        assert_eq!(interval["n_tokens"], halves["n_scored"]);
        assert!(row(&record, "results", "hf-strided")["llama_cpp_stderr"].is_null());

        let strided = reference[name]["strided"].as_array().expect("rows");
        let narrow = lab.record("narrow");
        for (record, idx) in [(&record, 0), (&narrow, 2)] {
            let found = row(record, "results", "hf-strided");
            assert_eq!(found["n_scored"], strided[idx]["n_scored"]);
            close(&found["perplexity"], &strided[idx]["ppl_by_valid_labels"], 1e-4);
            let found = row(record, "results", "hf-strided-legacy");
            close(&found["perplexity"], &strided[idx]["ppl_seed_recipe"], 1e-4);
        }
        assert_eq!(strided[1]["stride"], 512);
        close(&row(&record, "results", "disjoint")["perplexity"], &strided[1]["ppl_by_valid_labels"], 1e-4);

        for (record, case) in [(&record, "add_bos_token_false"), (&lab.record("with-bos"), "add_bos_token_true")] {
            let (found, expected) = (row(record, "results", "lm-eval"), &lm_eval[case][name]);
            for count in ["n_scored", "n_documents", "n_words", "n_bytes"] {
                assert_eq!(found[count], expected[count], "{count} {case}");
            }
            for figure in ["word_perplexity", "byte_perplexity", "bits_per_byte"] {
                close(&found[figure], &expected[figure], 1e-4);
                let interval = &found[format!("{figure}_interval")];
                close(&interval["value"], &found[figure], 1e-12);
                assert!(number(&interval["low"]) < number(&interval["high"]), "{interval}");
            }
        }
    }
}

/// Keeps `row` per paragraph in a Parquet file as hubs write them.
fn write_parquet(path: &Path, column: &str, rows: &[&str]) {
    let texts: ArrayRef = Arc::new(StringArray::from(rows.to_vec()));
    let batch = RecordBatch::try_from_iter([(column, texts)]).expect("a batch");
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
    let file = std::fs::File::create(path).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), Some(properties)).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("a footer");
}

#[test]
fn texts_come_from_files_lists_documents_parquet_and_the_hubs_cache() {
    let lab = Lab::new();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let wiki = std::fs::read_to_string(root.join("experiments/data/wikitext2-head.txt")).expect("the text");
    let wiki: String = wiki.chars().take(20_000).collect();
    lab.write("head.txt", &wiki);
    let middle = wiki.match_indices("\n\n").nth(20).expect("a blank line").0;
    lab.write("a.txt", &wiki[..middle]);
    lab.write("b.txt", &wiki[middle + 2..]);
    // WikiText's rows are its lines, blank ones empty: joined by blank lines they are the text again.
    let rows: Vec<&str> = wiki.split("\n\n").collect();
    write_parquet(&lab.path("rows.parquet"), "line", &rows);
    let folder = lab.path("hub/datasets--Salesforce--wikitext");
    write_parquet(&folder.join("snapshots/abc/wikitext-2-raw-v1/test-00000-of-00001.parquet"), "text", &rows);
    std::fs::create_dir_all(folder.join("refs")).expect("folders");
    std::fs::write(folder.join("refs/main"), "abc").expect("a file");
    let hub = "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet";
    lab.write(
        "texts.yaml",
        &format!(
            "version: 1\nname: texts\nstages:\n  base: {{ kind: load, model: models/stories260k, dtype: f32 }}\n  \
             file: {{ kind: ppl, model: base, text: head.txt }}\n  \
             list: {{ kind: ppl, model: base, text: [a.txt, b.txt] }}\n  \
             parquet: {{ kind: ppl, model: base, text: {{ source: rows.parquet, column: line }} }}\n  \
             remote: {{ kind: ppl, model: base, text: {hub} }}\n  \
             documents: {{ kind: ppl, model: base, convention: lm-eval, text: {{ source: head.txt, separator: \"\\n\\n\" }} }}\n"
        ),
    );
    let output = lab.command(&["run", "texts.yaml"]).env("HF_HUB_CACHE", lab.path("hub")).output().expect("it starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let row_of = |stage: &str| {
        let mut row = lab.record(stage)["results"][0].clone();
        row.as_object_mut().expect("a row").remove("perplexity_interval");
        row.as_object_mut().expect("a row").remove("stderr");
        row.as_object_mut().expect("a row").remove("nll_stderr");
        let interval = row["nll_interval"].take();
        (row, interval)
    };
    let (file, whole) = row_of("file");
    // Blank rows are no documents of their own.
    let n_rows = rows.iter().filter(|row| !row.trim().is_empty()).count();
    for (stage, n_documents) in [("list", 2), ("parquet", n_rows), ("remote", n_rows)] {
        let (found, interval) = row_of(stage);
        assert_eq!(found, file, "{stage}");
        assert_eq!((&interval["value"], &interval["n_tokens"]), (&whole["value"], &whole["n_tokens"]));
        assert_eq!(interval["n_documents"], n_documents, "{stage}");
    }
    assert_eq!(whole["n_documents"], 1);
    let expected = &fixture("lm_eval.json")["add_bos_token_false"]["wiki_first_20000_chars_by_blank_line"];
    let found = lab.record("documents")["results"][0].clone();
    for count in ["n_scored", "n_documents", "n_words", "n_bytes"] {
        assert_eq!(found[count], expected[count], "{count}");
    }
    close(&found["bits_per_byte"], &expected["bits_per_byte"], 1e-4);
    close(&found["word_perplexity"], &expected["word_perplexity"], 1e-4);

    let mut command = lab.command(&["run", "texts.yaml"]);
    command.env("HF_HUB_CACHE", lab.path("empty")).env("HF_HUB_OFFLINE", "1");
    let output = command.output().expect("it starts");
    let error = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(2), "{error}");
    assert!(error.contains("not in the Hugging Face cache") && error.contains("HF_HUB_OFFLINE"), "{error}");
}

const DIVERGENCE: &str = r#"
version: 1
name: divergence
vars: { text: { source: experiments/data/tinystories.txt, n_chars: 20000 }, keep: f16 }
stages:
  base:     { kind: load, model: models/stories260k, dtype: f32 }
  half:     { kind: load, model: models/stories260k, dtype: f16 }
  nf4:      { kind: quantize, model: base, config: { scheme: nf4, double_quant: false } }
  nf4-dq:   { kind: quantize, model: base, config: { scheme: nf4, double_quant: true } }
  ppl-base: { kind: ppl, model: base, text: "${text}", convention: [llama-cpp, disjoint], keep_log_probs: "${keep}", top_k: 48 }
  itself:     { kind: ppl, model: base,   base: ppl-base }
  ppl-half:   { kind: ppl, model: half,   base: ppl-base }
  ppl-nf4:    { kind: ppl, model: nf4,    base: ppl-base }
  ppl-nf4-dq: { kind: ppl, model: nf4-dq, base: ppl-base }
  report:     { kind: report, inputs: [nf4, ppl-base, itself, ppl-half, ppl-nf4, ppl-nf4-dq] }
"#;

#[test]
fn divergence_of_nf4_agrees_with_bitsandbytes_however_much_is_kept_of_the_base() {
    let reference = fixture("stories260k.json")["stories260K"].clone();
    let lab = Lab::new();
    lab.write("d.yaml", DIVERGENCE);
    for (keep, tolerance) in [("f32", 1e-3), ("f16", 1e-3)] {
        lab.expect(0, &["run", "d.yaml", "--set", &format!("keep={keep}")]);
        for (stage, case) in [("ppl-nf4", "nf4_bs64"), ("ppl-nf4-dq", "nf4_bs64_dq")] {
            let expected = &reference[case]["tinystories_first_20000_chars"];
            let record = lab.record(stage);
            let found = row(&record, "divergence", "llama-cpp");
            assert_eq!(found["base_log_probs"], keep);
            assert_eq!(found["n_scored"], expected["kld"]["n"]);
            for (ours, theirs) in
                [("kl_mean", "mean"), ("kl_median", "median"), ("kl_p90", "p90"), ("kl_p99", "p99"), ("kl_max", "max")]
            {
                close(&found[ours], &expected["kld"][theirs], tolerance);
            }
            close(&found["top1_agreement"], &expected["kld"]["same_top"], 1e-3);
            let base = number(&reference["tinystories_first_20000_chars"]["halves"][0]["ppl"]);
            let ratio = (number(&expected["halves"][0]["ppl"]) / base).ln();
            assert!((number(&found["ln_ppl_ratio"]) - ratio).abs() < 1e-3, "{ratio}");
            for figure in ["kl_mean", "kl_median", "kl_p99", "delta_p_mean", "delta_p_rms", "top1_agreement"] {
                let (value, stderr) = (number(&found[figure]), number(&found[format!("{figure}_stderr")]));
                assert!(stderr > 0.0 && stderr < value.abs(), "{figure} {value} {stderr}");
            }
            assert!(number(&found["nll_correlation"]) > 0.8);
            assert_eq!(record["divergence"].as_array().map(Vec::len), Some(2));
        }
        // The noise floor: nothing against itself, next to nothing in half precision.
        let kl = |stage: &str| number(&row(&lab.record(stage), "divergence", "llama-cpp")["kl_mean"]);
        assert!(kl("itself").abs() < 1e-6, "{}", kl("itself"));
        assert!(kl("ppl-half") < 1e-3 * kl("ppl-nf4"), "{}", kl("ppl-half"));
        let itself = lab.record("itself");
        let found = row(&itself, "divergence", "disjoint");
        assert_eq!((&found["top1_agreement"], &found["ln_ppl_ratio"]), (&Value::from(1.0), &Value::from(0.0)));
    }
    let whole = number(&row(&lab.record("ppl-nf4"), "divergence", "llama-cpp")["kl_mean"]);
    lab.expect(0, &["run", "d.yaml", "--set", "keep=top-k"]);
    let record = lab.record("ppl-nf4");
    let found = row(&record, "divergence", "llama-cpp");
    assert_eq!(found["base_log_probs"], "top-48");
    // What lies in the tail is a bound from below, and with 48 of 512 tokens a close one.
    let kept = number(&found["kl_mean"]);
    assert!(kept <= whole && kept > 0.95 * whole, "{kept} of {whole}");
    let cost = number(&lab.record("ppl-base")["log_probs"][0]["bytes_per_token"]);
    assert!(cost > 0.0 && cost < 48.0 * 8.0 + 40.0, "{cost}");
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.md")).expect("a report");
    for part in [
        "## Divergence",
        "| `nf4` | `base` | llama-cpp 512 | 4,590 |",
        "diverges from it by",
        "top-48",
        "(95 %, paired, 4,590 tokens in ",
        "llama.cpp's own ±",
    ] {
        assert!(report.contains(part), "{part} in\n{report}");
    }
}

#[test]
fn a_base_that_does_not_fit_is_an_error_that_says_what_to_do() {
    let lab = Lab::new();
    let cases = [
        (
            "{ kind: ppl, model: base, text: \"${text}\", max_length: 64, stride: 64 }",
            "{ kind: ppl, model: base, base: a }",
            "give it keep_log_probs: f16",
        ),
        (
            "{ kind: ppl, model: base, text: \"${text}\", max_length: 64, stride: 64, keep_log_probs: f16 }",
            "{ kind: ppl, model: base, base: a, max_length: 32 }",
            "is not the base's 64; leave it to the base stage a",
        ),
        (
            "{ kind: ppl, model: base, text: \"${text}\", max_length: 64, stride: 64, keep_log_probs: f16 }",
            "{ kind: ppl, model: other, base: a }",
            "another tokenizer",
        ),
        (
            "{ kind: ppl, model: base, text: \"${text}\", max_length: 64, stride: 64, keep_log_probs: f32, log_probs_max_gib: 0.0001 }",
            "{ kind: ppl, model: base, base: a }",
            "more than log_probs_max_gib allows",
        ),
    ];
    for (base, candidate, part) in cases {
        lab.write(
            "bad.yaml",
            &format!(
                "version: 1\nname: bad\nvars: {{ text: {{ source: experiments/data/tinystories.txt, n_chars: 2000 }} }}\nstages:\n  \
                 base: {{ kind: load, model: models/stories260k }}\n  other: {{ kind: load, model: models/tinystories-656k }}\n  \
                 a: {base}\n  b: {candidate}\n"
            ),
        );
        let (_, error) = lab.expect(3, &["run", "bad.yaml"]);
        assert!(error.contains(part), "{part} in\n{error}");
    }
    lab.write(
        "bad.yaml",
        "version: 1\nname: bad\nstages:\n  base: { kind: load, model: models/stories260k }\n  a: { kind: ppl, model: base }\n",
    );
    let (_, error) = lab.expect(2, &["validate", "bad.yaml"]);
    assert!(error.contains("neither text nor base is given"), "{error}");
}

#[test]
fn a_spelled_out_default_changes_no_key() {
    let lab = Lab::new();
    let pipeline = |more: &str| {
        format!(
            "version: 1\nname: k\nstages:\n  base: {{ kind: load, model: models/stories260k }}\n  \
             ppl: {{ kind: ppl, model: base, text: {{ source: experiments/data/tinystories.txt, n_chars: 4000 }}{more} }}\n"
        )
    };
    lab.write("k.yaml", &pipeline(""));
    lab.expect(0, &["run", "k.yaml"]);
    let first = lab.record("ppl")["key"].clone();
    lab.write("k.yaml", &pipeline(", convention: hf-strided, max_length: 512, stride: 256, keep_log_probs: none"));
    lab.expect(0, &["run", "k.yaml"]);
    assert_eq!(lab.record("ppl")["key"], first);
    assert_eq!(lab.record("ppl")["cached"], true);
}

const COMPARED: &str = r#"
version: 1
name: compared
vars: { config: { scheme: int8 }, n_chars: 6000 }
stages:
  base:   { kind: load, model: models/stories260k, dtype: f32 }
  small:  { kind: quantize, model: base, config: "${config}" }
  ppl:    { kind: ppl, model: small, text: { source: experiments/data/tinystories.txt, n_chars: "${n_chars}" } }
  decode: { kind: decode-bench, model: small, n_gen: 8, samples: 3 }
"#;

#[test]
fn compare_tells_what_lies_outside_the_noise() {
    let lab = Lab::new();
    lab.write("c.yaml", COMPARED);
    let run = |args: &[&str]| {
        lab.expect(0, &[&["run", "c.yaml"], args].concat());
        lab.run_json()["run_id"].as_str().expect("an id").to_owned()
    };
    let a = run(&[]);
    let again = run(&[]);
    let b = run(&["--set", "config={scheme: nf4}"]);
    let short = run(&["--set", "n_chars=5000"]);

    let (out, _) = lab.expect(0, &["compare", &a, &again, "--fail-on-difference"]);
    assert!(out.contains("0 within noise, 0 outside it, 0 without a verdict, 0 not comparable"), "{out}");

    let (out, _) = lab.expect(5, &["compare", &a, "results/latest", "--fail-on-difference"]);
    assert!(out.contains("not comparable"), "{out}");
    let (out, _) = lab.expect(0, &["compare", &a, &b, "--json"]);
    let found: Value = serde_json::from_str(&out).expect("JSON");
    let verdict = |metric: &str| {
        let rows = found["rows"].as_array().expect("rows");
        let row = rows
            .iter()
            .find(|row| row["metric"] == metric && row["stage"] != "base")
            .unwrap_or_else(|| panic!("no {metric}"));
        (row["verdict"].as_str().expect("a word").to_owned(), row["paired"].as_bool().expect("true or false"))
    };
    assert_eq!(verdict("perplexity"), ("outside_noise".to_owned(), true));
    assert_eq!(verdict("weights_bytes"), ("outside_noise".to_owned(), false));
    assert!(found["circumstances"].as_array().expect("a list").iter().any(|one| one["name"] == "set"), "{found}");
    lab.expect(5, &["compare", &a, &b, "--fail-on-difference"]);

    let (out, _) = lab.expect(0, &["compare", &a, &short, "--all"]);
    assert!(out.contains("not comparable"), "{out}");
    // Without the cache single tokens are gone; the two errors are taken as independent.
    std::fs::remove_dir_all(lab.path("cache")).expect("the cache");
    let (out, _) = lab.expect(0, &["compare", &a, &b, "--json"]);
    assert!(!out.contains("\"paired\": true"), "{out}");
    let (_, error) = lab.expect(2, &["compare", &a, "no-such-run"]);
    assert!(error.contains("no-such-run") && error.contains("run ids are"), "{error}");
}

#[test]
fn run_json_holds_what_repeating_the_run_takes() {
    let lab = Lab::new();
    lab.write("c.yaml", COMPARED);
    lab.expect(0, &["run", "c.yaml", "--set", "n_chars=5000", "--jobs", "1"]);
    let run = lab.run_json();
    assert_eq!((&run["command"][1], &run["command"][2]), (&Value::from("run"), &Value::from("c.yaml")));
    assert_eq!((&run["jobs"], &run["set"][0]["name"]), (&Value::from(1), &Value::from("n_chars")));
    let files = run["files"].as_object().expect("files");
    for path in [
        "models/stories260k/model.safetensors",
        "models/stories260k/tokenizer.json",
        "experiments/data/tinystories.txt",
    ] {
        let bytes = std::fs::read(lab.path(path)).expect("the file");
        assert_eq!(files[path]["blake3"], blake3::hash(&bytes).to_hex().to_string(), "{path}");
        assert_eq!(files[path]["bytes"], bytes.len() as u64, "{path}");
    }
    let plan = run["plan"].as_array().expect("the plan");
    let ppl = plan.iter().find(|stage| stage["stage"] == "ppl").expect("the stage");
    assert_eq!(ppl["params"]["text"]["n_chars"], 5000);
    assert_eq!(ppl["inputs"]["model"][0], "small");
    assert_eq!(ppl["stage_version"], 5);
    let environment = &run["environment"];
    for field in ["labpipe_version", "engine", "cpu", "n_threads", "memory_bytes", "kernel", "os_name", "variables"] {
        assert!(!environment[field].is_null(), "{field} in {environment}");
    }
    for field in ["rustc", "target", "profile", "crates"] {
        assert!(!environment["build"][field].is_null(), "{field} in {environment}");
    }
    assert!(environment["build"]["crates"]["tokenizers"].is_string());
    assert!(environment["load_average_before"].is_number() && run["load_average_after"].is_number());
    let text = serde_json::to_string(&run).expect("JSON");
    assert!(!text.contains("HF_TOKEN"), "secrets stay out");
}
