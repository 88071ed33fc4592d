//! Real model files, mutated: both readers end in a value or an error, never in a panic, and allocate no more than the file's size
//! warrants. What a longer search found is kept below as tests of its own; `PROPTEST_CASES=100000` searches on.

use labpipe::gguf::{GgufFile, tokenizer_json};
use proptest::prelude::*;
use std::alloc::{GlobalAlloc, Layout, System};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Counts what is allocated now and at most.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        PEAK.fetch_max(NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size(), Ordering::Relaxed);
        // SAFETY: the caller's promises hold for the system's allocator too.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Files here are at most a megabyte; a lying count asks for far more than this.
const MAX_BYTES: usize = 64 << 20;

/// Tests that count what is allocated run one at a time.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

#[track_caller]
fn bounded<T>(work: impl FnOnce() -> T) -> T {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let result = work();
    let n_bytes = PEAK.load(Ordering::Relaxed).saturating_sub(before);
    assert!(n_bytes < MAX_BYTES, "{n_bytes} bytes were allocated");
    result
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// One thing done to a file.
#[derive(Debug, Clone)]
enum Damage {
    Byte(f64, u8),
    Number(f64, u64),
    Small(f64, u32),
    Cut(f64),
    Remove(f64, usize),
    Insert(f64, Vec<u8>),
}

/// Returns how many cases to try: `usual`, or what `PROPTEST_CASES` asks for.
#[cfg(feature = "cpu")]
fn n_cases(usual: u32) -> u32 {
    std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(usual)
}

fn number() -> impl Strategy<Value = u64> {
    let edges =
        vec![0, 1, 31, 255, 1 << 16, 1 << 24, 1 << 31, u64::from(u32::MAX), 1 << 40, 1 << 62, 1 << 63, u64::MAX];
    prop_oneof![proptest::sample::select(edges), any::<u64>(), 0..100_000u64]
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        3 => (0.0..1.0, any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        3 => (0.0..1.0, number()).prop_map(|(at, number)| Damage::Number(at, number)),
        2 => (0.0..1.0, prop_oneof![0..64u32, any::<u32>()]).prop_map(|(at, number)| Damage::Small(at, number)),
        1 => (0.0..1.0).prop_map(Damage::Cut),
        1 => (0.0..1.0, 1..64usize).prop_map(|(at, n)| Damage::Remove(at, n)),
        1 => (0.0..1.0, proptest::collection::vec(any::<u8>(), 1..32)).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
    ]
}

/// Places are shares of the header, where lies are told.
fn apply(bytes: &mut Vec<u8>, header_len: usize, all: &[Damage]) {
    for damage in all {
        let last = bytes.len().saturating_sub(1);
        let place = |at: f64| ((header_len as f64 * at) as usize).min(last);
        match damage {
            _ if bytes.is_empty() => return,
            Damage::Byte(at, byte) => {
                let at = place(*at);
                bytes[at] = *byte;
            }
            Damage::Number(at, number) => overwrite(bytes, place(*at), &number.to_le_bytes()),
            Damage::Small(at, number) => overwrite(bytes, place(*at), &number.to_le_bytes()),
            Damage::Cut(at) => bytes.truncate((bytes.len() as f64 * at) as usize),
            Damage::Remove(at, n) => {
                let at = place(*at);
                bytes.drain(at..(at + n).min(bytes.len()));
            }
            Damage::Insert(at, more) => {
                let at = place(*at);
                bytes.splice(at..at, more.iter().copied());
            }
        }
    }
}

fn overwrite(bytes: &mut [u8], at: usize, patch: &[u8]) {
    let n = patch.len().min(bytes.len() - at);
    bytes[at..at + n].copy_from_slice(&patch[..n]);
}

/// Opens a file and reads everything in it.
fn read_gguf(path: &Path) {
    let Ok(file) = GgufFile::open(path) else { return };
    for (name, tensor) in file.tensors() {
        let n_values: usize = tensor.shape.iter().product();
        if let Ok(values) = file.values(name, tensor, &|row| row) {
            assert_eq!(values.len(), n_values);
        }
        assert_eq!(Some(file.bytes(tensor).as_slice().len()), tensor.ty.n_bytes(n_values));
    }
    if let Ok(json) = tokenizer_json(&file)
        && let Ok(tokenizer) = tokenizers::Tokenizer::from_bytes(json)
    {
        let _ = tokenizer.encode("Once upon a time there were 17 grüße", true);
    }
}

fn try_gguf(bytes: &[u8]) {
    let dir = tempfile::tempdir().expect("a temporary folder");
    let path = dir.path().join("mutated.gguf");
    std::fs::write(&path, bytes).expect("a file");
    bounded(|| read_gguf(&path));
}

fn gguf_fixture(name: &str) -> Vec<u8> {
    std::fs::read(root().join("tests/fixtures/gguf").join(name)).expect("the fixture")
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mutated_gguf_tensors_end_in_a_value_or_an_error(all in proptest::collection::vec(damage(), 1..4)) {
        let _alone = alone();
        let mut bytes = gguf_fixture("types.gguf");
        // The header of this one takes some two kilobytes.
        apply(&mut bytes, 2_600, &all);
        try_gguf(&bytes);
    }

    #[test]
    fn mutated_gguf_vocabularies_end_in_a_value_or_an_error(all in proptest::collection::vec(damage(), 1..4)) {
        let _alone = alone();
        for name in ["vocab-smollm.gguf", "llama-mixed.gguf"] {
            let mut bytes = gguf_fixture(name);
            let header_len = bytes.len().min(16_000);
            apply(&mut bytes, header_len, &all);
            try_gguf(&bytes);
        }
    }
}

#[cfg(feature = "cpu")]
mod safetensors {
    use super::*;
    use labpipe::engine::BurnEngine;
    use labpipe::event::NullProgress;
    use labpipe::inference::{Engine, InferenceError, ModelRecipe, ModelSource};

    fn inspect(weights: &[u8], index: Option<&[u8]>) -> Result<(), InferenceError> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let model = root().join("models/stories260k");
        std::fs::copy(model.join("config.json"), dir.path().join("config.json")).expect("a copy");
        let name = if index.is_some() { "a.safetensors" } else { "model.safetensors" };
        std::fs::write(dir.path().join(name), weights).expect("a file");
        if let Some(index) = index {
            std::fs::write(dir.path().join("model.safetensors.index.json"), index).expect("a file");
        }
        let source = ModelSource::Path(dir.path().to_owned());
        let recipe = ModelRecipe { source, dtype: None, compute_dtype: None, quantization: None };
        bounded(|| BurnEngine::cpu().inspect(&recipe).map(|_| ()))
    }

    fn weights() -> Vec<u8> {
        std::fs::read(root().join("models/stories260k/model.safetensors")).expect("the weights")
    }

    /// Puts another header over the weights of stories260K.
    fn with_header(edit: impl Fn(String) -> String) -> Vec<u8> {
        let bytes = weights();
        let n = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
        let header = edit(String::from_utf8(bytes[8..8 + n].to_vec()).expect("JSON"));
        [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &bytes[8 + n..]].concat()
    }

    #[test]
    fn headers_that_lie_are_refused_without_a_large_allocation() {
        let _alone = alone();
        inspect(&weights(), None).expect("what is not damaged opens");
        let embedding = r#""shape":[512,64],"data_offsets":[0,131072]"#;
        assert!(
            String::from_utf8_lossy(&weights()[..4096]).contains(embedding),
            "the header is as this test expects it"
        );
        for (from, to) in [
            (embedding, r#""shape":[512,64],"data_offsets":[0,99999999999]"#),
            (embedding, r#""shape":[512,64],"data_offsets":[131072,0]"#),
            (embedding, r#""shape":[512,64],"data_offsets":[64,131136]"#),
            (embedding, r#""shape":[18446744073709551615,64],"data_offsets":[0,131072]"#),
            (embedding, r#""shape":[4294967296,4294967296],"data_offsets":[0,131072]"#),
            (embedding, r#""shape":[-1,64],"data_offsets":[0,131072]"#),
            (r#""dtype":"F32""#, r#""dtype":"F99""#),
            ("model.norm.weight", "../../model.norm.weight"),
        ] {
            let error = inspect(&with_header(|header| header.replacen(from, to, 1)), None).expect_err(to).to_string();
            assert!(error.contains("model.safetensors"), "{to}: {error}");
        }
    }

    /// Describes a model of a GGUF file and, if that goes well, loads it and runs two tokens.
    fn try_model(bytes: &[u8]) -> Result<(), InferenceError> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("mutated.gguf");
        std::fs::write(&path, bytes).expect("a file");
        let source = ModelSource::Path(path);
        let recipe = ModelRecipe { source, dtype: None, compute_dtype: None, quantization: None };
        bounded(|| {
            let engine = BurnEngine::cpu();
            engine.inspect(&recipe)?;
            engine.open(&recipe, &NullProgress)?.last_logits(&[1, 2]).map(|_| ())
        })
    }

    /// Found by the search below: every layer that a header claimed was given its names before any of them was looked for.
    #[test]
    fn absurd_numbers_of_layers_are_refused_without_a_large_allocation() {
        let _alone = alone();
        let mut bytes = gguf_fixture("llama-mixed.gguf");
        let key = b"llama.block_count\x04\0\0\0";
        let at = bytes.windows(key.len()).position(|window| window == key).expect("the key") + key.len();
        for n_layers in [131_077u32, 1 << 24, u32::MAX] {
            overwrite(&mut bytes, at, &n_layers.to_le_bytes());
            let error = try_model(&bytes).expect_err("an error").to_string();
            assert!(error.contains("num_hidden_layers"), "{error}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn mutated_gguf_models_end_in_a_model_or_an_error(all in proptest::collection::vec(damage(), 1..3)) {
            let _alone = alone();
            let mut bytes = gguf_fixture("llama-mixed.gguf");
            // Where the model's sizes stand, before its vocabulary; cuts there are tried above.
            apply(&mut bytes, 500, &all);
            let _ = try_model(&bytes);
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(n_cases(64)) })]

        #[test]
        fn mutated_safetensors_end_in_a_value_or_an_error(all in proptest::collection::vec(damage(), 1..4)) {
            let _alone = alone();
            let mut bytes = weights();
            apply(&mut bytes, 5_000, &all);
            let _ = inspect(&bytes, None);
        }

        #[test]
        fn mutated_indexes_end_in_a_value_or_an_error(all in proptest::collection::vec(damage(), 1..4)) {
            let _alone = alone();
            let map = r#"{"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "a.safetensors"}}"#;
            let mut index = map.as_bytes().to_vec();
            let len = index.len();
            apply(&mut index, len, &all);
            let _ = inspect(&weights(), Some(&index));
        }
    }
}
