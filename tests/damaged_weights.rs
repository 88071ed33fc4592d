//! Weights that are no numbers, or too large for the type they are to be kept in: the same error on every device, whether its host
//! reads them or they pass by on their way to it.
#![cfg(feature = "cpu")]

#[path = "support/engine.rs"]
mod test_engine;

use labpipe::event::{Level, NullProgress, Progress};
use labpipe::inference::{Engine, InferenceError, ModelRecipe, ModelSource};
use labpipe::quantization;
use labpipe::units::DType;
use safetensors::tensor::{TensorView, serialize_to_file};
use safetensors::{Dtype, SafeTensors};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const TENSOR: &str = "model.layers.1.mlp.up_proj.weight";
const AT: usize = 77;

/// A copy of the Llama fixture, in which one tensor is bf16: zeros, and `value` at index `AT`.
fn damaged(dir: &Path, value: f32) -> PathBuf {
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families/llama");
    let copy = dir.join("model");
    std::fs::create_dir(&copy).expect("a folder");
    std::fs::copy(fixture.join("config.json"), copy.join("config.json")).expect("a copy");
    let bytes = std::fs::read(fixture.join("model.safetensors")).expect("weights");
    let whole = SafeTensors::deserialize(&bytes).expect("a header");
    let mut zeros = vec![0u8; whole.tensor(TENSOR).expect("the tensor").data().len()];
    zeros[2 * AT..2 * AT + 2].copy_from_slice(&half::bf16::from_f32(value).to_le_bytes());
    let tensors = whole.iter().map(|(name, tensor)| match name {
        TENSOR => (name, TensorView::new(Dtype::BF16, tensor.shape().to_vec(), &zeros).expect("two bytes a value")),
        _ => (name, tensor),
    });
    serialize_to_file(tensors, None, &copy.join("model.safetensors")).expect("weights");
    copy
}

fn engine_and_recipe(model: PathBuf, dtype: Option<DType>, quantized: bool) -> (Arc<dyn Engine>, ModelRecipe) {
    let config = json!({"scheme": "nf4", "double_quant": true});
    let quantization = quantized.then(|| quantization::from_value(&config, "inline").expect("a config"));
    let source = ModelSource::Path(model);
    let recipe = ModelRecipe { source, dtype, compute_dtype: Some(DType::F32), quantization };
    (test_engine::engine(), recipe)
}

fn open(model: PathBuf, dtype: Option<DType>, quantized: bool, progress: &dyn Progress) -> InferenceError {
    let (engine, recipe) = engine_and_recipe(model, dtype, quantized);
    engine.open(&recipe, progress).err().expect("an error")
}

fn survey(model: PathBuf, dtype: Option<DType>, progress: &dyn Progress) -> InferenceError {
    let (engine, recipe) = engine_and_recipe(model, dtype, true);
    engine.survey(&recipe, progress, &mut |_| {}).expect_err("an error")
}

#[test]
fn a_weight_that_is_no_number_is_named_by_tensor_and_index() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = damaged(dir.path(), f32::NAN);
    let errors = [false, true].map(|quantized| open(model.clone(), None, quantized, &NullProgress));
    for error in errors.into_iter().chain([survey(model, None, &NullProgress)]) {
        match error {
            InferenceError::NotFinite { tensor, index, .. } => assert_eq!((tensor.as_str(), index), (TENSOR, AT)),
            other => panic!("{other}"),
        }
    }
}

#[test]
fn a_weight_beyond_the_range_of_its_type_is_named_with_a_remedy() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = damaged(dir.path(), 1e6);
    let half = Some(DType::F16);
    let errors = [false, true].map(|quantized| open(model.clone(), half, quantized, &NullProgress));
    for error in errors.into_iter().chain([survey(model, half, &NullProgress)]) {
        let error = error.to_string();
        assert!(error.contains(TENSOR) && error.contains("index 77") && error.contains("dtype: bf16"), "{error}");
    }
}

/// Asks to stop once a block, or a module, is done.
#[derive(Default)]
struct Impatient {
    n_done: AtomicU64,
}

impl Progress for Impatient {
    fn begin(&self, _total: Option<u64>, _unit: &str) {}

    fn advance(&self, n: u64) {
        self.n_done.fetch_add(n, Ordering::Relaxed);
    }

    fn note(&self, _level: Level, _text: &str) {}

    fn is_cancelled(&self) -> bool {
        self.n_done.load(Ordering::Relaxed) > 0
    }
}

#[test]
fn loading_stops_when_the_user_asks() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = damaged(dir.path(), 0.5);
    let progress = Impatient::default();
    let error = open(model, None, true, &progress);
    assert!(matches!(error, InferenceError::Cancelled), "{error}");
    assert_eq!(progress.n_done.load(Ordering::Relaxed), 1);
}

#[test]
fn measuring_what_quantizing_loses_stops_when_the_user_asks() {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let model = damaged(dir.path(), 0.5);
    let progress = Impatient::default();
    let error = survey(model, None, &progress);
    assert!(matches!(error, InferenceError::Cancelled), "{error}");
    assert_eq!(progress.n_done.load(Ordering::Relaxed), 1);
}
