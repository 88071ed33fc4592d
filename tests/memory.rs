//! Memory of whole runs: what a model takes, that it does not depend on what ran before, what is predicted and what a limit does.
#![cfg(all(feature = "cpu", target_os = "linux"))]

mod support;

use std::process::Stdio;
use std::time::Duration;
use support::Lab;

const PIPELINE: &str = r#"
version: 1
name: capture
stages:
  fp16:      { kind: load, random: { config: smollm2.json, seed: 1 }, dtype: f16 }
  nf4:       { kind: quantize, model: fp16, config: { scheme: nf4 } }
  acts-fp16: { kind: capture-activations, model: fp16, n_tokens: 500 }
  acts-nf4:  { kind: capture-activations, model: nf4, n_tokens: 500 }
  diff:      { kind: diff, reference: acts-fp16, candidate: acts-nf4 }
"#;

const MIB: u64 = 1 << 20;

/// Highest resident memory of a process so far (VmHWM), in bytes.
fn peak_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let field = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(field.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

#[test]
fn capture_and_diff_of_every_operation_stay_within_the_model_s_size_and_512_mib() {
    let lab = Lab::new();
    lab.write("smollm2.json", include_str!("fixtures/smollm2-135m/config.json"));
    lab.write("capture.yaml", PIPELINE);
    let mut child =
        lab.command(&["run", "capture.yaml"]).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("it starts");
    let mut peak = 0;
    let status = loop {
        peak = peak.max(peak_bytes(child.id()).unwrap_or(0));
        if let Some(status) = child.try_wait().expect("a status") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    assert!(status.success());
    let diff = lab.record("diff");
    // Embedding, final norm and head, and 12 operations in each of 30 layers.
    assert_eq!(diff["modules"].as_array().expect("rows").len(), 363);
    assert_eq!(diff["n_tokens"], 500);
    let model = lab.record("fp16")["weights_bytes"].as_u64().expect("bytes");
    assert!(model > 250 * MIB && peak > model / 4, "model {model}, peak {peak}");
    assert!(peak < model + 512 * MIB, "peak {} MiB, model {} MiB", peak / MIB, model / MIB);
}

/// Bytes of the key-value cache of stories260K in f32, a position: 2 · 5 layers · 4 heads · 8 values · 4 bytes.
const CACHE_BYTES: u64 = 2 * 5 * 4 * 8 * 4;

/// A pipeline of stages on one model, each after the one before it.
fn pipeline(stages: &[&str]) -> String {
    let mut text =
        "version: 1\nname: memory\nstages:\n  fp16: { kind: load, model: models/stories260k, dtype: f16 }\n  \
                    nf4: { kind: quantize, model: fp16, config: { scheme: nf4 } }\n"
            .to_owned();
    for (i, stage) in stages.iter().enumerate() {
        let after = stages[..i].last().map(|last| format!(", after: [{}]", last.split(':').next().unwrap_or_default()));
        let (name, body) = stage.split_once(": ").expect("name: body");
        text.push_str(&format!("  {name}: {{ {body}{} }}\n", after.unwrap_or_default()));
    }
    text
}

const LONG: &str = "long: kind: prefill-bench, model: nf4, n_prompt: [448], samples: 3, warmup: 1";
const SCORED: &str = "scored: kind: prefill-bench, model: nf4, n_prompt: [256], score: true, samples: 3, warmup: 1";
const SHORT: &str = "short: kind: decode-bench, model: nf4, n_gen: 16, n_depth: [0, 64], samples: 3, warmup: 1";

#[test]
fn memory_and_cache_are_the_same_in_every_order_of_stages() {
    let measured = |stages: &[&str]| {
        let lab = Lab::new();
        lab.write("memory.yaml", &pipeline(stages));
        lab.expect(0, &["run", "memory.yaml"]);
        let record = lab.record("short");
        let bytes = |field: &str| record[field].as_u64().expect("bytes");
        assert_eq!(bytes("kv_cache_bytes"), (64 + 16) * CACHE_BYTES, "{stages:?}");
        let parts = bytes("weights_bytes") + bytes("kv_cache_bytes") + bytes("memory_rest_bytes");
        assert_eq!(bytes("memory_bytes"), parts, "{stages:?}");
        if stages.contains(&LONG) {
            assert_eq!(lab.record("long")["kv_cache_bytes"], 448 * CACHE_BYTES, "{stages:?}");
        }
        bytes("memory_bytes") as f64
    };
    let alone = measured(&[SHORT]);
    for stages in [&[LONG, SCORED, SHORT][..], &[SHORT, LONG, SCORED], &[SCORED, SHORT, LONG]] {
        // Buffers that threads keep once they had a use for them: up to 0.4 MiB were seen.
        let difference = measured(stages) - alone;
        assert!(difference.abs() < 768.0 * 1024.0, "{stages:?}: {difference} bytes beside {alone} alone");
    }
}

#[test]
fn pages_of_mapped_weights_count_and_those_of_what_was_quantized_do_not() {
    let lab = Lab::new();
    let stages = "version: 1\nname: mapped\nstages:\n  own: { kind: load, model: models/stories260k }\n  \
                  nf4: { kind: quantize, model: own, config: { scheme: nf4 } }\n  \
                  own-speed: { kind: prefill-bench, model: own, n_prompt: [64], samples: 2 }\n  \
                  nf4-speed: { kind: prefill-bench, model: nf4, n_prompt: [64], samples: 2 }\n";
    lab.write("mapped.yaml", stages);
    lab.expect(0, &["run", "mapped.yaml"]);
    let bytes = |stage: &str, field: &str| lab.record(stage)[field].as_u64().expect("bytes");
    let page = 4096;
    let whole = bytes("own-speed", "weights_bytes");
    let mapped = bytes("own-speed", "memory_mapped_bytes");
    // Norms are copied; the file's header and the last page are beside the rest.
    assert!(mapped > whole * 9 / 10 && mapped < whole + 16 * page, "{mapped} of {whole}");
    // The embedding alone stays as the file has it; its neighbours in the file may be mapped with it.
    let mapped = bytes("nf4-speed", "memory_mapped_bytes");
    assert!(mapped < whole / 2, "{mapped} of {whole}");
}

#[test]
fn the_plan_predicts_what_is_measured() {
    let lab = Lab::new();
    lab.write("memory.yaml", &pipeline(&[LONG, SHORT]));
    let (plan, _) = lab.expect(0, &["plan", "memory.yaml", "--json"]);
    lab.expect(0, &["run", "memory.yaml"]);
    let plan: serde_json::Value = serde_json::from_str(&plan).expect("JSON");
    for stage in ["long", "short"] {
        let row = plan.as_array().expect("rows").iter().find(|row| row["stage"] == stage).expect("a row");
        let predicted = row["memory"]["peak_bytes"].as_f64().expect("bytes");
        let measured = lab.record(stage)["memory_bytes"].as_f64().expect("bytes");
        // What threads and allocator keep varies by up to 0.7 MiB, which is more than a tenth of so small a model. Larger ones are held to a
        // tenth by `.ci/extended/memory_limit.sh`.
        let allowed = (0.1 * measured).max(1024.0 * 1024.0);
        assert!((predicted - measured).abs() < allowed, "{stage}: {predicted} predicted, {measured} measured");
    }
}

#[test]
fn a_stage_beyond_the_limit_is_refused_before_anything_runs() {
    let lab = Lab::new();
    lab.write("memory.yaml", &pipeline(&[LONG]));
    let (plan, _) = lab.expect(0, &["plan", "memory.yaml", "--memory-limit", "4MiB"]);
    assert!(plan.contains("long does not fit: ") && plan.contains("lower n_prompt"), "{plan}");
    let (_, err) = lab.expect(4, &["run", "memory.yaml", "--memory-limit", "4MiB"]);
    assert!(err.contains("error: long does not fit: ") && err.contains("the limit is 4.00 MiB"), "{err}");
    assert!(!lab.path("results/memory").exists());
    lab.write("limited.yaml", &pipeline(&[LONG]).replace("stages:", "memory_limit: 4 MiB\nstages:"));
    lab.expect(4, &["run", "limited.yaml"]);
    // The command line's limit is the one that counts.
    lab.expect(0, &["run", "limited.yaml", "--memory-limit", "1GiB"]);
    // No key depends on it, and what is in the cache needs no memory.
    let (out, _) = lab.expect(0, &["run", "limited.yaml"]);
    assert!(out.contains("cached"), "{out}");
    lab.write("limited.yaml", &pipeline(&[LONG]).replace("stages:", "memory_limit: much\nstages:"));
    let (_, err) = lab.expect(2, &["run", "limited.yaml"]);
    assert!(err.contains("memory_limit: expected a size"), "{err}");
}

#[test]
fn a_worker_stops_at_the_limit_where_nothing_was_predicted() {
    let lab = Lab::new();
    let text = "text: { source: experiments/data/tinystories.txt, n_chars: 600 }";
    lab.write("memory.yaml", &pipeline(&[&format!("acts: kind: capture-activations, model: nf4, {text}")]));
    let (plan, _) = lab.expect(0, &["plan", "memory.yaml", "--memory-limit", "3MiB"]);
    assert!(plan.contains("not known: it runs the whole of its text"), "{plan}");
    let (_, err) = lab.expect(4, &["run", "memory.yaml", "--memory-limit", "3MiB"]);
    assert!(err.contains("of the memory limit of 3.00 MiB left"), "{err}");
}
