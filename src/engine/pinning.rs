//! Threads that stay on their processors.

/// Starts the threads that compute, each on a processor of its own, where they are as many as the processors that the process may use.
/// Left alone, two of them may share one processor for a whole measurement while another is idle. Fewer threads stay free: another
/// process with as few would be put on the same processors.
///
/// Has no effect once the threads are started.
#[cfg(target_os = "linux")]
pub fn pin_threads() {
    use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
    let Ok(allowed) = sched_getaffinity(None) else { return };
    let cpus: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    let n_threads = std::env::var("RAYON_NUM_THREADS").ok().and_then(|n| n.parse().ok()).filter(|n| *n > 0);
    if n_threads.or_else(|| std::thread::available_parallelism().ok().map(usize::from)) != Some(cpus.len()) {
        return;
    }
    let pin = move |thread_idx: usize| {
        let mut own = CpuSet::new();
        own.set(cpus[thread_idx % cpus.len()]);
        // Where it is refused the thread stays free.
        let _ = sched_setaffinity(None, &own);
    };
    // An error says that the threads are there already.
    let _ = rayon::ThreadPoolBuilder::new().start_handler(pin).build_global();
}

#[cfg(not(target_os = "linux"))]
pub fn pin_threads() {}
