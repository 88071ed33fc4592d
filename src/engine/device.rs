//! Which device an engine runs on, and why.

use super::burn_engine::BurnEngine;
use crate::inference::{Engine, ExecutionChoice, InferenceError};
#[cfg(any(feature = "cuda", feature = "wgpu"))]
use std::collections::BTreeMap;
use std::sync::Arc;

/// Builds the engine for a device without a memory limit.
///
/// # Errors
/// As [`build_within`].
pub fn build(device: &str) -> Result<(Arc<dyn Engine>, String), InferenceError> {
    build_within(device, None, ExecutionChoice::Auto)
}

/// Builds the engine for a device: `auto`, `cpu`, `cuda`, `cuda:N`, `wgpu`. Returns it with the reason for the choice. Its models keep
/// below `memory_limit` bytes: of memory of the device, or of this process on a CPU. They take the path `execution` through it.
///
/// # Errors
/// `Device` where the device is unknown, is not there, this build can't drive it, or the fused path is asked of a CPU.
pub fn build_within(
    device: &str,
    memory_limit: Option<u64>,
    execution: ExecutionChoice,
) -> Result<(Arc<dyn Engine>, String), InferenceError> {
    let cpu = || -> Result<Arc<dyn Engine>, InferenceError> {
        if execution == ExecutionChoice::Fused {
            let reason = "fused kernels run on GPUs alone; take --execution auto or burn".to_owned();
            return Err(InferenceError::Device { device: "cpu".to_owned(), reason });
        }
        Ok(Arc::new(BurnEngine::cpu().with_memory_limit(memory_limit).with_execution(execution)))
    };
    match device {
        "cpu" => Ok((cpu()?, "cpu: asked for".to_owned())),
        "auto" => match cuda(0, memory_limit, execution) {
            Ok(engine) => Ok((engine, "cuda: an NVIDIA GPU is there".to_owned())),
            Err(reason) => Ok((cpu()?, format!("cpu: {reason}"))),
        },
        "wgpu" => match wgpu(memory_limit, execution) {
            Ok(engine) => Ok((engine, "wgpu: asked for".to_owned())),
            Err(reason) => Err(unavailable(device, &reason)),
        },
        _ => {
            let index = match device.strip_prefix("cuda") {
                Some("") => Some(0),
                Some(rest) => rest.strip_prefix(':').and_then(|index| index.parse().ok()),
                None => None,
            };
            let unknown = "no such device; labpipe knows auto, cpu, cuda, cuda:N and wgpu";
            let index = index.ok_or_else(|| unavailable(device, unknown))?;
            let engine = cuda(index, memory_limit, execution).map_err(|reason| unavailable(device, &reason))?;
            Ok((engine, format!("{device}: asked for")))
        }
    }
}

fn unavailable(device: &str, reason: &str) -> InferenceError {
    InferenceError::Device { device: device.to_owned(), reason: format!("{reason}; try --device cpu") }
}

#[cfg(feature = "cuda")]
fn cuda(index: usize, memory_limit: Option<u64>, execution: ExecutionChoice) -> Result<Arc<dyn Engine>, String> {
    use super::board::{BoardProbe, PERIOD};
    use labpipe_kernels::cube::kernel_store::KernelStore;
    let identity = super::nvidia::probe(index)?;
    let before = super::nvidia::used_before();
    // Before the first client is made: cubecl reads its settings once.
    let parts = labpipe_kernels::cube::nvidia::CudaParts::find();
    let kernels = KernelStore::open(&parts.compiler());
    let device = cubecl::Device::cuda(index).map_err(|error| format!("open CUDA device {index}: {error}"))?;
    let client = device.client();
    labpipe_kernels::cube::nvidia::shrink_stacks(index);
    let physical = client.properties().identity.physical.clone();
    let bus_id = physical.and_then(|card| card.pci_address).map(|address| address.to_string());
    let place = super::nvidia::Place { index: index as u32, bus_id, before };
    let board = super::nvidia::board(place.clone()).map(Arc::new);
    let (free, used) = (board.clone(), board.clone());
    let senses = super::gpu::Senses {
        memory: Box::new(move || Box::new(super::nvidia::GpuProbe::start(place.clone()))),
        device: Box::new(move || Some(Box::new(BoardProbe::new(board.clone()?, Some(PERIOD))))),
        free_bytes: Arc::new(move || free.as_ref()?.free_bytes()),
        used_bytes: Arc::new(move || used.as_ref()?.used_bytes()),
        limit_bytes: memory_limit,
    };
    let engine = super::gpu::GpuEngine::new(device, identity, offered(&parts), senses, kernels);
    Ok(Arc::new(engine.with_execution(execution)))
}

/// Returns what numbers on an NVIDIA GPU depend on beside the program: driver, compiler and cuBLAS.
#[cfg(feature = "cuda")]
fn offered(parts: &labpipe_kernels::cube::nvidia::CudaParts) -> BTreeMap<String, String> {
    let absent = || "absent".to_owned();
    let mut offered = BTreeMap::from([
        ("driver".to_owned(), super::nvidia::driver_version().unwrap_or_else(absent)),
        ("cuda".to_owned(), parts.driver.clone().unwrap_or_else(absent)),
        ("nvrtc".to_owned(), parts.nvrtc_version().unwrap_or_else(absent)),
        ("cublas".to_owned(), parts.cublas_version().unwrap_or_else(absent)),
    ]);
    // cuBLAS reads it: products in f32 then have another precision.
    let tf32 = std::env::var("NVIDIA_TF32_OVERRIDE").ok();
    offered.extend(tf32.map(|value| ("nvidia_tf32_override".to_owned(), value)));
    offered
}

#[cfg(not(feature = "cuda"))]
fn cuda(_index: usize, _memory_limit: Option<u64>, _execution: ExecutionChoice) -> Result<Arc<dyn Engine>, String> {
    Err("this labpipe was built without the CUDA backend (cargo build --features cuda)".to_owned())
}

#[cfg(feature = "wgpu")]
fn wgpu(memory_limit: Option<u64>, execution: ExecutionChoice) -> Result<Arc<dyn Engine>, String> {
    let device = cubecl::Device::wgpu(cubecl::device::WgpuDeviceKind::DefaultDevice)
        .map_err(|error| format!("open a wgpu device: {error}"))?;
    let name = format!("wgpu: {}", device.client().properties().identity.name);
    // wgpu tells neither energy nor what is free.
    let senses = super::gpu::Senses {
        memory: Box::new(|| Box::new(super::memory::HostProbe::start())),
        device: Box::new(|| None),
        free_bytes: Arc::new(|| None),
        used_bytes: Arc::new(|| None),
        limit_bytes: memory_limit,
    };
    let engine = super::gpu::GpuEngine::new(device, name, BTreeMap::new(), senses, None);
    Ok(Arc::new(engine.with_execution(execution)))
}

#[cfg(not(feature = "wgpu"))]
fn wgpu(_memory_limit: Option<u64>, _execution: ExecutionChoice) -> Result<Arc<dyn Engine>, String> {
    Err("this labpipe was built without the wgpu backend (cargo build --features wgpu)".to_owned())
}

/// Returns what identifies this machine's processor in records and keys: model, threads and vector instructions.
pub fn cpu_identity() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|line| line.split(':').next().is_some_and(|key| key.trim() == name))?;
        Some(line.split_once(':')?.1.trim().to_owned())
    };
    let model = field("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
    let stepping = match (field("cpu family"), field("model")) {
        (Some(family), Some(model_number)) => format!(" (family {family} model {model_number})"),
        _ => String::new(),
    };
    format!("cpu: {model}{stepping}, {} threads, {}", rayon::current_num_threads(), vector_instructions())
}

#[cfg(target_arch = "x86_64")]
fn vector_instructions() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512f"
    } else if std::arch::is_x86_feature_detected!("avx2") {
        "avx2"
    } else {
        "sse2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vector_instructions() -> &'static str {
    std::env::consts::ARCH
}
