//! What is given on the command line and in YAML means what it says, is bounded, and output that can't be written is told.
#![cfg(feature = "cpu")]

mod support;

use labpipe::{pipeline, stages};
use serde_json::{Value, json};
use std::fmt::Write;
use std::fs::OpenOptions;
use std::process::Stdio;
use support::{Lab, text};

fn parse(text: &str, options: &pipeline::ParseOptions) -> Result<pipeline::Pipeline, String> {
    pipeline::parse(text, "test.yaml", &stages::catalogue(), options).map_err(|error| error.render())
}

/// Parses a ppl stage with more parameters; returns its canonical parameters, or the problems.
fn ppl(params: &str, set: &[(&str, &str)]) -> Result<Value, String> {
    let file = format!(
        "version: 1\nname: t\nvars: {{ x: 1, text: a.txt }}\nstages:\n  m: {{ kind: load, model: models/stories260k }}\n  \
         p: {{ kind: ppl, model: m, {params} }}\n"
    );
    let set = set.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    let env = [("N".to_owned(), "256".to_owned()), ("TEXT".to_owned(), "007".to_owned())].into();
    let parsed = parse(&file, &pipeline::ParseOptions { set, env, ..pipeline::ParseOptions::default() })?;
    Ok(json!(parsed.stages[1].params))
}

#[test]
fn numbers_and_booleans_are_read_by_yaml_1_2() {
    for (written, value) in
        [("256.0", 256), ("2.56e2", 256), ("0400", 400), ("0x100", 256), ("0o400", 256), ("+256", 256)]
    {
        let params = ppl(&format!("text: a.txt, max_length: {written}, stride: 2"), &[]).expect("a pipeline");
        assert_eq!(params["max_length"], value, "{written}");
    }
    for (written, part) in [
        ("256.5", "found 256.5"),
        ("2_56", "write 256"),
        ("'256'", "in quotes it is a text: write 256"),
        ("99999999999999999999", "found 99999999999999999999"),
        ("-256", "found -256"),
        (".inf", "found .inf"),
        ("-0", "found -0"),
    ] {
        let error = ppl(&format!("text: a.txt, max_length: {written}, stride: 2"), &[]).expect_err(written);
        assert!(error.contains("expected a whole number") && error.contains(part), "{written}: {error}");
    }
    let gib = |written: &str| ppl(&format!("text: a.txt, log_probs_max_gib: {written}"), &[]);
    assert_eq!(gib("1e-5").expect("a pipeline")["log_probs_max_gib"], 1e-5);
    assert!(gib(".nan").expect_err("no number").contains("a finite number is wanted"));
    for word in ["yes", "on", "'true'"] {
        let error = ppl(&format!("text: a.txt, allow_short: {word}"), &[]).expect_err(word);
        assert!(error.contains("= hint: ") && error.contains("write true"), "{error}");
    }
    let text = |written: &str| ppl(&format!("text: {written}"), &[]).expect("a pipeline")["text"]["source"].clone();
    assert_eq!([text("3.10"), text("007"), text("2026-11-28"), text("yes")], ["3.10", "007", "2026-11-28", "yes"]);
}

#[test]
fn values_from_outside_are_what_takes_them() {
    for name in [
        "a b.txt",
        "tale #2.txt",
        "a: b.txt",
        "a,b.txt",
        "x=y.txt",
        "[1].txt",
        "{a}.txt",
        "it's.txt",
        "007",
        "1e3",
        "yes",
        "null",
        "true",
        "~",
        "größe.txt",
        "- x",
        "*a.txt",
        "&a.txt",
        "!x.txt",
        "%x.txt",
        "@x",
        "2026-11-28",
        " lead.txt",
        "trail.txt ",
        "a\"b.txt",
        "${x}.txt",
        "no.txt:",
        "12:30:45",
        "|",
        ">-",
        "? a",
        "0x10",
        ".nan",
        "#.txt",
        "'a'",
        "\ttab",
        "[a",
        "a]",
        "{",
        "---",
        "<<",
    ] {
        for params in ["text: \"${text}\"", "text: { source: \"${text}\", n_chars: 6 }"] {
            let found = ppl(params, &[("text", name)]).unwrap_or_else(|error| panic!("{name}: {error}"));
            assert_eq!(found["text"]["source"], name, "{params}");
        }
    }
    let max_length = |value: &str| ppl("text: a.txt, stride: 2, max_length: \"${x}\"", &[("x", value)]);
    assert_eq!(max_length("256").expect("a pipeline")["max_length"], 256);
    assert_eq!(max_length("null").expect("a pipeline")["max_length"], 512, "the default");
    let error = max_length("25.5").expect_err("no whole number");
    assert!(error.contains("found \"25.5\" (from --set x)"), "{error}");
    let convention = ppl("text: a.txt, convention: \"${x}\"", &[("x", "[disjoint, hf-strided]")]);
    assert_eq!(convention.expect("a pipeline")["convention"], json!(["disjoint", "hf-strided"]));
    let sources = ppl("text: \"${text}\"", &[("text", "[a.txt, b.txt]")]).expect("a pipeline");
    assert_eq!(sources["text"]["source"], json!(["a.txt", "b.txt"]));
    let flag = |value: &str| ppl("text: a.txt, allow_short: \"${x}\"", &[("x", value)]);
    assert_eq!(flag("true").expect("a pipeline")["allow_short"], true);
    assert!(flag("yes").expect_err("a text").contains("write true or false"));
    let env = ppl("text: \"${env:TEXT}\", stride: 2, max_length: \"${env:N}\"", &[]).expect("a pipeline");
    assert_eq!((&env["text"]["source"], &env["max_length"]), (&json!("007"), &json!(256)));
    let embedded = ppl("text: \"dir-${x}/${env:TEXT}.txt\"", &[("x", "1e3")]).expect("a pipeline");
    assert_eq!(embedded["text"]["source"], "dir-1e3/007.txt");
}

#[test]
fn variables_that_multiply_end_in_one_error_per_variable() {
    for (first, next) in [("[x]", "[\"${A}\", \"${A}\"]"), ("xxxxxxxx", "\"${A}${A}\""), ("x", "[\"${A}\"]")] {
        let mut file = format!("version: 1\nname: t\nvars:\n  v0: {first}\n");
        for i in 1..=100 {
            let _ = writeln!(file, "  v{i}: {}", next.replace('A', &format!("v{}", i - 1)));
        }
        file.push_str("stages:\n  m: { kind: load, model: models/stories260k }\n");
        let error = parse(&file, &pipeline::ParseOptions::default()).expect_err("too large");
        assert!(error.contains("makes this too large") || error.contains("deeper than 64 levels"), "{error}");
    }
}

#[test]
fn a_hundred_thousand_stages_are_parsed() {
    let mut file =
        "version: 1\nname: t\nmatrix: { v: [1, 2] }\nstages:\n  m: { kind: load, model: \"${v}\" }\n".to_owned();
    for i in 0..100_000 {
        // Named the wrong way round: each stage's input stands after it.
        let _ = writeln!(file, "  s{i}: {{ kind: load, model: x, after: s{} }}", i + 1);
    }
    file.push_str("  s100000: { kind: load, model: x, after: m }\n");
    let parsed = parse(&file, &pipeline::ParseOptions::default()).expect("a pipeline");
    assert_eq!(parsed.stages.len(), 100_003);
    assert_eq!(parsed.stages[100_002].after, ["m[v=1]", "m[v=2]"]);
    let cycle = file.replace("after: m }", "after: s0 }");
    let error = parse(&cycle, &pipeline::ParseOptions::default()).expect_err("a cycle");
    assert!(error.contains("stages form a cycle") && error.len() < 2000, "{error}");
}

#[test]
fn names_that_make_no_folder_are_found_before_anything_runs() {
    let long = "long-".repeat(60);
    let stage = "m: { kind: load, model: models/stories260k }";
    for (file, part) in [
        (format!("version: 1\nname: {long}\nstages: {{ {stage} }}\n"), "64 at most"),
        ("version: 1\nname: latest\nstages: { m: { kind: load, model: x } }\n".to_owned(), "is reserved"),
        ("version: 1\nname: 7\nstages: { m: { kind: load, model: x } }\n".to_owned(), "name: \"7\""),
        ("version: 1\nname: null\nstages: { m: { kind: load, model: x } }\n".to_owned(), "name: \"null\""),
        (format!("version: 1\nname: t\nstages: {{ {long}: {{ kind: load, model: x }} }}\n"), "64 at most"),
        (
            "version: 1\nname: t\nmatrix: { ../../v: [1] }\nstages: { m: { kind: load, model: x } }\n".to_owned(),
            "matrix variable",
        ),
    ] {
        let error = parse(&file, &pipeline::ParseOptions::default()).expect_err(part);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn files_that_are_no_utf_8_or_too_long_are_told_so() {
    let lab = Lab::new();
    let utf_16: Vec<u8> = "\u{feff}version: 1".encode_utf16().flat_map(u16::to_le_bytes).collect();
    std::fs::write(lab.path("utf16.yaml"), utf_16).expect("a file");
    std::fs::write(lab.path("latin1.yaml"), b"version: 1\nname: t # \xe9\n").expect("a file");
    for (file, part) in
        [("utf16.yaml", "it is UTF-16"), ("latin1.yaml", "line 2 is not UTF-8"), ("/dev/zero", "longer than")]
    {
        let (_, error) = lab.expect(2, &["validate", file]);
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn output_that_can_not_be_written_has_its_own_code_and_a_closed_pipe_is_no_error() {
    let lab = Lab::new();
    lab.write("x.yaml", "version: 1\nname: t\nstages:\n  m: { kind: load, model: models/stories260k }\n");
    lab.expect(0, &["run", "x.yaml"]);
    for args in [
        &["--help"][..],
        &["--version"],
        &["run", "--help"],
        &["stages"],
        &["schema"],
        &["completions", "bash"],
        &["show", "m"],
        &["show", "m", "--json"],
        &["run", "x.yaml"],
        &["plan", "x.yaml"],
        &["cache", "ls"],
        &["graph", "x.yaml"],
        &["compare", "latest", "latest"],
        &["doctor"],
    ] {
        let full = OpenOptions::new().write(true).open("/dev/full").expect("a full device");
        let output = lab.command(args).stdout(full).output().expect("labpipe starts");
        let error = text(&output.stderr);
        assert_eq!(output.status.code(), Some(6), "{args:?}: {error}");
        assert!(error.contains("failed to write to stdout") && !error.contains("panicked"), "{args:?}: {error}");
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let output = lab.command(args).stdout(Stdio::from(writer)).output().expect("labpipe starts");
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
    }
    lab.write("bad.yaml", "version: 1\nname: t\nstages:\n  m: { kind: load, model: models/stories260k }\n  p: { kind: ppl, model: m, text: bad.yaml }\n");
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let output = lab.command(&["run", "bad.yaml"]).stdout(Stdio::from(writer)).output().expect("labpipe starts");
    assert_eq!(output.status.code(), Some(3), "a failed stage is told whether or not stdout is read");
}

#[test]
fn one_scored_token_and_records_of_other_versions_are_read_as_what_they_are() {
    let lab = Lab::new();
    lab.write("one.txt", "a");
    lab.write(
        "x.yaml",
        "version: 1\nname: t\nstages:\n  m: { kind: load, model: models/stories260k }\n  p: { kind: ppl, model: m, text: one.txt, \
         max_length: 256, stride: 128, allow_short: true }\n  r: { kind: report, inputs: [m, p] }\n",
    );
    lab.expect(0, &["run", "x.yaml"]);
    let row = lab.record("p")["results"][0].clone();
    assert_eq!((&row["n_scored"], &row["nll_interval"]), (&json!(1), &Value::Null));
    lab.expect(0, &["compare", "latest", "latest"]);
    // The record as an earlier version and a later one leave it; neither's run.json need have its hash.
    let run_path = lab.path("results/latest/run.json");
    let mut run: Value = serde_json::from_slice(&std::fs::read(&run_path).expect("run.json")).expect("JSON");
    for stage in run["stages"].as_array_mut().expect("stages") {
        stage.as_object_mut().expect("a stage").remove("record_blake3");
    }
    std::fs::write(&run_path, run.to_string()).expect("a file");
    let path = lab.path("results/latest/p/record.json");
    let record: Value = serde_json::from_slice(&std::fs::read(&path).expect("a record")).expect("JSON");
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut record = record.clone();
        change(&mut record);
        std::fs::write(&path, record.to_string()).expect("a file");
        lab.expect(2, &["compare", "latest", "latest"]).1
    };
    let error = changed(&|record| {
        record["results"][0].as_object_mut().expect("a row").remove("n_scored");
    });
    assert!(error.contains("read the record of p: field results[0].n_scored: it is missing"), "{error}");
    let error = changed(&|record| record["format_version"] = json!(9));
    assert!(error.contains("format_version 9, this labpipe reads 1"), "{error}");
}
