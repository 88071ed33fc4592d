//! Launches of a recorded step that begin before the one in front of them has ended (programmatic dependent launch, sm_90 on): a
//! kernel fetches its weights while the last cubes of the kernel before still work, and waits only before it reads what that wrote.

use cubecl::prelude::*;

/// Waits until all earlier launches have ended and what they wrote is seen. Everything before it may run while they do.
#[cube]
pub fn await_earlier() {
    gpu_asm!("griddepcontrol.wait;");
}

/// As [`await_earlier`], once a value is there: what was asked of memory before it stays in front.
#[cube]
pub fn await_earlier_with(word: u32) {
    let word = word | 0u32;
    gpu_asm!(
        "{{ .reg .pred p; setp.eq.u32 p, {}, 0x7fc1d2e3; @p nanosleep.u32 1; griddepcontrol.wait; }}",
        in(_) word
    );
}

/// Lets the launch behind this one begin, once all cubes have come here.
#[cube]
pub fn let_later_begin() {
    gpu_asm!("griddepcontrol.launch_dependents;");
}

#[cfg(feature = "cuda")]
mod graph {
    use cubecl::client::Client;
    use cubecl::cuda::CudaRuntime;
    use cubecl::device_handle::DeviceHandle;
    use cubecl_server::runtime::Runtime;
    use cudarc::driver::sys as driver;
    use std::ffi::CStr;

    /// Kernels that await earlier launches before they read anything of theirs.
    const AWAITING: [&str; 3] = ["gemv_kernel", "decode_attention_kernel", "choose_kernel"];

    pub fn is_known(client: &Client) -> bool {
        if client.name() != "cuda" {
            return false;
        }
        let mut major = 0;
        // SAFETY: writes one integer, which outlives the call.
        let asked = unsafe {
            driver::cuDeviceGetAttribute(
                &mut major,
                driver::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                client.service_id().device.index_id as i32,
            )
        };
        asked.result().is_ok() && major >= 9
    }

    fn check(result: driver::CUresult, what: &str) -> Result<(), String> {
        result.result().map_err(|error| format!("{what}: {error:?}"))
    }

    pub fn overlap(client: &Client) -> Result<usize, String> {
        let handle = DeviceHandle::<<CudaRuntime as Runtime>::Server>::new(client.service_id().device);
        handle
            .submit_blocking(|server| {
                let text = format!("{server:?}");
                eprintln!("server text {} bytes", text.len());
                for found in text.split("sys: 0x").skip(1) {
                    let digits: String = found.chars().take_while(char::is_ascii_hexdigit).collect();
                    let Ok(address) = usize::from_str_radix(&digits, 16) else { continue };
                    // SAFETY: a stream of the server.
                    match unsafe { relax(address as driver::CUstream) } {
                        Ok(Some(n)) => return Ok(n),
                        Ok(None) => {}
                        Err(error) => return Err(error),
                    }
                }
                Err("no stream records".to_owned())
            })
            .map_err(|error| format!("{error:?}"))?
    }

    unsafe fn relax(stream: driver::CUstream) -> Result<Option<usize>, String> {
        unsafe {
            let mut status = driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
            let (mut id, mut graph, mut nodes, mut data, mut n) =
                (0, std::ptr::null_mut(), std::ptr::null(), std::ptr::null(), 0);
            check(
                driver::cuStreamGetCaptureInfo_v3(
                    stream,
                    &mut status,
                    &mut id,
                    &mut graph,
                    &mut nodes,
                    &mut data,
                    &mut n,
                ),
                "capture info",
            )?;
            if status != driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE {
                return Ok(None);
            }
            let mut n_edges = 0;
            let null = std::ptr::null_mut::<driver::CUgraphNode_st>;
            check(
                driver::cuGraphGetEdges_v2(
                    graph,
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    std::ptr::null_mut(),
                    &mut n_edges,
                ),
                "count edges",
            )?;
            let mut from = vec![null(); n_edges];
            let mut to = vec![null(); n_edges];
            let mut data = vec![std::mem::zeroed::<driver::CUgraphEdgeData>(); n_edges];
            check(
                driver::cuGraphGetEdges_v2(graph, from.as_mut_ptr(), to.as_mut_ptr(), data.as_mut_ptr(), &mut n_edges),
                "edges",
            )?;
            let mut n_relaxed = 0;
            for i in 0..n_edges {
                if !awaits(to[i])? || name(from[i]).is_err() {
                    continue;
                }
                check(driver::cuGraphRemoveDependencies_v2(graph, &from[i], &to[i], &data[i], 1), "take an edge out")?;
                let mut edge = std::mem::zeroed::<driver::CUgraphEdgeData>();
                edge.from_port = 1;
                edge.type_ = 1;
                check(driver::cuGraphAddDependencies_v2(graph, &from[i], &to[i], &edge, 1), "put an edge in")?;
                n_relaxed += 1;
            }
            Ok(Some(n_relaxed))
        }
    }

    unsafe fn awaits(node: driver::CUgraphNode) -> Result<bool, String> {
        unsafe { Ok(name(node).is_ok_and(|name| AWAITING.iter().any(|kernel| name.starts_with(kernel)))) }
    }

    unsafe fn name(node: driver::CUgraphNode) -> Result<String, String> {
        unsafe {
            let mut params = std::mem::zeroed::<driver::CUDA_KERNEL_NODE_PARAMS>();
            check(driver::cuGraphKernelNodeGetParams_v2(node, &mut params), "a node")?;
            let mut name = std::ptr::null();
            check(driver::cuFuncGetName(&mut name, params.func), "a kernel's name")?;
            Ok(CStr::from_ptr(name).to_string_lossy().into_owned())
        }
    }
}

#[cfg(feature = "cuda")]
pub use graph::{is_known, overlap};

/// Returns false: no runtime but CUDA's has it.
#[cfg(not(feature = "cuda"))]
pub fn is_known(_client: &cubecl::client::Client) -> bool {
    false
}
