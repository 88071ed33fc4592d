//! Rows on the device as a tap sees them.

use crate::engine::tap::Values;
use crate::inference::InferenceError;
use cubecl::client::Client;
use cubecl::server::{Handle, IoError, ServerError};
use half::{bf16, f16};
use labpipe_kernels::cube::Element;

/// Some columns of a matrix of activations.
pub struct Rows<'a> {
    pub client: &'a Client,
    pub handle: &'a Handle,
    pub element: Element,
    pub n: usize,
    /// Width of the matrix, first of the columns and their number.
    pub stride: usize,
    pub first: usize,
    pub width: usize,
}

impl Values for Rows<'_> {
    fn width(&self) -> usize {
        self.width
    }

    fn read(&self) -> Result<Vec<f32>, InferenceError> {
        let all = read(self.client, self.handle, self.element, self.n * self.stride)?;
        if self.width == self.stride {
            return Ok(all);
        }
        let columns = self.first..self.first + self.width;
        Ok(all.chunks_exact(self.stride).flat_map(|row| row[columns.clone()].iter().copied()).collect())
    }
}

/// Copies `n` values to the host as f32.
///
/// # Errors
/// `OutOfMemory` or `Device` where a kernel before it failed.
pub fn read(client: &Client, handle: &Handle, element: Element, n: usize) -> Result<Vec<f32>, InferenceError> {
    let behind = (handle.size_in_used() as usize).saturating_sub(n * element.size_bytes());
    let bytes = client.read_one(handle.clone().offset_end(behind as u64)).map_err(device_error)?;
    Ok(floats(&bytes[..(n * element.size_bytes()).min(bytes.len())], element))
}

/// Returns what bytes from the device mean.
pub fn floats(bytes: &[u8], element: Element) -> Vec<f32> {
    match element {
        Element::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Element::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Element::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    }
}

/// Says what a device's failure means for who asked. cubecl keeps a failed allocation or launch on the buffers that it left
/// unwritten and reports it where they are read, or what was computed from them.
pub fn device_error(error: ServerError) -> InferenceError {
    let root = root(&error);
    if error.is_device_poisoned() {
        return InferenceError::lost(words(root));
    }
    match root {
        ServerError::Io(IoError::OutOfMemory { size, .. } | IoError::BufferTooBig { size, .. }) => {
            InferenceError::out_of_memory("a buffer", *size, None)
        }
        _ => InferenceError::device(words(root)),
    }
}

/// Returns the failure that others followed from: an allocation's before any other.
fn root(error: &ServerError) -> &ServerError {
    match error {
        ServerError::Unwritten { root: inner, .. } => root(inner),
        ServerError::Several { errors, .. } => {
            let mut roots = errors.iter().map(root);
            let first = roots.next().unwrap_or(error);
            let is_memory = |error: &&ServerError| matches!(error, ServerError::Io(IoError::OutOfMemory { .. }));
            std::iter::once(first).chain(roots).find(is_memory).unwrap_or(first)
        }
        _ => error,
    }
}

/// Returns the first lines of what a failure says, without the trace of calls that follows.
fn words(error: &ServerError) -> String {
    let text = error.to_string();
    let lines = text.lines().map(str::trim).take_while(|line| !line.starts_with("Backtrace"));
    lines.filter(|line| !line.is_empty()).take(3).collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;
    fn generic(reason: &str) -> ServerError {
        ServerError::graph_state(reason)
    }

    fn memory() -> ServerError {
        let ServerError::Generic { backtrace, .. } = generic("") else { panic!("it is that") };
        ServerError::Io(IoError::OutOfMemory { size: 5 << 20, backtrace })
    }

    fn unwritten(root: ServerError) -> ServerError {
        let ServerError::Generic { backtrace, .. } = generic("") else { panic!("it is that") };
        let (failure, claimed, chain) = (1, 2, vec!["a launch was skipped".to_owned()]);
        ServerError::Unwritten { failure, claimed, chain, root: Box::new(root), backtrace }
    }

    #[test]
    fn a_failed_allocation_is_found_behind_what_was_skipped_after_it() {
        let ServerError::Generic { backtrace, .. } = generic("") else { panic!("it is that") };
        let several = ServerError::Several { errors: vec![generic("x"), unwritten(memory())], backtrace };
        for error in [memory(), unwritten(memory()), unwritten(unwritten(memory())), several] {
            let found = device_error(error);
            assert!(matches!(found, InferenceError::OutOfMemory { asked_bytes: 5_242_880, .. }), "{found}");
        }
    }

    #[test]
    fn other_failures_keep_their_words_and_lose_the_trace() {
        let text = device_error(unwritten(generic("no such kernel"))).to_string();
        assert!(text.contains("no such kernel") && !text.to_lowercase().contains("backtrace"), "{text}");
    }
}
