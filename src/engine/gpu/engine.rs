//! The [`Engine`] on a GPU.

use super::model::GpuModel;
use super::pass::Passes;
use super::products::{Products, element};
use super::room::{PoolProbe, Room, Senses};
use super::weights::GpuWeights;
use crate::artifact::QuantizedModule;
use crate::engine::burn_engine::BurnEngine;
use crate::engine::footprint::weights_bytes;
use crate::engine::weights::{WeightReader, has_compute_dtype};
use crate::event::Progress;
use crate::inference::{
    DeviceProbe, Engine, EngineInfo, InferenceError, MemoryProbe, Model, ModelInfo, ModelRecipe, SavedModel,
};
use crate::units::DType;
use burn::tensor::Device;
use cubecl::client::Client;
use labpipe_kernels::cube::kernel_store::KernelStore;
use std::path::Path;

/// Grows when the numbers that this engine computes change.
const NUMERICS_VERSION: u32 = 2;

/// cubecl on one device.
pub struct GpuEngine {
    client: Client,
    /// Reads files and surveys quantization on the host.
    host: BurnEngine,
    info: EngineInfo,
    senses: Senses,
    room: Room,
    /// Written when the engine goes: what was compiled has been by then.
    _kernels: Option<KernelStore>,
}

impl GpuEngine {
    /// Takes a device that was found; `device` identifies it in records, `kernels` keeps what is compiled for it.
    pub fn new(client: Client, device: String, senses: Senses, kernels: Option<KernelStore>) -> GpuEngine {
        let info = EngineInfo {
            backend: format!("burn-{} 0.22 (cubecl 0.11)", client.name()),
            device,
            numerics_version: NUMERICS_VERSION,
            clock: "host monotonic clock around a synchronized device".to_owned(),
            is_host: false,
        };
        let room = Room::new(&client, &senses);
        GpuEngine { client, host: BurnEngine::cpu(), info, senses, room, _kernels: kernels }
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
        let _ = self.client.memory_cleanup();
    }
}

impl Engine for GpuEngine {
    fn info(&self) -> EngineInfo {
        self.info.clone()
    }

    fn inspect(&self, recipe: &ModelRecipe) -> Result<ModelInfo, InferenceError> {
        self.host.inspect(&self.settled(recipe)?)
    }

    fn open(&self, recipe: &ModelRecipe, progress: &dyn Progress) -> Result<Box<dyn Model>, InferenceError> {
        let recipe = self.settled(recipe)?;
        let info = self.host.inspect(&recipe)?;
        let compute = info.compute_dtype;
        if compute != DType::F32 && self.client.name() != "cuda" {
            return Err(InferenceError::Unsupported(format!(
                "compute in {compute} on {}: its kernels know f32 alone; set compute_dtype: f32",
                self.info.device
            )));
        }
        self.tidy();
        self.room.check("the model's weights", weights_bytes(&info, &recipe)?)?;
        let (spec, checkpoint) = self.host.prepare(&recipe)?;
        let host = Device::flex();
        let reader = WeightReader { checkpoint: &checkpoint, spec: &spec, recipe: &recipe, device: &host };
        // What opens a library for products and what copies weights wait for different things. A thread has a stream of its own unless
        // it is told to use another's.
        let stream = self.client.empty(4).stream;
        let (weights, products) = std::thread::scope(|scope| {
            let open = || stream.executes(|| Products::new(self.client.clone(), element(compute)));
            let products = scope.spawn(open);
            let weights = GpuWeights::load(&self.client, &reader, progress);
            (weights, products.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
        });
        let weights = weights?;
        super::decode::synchronize(&self.client)?;
        self.tidy();
        Ok(Box::new(GpuModel::new(info, Passes { spec, weights, products, compute }, self.room.clone())))
    }

    fn survey(
        &self,
        recipe: &ModelRecipe,
        progress: &dyn Progress,
        each: &mut dyn FnMut(QuantizedModule),
    ) -> Result<(), InferenceError> {
        self.host.survey(recipe, progress, each)
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

    fn free_bytes(&self) -> Option<u64> {
        self.room.free_bytes()
    }
}
