//! What benchmarks record beside their times, with a scripted engine: energy of work that is repeated for it, what the allocator held, and
//! the checks that come before and after.

#[path = "support/scripted_bench.rs"]
mod scripted_bench;

use labpipe::event::Level;
use labpipe::inference::{DeviceFigures, InferenceError};
use labpipe::stage::{StageError, StageOutput, Start};
use scripted_bench::{Fault, decode, figures, prefill, run, run_start, scoring, script, window};
use serde_json::{Value, json};

#[test]
fn a_prefill_that_scores_times_passes_to_every_tokens_likelihood() {
    let script = script(Some(figures()), Fault::None);
    let (output, _) = run("prefill-bench", scoring(json!([10, 20])), &script);
    let output = output.expect("a record");
    assert_eq!(
        script.log.taken(),
        "score10 begin score10 begin score10 end take energy score10 score10 score20 begin score20 begin score20 end take energy score20 score20"
    );
    let row = &output.body["results"][1];
    assert_eq!((row["label"].as_str(), row["scores"].as_bool()), (Some("pp20+nll"), Some(true)));
    assert_eq!((row["samples_s"].clone(), row["tokens_per_second"].as_f64()), (json!([0.25, 0.25]), Some(80.0)));
    assert_eq!(output.body["power"][1]["label"].as_str(), Some("pp20+nll"));
    let method = output.body["method"].as_str().expect("a method");
    assert!(method.contains("negative log-likelihoods"), "{method}");
    assert!(output.summary.starts_with("pp10+nll 40 t/s, 1 start"), "{}", output.summary);
}

#[test]
fn samples_are_spread_over_starts_and_their_records_become_one() {
    let catalogue = labpipe::stages::catalogue();
    for (kind, params, n_first) in [
        ("prefill-bench", json!({"n_prompt": [10, 20], "samples": 5, "warmup": 1, "seed": 0}), 3),
        ("decode-bench", json!({"n_gen": 4, "n_depth": [0, 8], "samples": 5, "warmup": 1, "seed": 0}), 3 * 4),
    ] {
        let stage = catalogue.get(kind).expect("a benchmark");
        let script = script(Some(figures()), Fault::None);
        let outputs: Vec<StageOutput> = (0..2)
            .map(|idx| run_start(kind, params.clone(), &script, Start { idx, n: 2 }).0.expect("a record"))
            .collect();
        assert_eq!(outputs[0].body["results"][0]["samples_s"].as_array().map(Vec::len), Some(n_first));
        let whole = stage.combine(outputs).expect("one record");
        let row = &whole.body["results"][1];
        let n_samples: Vec<u64> =
            row["starts"].as_array().into_iter().flatten().filter_map(|start| start["n_samples"].as_u64()).collect();
        assert_eq!(n_samples, [3, 2], "{kind}");
        // Tokens of both starts are added up; energy is read in the first.
        let power = &whole.body["power"][1];
        assert_eq!(power["n_tokens"].as_u64(), Some(if kind == "prefill-bench" { 5 * 20 } else { 5 * 4 }), "{power}");
        // The script's board takes as much for filling a context as for all of the work.
        assert_eq!(power["energy_per_token_j"].is_number(), kind == "prefill-bench", "{power}");
        assert_eq!(whole.body["pool_peak_bytes"], 200);
        assert!(whole.summary.contains("t/s, 2 starts"), "{}", whole.summary);
    }
}

#[test]
fn there_are_no_more_starts_than_samples() {
    let catalogue = labpipe::stages::catalogue();
    let params = |value: Value| value.as_object().cloned().expect("a mapping");
    for kind in ["prefill-bench", "decode-bench"] {
        let stage = catalogue.get(kind).expect("a benchmark");
        let n_starts = |value: Value, is_host: bool| stage.n_starts(&params(value), is_host);
        assert_eq!(n_starts(json!({"samples": 20, "starts": null}), true), 5);
        assert_eq!(n_starts(json!({"samples": 20, "starts": null}), false), 3);
        assert_eq!(n_starts(json!({"samples": 2, "starts": null}), true), 2);
        assert_eq!(n_starts(json!({"samples": 20, "starts": 8}), false), 8);
        let found = stage.check(&params(json!({"samples": 3, "starts": 4, "n_prompt": [8]})));
        assert_eq!(found.iter().map(|problem| problem.0).collect::<Vec<_>>(), ["starts"]);
    }
}

#[test]
fn a_prefill_that_can_not_score_says_why() {
    let (output, _) = run("prefill-bench", scoring(json!([10])), &script(None, Fault::NotFinite));
    let error = output.expect_err("no record").to_string();
    assert!(error.contains("pp10+nll"), "{error}");
    let catalogue = labpipe::stages::catalogue();
    let params = scoring(json!([1, 2])).as_object().cloned().expect("a mapping");
    let found = catalogue.get("prefill-bench").expect("the kind").check(&params);
    assert_eq!(found.first().map(|problem| problem.0), Some("n_prompt"));
}

#[test]
fn energy_is_that_of_repeated_work_over_its_tokens() {
    let (output, notes) = prefill(&script(Some(figures()), Fault::None));
    let output = output.expect("a record");
    let row = &output.body["power"][1];
    assert_eq!((row["label"].as_str(), row["n_tokens"].as_u64()), (Some("pp20"), Some(60)));
    // Two passes in 2.5 s at 300 W.
    assert_eq!((row["energy_per_token_j"].as_f64(), row["power_w_mean"].as_f64()), (Some(18.75), Some(300.0)));
    assert_eq!((row["energy_j"].as_f64(), row["energy_n_tokens"].as_u64()), (Some(750.0), Some(40)));
    assert_eq!((row["energy_n_windows"].as_u64(), row["energy_n_updates"].as_u64()), (Some(10), Some(23)));
    assert!(row["energy_per_token_j_stdev"].as_f64().is_some_and(|stdev| stdev < 1e-9), "{row}");
    assert_eq!((row["window_s"].as_f64(), row["energy_window_s"].as_f64()), (Some(0.2), Some(2.5)));
    assert_eq!((row["sm_clock_mhz_median"].as_f64(), row["power_limit_w"].as_f64()), (Some(1980.0), Some(700.0)));
    assert_eq!((&row["memory_clock_mhz_min"], &row["throttle_reasons"]), (&Value::Null, &json!(["sw_power_cap"])));
    assert_eq!(output.body["pool_peak_bytes"], 200, "asked after each of two cases");
    assert_eq!(output.body["pool_peak_method"], "scripted");
    assert!(output.summary.contains("pp10 20 t/s, 1 start, 37.500 J/token"), "{}", output.summary);
    assert!(notes.is_empty(), "{notes:?}");
}

#[test]
fn timed_passes_that_took_long_enough_are_not_repeated_for_their_energy() {
    let script = script(Some(DeviceFigures { energy: Some(window(3.0)), ..figures() }), Fault::None);
    let output = prefill(&script).0.expect("a record");
    assert!(!script.log.taken().contains("energy"));
    // Three passes of 20 tokens in 3 s at 300 W.
    assert_eq!(output.body["power"][1]["energy_per_token_j"].as_f64(), Some(15.0));
}

#[test]
fn prefills_are_one_region_and_what_fills_a_context_is_in_none() {
    let script = script(Some(figures()), Fault::None);
    prefill(&script).0.expect("a record");
    let case = "prefill begin prefill begin prefill begin prefill end take energy prefill prefill";
    assert_eq!(script.log.taken(), format!("{case} {case}"));
    decode(&script).0.expect("a record");
    let timed = "prefill decode end prefill begin decode end prefill begin decode end end take";
    let case = format!("{timed} energy prefill decode prefill decode energy prefill prefill");
    assert_eq!(script.log.taken(), format!("prefill check {case} {case}"));
}

#[test]
fn a_device_that_tells_nothing_leaves_nulls_and_no_warning() {
    let (output, notes) = decode(&script(None, Fault::None));
    let output = output.expect("a record");
    for name in ["power", "n_other_processes", "other_processes_bytes"] {
        assert_eq!(output.body.get(name), Some(&Value::Null), "{name}");
    }
    let warnings = notes.iter().filter(|(level, _)| *level == Level::Warning).count();
    assert!(warnings == 0 && !output.summary.contains("J/token"), "{notes:?} {}", output.summary);
    assert_eq!(output.body["decode_check_n_positions"], 4);
    assert_eq!(output.body["decode_check_relative_error_max"], 0.0);
    assert_eq!(output.body["decode_check_budget"], 0.02);
}

#[test]
fn a_decode_that_is_not_prefills_is_refused_before_anything_is_timed() {
    let script = script(Some(figures()), Fault::Decode);
    let error = decode(&script).0.expect_err("a mismatch");
    assert!(matches!(&error, StageError::Inference(InferenceError::DecodeMismatch { .. })), "{error}");
    assert!(error.to_string().contains("at position 2"), "{error}");
    assert_eq!(script.log.taken(), "prefill check");
}

#[test]
fn a_result_that_is_not_finite_names_the_case() {
    let error = decode(&script(None, Fault::NotFinite)).0.expect_err("not finite").to_string();
    assert_eq!(error, "compute logits (tg4): the result is not finite");
}
