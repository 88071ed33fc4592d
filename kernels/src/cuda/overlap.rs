//! Dependencies of a recording that are met early: see [`cube::overlap`](crate::cube::overlap).

use super::streams::{Recording, with_recording};
use crate::cube::NotTaken;
use cubecl::client::Client;
use cudarc::driver::sys as driver;
use std::ffi::CStr;
use std::ptr::{null, null_mut};

/// Kernels that wait for earlier launches before they read or write anything of theirs.
const WAITING: [&str; 3] = ["gemv_kernel", "decode_attention_kernel", "choose_kernel"];

/// Oldest driver with dependencies of this kind in graphs, as CUDA numbers versions.
const MIN_DRIVER_VERSION: i32 = 12_030;

/// A dependency that is met when all cubes of a kernel have let later ones begin (`CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC`,
/// `CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC`).
const EARLY: driver::CUgraphEdgeData = driver::CUgraphEdgeData { from_port: 1, to_port: 0, type_: 1, reserved: [0; 5] };

/// Why launches of a recording stay one behind the other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlapError {
    #[error("overlap launches: no stream of this client records")]
    NoRecording,
    #[error("overlap launches: the client's server is not CUDA's")]
    Server,
    #[error("overlap launches: {0} streams of the device record")]
    Streams(usize),
    #[error("overlap launches: 0x{0} is no stream's address")]
    Address(String),
    #[error("overlap launches: the recording stream belongs to another context")]
    Context,
    #[error("overlap launches: capture {before} became capture {after}")]
    Changed { before: u64, after: u64 },
    #[error("overlap launches: {0}")]
    Call(String),
}

pub(super) fn check(result: driver::CUresult, what: &str) -> Result<(), OverlapError> {
    result.result().map_err(|error| OverlapError::Call(format!("{what}: {error:?}")))
}

/// Returns `Ok` if the driver has dependencies of this kind.
///
/// # Errors
/// `Driver`; `Failed` if it does not tell its version.
pub(crate) fn driver_support() -> Result<(), NotTaken> {
    let mut found = 0;
    // SAFETY: writes one integer, which outlives the call.
    check(unsafe { driver::cuDriverGetVersion(&mut found) }, "ask for the driver's version")
        .map_err(NotTaken::failed)?;
    match found >= MIN_DRIVER_VERSION {
        true => Ok(()),
        false => Err(NotTaken::Driver { needed: MIN_DRIVER_VERSION, found }),
    }
}

/// Lets the launches recorded so far overlap where the later of two waits by itself; returns how many do. Called between the start of
/// a capture and its end; on an error the recording is not to be used.
///
/// # Errors
/// Any of [`OverlapError`].
pub(crate) fn overlap(client: &Client) -> Result<usize, OverlapError> {
    // SAFETY: the graph is being recorded, and nothing else is launched meanwhile.
    with_recording(client, |recording| unsafe { overlap_graph(recording) })
}

unsafe fn overlap_graph(recording: &Recording) -> Result<usize, OverlapError> {
    let graph = recording.graph;
    // SAFETY: the caller names a graph that is being recorded; everything written to outlives the calls.
    unsafe {
        let mut n_edges = 0;
        let counted = driver::cuGraphGetEdges_v2(graph, null_mut(), null_mut(), null_mut(), &mut n_edges);
        check(counted, "count what a recording depends on")?;
        let (mut from, mut to) = (vec![null_mut(); n_edges], vec![null_mut(); n_edges]);
        let mut data = vec![driver::CUgraphEdgeData { from_port: 0, to_port: 0, type_: 0, reserved: [0; 5] }; n_edges];
        let listed =
            driver::cuGraphGetEdges_v2(graph, from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut n_edges);
        check(listed, "list what a recording depends on")?;
        let mut n_early = 0;
        for ((from, to), data) in from.iter().zip(&to).zip(&data).take(n_edges) {
            let waits = kernel_name(*to).is_some_and(|name| WAITING.iter().any(|known| name.starts_with(known)));
            if !waits || kernel_name(*from).is_none() {
                continue;
            }
            check(driver::cuGraphRemoveDependencies_v2(graph, from, to, data, 1), "take out a dependency")?;
            check(driver::cuGraphAddDependencies_v2(graph, from, to, &EARLY, 1), "put in a dependency")?;
            n_early += 1;
        }
        Ok(n_early)
    }
}

/// Returns the name of a node's kernel; `None` for other nodes.
unsafe fn kernel_name(node: driver::CUgraphNode) -> Option<String> {
    // SAFETY: the caller names a node of a live graph; the parameters are plain data that the driver fills in.
    unsafe {
        let mut params = std::mem::zeroed::<driver::CUDA_KERNEL_NODE_PARAMS>();
        driver::cuGraphKernelNodeGetParams_v2(node, &mut params).result().ok()?;
        let mut name = null();
        driver::cuFuncGetName(&mut name, params.func).result().ok()?;
        Some(CStr::from_ptr(name).to_string_lossy().into_owned())
    }
}
