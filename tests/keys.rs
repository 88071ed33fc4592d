//! What goes into a number is what its key says: files that are edited between planning and reading, or behind the back of their
//! modification time, and configs that mean the same.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::BufRead;
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
    let scored = ["ppl-a", "ppl-b"].iter().filter(|stage| of(stage) == "done").count();
    assert_eq!((computed, scored), (1, 1), "{outcomes:?}");
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
fn what_is_edited_while_an_earlier_stage_runs_fails_its_stage_and_leaves_nothing() {
    let lab = Lab::new();
    copy(&lab, TEXT, "t.txt");
    lab.write("c.yaml", "scheme: nf4\n");
    lab.write("d.yaml", "scheme: nf4\n");
    lab.write(
        "p.yaml",
        "version: 1\nname: p\nstages:\n  m: { kind: load, model: models/stories260k }\n  \
         slow: { kind: decode-bench, model: m, n_gen: 200, samples: 20 }\n  \
         p: { kind: ppl, model: m, text: { source: t.txt, n_chars: 3000 }, max_length: 64, stride: 32, after: slow }\n  \
         q: { kind: quantize, model: m, config: c.yaml, after: slow }\n  \
         d: { kind: quantize, model: m, config: d.yaml, after: slow }\n",
    );
    let mut run = lab.command(&["run", "p.yaml", "--log-format", "plain"]);
    let mut child = run.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().expect("a run");
    let mut told = String::new();
    for line in std::io::BufReader::new(child.stderr.take().expect("its messages")).lines() {
        let line = line.expect("a line");
        // What is planned has been hashed; the files are read after this stage.
        if !told.contains("slow") && line.contains("slow") {
            lab.write("t.txt", &"Another text. ".repeat(500));
            lab.write("c.yaml", "scheme: int8\n");
            lab.write("d.yaml", "name: called otherwise\nscheme: nf4\nblock_size: 64\n");
        }
        told.push_str(&line);
        told.push('\n');
    }
    assert_eq!(child.wait().expect("its end").code(), Some(3), "{told}");
    for name in ["t.txt", "c.yaml"] {
        assert!(told.contains(&format!("read {name}: it changed while the run was going on")), "{told}");
    }
    let outcomes: BTreeMap<String, String> = lab.outcomes().into_iter().collect();
    let of = |stage: &str| outcomes[stage].as_str();
    assert_eq!((of("p"), of("q"), of("d")), ("failed", "failed", "done"), "{outcomes:?}");
    // Nothing was committed under the old keys: with the old files back the stage runs, and as they are now they run too.
    copy(&lab, TEXT, "t.txt");
    lab.expect(0, &["run", "p.yaml"]);
    let outcomes: BTreeMap<String, String> = lab.outcomes().into_iter().collect();
    let of = |stage: &str| outcomes[stage].as_str();
    assert_eq!((of("slow"), of("p"), of("q"), of("d")), ("cached", "done", "done", "cached"), "{outcomes:?}");
    let scheme = lab.record("q")["config"]["scheme"]["scheme"].clone();
    assert_eq!((scheme, lab.record("d")["config"]["name"].clone()), ("int8".into(), "called otherwise".into()));
}

#[test]
fn a_damaged_config_fails_its_own_stage_and_plan_says_so_of_none() {
    let lab = Lab::new();
    lab.write("good.yaml", "scheme: nf4\n");
    lab.write("bad.yaml", "scheme: [nf4\n");
    lab.write(
        "p.yaml",
        "version: 1\nname: p\nstages:\n  m: { kind: load, model: models/stories260k }\n  \
         good: { kind: quantize, model: m, config: good.yaml }\n  bad: { kind: quantize, model: m, config: bad.yaml }\n",
    );
    lab.expect(0, &["plan", "p.yaml"]);
    let (_, told) = lab.expect(3, &["run", "p.yaml"]);
    assert!(told.contains("bad.yaml") && lab.outcomes().contains(&("good".to_owned(), "done".to_owned())), "{told}");
}
