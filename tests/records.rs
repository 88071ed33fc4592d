//! Records are read as they are written: infinite, NaN and null included, and what can't be read is named.

use labpipe::artifact::{
    BlockInterval, CaptureRecord, CapturedTensor, DecodeRecord, DecodeResult, DiffRecord, DivergenceResult, ModuleDiff,
    PowerResult, PplRecord, PplResult, PrefillRecord, PrefillResult, QuantizedModule, Record, RecordBody, ReportRecord,
    ReportedFile,
};
use labpipe::inference::{LoadRecord, QuantizeRecord};
use proptest::prelude::*;
use serde_json::{Map, Value, json};

fn head(kind: &str) -> Value {
    json!({
        "format_version": 1, "pipeline": "p", "run_id": "r", "produced_by_run": "r", "stage": "s", "kind": kind,
        "key": "0".repeat(64), "cached": false, "started_at": "2026-01-02T03:04:05Z", "duration_s": 0.5,
        "device": null, "params": {},
    })
}

/// Writes a body as a whole record to text and reads it again.
fn round_trip<T: RecordBody>(body: &T) -> Map<String, Value> {
    let mut value = head(T::KIND);
    for (name, field) in body.to_fields() {
        value[name] = field;
    }
    let text = serde_json::to_string_pretty(&value).expect("JSON");
    let record = Record::from_json(serde_json::from_str(&text).expect("JSON")).expect("a record");
    record.read::<T>().expect("a body").to_fields()
}

/// Fills a body with what comes from `fields`: its own type says which fields it needs.
fn filled<T: RecordBody>(fields: Value) -> T {
    serde_json::from_value(fields).expect("a body")
}

fn memory(fields: Value) -> Value {
    let mut all = json!({
        "power": null, "n_other_processes": null, "other_processes_bytes": null, "weights_bytes": 1,
        "kv_cache_bytes": null, "pool_peak_bytes": null, "process_peak_bytes": null, "process_peak_method": "m",
        "method": "m", "clock": "c", "engine": "e", "compute_dtype": "f32",
    });
    for (name, field) in fields.as_object().expect("an object") {
        all[name] = field.clone();
    }
    all
}

fn interval(n: f64, o: Option<f64>) -> Option<BlockInterval> {
    o.map(|end| BlockInterval {
        value: n,
        low: end,
        high: n,
        stderr: end,
        n_tokens: 1,
        n_documents: 1,
        n_blocks: 2,
        block_tokens: 128,
        lag1_correlation: None,
        method: "m".to_owned(),
    })
}

fn ppl_row(n: f64, o: Option<f64>) -> PplResult {
    PplResult {
        convention: "hf-strided".to_owned(),
        max_length: 512,
        stride: 256,
        n_tokens: 2,
        n_windows: 1,
        n_scored: 1,
        bos: "none".to_owned(),
        text_hash: "a".to_owned(),
        tokenizer_hash: "b".to_owned(),
        nll_mean: n,
        perplexity: n,
        nll_interval: interval(n, o),
        perplexity_interval: interval(n, o),
        stderr: o,
        nll_stderr: o,
        llama_cpp_stderr: o,
        n_documents: None,
        n_words: Some(0),
        n_bytes: None,
        word_perplexity: o,
        word_perplexity_interval: None,
        word_perplexity_stderr: o,
        byte_perplexity: o,
        byte_perplexity_interval: interval(n, o),
        byte_perplexity_stderr: None,
        bits_per_byte: o,
        bits_per_byte_interval: interval(n, o),
        bits_per_byte_stderr: o,
    }
}

fn ppl(results: Vec<PplResult>, divergence: Option<Vec<DivergenceResult>>, n: f64) -> PplRecord {
    PplRecord {
        results,
        base: divergence.as_ref().map(|_| "base".to_owned()),
        divergence,
        log_probs: None,
        token_scores: Vec::new(),
        n_tokens_run: 0,
        scoring_s: n,
        scoring_tokens_per_second: None,
        scoring_method: "m".to_owned(),
        compute_dtype: labpipe::units::DType::F16,
    }
}

fn any_number() -> impl Strategy<Value = f64> {
    prop_oneof![
        Just(f64::INFINITY),
        Just(f64::NEG_INFINITY),
        Just(f64::NAN),
        Just(0.0),
        Just(-0.0),
        Just(f64::MAX),
        Just(f64::MIN_POSITIVE),
        // serde_json reads some numbers of 17 digits to the neighbour, as long as its float_roundtrip is off.
        proptest::num::f64::NORMAL.prop_filter("read exactly by serde_json", |value| {
            serde_json::from_str::<f64>(&json!(value).to_string()).is_ok_and(|read| read == *value)
        }),
    ]
}

proptest! {
    #[test]
    fn every_body_is_read_as_it_is_written(
        n in any_number(),
        m in any_number(),
        o in proptest::option::of(any_number()),
        rows in 0usize..3,
    ) {
        let number = |value: f64| labpipe::units::non_finite(value).map_or_else(|| json!(value), |word| json!(word));
        let (nv, ov) = (number(n), o.map_or(Value::Null, number));
        let list = |row: Value| Value::from(vec![row; rows]);
        let power = json!({
            "label": "pp1", "n_tokens": 0, "energy_per_token_j": ov, "energy_j": nv, "window_s": nv, "power_w_mean": ov,
            "power_limit_w": null, "sm_clock_mhz_min": null, "sm_clock_mhz_median": ov, "memory_clock_mhz_min": null,
            "memory_clock_mhz_median": null, "n_samples": 0, "throttle_reasons": [], "energy_method": "m",
        });
        let disturbance = json!({
            "disturbed": "r", "repeated": true,
            "discarded": { "disturbed": null, "n_samples": 1, "sample_s_mean": nv },
            "host": {
                "window_s": nv, "n_cpus": 2, "others_cpu_share": ov, "labpipe_cpu_share": nv, "steal_share": ov, "waiting_share": null,
                "involuntary_switches_per_s": ov, "load_average": nv, "cpu_pressure_share": null, "cpu_mhz_min": ov,
                "cpu_mhz_median": nv, "n_thermal_events": 1,
            },
            "device": {
                "sm_clock_mhz_median": ov, "sm_clock_mhz_max": null, "n_samples": 1, "throttle_reasons": ["hw_slowdown"],
                "n_other_processes": 1, "other_processes_bytes": null, "others_utilization": ov, "n_labpipe_processes": 0,
            },
        });
        let prefill = json!({
            "disturbance": disturbance, "label": "pp1", "n_prompt": 1, "scores": false, "n_samples": 2, "samples_s": [nv, number(m)], "ttft_s_mean": nv,
            "ttft_s_stdev": ov, "ttft_s_median": nv, "ttft_s_p90": nv, "ttft_s_p95": ov, "ttft_s_p99": ov, "ttft_s_min": nv,
            "ttft_s_max": nv, "tokens_per_second": number(m), "tokens_per_second_low": ov, "tokens_per_second_high": nv,
            "starts": [{ "n_samples": 2, "tokens_per_second": number(m) }],
        });
        let decode = json!({
            "label": "tg1", "n_gen": 1, "n_depth": 0, "n_sequences": 1, "token_latency_s_mean": nv,
            "token_latency_s_stdev": ov, "token_latency_s_median": nv, "token_latency_s_p90": nv,
            "token_latency_s_p95": ov, "token_latency_s_p99": ov, "token_latency_s_min": nv, "token_latency_s_max": nv,
            "samples_s": [nv], "tokens_per_second": number(m), "tokens_per_second_low": ov, "tokens_per_second_high": nv,
            "starts": [{ "n_samples": 1, "tokens_per_second": number(m) }],
        });
        let checks = memory(json!({
            "results": list(decode), "power": list(power), "decode_check_n_positions": 1,
            "decode_check_relative_error_max": nv, "decode_check_budget": nv,
        }));
        let prefill: PrefillRecord = filled(memory(json!({ "results": list(prefill) })));
        let decode: DecodeRecord = filled(checks);
        let diverged = DivergenceResult { kl_mean: n, kl_mean_interval: interval(n, o), ppl_ratio: m, kl_p99: o, ..DivergenceResult::default() };
        let ppl = ppl(vec![ppl_row(n, o); rows], o.map(|_| vec![diverged; rows]), m);
        let module = ModuleDiff {
            module: "lm_head".to_owned(), layer_idx: None, op: "lm_head".to_owned(), n_tokens: 1, mse: n, cosine: m,
            cosine_p01: n, sqnr_db: o, rel_frobenius: o, max_abs_diff: n, ref_mean_abs: n, ref_max_abs: m,
        };
        let diff = DiffRecord {
            mode: "cumulative".to_owned(), n_tokens: 0, only_in_reference: vec![], only_in_candidate: vec!["x".to_owned()],
            modules: vec![module; rows],
        };
        let pairs = [
            (round_trip(&prefill), prefill.to_fields()),
            (round_trip(&decode), decode.to_fields()),
            (round_trip(&ppl), ppl.to_fields()),
            (round_trip(&diff), diff.to_fields()),
        ];
        for (read, written) in pairs {
            prop_assert_eq!(read, written);
        }
        // Null is what could not be measured, and nothing else.
        let text = serde_json::to_string(&ppl.to_fields()).expect("JSON");
        prop_assert_eq!(text.contains("\"nll_interval\":null"), rows > 0 && o.is_none());
        prop_assert_eq!(number(n).is_null(), false);
        let again: PplResult = serde_json::from_value(json!(ppl_row(n, o))).expect("a row");
        prop_assert!(again.perplexity.to_bits() == n.to_bits() || (n.is_nan() && again.perplexity.is_nan()));
    }
}

#[test]
fn bodies_without_odd_numbers_are_read_as_they_are_written() {
    let tensor = CapturedTensor {
        module: "m".to_owned(),
        port: "output".to_owned(),
        layer_idx: Some(3),
        op: "norm".to_owned(),
        order: 0,
        n_tokens: 0,
        width: 64,
        file: "f".to_owned(),
    };
    for text_hash in [None, Some("h".to_owned())] {
        let capture = CaptureRecord {
            n_tokens: 0,
            tokens_hash: "t".to_owned(),
            text_hash,
            activations_bytes: u64::MAX,
            compute_dtype: labpipe::units::DType::Bf16,
            tensors: vec![tensor.clone()],
        };
        assert_eq!(round_trip(&capture), capture.to_fields());
    }
    let files = vec![ReportedFile { path: "report.md".to_owned(), bytes: 0 }];
    let report = ReportRecord { files, missing_inputs: vec![] };
    assert_eq!(round_trip(&report), report.to_fields());
    let module = json!({
        "module": "m", "scheme": "nf4", "block_size": null, "double_quant": true, "n_params": 1, "bits_per_weight": 4.5,
        "bytes": 1, "weight_mse": "inf", "weight_sqnr_db": "-inf",
    });
    let read: QuantizedModule = serde_json::from_value(module.clone()).expect("a row");
    assert_eq!(json!(read), module);
    let recipe = json!({ "source": { "path": "m" }, "dtype": "f16", "compute_dtype": null, "quantization": null });
    let model = json!({
        "family": "llama", "n_layers": 1, "hidden_size": 8, "n_heads": 1, "n_kv_heads": 1, "vocab_size": 9, "n_ctx_max": 2,
        "n_params": u64::MAX, "tied_embeddings": false, "dtype": "f16", "compute_dtype": "f32",
        "linears": [["lm_head", [9, 8]]], "tokenizer_dir": null, "bos_token_id": null,
    });
    let load: LoadRecord = filled(json!({ "recipe": recipe, "model": model }));
    assert_eq!((&load.account, load.weights_bytes, &load.hub), (&None, None, &None), "absent is not 0");
    assert_eq!(round_trip(&load), load.to_fields());
    let quantize: QuantizeRecord = filled(json!({
        "recipe": recipe, "model": model, "weights_bytes": 1, "modules": [read],
        "config": { "name": "c", "scheme": null, "compute_dtype": null, "keep": [], "overrides": [] },
        "totals": {
            "n_quantized": 0, "n_kept": 1, "quantized_params": 0, "quantized_bytes": 0, "quantized_bits_per_weight": null,
            "weights_bytes": 1, "base_bytes": 0, "bits_per_weight": "inf",
        },
    }));
    assert_eq!(round_trip(&quantize), quantize.to_fields());
    assert!(serde_json::from_value::<PowerResult>(json!({})).is_err());
    assert!(serde_json::from_value::<(PrefillResult, DecodeResult)>(json!([{}, {}])).is_err());
}

/// Returns why a changed ppl record can't be read.
fn complaint(change: impl FnOnce(&mut Value)) -> String {
    let mut value = head("ppl");
    for (name, field) in ppl(vec![ppl_row(1.0, None); 3], None, 1.0).to_fields() {
        value[name] = field;
    }
    change(&mut value);
    let read = Record::from_json(value).and_then(|record| record.read::<PplRecord>());
    read.map(|_| String::new()).unwrap_or_else(|error| error.to_string())
}

#[test]
fn a_null_of_an_earlier_version_is_nan_and_a_missing_optional_is_null() {
    let read = |text: &str| serde_json::from_str::<PplResult>(text);
    let mut row = json!(ppl_row(1.0, Some(2.0)));
    row["perplexity"] = Value::Null;
    row.as_object_mut().expect("an object").remove("nll_interval");
    let row = read(&row.to_string()).expect("a row");
    assert!(row.perplexity.is_nan() && row.nll_interval.is_none() && row.llama_cpp_stderr == Some(2.0));
}

#[test]
fn what_can_t_be_read_is_named_down_to_the_field() {
    assert_eq!(complaint(|_| {}), "");
    let has = |change: fn(&mut Value), text: &str| {
        let found = complaint(change);
        assert!(found.starts_with(&format!("read the record of s: {text}")), "{found}");
    };
    let remove = |value: &mut Value, name: &str| {
        value.as_object_mut().expect("an object").remove(name);
    };
    let found = complaint(|value| remove(&mut value["results"][1], "n_scored"));
    assert!(found.contains("field results[1].n_scored: it is missing"), "{found}");
    let found = complaint(|value| remove(value, "results"));
    assert!(found.contains("field results: it is missing"), "{found}");
    let found = complaint(|value| remove(value, "key"));
    assert!(found.contains("field key: it is missing"), "{found}");
    has(
        |value| value["results"][2]["perplexity"] = json!("huge"),
        "field results[2].perplexity: expected a number, \"inf\"",
    );
    has(|value| value["results"][2]["n_tokens"] = json!(-1), "field results[2].n_tokens: expected a whole number");
    has(|value| value["results"] = json!({}), "field results: expected a list");
    has(|value| value["format_version"] = json!(2), "it has format_version 2, this labpipe reads 1; it is newer");
    has(
        |value| value["format_version"] = json!(0),
        "it has format_version 0, this labpipe reads 1; run the stage again",
    );
    has(|value| value["kind"] = json!("diff"), "it is one of kind diff, not ppl");
}
