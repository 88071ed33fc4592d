//! Folders whose files say more, less or something else than a model needs: what is used of them, and what is said of the rest. How
//! transformers 5.24 opens each was tried with torch 2.15; it is what labpipe does here, unless the test says otherwise.
#![cfg(feature = "cpu")]

use labpipe::engine::BurnEngine;
use labpipe::event::{Level, NullProgress, Progress};
use labpipe::inference::{AccountPart, Engine, InferenceError, ModelRecipe, ModelSource, SourceAccount, StoredType};
use labpipe::units::DType;
use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

const TOKENS: [u32; 6] = [1, 40, 7, 26, 37, 43];
const EMBEDDING: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";

/// A model that a test changes before it is written.
struct Draft {
    config: Value,
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
}

impl Draft {
    fn of(folder: &str) -> Draft {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
        let bytes = std::fs::read(dir.join("model.safetensors")).expect("weights");
        let whole = SafeTensors::deserialize(&bytes).expect("a header");
        let tensors = whole
            .iter()
            .map(|(name, view)| (name.to_owned(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
            .collect();
        let config = std::fs::read_to_string(dir.join("config.json")).expect("the config");
        Draft { config: serde_json::from_str(&config).expect("JSON"), tensors }
    }

    /// A tied model whose file holds the shared matrix as the head; here it is the embedding.
    fn stories() -> Draft {
        let mut draft = Draft::of("models/tinystories-656k-f32");
        draft.rename(|name| if name == HEAD { EMBEDDING } else { name }.to_owned());
        draft
    }

    fn set(&mut self, field: &str, value: Value) {
        self.config[field] = value;
    }

    fn put(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        self.tensors.insert(name.to_owned(), (Dtype::F32, shape.to_vec(), bytes));
    }

    fn values(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let (dtype, shape, bytes) = &self.tensors[name];
        assert_eq!(*dtype, Dtype::F32);
        (shape.clone(), bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect())
    }

    fn rename(&mut self, rename: impl Fn(&str) -> String) {
        self.tensors =
            std::mem::take(&mut self.tensors).into_iter().map(|(name, tensor)| (rename(&name), tensor)).collect();
    }

    fn write(&self) -> (tempfile::TempDir, ModelRecipe) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::write(dir.path().join("config.json"), self.config.to_string()).expect("a config");
        let views = self.tensors.iter().map(|(name, (dtype, shape, bytes))| {
            (name.as_str(), TensorView::new(*dtype, shape.clone(), bytes).expect("a view"))
        });
        serialize_to_file(views, None, &dir.path().join("model.safetensors")).expect("weights");
        let source = ModelSource::Path(dir.path().to_owned());
        let recipe = ModelRecipe { source, dtype: None, compute_dtype: Some(DType::F32), quantization: None };
        (dir, recipe)
    }

    fn logits(&self) -> Vec<f32> {
        let (_dir, recipe) = self.write();
        let mut model = BurnEngine::cpu().open(&recipe, &NullProgress).expect("a model");
        model.last_logits(&TOKENS).expect("logits")
    }

    fn account(&self) -> SourceAccount {
        let (_dir, recipe) = self.write();
        BurnEngine::cpu().account(&recipe).expect("an account")
    }

    fn part(&self, source: &str) -> AccountPart {
        let parts = self.account().parts;
        parts.into_iter().find(|part| part.source == source).expect("such a part")
    }

    fn error(&self) -> String {
        let (_dir, recipe) = self.write();
        BurnEngine::cpu().inspect(&recipe).expect_err("an error").to_string()
    }
}

/// Keeps what it is told.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Progress for Notes {
    fn begin(&self, _total: Option<u64>, _unit: &str) {}

    fn advance(&self, _n: u64) {}

    fn note(&self, _level: Level, text: &str) {
        self.0.lock().expect("one thread").push(text.to_owned());
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

fn checked(draft: &Draft, dtype: Option<DType>) -> (Result<(), InferenceError>, Vec<String>) {
    let (_dir, recipe) = draft.write();
    let notes = Notes::default();
    let result = BurnEngine::cpu().check_values(&ModelRecipe { dtype, ..recipe }, &notes);
    (result, notes.0.into_inner().expect("one thread"))
}

#[test]
fn a_plain_folder_is_used_whole() {
    let draft = Draft::stories();
    let account = draft.account();
    let part = draft.part("tensors");
    assert_eq!((part.n_used, part.n_harmless), (draft.tensors.len(), 0));
    assert!(part.unused.is_empty() && part.warnings.is_empty(), "{part:?}");
    let n_bytes: usize = draft.tensors.values().map(|(_, _, bytes)| bytes.len()).sum();
    let expected = StoredType {
        name: "F32".to_owned(),
        n_tensors: draft.tensors.len(),
        n_params: n_bytes as u64 / 4,
        bytes: n_bytes as u64,
    };
    assert_eq!(account.element_types, [expected]);
}

#[test]
fn names_of_a_base_model_and_half_and_twice_prefixed_ones_open_the_same_model() {
    let expected = Draft::stories().logits();
    type Rename = fn(&str) -> String;
    let base: Rename = |name| name.strip_prefix("model.").unwrap_or(name).to_owned();
    let half: Rename =
        |name| name.strip_prefix("model.layers.1").map_or(name.to_owned(), |rest| format!("layers.1{rest}"));
    let twice: Rename = |name| format!("model.{name}");
    for rename in [base, half, twice] {
        let mut draft = Draft::stories();
        draft.rename(rename);
        assert_eq!(draft.logits(), expected);
        let part = draft.part("tensors");
        assert_eq!((part.n_used, part.unused.len()), (draft.tensors.len(), 0));
    }
    let mut draft = Draft::stories();
    draft.rename(|name| name.replacen("model.", "transformer.", 1));
    let error = draft.error();
    assert!(error.contains("no such tensor") && error.contains("among them transformer.embed_tokens"), "{error}");
}

#[test]
fn a_tied_head_that_differs_from_the_embedding_is_used_with_a_warning() {
    let mut draft = Draft::stories();
    let tied = draft.logits();
    let (shape, values) = draft.values(EMBEDDING);
    draft.put(HEAD, &shape, &values);
    assert_eq!(draft.logits(), tied);
    let part = draft.part("tensors");
    assert_eq!((part.n_used, part.n_harmless, part.all_warnings()), (draft.tensors.len() - 1, 1, Vec::new()));

    let larger: Vec<f32> = values.iter().map(|value| 1.5 * value).collect();
    draft.put(HEAD, &shape, &larger);
    let scaled: Vec<f32> = tied.iter().map(|logit| 1.5 * logit).collect();
    let largest = |logits: &[f32]| logits.iter().zip(&scaled).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest(&draft.logits()) < 1e-4);
    let (_dir, recipe) = draft.write();
    let info = BurnEngine::cpu().inspect(&recipe).expect("a model");
    let n_values: usize = draft.tensors.values().map(|(_, shape, _)| shape.iter().product::<usize>()).sum();
    assert_eq!((info.tied_embeddings, info.n_params), (false, n_values as u64));
    let part = draft.part("tensors");
    assert_eq!((part.n_used, part.warnings.len()), (draft.tensors.len(), 1));
    for word in ["tie_word_embeddings", HEAD, EMBEDDING, "different values"] {
        assert!(part.warnings[0].contains(word), "{word}: {:?}", part.warnings);
    }

    draft.put(HEAD, &[shape[0] - 4, shape[1]], &values[4 * shape[1]..]);
    let error = draft.error();
    assert!(error.contains(HEAD) && error.contains(&format!("{:?}", shape)), "{error}");
}

#[test]
fn a_saved_model_with_a_head_of_its_own_says_so() {
    let mut draft = Draft::stories();
    let (shape, values) = draft.values(EMBEDDING);
    draft.put(HEAD, &shape, &values.iter().map(|value| 1.5 * value).collect::<Vec<f32>>());
    let (_dir, plain) = draft.write();
    let config = labpipe::quantization::parse("scheme: nf4\noverrides: [{match: lm_head, scheme: nf4}]\n", "q", "q");
    let recipe = ModelRecipe { quantization: Some(config.expect("a config")), ..plain.clone() };
    let saved = tempfile::tempdir().expect("a temporary folder");
    BurnEngine::cpu().save(&recipe, saved.path(), &NullProgress).expect("a folder");
    let reopened = ModelRecipe { source: ModelSource::Path(saved.path().to_owned()), ..plain };
    let logits = |recipe: &ModelRecipe| {
        BurnEngine::cpu().open(recipe, &NullProgress).expect("a model").last_logits(&TOKENS).expect("logits")
    };
    assert_eq!(logits(&reopened), logits(&recipe));
}

#[test]
fn a_head_alone_serves_a_tied_model_as_its_embedding() {
    let mut draft = Draft::stories();
    let expected = draft.logits();
    let embedding = draft.tensors.remove(EMBEDDING).expect("the embedding");
    draft.tensors.insert(HEAD.to_owned(), embedding);
    assert_eq!(draft.logits(), expected);
    assert_eq!(draft.part("tensors").n_used, draft.tensors.len());
}

/// transformers opens this model with a head of random values.
#[test]
fn a_missing_head_is_an_error_that_names_the_field_and_the_remedy() {
    let mut draft = Draft::stories();
    draft.set("tie_word_embeddings", json!(false));
    let error = draft.error();
    assert!(error.contains("load tensor lm_head.weight") && error.contains("tie_word_embeddings: true"), "{error}");
}

#[test]
fn biases_that_the_config_does_not_ask_for_are_named() {
    let mut draft = Draft::of("models/stories260k");
    let modules: Vec<String> =
        draft.tensors.keys().filter_map(|name| name.strip_suffix("_proj.weight")).map(str::to_owned).collect();
    let plain = draft.logits();
    for module in modules.iter().filter(|module| module.contains("self_attn")) {
        let n = draft.tensors[&format!("{module}_proj.weight")].1[0];
        draft.put(&format!("{module}_proj.bias"), &[n], &vec![0.8; n]);
    }
    assert_eq!(draft.logits(), plain);
    let part = draft.part("tensors");
    assert_eq!(part.unused.len(), 20);
    let warnings = part.all_warnings().join("\n");
    assert!(warnings.contains("20 biases") && warnings.contains("attention_bias"), "{warnings}");
    assert!(warnings.contains("model.layers.0.self_attn.k_proj.bias"), "{warnings}");

    draft.set("attention_bias", json!(true));
    assert_ne!(draft.logits(), plain);
    assert_eq!(draft.part("tensors").unused, Vec::<String>::new());
    draft.tensors.remove("model.layers.1.self_attn.v_proj.bias");
    let error = draft.error();
    assert!(
        error.contains("model.layers.1.self_attn.v_proj.bias") && error.contains("attention_bias: true"),
        "{error}"
    );
    draft.set("attention_bias", json!(false));
    draft.set("mlp_bias", json!(true));
    assert!(draft.error().contains("mlp_bias: true"));
}

#[test]
fn layers_adapters_and_buffers_beside_the_model_are_told_apart() {
    let mut draft = Draft::stories();
    let plain = draft.logits();
    let n_used = draft.tensors.len();
    let n_layers = draft.config["num_hidden_layers"].as_u64().expect("a count");
    let first: Vec<String> = draft.tensors.keys().filter(|name| name.contains("layers.0.")).cloned().collect();
    for name in &first {
        let (shape, values) = draft.values(name);
        draft.put(&name.replace("layers.0.", &format!("layers.{n_layers}.")), &shape, &values);
        draft.put(&name.replace("layers.0.", &format!("layers.{}.", n_layers + 1)), &shape, &values);
    }
    draft.put("model.layers.0.self_attn.q_proj.lora_A.weight", &[1, 1], &[f32::NAN]);
    draft.put("model.layers.0.self_attn.rotary_emb.inv_freq", &[2], &[1.0, 0.5]);
    draft.put("model.layers.0.self_attn.masked_bias", &[1], &[-1e9]);
    let part = draft.part("tensors");
    assert_eq!((part.n_used, part.n_harmless, part.unused.len()), (n_used, 2, 2 * first.len() + 1));
    let warnings = part.warnings.join("\n");
    let layers = format!("layers {n_layers} to {} of the files are left out", n_layers + 1);
    assert!(warnings.contains(&layers) && warnings.contains("1 tensors of a LoRA adapter"), "{warnings}");
    assert_eq!(draft.logits(), plain);
    // What is not used is not checked either.
    checked(&draft, None).0.expect("finite weights");
}

#[test]
fn a_vision_tower_is_one_line_with_a_count() {
    let mut draft = Draft::of("tests/fixtures/families/gemma3-vision");
    draft.put("model.multi_modal_projector.y", &[1], &[1.0]);
    let is_vision = |name: &&String| name.contains("vision_tower.") || name.contains("multi_modal_projector.");
    let n_vision = draft.tensors.keys().filter(is_vision).count();
    let part = draft.part("tensors");
    assert_eq!((part.n_used, part.n_harmless), (draft.tensors.len() - n_vision, n_vision));
    assert_eq!(part.unused, Vec::<String>::new());
    let expected = format!("{n_vision} tensors of the vision model are not used: labpipe runs the text model");
    assert_eq!(part.all_warnings(), [expected]);
}

#[test]
fn packed_linears_count_with_their_statistics() {
    for (name, scheme, n_linears) in
        [("nf4", "nf4", 14), ("nf4-double", "nf4", 14), ("fp4-double", "fp4", 14), ("int8", "int8", 14)]
    {
        let draft = Draft::of(&format!("tests/fixtures/bitsandbytes/{name}"));
        let account = draft.account();
        let part = draft.part("tensors");
        assert_eq!((part.n_used, part.n_harmless, part.unused.len()), (draft.tensors.len(), 0, 0), "{name}: {part:?}");
        let part = draft.part("quantization_config");
        assert!(part.unused.is_empty() && part.warnings.is_empty(), "{name}: {part:?}");
        let (_dir, recipe) = draft.write();
        let stored = BurnEngine::cpu().inspect(&recipe).expect("a model").stored_quantization.expect("it is packed");
        let packed = StoredType {
            name: format!("bitsandbytes {scheme}"),
            n_tensors: n_linears,
            n_params: stored.n_params,
            bytes: stored.bytes,
        };
        assert!(account.element_types.contains(&packed), "{name}: {:?}", account.element_types);
    }
}

#[test]
fn an_8_bit_weight_in_another_order_or_with_damaged_statistics_is_refused() {
    let module = "model.layers.0.self_attn.q_proj";
    let mut draft = Draft::of("tests/fixtures/bitsandbytes/int8");
    let format = format!("{module}.weight_format");
    let plain = draft.logits();
    for (value, named) in [(1u8, "1 (col32)"), (2, "2 (col_turing)"), (9, "found 9")] {
        draft.tensors.insert(format.clone(), (Dtype::U8, Vec::new(), vec![value]));
        let error = draft.error();
        assert!(error.contains(&format) && error.contains(named), "{error}");
    }
    draft.tensors.remove(&format);
    assert_eq!(draft.logits(), plain);
    let n = draft.tensors[&format!("{module}.SCB")].1[0];
    draft.put(&format!("{module}.SCB"), &[n], &vec![f32::INFINITY; n]);
    let error = checked(&draft, None).0.expect_err("an error").to_string();
    assert!(error.contains(&format!("{module}.SCB")) && error.contains("inf"), "{error}");
}

#[test]
fn a_config_that_declares_bitsandbytes_over_plain_weights_is_mentioned() {
    let mut draft = Draft::stories();
    let plain = draft.logits();
    let config =
        json!({"quant_method": "bitsandbytes", "load_in_4bit": true, "llm_int8_has_fp16_weight": true, "new_field": 1});
    draft.set("quantization_config", config);
    assert_eq!(draft.logits(), plain);
    let part = draft.part("quantization_config");
    assert_eq!((part.n_used, part.n_harmless, part.unused), (2, 1, vec!["new_field".to_owned()]));
    let warnings = part.warnings.join("\n");
    assert!(warnings.contains("no linear is stored quantized") && warnings.contains("has_fp16_weight"), "{warnings}");
}

/// Nothing is known of shapes yet when a method is named: these tensors have none that fit.
#[test]
fn foreign_quantization_is_named_before_shapes_are_looked_at() {
    let mut draft = Draft::stories();
    draft.rename(|name| name.replace("_proj.weight", "_proj.qweight"));
    let error = draft.error();
    assert!(error.contains("quantized with GPTQ or AWQ") && error.contains("_proj.qweight looks so"), "{error}");
    draft.set("quantization_config", json!({"quant_method": "gptq", "bits": 4}));
    let error = draft.error();
    assert!(
        error.contains("quantized with GPTQ (quantization_config.quant_method \"gptq\" in config.json)"),
        "{error}"
    );
}

#[test]
fn values_that_another_type_cannot_hold_are_an_error_or_counted() {
    let name = "model.layers.1.mlp.up_proj.weight";
    let mut draft = Draft::stories();
    let (shape, mut values) = draft.values(name);
    // Half of fp16's smallest number rounds to the even 0; what is just above it does not.
    (values[3], values[4], values[5]) = (2.0f32.powi(-25), -1e-9, 2.0f32.powi(-25).next_up());
    draft.put(name, &shape, &values);
    let (result, notes) = checked(&draft, Some(DType::F16));
    result.expect("values in range");
    let counted = format!("2 values of 1 tensors are too small for it and become 0, the most of them, 2, in {name}");
    assert_eq!(notes, [format!("dtype f16: {counted}")]);
    assert_eq!(checked(&draft, None).1, Vec::<String>::new());

    values[7] = -70_000.0;
    draft.put(name, &shape, &values);
    let error = checked(&draft, Some(DType::F16)).0.expect_err("an error").to_string();
    assert!(error.contains(name) && error.contains("-70000 at index 7") && error.contains("bf16 or f32"), "{error}");
    checked(&draft, Some(DType::Bf16)).0.expect("values in range");
}

#[test]
fn shards_and_files_beside_them_are_accounted_for() {
    let (dir, recipe) = Draft::stories().write();
    let path = |name: &str| -> PathBuf { dir.path().join(name) };
    std::fs::copy(path("model.safetensors"), path("model.fp16.safetensors")).expect("a copy");
    let warnings = |engine: &BurnEngine| engine.account(&recipe).expect("an account").warnings().join("\n");
    let found = warnings(&BurnEngine::cpu());
    assert!(found.contains("not read: model.fp16.safetensors, since model.safetensors is there"), "{found}");
    std::fs::rename(path("model.safetensors"), path("pytorch_model.bin")).expect("a new name");
    std::fs::remove_file(path("model.fp16.safetensors")).expect("a file");
    let error = BurnEngine::cpu().inspect(&recipe).expect_err("no weights").to_string();
    assert!(error.contains("pytorch_model.bin: convert it with transformers"), "{error}");
}
