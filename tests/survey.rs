//! What quantizing costs and loses, as the engine of a device finds it, against the host's packing: real models, every scheme.
#![cfg(feature = "cpu")]

#[path = "support/engine.rs"]
mod test_engine;

use labpipe::artifact::QuantizedModule;
use labpipe::engine::BurnEngine;
use labpipe::event::{Level, NullProgress, Progress};
use labpipe::inference::{Engine, ModelRecipe, ModelSource};
use labpipe::quantization;
use labpipe::units::DType;
use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// How far a device's mean squared error may be from the host's, relative. Sums of squares are good to 3e-6
/// (`labpipe_kernels::cube::LOSS_BUDGET`); the rest is for decoded values that are an ulp apart, and, where a runtime divides less
/// exactly than IEEE asks, for values on a threshold, which are about as far from both codes.
const BUDGET: f64 = 1e-5;

fn path(folder: &str) -> ModelSource {
    ModelSource::Path(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder))
}

fn recipe(source: ModelSource, dtype: Option<DType>, config: &Value) -> ModelRecipe {
    let quantization = Some(quantization::from_value(config, "inline").expect("a config"));
    ModelRecipe { source, dtype, compute_dtype: Some(DType::F32), quantization }
}

fn survey(engine: &dyn Engine, recipe: &ModelRecipe) -> Vec<QuantizedModule> {
    let mut modules = Vec::new();
    engine.survey(recipe, &NullProgress, &mut |module| modules.push(module)).expect("a survey");
    modules
}

/// Compares everything; returns the largest relative difference of a mean squared error.
fn compare(device: &dyn Engine, recipe: &ModelRecipe, what: &str) -> f64 {
    let (found, expected) = (survey(device, recipe), survey(&BurnEngine::cpu(), recipe));
    assert!(!expected.is_empty() && found.len() == expected.len(), "{what}");
    let mut largest = 0.0f64;
    for (found, expected) in found.iter().zip(&expected) {
        let what = format!("{what} {}", expected.module);
        let relative = (found.weight_mse - expected.weight_mse).abs() / expected.weight_mse.max(f64::MIN_POSITIVE);
        assert!(relative <= BUDGET, "{what}: {:e} for {:e}", found.weight_mse, expected.weight_mse);
        largest = largest.max(relative);
        match (found.weight_sqnr_db, expected.weight_sqnr_db) {
            // 10·log10(1 + x) is less than 4.4·x.
            (Some(found), Some(expected)) => assert!((found - expected).abs() <= 5.0 * BUDGET, "{what}: {found}"),
            (found, expected) => assert_eq!(found, expected, "{what}"),
        }
        let rest =
            |module: &QuantizedModule| QuantizedModule { weight_mse: 0.0, weight_sqnr_db: None, ..module.clone() };
        assert_eq!(rest(found), rest(expected), "{what}");
    }
    largest
}

#[test]
fn every_scheme_loses_on_the_device_what_it_loses_on_the_host() {
    let device = test_engine::engine();
    let configs = [
        json!({"scheme": "nf4"}),
        json!({"scheme": "nf4", "block_size": 256}),
        json!({"scheme": "nf4", "double_quant": true}),
        json!({"scheme": "fp4"}),
        json!({"scheme": "fp4", "double_quant": true}),
        json!({"scheme": "int8"}),
        json!({"scheme": "int8", "outlier_threshold": 6.0}),
        json!({"scheme": "int4"}),
        json!({"scheme": "int4", "block_size": 32, "symmetric": true}),
        json!({"scheme": "mxfp4"}),
    ];
    for model in ["models/stories260k", "models/tinystories-656k", "models/tinystories-656k-f32"] {
        for config in &configs {
            let largest = compare(&*device, &recipe(path(model), None, config), &format!("{model} {config}"));
            println!("{model} {config}: mean squared errors {largest:.1e} apart at most");
        }
    }
}

#[test]
fn mixed_configs_and_heads_and_other_types_lose_the_same() {
    let device = test_engine::engine();
    let mixed = json!({
        "scheme": "nf4",
        "double_quant": true,
        "keep": ["*.mlp.down_proj"],
        "overrides": [
            {"match": "*.self_attn.o_proj", "scheme": "int8"},
            {"match": "*.self_attn.v_proj", "scheme": "mxfp4"},
            {"match": "lm_head", "scheme": "int4"},
        ],
    });
    // Heads of their own and tied ones, fused projections, biases.
    for family in ["llama", "gemma2", "phi3", "qwen2"] {
        for dtype in [None, Some(DType::F16), Some(DType::Bf16), Some(DType::F32)] {
            let recipe = recipe(path(&format!("tests/fixtures/families/{family}")), dtype, &mixed);
            compare(&*device, &recipe, &format!("{family} as {dtype:?}"));
            let schemes: Vec<String> = survey(&*device, &recipe).into_iter().map(|module| module.scheme).collect();
            for scheme in ["nf4", "int8"] {
                assert!(schemes.iter().any(|found| found == scheme), "{family}: {schemes:?}");
            }
        }
    }
}

#[test]
fn random_weights_lose_the_same() {
    let config = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama/config.json");
    let source = ModelSource::Random { config, seed: 7 };
    for dtype in [None, Some(DType::F32)] {
        compare(&*test_engine::engine(), &recipe(source.clone(), dtype, &json!({"scheme": "nf4"})), "random weights");
    }
}

/// Keeps what it is told.
#[derive(Default)]
struct Notes(Mutex<Vec<String>>);

impl Progress for Notes {
    fn begin(&self, _total: Option<u64>, _unit: &str) {}

    fn advance(&self, _n: u64) {}

    fn note(&self, _level: Level, text: &str) {
        self.0.lock().expect("no panic").push(text.to_owned());
    }

    fn is_cancelled(&self) -> bool {
        false
    }
}

/// Magnitudes near the ends of f32: bitsandbytes 0.50 decodes 8-bit rows of 1e38 to infinities and 4-bit blocks of 1e-42 to zeros, and
/// fp16 scales of INT4 end at 15 · 65504 and at 1e-5/15.
#[test]
fn weights_that_a_scheme_cannot_represent_are_named_in_a_warning() {
    let module = "model.layers.1.mlp.up_proj";
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama");
    let bytes = std::fs::read(fixture.join("model.safetensors")).expect("weights");
    let whole = SafeTensors::deserialize(&bytes).expect("a header");
    let name = format!("{module}.weight");
    let n = whole.tensor(&name).expect("the tensor").shape().iter().product::<usize>();
    for (magnitude, refused) in
        [(1.0f32, &[][..]), (1e38, &["int8", "int4"][..]), (1e-39, &["nf4", "fp4", "int4", "mxfp4"][..])]
    {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::copy(fixture.join("config.json"), dir.path().join("config.json")).expect("a copy");
        let values: Vec<u8> =
            (0..n).flat_map(|i| (magnitude * ((i * 37 % 101) as f32 / 50.0 - 1.0)).to_le_bytes()).collect();
        let tensors = whole.iter().map(|(own, tensor)| match own == name {
            true => (own, TensorView::new(Dtype::F32, tensor.shape().to_vec(), &values).expect("four bytes a value")),
            false => (own, tensor),
        });
        serialize_to_file(tensors, None, &dir.path().join("model.safetensors")).expect("weights");
        for scheme in ["nf4", "fp4", "int8", "int4", "mxfp4"] {
            let recipe = recipe(ModelSource::Path(dir.path().to_owned()), None, &json!({"scheme": scheme}));
            let notes = Notes::default();
            let mut modules = Vec::new();
            let engine = BurnEngine::cpu();
            engine.survey(&recipe, &notes, &mut |module| modules.push(module)).expect("a survey");
            let measured = modules.iter().find(|found| found.module == module).expect("the module");
            let notes = notes.0.into_inner().expect("no panic");
            let what = format!("{scheme}, {magnitude:e}: {} {:?}", measured.weight_mse, measured.weight_sqnr_db);
            let is_number = measured.weight_mse.is_finite() && measured.weight_sqnr_db.is_some_and(f64::is_finite);
            assert!(is_number || !notes.is_empty(), "{what}: no number, and no word of it");
            if refused.contains(&scheme) {
                assert_eq!(notes.len(), 1, "{what}: {notes:?}");
                assert!(
                    notes[0].starts_with(scheme) && notes[0].contains(&format!("the weights of {module}: decoded")),
                    "{notes:?}"
                );
            } else if magnitude > 1e-30 {
                assert_eq!(notes, Vec::<String>::new(), "{what}");
            }
        }
    }
}
