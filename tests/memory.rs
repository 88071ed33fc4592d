//! Memory of whole runs: what a model of SmolLM2-135M's shape takes beside its own weights.
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
