//! Damaged models, texts and folders: one clear error each, the documented exit code, the cache whole.
#![cfg(feature = "cpu")]

mod support;

use serde_json::Value;
use std::path::Path;
use support::Lab;

const PIPELINE: &str = r#"
version: 1
name: bad
stages:
  base: { kind: load, model: broken, dtype: f32 }
  ppl:  { kind: ppl, model: base, text: text.txt, max_length: 64, stride: 64 }
"#;

/// Copies stories260K into `broken`, for the test to damage.
fn lab() -> Lab {
    let lab = Lab::new();
    std::fs::create_dir(lab.path("broken")).expect("a folder");
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k");
    for name in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(model.join(name), lab.path("broken").join(name)).expect("a copy");
    }
    lab.write("text.txt", &"Once upon a time there was a little girl. ".repeat(40));
    lab.write("bad.yaml", PIPELINE);
    lab
}

#[track_caller]
fn fails(lab: &Lab, expected: &[&str]) {
    let (_, error) = lab.expect(3, &["run", "bad.yaml"]);
    for part in expected {
        assert!(error.contains(part), "expected {part:?} in:\n{error}");
    }
    lab.expect(0, &["cache", "verify"]);
}

fn edit_config(lab: &Lab, edit: impl Fn(&mut Value)) {
    let path = lab.path("broken/config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).expect("the config")).expect("JSON");
    edit(&mut config);
    std::fs::write(&path, config.to_string()).expect("the config");
}

#[test]
fn the_undamaged_copy_runs() {
    lab().expect(0, &["run", "bad.yaml"]);
}

#[test]
fn a_missing_or_truncated_weights_file_is_named() {
    let lab = lab();
    let path = lab.path("broken/model.safetensors");
    let whole = std::fs::read(&path).expect("the weights");
    std::fs::write(&path, &whole[..whole.len() / 2]).expect("half of it");
    fails(&lab, &["base failed to read model file", "model.safetensors", "cut short"]);
    std::fs::remove_file(&path).expect("the file");
    fails(&lab, &["base failed to", "expected model.safetensors"]);
}

#[test]
fn a_lying_header_a_wrong_shape_and_an_unknown_architecture_are_named() {
    let lab = lab();
    edit_config(&lab, |config| config["intermediate_size"] = 999.into());
    fails(&lab, &["load tensor model.layers.0.mlp.gate_proj.weight", "[999, 64]", "[172, 64]"]);
    edit_config(&lab, |config| config["model_type"] = "mamba".into());
    fails(&lab, &["\"mamba\" is not known", "llama"]);
    edit_config(&lab, |config| config["model_type"] = "llama".into());
    edit_config(&lab, |config| config["intermediate_size"] = 172.into());
    let path = lab.path("broken/model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the weights");
    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    std::fs::write(&path, bytes).expect("the weights");
    fails(&lab, &["its header does not fit the file"]);
}

#[test]
fn nan_in_weights_is_found_with_its_tensor() {
    let lab = lab();
    let path = lab.path("broken/model.safetensors");
    let mut bytes = std::fs::read(&path).expect("the weights");
    let last = bytes.len() - 4;
    bytes[last..].copy_from_slice(&f32::NAN.to_le_bytes());
    std::fs::write(&path, bytes).expect("the weights");
    fails(&lab, &["ppl failed to load tensor", "NaN", "damaged"]);
}

#[test]
fn texts_and_tokenizers_that_do_not_fit_are_named() {
    let lab = lab();
    lab.write("text.txt", "");
    fails(&lab, &["ppl failed to read", "the text is empty"]);
    lab.write("text.txt", "Once upon a time");
    fails(&lab, &["less than one window", "allow_short"]);
    lab.write("bad.yaml", &PIPELINE.replace("text: text.txt", "text: { source: text.txt, n_tokens: 5000 }"));
    fails(&lab, &["n_tokens 5000 is more than the text's"]);
    lab.write("bad.yaml", &PIPELINE.replace("max_length: 64", "max_length: 4096"));
    fails(&lab, &["max_length", "more than the model's context of 512"]);
    lab.write("bad.yaml", PIPELINE);
    lab.write("text.txt", &"Once upon a time there was a little girl. ".repeat(40));
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/tinystories-656k/tokenizer.json");
    std::fs::copy(other, lab.path("broken/tokenizer.json")).expect("another tokenizer");
    fails(&lab, &["ppl failed to tokenize", "belongs to another model"]);
    lab.write("broken/tokenizer.json", "{");
    fails(&lab, &["not a readable tokenizer"]);
}

#[test]
fn decoding_beyond_the_context_is_an_error_with_both_sizes() {
    let lab = lab();
    let decode = "  ppl:  { kind: decode-bench, model: base, n_gen: 100, n_depth: [500] }\n";
    let head: String = PIPELINE.lines().filter(|line| !line.contains("ppl:")).map(|line| format!("{line}\n")).collect();
    lab.write("bad.yaml", &(head + decode));
    fails(&lab, &["n_depth", "600 tokens of context, the model has 512"]);
}

#[test]
fn an_alias_bomb_is_refused() {
    let lab = lab();
    let mut bomb = "version: 1\nname: bomb\nvars:\n  a0: &a0 [x, x, x, x, x, x, x, x, x]\n".to_owned();
    for level in 1..12 {
        bomb.push_str(&format!("  a{level}: &a{level} [{}]\n", vec![format!("*a{}", level - 1); 9].join(", ")));
    }
    lab.write("bomb.yaml", &bomb);
    let (_, error) = lab.expect(2, &["run", "bomb.yaml"]);
    assert!(error.contains("1 error in bomb.yaml"), "{error}");
}

#[test]
fn folders_that_can_not_be_written_are_named_before_anything_runs() {
    let lab = lab();
    lab.write("results", "a file where a folder should be");
    let (_, error) = lab.expect(3, &["run", "bad.yaml"]);
    assert!(error.contains("failed to create results"), "{error}");
    let (_, error) = lab.expect(3, &["run", "bad.yaml", "--cache", "/proc/nowhere"]);
    assert!(error.contains("/proc/nowhere"), "{error}");
}

#[test]
fn a_full_disk_ends_the_stage_and_leaves_the_cache_whole() {
    let lab = lab();
    lab.expect(0, &["run", "bad.yaml", "--only", "base"]);
    // A limit on file size stands for a full disk: the write fails the same way, halfway through a file.
    let capture = "  acts: { kind: capture-activations, model: base, text: text.txt, n_tokens: 200 }\n";
    lab.write("bad.yaml", &format!("{PIPELINE}{capture}"));
    let program = env!("CARGO_BIN_EXE_labpipe");
    let script = format!("trap '' XFSZ; ulimit -f 64; exec {program} run bad.yaml --until acts");
    let output = std::process::Command::new("bash")
        .args(["-c", &script])
        .current_dir(lab.path("."))
        .output()
        .expect("bash starts");
    let error = support::text(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{error}");
    assert!(error.contains("acts failed to write"), "{error}");
    lab.expect(0, &["cache", "verify"]);
    lab.expect(0, &["run", "bad.yaml", "--until", "acts"]);
}
