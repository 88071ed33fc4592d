//! Tells the program what it was built from and with: `run.json` carries it, so that another person can build the same.

use std::collections::BTreeMap;
use std::process::Command;

/// Crates whose version may change numbers, texts or files.
const CRATES: [&str; 41] = [
    "arrow",
    "burn",
    "burn-backend",
    "burn-backend-extension",
    "burn-cubecl",
    "burn-cuda",
    "burn-dispatch",
    "burn-flex",
    "burn-std",
    "burn-tensor",
    "cubecl",
    "cubecl-common",
    "cubecl-core",
    "cubecl-cpp",
    "cubecl-cuda",
    "cubecl-ir",
    "cubecl-opt",
    "cubecl-runtime",
    "cubecl-server",
    "cubecl-std",
    "cubecl-wgpu",
    "cudarc",
    "fancy-regex",
    "gemm",
    "gemm-common",
    "gemm-f16",
    "gemm-f32",
    "half",
    "libm",
    "macerator",
    "minijinja",
    "minijinja-contrib",
    "naga",
    "parquet",
    "pulp",
    "rayon",
    "safetensors",
    "serde-saphyr",
    "tokenizers",
    "unicode-normalization-alignments",
    "wgpu",
];

fn main() {
    for path in ["build.rs", "src", "kernels/src", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={path}");
    }
    println!("cargo::rerun-if-env-changed=LABPIPE_GIT_REVISION");
    // Set by whoever builds without the history at hand, such as an image; asked of git elsewhere.
    if std::env::var("LABPIPE_GIT_REVISION").unwrap_or_default().is_empty()
        && let Some(revision) = output("git", &["describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"])
    {
        println!("cargo::rustc-env=LABPIPE_GIT_REVISION={revision}");
        if let Some(log) = output("git", &["rev-parse", "--git-path", "logs/HEAD"]) {
            println!("cargo::rerun-if-changed={log}");
        }
    }
    let rustc = std::env::var("RUSTC").ok().and_then(|rustc| output(&rustc, &["--version"]));
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    println!("cargo::rustc-env=LABPIPE_RUSTC={}", rustc.unwrap_or_default());
    println!("cargo::rustc-env=LABPIPE_TARGET={}", variable("TARGET"));
    println!("cargo::rustc-env=LABPIPE_PROFILE={}", variable("PROFILE"));
    println!("cargo::rustc-env=LABPIPE_TARGET_FEATURES={}", variable("CARGO_CFG_TARGET_FEATURE"));
    println!("cargo::rustc-env=LABPIPE_CRATES={}", crates().join(" "));
}

fn output(program: &str, args: &[&str]) -> Option<String> {
    let output = Command::new(program).args(args).output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim().to_owned()).filter(|text| !text.is_empty())
}

/// Returns `name=version` of the crates in Cargo.lock; `name=version+version` where it holds several.
fn crates() -> Vec<String> {
    let lock = std::fs::read_to_string("Cargo.lock").unwrap_or_default();
    let quoted =
        |line: &str, key: &str| line.strip_prefix(key)?.strip_prefix(" = \"")?.strip_suffix('"').map(str::to_owned);
    let lines: Vec<&str> = lock.lines().collect();
    let pairs = lines.windows(2).filter_map(|pair| Some((quoted(pair[0], "name")?, quoted(pair[1], "version")?)));
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for (name, version) in pairs.filter(|(name, _)| CRATES.contains(&name.as_str())) {
        versions.entry(name).or_default().push(version);
    }
    versions.into_iter().map(|(name, versions)| format!("{name}={}", versions.join("+"))).collect()
}
