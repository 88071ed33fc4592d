//! A stored matrix on the device.

use super::Element;
use super::decode::{Format, OFFSETS, StoredLaunch};
use crate::dense::DenseType;
use crate::schemes::dynamic_map::dynamic_map;
use crate::schemes::{fp4, mxfp4, nf4};
use crate::weight::{DenseWeight, HostWeight};
use crate::{Packed, SchemeError};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use std::borrow::Cow;

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
pub(super) const NO_BLOCKS: u32 = 1 << 30;

impl DeviceMatrix {
    /// Returns a matrix of plain numbers that lie in a buffer already.
    ///
    /// # Shapes
    /// `values` `[n_rows, n_cols]` at least, in whole words of four bytes.
    pub fn plain(element: Element, values: &Handle, n_rows: usize, n_cols: usize) -> DeviceMatrix {
        let kind = match element {
            Element::F32 => Kind::F32,
            Element::F16 => Kind::F16,
            Element::Bf16 => Kind::Bf16,
        };
        DeviceMatrix {
            kind,
            format: Format { block_size: NO_BLOCKS, nested: false },
            n_rows,
            n_cols,
            codes: values.clone(),
            scales: values.clone(),
            aux: values.clone(),
            tables: values.clone(),
            segments: [u32::MAX; 2],
            lens: [(n_rows * n_cols * element.size_bytes()).div_ceil(4), 1, 1, 1],
        }
    }

    /// Copies a matrix from the host in its stored form.
    ///
    /// # Errors
    /// [`SchemeError::Unknown`] for a scheme that has no kernels.
    pub fn upload(client: &Client, weight: &HostWeight) -> Result<DeviceMatrix, SchemeError> {
        Ok(Parts::of(weight)?.upload(client))
    }

    /// Copies the codes of a packed matrix from the host, whatever its products are: those of LLM.int8() too, which
    /// [`outlier_linear`](super::outlier_linear) computes.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn upload_packed(client: &Client, packed: &Packed) -> Result<DeviceMatrix, SchemeError> {
        Ok(Parts::of_packed(packed)?.upload(client))
    }

    /// Copies matrices of equal width as one, their rows one after the other; nothing where their stored forms do not go together.
    ///
    /// # Errors
    /// As [`upload`](Self::upload).
    pub fn upload_stacked(client: &Client, weights: &[&HostWeight]) -> Result<Option<DeviceMatrix>, SchemeError> {
        let mut parts = Vec::with_capacity(weights.len());
        for weight in weights {
            parts.push(Parts::of(weight)?);
        }
        Ok(Parts::stack(parts).map(|stacked| stacked.upload(client)))
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
struct Parts<'a> {
    kind: Kind,
    format: Format,
    n_rows: usize,
    n_cols: usize,
    segments: [u32; 2],
    codes: Cow<'a, [u8]>,
    scales: Cow<'a, [f32]>,
    aux: Cow<'a, [u8]>,
    tables: Vec<f32>,
}

impl<'a> Parts<'a> {
    fn of(weight: &'a HostWeight) -> Result<Parts<'a>, SchemeError> {
        match weight {
            HostWeight::Dense(dense) => Ok(Parts::of_dense(dense)),
            // These kernels multiply activations as they are.
            HostWeight::Packed(packed) if packed.spec.outlier_threshold.is_some() => {
                Err(SchemeError::Unknown("int8 with outlier_threshold".to_owned()))
            }
            HostWeight::Packed(packed) => Parts::of_packed(packed),
        }
    }

    fn of_dense(dense: &'a DenseWeight) -> Parts<'a> {
        let kind = match dense.dtype {
            DenseType::F32 => Kind::F32,
            DenseType::F16 => Kind::F16,
            DenseType::Bf16 => Kind::Bf16,
        };
        Parts {
            kind,
            format: Format { block_size: NO_BLOCKS, nested: false },
            n_rows: dense.n_rows,
            n_cols: dense.n_cols,
            segments: [u32::MAX; 2],
            codes: Cow::Borrowed(dense.bytes.as_slice()),
            scales: Cow::Borrowed(&[]),
            aux: Cow::Borrowed(&[]),
            tables: Vec::new(),
        }
    }

    fn of_packed(packed: &'a Packed) -> Result<Parts<'a>, SchemeError> {
        let block_size = packed.spec.block_size.map_or(NO_BLOCKS, |size| size as u32);
        let mut parts = Parts {
            kind: Kind::Codebook4,
            format: Format { block_size, nested: packed.nested.is_some() },
            n_rows: packed.n_rows,
            n_cols: packed.n_cols,
            segments: [u32::MAX; 2],
            codes: Cow::Borrowed(&packed.codes),
            scales: Cow::Borrowed(&packed.scales),
            aux: Cow::Borrowed(&[]),
            tables: Vec::new(),
        };
        match packed.spec.scheme.as_str() {
            name @ ("nf4" | "fp4") => {
                parts.tables = if name == "nf4" { nf4::TABLE } else { fp4::TABLE }.to_vec();
                if let Some(nested) = &packed.nested {
                    parts.scales = Cow::Borrowed(&nested.absmax);
                    parts.aux = Cow::Borrowed(&nested.codes);
                    parts.tables.extend_from_slice(dynamic_map());
                    parts.tables.extend([nested.offset; 3]);
                }
            }
            // Groups of rows are blocks of the flattened matrix where rows hold whole groups; scales are powers of two in f32.
            "mxfp4" if packed.n_cols.is_multiple_of(block_size as usize) => parts.tables = mxfp4::TABLE.to_vec(),
            "int8" => parts.kind = Kind::Int8,
            "int4" => {
                parts.kind = Kind::Affine4;
                let stats = packed.scales.iter().zip(&packed.zeros).flat_map(|(scale, zero)| {
                    let word = u32::from(half::f16::from_f32(*scale).to_bits()) | u32::from(*zero) << 16;
                    word.to_le_bytes()
                });
                parts.aux = stats.collect();
                parts.scales = Cow::Borrowed(&[]);
            }
            other => return Err(SchemeError::Unknown(other.to_owned())),
        }
        Ok(parts)
    }

    /// Puts matrices on top of each other where blocks, words and second-level blocks all end with each one's rows.
    fn stack(parts: Vec<Parts<'a>>) -> Option<Parts<'a>> {
        let first = parts.first()?;
        let alike = |part: &Parts<'_>| {
            part.kind == first.kind
                && part.format == first.format
                && part.n_cols == first.n_cols
                && part.tables.get(..16) == first.tables.get(..16)
        };
        let block = first.format.block_size as usize;
        let ends_whole = |part: &Parts<'_>| {
            let blocks_end = !matches!(part.kind, Kind::Codebook4)
                || ((part.n_rows * part.n_cols).is_multiple_of(block)
                    && (!part.format.nested || (part.n_rows * part.n_cols / block).is_multiple_of(256)));
            blocks_end && part.codes.len().is_multiple_of(4)
        };
        if parts.len() > 3 || !parts.iter().all(alike) || !parts[..parts.len() - 1].iter().all(ends_whole) {
            return None;
        }
        let mut starts = parts.iter().scan(0u32, |row, part| {
            let start = *row;
            *row += part.n_rows as u32;
            Some(start)
        });
        starts.next();
        let segments = std::array::from_fn(|_| starts.next().unwrap_or(u32::MAX));
        let mut tables = first.tables.clone();
        if first.format.nested {
            for (slot, part) in parts.iter().enumerate() {
                tables[OFFSETS as usize + slot] = part.tables[OFFSETS as usize];
            }
        }
        Some(Parts {
            kind: first.kind,
            format: first.format,
            n_rows: parts.iter().map(|part| part.n_rows).sum(),
            n_cols: first.n_cols,
            segments,
            codes: Cow::Owned(parts.iter().map(|part| part.codes.as_ref()).collect::<Vec<_>>().concat()),
            scales: Cow::Owned(parts.iter().map(|part| part.scales.as_ref()).collect::<Vec<_>>().concat()),
            aux: Cow::Owned(parts.iter().map(|part| part.aux.as_ref()).collect::<Vec<_>>().concat()),
            tables,
        })
    }

    fn upload(self, client: &Client) -> DeviceMatrix {
        let (codes, n_codes) = upload_words(client, &self.codes);
        let (scales, n_scales) = upload_words(client, bytemuck::cast_slice(&self.scales));
        let (aux, n_aux) = upload_words(client, &self.aux);
        let (tables, n_tables) = upload_words(client, bytemuck::cast_slice(&self.tables));
        DeviceMatrix {
            kind: self.kind,
            format: self.format,
            n_rows: self.n_rows,
            n_cols: self.n_cols,
            codes,
            scales,
            aux,
            tables,
            segments: self.segments,
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
