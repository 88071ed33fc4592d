//! `doctor`: what this machine has, and what of labpipe works on it.

use super::engine;
use super::error::CliError;
use super::print;
use crate::inference::ExecutionChoice;
use crate::run::environment;
use crate::units::format_bytes;
use serde_json::Value;
use std::fmt::Write;
use std::path::Path;

/// Where the NVIDIA driver says its version.
const NVIDIA_DRIVER: &str = "/proc/driver/nvidia/version";

/// Tells.
pub fn doctor() -> Result<u8, CliError> {
    let mut text = format!("labpipe {}\n", env!("CARGO_PKG_VERSION"));
    match engine::build(&engine::Asked { device: "auto", memory_limit: None, execution: ExecutionChoice::Auto }) {
        Err(error) => {
            let _ = writeln!(text, "engine:  none ({error})");
        }
        Ok((engine, reason)) => {
            let info = engine.info();
            let environment = environment(&info, engine::gpus().as_deref());
            let _ = writeln!(text, "engine:  {}", info.backend);
            let _ = writeln!(text, "device:  {} (auto takes {reason})", info.device);
            let _ = writeln!(text, "clock:   {}", info.clock);
            let _ = writeln!(
                text,
                "kernels: {:?} is the best of {:?}",
                labpipe_kernels::simd::level(),
                labpipe_kernels::simd::available()
            );
            let memory = environment["memory_bytes"].as_u64().map_or("unknown".to_owned(), format_bytes);
            let _ = writeln!(text, "memory:  {memory}, {} threads", environment["n_threads"]);
            let _ =
                writeln!(text, "system:  {} {}", std::env::consts::OS, environment["kernel"].as_str().unwrap_or(""));
        }
    }
    let driver = std::fs::read_to_string(NVIDIA_DRIVER).ok().and_then(|text| text.lines().next().map(str::to_owned));
    let _ = writeln!(text, "nvidia:  {}", driver.unwrap_or_else(|| "no driver found".to_owned()));
    let _ = writeln!(text, "cuda:    {}", cuda());
    let schemes: Vec<Value> = labpipe_kernels::SCHEMES.iter().map(|scheme| Value::from(scheme.name())).collect();
    let _ = writeln!(text, "schemes: {}", schemes.iter().filter_map(Value::as_str).collect::<Vec<_>>().join(", "));
    let here = Path::new("pipelines").is_dir();
    let _ =
        writeln!(text, "try:     {}", if here { "labpipe run pipelines/sensitivity.yaml" } else { "labpipe run FILE" });
    print(&text)?;
    Ok(0)
}

/// Says what of CUDA is here and what it lacks.
#[cfg(feature = "cuda")]
fn cuda() -> String {
    let parts = labpipe_kernels::cube::nvidia::CudaParts::find();
    let found = |is_there: bool| if is_there { "found" } else { "missing" };
    let version =
        parts.driver.as_deref().map_or("no driver".to_owned(), |version| format!("driver for CUDA {version}"));
    let verdict = parts.missing(0).map_or("usable".to_owned(), |reason| format!("not usable: {reason}"));
    let kept = labpipe_kernels::cube::kernel_store::folder()
        .map_or("not kept".to_owned(), |folder| format!("kept in {}", folder.display()));
    format!(
        "{version}, {} devices, NVRTC {}, cuBLAS {}; {verdict}; compiled kernels are {kept}",
        parts.n_devices,
        found(parts.has_nvrtc),
        found(parts.has_cublas)
    )
}

/// As above, where this build has no CUDA.
#[cfg(not(feature = "cuda"))]
fn cuda() -> String {
    "not in this build; every stage runs on the CPU (cargo build --release --features cuda adds it)".to_owned()
}
