//! The cache and the results from the outside: damage, hostile manifests, gc beside runs, names, links.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use std::fs;
use std::io::BufRead;
use std::path::PathBuf;
use std::process::Stdio;
use support::Lab;

const CAPTURES: &str = r#"
version: 1
name: captures
vars: { text: { source: experiments/data/tinystories.txt, n_chars: 2000 } }
stages:
  base:    { kind: load, model: models/stories260k, dtype: f16 }
  nf4:     { kind: quantize, model: base, config: { scheme: nf4 } }
  acts-a:  { kind: capture-activations, model: base, text: "${text}", n_tokens: 12 }
  acts-b:  { kind: capture-activations, model: nf4, text: "${text}", n_tokens: 12 }
  diff:    { kind: diff, reference: acts-a, candidate: acts-b, scatter_points: 20 }
  report:  { kind: report, inputs: [diff], formats: [md] }
"#;

const MEASURED: &str = r#"
version: 1
name: measured
stages:
  base:    { kind: load, model: models/stories260k, dtype: f16 }
  nf4:     { kind: quantize, model: base, config: { scheme: nf4 } }
  decode:  { kind: decode-bench, model: nf4, n_gen: 60, samples: 4, warmup: 0 }
"#;

fn lab(text: &str) -> Lab {
    let lab = Lab::new();
    lab.write("p.yaml", text);
    lab.expect(0, &["run", "p.yaml"]);
    lab
}

fn artifact(lab: &Lab, stage: &str) -> PathBuf {
    lab.path("cache").join(lab.record(stage)["key"].as_str().expect("a key"))
}

fn flip(path: &PathBuf, byte: usize) {
    let mut bytes = fs::read(path).expect("a file");
    bytes[byte] ^= 4;
    fs::write(path, bytes).expect("damage");
}

fn outcome(lab: &Lab, stage: &str) -> String {
    lab.outcomes().into_iter().find(|(name, _)| name == stage).expect("the stage").1
}

#[test]
fn a_flipped_bit_in_a_capture_is_computed_again_before_diff_reads_it() {
    let lab = lab(CAPTURES);
    let modules = lab.record("diff")["modules"].clone();
    let damaged = artifact(&lab, "acts-b").join("activations/lm_head.output.parquet");
    fs::remove_dir_all(artifact(&lab, "diff")).expect("the diff goes");
    flip(&damaged, 700);
    let (_, told) = lab.expect(0, &["run", "p.yaml"]);
    let warned = told.lines().find(|line| line.contains("warning")).expect("a warning");
    assert!(
        warned.contains("acts-b") && warned.contains("activations/lm_head.output.parquet: its content changed"),
        "{told}"
    );
    assert_eq!((outcome(&lab, "acts-a").as_str(), outcome(&lab, "acts-b").as_str()), ("cached", "done"));
    assert_eq!(lab.record("diff")["modules"], modules);
    let verified = lab.run_json()["inputs_verified"].clone();
    assert_eq!(verified["damaged"][0]["stage"], "acts-b", "{verified}");
    lab.expect(0, &["cache", "verify"]);
    // Nothing reads the captures now: a damaged one is left alone, and a rerun that may not compute it stops before it begins.
    flip(&damaged, 700);
    lab.expect(0, &["run", "p.yaml"]);
    assert_eq!(outcome(&lab, "acts-b"), "cached");
    let (_, error) = lab.expect(2, &["rerun", "--from", "diff"]);
    assert!(error.contains("acts-b") && error.contains("--rebuild-upstream"), "{error}");
}

#[test]
fn a_record_edited_in_the_results_is_not_shown_as_the_runs() {
    let lab = Lab::new();
    lab.write(
        "p.yaml",
        "version: 1\nname: p\nstages:\n  m: { kind: load, model: models/stories260k }\n  \
         p: { kind: ppl, model: m, text: { source: experiments/data/tinystories.txt, n_chars: 1000 }, max_length: 64, stride: 64 }\n",
    );
    lab.expect(0, &["run", "p.yaml"]);
    let path = lab.path("results/latest/p/record.json");
    let text = std::fs::read_to_string(&path).expect("the record");
    std::fs::write(&path, text.replacen("\"perplexity\": ", "\"perplexity\": 1", 1)).expect("an edit");
    let (_, err) = lab.expect(3, &["show", "p", "--json"]);
    assert!(err.contains("record.json") && err.contains("not what the run wrote"), "{err}");
    let (_, err) = lab.expect(3, &["compare", "latest", "latest"]);
    assert!(err.contains("not what the run wrote"), "{err}");
    lab.expect(0, &["run", "p.yaml"]);
    lab.expect(0, &["show", "p", "--json"]);
}

#[test]
fn a_damaged_page_is_not_copied_into_the_results() {
    let lab = lab(CAPTURES);
    let page = artifact(&lab, "report").join("report.md");
    let whole = fs::read(&page).expect("a page");
    flip(&page, 40);
    lab.expect(0, &["run", "p.yaml"]);
    assert_eq!(outcome(&lab, "report"), "done");
    assert_eq!(fs::read(lab.path("results/latest/report/report.md")).expect("a page"), whole);
}

#[test]
fn a_manifest_that_names_a_file_outside_touches_nothing() {
    let lab = lab(CAPTURES);
    lab.write("precious.txt", "mine");
    let dir = artifact(&lab, "report");
    let text = fs::read_to_string(dir.join("manifest.json")).expect("a manifest");
    let mut manifest: Value = serde_json::from_str(&text).expect("JSON");
    for name in [lab.path("precious.txt").display().to_string(), "../../precious.txt".to_owned()] {
        manifest["files"][0]["name"] = name.into();
        manifest["files"][0]["bytes"] = 4.into();
        fs::write(dir.join("manifest.json"), manifest.to_string()).expect("a manifest");
        assert!(lab.expect(5, &["cache", "verify"]).0.contains("the file name"));
        lab.expect(0, &["run", "p.yaml"]);
        assert_eq!(outcome(&lab, "report"), "done");
        assert_eq!(fs::read_to_string(lab.path("precious.txt")).expect("the file"), "mine");
    }
}

#[test]
fn verify_finds_what_was_moved_and_what_was_added() {
    let lab = lab(MEASURED);
    let (moved, other) = (artifact(&lab, "nf4"), artifact(&lab, "decode"));
    fs::write(other.join("notes.txt"), "mine").expect("a file");
    let elsewhere = lab.path("cache").join("ab".repeat(32));
    fs::rename(&moved, &elsewhere).expect("moved");
    let (told, _) = lab.expect(5, &["cache", "verify"]);
    assert!(told.contains("abababababab nf4: manifest.json: it belongs to another key"), "{told}");
    assert!(told.contains("decode: notes.txt: the manifest does not list it") && told.contains("2 damaged"), "{told}");
}

#[test]
fn gc_beside_a_run_leaves_what_the_run_planned() {
    let lab = lab(MEASURED);
    // Nothing else refers to the artifacts.
    fs::remove_dir_all(lab.path("results/measured")).expect("the run");
    let mut child = lab
        .command(&["run", "p.yaml", "--remeasure"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("labpipe starts");
    let mut lines = std::io::BufReader::new(child.stderr.take().expect("its stderr")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with("start  decode")), "the run never began");
    let (told, _) = lab.expect(0, &["cache", "gc"]);
    assert!(told.contains("removed 0 ") && told.contains("3 of them in use"), "{told}");
    lines.for_each(drop);
    assert!(child.wait().expect("its end").success());
    let (told, _) = lab.expect(0, &["cache", "gc"]);
    assert!(told.contains("removed 0 ") && !told.contains("in use"), "{told}");
}

#[test]
fn gc_refuses_over_one_damaged_run_json_and_a_budget_removes_all_the_same() {
    let lab = lab(MEASURED);
    let run = lab.path("results/latest/run.json");
    let whole = fs::read(&run).expect("run.json");
    fs::write(&run, &whole[..whole.len() / 2]).expect("cut");
    let (_, error) = lab.expect(5, &["cache", "gc"]);
    assert!(error.contains("run.json") && error.contains("nothing was removed"), "{error}");
    fs::write(&run, &whole).expect("mended");
    assert!(lab.expect(0, &["cache", "gc", "--max-size", "1GiB"]).0.contains("removed 0 "));
    let (told, _) = lab.expect(0, &["cache", "gc", "--max-size", "0", "--dry-run"]);
    assert!(
        told.contains("would remove 3 ") && told.contains("a measurement: repeating it gives other numbers"),
        "{told}"
    );
    assert!(lab.expect(0, &["cache", "gc", "--max-size", "0"]).0.contains("removed 3 "));
    assert!(lab.expect(2, &["cache", "gc", "--max-size", "lots"]).1.contains("20GiB"));
}

#[test]
fn gc_counts_the_runs_of_every_results_folder() {
    let lab = lab(MEASURED);
    lab.expect(0, &["run", "p.yaml", "--results", "other"]);
    fs::remove_dir_all(lab.path("results/measured")).expect("the run");
    assert!(lab.expect(0, &["cache", "gc"]).0.contains("removed 0 "));
    fs::remove_dir_all(lab.path("other")).expect("the other results");
    let (_, error) = lab.expect(5, &["cache", "gc"]);
    assert!(error.contains("/other"), "{error}");
    assert!(lab.expect(0, &["cache", "gc", "--force"]).0.contains("removed 3 "));
    lab.expect(0, &["cache", "gc"]);
}

#[test]
fn a_latest_that_is_a_folder_stays_and_show_takes_the_newest_run() {
    let lab = lab(MEASURED);
    let latest = lab.path("results/latest");
    fs::remove_file(&latest).expect("the link");
    fs::create_dir(&latest).expect("a folder");
    let (_, told) = lab.expect(0, &["run", "p.yaml"]);
    assert!(told.contains("warning") && told.contains("results/latest is not a link that labpipe made"), "{told}");
    assert!(latest.is_dir() && !latest.is_symlink());
    assert_eq!(lab.record("decode")["cached"], true);
}

#[test]
fn names_that_lead_out_of_the_results_or_share_a_folder_are_refused() {
    let lab = Lab::new();
    let stages = "stages: { m: { kind: load, model: models/stories260k } }\n";
    let load = "{ kind: load, model: models/stories260k }";
    for (text, expected) in [
        (format!("version: 1\nname: latest\n{stages}"), "p.yaml:2:7"),
        (format!("version: 1\nname: Latest\n{stages}"), "reserved"),
        (format!("version: 1\nname: ../x\n{stages}"), "letters, digits"),
        (format!("version: 1\nname: t\nmatrix: {{ ../../x: [a] }}\n{stages}"), "matrix variable"),
        (format!("version: 1\nname: t\nstages: {{ ppl: {load}, PPL: {load} }}\n"), "differ in case only"),
    ] {
        lab.write("p.yaml", &text);
        let (_, error) = lab.expect(2, &["validate", "p.yaml"]);
        assert!(error.contains(expected), "{text}\n{error}");
    }
    lab.expect(2, &["run", "p.yaml", "--jobs", "1025"]);
}

#[test]
fn cells_of_long_and_odd_values_have_folders_of_their_own() {
    let lab = Lab::new();
    let long = "long-description-of-a-text-".repeat(12);
    let values =
        [format!("{long}1"), format!("{long}2"), "..".to_owned(), "A".to_owned(), "a".to_owned(), "x:y?".to_owned()];
    let list: Vec<String> = values.iter().map(|value| format!("{value:?}")).collect();
    lab.write(
        "p.yaml",
        &format!(
            "version: 1\nname: odd\nmatrix: {{ note: [{}] }}\nstages:\n  m: {{ kind: load, model: models/stories260k }}\n  \
             p: {{ kind: ppl, model: m, text: {{ source: experiments/data/tinystories.txt, n_chars: 1000, join: \"${{note}}\" }}, \
             max_length: 64, stride: 64 }}\n  r: {{ kind: report, inputs: [p], formats: [md] }}\n",
            list.join(", ")
        ),
    );
    lab.expect(0, &["run", "p.yaml"]);
    let run = fs::canonicalize(lab.path("results/latest")).expect("a run");
    let folders = fs::read_dir(&run).expect("a folder").filter_map(Result::ok);
    let cells: Vec<String> = folders.map(|entry| entry.file_name().to_string_lossy().to_lowercase()).collect();
    let unique: std::collections::BTreeSet<&String> = cells.iter().filter(|name| name.starts_with("note=")).collect();
    assert_eq!(unique.len(), values.len(), "{cells:?}");
    let addresses: Vec<String> =
        lab.outcomes().into_iter().map(|(stage, _)| stage).filter(|s| s.starts_with("p[")).collect();
    assert_eq!(addresses.len(), values.len());
    for address in addresses {
        assert_eq!(lab.record(&address)["stage"], address.as_str());
    }
    lab.expect(0, &["run", "p.yaml", "--matrix", &format!("note={long}2")]);
}

/// Compiles the library that makes calls fail; labpipe's own build needs a C compiler too.
fn shim(lab: &Lab) -> PathBuf {
    let source = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/support/shim.c");
    let library = lab.path("shim.so");
    let args = ["-shared", "-fPIC", "-w", "-o"];
    let compiled = std::process::Command::new("cc").args(args).arg(&library).arg(source).arg("-ldl").status();
    assert!(compiled.expect("cc starts").success());
    library
}

#[test]
fn a_file_system_without_locks_links_or_fsync_gets_one_warning_and_the_same_results() {
    let lab = lab(CAPTURES);
    let modules = lab.record("diff")["modules"].clone();
    let library = shim(&lab);
    // ENOSYS, ENOLCK; EPERM; EINVAL, EOPNOTSUPP.
    for (spec, named) in [
        ("flock:38", "no locks"),
        ("flock:37", "no locks"),
        ("symlink:1", "latest"),
        ("fsync:22", "sync"),
        ("fsync:95", "sync"),
    ] {
        for folder in ["cache", "results"] {
            fs::remove_dir_all(lab.path(folder)).expect("a folder");
        }
        let with_shim = |args: &[&str]| {
            let output =
                lab.command(args).env("LD_PRELOAD", &library).env("SHIM_FAIL", spec).output().expect("labpipe starts");
            assert!(output.status.success(), "{spec}: {}", support::text(&output.stderr));
            support::text(&output.stderr)
        };
        let told = with_shim(&["run", "p.yaml"]);
        let warnings: Vec<&str> = told.lines().filter(|line| line.contains("warning")).collect();
        assert!(matches!(warnings[..], [one] if one.contains(named)), "{spec}: {told}");
        assert_eq!(lab.record("diff")["modules"], modules, "{spec}");
        with_shim(&["run", "p.yaml"]);
        assert_eq!(lab.record("diff")["cached"], true, "{spec}");
        with_shim(&["cache", "verify"]);
        with_shim(&["cache", "gc"]);
        assert!(fs::read_dir(lab.path("cache/runs")).expect("a folder").next().is_none(), "{spec}");
    }
}

#[test]
fn a_kill_before_any_call_that_changes_the_disk_loses_no_measurement() {
    let lab = lab(&MEASURED.replace("n_gen: 60, samples: 4", "n_gen: 2, samples: 1"));
    let library = shim(&lab);
    let mut n_killed = 0;
    for call in (1..90).step_by(4) {
        let status = lab
            .command(&["run", "p.yaml", "--remeasure", "--quiet"])
            .env("LD_PRELOAD", &library)
            .env("SHIM_KILL", call.to_string())
            .stdout(Stdio::null())
            .status()
            .expect("labpipe starts");
        n_killed += usize::from(status.code().is_none());
        let (plan, _) = lab.expect(0, &["plan", "p.yaml"]);
        assert!(plan.contains("0 of 3 stages would run"), "killed before call {call}:\n{plan}");
    }
    assert!(n_killed > 10, "{n_killed} runs were killed");
    lab.expect(0, &["cache", "verify"]);
    lab.expect(0, &["cache", "gc"]);
    assert!(fs::read_dir(lab.path("cache/tmp")).expect("a folder").next().is_none());
    assert!(fs::read_dir(lab.path("cache/runs")).expect("a folder").next().is_none());
}
