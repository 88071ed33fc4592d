//! The [`Engine`] over burn.

use super::account::account_of;
use super::checkpoint::{Checkpoint, HEAD};
use super::computed_with;
use super::device::cpu_identity;
use super::footprint::{cache_bytes, host_work_bytes, weights_bytes};
use super::forward::Executor;
use super::host_load::ProcProbe;
use super::memory::{HostProbe, HostRoom, rss_anon_bytes, total_memory_bytes, trim_heap};
use super::model::BurnModel;
use super::model_room::ModelRoom;
use super::placing::OnHost;
use super::save::save_model;
use super::source::{open_source, tokenizer_path};
use super::spec::ModelSpec;
use super::survey::{on_host, survey};
use super::weights::{WeightReader, compute_dtype};
use crate::artifact::{Execution, QuantizedModule};
use crate::event::Progress;
use crate::inference::{
    Engine, EngineInfo, ExecutionChoice, InferenceError, MemoryPrediction, MemoryProbe, Model, ModelInfo, ModelRecipe,
    SavedModel, SourceAccount, Workload,
};
use crate::units::DType;
use burn::tensor::Device;
use std::path::Path;

/// Grows when the numbers that this engine computes change.
const NUMERICS_VERSION: u32 = 4;

/// burn on one device.
pub struct BurnEngine {
    device: Device,
    info: EngineInfo,
    room: HostRoom,
    execution: ExecutionChoice,
    /// Anonymous memory of the process when the engine was made.
    program_bytes: u64,
}

impl BurnEngine {
    /// Runs on the host's processor through burn's Flex backend.
    pub fn cpu() -> BurnEngine {
        BurnEngine {
            device: Device::flex(),
            info: EngineInfo {
                backend: computed_with::named("burn-flex"),
                device: cpu_identity(),
                numerics_version: NUMERICS_VERSION,
                clock: "host monotonic clock; the device computes synchronously".to_owned(),
                is_host: true,
                computed_with: computed_with::host(),
            },
            room: HostRoom::default(),
            execution: ExecutionChoice::Auto,
            program_bytes: {
                trim_heap();
                rss_anon_bytes().unwrap_or(0)
            },
        }
    }

    /// Keeps what models take below a limit, in bytes.
    #[must_use]
    pub fn with_memory_limit(self, limit_bytes: Option<u64>) -> BurnEngine {
        BurnEngine { room: HostRoom { limit_bytes }, ..self }
    }

    /// Takes another path than the fastest.
    #[must_use]
    pub fn with_execution(mut self, execution: ExecutionChoice) -> BurnEngine {
        self.execution = execution;
        self.info.computed_with.insert("execution".to_owned(), execution.name().to_owned());
        self
    }

    /// Reads the config and opens the files.
    ///
    /// # Errors
    /// Where they are missing, damaged or of no known family.
    pub fn prepare(&self, recipe: &ModelRecipe) -> Result<(ModelSpec, Checkpoint), InferenceError> {
        open_source(&recipe.source)
    }
}

/// Checks that every tensor is there with its shape, and tells what the model is.
fn describe(spec: &ModelSpec, checkpoint: &Checkpoint, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
    let (hidden, vocab) = (spec.hidden_size, spec.vocab_size);
    let device = Device::flex();
    let embedding = WeightReader { checkpoint, spec, recipe, device: &device }.embedding_name();
    checkpoint.check(embedding, &[vocab, hidden])?;
    checkpoint.check("model.norm.weight", &[hidden])?;
    for (module, shape) in spec.linears() {
        if module != "lm_head" || !spec.tied_embeddings {
            let weight = format!("{module}.weight");
            check_asked(checkpoint, &weight, &shape, || missing_head(&weight))?;
        }
    }
    for layer_idx in 0..spec.n_layers {
        for norm in spec.block_norms() {
            checkpoint.check(&format!("model.layers.{layer_idx}.{}.weight", norm.name), &[norm.width])?;
        }
        for linear in spec.block_linears().iter().filter(|linear| linear.bias) {
            let bias = format!("model.layers.{layer_idx}.{}.bias", linear.name);
            check_asked(checkpoint, &bias, &[linear.n_out], || Some(missing_bias(spec, linear.name)))?;
        }
    }
    let stored = checkpoint.dtype_of(embedding).unwrap_or(DType::F32);
    let stored_quantization = checkpoint.stored_quantization(&spec.linears())?;
    if let (Some(stored), Some(config)) = (&stored_quantization, &recipe.quantization) {
        let schemes: Vec<&str> = stored.schemes.iter().map(|spec| spec.scheme.as_str()).collect();
        return Err(InferenceError::Unsupported(format!(
            "quantize with {}: the model's linears are stored quantized ({} {}); use the load stage itself, or the model that it was made of",
            config.name,
            stored.format,
            schemes.join(", ")
        )));
    }
    let n_packed = stored_quantization.as_ref().map_or(0, |stored| stored.n_params);
    check_memory(spec, checkpoint, recipe, stored, n_packed)?;
    Ok(ModelInfo {
        family: spec.family.to_owned(),
        n_layers: spec.n_layers,
        hidden_size: hidden,
        n_heads: spec.n_heads,
        n_kv_heads: spec.n_kv_heads,
        vocab_size: vocab,
        n_ctx_max: spec.n_ctx_max,
        n_params: spec.n_params(),
        tied_embeddings: spec.tied_embeddings,
        dtype: recipe.dtype.unwrap_or(stored),
        compute_dtype: compute_dtype(recipe),
        linears: spec.linears(),
        tokenizer_dir: tokenizer_path(&recipe.source),
        bos_token_id: spec.bos_token_id,
        stored_quantization,
    })
}

/// Checks a tensor that is there because the config asks for it; `why` says so where a folder lacks it.
fn check_asked(
    checkpoint: &Checkpoint,
    tensor: &str,
    shape: &[usize],
    why: impl FnOnce() -> Option<String>,
) -> Result<(), InferenceError> {
    match (checkpoint, checkpoint.check(tensor, shape)) {
        (Checkpoint::Folder(folder), Err(error)) if folder.raw(tensor).is_none() => Err(match why() {
            Some(reason) => {
                InferenceError::MissingTensor { path: folder.dir().to_owned(), tensor: tensor.to_owned(), reason }
            }
            None => error,
        }),
        (_, checked) => checked,
    }
}

fn missing_head(weight: &str) -> Option<String> {
    let reason = "config.json gives the model a head of its own (tie_word_embeddings: false, or left out); set \
                  tie_word_embeddings: true if the head is the embedding, or take files that hold the head";
    (weight == HEAD).then(|| reason.to_owned())
}

fn missing_bias(spec: &ModelSpec, linear: &str) -> String {
    match (spec.family, linear.split('.').next()) {
        ("qwen2", Some("self_attn")) => {
            "models of model_type qwen2 have biases on queries, keys and values; is it the model's own config.json?"
                .to_owned()
        }
        (_, Some("mlp")) => {
            "config.json asks for it (mlp_bias: true); set it to false if the model has none".to_owned()
        }
        _ => "config.json asks for it (attention_bias: true); set it to false if the model has none".to_owned(),
    }
}

/// Refuses a model whose weights can't fit into the machine's memory: those that are not mapped from a file as they are. `n_packed`
/// parameters are stored packed and stay so.
fn check_memory(
    spec: &ModelSpec,
    checkpoint: &Checkpoint,
    recipe: &ModelRecipe,
    stored: DType,
    n_packed: u64,
) -> Result<(), InferenceError> {
    let dtype = recipe.dtype.unwrap_or(stored);
    let is_mapped = dtype == stored && checkpoint.is_mapped();
    let largest = spec.linears().iter().map(|(_, [n_out, n_in])| n_out * n_in).max().unwrap_or(0) as u64;
    let whole = if is_mapped || recipe.quantization.is_some() { 0 } else { spec.n_params().saturating_sub(n_packed) };
    let asked_bytes = whole.saturating_mul(dtype.size_bytes() as u64).max(largest.saturating_mul(4));
    match total_memory_bytes() {
        Some(total) if asked_bytes > total => {
            let (what, device) = ("the model's weights".to_owned(), "this machine, with all of its memory".to_owned());
            Err(InferenceError::OutOfMemory { what, device, asked_bytes, free_bytes: Some(total) })
        }
        _ => Ok(()),
    }
}

impl Engine for BurnEngine {
    fn info(&self) -> EngineInfo {
        self.info.clone()
    }

    fn inspect(&self, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        describe(&spec, &checkpoint, recipe)
    }

    fn account(&self, recipe: &ModelRecipe) -> Result<SourceAccount, InferenceError> {
        account_of(&recipe.source)
    }

    fn check_values(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<(), InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        checkpoint.check_values(&spec, recipe.dtype, progress)
    }

    fn open(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        let info = describe(&spec, &checkpoint, recipe)?;
        self.room.check("the model's weights", weights_bytes(&info, recipe)?)?;
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe, device: &self.device };
        let weights = reader.read_all(&mut OnHost, progress)?;
        if recipe.quantization.is_some() || recipe.dtype.is_some() {
            // Pages of what was converted are not what it takes to run the model.
            checkpoint.drop_pages();
        }
        weights.touch_pages();
        let compute = info.compute_dtype;
        let executor = Executor { spec, weights, device: self.device.clone(), compute };
        let execution =
            Execution { path: "burn".to_owned(), products: Some("gemm".to_owned()), ..Execution::default() };
        let decodes_by_burn = self.execution == ExecutionChoice::Burn;
        Ok(Box::new(BurnModel::new(info, executor, ModelRoom::Host(self.room), execution, decodes_by_burn)))
    }

    fn survey(
        &self,
        recipe: &ModelRecipe,
        progress: &dyn Progress,
        each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        describe(&spec, &checkpoint, recipe)?;
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe, device: &self.device };
        survey(&reader, progress, &mut |candidate| on_host(&reader, candidate), each)
    }

    fn save(&self, recipe: &ModelRecipe, dir: &Path, progress: &dyn Progress) -> Result<SavedModel, InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        describe(&spec, &checkpoint, recipe)?;
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe, device: &self.device };
        save_model(&reader, dir, progress)
    }

    fn memory_probe(&self) -> Box<dyn MemoryProbe> {
        Box::new(HostProbe::start())
    }

    fn host_probe(&self) -> Option<Box<dyn crate::inference::HostProbe>> {
        Some(Box::new(ProcProbe::start()?))
    }

    fn predict_memory(
        &self,
        recipe: &ModelRecipe,
        work: &Workload,
    ) -> Result<Option<MemoryPrediction>, InferenceError> {
        let (spec, checkpoint) = self.prepare(recipe)?;
        let info = describe(&spec, &checkpoint, recipe)?;
        let is_converted = recipe.quantization.is_some() || recipe.dtype.is_some();
        Ok(Some(MemoryPrediction {
            weights_bytes: weights_bytes(&info, recipe)?,
            kv_cache_bytes: cache_bytes(&spec, info.compute_dtype, work.n_ctx),
            activations_bytes: host_work_bytes(&spec, info.compute_dtype, is_converted, work),
            program_bytes: self.program_bytes,
        }))
    }
}
