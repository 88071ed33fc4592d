//! What decides the last bits of a number beside labpipe's own code: versions of the libraries that compute, the processor's
//! instruction sets, and on a GPU the driver, the compiler and cuBLAS. Goes into the key of everything that is computed.

use crate::versions;
use std::collections::BTreeMap;

/// Crates that compute on the host.
const HOST: [&str; 13] = [
    "burn",
    "burn-backend",
    "burn-backend-extension",
    "burn-dispatch",
    "burn-flex",
    "burn-std",
    "burn-tensor",
    "gemm",
    "gemm-common",
    "gemm-f16",
    "gemm-f32",
    "half",
    "macerator",
];
/// Crates that the ones above compute with.
const HOST_MATH: [&str; 2] = ["libm", "pulp"];
/// Crates that turn kernels into programs of a GPU and run them.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
const GPU: [&str; 11] = [
    "cubecl",
    "cubecl-common",
    "cubecl-core",
    "cubecl-cpp",
    "cubecl-ir",
    "cubecl-opt",
    "cubecl-runtime",
    "cubecl-server",
    "cubecl-std",
    "half",
    "libm",
];

/// Returns what numbers computed on this machine's processor depend on.
pub fn host() -> BTreeMap<String, String> {
    let mut found = versions::of(&HOST);
    found.extend(versions::of(&HOST_MATH));
    found.insert("cpu_features".to_owned(), cpu_features().join(" "));
    // gemm cuts its sums where a block fills the first-level cache.
    found.extend(first_level_cache().map(|cache| ("cpu_l1d".to_owned(), cache)));
    found.extend(libc_version().map(|version| ("libc".to_owned(), version)));
    found
}

/// Returns what numbers computed on a GPU depend on. `runtime` is `cuda` or `wgpu`, `chip` the GPU's name; `parts` is what the machine
/// offers for it. The host prepares weights and adds up statistics: what its numbers depend on is included.
#[cfg(any(feature = "cuda", feature = "wgpu", test))]
pub fn gpu(runtime: &str, chip: &str, parts: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let mut found = host();
    found.extend(versions::of(&GPU));
    found.extend(match runtime {
        "cuda" => versions::of(&["cubecl-cuda", "cudarc"]),
        _ => versions::of(&["cubecl-wgpu", "naga", "wgpu"]),
    });
    found.insert("gpu".to_owned(), chip.to_owned());
    found.extend(parts);
    found
}

/// Returns `burn-flex 0.22.1`, or the name alone where Cargo.lock was not at hand when this was built.
pub fn named(name: &str) -> String {
    match versions::of(&[name]).get(name) {
        Some(version) => format!("{name} {version}"),
        None => name.to_owned(),
    }
}

/// Returns the instruction sets that inner loops are chosen by, here and in the libraries.
#[cfg(target_arch = "x86_64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_x86_feature_detected as has;
    let found = [
        ("sse4.1", has!("sse4.1")),
        ("avx", has!("avx")),
        ("avx2", has!("avx2")),
        ("fma", has!("fma")),
        ("f16c", has!("f16c")),
        ("avx512f", has!("avx512f")),
        ("avx512bw", has!("avx512bw")),
        ("avx512cd", has!("avx512cd")),
        ("avx512dq", has!("avx512dq")),
        ("avx512vl", has!("avx512vl")),
        ("avx512vnni", has!("avx512vnni")),
        ("avx512bf16", has!("avx512bf16")),
        ("avx512fp16", has!("avx512fp16")),
    ];
    found.into_iter().filter_map(|(name, is_there)| is_there.then_some(name)).collect()
}

#[cfg(target_arch = "aarch64")]
fn cpu_features() -> Vec<&'static str> {
    use std::arch::is_aarch64_feature_detected as has;
    let found = [
        ("neon", has!("neon")),
        ("fp16", has!("fp16")),
        ("fhm", has!("fhm")),
        ("dotprod", has!("dotprod")),
        ("i8mm", has!("i8mm")),
        ("bf16", has!("bf16")),
        ("sve", has!("sve")),
    ];
    found.into_iter().filter_map(|(name, is_there)| is_there.then_some(name)).collect()
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn cpu_features() -> Vec<&'static str> {
    vec![std::env::consts::ARCH]
}

/// Returns size, ways and line of the first processor's data cache, `48K 12 ways of 64 bytes`; `None` where the system does not say.
fn first_level_cache() -> Option<String> {
    let caches = std::fs::read_dir("/sys/devices/system/cpu/cpu0/cache").ok()?;
    caches.filter_map(Result::ok).find_map(|entry| {
        let read = |name: &str| Some(std::fs::read_to_string(entry.path().join(name)).ok()?.trim().to_owned());
        let is_first = read("level")? == "1" && read("type")? == "Data";
        let (size, ways, line) = (read("size")?, read("ways_of_associativity")?, read("coherency_line_size")?);
        is_first.then(|| format!("{size} {ways} ways of {line} bytes"))
    })
}

/// Returns the C library's version: `exp` and `sin` are its own.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn libc_version() -> Option<String> {
    use std::ffi::{CStr, c_char};
    unsafe extern "C" {
        safe fn gnu_get_libc_version() -> *const c_char;
    }
    // SAFETY: it returns a text of the library's own that ends with NUL and lasts as long as the program.
    let version = unsafe { CStr::from_ptr(gnu_get_libc_version()) };
    Some(format!("glibc {}", version.to_str().ok()?))
}

#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn libc_version() -> Option<String> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_that_computes_is_there_with_its_exact_version() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).expect("Cargo.lock");
        let found = gpu("cuda", "NVIDIA H200", BTreeMap::from([("driver".to_owned(), "580.1".to_owned())]));
        for name in HOST.iter().chain(&HOST_MATH).chain(&GPU).chain(&["cubecl-cuda", "cudarc"]) {
            let version = found.get(*name).unwrap_or_else(|| panic!("{name} is not in {found:?}"));
            assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")), "{name} {version}");
        }
        assert_eq!((found["gpu"].as_str(), found["driver"].as_str()), ("NVIDIA H200", "580.1"));
    }

    #[test]
    fn the_processor_s_instruction_sets_are_those_that_the_system_lists() {
        let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let Some(flags) = info.lines().find_map(|line| line.strip_prefix("flags")) else { return };
        let flags: Vec<String> = flags.split_whitespace().map(|flag| flag.replace('_', "")).collect();
        for feature in cpu_features() {
            let listed = feature.replace('.', "");
            assert!(flags.contains(&listed), "{feature} is not among {flags:?}");
        }
        assert!(host().contains_key("cpu_features"));
    }
}
