//! What goes into a number is what its key says: files that are edited between planning and reading, or behind the back of their
//! modification time, and configs that mean the same.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use std::path::Path;
use std::process::{Command, Stdio};
use support::Lab;

const TEXT: &str = "experiments/data/tinystories.txt";

/// Two names for one config, another that differs in the order of `keep` alone, and a report of all.
const TWINS: &str = r#"
version: 1
name: twins
stages:
  base:   { kind: load, model: models/stories260k }
  first:  { kind: quantize, model: base, config: a.yaml }
  second: { kind: quantize, model: base, config: b.yaml }
  third:  { kind: quantize, model: base, config: { scheme: nf4, keep: [layers.0, lm_head, mlp.up_proj] } }
  ppl-a:  { kind: ppl, model: first, text: { source: experiments/data/tinystories.txt, n_chars: 3000 }, max_length: 64, stride: 32 }
  ppl-b:  { kind: ppl, model: second, text: { source: [experiments/data/tinystories.txt], n_chars: 3000 }, max_length: 64, stride: 32 }
  report: { kind: report, inputs: [first, second, third, ppl-a, ppl-b] }
"#;

fn copy(lab: &Lab, from: &str, to: &str) {
    std::fs::copy(lab.path(from), lab.path(to)).expect("a copy");
}

#[test]
fn stages_whose_configs_mean_the_same_share_an_artifact_and_each_shows_its_own_name() {
    let lab = Lab::new();
    lab.write("a.yaml", "name: alpha\nscheme: nf4\nkeep: [mlp.up_proj, layers.0]\n");
    lab.write("b.yaml", "# the same\nname: beta\nload_in_4bit: true\nkeep: [0, mlp.up_proj]\n");
    lab.write("twins.yaml", TWINS);
    lab.expect(0, &["run", "twins.yaml"]);
    let outcomes = lab.outcomes();
    let of = |name: &str| outcomes.iter().find(|(stage, _)| stage == name).expect("the stage").1.clone();
    let computed = ["first", "second", "third"].iter().filter(|stage| of(stage) == "done").count();
    assert_eq!((computed, of("ppl-a"), of("ppl-b")), (1, "done".to_owned(), "cached".to_owned()), "{outcomes:?}");
    for (stage, name, file) in [("first", "alpha", "a.yaml"), ("second", "beta", "b.yaml")] {
        let record = lab.record(stage);
        assert_eq!(record["config"]["name"], name);
        assert_eq!(record["recipe"]["quantization"]["name"], name);
        assert_eq!(record["params"]["config"], file);
        assert!(record["summary"].as_str().expect("a summary").starts_with(&format!("{name}: ")), "{record}");
        assert_eq!(record["key"], lab.record("third")["key"]);
    }
    assert_eq!(lab.record("third")["config"]["name"], "inline");
    let report = std::fs::read(lab.path("results/latest/report/report.json")).expect("a report");
    let report: Value = serde_json::from_slice(&report).expect("JSON");
    let text = report.to_string();
    assert!(text.contains("\"alpha\"") && text.contains("\"beta\"") && text.contains("\"inline\""), "{text}");
    // Another name alone: nothing is computed again, and the report shows it.
    lab.write("b.yaml", "name: gamma\nscheme: nf4\nkeep: [mlp.up_proj, layers.0]\n");
    lab.expect(0, &["run", "twins.yaml"]);
    let done: Vec<String> =
        lab.outcomes().into_iter().filter(|(_, outcome)| outcome == "done").map(|(stage, _)| stage).collect();
    assert_eq!(done, ["report"]);
    assert_eq!(lab.record("second")["config"]["name"], "gamma");
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.json")).expect("a report");
    assert!(report.contains("\"gamma\"") && !report.contains("\"beta\""));
}

fn touch_as(reference: &Path, path: &Path) {
    let status = Command::new("touch").arg("-r").arg(reference).arg(path).status().expect("touch");
    assert!(status.success());
}

#[test]
fn a_text_that_is_edited_and_given_its_old_time_is_read_anew() {
    let lab = Lab::new();
    copy(&lab, TEXT, "t.txt");
    lab.write(
        "p.yaml",
        "version: 1\nname: p\nstages:\n  m: { kind: load, model: models/stories260k }\n  \
         p: { kind: ppl, model: m, text: { source: t.txt, n_chars: 3000 }, max_length: 64, stride: 32 }\n",
    );
    lab.expect(0, &["run", "p.yaml"]);
    let before = lab.record("p")["results"][0]["perplexity"].clone();
    let reference = lab.path("reference");
    std::fs::write(&reference, "").expect("a file");
    touch_as(&lab.path("t.txt"), &reference);
    let text = std::fs::read_to_string(lab.path("t.txt")).expect("the text");
    let edited: String =
        text.chars().enumerate().map(|(i, c)| if i < 1000 { c.to_ascii_uppercase() } else { c }).collect();
    assert_eq!(edited.len(), text.len());
    std::fs::write(lab.path("t.txt"), edited).expect("the text");
    touch_as(&reference, &lab.path("t.txt"));
    lab.expect(0, &["run", "p.yaml"]);
    assert_ne!(lab.record("p")["results"][0]["perplexity"], before);
    assert_eq!(lab.record("p")["cached"], false);
}

#[test]
fn a_text_that_is_edited_while_an_earlier_stage_runs_fails_its_stage_and_leaves_nothing() {
    let lab = Lab::new();
    copy(&lab, TEXT, "t.txt");
    let text = lab.path("t.txt");
    lab.write(
        "p.yaml",
        "version: 1\nname: p\nstages:\n  m: { kind: load, model: models/stories260k }\n  \
         slow: { kind: decode-bench, model: m, n_gen: 200, samples: 20 }\n  \
         p: { kind: ppl, model: m, text: { source: t.txt, n_chars: 3000 }, max_length: 64, stride: 32, after: slow }\n",
    );
    let mut run = lab.command(&["run", "p.yaml", "--log-format", "plain"]);
    let mut child = run.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("a run");
    let mut told = String::new();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stderr.take().expect("its messages")));
    for line in lines.by_ref() {
        let line = line.expect("a line");
        told.push_str(&line);
        told.push('\n');
        // What is planned has been hashed; the text is read after this stage.
        if line.contains("slow") {
            break;
        }
    }
    std::fs::write(&text, "Another text. ".repeat(500)).expect("the text");
    for line in lines {
        told.push_str(&line.expect("a line"));
        told.push('\n');
    }
    assert_eq!(child.wait().expect("its end").code(), Some(3), "{told}");
    assert!(told.contains("t.txt: it changed while the run was going on"), "{told}");
    let outcomes = lab.outcomes();
    assert!(outcomes.contains(&("p".to_owned(), "failed".to_owned())), "{outcomes:?}");
    // Nothing was committed under the old key: with the old text back the stage runs.
    copy(&lab, TEXT, "t.txt");
    lab.expect(0, &["run", "p.yaml"]);
    assert!(lab.outcomes().contains(&("p".to_owned(), "done".to_owned())));
}
