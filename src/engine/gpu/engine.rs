//! The [`Engine`] on a GPU.

use super::arena::Arena;
use super::forecast::Shape;
use super::general::OnDevice;
use super::model::GpuModel;
use super::pass::Passes;
use super::products::{Products, element};
use super::room::{PoolProbe, Room, Senses};
use super::survey::Surveyor;
use super::weights::GpuWeights;
use crate::artifact::{Execution, QuantizedModule};
use crate::engine::burn_engine::BurnEngine;
use crate::engine::computed_with;
use crate::engine::footprint::{cache_bytes, host_work_bytes, weights_bytes};
use crate::engine::forward::Executor;
use crate::engine::model::BurnModel;
use crate::engine::model_room::ModelRoom;
use crate::engine::survey::survey;
use crate::engine::weights::{WeightReader, has_compute_dtype};
use crate::event::Progress;
use crate::inference::{
    DeviceProbe, Engine, EngineInfo, ExecutionChoice, HostProbe, InferenceError, MemoryPrediction, MemoryProbe, Model,
    ModelInfo, ModelRecipe, SavedModel, SourceAccount, Workload,
};
use crate::units::DType;
use burn::tensor::Device;
use cubecl::client::Client;
use labpipe_kernels::burn_ext::{DEVICE_PANEL_BYTES, LargeProducts};
use labpipe_kernels::cube::Element;
use labpipe_kernels::cube::kernel_store::KernelStore;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// A tile on the device that weights pass through when they are loaded.
const LOADING_BYTES: u64 = 32 << 20;

/// Grows when the numbers that this engine computes change.
const NUMERICS_VERSION: u32 = 4;

/// cubecl on one device.
pub struct GpuEngine {
    device: cubecl::Device,
    client: Client,
    execution: ExecutionChoice,
    /// Reads files, and does on the host what no kernel does.
    host: BurnEngine,
    info: EngineInfo,
    senses: Senses,
    room: Room,
    /// What the process takes of the device beside the allocator's memory, once libraries are open.
    program_bytes: OnceLock<u64>,
    /// Written when the engine goes: what was compiled has been by then.
    _kernels: Option<KernelStore>,
}

impl GpuEngine {
    /// Takes a device that was found; `device` identifies it in records, `kernels` keeps what is compiled for it.
    /// `parts` is what the machine offers for it, by name: driver, compiler, cuBLAS.
    pub fn new(
        cube_device: cubecl::Device,
        device: String,
        parts: BTreeMap<String, String>,
        senses: Senses,
        kernels: Option<KernelStore>,
    ) -> GpuEngine {
        let client = cube_device.client();
        let identity = &client.properties().identity;
        let chip = format!("{} ({})", identity.name, identity.fingerprint);
        let burn = computed_with::named("burn").replacen("burn", &format!("burn-{}", client.name()), 1);
        let info = EngineInfo {
            backend: format!("{burn} ({})", computed_with::named("cubecl")),
            device,
            numerics_version: NUMERICS_VERSION,
            clock: "host monotonic clock around a synchronized device".to_owned(),
            is_host: false,
            computed_with: computed_with::gpu(client.name(), &chip, parts),
        };
        let room = Room::new(&client, &senses);
        GpuEngine {
            device: cube_device,
            client,
            execution: ExecutionChoice::Auto,
            host: BurnEngine::cpu(),
            info,
            senses,
            room,
            program_bytes: OnceLock::new(),
            _kernels: kernels,
        }
    }

    /// Takes the path that was asked for.
    #[must_use]
    pub fn with_execution(mut self, execution: ExecutionChoice) -> GpuEngine {
        self.execution = execution;
        self.info.computed_with.insert("execution".to_owned(), execution.name().to_owned());
        self
    }

    /// Fills in what a GPU computes in where the recipe leaves it open: what weights are stored in, so far as the device can.
    fn settled(&self, recipe: &ModelRecipe) -> Result<ModelRecipe, InferenceError> {
        if has_compute_dtype(recipe) {
            return Ok(recipe.clone());
        }
        let has_halves = self.client.name() == "cuda";
        let stored = match recipe.dtype {
            Some(dtype) => dtype,
            None => self.host.inspect(recipe)?.dtype,
        };
        let compute_dtype = Some(if has_halves { stored } else { DType::F32 });
        Ok(ModelRecipe { compute_dtype, ..recipe.clone() })
    }
}

impl GpuEngine {
    /// Gives back what an earlier model or loading left in the pools, for the next to have. The runtime refuses while another thread
    /// records a graph; then it stays where it is, and nothing else is wrong.
    fn tidy(&self) {
        self.room.tidy();
    }

    /// Returns what the process takes of the device beside the allocator's memory: asked once, with cuBLAS open.
    fn program_bytes(&self, compute: DType) -> u64 {
        *self.program_bytes.get_or_init(|| {
            let products = Products::new(self.client.clone(), element(compute));
            let bytes = self.room.program_bytes();
            drop(products);
            self.tidy();
            bytes.unwrap_or(0)
        })
    }

    /// Describes a settled recipe's model, and sees that the device computes in what it asks for and has room for its weights.
    fn admit(&self, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        let info = self.host.inspect(recipe)?;
        let compute = info.compute_dtype;
        if compute != DType::F32 && self.client.name() != "cuda" {
            return Err(InferenceError::Unsupported(format!(
                "compute in {compute} on {}: its kernels know f32 alone; set compute_dtype: f32",
                self.info.device
            )));
        }
        self.tidy();
        self.room.check("the model's weights", weights_bytes(&info, recipe)? + LOADING_BYTES)?;
        Ok(info)
    }

    /// Returns what of a model the fused path does not compute; `None` if it computes all of it.
    fn fused_path_lacks(&self, recipe: &ModelRecipe, info: &ModelInfo) -> Result<Option<String>, InferenceError> {
        let linears = info.linears.iter().map(|(module, _)| module.as_str());
        let asked = recipe
            .quantization
            .iter()
            .flat_map(|config| linears.clone().filter_map(|module| config.scheme_for(module)));
        let stored = info.stored_quantization.iter().flat_map(|stored| &stored.schemes);
        if asked.chain(stored).any(|scheme| scheme.outlier_threshold.is_some()) {
            return Ok(Some("LLM.int8(), whose products quantize activations too".to_owned()));
        }
        let (spec, _) = self.host.prepare(recipe)?;
        Ok(spec.fused_path_lacks())
    }

    /// Loads a model for the general path: burn's operations, with the kernels for weights in stored form.
    fn load_general(
        &self,
        recipe: &ModelRecipe,
        fallback: Option<String>,
        progress: &dyn Progress,
    ) -> Result<BurnModel, InferenceError> {
        let info = self.admit(recipe)?;
        let (spec, checkpoint) = self.host.prepare(recipe)?;
        let device = Device::new(self.device.clone());
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe, device: &device };
        let large = Arc::new(LargeProducts::open(&self.client));
        let mut placing = OnDevice::new(&self.device, &self.client, &reader, Arc::clone(&large), progress);
        let weights = reader.read_all(&mut placing, progress)?;
        drop(placing);
        super::decode::synchronize(&self.client)?;
        self.tidy();
        let is_cuda = self.client.name() == "cuda";
        let cublas = large.cublas();
        let products = cublas.as_ref().map_or("burn's matmul".to_owned(), |version| format!("cuBLAS {version}"));
        let slow = cublas
            .err()
            .filter(|_| is_cuda)
            .map(|reason| format!("multiply without cuBLAS, which is slower: {reason}"));
        let execution = Execution {
            path: "burn".to_owned(),
            fallback,
            products: Some(products),
            decode: None,
            slow: slow.into_iter().collect(),
        };
        let executor = Executor { spec, weights, device, compute: info.compute_dtype };
        Ok(BurnModel::new(info, executor, ModelRoom::Device(self.room.clone()), execution, true))
    }

    fn load_fused(
        &self,
        recipe: &ModelRecipe,
        progress: &dyn Progress,
        products: impl FnOnce(Client, Element) -> Products + Send,
    ) -> Result<GpuModel, InferenceError> {
        let recipe = self.settled(recipe)?;
        let info = self.admit(&recipe)?;
        let compute = info.compute_dtype;
        if let Some(lacks) = self.fused_path_lacks(&recipe, &info)? {
            return Err(InferenceError::Unsupported(format!(
                "run the model by the fused kernels: they do not compute {lacks}; take --execution auto or burn"
            )));
        }
        let (spec, checkpoint) = self.host.prepare(&recipe)?;
        let host = Device::flex();
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe: &recipe, device: &host };
        // What opens a library for products and what copies weights wait for different things. A thread has a stream of its own unless
        // it is told to use another's.
        let stream = self.client.empty(4).stream;
        let (weights, products) = std::thread::scope(|scope| {
            let open = || stream.executes(|| products(self.client.clone(), element(compute)));
            let products = scope.spawn(open);
            let weights = GpuWeights::load(&self.client, &reader, progress);
            (weights, products.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let weights = weights?;
        super::decode::synchronize(&self.client)?;
        self.tidy();
        let passes = Passes { spec, weights, products, compute, arena: Arena::default() };
        Ok(GpuModel::new(info, passes, self.room.clone()))
    }
}

impl Engine for GpuEngine {
    fn info(&self) -> EngineInfo {
        self.info.clone()
    }

    fn inspect(&self, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        self.host.inspect(&self.settled(recipe)?)
    }

    fn account(&self, recipe: &ModelRecipe) -> Result<SourceAccount, InferenceError> {
        self.host.account(recipe)
    }

    /// Values pass by on their way to the device and are checked there, unless they are to be kept in another type: how many become 0 in
    /// it is counted before.
    fn check_values(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<(), InferenceError> {
        if recipe.dtype.is_some() { self.host.check_values(recipe, progress) } else { Ok(()) }
    }

    fn open(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        let fused = || -> Result<Box<dyn Model>, InferenceError> {
            Ok(Box::new(self.load_fused(recipe, progress, Products::new)?))
        };
        if self.execution == ExecutionChoice::Fused {
            return fused();
        }
        let settled = self.settled(recipe)?;
        let lacks = match self.execution {
            ExecutionChoice::Burn => None,
            _ => match self.fused_path_lacks(&settled, &self.host.inspect(&settled)?)? {
                None => return fused(),
                lacks => lacks,
            },
        };
        let fallback = lacks.map(|lacks| format!("the fused kernels do not compute {lacks}: burn's operations do"));
        Ok(Box::new(self.load_general(&settled, fallback, progress)?))
    }

    fn survey(
        &self,
        recipe: &ModelRecipe,
        progress: &dyn Progress,
        each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError> {
        // What is wrong with the model is told before the device is asked for anything.
        self.host.inspect(recipe)?;
        let (spec, checkpoint) = self.host.prepare(recipe)?;
        let host = Device::flex();
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe, device: &host };
        self.tidy();
        let mut surveyor = Surveyor::new(&self.client, &self.room, &reader, progress);
        let surveyed = survey(&reader, progress, &mut |candidate| surveyor.measure(candidate), each);
        drop(surveyor);
        self.tidy();
        surveyed
    }

    fn save(&self, recipe: &ModelRecipe, dir: &Path, progress: &dyn Progress) -> Result<SavedModel, InferenceError> {
        self.host.save(recipe, dir, progress)
    }

    fn memory_probe(&self) -> Box<dyn MemoryProbe> {
        Box::new(PoolProbe::start(&self.client, || (self.senses.memory)()))
    }

    fn device_probe(&self) -> Option<Box<dyn DeviceProbe>> {
        (self.senses.device)()
    }

    fn host_probe(&self) -> Option<Box<dyn HostProbe>> {
        self.host.host_probe()
    }

    fn predict_memory(
        &self,
        recipe: &ModelRecipe,
        work: &Workload,
    ) -> Result<Option<MemoryPrediction>, InferenceError> {
        let recipe = self.settled(recipe)?;
        let info = self.host.inspect(&recipe)?;
        let (spec, _) = self.host.prepare(&recipe)?;
        let weights_bytes = weights_bytes(&info, &recipe)?;
        let has_panels = self.info.computed_with.get("cublas").is_some_and(|version| version != "absent");
        let shape = Shape { spec: &spec, compute: info.compute_dtype, recipe: &recipe, dtype: info.dtype, has_panels };
        let n_ctx = work.n_ctx.max(work.n_pass);
        let is_general = self.execution == ExecutionChoice::Burn || self.fused_path_lacks(&recipe, &info)?.is_some();
        let activations_bytes = match is_general {
            // The operations are those of a CPU's pass, and a panel of decoded rows.
            true => host_work_bytes(&spec, info.compute_dtype, false, work) + DEVICE_PANEL_BYTES as u64,
            false => shape.working_bytes(work),
        };
        Ok(Some(MemoryPrediction {
            weights_bytes,
            kv_cache_bytes: cache_bytes(&spec, info.compute_dtype, n_ctx),
            activations_bytes,
            program_bytes: self.program_bytes(info.compute_dtype),
        }))
    }

    fn free_bytes(&self) -> Option<u64> {
        self.room.free_bytes()
    }
}

/// Panels, which passes take where cuBLAS is: by it on an NVIDIA GPU, elsewhere by the kernels that a software Vulkan runs too.
#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::NullProgress;
    use crate::inference::ModelSource;
    use std::path::PathBuf;
    use std::sync::Arc;

    fn engine() -> GpuEngine {
        let device = cubecl::Device::default();
        let senses = Senses {
            memory: Box::new(|| Box::new(crate::engine::memory::HostProbe::start())),
            device: Box::new(|| None),
            free_bytes: Arc::new(|| None),
            used_bytes: Arc::new(|| None),
            limit_bytes: None,
        };
        GpuEngine::new(device, "a GPU".to_owned(), BTreeMap::new(), senses, None)
    }

    fn recipe(folder: &str, scheme: Option<&str>, compute: DType) -> ModelRecipe {
        let config = |scheme: &str| {
            crate::quantization::parse(&format!("scheme: {scheme}\n"), scheme, scheme).expect("a config")
        };
        ModelRecipe {
            source: ModelSource::Path(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(folder)),
            dtype: Some(compute),
            compute_dtype: Some(compute),
            quantization: scheme.map(config),
        }
    }

    /// Holds passes in panels of several sizes against those without, where products are rounded before they are added.
    fn compare(folder: &str, scheme: Option<&str>) {
        let engine = engine();
        let halves = (engine.client.name() == "cuda").then_some((DType::F16, 0.05));
        for (compute, budget) in [Some((DType::F32, 1e-3)), halves].into_iter().flatten() {
            let recipe = recipe(folder, scheme, compute);
            let load = |products: &(dyn Fn(Client, Element) -> Products + Sync)| {
                engine.load_fused(&recipe, &NullProgress, products).expect("a model")
            };
            let mut model = load(&Products::without_cublas);
            let vocab = model.info().vocab_size as u32;
            let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % vocab).collect();
            let scores = model.score(&tokens, 1).expect("scores");
            // From a row or two at a time to everything at once.
            for panel_bytes in [1, 40_000, 1 << 22] {
                let mut panels = load(&|client, element| Products::in_panels(client, element, panel_bytes));
                for pass in 0..2 {
                    let found = panels.score(&tokens, 1).expect("scores");
                    for (a, b) in scores.iter().zip(&found) {
                        let what = format!("{folder} {scheme:?} {compute}, panels of {panel_bytes} bytes, pass {pass}");
                        assert!((a.nll - b.nll).abs() < budget, "{what}: {} and {}", a.nll, b.nll);
                    }
                }
            }
        }
    }

    #[test]
    fn a_context_filled_in_parts_goes_on_as_one_of_one_pass_does() {
        let engine = engine();
        for folder in ["models/stories260k", "tests/fixtures/families/gemma2"] {
            let recipe = recipe(folder, None, DType::F32);
            let mut model = engine.load_fused(&recipe, &NullProgress, Products::new).expect("a model");
            let vocab = model.info().vocab_size as u32;
            let tokens: Vec<u32> = (0..40).map(|i| (i * 37 + 11) % vocab).collect();
            let mut logits = |fill: &dyn Fn(&mut GpuModel)| {
                model.reserve(48).expect("room");
                fill(&mut model);
                let mut all: Vec<f32> = Vec::new();
                model
                    .decode_keeping(4, &mut |row: &[f32]| {
                        all.extend_from_slice(row);
                        Ok(())
                    })
                    .expect("tokens");
                all
            };
            let whole = logits(&|model| model.prefill(&tokens).map(|_| ()).expect("a pass"));
            let parts = logits(&|model| model.fill_by(&tokens, 7).expect("passes"));
            let (difference, norm) = whole
                .iter()
                .zip(&parts)
                .fold((0.0f64, 0.0f64), |(d, n), (a, b)| (d + f64::from(a - b).powi(2), n + f64::from(*a).powi(2)));
            let error = (difference / norm).sqrt();
            assert!(error < 1e-4 && whole.len() == parts.len(), "{folder}: {error:.2e}");
        }
    }

    #[test]
    fn released_memory_is_not_the_next_stage_s() {
        let engine = engine();
        let recipe = recipe("models/stories260k", Some("nf4"), DType::F32);
        let mut model = engine.load_fused(&recipe, &NullProgress, Products::new).expect("a model");
        let tokens: Vec<u32> = (3..43).collect();
        let mut bytes = |n_ctx: usize| {
            model.release();
            model.reserve(n_ctx).expect("room");
            model.prefill(&tokens[..n_ctx]).expect("a pass");
            model.kv_cache_bytes()
        };
        let (long, short) = (bytes(40), bytes(10));
        assert_eq!((long, short), (40 * bytes(1), 10 * bytes(1)));
    }

    #[test]
    fn products_in_panels_that_are_added_to_the_residual_stream_score_the_same() {
        for scheme in [None, Some("nf4"), Some("int8"), Some("int4")] {
            compare("models/stories260k", scheme);
        }
    }

    #[test]
    fn families_with_norms_or_biases_behind_their_products_score_the_same_in_panels() {
        for family in ["gemma2", "gemma3", "llama", "phi3", "qwen2"] {
            compare(&format!("tests/fixtures/families/{family}"), Some("nf4"));
        }
    }
}
