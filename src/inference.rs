//! What an engine can do: the port through which stages reach a model.
//!
//! Whole sequences go in, small results come out; logits stay on the device unless asked for. The engine owns the
//! clock that it times with and names it. Module names are Hugging Face's (`model.layers.4.mlp.down_proj`).

mod account;
mod decode_check;
mod device_probe;
mod error;
mod execution_choice;
mod host_probe;
mod log_probs;
mod memory;
mod records;

pub use account::{AccountPart, SourceAccount, StoredType, stored_words};
pub use decode_check::{CHECKED_POSITIONS, DecodeCheck, check_decode, decode_budget};
pub use device_probe::{DeviceFigures, DeviceProbe, EnergyWindow, GpuIdentity, OtherProcesses};
pub use error::InferenceError;
pub use execution_choice::ExecutionChoice;
pub use host_probe::{FULL_SPEED, HostProbe, QUIET_CPUS, Threads};
pub use log_probs::{LogProbFormat, LogProbRows, LogProbSink, LogProbSource, argmax, diverge_logits, score_logits};
pub use memory::{MemoryNeed, MemoryPrediction, Workload};
pub use records::{HubRevision, LoadRecord, QuantizeRecord};

use crate::artifact::{Execution, MemoryFigures, QuantizedModule};
use crate::event::Progress;
use crate::quantization::QuantizationConfig;
use crate::units::DType;
use labpipe_kernels::SchemeSpec;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

/// Where weights come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum ModelSource {
    /// A folder in Hugging Face layout, or a GGUF file.
    Path(PathBuf),
    /// A model on the Hugging Face hub, or a GGUF file there: `hf://org/name@revision/file`. It is looked for in the cache on disk.
    Hub(String),
    /// The shapes of a `config.json` with random weights drawn from `seed`.
    Random { config: PathBuf, seed: u64 },
}

/// Everything an engine needs to make a model: what `load` and `quantize` commit in place of weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModelRecipe {
    pub source: ModelSource,
    /// How weights that are not quantized are stored; null keeps the file's own type.
    pub dtype: Option<DType>,
    /// What weights are multiplied in; null takes the engine's default (f32 on a CPU).
    pub compute_dtype: Option<DType>,
    pub quantization: Option<QuantizationConfig>,
}

impl ModelRecipe {
    /// Returns true if both make the same model, whatever their quantization configs are called.
    pub fn is_same_model(&self, other: &ModelRecipe) -> bool {
        let meaning = |recipe: &ModelRecipe| recipe.quantization.as_ref().map(QuantizationConfig::canonical);
        (&self.source, self.dtype, self.compute_dtype) == (&other.source, other.dtype, other.compute_dtype)
            && meaning(self) == meaning(other)
    }

    /// Returns the recipe with its paths, which are kept as the pipeline file writes them, starting at `root`.
    pub fn rooted(&self, root: &Path) -> ModelRecipe {
        let source = match &self.source {
            ModelSource::Path(path) => ModelSource::Path(root.join(path)),
            ModelSource::Hub(id) => ModelSource::Hub(id.clone()),
            ModelSource::Random { config, seed } => ModelSource::Random { config: root.join(config), seed: *seed },
        };
        ModelRecipe { source, ..self.clone() }
    }
}

/// Who computes: goes into records and, with `device`, into the keys of measurements.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EngineInfo {
    /// `burn-flex 0.22.1`, the version exact.
    pub backend: String,
    /// `cpu: AMD EPYC 7B13, 2 threads, avx512f`: model, driver, power limit, whatever changes a measurement.
    pub device: String,
    /// Bumped whenever the engine's results change; in the key of everything computed.
    pub numerics_version: u32,
    /// `monotonic clock, synchronous device`.
    pub clock: String,
    /// True where the device is the host's processor: a measurement then needs the whole machine.
    pub is_host: bool,
    /// What else decides the numbers, by name: exact versions of the libraries that compute, instruction sets, and on a GPU its name,
    /// the driver, NVRTC and cuBLAS (`absent` where it is not there). Gathered once; in the key of everything that is computed.
    pub computed_with: BTreeMap<String, String>,
}

/// What a model is, known without loading its weights.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ModelInfo {
    /// `llama`, `qwen2`.
    pub family: String,
    pub n_layers: usize,
    pub hidden_size: usize,
    pub n_heads: usize,
    pub n_kv_heads: usize,
    pub vocab_size: usize,
    /// Longest context in tokens that the config allows.
    pub n_ctx_max: usize,
    pub n_params: u64,
    pub tied_embeddings: bool,
    /// Element type that weights are stored in by this recipe.
    pub dtype: DType,
    pub compute_dtype: DType,
    /// Linear modules in execution order, each `[out, in]`.
    pub linears: Vec<(String, [usize; 2])>,
    /// Folder that holds `tokenizer.json`, or the GGUF file that holds a tokenizer; null for random weights.
    pub tokenizer_dir: Option<PathBuf>,
    pub bos_token_id: Option<u32>,
    /// Null where all weights are stored as plain floats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stored_quantization: Option<StoredQuantization>,
}

impl ModelInfo {
    /// Returns the bytes of all weights as the files and the element type that was asked for have them.
    pub fn weights_bytes(&self) -> u64 {
        let (packed, packed_bytes) =
            self.stored_quantization.as_ref().map_or((0, 0), |stored| (stored.n_params, stored.bytes));
        self.n_params.saturating_sub(packed) * self.dtype.size_bytes() as u64 + packed_bytes
    }
}

/// Linears that a model's files hold quantized: they are opened as they are.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct StoredQuantization {
    /// Whose files they are: `bitsandbytes`.
    pub format: String,
    /// The schemes that occur.
    pub schemes: Vec<SchemeSpec>,
    pub n_linears: usize,
    /// Their parameters, and the bytes that codes and statistics take.
    pub n_params: u64,
    pub bytes: u64,
}

/// A model folder that was written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedModel {
    /// `bitsandbytes`: what opens it beside labpipe.
    pub format: String,
    /// Bytes of its safetensors file.
    pub bytes: u64,
    pub n_quantized: usize,
}

/// A timed prefill.
#[derive(Debug, Clone, PartialEq)]
pub struct Prefilled {
    /// From the start of the pass to the first token's logits on a synchronized device.
    pub duration_s: f64,
    /// argmax of the last position's logits.
    pub next_token: u32,
}

/// A token that was generated greedily, and the time it took.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Decoded {
    pub token: u32,
    pub duration_s: f64,
}

/// What scoring tells of one target token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TokenScore {
    /// Negative log-likelihood in nats.
    pub nll: f64,
    /// The model's own first choice at that position.
    pub argmax: u32,
}

/// What scoring against a base model tells of one target token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct DivergenceScore {
    /// Negative log-likelihood in nats.
    pub nll: f64,
    /// The model's own first choice at that position.
    pub argmax: u32,
    /// KL(base ‖ model) of the position's whole distribution, in nats.
    pub kl: f64,
}

/// Takes logits, `[n_rows, vocab_size]`, row-major: some consecutive positions at a time.
pub type TakeLogits<'a> = dyn FnMut(&[f32]) -> Result<(), InferenceError> + 'a;

/// One value stream of a module: where a captured tensor was taken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct CaptureSite {
    pub module: String,
    /// `input` or `output`.
    pub port: &'static str,
    pub layer_idx: Option<usize>,
    /// `embedding`, `norm`, `q_proj`, `attn`, `act`, `down_proj`, `block`, ….
    pub op: String,
}

/// Which sites to capture. Globs over module names; `*` matches within and across dots.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct CaptureFilter {
    /// Empty means every leaf operation.
    pub modules: Vec<String>,
    pub inputs: bool,
}

/// Takes captured values as they are computed, in execution order.
pub trait CaptureSink {
    /// Takes one chunk of a site's values; several chunks of one site follow one another in token order.
    ///
    /// # Shapes
    /// `values` is `[n_tokens, width]`, row-major; `first_token_idx` is the position of its first row.
    ///
    /// # Errors
    /// Whatever kept it from storing the values, in words; capture stops and returns it.
    fn take(&mut self, site: &CaptureSite, first_token_idx: usize, width: usize, values: &[f32]) -> Result<(), String>;

    /// Says that `site` carries the same values as `first`, which was or will be taken in this pass.
    fn alias(&mut self, site: &CaptureSite, first: &CaptureSite) -> Result<(), String>;
}

/// Samples memory while a stage measures.
pub trait MemoryProbe: Send {
    /// Notes what the device's allocator holds now: called between what a stage measures, never in a timed region.
    fn mark(&mut self) {}

    /// Stops sampling and returns what was seen; `weights_bytes` and `kv_cache_bytes` are the model's to fill in
    /// ([`MemoryFigures::of_model`]).
    fn finish(self: Box<Self>) -> MemoryFigures;
}

/// A model that is loaded and ready on a device.
pub trait Model: Send {
    fn info(&self) -> &ModelInfo;

    /// Bytes of parameters as stored on the device; tied weights counted once.
    fn weights_bytes(&self) -> u64;

    /// Returns how the model was run since it was lent last, for records; `None` if the engine has only one way.
    fn execution(&self) -> Option<Execution> {
        None
    }

    /// Bytes of the key-value cache as allocated now: 2 · n_layers · n_kv_heads · head_dim · positions · bytes of an element.
    fn kv_cache_bytes(&self) -> u64;

    /// Empties the cache and runs `tokens` in one pass, timed, leaving the cache filled for `decode`.
    ///
    /// # Errors
    /// `ContextTooLong`, `OutOfMemory`, `TokenOutOfRange`.
    fn prefill(&mut self, tokens: &[u32]) -> Result<Prefilled, InferenceError>;

    /// Gives back all that is not weights: the cache, the memory of passes, recordings. What a stage takes then does not depend on
    /// those that used the model before it.
    fn release(&mut self) {}

    /// Fills an empty cache with `tokens`, so that `decode` goes on behind them. Nothing is timed: an engine may run them in several
    /// passes, whose activations take less memory than those of one.
    ///
    /// # Errors
    /// Those of `prefill`.
    fn fill(&mut self, tokens: &[u32]) -> Result<(), InferenceError> {
        self.prefill(tokens).map(|_| ())
    }

    /// Makes room for `n_ctx` tokens of context, so that no allocation falls into a timed region.
    fn reserve(&mut self, n_ctx: usize) -> Result<(), InferenceError>;

    /// Generates `n_gen` tokens greedily after what the cache holds, each one timed.
    fn decode(&mut self, n_gen: usize) -> Result<Vec<Decoded>, InferenceError>;

    /// Names the clock that the last `decode` was timed with, where it is not the engine's.
    fn decode_clock(&self) -> Option<&'static str> {
        None
    }

    /// Generates as `decode` does, and hands over the logits that each token was chosen from, `[vocab_size]`. Where `decode` runs
    /// several tokens in another way than one, the tokens returned are those of that way: [`check_decode`] holds both together.
    ///
    /// # Errors
    /// Those of `decode`, and what `take` returns.
    fn decode_keeping(&mut self, n_gen: usize, take: &mut TakeLogits<'_>) -> Result<Vec<Decoded>, InferenceError>;

    /// Returns the logits of the last position of `tokens`, `[vocab_size]`. The cache is emptied first.
    fn last_logits(&mut self, tokens: &[u32]) -> Result<Vec<f32>, InferenceError>;

    /// Scores `tokens[first_target..]`, each from all tokens of the slice before it; `first_target` ≥ 1. The slice may be one
    /// token longer than the context: what predicts nothing is then not run ([`run_for_scores`]).
    fn score(&mut self, tokens: &[u32], first_target: usize) -> Result<Vec<TokenScore>, InferenceError>;

    /// Scores as `score` does and returns how many seconds that took, from an idle device to the scores on the host.
    ///
    /// # Errors
    /// Those of `score`.
    fn score_timed(&mut self, tokens: &[u32], first_target: usize) -> Result<(f64, Vec<TokenScore>), InferenceError> {
        let start = Instant::now();
        let scores = self.score(tokens, first_target)?;
        Ok((start.elapsed().as_secs_f64(), scores))
    }

    /// Runs `tokens` and hands over the logits of the positions `rows`, in order. The way to the host for callers without
    /// shorter one: one pass for each position here, so an engine does better.
    ///
    /// # Errors
    /// Those of `last_logits`, and what `take` returns.
    fn logits(&mut self, tokens: &[u32], rows: Range<usize>, take: &mut TakeLogits<'_>) -> Result<(), InferenceError> {
        for row in rows {
            take(&self.last_logits(&tokens[..=row])?)?;
        }
        Ok(())
    }

    /// Scores as `score` does, and hands the log-probabilities of every scored position to `sink`, packed. An engine with
    /// logits on a device packs them there, so that only packed rows cross to the host.
    ///
    /// # Errors
    /// Those of `score`; `Sink` where `sink` refuses.
    fn score_keeping(
        &mut self,
        tokens: &[u32],
        first_target: usize,
        format: LogProbFormat,
        sink: &mut dyn LogProbSink,
    ) -> Result<Vec<TokenScore>, InferenceError> {
        check_targets(tokens, first_target)?;
        let (vocab_size, run) = (self.info().vocab_size, run_for_scores(tokens, self.info().n_ctx_max));
        let mut scores: Vec<TokenScore> = Vec::with_capacity(tokens.len() - first_target);
        self.logits(run, first_target - 1..tokens.len() - 1, &mut |logits| {
            let first = first_target + scores.len();
            let targets = &tokens[first..first + logits.len() / vocab_size];
            scores.extend(score_logits(logits, vocab_size, targets)?);
            sink.take(LogProbRows::pack(format, logits, vocab_size)?).map_err(InferenceError::Sink)
        })?;
        Ok(scores)
    }

    /// Scores as `score` does, and tells how far every scored position's distribution is from the base model's, whose rows
    /// `base` gives in the order of the positions. An engine with logits on a device moves the packed rows there.
    ///
    /// # Errors
    /// Those of `score`; `Sink` where `base` has no such rows.
    fn score_against(
        &mut self,
        tokens: &[u32],
        first_target: usize,
        base: &mut dyn LogProbSource,
    ) -> Result<Vec<DivergenceScore>, InferenceError> {
        check_targets(tokens, first_target)?;
        let (vocab_size, run) = (self.info().vocab_size, run_for_scores(tokens, self.info().n_ctx_max));
        let mut scores: Vec<DivergenceScore> = Vec::with_capacity(tokens.len() - first_target);
        self.logits(run, first_target - 1..tokens.len() - 1, &mut |logits| {
            let first = first_target + scores.len();
            let targets = &tokens[first..first + logits.len() / vocab_size];
            let rows = base.next_rows(targets.len()).map_err(InferenceError::Sink)?;
            scores.extend(diverge_logits(logits, vocab_size, targets, &rows)?);
            Ok(())
        })?;
        Ok(scores)
    }

    /// Runs `tokens` through the model once and hands every matching site's values to `sink`.
    fn capture(
        &mut self,
        tokens: &[u32],
        filter: &CaptureFilter,
        sink: &mut dyn CaptureSink,
        progress: &dyn Progress,
    ) -> Result<(), InferenceError>;
}

/// Checks what `score` is asked for.
///
/// # Errors
/// `Unsupported` where the first target has nothing before it or there is none.
pub fn check_targets(tokens: &[u32], first_target: usize) -> Result<(), InferenceError> {
    if first_target == 0 || first_target >= tokens.len() {
        let n = tokens.len();
        return Err(InferenceError::Unsupported(format!(
            "score from token {first_target} of {n}: a target needs a token before it"
        )));
    }
    Ok(())
}

/// Returns the part of `tokens` that is run to score it: all, as references run whole windows (which matters where rotary
/// frequencies depend on the length); without the last, which predicts nothing, where all are more than the context.
pub fn run_for_scores(tokens: &[u32], n_ctx_max: usize) -> &[u32] {
    if tokens.len() > n_ctx_max { &tokens[..tokens.len() - 1] } else { tokens }
}

/// Makes models.
pub trait Engine: Send + Sync {
    fn info(&self) -> EngineInfo;

    /// Reads what a model is and checks that its files are whole, without loading weights.
    fn inspect(&self, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError>;

    /// Returns which entries of the model's files were used and which were not; empty where the model comes from no files.
    ///
    /// # Errors
    /// As [`Engine::inspect`].
    fn account(&self, _recipe: &ModelRecipe) -> Result<SourceAccount, InferenceError> {
        Ok(SourceAccount::default())
    }

    /// Reads every weight once and checks that its values are finite: damage is then told by the stage that names the model,
    /// not by each that uses it.
    fn check_values(&self, _recipe: &ModelRecipe, _progress: &dyn Progress) -> Result<(), InferenceError> {
        Ok(())
    }

    /// Loads (and quantizes) the model.
    fn open(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError>;

    /// Quantizes module by module, keeping none, and tells of each what it cost and lost.
    fn survey(
        &self,
        recipe: &ModelRecipe,
        progress: &dyn Progress,
        each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError>;

    /// Writes the model as a folder in Hugging Face layout, quantized as the recipe says.
    ///
    /// # Errors
    /// `Unsupported` where the format has no place for what the recipe asks, or the engine can't write; `Write`.
    fn save(&self, _recipe: &ModelRecipe, _dir: &Path, _progress: &dyn Progress) -> Result<SavedModel, InferenceError> {
        Err(InferenceError::Unsupported("save a model: this engine has no writer".to_owned()))
    }

    /// Starts to watch memory.
    fn memory_probe(&self) -> Box<dyn MemoryProbe>;

    /// Returns what watches the device's energy and clocks; nothing where the device tells of neither.
    fn device_probe(&self) -> Option<Box<dyn DeviceProbe>> {
        None
    }

    /// Returns what watches the host's processors; `None` where the system has no figures of them.
    fn host_probe(&self) -> Option<Box<dyn HostProbe>> {
        None
    }

    /// Predicts the memory that a stage takes at its peak with this model, from the model's shapes; nothing is loaded. Returns `None`
    /// where the engine has no such prediction.
    ///
    /// # Errors
    /// As [`Engine::inspect`].
    fn predict_memory(
        &self,
        _recipe: &ModelRecipe,
        _work: &Workload,
    ) -> Result<Option<MemoryPrediction>, InferenceError> {
        Ok(None)
    }

    /// Returns the bytes of device memory that could still be allocated; nothing where the device does not tell.
    fn free_bytes(&self) -> Option<u64> {
        None
    }
}
