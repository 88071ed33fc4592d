//! The stream of cubecl's server on which a client records a graph.
//!
//! The server prints its streams for debugging and has no other way to tell them. A stream's address is taken from there only if the
//! server is the type that this file was written for, the printed structure is a stream whose own state says that this client records
//! on it, and no other stream records; and it is used only if the driver then finds it in the server's context, recording.

use super::overlap::{OverlapError, check};
use cubecl::client::Client;
use cubecl::cuda::CudaRuntime;
use cubecl::device_handle::DeviceHandle;
use cubecl_environment::stream::StreamId;
use cubecl_server::runtime::Runtime;
use cudarc::driver::sys as driver;
use std::any::TypeId;
use std::ptr::{null, null_mut};

type CudaServer = <CudaRuntime as Runtime>::Server;

/// A graph that is recorded.
#[derive(Debug)]
pub(super) struct Recording {
    stream: driver::CUstream,
    /// The driver's number of this capture; no other of the process has it.
    id: u64,
    pub graph: driver::CUgraph,
}

/// Calls `edit` with the graph that the client's stream records, on the server's thread, while nothing else is launched.
///
/// # Errors
/// `NoRecording`, `Server`, `Streams`, `Changed`, `Call`, and those of `edit`.
pub(super) fn with_recording<T: Send + 'static>(
    client: &Client,
    edit: impl FnOnce(&Recording) -> Result<T, OverlapError> + Send + 'static,
) -> Result<T, OverlapError> {
    if !client.is_capturing() {
        return Err(OverlapError::NoRecording);
    }
    if client.service_id().service != TypeId::of::<CudaServer>() {
        return Err(OverlapError::Server);
    }
    let owner = StreamId::current();
    let server = DeviceHandle::<CudaServer>::new(client.service_id().device);
    let edited = server.submit_blocking(move |server| {
        let address = recording_stream(&format!("{server:?}"), owner.value)?;
        let recording = Recording::of(address)?;
        let edited = edit(&recording)?;
        recording.check_unchanged()?;
        Ok(edited)
    });
    edited.map_err(|error| OverlapError::Call(format!("{error:?}")))?
}

/// Returns the address of the one stream that records, for the logical stream `owner`, of those in a printed server.
fn recording_stream(printed: &str, owner: u64) -> Result<usize, OverlapError> {
    let state = format!("phase: Capture {{ owner: StreamId {{ value: {owner} }} }}");
    let streams = printed.split("Stream { sys: 0x").skip(1);
    let recording: Vec<&str> = streams.filter(|stream| stream.contains("phase: Capture {")).collect();
    let [stream] = recording.as_slice() else { return Err(OverlapError::Streams(recording.len())) };
    if !stream.contains(&state) {
        return Err(OverlapError::NoRecording);
    }
    let digits = stream.split(|c: char| !c.is_ascii_hexdigit()).next().unwrap_or_default();
    // An object of the driver's: never null, and aligned.
    match usize::from_str_radix(digits, 16) {
        Ok(address) if address != 0 && address.is_multiple_of(align_of::<usize>()) => Ok(address),
        _ => Err(OverlapError::Address(digits.to_owned())),
    }
}

impl Recording {
    /// Asks the driver what a stream records.
    fn of(address: usize) -> Result<Recording, OverlapError> {
        let stream = address as driver::CUstream;
        let (mut of_stream, mut current) = (null_mut(), null_mut());
        // SAFETY: cubecl's server, on whose thread this runs, says that the address is one of its streams; both calls write a pointer.
        unsafe {
            check(driver::cuCtxGetCurrent(&mut current), "find the server's context")?;
            check(driver::cuStreamGetCtx(stream, &mut of_stream), "find a stream's context")?;
        }
        if current.is_null() || of_stream != current {
            return Err(OverlapError::Context);
        }
        let (status, id, graph) = capture(stream)?;
        match status == driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE && id != 0 && !graph.is_null() {
            true => Ok(Recording { stream, id, graph }),
            false => Err(OverlapError::NoRecording),
        }
    }

    /// Fails unless the stream still records the same graph.
    fn check_unchanged(&self) -> Result<(), OverlapError> {
        let (status, id, graph) = capture(self.stream)?;
        let is_active = status == driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE;
        match is_active && (id, graph) == (self.id, self.graph) {
            true => Ok(()),
            false => Err(OverlapError::Changed { before: self.id, after: id }),
        }
    }
}

/// Returns whether a live stream records, the capture's number and its graph.
fn capture(stream: driver::CUstream) -> Result<(driver::CUstreamCaptureStatus, u64, driver::CUgraph), OverlapError> {
    let mut status = driver::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    let (mut id, mut graph) = (0, null_mut());
    let (mut last, mut data, mut n_last) = (null(), null(), 0);
    // SAFETY: the stream is live; everything written to outlives the call.
    let asked = unsafe {
        driver::cuStreamGetCaptureInfo_v3(stream, &mut status, &mut id, &mut graph, &mut last, &mut data, &mut n_last)
    };
    check(asked, "ask whether a stream records")?;
    Ok((status, id, graph))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As cubecl 0.11.3 prints a stream, with what lies between shortened.
    fn stream(address: &str, phase: &str) -> String {
        format!(
            "StreamWrapper {{ stream: Stream {{ sys: {address}, memory_management_gpu: DynamicMemoryManagement \"GpuStorage\", \
             capturing: StreamCapture {{ state: StreamCaptureState {{ phase: {phase}, device: CaptureStatus(CaptureRecord {{ \
             streams: Mutex {{ data: [(1, Capture {{ owner: StreamId {{ value: 7 }} }})] }} }}) }} }} }}, cursor: 3 }}"
        )
    }

    #[test]
    fn recording_stream_is_the_one_whose_state_says_so() {
        let capture = "Capture { owner: StreamId { value: 7 } }";
        let (idle, recording) = (stream("0x7f0000001000", "NoCapture"), stream("0x7f0000002000", capture));
        let found = |text: &[&str], owner| recording_stream(&text.concat(), owner);
        assert_eq!(found(&[&idle, &recording], 7).ok(), Some(0x7f00_0000_2000));
        assert!(matches!(found(&[&idle, &recording], 8), Err(OverlapError::NoRecording)), "another's recording");
        assert!(matches!(found(&[&idle], 7), Err(OverlapError::Streams(0))));
        assert!(matches!(found(&[&recording, &recording], 7), Err(OverlapError::Streams(2))));
        for address in ["0x0", "0x7f0000002001", "0x", "0x1234567890abcdef12"] {
            assert!(matches!(found(&[&stream(address, capture)], 7), Err(OverlapError::Address(_))), "{address}");
        }
        // Addresses of other structures are none of a stream.
        assert!(matches!(
            found(&["Fence { sys: 0x7f0000003000, phase: Capture { owner"], 7),
            Err(OverlapError::Streams(0))
        ));
    }
}
