//! An NVIDIA GPU as its management library (NVML) tells of it: identity, memory of this process, energy, clocks.

use crate::artifact::MemoryFigures;
use crate::inference::MemoryProbe;
use labpipe_kernels::cube::nvidia::CudaParts;
use nvml_wrapper::Nvml;
use nvml_wrapper::enums::device::UsedGpuMemory;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(10);

const BY_PROCESS: &str = "peak GPU memory of this process as the driver reports it (NVML), sampled every 10 ms";
const BY_DEVICE: &str = "peak GPU memory in use on the device as the driver reports it (NVML names no processes here), sampled every 10 ms; other processes' memory is in it";
const UNKNOWN: &str = "not measured: NVML is missing";

/// Returns what identifies the device in records and keys.
///
/// # Errors
/// What is missing, in words.
pub fn probe(index: usize) -> Result<String, String> {
    if let Some(reason) = CudaParts::find().missing(index) {
        return Err(reason);
    }
    let Ok(nvml) = Nvml::init() else { return Ok(format!("cuda:{index}")) };
    let Ok(device) = nvml.device_by_index(index as u32) else { return Ok(format!("cuda:{index}")) };
    let name = device.name().unwrap_or_else(|_| "NVIDIA GPU".to_owned());
    let driver = nvml.sys_driver_version().unwrap_or_else(|_| "unknown".to_owned());
    let power = device.enforced_power_limit().map_or(String::new(), |mw| format!(", power limit {} W", mw / 1000));
    Ok(format!("cuda:{index}: {name}, driver {driver}{power}"))
}

/// Samples memory on a thread of its own.
pub struct GpuProbe {
    peak_bytes: Arc<AtomicU64>,
    by_process: Arc<AtomicBool>,
    stop: Arc<AtomicBool>,
    sampler: Option<JoinHandle<()>>,
}

impl GpuProbe {
    /// Starts to sample.
    pub fn start(index: usize) -> GpuProbe {
        let peak_bytes = Arc::new(AtomicU64::new(0));
        let by_process = Arc::new(AtomicBool::new(false));
        let stop = Arc::new(AtomicBool::new(false));
        let (peak, is_own, stopped) = (Arc::clone(&peak_bytes), Arc::clone(&by_process), Arc::clone(&stop));
        let sampler = std::thread::Builder::new().name("memory-probe".to_owned()).spawn(move || {
            let Ok(nvml) = Nvml::init() else { return };
            while !stopped.load(Ordering::Relaxed) {
                if let Some((bytes, own)) = used_bytes(&nvml, index as u32) {
                    is_own.store(own, Ordering::Relaxed);
                    peak.fetch_max(bytes, Ordering::Relaxed);
                }
                std::thread::park_timeout(PERIOD);
            }
        });
        GpuProbe { peak_bytes, by_process, stop, sampler: sampler.ok() }
    }

    fn stop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(sampler) = self.sampler.take() {
            sampler.thread().unpark();
            // A sampler that panicked has nothing more to tell.
            let _ = sampler.join();
        }
    }
}

impl Drop for GpuProbe {
    fn drop(&mut self) {
        self.stop();
    }
}

impl MemoryProbe for GpuProbe {
    fn finish(mut self: Box<Self>) -> MemoryFigures {
        self.stop();
        let peak = self.peak_bytes.load(Ordering::Relaxed);
        let method = match (peak > 0, self.by_process.load(Ordering::Relaxed)) {
            (false, _) => UNKNOWN,
            (true, true) => BY_PROCESS,
            (true, false) => BY_DEVICE,
        };
        MemoryFigures {
            process_peak_bytes: (peak > 0).then_some(peak),
            process_peak_method: method.to_owned(),
            ..MemoryFigures::default()
        }
    }
}

/// Returns bytes used, and whether they are this process's alone.
fn used_bytes(nvml: &Nvml, index: u32) -> Option<(u64, bool)> {
    let device = nvml.device_by_index(index).ok()?;
    let own = device.running_compute_processes().ok().and_then(|processes| {
        processes.into_iter().find(|process| process.pid == std::process::id()).and_then(|process| {
            match process.used_gpu_memory {
                UsedGpuMemory::Used(bytes) => Some(bytes),
                UsedGpuMemory::Unavailable => None,
            }
        })
    });
    match own {
        Some(bytes) => Some((bytes, true)),
        None => device.memory_info().ok().map(|info| (info.used, false)),
    }
}
