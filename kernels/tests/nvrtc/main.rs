//! Every kernel is lowered to CUDA C++ and compiled by NVRTC for the architectures that labpipe is meant for, without a GPU; what it
//! then takes of a multiprocessor stays within a budget. Where `LABPIPE_NVRTC` names no NVRTC (scripts/ci/nvrtc.sh installs one),
//! kernels are lowered and not compiled. `LABPIPE_CUDA_SOURCES` names a folder that keeps the sources.
#![cfg(feature = "cuda-source")]

mod cubin;
mod gpu;
mod launches;
mod nvrtc;

use cubecl::CubeKernel;
use cubecl_cpp::shared::CppCompiler;
use cubecl_cpp::target::Cuda;
use cubecl_server::kernel::CompiledKernel;
use cubin::Usage;
use gpu::{GPUS, Gpu};
use launches::{LAUNCHES, Launches, NOT_ON_CUDA};
use nvrtc::Nvrtc;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Registers that a thread can have, and those that a multiprocessor has (CUDA C++ Programming Guide, compute capabilities 8.0 to 12.0).
const MAX_REGISTERS: u32 = 255;
const MULTIPROCESSOR_REGISTERS: u32 = 65_536;

/// A kernel in CUDA C++.
struct Source {
    /// As `gemv_kernel<Codebook4Pairs>`.
    name: String,
    text: String,
    /// Bytes of shared memory that its launches ask for.
    dynamic_shared_bytes: usize,
    n_threads: u32,
}

impl Source {
    fn function(&self) -> &str {
        self.name.split('<').next().unwrap_or(&self.name)
    }
}

/// What is compiled: an index into the GPUs and one into the sources.
type Target = (usize, usize);

/// What a target became.
struct Outcome {
    usage: Usage,
    /// Bytes that a thread stores to its stack for want of registers.
    spilled_bytes: u32,
}

#[test]
fn table_names_every_kernel_of_the_sources() {
    let mut found = BTreeSet::new();
    kernels_below(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cube"), &mut found);
    assert!(found.len() > 20, "kernels are looked for where they are: {found:?}");
    let listed = LAUNCHES.iter().flat_map(|launches| launches.kernels.iter().copied());
    let listed: BTreeSet<String> =
        listed.chain(NOT_ON_CUDA.iter().map(|(kernel, _)| *kernel)).map(str::to_owned).collect();
    let missing: Vec<&String> = found.difference(&listed).collect();
    assert!(missing.is_empty(), "launches.rs does not list {missing:?}");
    let gone: Vec<&String> = listed.difference(&found).collect();
    assert!(gone.is_empty(), "launches.rs lists what is no kernel: {gone:?}");
}

/// Collects the functions behind `#[cube(launch…)]`.
fn kernels_below(folder: &Path, found: &mut BTreeSet<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder of sources").map(|entry| entry.expect("a file").path()) {
        if entry.is_dir() {
            kernels_below(&entry, found);
            continue;
        }
        let text = std::fs::read_to_string(&entry).expect("a source");
        for behind in text.split("#[cube(launch").skip(1) {
            let name = behind.split_once("fn ").map(|(_, signature)| signature);
            let name = name.and_then(|signature| signature.split(['<', '(']).next());
            found.insert(name.expect("a function behind its attribute").trim().to_owned());
        }
    }
}

#[test]
fn every_kernel_compiles_within_its_budget() {
    let (sources, targets) = lowered();
    if let Some(folder) = std::env::var_os("LABPIPE_CUDA_SOURCES") {
        for (source_idx, source) in sources.iter().enumerate() {
            let file = Path::new(&folder).join(format!("{}-{source_idx}.cu", source.function()));
            std::fs::write(file, &source.text).expect("a writable folder");
        }
    }
    let unexpected =
        targets.iter().flat_map(|&(gpu_idx, source_idx)| unexpected_text(&GPUS[gpu_idx], &sources[source_idx]));
    let mut complaints: Vec<String> = unexpected.collect();
    let Some(folder) = std::env::var_os(nvrtc::VARIABLE) else {
        eprintln!("compiling is left out: {} names no folder with NVRTC", nvrtc::VARIABLE);
        assert!(complaints.is_empty(), "{}", complaints.join("\n"));
        return;
    };
    let nvrtc = Nvrtc::open(folder.as_ref()).expect("an NVRTC that opens");
    let outcomes =
        in_parallel(&targets, |&(gpu_idx, source_idx)| compile(&nvrtc, &GPUS[gpu_idx], &sources[source_idx]));
    let mut worst = BTreeMap::new();
    for (&(gpu_idx, source_idx), outcome) in targets.iter().zip(outcomes) {
        let (gpu, source) = (&GPUS[gpu_idx], &sources[source_idx]);
        match outcome {
            Ok(outcome) => {
                complaints.extend(over_budget(gpu, source, &outcome));
                note(worst.entry((source.function(), gpu.sm)).or_default(), source, &outcome);
            }
            Err(error) => complaints.push(format!("{} on {}: {error}", source.name, gpu.name)),
        }
    }
    eprintln!("NVRTC {}: {} sources, {} cubins; the most that one takes:", nvrtc.version, sources.len(), targets.len());
    print(&worst);
    assert!(complaints.is_empty(), "{} complaints:\n{}", complaints.len(), complaints.join("\n"));
}

/// Lowers what is launched on each GPU; each text once, and compiled once for each architecture.
fn lowered() -> (Vec<Source>, Vec<Target>) {
    let mut launched = Vec::new();
    for (gpu_idx, gpu) in GPUS.iter().enumerate() {
        for launches in &LAUNCHES {
            let kernels = gpu.kernels_of(launches);
            check_names(launches, gpu, &kernels);
            launched.extend(kernels.into_iter().map(|kernel| (gpu_idx, kernel)));
        }
    }
    // The options that a kernel is lowered with differ at compute capability 9.0 alone.
    let key = |gpu_idx: usize, kernel: &dyn CubeKernel| (GPUS[gpu_idx].sm >= 90, kernel.id().stable_hash());
    let mut seen = HashSet::new();
    let unique: Vec<_> = launched.iter().filter(|(gpu_idx, kernel)| seen.insert(key(*gpu_idx, &**kernel))).collect();
    let lowered = in_parallel(&unique, |(gpu_idx, kernel)| lower(&**kernel, &GPUS[*gpu_idx]));
    let mut sources: Vec<Source> = Vec::new();
    let (mut by_text, mut by_key) = (HashMap::new(), HashMap::new());
    for ((gpu_idx, kernel), source) in unique.iter().zip(lowered) {
        let source_idx = *by_text.entry(source.text.clone()).or_insert(sources.len());
        if source_idx == sources.len() {
            sources.push(source);
        }
        by_key.insert(key(*gpu_idx, &**kernel), source_idx);
    }
    let of = |(gpu_idx, kernel): &(usize, Box<dyn CubeKernel>)| (*gpu_idx, by_key[&key(*gpu_idx, &**kernel)]);
    let targets: BTreeSet<Target> = launched.iter().map(of).collect();
    (sources, targets.into_iter().collect())
}

/// Checks that launches use the kernels that the table says.
fn check_names(launches: &Launches, gpu: &Gpu, kernels: &[Box<dyn CubeKernel>]) {
    let names: BTreeSet<String> = kernels.iter().map(|kernel| short_name(&**kernel)).collect();
    let used: BTreeSet<&str> = names.iter().filter_map(|name| name.split('<').next()).collect();
    let listed: BTreeSet<&str> = launches.kernels.iter().copied().collect();
    assert_eq!(used, listed, "what is launched on {}, and what launches.rs says", gpu.name);
}

/// Returns a kernel's function and, in angle brackets, the types that it was made for.
fn short_name(kernel: &dyn CubeKernel) -> String {
    let full = kernel.name();
    let (path, types) = full.split_once('<').map_or((full, ""), |(path, types)| (path, types.trim_end_matches('>')));
    let function = path.rsplit("::").nth(1).unwrap_or(path);
    let types: Vec<&str> = types.split(", ").map(|path| path.rsplit("::").next().unwrap_or(path)).collect();
    format!("{function}<{}>", types.join(", ")).replace("<>", "")
}

fn lower(kernel: &dyn CubeKernel, gpu: &Gpu) -> Source {
    let name = short_name(kernel);
    let definition = cubecl::define_kernel(kernel).unwrap_or_else(|error| panic!("{name}: {error}"));
    let compiled = CompiledKernel::compile(kernel, definition, &mut CppCompiler::<Cuda>::default(), &gpu.options())
        .unwrap_or_else(|error| panic!("{name} on {}: {error}", gpu.name));
    let dynamic_shared_bytes = compiled.repr.as_ref().map_or(0, |repr| repr.shared_memory_size);
    Source { name, text: compiled.source, dynamic_shared_bytes, n_threads: compiled.cube_dim.num_elems() }
}

/// Returns what a source lacks, or has and should not.
fn unexpected_text(gpu: &Gpu, source: &Source) -> Vec<String> {
    let launches = LAUNCHES.iter().filter(|launches| launches.kernels.contains(&source.function()));
    let mut complaints = Vec::new();
    for launches in launches {
        let lacks = launches.contains.iter().filter(|text| !source.text.contains(**text));
        complaints.extend(lacks.map(|text| format!("{} lacks {text}", source.name)));
        let has = launches.lacks.iter().filter(|text| source.text.contains(**text));
        complaints.extend(has.map(|text| format!("{} has {text}", source.name)));
        // Programmatic dependent launch: an instruction that older architectures do not have.
        let overlaps = source.text.contains("griddepcontrol.wait");
        if overlaps != (launches.overlaps && gpu.sm >= 90) {
            complaints.push(format!("{} on {}: overlaps is {overlaps}", source.name, gpu.name));
        }
    }
    complaints
}

fn compile(nvrtc: &Nvrtc, gpu: &Gpu, source: &Source) -> Result<Outcome, String> {
    let compiled = nvrtc.compile(&source.text, &gpu.architecture()).map_err(|error| error.to_string())?;
    let usage = Usage::read(&compiled.cubin).map_err(|error| error.to_string())?;
    let reported =
        cubin::Reported::read(&compiled.log).ok_or_else(|| format!("nothing of registers: {}", compiled.log))?;
    // The file is read as its writer means it.
    if (usage.registers, usage.stack_bytes) != (reported.registers, reported.stack_bytes) {
        return Err(format!("{usage:?} by its cubin, {reported:?} by the assembler"));
    }
    Ok(Outcome { usage, spilled_bytes: reported.spill_store_bytes })
}

/// Returns what exceeds a budget.
fn over_budget(gpu: &Gpu, source: &Source, outcome: &Outcome) -> Vec<String> {
    let usage = &outcome.usage;
    let shared_bytes = source.dynamic_shared_bytes + usage.static_shared_bytes;
    let allowed = launches::spill_budget(source.function());
    let checks = [
        ("registers", usage.registers as usize, MAX_REGISTERS as usize),
        ("registers of a CTA", (usage.registers * source.n_threads) as usize, MULTIPROCESSOR_REGISTERS as usize),
        ("bytes of shared memory", shared_bytes, gpu.max_shared_bytes),
        ("bytes that a thread spills", outcome.spilled_bytes as usize, allowed),
        ("bytes of a thread's stack", usage.stack_bytes as usize, allowed),
    ];
    checks
        .into_iter()
        .filter(|(_, found, allowed)| found > allowed)
        .map(|(what, found, allowed)| {
            format!("{} on {} ({}): {found} {what}, of {allowed}", source.name, gpu.name, usage.entry)
        })
        .collect()
}

/// The most of a kernel's variants: registers, bytes of shared memory, of the stack, spilled.
type Worst = [usize; 4];

fn note(worst: &mut Worst, source: &Source, outcome: &Outcome) {
    let usage = &outcome.usage;
    let shared_bytes = source.dynamic_shared_bytes + usage.static_shared_bytes;
    let found = [usage.registers as usize, shared_bytes, usage.stack_bytes as usize, outcome.spilled_bytes as usize];
    for (worst, found) in worst.iter_mut().zip(found) {
        *worst = found.max(*worst);
    }
}

/// Prints a row for each kernel, a column for each architecture.
fn print(worst: &BTreeMap<(&str, u32), Worst>) {
    let kernels: BTreeSet<&str> = worst.keys().map(|(kernel, _)| *kernel).collect();
    eprintln!("registers / bytes of shared memory / bytes spilled");
    eprint!("{:26}", "");
    for gpu in GPUS {
        eprint!("{:>18}", gpu.architecture());
    }
    eprintln!();
    for kernel in kernels {
        eprint!("{kernel:26}");
        for gpu in GPUS {
            let row = worst.get(&(kernel, gpu.sm));
            let row =
                row.map_or(String::new(), |[registers, shared, _, spilled]| format!("{registers}/{shared}/{spilled}"));
            eprint!("{row:>18}");
        }
        eprintln!();
    }
}

/// Maps `items` on as many threads as the machine has processors.
fn in_parallel<T: Sync, R: Send>(items: &[T], map: impl Fn(&T) -> R + Sync) -> Vec<R> {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let next = AtomicUsize::new(0);
    let work = || {
        let mut done = Vec::new();
        loop {
            let item_idx = next.fetch_add(1, Ordering::Relaxed);
            let Some(item) = items.get(item_idx) else { return done };
            done.push((item_idx, map(item)));
        }
    };
    let mut results: Vec<(usize, R)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..n_threads).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().expect("a worker that did not panic")).collect()
    });
    results.sort_by_key(|(item_idx, _)| *item_idx);
    results.into_iter().map(|(_, result)| result).collect()
}
