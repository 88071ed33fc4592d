//! Memory of this process while something is measured.

use crate::artifact::MemoryFigures;
use crate::inference::MemoryProbe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(5);

const METHOD: &str = "peak anonymous resident memory (RssAnon) of the model's worker process, sampled every 5 ms after loading, freed heap handed back before; what the process holds from the model's earlier stages counts, memory-mapped weights don't";
const UNKNOWN: &str = "not measured: this system has no /proc/self/status with RssAnon";

/// Samples the process's anonymous resident memory on a thread of its own.
pub struct HostProbe {
    peak_bytes: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    sampler: Option<JoinHandle<()>>,
}

impl HostProbe {
    /// Starts to sample, after handing back what earlier stages freed: it is not this stage's.
    pub fn start() -> HostProbe {
        trim_heap();
        let peak_bytes = Arc::new(AtomicU64::new(rss_anon_bytes().unwrap_or(0)));
        let stop = Arc::new(AtomicBool::new(false));
        let (peak, stopped) = (Arc::clone(&peak_bytes), Arc::clone(&stop));
        let sampler = std::thread::Builder::new().name("memory-probe".to_owned()).spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Some(bytes) = rss_anon_bytes() {
                    peak.fetch_max(bytes, Ordering::Relaxed);
                }
                std::thread::park_timeout(PERIOD);
            }
        });
        HostProbe { peak_bytes, stop, sampler: sampler.ok() }
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

impl Drop for HostProbe {
    fn drop(&mut self) {
        self.stop();
    }
}

impl MemoryProbe for HostProbe {
    fn finish(mut self: Box<Self>) -> MemoryFigures {
        self.stop();
        let last = rss_anon_bytes();
        let peak = self.peak_bytes.load(Ordering::Relaxed).max(last.unwrap_or(0));
        MemoryFigures {
            process_peak_bytes: (peak > 0).then_some(peak),
            process_peak_method: if peak > 0 { METHOD } else { UNKNOWN }.to_owned(),
            ..MemoryFigures::default()
        }
    }
}

/// Gives freed heap memory back to the system, where the allocator can be asked to (glibc).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn trim_heap() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> i32;
    }
    // SAFETY: malloc_trim takes any pad and may be called at any time from any thread (malloc_trim(3), MT-Safe).
    unsafe {
        malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn trim_heap() {}

/// Returns the process's anonymous resident memory now, in bytes (Linux only).
pub fn rss_anon_bytes() -> Option<u64> {
    kib_field("/proc/self/status", "RssAnon:")
}

/// Returns the machine's memory in bytes (Linux only).
pub fn total_memory_bytes() -> Option<u64> {
    kib_field("/proc/meminfo", "MemTotal:")
}

fn kib_field(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    let field = text.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = field.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
