//! Launches of a recorded step that begin before the one in front of them has ended (programmatic dependent launch, sm_90 on): a
//! kernel fetches its weights while the last cubes of the kernel before still work, and waits only before it reads what that wrote.
//!
//! Kernels that do this wait by [`await_earlier`] before they touch anything that another launch of the step writes, and before they
//! write anything, so that a launch that has ended says that all before it have. cubecl records every launch behind the end of the
//! one before; [`overlap`] changes that in the recording.

use cubecl::prelude::*;

/// Waits until all earlier launches have ended and what they wrote is seen. Everything before it may run while they do.
#[cube]
pub(super) fn await_earlier() {
    gpu_asm!("griddepcontrol.wait;");
}

/// As [`await_earlier`], once a value is there: compilers would move what was asked of memory behind the wait.
#[cube]
pub(super) fn await_earlier_with(word: u32) {
    // An operand has to be a value, not a variable; and the comparison is nothing that can be left out.
    let word = word | 0u32;
    gpu_asm!(
        "{{ .reg .pred p; setp.eq.u32 p, {}, 0x7fc1d2e3; @p nanosleep.u32 1; griddepcontrol.wait; }}",
        in(_) word
    );
}

/// Lets the launch behind this one begin, once all cubes have come here.
#[cube]
pub(super) fn let_later_begin() {
    gpu_asm!("griddepcontrol.launch_dependents;");
}

#[cfg(feature = "cuda")]
mod recording {
    use cubecl::client::Client;
    use cubecl::cuda::CudaRuntime;
    use cubecl::device_handle::DeviceHandle;
    use cubecl_server::runtime::Runtime;
    use cudarc::driver::sys as driver;
    use std::ffi::CStr;
    use std::ptr::{null, null_mut};

    /// Kernels that wait for earlier launches before they read or write anything of theirs.
    const WAITING: [&str; 3] = ["gemv_kernel", "decode_attention_kernel", "choose_kernel"];

    /// Oldest driver with dependencies of this kind in graphs, as CUDA numbers versions.
    const MIN_DRIVER_VERSION: i32 = 12_030;

    /// A dependency that is met when all cubes of a kernel have let later ones begin (`CU_GRAPH_KERNEL_NODE_PORT_PROGRAMMATIC`,
    /// `CU_GRAPH_DEPENDENCY_TYPE_PROGRAMMATIC`).
    const EARLY: driver::CUgraphEdgeData =
        driver::CUgraphEdgeData { from_port: 1, to_port: 0, type_: 1, reserved: [0; 5] };

    /// Why launches of a recording stay one behind the other.
    #[derive(Debug, thiserror::Error)]
    #[non_exhaustive]
    pub enum OverlapError {
        #[error("overlap launches: no stream of the device records")]
        NoRecording,
        #[error("overlap launches: {0}")]
        Call(String),
    }

    fn check(result: driver::CUresult, what: &str) -> Result<(), OverlapError> {
        result.result().map_err(|error| OverlapError::Call(format!("{what}: {error:?}")))
    }

    /// Returns true if the driver has dependencies of this kind.
    pub(super) fn driver_has_dependencies() -> bool {
        let mut version = 0;
        // SAFETY: writes one integer, which outlives the call.
        let asked = unsafe { driver::cuDriverGetVersion(&mut version).result() };
        asked.is_ok() && version >= MIN_DRIVER_VERSION
    }

    /// Lets the launches recorded so far overlap where the later of two waits by itself; returns how many do. Called between the
    /// start of a capture and its end; on an error the recording is not to be used.
    ///
    /// # Errors
    /// `NoRecording`, `Call`.
    pub fn overlap(client: &Client) -> Result<usize, OverlapError> {
        let server = DeviceHandle::<<CudaRuntime as Runtime>::Server>::new(client.service_id().device);
        let relaxed = server.submit_blocking(|server| {
            // The runtime has no call that gives its streams; they are read from how it prints itself for debugging.
            let printed = format!("{server:?}");
            let addresses = printed.split("sys: 0x").skip(1).filter_map(|text| {
                let digits = text.find(|c: char| !c.is_ascii_hexdigit()).map_or(text, |end| &text[..end]);
                usize::from_str_radix(digits, 16).ok()
            });
            for address in addresses {
                // SAFETY: a stream that the server, which is held meanwhile, keeps alive.
                if let Some(n) = unsafe { overlap_stream(address as driver::CUstream) }? {
                    return Ok(n);
                }
            }
            Err(OverlapError::NoRecording)
        });
        relaxed.map_err(|error| OverlapError::Call(format!("{error:?}")))?
    }

    /// As [`overlap`], for one stream; nothing where it does not record.
    unsafe fn overlap_stream(stream: driver::CUstream) -> Result<Option<usize>, OverlapError> {
        let mut status = driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
        let (mut id, mut graph) = (0, null_mut());
        let (mut last, mut data, mut n_last) = (null(), null(), 0);
        // SAFETY: the caller names a live stream; everything written to outlives the calls.
        unsafe {
            let asked = driver::cuStreamGetCaptureInfo_v3(
                stream,
                &mut status,
                &mut id,
                &mut graph,
                &mut last,
                &mut data,
                &mut n_last,
            );
            check(asked, "ask whether a stream records")?;
            if status != driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE {
                return Ok(None);
            }
            let mut n_edges = 0;
            let counted = driver::cuGraphGetEdges_v2(graph, null_mut(), null_mut(), null_mut(), &mut n_edges);
            check(counted, "count what a recording depends on")?;
            let (mut from, mut to) = (vec![null_mut(); n_edges], vec![null_mut(); n_edges]);
            let mut data =
                vec![driver::CUgraphEdgeData { from_port: 0, to_port: 0, type_: 0, reserved: [0; 5] }; n_edges];
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
            Ok(Some(n_early))
        }
    }

    /// Returns the name of a node's kernel; nothing for other nodes.
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
}

#[cfg(feature = "cuda")]
pub use recording::{OverlapError, overlap};

/// Returns true where kernels are compiled so that they can overlap: on CUDA devices of compute capability 9.0 and up, which are those
/// with clusters, under a driver that records such dependencies.
pub fn is_known(client: &cubecl::client::Client) -> bool {
    client.name() == "cuda" && client.features().cube_cluster && driver_has_dependencies()
}

#[cfg(feature = "cuda")]
use recording::driver_has_dependencies;

/// Returns true: without a driver kernels are compiled and never run.
#[cfg(not(feature = "cuda"))]
fn driver_has_dependencies() -> bool {
    true
}
