//! The machine and the program, for `run.json`: what another person needs to repeat a run. No secrets, no environment
//! variables.

use crate::inference::{EngineInfo, GpuIdentity};
use crate::versions;
use serde_json::{Map, Value, json};

/// Returns what is known of machine and program. `gpus` is null where there was no driver to ask.
pub fn environment(engine: &EngineInfo, gpus: Option<&[GpuIdentity]>) -> Value {
    json!({
        "labpipe_version": env!("CARGO_PKG_VERSION"),
        "build": build(),
        "engine": engine,
        "os": std::env::consts::OS,
        "arch": std::env::consts::ARCH,
        "os_name": os_name(),
        "kernel": first_line("/proc/sys/kernel/osrelease"),
        "cpu": cpu_model(),
        "n_threads": std::thread::available_parallelism().map(usize::from).ok(),
        "memory_bytes": memory_bytes(),
        "load_average_before": load_average(),
        "variables": variables(),
        "gpus": gpus,
    })
}

/// What the program was built from and with.
fn build() -> Value {
    let crates: Map<String, Value> = versions::all().map(|(name, version)| (name.to_owned(), version.into())).collect();
    json!({
        "git_revision": option_env!("LABPIPE_GIT_REVISION").filter(|revision| !revision.is_empty()),
        "rustc": env!("LABPIPE_RUSTC"),
        "target": env!("LABPIPE_TARGET"),
        "target_features": env!("LABPIPE_TARGET_FEATURES"),
        "profile": env!("LABPIPE_PROFILE"),
        "crates": crates,
    })
}

/// Variables that change what is computed, how fast, or from which files; none that may hold a secret.
fn variables() -> Value {
    const NAMES: [&str; 10] = [
        "CUDA_VISIBLE_DEVICES",
        "CUBECL_DEBUG_OPTION",
        "HF_HOME",
        "HF_HUB_CACHE",
        "HF_HUB_OFFLINE",
        "LABPIPE_CACHE",
        "LABPIPE_KERNEL_CACHE",
        "LABPIPE_RESULTS",
        "RAYON_NUM_THREADS",
        "SAVE_EVAL_RESULTS",
    ];
    let set = NAMES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?.into())));
    Value::Object(set.collect())
}

fn os_name() -> Option<String> {
    let text = std::fs::read_to_string("/etc/os-release").ok()?;
    let name = text.lines().find_map(|line| line.strip_prefix("PRETTY_NAME="))?;
    Some(name.trim_matches('"').to_owned())
}

/// Returns the processes that wanted to run, averaged over the last minute: whether the machine was busy.
pub fn load_average() -> Option<f64> {
    first_line("/proc/loadavg")?.split(' ').next()?.parse().ok()
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    #[test]
    fn gpus_are_listed_and_null_where_nobody_could_look() {
        let engine = EngineInfo {
            backend: "burn-cuda 0.22".to_owned(),
            device: "cuda:0: NVIDIA H200".to_owned(),
            numerics_version: 1,
            clock: "a clock".to_owned(),
            is_host: false,
            computed_with: BTreeMap::new(),
        };
        let gpu = GpuIdentity {
            name: "NVIDIA H200".to_owned(),
            driver: Some("580.1".to_owned()),
            memory_bytes: Some(150_754_820_096),
        };
        let listed = environment(&engine, Some(&[gpu]));
        let want = json!([{"name": "NVIDIA H200", "driver": "580.1", "memory_bytes": 150_754_820_096_u64}]);
        assert_eq!(listed["gpus"], want);
        assert_eq!(environment(&engine, Some(&[]))["gpus"], json!([]));
        assert_eq!(environment(&engine, None)["gpus"], Value::Null);
    }
}
