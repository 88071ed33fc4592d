//! `doctor --self-test`: whether this machine computes what it should. Small models of every family, with random weights, run on the
//! device by every path that it has; their logits are compared with those of burn's operations on the CPU in f32, and each path's decoded
//! tokens with its own passes.

use super::engine::{self, Asked};
use super::error::CliError;
use super::print;
use crate::event::NullProgress;
use crate::inference::{
    Engine, ExecutionChoice, InferenceError, ModelRecipe, ModelSource, check_decode, decode_budget,
};
use crate::quantization;
use crate::units::DType;
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Exit code of a check that failed.
const FAILED: u8 = 5;

/// Tokens of a prompt, and how many are decoded after it.
const N_PROMPT: u32 = 24;
const N_DECODED: usize = 6;

macro_rules! family {
    ($name:literal) => {
        ($name, include_str!(concat!("../../tests/fixtures/families/", $name, "/config.json")))
    };
}

/// A name and a config.json for each family, and for what a family may have besides.
const FAMILIES: [(&str, &str); 13] = [
    family!("gemma2"),
    family!("gemma3"),
    family!("llama"),
    family!("llama-dynamic"),
    family!("llama-llama3"),
    family!("llama-yarn"),
    family!("mistral"),
    family!("olmo2"),
    family!("phi3-longrope"),
    family!("qwen2"),
    family!("qwen3"),
    family!("smollm3"),
    family!("smollm3-sliding"),
];

/// A model as wide as the kernels for tensor cores need, which runs in every scheme.
const WIDE: (&str, &str) = (
    "wide llama",
    r#"{"model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 512, "max_position_embeddings": 256, "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false, "hidden_act": "silu", "rope_theta": 10000.0}"#,
);

/// Quantization configs; `None` for weights that are not quantized.
const SCHEMES: [(&str, Option<&str>); 8] = [
    ("plain", None),
    ("nf4", Some("scheme: nf4\n")),
    ("nf4 double", Some("scheme: nf4\ndouble_quant: true\n")),
    ("fp4", Some("scheme: fp4\n")),
    ("mxfp4", Some("scheme: mxfp4\n")),
    ("int8", Some("scheme: int8\n")),
    ("int4", Some("scheme: int4\n")),
    ("LLM.int8()", Some("scheme: int8\noutlier_threshold: 6.0\n")),
];

/// Those that every family runs in.
const N_FAMILY_SCHEMES: usize = 2;

/// What one case came to.
struct Found {
    /// ‖found − expected‖ / ‖expected‖ over the last position's logits.
    error: f64,
    budget: f64,
    /// The path that ran, as records name it.
    path: String,
}

/// Runs all cases on a device and prints what they came to.
///
/// # Errors
/// Where the device can't be used, or no folder for configs can be written.
pub fn self_test(device: &str) -> Result<u8, CliError> {
    let open = |device: &str, execution| {
        engine::build(&Asked { device, memory_limit: None, execution }).map_err(CliError::Device)
    };
    let (reference, _) = open("cpu", ExecutionChoice::Burn)?;
    let paths = [ExecutionChoice::Burn, ExecutionChoice::Auto];
    let engines =
        paths.into_iter().map(|path| open(device, path).map(|(engine, _)| engine)).collect::<Result<Vec<_>, _>>()?;
    let info = engines[0].info();
    // Elsewhere kernels compute in f32 alone.
    let is_cuda = info.backend.starts_with("burn-cuda");
    let dtypes: &[DType] = if is_cuda || info.is_host { &[DType::F32, DType::F16, DType::Bf16] } else { &[DType::F32] };
    let folder = std::env::temp_dir().join(format!("labpipe-self-test-{}", std::process::id()));
    let result = cases(&folder, &reference, &engines, dtypes);
    // What is left of it is small, and the system's to remove.
    let _ = std::fs::remove_dir_all(&folder);
    let (lines, n_cases, n_failed) = result?;
    let mut text = format!("self-test on {}, against burn's operations on the CPU in f32\n{lines}", info.device);
    let _ = match n_failed {
        0 => writeln!(text, "{n_cases} cases, all within their budgets"),
        _ => writeln!(text, "{n_failed} of {n_cases} cases FAILED: numbers from this device are not to be trusted"),
    };
    print(&text)?;
    Ok(if n_failed == 0 { 0 } else { FAILED })
}

/// Runs every model on every engine; returns a line a model, the number of cases, and of those that failed.
fn cases(
    folder: &Path,
    reference: &Arc<dyn Engine>,
    engines: &[Arc<dyn Engine>],
    dtypes: &[DType],
) -> Result<(String, usize, usize), CliError> {
    let (mut text, mut n_cases, mut n_failed) = (String::new(), 0, 0);
    for (name, config) in FAMILIES.into_iter().chain([WIDE]) {
        let path = written(folder, name, config)?;
        let schemes = if name == WIDE.0 { &SCHEMES[..] } else { &SCHEMES[..N_FAMILY_SCHEMES] };
        let mut worst: Option<Found> = None;
        let mut paths: Vec<String> = Vec::new();
        let mut failures = String::new();
        let tries = schemes.iter().flat_map(|scheme| dtypes.iter().map(move |dtype| (scheme, *dtype)));
        for ((scheme, config), dtype) in tries {
            for engine in engines {
                n_cases += 1;
                match case(&path, *config, dtype, reference, engine.as_ref()) {
                    Ok(found) => {
                        let share = |found: &Found| found.error / found.budget;
                        if share(&found) >= 1.0 || found.error.is_nan() {
                            n_failed += 1;
                            let _ = writeln!(
                                failures,
                                "  FAILED: {scheme} in {dtype} by {}: logits are {:.1e} apart, the budget is {:.0e}",
                                found.path, found.error, found.budget
                            );
                        }
                        if !paths.contains(&found.path) {
                            paths.push(found.path.clone());
                        }
                        if worst.as_ref().is_none_or(|worst| share(&found) > share(worst)) {
                            worst = Some(found);
                        }
                    }
                    Err(error) => {
                        n_failed += 1;
                        let _ = writeln!(failures, "  FAILED: {scheme} in {dtype}: failed to {error}");
                    }
                }
            }
        }
        let worst = worst.map_or("nothing ran".to_owned(), |found| {
            format!("at most {:.1e} apart, of a budget of {:.0e}", found.error, found.budget)
        });
        let _ = writeln!(text, "{name:16} {:24} {worst}", paths.join(", "));
        text += &failures;
    }
    Ok((text, n_cases, n_failed))
}

fn written(folder: &Path, name: &str, config: &str) -> Result<PathBuf, CliError> {
    let path = folder.join(name.replace(' ', "-")).join("config.json");
    let parent = path.parent().unwrap_or(folder);
    std::fs::create_dir_all(parent).and_then(|()| std::fs::write(&path, config)).map_err(|error| CliError::Usage {
        message: format!("failed to write {}: {error}", path.display()),
        hint: Some("TMPDIR names another folder for temporary files".to_owned()),
    })?;
    Ok(path)
}

fn case(
    config: &Path,
    scheme: Option<&str>,
    dtype: DType,
    reference: &Arc<dyn Engine>,
    engine: &dyn Engine,
) -> Result<Found, InferenceError> {
    let quantization = scheme.map(|text| quantization::parse(text, "self-test", "self-test"));
    let quantization = quantization.transpose().map_err(|error| InferenceError::Unsupported(error.to_string()))?;
    let quantizes = quantization.iter().flat_map(|config| &config.scheme).any(|spec| spec.outlier_threshold.is_some());
    let source = ModelSource::Random { config: config.to_owned(), seed: 7 };
    let recipe = |compute| ModelRecipe {
        source: source.clone(),
        dtype: Some(dtype),
        compute_dtype: Some(compute),
        quantization: quantization.clone(),
    };
    let mut expected = reference.open(&recipe(DType::F32), &NullProgress)?;
    let vocab_size = expected.info().vocab_size as u32;
    let tokens: Vec<u32> = (0..N_PROMPT).map(|i| (i * 37 + 11) % vocab_size).collect();
    let expected = expected.last_logits(&tokens)?;
    let mut model = engine.open(&recipe(dtype), &NullProgress)?;
    let found = model.last_logits(&tokens)?;
    let budget = decode_budget(dtype, quantizes);
    model.reserve(N_PROMPT as usize + N_DECODED)?;
    check_decode(model.as_mut(), &tokens, N_DECODED, budget)?;
    let path = model.execution().map_or_else(|| "?".to_owned(), |execution| execution.path);
    Ok(Found { error: relative_error(&found, &expected), budget, path })
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    let square = |value: f64| value * value;
    let noise: f64 = found.iter().zip(expected).map(|(a, b)| square(f64::from(*a) - f64::from(*b))).sum();
    let signal: f64 = expected.iter().map(|value| square(f64::from(*value))).sum();
    if found.len() == expected.len() { (noise / signal).sqrt() } else { f64::NAN }
}
