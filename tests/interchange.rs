//! Model folders that transformers and bitsandbytes write and open (tests/fixtures/bitsandbytes/make.py).
#![cfg(feature = "cpu")]

use labpipe::engine::BurnEngine;
use labpipe::event::NullProgress;
use labpipe::inference::{Engine, InferenceError, ModelRecipe, ModelSource};
use labpipe::units::DType;
use labpipe_kernels::SchemeSpec;
use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::Value;
use std::path::{Path, PathBuf};

mod support;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/bitsandbytes").join(name)
}

fn expected() -> Value {
    let text = std::fs::read_to_string(fixture("expected.json")).expect("the fixture");
    serde_json::from_str(&text).expect("JSON")
}

fn recipe(dir: &Path, dtype: Option<DType>, config: Option<&str>) -> ModelRecipe {
    let config = config.map(|text| labpipe::quantization::parse(text, "test", "test").expect("a config"));
    ModelRecipe { source: ModelSource::Path(dir.to_owned()), dtype, compute_dtype: None, quantization: config }
}

fn logits(recipe: &ModelRecipe) -> Vec<f32> {
    let tokens: Vec<u32> = serde_json::from_value(expected()["tokens"].clone()).expect("token ids");
    BurnEngine::cpu().open(recipe, &NullProgress).expect("a model").last_logits(&tokens).expect("logits")
}

fn largest_difference(found: &[f32], expected: &Value) -> f32 {
    let expected: Vec<f32> = serde_json::from_value(expected.clone()).expect("numbers");
    assert_eq!(found.len(), expected.len());
    found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

#[test]
fn folders_that_transformers_and_bitsandbytes_wrote_give_their_logits() {
    for (name, dtype) in [("nf4", DType::F32), ("nf4-double", DType::F16), ("fp4-double", DType::Bf16)] {
        let recipe = recipe(&fixture(name), None, None);
        let info = BurnEngine::cpu().inspect(&recipe).expect("a model");
        let stored = info.stored_quantization.clone().expect("it is stored quantized");
        let (scheme, double_quant) = name.split_once('-').map_or((name, false), |(scheme, _)| (scheme, true));
        let spec = SchemeSpec { block_size: Some(64), double_quant, ..SchemeSpec::new(scheme) };
        assert_eq!((stored.schemes, stored.n_linears, info.dtype), (vec![spec], 14, dtype));
        let model = BurnEngine::cpu().open(&recipe, &NullProgress).expect("a model");
        assert_eq!(model.weights_bytes(), info.weights_bytes(), "{name}");
        let difference = largest_difference(&logits(&recipe), &expected()[name]);
        assert!(difference < 1e-4, "{name}: {difference}");
    }
}

#[test]
fn an_int8_folder_is_computed_as_its_config_says() {
    let with_outliers = recipe(&fixture("int8"), None, None);
    let found = logits(&with_outliers);
    // Activations in 8 bits make 0.15 of difference to weights alone.
    let difference = largest_difference(&found, &expected()["int8"]);
    assert!(difference < 0.05, "{difference}");
    assert!(largest_difference(&found, &expected()["int8.weights_only"]) > 0.05);
    // 6 where the config names no threshold: transformers' default. Named as 0 no column is an outlier.
    let with_config = |from: &str, to: &str| {
        let dir = tempfile::tempdir().expect("a temporary folder");
        copy(&fixture("int8"), dir.path());
        let config = std::fs::read_to_string(dir.path().join("config.json")).expect("the config");
        assert!(config.contains(from));
        std::fs::write(dir.path().join("config.json"), config.replace(from, to)).expect("a file");
        let recipe = recipe(dir.path(), None, None);
        let scheme =
            BurnEngine::cpu().inspect(&recipe).map(|info| info.stored_quantization.expect("it is packed").schemes);
        scheme.map(|schemes| (schemes[0].outlier_threshold, logits(&recipe)))
    };
    let written = "\"llm_int8_threshold\": 6.0,";
    for (to, threshold) in [("", 6.0), ("\"llm_int8_threshold\": null,", 6.0), ("\"llm_int8_threshold\": 6,", 6.0)] {
        assert_eq!(with_config(written, to).expect("a model"), (Some(threshold), found.clone()), "{to}");
    }
    let (threshold, without_outliers) = with_config(written, "\"llm_int8_threshold\": 0.0,").expect("a model");
    assert_eq!(threshold, Some(0.0));
    assert_ne!(without_outliers, found);
    for wrong in ["-1", "\"six\"", "true"] {
        let error =
            with_config(written, &format!("\"llm_int8_threshold\": {wrong},")).expect_err("an error").to_string();
        assert!(error.contains("llm_int8_threshold") && error.contains(wrong), "{error}");
    }
}

fn copy(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).expect("a folder") {
        let path = entry.expect("an entry").path();
        std::fs::copy(&path, to.join(path.file_name().expect("a name"))).expect("a copy");
    }
}

#[test]
fn a_saved_folder_holds_the_bytes_that_bitsandbytes_writes() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let recipe = recipe(&fixture("plain"), Some(DType::F32), Some("scheme: nf4\n"));
    let saved = BurnEngine::cpu().save(&recipe, dir.path(), &NullProgress).expect("a folder");
    let found = std::fs::read(dir.path().join("model.safetensors")).expect("the file");
    assert_eq!((found.len() as u64, saved.n_quantized), (saved.bytes, 14));
    let theirs = std::fs::read(fixture("nf4/model.safetensors")).expect("the fixture");
    let (found, theirs) =
        (SafeTensors::deserialize(&found).expect("ours"), SafeTensors::deserialize(&theirs).expect("theirs"));
    let names = |tensors: &SafeTensors<'_>| {
        let mut names: Vec<String> = tensors.names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    };
    assert_eq!(names(&found), names(&theirs));
    for name in names(&found) {
        let (found, theirs) = (found.tensor(&name).expect("ours"), theirs.tensor(&name).expect("theirs"));
        assert_eq!((found.dtype(), found.shape().len()), (theirs.dtype(), theirs.shape().len()), "{name}");
        if name.contains("quant_state") {
            let state = |bytes: &[u8]| serde_json::from_slice::<Value>(bytes).expect("JSON");
            assert_eq!(state(found.data()), state(theirs.data()), "{name}");
        } else {
            assert_eq!((found.shape(), found.data()), (theirs.shape(), theirs.data()), "{name}");
        }
    }
    let config = |dir: &Path| -> Value {
        serde_json::from_str(&std::fs::read_to_string(dir.join("config.json")).expect("a config")).expect("JSON")
    };
    let (ours, theirs) = (config(dir.path()), config(&fixture("nf4")));
    assert_eq!(ours["quantization_config"]["llm_int8_skip_modules"], serde_json::json!(["lm_head"]));
    for key in
        ["load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "quant_method"]
    {
        assert_eq!(ours["quantization_config"][key], theirs["quantization_config"][key], "{key}");
    }
    assert_eq!(ours["dtype"], "float32");
}

#[test]
fn a_saved_folder_opens_to_the_model_that_was_saved() {
    let configs = [
        ("scheme: nf4\nblock_size: 128\n", None),
        ("scheme: nf4\ndouble_quant: true\nkeep: [mlp.down_proj]\n", Some(DType::F16)),
        ("scheme: fp4\ndouble_quant: true\noverrides: [{match: '*.o_proj', scheme: nf4}]\n", Some(DType::Bf16)),
        ("scheme: int8\noutlier_threshold: 6.0\n", Some(DType::F16)),
    ];
    for (config, dtype) in configs {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let made = recipe(&fixture("plain"), dtype, Some(config));
        BurnEngine::cpu().save(&made, dir.path(), &NullProgress).expect("a folder");
        let opened = recipe(dir.path(), None, None);
        assert_eq!(logits(&opened), logits(&made), "{config}");
        // A stored model is not quantized a second time.
        let again = ModelRecipe { quantization: made.quantization.clone(), ..opened };
        let error = BurnEngine::cpu().inspect(&again).expect_err("an error").to_string();
        assert!(error.contains("stored quantized (bitsandbytes"), "{error}");
    }
}

#[test]
fn what_the_format_has_no_place_for_is_refused_before_anything_is_written() {
    let refused = [
        ("scheme: int4\n", "is int4; the format has nf4, fp4 and int8"),
        ("scheme: none\n", "quantizes nothing"),
        ("scheme: nf4\noverrides: [{match: '*.o_proj', scheme: int8}]\n", "use keep instead"),
    ];
    let dir = tempfile::tempdir().expect("a temporary folder");
    let out = dir.path().join("model");
    for (config, reason) in refused {
        let recipe = recipe(&fixture("plain"), None, Some(config));
        let error = BurnEngine::cpu().save(&recipe, &out, &NullProgress).expect_err("an error").to_string();
        assert!(error.contains(reason) && !out.exists(), "{error}");
    }
}

/// A tensor's type, shape and bytes.
type Part = (Dtype, Vec<usize>, Vec<u8>);

/// Opens the double-quantized fixture with one of its tensors changed by `edit`, or left out, and returns the error.
fn damaged(part: &str, edit: impl Fn(Dtype, Vec<usize>, Vec<u8>) -> Option<Part>) -> String {
    let dir = tempfile::tempdir().expect("a temporary folder");
    copy(&fixture("nf4-double"), dir.path());
    let bytes = std::fs::read(fixture("nf4-double/model.safetensors")).expect("the fixture");
    let parsed = SafeTensors::deserialize(&bytes).expect("safetensors");
    let tensors: Vec<(String, Part)> = parsed
        .iter()
        .filter_map(|(name, view)| {
            let tensor = (view.dtype(), view.shape().to_vec(), view.data().to_vec());
            let tensor = if name == part { edit(tensor.0, tensor.1, tensor.2)? } else { tensor };
            Some((name.to_owned(), tensor))
        })
        .collect();
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| (name, TensorView::new(*dtype, shape.clone(), data).expect("a view")));
    serialize_to_file(views, None, &dir.path().join("model.safetensors")).expect("a file");
    match BurnEngine::cpu().open(&recipe(dir.path(), None, None), &NullProgress) {
        Ok(_) => panic!("{part}: it opened"),
        Err(error @ (InferenceError::Tensor { .. } | InferenceError::NotFinite { .. })) => error.to_string(),
        Err(error) => panic!("{part}: {error}"),
    }
}

#[test]
fn parts_that_are_missing_or_lie_end_in_an_error_that_names_them() {
    let weight = "model.layers.1.mlp.up_proj.weight";
    let state = format!("{weight}.quant_state.bitsandbytes__nf4");
    for part in ["absmax", "nested_absmax"] {
        let name = format!("{weight}.{part}");
        assert!(damaged(&name, |_, _, _| None).contains(&name));
        let short = damaged(&name, |dtype, shape, data| {
            let n = data.len() / 2 / 4 * 4;
            Some((dtype, vec![n * shape[0] / data.len()], data[..n].to_vec()))
        });
        assert!(short.contains(&name), "{short}");
    }
    let nan = damaged(&format!("{weight}.nested_absmax"), |dtype, shape, mut data| {
        data[..4].copy_from_slice(&f32::NAN.to_le_bytes());
        Some((dtype, shape, data))
    });
    assert!(nan.contains("NaN"), "{nan}");
    let table = damaged(&format!("{weight}.quant_map"), |dtype, shape, mut data| {
        data[0] ^= 0x40;
        data[3] ^= 0x40;
        Some((dtype, shape, data))
    });
    assert!(table.contains("own table"), "{table}");
    let codes = damaged(weight, |dtype, _, data| Some((dtype, vec![data.len() - 1, 1], data[1..].to_vec())));
    assert!(codes.contains("bytes of codes"), "{codes}");
    for (from, to) in [
        ("\"blocksize\": 64", "\"blocksize\": 0"),
        ("\"blocksize\": 64", "\"blocksize\": 18446744073709551615"),
        ("\"shape\": [192", "\"shape\": [193"),
        ("\"quant_type\": \"nf4\"", "\"quant_type\": \"fp4\""),
        ("\"nested_blocksize\": 256", "\"nested_blocksize\": 255"),
        ("\"nested_offset\": ", "\"nested_offset\": 1e99"),
        ("{", "["),
    ] {
        let lying = damaged(&state, |dtype, _, data| {
            let text = String::from_utf8(data).expect("UTF-8");
            assert!(text.contains(from), "{text}");
            let text = text.replacen(from, to, 1);
            Some((dtype, vec![text.len()], text.into_bytes()))
        });
        assert!(lying.contains(&state), "{lying}");
    }
    // Without its state a packed weight is a tensor of a type that no weight has.
    assert!(damaged(&state, |_, _, _| None).contains("element type U8"));
}

#[test]
fn a_pipeline_saves_a_model_and_loads_it_again() {
    let lab = support::Lab::new();
    lab.write(
        "save.yaml",
        "version: 1\nname: save\nstages:\n  base: { kind: load, model: models/stories260k }\n  \
         nf4: { kind: quantize, model: base, config: { scheme: nf4, double_quant: true }, save: true }\n",
    );
    lab.expect(0, &["run", "save.yaml"]);
    let record = lab.record("nf4");
    assert_eq!(record["saved"]["format"], "bitsandbytes");
    let saved = lab.path("cache").join(record["key"].as_str().expect("a key")).join("model");
    assert!(saved.join("tokenizer.json").is_file() && saved.join("model.safetensors").is_file());
    let relative = format!("cache/{}/model", record["key"].as_str().expect("a key"));
    lab.write(
        "open.yaml",
        &format!(
            "version: 1\nname: open\nstages:\n  stored: {{ kind: load, model: {relative} }}\n  \
             ppl: {{ kind: ppl, model: stored, text: {{ source: experiments/data/tinystories.txt, n_chars: 4000 }}, max_length: 128, stride: 64 }}\n  \
             report: {{ kind: report, inputs: [stored, ppl], formats: [md] }}\n"
        ),
    );
    lab.expect(0, &["run", "open.yaml"]);
    let stored = lab.record("stored");
    assert_eq!(stored["model"]["stored_quantization"]["schemes"][0]["scheme"], "nf4");
    assert_eq!(stored["weights_bytes"], record["weights_bytes"]);
    let report = std::fs::read_to_string(lab.path("results/latest/report/report.md")).expect("a report");
    assert!(report.contains("nf4, block 64, double quantized, as bitsandbytes stored it"), "{report}");
    assert!(lab.record("ppl")["results"][0]["perplexity"].as_f64().expect("a number") > 1.0);
}
