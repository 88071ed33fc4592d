//! Real processes: killed at random moments, two on one cache, stopped by a signal.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use std::collections::BTreeMap;
use std::io::BufRead;
use std::process::Stdio;
use std::time::Duration;
use support::Lab;

const PIPELINE: &str = "pipelines/sensitivity.yaml";

/// The key of every committed artifact with the run that made it, by stage.
fn committed(lab: &Lab) -> BTreeMap<String, (String, String)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(lab.path("cache")).into_iter().flatten().filter_map(Result::ok) {
        let Ok(bytes) = std::fs::read(entry.path().join("record.json")) else { continue };
        if !entry.path().join("manifest.json").is_file() {
            continue;
        }
        let record: Value = serde_json::from_slice(&bytes).expect("a whole record");
        let text = |field: &str| record[field].as_str().expect("a text").to_owned();
        found.insert(text("stage"), (text("key"), text("produced_by_run")));
    }
    found
}

/// Numbers that do not depend on the clock.
fn results(lab: &Lab) -> Vec<Value> {
    ["ppl-fp16", "ppl-nf4", "diff"]
        .iter()
        .map(|stage| {
            let record = lab.record(stage);
            if *stage == "diff" { record["modules"].clone() } else { record["results"].clone() }
        })
        .collect()
}

#[test]
fn ten_kills_and_one_more_run_give_the_same_results_with_nothing_computed_twice() {
    let undisturbed = Lab::new();
    undisturbed.expect(0, &["run", PIPELINE]);
    let lab = Lab::new();
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let mut first_made: BTreeMap<String, (String, String)> = BTreeMap::new();
    for _ in 0..10 {
        let mut child = lab
            .command(&["run", PIPELINE, "--set", "n_gen=16"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("labpipe starts");
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        std::thread::sleep(Duration::from_millis(20 + (state >> 33) % 900));
        child.kill().expect("a signal");
        child.wait().expect("its end");
        for (stage, made) in committed(&lab) {
            let before = first_made.entry(stage.clone()).or_insert_with(|| made.clone());
            assert_eq!(*before, made, "{stage} was computed twice");
        }
    }
    lab.expect(0, &["run", PIPELINE, "--set", "n_gen=16"]);
    for (stage, made) in committed(&lab) {
        let before = first_made.entry(stage.clone()).or_insert_with(|| made.clone());
        assert_eq!(*before, made, "{stage} was computed twice");
    }
    assert_eq!(results(&lab), results(&undisturbed));
    lab.expect(0, &["cache", "verify"]);
    // What the killed runs left aside is found and removed; what was committed stays.
    lab.expect(0, &["cache", "gc"]);
    lab.expect(0, &["run", PIPELINE, "--set", "n_gen=16"]);
    assert!(lab.outcomes().iter().all(|(_, outcome)| outcome == "cached"), "{:?}", lab.outcomes());
}

#[test]
fn two_processes_on_one_cache_compute_each_stage_once() {
    let lab = Lab::new();
    let start = || {
        lab.command(&["run", PIPELINE, "--log-format", "json"])
            .env("SAVE_EVAL_RESULTS", "1")
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
    };
    let (first, second) = (start().expect("one starts"), start().expect("another starts"));
    let mut done: BTreeMap<String, usize> = BTreeMap::new();
    for child in [first, second] {
        let output = child.wait_with_output().expect("its end");
        assert!(output.status.success(), "{}", support::text(&output.stderr));
        for line in support::text(&output.stderr).lines() {
            let event: Value = serde_json::from_str(line).expect("an event");
            if event["event"] == "stage_finished" && event["outcome"] == "done" {
                *done.entry(event["stage"].as_str().expect("a stage").to_owned()).or_default() += 1;
            }
        }
    }
    assert_eq!(done.len(), 12, "{done:?}");
    assert!(done.values().all(|n| *n == 1), "{done:?}");
    // Both ended at about the same time, and both appended a row for each of the two models under one header.
    let csv = std::fs::read_to_string(lab.path("results/metrics.csv")).expect("metrics.csv");
    let lines: Vec<&str> = csv.lines().collect();
    assert_eq!(lines.iter().filter(|line| line.starts_with("ts,model,")).count(), 1, "{csv}");
    // A row of another length than the header is an error of the reader's.
    let rows: Vec<csv::StringRecord> = csv::Reader::from_reader(csv.as_bytes())
        .records()
        .collect::<Result<_, _>>()
        .unwrap_or_else(|error| panic!("{error}\n{csv}"));
    assert!(lines.len() == 5 && rows.len() == 4, "{csv}");
}

#[test]
fn an_interrupt_stops_cleanly_and_says_how_to_go_on() {
    let lab = Lab::new();
    let mut child = lab
        .command(&["run", PIPELINE, "--set", "n_gen=60"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("labpipe starts");
    // The first stage that takes its time has begun: the run is well under way.
    let mut lines = std::io::BufReader::new(child.stderr.take().expect("its stderr")).lines().map_while(Result::ok);
    assert!(lines.any(|line| line.starts_with("start  prefill-fp16")), "the run never began");
    let kill =
        std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().expect("kill starts");
    assert!(kill.success());
    let told: Vec<String> = lines.collect();
    let output = child.wait_with_output().expect("its end");
    assert_eq!(output.status.code(), Some(130), "{told:?}");
    let said = support::text(&output.stdout);
    assert!(
        said.contains(&format!("to go on from the last committed stage:\nlabpipe run {PIPELINE} --set n_gen=60\n")),
        "{said}"
    );
    assert!(told.iter().any(|line| line.contains("stopping at the next step")), "{told:?}");
    assert_eq!(lab.run_json()["status"], "cancelled");
    lab.expect(0, &["run", PIPELINE]);
}
