//! An NVIDIA GPU as its management library (NVML) tells of it: identity, memory of this process, energy, clocks.

use super::board::{Board, BoardSample};
use super::proc_files::relatives;
use crate::artifact::MemoryFigures;
use crate::inference::{GpuIdentity, MemoryProbe, OtherProcesses};
use labpipe_kernels::cube::nvidia::CudaParts;
use nvml_wrapper::bitmasks::device::ThrottleReasons;
use nvml_wrapper::enum_wrappers::device::Clock;
use nvml_wrapper::enums::device::UsedGpuMemory;
use nvml_wrapper::struct_wrappers::device::ProcessInfo;
use nvml_wrapper::{Device, Nvml};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(10);

const BY_PROCESS: &str = "peak GPU memory of this process as the driver reports it (NVML), sampled every 10 ms: weights, cache, \
                          activations, the driver's context and libraries";
const BY_GROWTH: &str = "peak growth of the device's used memory since before this process opened it, as the driver reports it (NVML \
                         names no processes here), sampled every 10 ms; what other processes took or freed meanwhile is in it";
const BY_DEVICE: &str = "peak GPU memory in use on the device as the driver reports it (NVML names no processes here), sampled every 10 ms; other processes' memory is in it";
const UNKNOWN: &str = "not measured: NVML is missing";

/// Whose memory a reading is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whose {
    /// This process's.
    Own = 1,
    /// What was added since before this process opened the device.
    Growth = 2,
    /// Everybody's.
    Device = 3,
}

impl Whose {
    fn method(code: u8) -> &'static str {
        match code {
            1 => BY_PROCESS,
            2 => BY_GROWTH,
            3 => BY_DEVICE,
            _ => UNKNOWN,
        }
    }
}

/// Bytes in use on each device, by its address on the bus, before this process opens one.
pub fn used_before() -> BTreeMap<String, u64> {
    let Ok(nvml) = Nvml::init() else { return BTreeMap::new() };
    let devices = (0..nvml.device_count().unwrap_or(0)).filter_map(|index| nvml.device_by_index(index).ok());
    devices.filter_map(|device| Some((device.pci_info().ok()?.bus_id, device.memory_info().ok()?.used))).collect()
}

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

/// Returns the driver's version, `580.65.06`; `None` without NVML.
pub fn driver_version() -> Option<String> {
    Nvml::init().ok()?.sys_driver_version().ok()
}

/// Returns the machine's GPUs in NVML's order; nothing where it is missing.
pub fn gpus() -> Option<Vec<GpuIdentity>> {
    let nvml = Nvml::init().ok()?;
    let driver = nvml.sys_driver_version().ok();
    let devices = (0..nvml.device_count().ok()?).filter_map(|index| nvml.device_by_index(index).ok());
    let identity = |device: Device<'_>| GpuIdentity {
        name: device.name().unwrap_or_else(|_| "NVIDIA GPU".to_owned()),
        driver: driver.clone(),
        memory_bytes: device.memory_info().ok().map(|info| info.total),
    };
    Some(devices.map(identity).collect())
}

/// Where NVML finds a device. CUDA counts devices in another order than NVML (the fastest first), and only those that
/// `CUDA_VISIBLE_DEVICES` leaves: the address on the bus names the same one to both.
#[derive(Debug, Clone)]
pub struct Place {
    /// CUDA's index; what is left where the address is not known.
    pub index: u32,
    /// `0000:3b:00.0`.
    pub bus_id: Option<String>,
    /// [`used_before`].
    pub before: BTreeMap<String, u64>,
}

impl Place {
    fn device<'nvml>(&self, nvml: &'nvml Nvml) -> Option<Device<'nvml>> {
        match &self.bus_id {
            Some(bus_id) => nvml.device_by_pci_bus_id(bus_id.as_str()).ok().or_else(|| {
                // Of one there is no doubt.
                nvml.device_count().is_ok_and(|n| n == 1).then(|| nvml.device_by_index(0).ok()).flatten()
            }),
            None => nvml.device_by_index(self.index).ok(),
        }
    }
}

/// Samples memory on a thread of its own.
pub struct GpuProbe {
    peak_bytes: Arc<AtomicU64>,
    whose: Arc<AtomicU8>,
    stop: Arc<AtomicBool>,
    sampler: Option<JoinHandle<()>>,
}

impl GpuProbe {
    /// Starts to sample.
    pub fn start(place: Place) -> GpuProbe {
        let peak_bytes = Arc::new(AtomicU64::new(0));
        let whose = Arc::new(AtomicU8::new(0));
        let stop = Arc::new(AtomicBool::new(false));
        let (peak, whom, stopped) = (Arc::clone(&peak_bytes), Arc::clone(&whose), Arc::clone(&stop));
        let sampler = std::thread::Builder::new().name("memory-probe".to_owned()).spawn(move || {
            let Ok(nvml) = Nvml::init() else { return };
            while !stopped.load(Ordering::Relaxed) {
                if let Some((bytes, of)) = used_bytes(&nvml, &place) {
                    whom.store(of as u8, Ordering::Relaxed);
                    peak.fetch_max(bytes, Ordering::Relaxed);
                }
                std::thread::park_timeout(PERIOD);
            }
        });
        GpuProbe { peak_bytes, whose, stop, sampler: sampler.ok() }
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
        let code = if peak > 0 { self.whose.load(Ordering::Relaxed) } else { 0 };
        // What everybody has on the device says nothing of one model.
        let is_own = peak > 0 && code != Whose::Device as u8;
        MemoryFigures {
            process_peak_bytes: (peak > 0).then_some(peak),
            process_peak_method: Whose::method(code).to_owned(),
            memory_bytes: is_own.then_some(peak),
            memory_method: is_own.then(|| Whose::method(code).to_owned()),
            ..MemoryFigures::default()
        }
    }
}

/// Returns bytes used, and whose they are.
fn used_bytes(nvml: &Nvml, place: &Place) -> Option<(u64, Whose)> {
    let device = place.device(nvml)?;
    if let Some(bytes) = device.running_compute_processes().ok().and_then(|all| own(&all, std::process::id())) {
        return Some((bytes, Whose::Own));
    }
    let used = device.memory_info().ok()?.used;
    let before = device.pci_info().ok().and_then(|pci| place.before.get(&pci.bus_id).copied());
    Some(before.map_or((used, Whose::Device), |before| (used.saturating_sub(before), Whose::Growth)))
}

/// Returns what this process has of a device that it has opened. Where no process has its id, as in a container with ids of its own, a
/// single one can be no other.
fn own(all: &[ProcessInfo], own_pid: u32) -> Option<u64> {
    let found = match all {
        [one] => Some(one),
        all => all.iter().find(|process| process.pid == own_pid),
    };
    found.and_then(|process| match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    })
}

/// Opens NVML once; nothing where it is missing.
pub fn board(place: Place) -> Option<NvmlBoard> {
    let nvml = Nvml::init().ok()?;
    let board = NvmlBoard { nvml, place };
    board.device().is_some().then_some(board)
}

/// One GPU's board.
pub struct NvmlBoard {
    nvml: Nvml,
    place: Place,
}

impl NvmlBoard {
    fn device(&self) -> Option<Device<'_>> {
        self.place.device(&self.nvml)
    }

    /// Returns the bytes of device memory that this process has; `None` where the driver does not tell processes apart.
    pub fn used_bytes(&self) -> Option<u64> {
        used_bytes(&self.nvml, &self.place).filter(|(_, whose)| *whose != Whose::Device).map(|(bytes, _)| bytes)
    }

    /// Returns the free bytes of device memory.
    pub fn free_bytes(&self) -> Option<u64> {
        self.device()?.memory_info().ok().map(|info| info.free)
    }
}

impl Board for NvmlBoard {
    fn energy_mj(&self) -> Option<u64> {
        self.device()?.total_energy_consumption().ok()
    }

    fn power_w(&self) -> Option<f64> {
        self.device()?.power_usage().ok().map(|milliwatts| f64::from(milliwatts) / 1e3)
    }

    fn sample(&self) -> BoardSample {
        let Some(device) = self.device() else { return BoardSample::default() };
        let watts = |milliwatts: u32| f64::from(milliwatts) / 1e3;
        BoardSample {
            power_limit_w: device.enforced_power_limit().ok().map(watts),
            sm_clock_mhz: device.clock_info(Clock::SM).ok().map(f64::from),
            sm_clock_mhz_max: device.max_clock_info(Clock::SM).ok().map(f64::from),
            memory_clock_mhz: device.clock_info(Clock::Memory).ok().map(f64::from),
            throttle_reasons: device.current_throttle_reasons().map_or_else(|_| Vec::new(), throttle_names),
            others: device.running_compute_processes().ok().and_then(|all| {
                let alone = all.iter().all(|process| process.pid == std::process::id());
                let relatives = if alone { Vec::new() } else { relatives() };
                let found = others(&all, std::process::id(), &relatives)?;
                let utilization_percent = if found.n == 0 { None } else { utilization(&device, &relatives) };
                Some(OtherProcesses { utilization_percent, ..found })
            }),
        }
    }
}

/// Returns the share of the device's time, in percent, that other processes than labpipe's took over the last second; `None` where the
/// driver has no such samples, or none of this process, as in a container with ids of its own.
fn utilization(device: &Device<'_>, relatives: &[u32]) -> Option<u32> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).ok()?;
    let since_us = u64::try_from((now.checked_sub(Duration::from_secs(1))?).as_micros()).ok()?;
    let samples = device.process_utilization_stats(since_us).ok()?;
    let own = std::process::id();
    if samples.iter().all(|sample| sample.pid != own) {
        return None;
    }
    let others = samples.iter().filter(|sample| sample.pid != own && !relatives.contains(&sample.pid));
    Some(others.map(|sample| sample.sm_util).sum())
}

/// Names what lowers clocks. An idle device is not throttled.
fn throttle_names(reasons: ThrottleReasons) -> Vec<&'static str> {
    let known = [
        (ThrottleReasons::APPLICATIONS_CLOCKS_SETTING, "applications_clocks_setting"),
        (ThrottleReasons::SW_POWER_CAP, "sw_power_cap"),
        (ThrottleReasons::HW_SLOWDOWN, "hw_slowdown"),
        (ThrottleReasons::SYNC_BOOST, "sync_boost"),
        (ThrottleReasons::SW_THERMAL_SLOWDOWN, "sw_thermal_slowdown"),
        (ThrottleReasons::HW_THERMAL_SLOWDOWN, "hw_thermal_slowdown"),
        (ThrottleReasons::HW_POWER_BRAKE_SLOWDOWN, "hw_power_brake_slowdown"),
        (ThrottleReasons::DISPLAY_CLOCK_SETTING, "display_clock_setting"),
    ];
    known.into_iter().filter(|(reason, _)| reasons.contains(*reason)).map(|(_, name)| name).collect()
}

/// Returns who computes on the device beside this process; `relatives` are labpipe's own. Where no process has this one's id, as in a
/// container with ids of its own, one of them is taken for it, and what the others hold is not known; a single one tells nothing then.
fn others(all: &[ProcessInfo], own_pid: u32, relatives: &[u32]) -> Option<OtherProcesses> {
    let bytes = |process: &ProcessInfo| match process.used_gpu_memory {
        UsedGpuMemory::Used(bytes) => Some(bytes),
        UsedGpuMemory::Unavailable => None,
    };
    if all.iter().all(|process| process.pid != own_pid) {
        let n = all.len().checked_sub(1).filter(|n| *n > 0)?;
        return Some(OtherProcesses { n, ..OtherProcesses::default() });
    }
    let beside = all.iter().filter(|process| process.pid != own_pid);
    let (labpipe, others): (Vec<&ProcessInfo>, Vec<&ProcessInfo>) =
        beside.partition(|process| relatives.contains(&process.pid));
    let bytes = others.iter().map(|process| bytes(process)).sum();
    Some(OtherProcesses { n: others.len(), utilization_percent: None, bytes, n_labpipe: labpipe.len() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn process(pid: u32, bytes: Option<u64>) -> ProcessInfo {
        let used_gpu_memory = bytes.map_or(UsedGpuMemory::Unavailable, UsedGpuMemory::Used);
        ProcessInfo { pid, used_gpu_memory, gpu_instance_id: None, compute_instance_id: None }
    }

    #[test]
    fn other_processes_are_those_that_are_not_this_one() {
        let all = [process(7, Some(100)), process(8, Some(20)), process(9, Some(3))];
        let found = |n, bytes, n_labpipe| Some(OtherProcesses { n, utilization_percent: None, bytes, n_labpipe });
        assert_eq!(others(&all, 7, &[]), found(2, Some(23), 0));
        assert_eq!(others(&all, 7, &[9, 10]), found(1, Some(20), 1), "another worker of this labpipe counts apart");
        assert_eq!(others(&all[..1], 7, &[]), found(0, Some(0), 0));
        assert_eq!(others(&[process(7, None), process(8, None)], 7, &[]), found(1, None, 0));
        // Ids of another namespace.
        assert_eq!(others(&all, 1, &[]), found(2, None, 0));
        assert_eq!((others(&all[..1], 1, &[]), others(&[], 1, &[])), (None, None));
    }

    #[test]
    fn a_process_without_its_id_is_known_where_it_is_alone() {
        let all = [process(7, Some(100)), process(8, Some(20))];
        assert_eq!((own(&all, 8), own(&all, 1), own(&all[..1], 1)), (Some(20), None, Some(100)));
        assert_eq!((own(&[process(7, None)], 7), own(&[], 7)), (None, None));
    }

    #[test]
    fn reasons_have_names_and_idleness_is_none() {
        assert!(throttle_names(ThrottleReasons::GPU_IDLE | ThrottleReasons::NONE).is_empty());
        let reasons = ThrottleReasons::SW_POWER_CAP | ThrottleReasons::HW_SLOWDOWN;
        assert_eq!(throttle_names(reasons), ["sw_power_cap", "hw_slowdown"]);
    }
}
