//! The machine and the program, for `run.json`: what another person needs to repeat a run. No secrets, no environment
//! variables.

use crate::inference::EngineInfo;
use serde_json::{Value, json};

/// Returns what is known of machine and program.
pub fn environment(engine: &EngineInfo) -> Value {
    json!({
        "labpipe_version": env!("CARGO_PKG_VERSION"),
        "git_revision": option_env!("LABPIPE_GIT_REVISION"),
        "engine": engine,
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "cpu": cpu_model(),
        "n_threads": std::thread::available_parallelism().map(usize::from).ok(),
        "memory_bytes": memory_bytes(),
        "gpus": Value::Array(Vec::new()),
    })
}

fn first_line(path: &str) -> Option<String> {
    std::fs::read_to_string(path).ok()?.lines().next().map(str::to_owned)
}

/// Returns the processor's name.
pub fn cpu_model() -> Option<String> {
    let info = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = info.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// Returns the machine's memory in bytes.
pub fn memory_bytes() -> Option<u64> {
    let info = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = info.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}
