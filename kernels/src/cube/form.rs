//! What a matrix made on the device is stored as, and how large its buffers are.

use super::Element;
use super::decode::Format;
use super::matrix::{Kind, NO_BLOCKS};
use super::quantize::{Book, Reading};
use crate::schemes::codebook::NESTED_BLOCK;
use crate::weight::SharedBytes;
use crate::{SchemeError, SchemeSpec, scheme};

/// Bytes of a file that are on the device at a time, besides what they become.
const TILE_BYTES: usize = 32 << 20;

/// How a matrix is kept on the device, for those that are made there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Plain(Element),
    Codebook { book: Book, block_size: usize, nested: bool },
    Int8,
    Int4 { group: usize, symmetric: bool },
}

/// A matrix, or one of several that are stored as one, as a file holds it.
#[derive(Debug, Clone)]
pub struct FileMatrix {
    pub n_rows: usize,
    /// Row-major, little-endian, of any alignment.
    pub bytes: SharedBytes,
    pub reading: Reading,
}

/// Elements of the buffers of a form: bytes of codes, scales, bytes of second words.
pub(super) struct Sizes {
    pub code_bytes: usize,
    pub scales: usize,
    pub aux_bytes: usize,
}

impl Form {
    /// Returns the form of a scheme, or of plain values in `base`; nothing where only the host makes it.
    ///
    /// # Errors
    /// Where the scheme is not known or its settings do not fit.
    pub fn of(spec: Option<&SchemeSpec>, base: Element) -> Result<Option<Form>, SchemeError> {
        let Some(spec) = spec else { return Ok(Some(Form::Plain(base))) };
        let spec = scheme(&spec.scheme)?.normalize(spec)?;
        let codebook =
            |book| Form::Codebook { book, block_size: spec.block_size.unwrap_or(64), nested: spec.double_quant };
        Ok(match spec.scheme.as_str() {
            "nf4" => Some(codebook(Book::Nf4)),
            "fp4" => Some(codebook(Book::Fp4)),
            "int8" if spec.outlier_threshold.is_none() => Some(Form::Int8),
            "int4" => Some(Form::Int4 { group: spec.block_size.unwrap_or(128), symmetric: spec.symmetric }),
            _ => None,
        })
    }

    /// Returns true where matrices of these heights can be stored as one: blocks, words and second-level blocks end with each one's
    /// rows.
    pub fn stacks(self, n_rows: &[usize], n_cols: usize) -> bool {
        let ends_whole = |rows: &usize| {
            let blocks_end = match self {
                Form::Codebook { block_size, nested, .. } => {
                    let n_values = rows * n_cols;
                    n_values.is_multiple_of(block_size)
                        && (!nested || (n_values / block_size).is_multiple_of(NESTED_BLOCK))
                }
                _ => true,
            };
            blocks_end && self.sizes(*rows, n_cols).code_bytes.is_multiple_of(4)
        };
        n_rows.len() <= 3 && n_rows.split_last().is_some_and(|(_, others)| others.iter().all(ends_whole))
    }

    pub(super) fn sizes(self, n_rows: usize, n_cols: usize) -> Sizes {
        let n = n_rows * n_cols;
        match self {
            Form::Plain(element) => Sizes { code_bytes: n * element.size_bytes(), scales: 0, aux_bytes: 0 },
            Form::Codebook { block_size, nested, .. } => {
                let blocks = n.div_ceil(block_size);
                let (scales, aux_bytes) = if nested { (blocks.div_ceil(NESTED_BLOCK), blocks) } else { (blocks, 0) };
                Sizes { code_bytes: n.div_ceil(2), scales, aux_bytes }
            }
            Form::Int8 => Sizes { code_bytes: n, scales: n_rows, aux_bytes: 0 },
            Form::Int4 { group, .. } => Sizes {
                code_bytes: n_rows * n_cols.div_ceil(2),
                scales: 0,
                aux_bytes: 4 * n_rows * n_cols.div_ceil(group),
            },
        }
    }

    /// Returns the bytes that a packed matrix takes as its scheme counts them; those of plain values.
    pub fn stored_bytes(self, n_rows: usize, n_cols: usize) -> u64 {
        let Sizes { code_bytes, scales, aux_bytes } = self.sizes(n_rows, n_cols);
        let statistics = match self {
            Form::Codebook { nested, .. } => 4 * (scales + usize::from(nested)) + aux_bytes,
            // An fp16 scale a group, and four bits of a zero point where it has one.
            Form::Int4 { symmetric, .. } => aux_bytes / 2 + if symmetric { 0 } else { (aux_bytes / 4).div_ceil(2) },
            Form::Plain(_) | Form::Int8 => 4 * scales,
        };
        (code_bytes + statistics) as u64
    }

    /// Returns the bytes that a matrix takes on the device while it is made: block scales that become second-level ones are there too.
    pub(super) fn made_bytes(self, n_rows: usize, n_cols: usize) -> u64 {
        let Sizes { code_bytes, scales, aux_bytes } = self.sizes(n_rows, n_cols);
        let unsettled = if let Form::Codebook { nested: true, .. } = self { 4 * aux_bytes } else { 0 };
        (code_bytes + 4 * scales + aux_bytes + unsettled) as u64
    }

    pub(super) fn kind(self) -> Kind {
        match self {
            Form::Plain(Element::F32) => Kind::F32,
            Form::Plain(Element::F16) => Kind::F16,
            Form::Plain(Element::Bf16) => Kind::Bf16,
            Form::Codebook { .. } => Kind::Codebook4,
            Form::Int8 => Kind::Int8,
            Form::Int4 { .. } => Kind::Affine4,
        }
    }

    pub(super) fn format(self) -> Format {
        match self {
            Form::Codebook { block_size, nested, .. } => Format { block_size: block_size as u32, nested },
            Form::Int4 { group, .. } => Format { block_size: group as u32, nested: false },
            Form::Plain(_) | Form::Int8 => Format { block_size: NO_BLOCKS, nested: false },
        }
    }

    /// Values of a tile: whole blocks, or whole rows where statistics are a row's, and whole words of codes.
    pub(super) fn tile_values(self, reading: Reading, n_cols: usize) -> usize {
        let n = TILE_BYTES / reading.source.size_bytes();
        match self {
            Form::Plain(_) | Form::Codebook { .. } => n,
            Form::Int8 | Form::Int4 { .. } => (n / n_cols / 8 * 8).max(8) * n_cols,
        }
    }
}
