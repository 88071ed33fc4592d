//! The CUDA driver, cuBLAS and NVRTC are called from `src/cuda/` alone.

use std::path::{Path, PathBuf};

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").map(|entry| entry.expect("a file").path()) {
        match entry.is_dir() {
            true => sources(&entry, found),
            false => found.push(entry),
        }
    }
}

#[test]
fn driver_is_called_from_one_module() {
    let kernels = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    for folder in [kernels.join("src"), kernels.join("../src")] {
        sources(&folder, &mut files);
    }
    let calls = |path: &PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains("cudarc::"));
    let (inside, outside): (Vec<_>, Vec<_>) =
        files.into_iter().filter(calls).partition(|path| path.starts_with(kernels.join("src/cuda")));
    assert!(!inside.is_empty());
    assert!(outside.is_empty(), "{outside:?} call the driver, which belongs to kernels/src/cuda");
}
