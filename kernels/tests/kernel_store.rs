//! Kernels that one process compiled and the next one finds, by cubecl's own store, which every backend goes through. Nothing is
//! compiled here: that takes a GPU.
#![cfg(feature = "kernel-store")]

use cubecl_server::compiler::compilation_store;
use labpipe_kernels::cube::kernel_store::{KernelStore, VARIABLE};
use std::process::Command;

const STEP: &str = "LABPIPE_TEST_STEP";

fn run(step: &str, folder: &std::path::Path) -> bool {
    let program = std::env::current_exe().expect("this program");
    let ended = Command::new(program).args(["step", "--exact"]).env(STEP, step).env(VARIABLE, folder).status();
    ended.expect("a process").success()
}

/// What one process does; alone it does nothing.
#[test]
fn step() {
    let Ok(step) = std::env::var(STEP) else { return };
    let store = KernelStore::open("a compiler");
    let mut kernels = compilation_store::<u32, Vec<u8>>("cuda", "an architecture");
    match step.as_str() {
        "compile" => {
            assert_eq!(store.as_ref().map(KernelStore::n_kept), Some(0));
            kernels.as_mut().expect("cubecl keeps kernels").insert(7, vec![1, 2, 3]).expect("a new kernel");
        }
        "find" => {
            assert_eq!(store.as_ref().map(KernelStore::n_kept), Some(1));
            assert_eq!(kernels.as_mut().expect("cubecl keeps kernels").remove(&7), Some(vec![1, 2, 3]));
        }
        "off" => assert!(store.is_none() && kernels.is_none()),
        other => panic!("no step {other}"),
    }
    assert!(KernelStore::open("a compiler").is_none(), "cubecl takes settings once");
}

#[test]
fn a_kernel_of_one_process_is_found_by_the_next() {
    let folder = std::env::temp_dir().join(format!("labpipe-kernel-store-{}", std::process::id()));
    let files = || std::fs::read_dir(&folder).map_or(0, |files| files.count());
    assert!(run("compile", &folder) && files() == 1);
    assert!(run("find", &folder) && files() == 1);
    let path = std::fs::read_dir(&folder).expect("the folder").next().expect("a file").expect("a file").path();
    let mut damaged = std::fs::read(&path).expect("the file");
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    std::fs::write(&path, damaged).expect("a writable folder");
    assert!(run("compile", &folder), "a damaged file is an empty one");
    assert!(run("find", &folder), "and is written anew");
    assert!(run("off", std::path::Path::new("off")));
    std::fs::remove_dir_all(&folder).expect("the folder");
    std::fs::write(&folder, b"no folder").expect("a writable place");
    assert!(run("compile", &folder), "a folder that can't be written costs nothing");
    std::fs::remove_file(&folder).expect("the file");
}
