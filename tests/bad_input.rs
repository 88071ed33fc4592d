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
    fails(&lab, &["base failed to load tensor", "NaN", "damaged"]);
    // Told once, by the stage that names the model; what needs it is skipped.
    assert_eq!(lab.outcomes(), [("base".to_owned(), "failed".to_owned()), ("ppl".to_owned(), "skipped".to_owned())]);
}

/// Puts another stage in the place of `ppl`.
fn with_stage(lab: &Lab, stage: &str) {
    let head: String = PIPELINE.lines().filter(|line| !line.contains("ppl:")).map(|line| format!("{line}\n")).collect();
    lab.write("bad.yaml", &format!("{head}  {stage}\n"));
}

#[test]
fn shards_that_are_missing_or_not_what_the_index_says_are_named() {
    let lab = lab();
    let folder = lab.path("broken");
    std::fs::rename(folder.join("model.safetensors"), folder.join("model-00001-of-00002.safetensors")).expect("a name");
    let index = folder.join("model.safetensors.index.json");
    let write = |shard: &str| {
        let map = format!("{{\"weight_map\": {{\"model.norm.weight\": \"{shard}\"}}}}");
        std::fs::write(&index, map).expect("an index");
    };
    write("model-00001-of-00002.safetensors");
    lab.expect(0, &["run", "bad.yaml"]);
    write("model-00002-of-00002.safetensors");
    fails(&lab, &["base failed to read model file", "model-00002-of-00002.safetensors", "No such file"]);
    write("../model.safetensors");
    fails(&lab, &["expected the name of a file in the same folder"]);
    std::fs::write(&index, "{\"weight_map\": {\"x\": \"model-00001-of-00002.safetensors\"}}").expect("an index");
    fails(&lab, &["holds x, but that file does not"]);
    std::fs::write(&index, "[").expect("an index");
    fails(&lab, &["model.safetensors.index.json", "not valid JSON"]);
}

#[test]
fn a_header_that_promises_another_type_or_more_data_than_there_is_is_refused() {
    let lab = lab();
    let path = lab.path("broken/model.safetensors");
    let whole = std::fs::read(&path).expect("the weights");
    // Lengths stay: only what the header says of a tensor changes.
    let edited = |from: &[u8], to: &[u8]| {
        assert_eq!(from.len(), to.len());
        let mut bytes = whole.clone();
        let at = bytes.windows(from.len()).position(|window| window == from).expect("it is in the header");
        bytes[at..at + to.len()].copy_from_slice(to);
        std::fs::write(&path, bytes).expect("the weights");
    };
    edited(b"\"F32\"", b"\"F64\"");
    fails(&lab, &["base failed to", "model.safetensors"]);
    edited(b"\"F32\"", b"\"I32\"");
    fails(&lab, &["base failed to", "element type"]);
    edited(b"[0,", b"[9,");
    fails(&lab, &["base failed to", "model.safetensors"]);
    let mut huge = whole.clone();
    huge[..8].copy_from_slice(&(1u64 << 40).to_le_bytes());
    std::fs::write(&path, huge).expect("the weights");
    fails(&lab, &["its header does not fit the file"]);
}

#[test]
fn configs_that_ask_for_absurd_models_allocate_nothing() {
    let lab = lab();
    for (field, value) in [
        ("num_hidden_layers", Value::from(90_000_000_u64)),
        ("hidden_size", Value::from(u64::MAX)),
        ("vocab_size", Value::from(-1)),
        ("num_attention_heads", Value::from(0)),
        ("rope_theta", Value::from("fast")),
    ] {
        let before = std::fs::read(lab.path("broken/config.json")).expect("the config");
        edit_config(&lab, |config| config[field] = value.clone());
        fails(&lab, &["base failed to read model file", "config.json", field]);
        std::fs::write(lab.path("broken/config.json"), before).expect("the config");
    }
    lab.write("broken/config.json", "{ \"model_type\": \"llama\",");
    fails(&lab, &["config.json", "not valid JSON"]);
    // Random weights have no file whose size would bound them.
    let giant = r#"{"model_type": "llama", "hidden_size": 1048576, "intermediate_size": 8388608, "num_hidden_layers": 100,
        "num_attention_heads": 64, "vocab_size": 1000000, "max_position_embeddings": 512}"#;
    lab.write("giant.json", giant);
    lab.write("bad.yaml", &PIPELINE.replace("model: broken", "random: { config: giant.json }"));
    let (_, error) = lab.expect(4, &["run", "bad.yaml"]);
    assert!(error.contains("base failed to make room for the model's weights"), "{error}");
}

#[test]
fn more_tokens_than_the_context_holds_are_an_error_wherever_they_are_asked_for() {
    let lab = lab();
    lab.write("text.txt", &"Once upon a time there was a little girl. ".repeat(200));
    with_stage(&lab, "x: { kind: capture-activations, model: base, text: text.txt, n_tokens: 513 }");
    fails(&lab, &["x failed to", "n_tokens", "513", "512"]);
    with_stage(&lab, "x: { kind: capture-activations, model: base, n_tokens: 9000000000000000000 }");
    fails(&lab, &["x failed to", "n_tokens", "512"]);
    with_stage(&lab, "x: { kind: prefill-bench, model: base, n_prompt: [8, 513] }");
    fails(&lab, &["x failed to", "n_prompt 513", "512"]);
    with_stage(&lab, "x: { kind: decode-bench, model: base, n_gen: 1, n_depth: 9000000000000000000 }");
    fails(&lab, &["x failed to", "n_depth", "512"]);
    with_stage(&lab, "x: { kind: prefill-bench, model: base, text: { source: text.txt, n_chars: 20 }, n_prompt: 100 }");
    fails(&lab, &["x failed to", "100 are asked for"]);
}

#[test]
fn names_that_would_leave_the_results_folder_are_refused() {
    let lab = lab();
    for name in ["../up", "a/b", "a.b", "..", ".hidden", "a b", "\"\"", "x[y]"] {
        lab.write("bad.yaml", &PIPELINE.replace("  ppl:", &format!("  {name}:")));
        let (_, error) = lab.expect(2, &["run", "bad.yaml"]);
        assert!(error.contains("expected a letter or digit"), "{name}: {error}");
        lab.write("bad.yaml", &PIPELINE.replace("name: bad", &format!("name: {name}")));
        lab.expect(2, &["run", "bad.yaml"]);
    }
    assert!(!lab.path("results").exists() && !lab.path("up").exists());
}

#[test]
fn missing_files_are_all_reported_with_their_lines() {
    let lab = lab();
    lab.write("bad.yaml", &PIPELINE.replace("model: broken", "model: nowhere").replace("text.txt", "nothing.txt"));
    for command in ["run", "validate"] {
        let (_, error) = lab.expect(2, &[command, "bad.yaml"]);
        for part in
            ["bad.yaml:5:3", "nowhere: no such model folder", "bad.yaml:6:3", "nothing.txt: no such file", "2 errors"]
        {
            assert!(error.contains(part), "expected {part:?} in:\n{error}");
        }
    }
    assert!(!lab.path("results").exists(), "nothing has run");
}

#[test]
fn validate_reads_the_quantization_configs_that_a_pipeline_names() {
    let lab = lab();
    lab.write("own.yaml", "scheme: nf4\nblok_size: 64\n");
    with_stage(&lab, "q: { kind: quantize, model: base, config: own.yaml }");
    let (_, error) = lab.expect(2, &["validate", "bad.yaml"]);
    assert!(error.contains("own.yaml") && error.contains("did you mean \"block_size\"?"), "{error}");
    fails(&lab, &["q failed to read quantization config own.yaml"]);
}

#[test]
fn texts_and_tokenizers_that_do_not_fit_are_named() {
    let lab = lab();
    lab.write("text.txt", "");
    fails(&lab, &["ppl failed to read", "the text is empty"]);
    std::fs::write(lab.path("text.txt"), [0xff, 0xfe, 0x00]).expect("a file");
    fails(&lab, &["ppl failed to read", "not UTF-8"]);
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
    lab.write("broken/tokenizer.json", "{}");
    fails(&lab, &["not a readable tokenizer"]);
    let whole =
        std::fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k/tokenizer.json"));
    let damaged = whole.expect("a tokenizer").replacen("\"vocab\": {", "\"vocab\": {,", 1);
    lab.write("broken/tokenizer.json", &damaged);
    fails(&lab, &["ppl failed to tokenize", "not valid JSON"]);
    std::fs::remove_file(lab.path("broken/tokenizer.json")).expect("the tokenizer");
    fails(&lab, &["ppl failed to tokenize", "tokenizer.json", "no such file"]);
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
