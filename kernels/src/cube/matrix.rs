//! A stored matrix on the device.

use super::decode::{Format, StoredLaunch};
use crate::dense::DenseType;
use crate::schemes::dynamic_map::dynamic_map;
use crate::weight::{DenseWeight, HostWeight};
use crate::{Packed, SchemeError};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Which decoder reads a matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    F32,
    F16,
    Bf16,
    /// 4-bit codes into a table.
    Codebook4,
    /// 4-bit codes with scale and zero point a group.
    Affine4,
    Int8,
}

/// A matrix `[n_rows, n_cols]` on the device in stored form.
#[derive(Debug, Clone)]
pub struct DeviceMatrix {
    pub kind: Kind,
    pub format: Format,
    pub n_rows: usize,
    pub n_cols: usize,
    pub codes: Handle,
    pub scales: Handle,
    pub aux: Handle,
    pub tables: Handle,
    /// First rows of the second and third matrix where several are stored as one; else past the end.
    pub segments: [u32; 2],
    /// Lengths of the buffers in elements: codes, scales, aux, tables.
    pub lens: [usize; 4],
}

/// Block size that stands for "no blocks": larger than any row.
const NO_BLOCKS: u32 = 1 << 30;

impl DeviceMatrix {
    /// Copies a matrix from the host in its stored form.
    ///
    /// # Errors
    /// [`SchemeError::Unknown`] for a scheme that has no kernels.
    pub fn upload(client: &Client, weight: &HostWeight) -> Result<DeviceMatrix, SchemeError> {
        match weight {
            HostWeight::Dense(dense) => Ok(DeviceMatrix::upload_dense(client, dense)),
            HostWeight::Packed(packed) => DeviceMatrix::upload_packed(client, packed),
        }
    }

    fn upload_dense(client: &Client, dense: &DenseWeight) -> DeviceMatrix {
        let kind = match dense.dtype {
            DenseType::F32 => Kind::F32,
            DenseType::F16 => Kind::F16,
            DenseType::Bf16 => Kind::Bf16,
        };
        let format = Format { block_size: NO_BLOCKS, nested: false };
        let parts = Parts { codes: dense.bytes.as_slice(), ..Parts::default() };
        parts.upload(client, kind, format, dense.n_rows, dense.n_cols)
    }

    fn upload_packed(client: &Client, packed: &Packed) -> Result<DeviceMatrix, SchemeError> {
        let block_size = packed.spec.block_size.map_or(NO_BLOCKS, |size| size as u32);
        let mut parts = Parts { codes: &packed.codes, ..Parts::default() };
        let (kind, nested) = match packed.spec.scheme.as_str() {
            "nf4" => {
                parts.tables = crate::schemes::nf4::TABLE.to_vec();
                match &packed.nested {
                    None => parts.scales = packed.scales.clone(),
                    Some(nested) => {
                        parts.scales = nested.absmax.clone();
                        parts.aux = nested.codes.clone();
                        parts.tables.extend_from_slice(dynamic_map());
                        parts.tables.extend([nested.offset; 3]);
                    }
                }
                (Kind::Codebook4, packed.nested.is_some())
            }
            // The kernels multiply activations as they are; LLM.int8()'s products are the host's.
            "int8" if packed.spec.outlier_threshold.is_some() => {
                return Err(SchemeError::Unknown("int8 with outlier_threshold".to_owned()));
            }
            "int8" => {
                parts.scales = packed.scales.clone();
                (Kind::Int8, false)
            }
            "int4" => {
                let stats = packed.scales.iter().zip(&packed.zeros).flat_map(|(scale, zero)| {
                    let word = u32::from(half::f16::from_f32(*scale).to_bits()) | u32::from(*zero) << 16;
                    word.to_le_bytes()
                });
                parts.aux = stats.collect();
                (Kind::Affine4, false)
            }
            other => return Err(SchemeError::Unknown(other.to_owned())),
        };
        Ok(parts.upload(client, kind, Format { block_size, nested }, packed.n_rows, packed.n_cols))
    }

    /// Bytes on the device: codes and statistics; tables that all matrices share the values of are left out.
    pub fn device_bytes(&self) -> u64 {
        let [codes, scales, aux, _] = self.lens;
        let used = |len: usize| if len == 1 { 0 } else { 4 * len as u64 };
        used(codes) + used(scales) + used(aux)
    }

    /// Returns the matrix as an argument of a launch.
    ///
    /// # Safety
    /// The handles hold what `lens` says; `upload` and the quantizing kernels see to it.
    pub fn argument(&self) -> StoredLaunch {
        let [codes, scales, aux, tables] = self.lens;
        // SAFETY: each buffer was allocated with this many elements of four bytes.
        unsafe {
            StoredLaunch::new(
                BufferArg::from_raw_parts(self.codes.clone(), codes),
                BufferArg::from_raw_parts(self.scales.clone(), scales),
                BufferArg::from_raw_parts(self.aux.clone(), aux),
                BufferArg::from_raw_parts(self.tables.clone(), tables),
                self.n_cols as u32,
                self.segments[0],
                self.segments[1],
            )
        }
    }
}

/// What is uploaded.
#[derive(Default)]
struct Parts<'a> {
    codes: &'a [u8],
    scales: Vec<f32>,
    aux: Vec<u8>,
    tables: Vec<f32>,
}

impl Parts<'_> {
    fn upload(self, client: &Client, kind: Kind, format: Format, n_rows: usize, n_cols: usize) -> DeviceMatrix {
        let (codes, n_codes) = upload_words(client, self.codes);
        let (scales, n_scales) = upload_words(client, bytemuck::cast_slice(&self.scales));
        let (aux, n_aux) = upload_words(client, &self.aux);
        let (tables, n_tables) = upload_words(client, bytemuck::cast_slice(&self.tables));
        DeviceMatrix {
            kind,
            format,
            n_rows,
            n_cols,
            codes,
            scales,
            aux,
            tables,
            segments: [u32::MAX; 2],
            lens: [n_codes, n_scales, n_aux, n_tables],
        }
    }
}

/// Copies bytes as words, the last one filled with zeros; one word stands for nothing, since buffers can't be empty.
fn upload_words(client: &Client, bytes: &[u8]) -> (Handle, usize) {
    let n_words = bytes.len().div_ceil(4).max(1);
    if bytes.len() == 4 * n_words {
        return (client.create_from_slice(bytes), n_words);
    }
    let mut padded = bytes.to_vec();
    padded.resize(4 * n_words, 0);
    (client.create_from_slice(&padded), n_words)
}
