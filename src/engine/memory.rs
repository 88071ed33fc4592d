//! Memory of this process while something is measured.

use crate::artifact::MemoryFigures;
use crate::inference::{InferenceError, MemoryProbe};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Time between two samples.
const PERIOD: Duration = Duration::from_millis(5);

const METHOD: &str = "peak anonymous resident memory (RssAnon) of the model's worker process, sampled every 5 ms after loading, freed \
                      heap handed back before; memory-mapped weights are not in it";
const MEMORY_METHOD: &str = "peak anonymous resident memory (RssAnon) of the model's own worker process, sampled every 5 ms after \
                             loading, freed heap handed back before, and the resident pages of the model's memory-mapped files \
                             (/proc/self/smaps); code and libraries are not in it";
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
        if peak == 0 {
            return MemoryFigures { process_peak_method: UNKNOWN.to_owned(), ..MemoryFigures::default() };
        }
        let mapped = mapped_file_bytes();
        MemoryFigures {
            process_peak_bytes: Some(peak),
            process_peak_method: METHOD.to_owned(),
            memory_bytes: mapped.map(|mapped| peak + mapped),
            memory_mapped_bytes: mapped,
            memory_method: mapped.map(|_| MEMORY_METHOD.to_owned()),
            ..MemoryFigures::default()
        }
    }
}

/// The memory that this process may take.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostRoom {
    /// Bytes; null without a limit.
    pub limit_bytes: Option<u64>,
}

impl HostRoom {
    /// Refuses what can't fit beside what the process holds, before any of it is allocated; lets everything pass where there is no
    /// limit or the system does not say what is held.
    ///
    /// # Errors
    /// `OutOfMemory`.
    pub fn check(self, what: &str, asked_bytes: u64) -> Result<(), InferenceError> {
        // Without a limit nothing is read: it takes longer than a short pass.
        let Some(limit) = self.limit_bytes else { return Ok(()) };
        let Some(held) = self.held_bytes() else { return Ok(()) };
        if held + asked_bytes <= limit {
            return Ok(());
        }
        // What the allocator only keeps goes back to the system.
        trim_heap();
        let free = limit.saturating_sub(self.held_bytes().unwrap_or(held));
        if asked_bytes <= free { Ok(()) } else { Err(InferenceError::over_limit(what, asked_bytes, free, limit)) }
    }

    fn held_bytes(self) -> Option<u64> {
        Some(rss_anon_bytes()? + mapped_file_bytes()?)
    }
}

/// Gives freed heap memory back to the system, where the allocator can be asked to (glibc).
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn trim_heap() {
    unsafe extern "C" {
        fn malloc_trim(pad: usize) -> i32;
    }
    // SAFETY: malloc_trim takes any pad and may be called at any time from any thread (malloc_trim(3), MT-Safe).
    unsafe {
        malloc_trim(0);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn trim_heap() {}

/// Lets the allocator keep what passes free until [`trim_heap`], where it can be told to (glibc). Otherwise every pass asks the system
/// for its larger tensors again and touches each page for the first time, which took a third to half of a prefill, and more or less of
/// it by what had been freed before.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub fn keep_freed_memory() {
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_THRESHOLD: i32 = -3;
    /// The most that every glibc takes.
    const MMAP_BYTES: i32 = 32 << 20;
    const TRIM_BYTES: i32 = 1 << 30;
    unsafe extern "C" {
        fn mallopt(param: i32, value: i32) -> i32;
    }
    // SAFETY: mallopt takes any value of these parameters (mallopt(3)); what it refuses stays as it was.
    unsafe {
        mallopt(M_MMAP_THRESHOLD, MMAP_BYTES);
        mallopt(M_TRIM_THRESHOLD, TRIM_BYTES);
    }
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub fn keep_freed_memory() {}

/// Returns the process's anonymous resident memory now, in bytes (Linux only).
pub fn rss_anon_bytes() -> Option<u64> {
    kib_field("/proc/self/status", "RssAnon:")
}

/// Returns the resident bytes of files that this process maps as data: a worker maps its model's (Linux only). Files of which a part is
/// mapped to be executed are the program and its libraries.
pub fn mapped_file_bytes() -> Option<u64> {
    std::fs::read_to_string("/proc/self/smaps").ok().map(|smaps| data_file_bytes(&smaps))
}

/// Returns the machine's memory in bytes (Linux only).
pub fn total_memory_bytes() -> Option<u64> {
    kib_field("/proc/meminfo", "MemTotal:")
}

fn kib_field(path: &str, name: &str) -> Option<u64> {
    let text = std::fs::read_to_string(path).ok()?;
    text.lines().find_map(|line| line.strip_prefix(name)).and_then(kib)
}

/// Reads `   12 kB` as bytes.
fn kib(text: &str) -> Option<u64> {
    let kib: u64 = text.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

/// Adds up what `/proc/self/smaps` says of files that are mapped as data.
fn data_file_bytes(smaps: &str) -> u64 {
    let (mut resident, mut programs): (BTreeMap<&str, u64>, BTreeSet<&str>) = (BTreeMap::new(), BTreeSet::new());
    let mut file = None;
    for line in smaps.lines() {
        // `7f1c8000-7f1c9000 r-xp 00000000 08:01 1234   /path`; the fields of a mapping have a colon behind their first word.
        let mut words = line.split_ascii_whitespace();
        let (first, permissions) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
        if first.contains('-') && !first.ends_with(':') {
            file = line.find('/').map(|at| &line[at..]);
            if let Some(file) = file.filter(|_| permissions.contains('x')) {
                programs.insert(file);
            }
        } else if let (Some(file), Some(text)) = (file, line.strip_prefix("Rss:")) {
            *resident.entry(file).or_default() += kib(text).unwrap_or(0);
        }
    }
    resident.iter().filter(|(file, _)| !programs.contains(*file)).map(|(_, bytes)| bytes).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_mapped_as_data_count_and_programs_do_not() {
        let smaps = "\
5600-5601 r--p 00000000 08:01 11                         /usr/bin/labpipe
Size:                  4 kB
Rss:                   4 kB
5601-5602 r-xp 00001000 08:01 11                         /usr/bin/labpipe
Rss:                   8 kB
7f00-7f10 r--s 00000000 08:01 12                         /models/a b/model.safetensors
Size:                 64 kB
Rss:                  48 kB
Pss:                  48 kB
7f10-7f20 r--s 00000000 08:01 12                         /models/a b/model.safetensors
Rss:                  16 kB
7f20-7f30 rw-p 00000000 00:00 0                          [heap]
Rss:                 100 kB
";
        assert_eq!(data_file_bytes(smaps), 64 * 1024);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn pages_of_a_mapped_file_count_as_soon_as_they_are_read() {
        let path = std::env::temp_dir().join(format!("labpipe-mapped-{}", std::process::id()));
        std::fs::write(&path, vec![1u8; 1 << 20]).expect("a writable folder");
        let file = std::fs::File::open(&path).expect("the file is there");
        // SAFETY: the file is this test's own, and nothing changes it while it is mapped.
        let map = unsafe { memmap2::Mmap::map(&file) }.expect("a map");
        assert!(map.iter().step_by(4096).all(|byte| *byte == 1));
        let bytes = mapped_file_bytes().expect("a figure");
        assert!(bytes >= 1 << 20, "{bytes}");
        drop(map);
        std::fs::remove_file(&path).expect("the file is there");
    }
}
