//! What something else that used processors or device makes of a measurement, with a scripted engine.

#[path = "support/scripted_bench.rs"]
mod scripted_bench;

use labpipe::event::Level;
use labpipe::inference::{DeviceFigures, OtherProcesses};
use scripted_bench::{Fault, Script, figures, prefill, run, script};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex};

/// Runs a prefill of one case on a host whose processors others take.
fn shared(others: &[f64], accept_disturbed: bool) -> (Value, String, Vec<(Level, String)>, String) {
    let others = Arc::new(Mutex::new(others.to_vec()));
    let script = Script { is_host: true, others, accept_disturbed, ..script(None, Fault::None) };
    let params = json!({"n_prompt": [10], "samples": 2, "warmup": 0, "seed": 0});
    let (output, notes) = run("prefill-bench", params, &script);
    let output = output.expect("a record");
    (output.body["results"][0]["disturbance"].clone(), output.summary, notes, script.log.taken())
}

#[test]
fn an_undisturbed_case_is_measured_once_and_says_what_was_seen() {
    let (seen, summary, notes, log) = shared(&[0.01], false);
    assert_eq!(
        (&seen["disturbed"], &seen["repeated"], &seen["discarded"]),
        (&Value::Null, &json!(false), &Value::Null)
    );
    assert_eq!((seen["host"]["others_cpu_share"].as_f64(), &seen["device"]), (Some(0.01), &Value::Null));
    assert!(notes.is_empty() && !summary.contains("disturbed"), "{notes:?} {summary}");
    assert_eq!(log, "prefill prefill");
}

#[test]
fn a_disturbed_case_is_measured_once_more_and_the_quiet_attempt_is_kept() {
    let (seen, summary, notes, log) = shared(&[0.5, 0.0], false);
    assert_eq!((&seen["disturbed"], &seen["repeated"]), (&Value::Null, &json!(true)));
    let discarded = &seen["discarded"];
    assert_eq!(discarded["disturbed"], "others took 1.00 of 2 CPUs");
    assert_eq!((discarded["n_samples"].as_u64(), discarded["sample_s_mean"].as_f64()), (Some(2), Some(0.5)));
    assert_eq!(seen["host"]["others_cpu_share"].as_f64(), Some(0.0));
    assert_eq!(summary, "pp10 20 t/s, 1 start, measured again, disturbed at first");
    let [(Level::Debug, _), (Level::Info, note)] = notes.as_slice() else { panic!("two notes: {notes:?}") };
    assert!(note.starts_with("measured again after a disturbance: pp10 (others took 1.00 of 2 CPUs)"), "{note}");
    assert_eq!(log, "prefill prefill wait prefill prefill");
}

#[test]
fn of_two_disturbed_attempts_the_less_disturbed_is_kept_with_a_warning() {
    for (others, kept) in [([0.5, 0.25], "0.50"), ([0.25, 0.5], "0.50")] {
        let (seen, summary, notes, log) = shared(&others, false);
        let reason = format!("others took {kept} of 2 CPUs");
        assert_eq!((seen["disturbed"].as_str(), &seen["repeated"]), (Some(reason.as_str()), &json!(true)));
        assert_eq!(seen["discarded"]["disturbed"], "others took 1.00 of 2 CPUs");
        assert!(summary.contains(&format!(", disturbed: {reason}")), "{summary}");
        assert_eq!(notes.iter().filter(|(level, _)| *level == Level::Warning).count(), 1, "{notes:?}");
        assert_eq!(log, "prefill prefill wait prefill prefill", "no third attempt");
    }
}

/// Runs a prefill of one case of three samples on processors of these speeds; the last one stays. Before the first sample fifty looks find
/// full speed.
fn slowed(speeds: &[f64], accept_disturbed: bool) -> (Value, String, String) {
    let warm = if accept_disturbed { 0 } else { 50 };
    let speeds = Arc::new(Mutex::new([vec![1.0; warm], speeds.to_vec()].concat()));
    let script = Script { is_host: true, speeds, accept_disturbed, ..script(None, Fault::None) };
    let params = json!({"n_prompt": [10], "samples": 3, "warmup": 0, "seed": 0});
    let (output, _) = run("prefill-bench", params, &script);
    let output = output.expect("a record");
    (output.body["results"][0].clone(), output.summary, script.log.taken())
}

#[test]
fn a_sample_on_a_slowed_processor_is_taken_once_more() {
    // Right after the second sample one runs at half its speed, and still does when it is looked at again; then it is back.
    let speeds = [vec![1.0, 1.0, 1.0, 0.5, 0.5], vec![1.0]].concat();
    let (row, summary, log) = slowed(&speeds, false);
    assert_eq!(log, "prefill prefill prefill prefill");
    let seen = &row["disturbance"];
    assert_eq!(
        (&row["n_samples"], &seen["n_samples_repeated"], &seen["n_samples_set_aside"]),
        (&json!(3), &json!(1), &json!(0))
    );
    assert_eq!((&seen["disturbed"], seen["host"]["processor_speed_min"].as_f64()), (&Value::Null, Some(1.0)));
    assert!(!summary.contains("disturbed"), "{summary}");
}

#[test]
fn a_sample_that_is_slowed_again_is_set_aside() {
    let back = vec![1.0; 50];
    // The second sample, the looks until the processor is back, and the same sample again.
    let speeds = [vec![1.0, 1.0, 1.0, 0.5], back, vec![1.0, 0.6, 1.0]].concat();
    let (row, _, log) = slowed(&speeds, false);
    assert_eq!(log, "prefill prefill prefill prefill");
    let seen = &row["disturbance"];
    assert_eq!((&row["n_samples"], &seen["n_samples_set_aside"]), (&json!(2), &json!(1)));
    assert_eq!(row["samples_s"].as_array().map(Vec::len), Some(2));
    assert_eq!(seen["disturbed"], Value::Null);
}

#[test]
fn where_all_samples_are_slowed_all_are_kept_and_marked() {
    let speeds = [1.0, 1.0, 1.0, 1.0, 1.0, 0.5];
    for accept_disturbed in [false, true] {
        let speeds = if accept_disturbed { &speeds[..] } else { &[0.5] };
        let (row, summary, log) = slowed(speeds, accept_disturbed);
        assert_eq!((log.as_str(), &row["n_samples"]), ("prefill prefill prefill", &json!(3)));
        assert_eq!(row["disturbance"]["disturbed"], "a processor ran at 50 % of its speed");
        assert!(summary.contains("a processor ran at 50 %"), "{summary}");
    }
}

#[test]
fn an_accepted_disturbance_is_recorded_and_neither_repeated_nor_told() {
    let (seen, summary, notes, log) = shared(&[0.5, 0.0], true);
    assert_eq!(seen["disturbed"], "others took 1.00 of 2 CPUs");
    assert_eq!((&seen["repeated"], &seen["discarded"]), (&json!(false), &Value::Null));
    assert!(notes.is_empty() && summary.contains("disturbed"), "{notes:?} {summary}");
    assert_eq!(log, "prefill prefill");
}

#[test]
fn other_processes_on_the_device_disturb_and_are_told() {
    let others = OtherProcesses { n: 2, bytes: Some(3 << 20), n_labpipe: 1, ..OtherProcesses::default() };
    let script = script(Some(DeviceFigures { others: Some(others), ..figures() }), Fault::None);
    let (output, notes) = prefill(&script);
    let output = output.expect("a record");
    assert_eq!(
        (&output.body["n_other_processes"], &output.body["other_processes_bytes"]),
        (&json!(2), &json!(3 << 20))
    );
    let seen = &output.body["results"][1]["disturbance"];
    assert_eq!(seen["disturbed"], "2 other process(es) used the device and held 3.00 MiB");
    assert_eq!((&seen["device"]["n_labpipe_processes"], &seen["repeated"]), (&json!(1), &json!(true)));
    assert_eq!(notes.iter().filter(|(level, _)| *level == Level::Warning).count(), 1, "one a stage: {notes:?}");
}
