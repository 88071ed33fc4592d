//! Rows on the device as a tap sees them.

use crate::engine::tap::Values;
use crate::inference::InferenceError;
use cubecl::client::Client;
use cubecl::server::Handle;
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
    let bytes = client.read_one(handle.clone()).map_err(device_error)?;
    let bytes = &bytes[..(n * element.size_bytes()).min(bytes.len())];
    Ok(match element {
        Element::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
        Element::F16 => bytes.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        Element::Bf16 => bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
    })
}

/// Says what a device's failure means for who asked.
pub fn device_error(error: cubecl::server::ServerError) -> InferenceError {
    let reason = error.to_string();
    let first = reason.lines().map(str::trim).filter(|line| !line.is_empty()).take(3).collect::<Vec<_>>().join("; ");
    InferenceError::Device { device: "gpu".to_owned(), reason: first }
}
