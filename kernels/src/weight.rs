//! A linear layer's weight as it is stored: plain floats (often straight from a memory-mapped file) or packed codes.

use crate::dense::DenseType;
use crate::{Packed, dense, schemes};
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

/// Bytes that somebody else may own: a memory map, a vector.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
}

impl SharedBytes {
    /// Takes `range` of what `owner` holds; the whole of it where the range reaches past its end.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> SharedBytes {
        let n_bytes = (*owner).as_ref().len();
        let range = range.start.min(n_bytes)..range.end.min(n_bytes);
        SharedBytes { owner, range }
    }

    /// Takes a vector of values as bytes.
    pub fn from_values<T: bytemuck::NoUninit + Send + Sync>(values: Vec<T>) -> SharedBytes {
        struct Values<T>(Vec<T>);
        impl<T: bytemuck::NoUninit> AsRef<[u8]> for Values<T> {
            fn as_ref(&self) -> &[u8] {
                bytemuck::cast_slice(&self.0)
            }
        }
        let n_bytes = std::mem::size_of_val(values.as_slice());
        SharedBytes { owner: Arc::new(Values(values)), range: 0..n_bytes }
    }

    /// Returns a part of these bytes, of the same owner; less where `range` reaches past their end.
    pub fn slice(&self, range: Range<usize>) -> SharedBytes {
        let (start, end) = (self.range.start.saturating_add(range.start), self.range.start.saturating_add(range.end));
        SharedBytes { owner: Arc::clone(&self.owner), range: start.min(self.range.end)..end.min(self.range.end) }
    }

    pub fn as_slice(&self) -> &[u8] {
        &(*self.owner).as_ref()[self.range.clone()]
    }
}

impl fmt::Debug for SharedBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SharedBytes({} bytes)", self.range.len())
    }
}

/// A matrix of plain floats, row-major `[n_rows, n_cols]`.
#[derive(Debug, Clone)]
pub struct DenseWeight {
    pub dtype: DenseType,
    pub n_rows: usize,
    pub n_cols: usize,
    /// Aligned for its element type, `n_rows · n_cols` elements.
    pub bytes: SharedBytes,
}

/// A weight in its stored form.
#[derive(Debug, Clone)]
pub enum HostWeight {
    Dense(DenseWeight),
    Packed(Packed),
}

impl HostWeight {
    /// Number of output features.
    pub fn n_rows(&self) -> usize {
        match self {
            HostWeight::Dense(dense) => dense.n_rows,
            HostWeight::Packed(packed) => packed.n_rows,
        }
    }

    /// Number of input features.
    pub fn n_cols(&self) -> usize {
        match self {
            HostWeight::Dense(dense) => dense.n_cols,
            HostWeight::Packed(packed) => packed.n_cols,
        }
    }

    /// Bytes stored: elements, or codes and their statistics.
    pub fn stored_bytes(&self) -> u64 {
        match self {
            HostWeight::Dense(dense) => dense.bytes.as_slice().len() as u64,
            HostWeight::Packed(packed) => packed_scheme(packed).stored_bytes(packed),
        }
    }

    /// Returns all values where they are stored as f32.
    pub fn as_f32(&self) -> Option<&[f32]> {
        match self {
            HostWeight::Dense(dense) if dense.dtype == DenseType::F32 => {
                Some(bytemuck::cast_slice(dense.bytes.as_slice()))
            }
            _ => None,
        }
    }

    /// Writes rows from `first_row` on as f32 into `out` (`[n, n_cols]`).
    pub fn unpack_rows(&self, first_row: usize, out: &mut [f32]) {
        match self {
            HostWeight::Dense(weight) => {
                dense::unpack_rows(weight.dtype, weight.bytes.as_slice(), weight.n_cols, first_row, out);
            }
            HostWeight::Packed(packed) => packed_scheme(packed).unpack_rows(packed, first_row, out),
        }
    }

    /// Returns true where [`product`](Self::product) computes, and [`matvec_rows`](Self::matvec_rows) is not what a linear does.
    pub fn has_own_product(&self) -> bool {
        match self {
            HostWeight::Dense(_) => false,
            HostWeight::Packed(packed) => packed_scheme(packed).has_own_product(packed),
        }
    }

    /// Writes `x · Wᵀ` where the weight's scheme has a product of its own (see [`schemes::Scheme::product`]); false where it has
    /// none.
    pub fn product(&self, x: &[f32], m: usize, out: &mut [f32]) -> bool {
        match self {
            HostWeight::Dense(_) => false,
            HostWeight::Packed(packed) => packed_scheme(packed).product(packed, x, m, out),
        }
    }

    /// Writes `y[i] = Σ_k w[first_row + i, k]·x[k]`, accumulated in fp32.
    pub fn matvec_rows(&self, first_row: usize, x: &[f32], y: &mut [f32]) {
        match self {
            HostWeight::Dense(weight) => {
                dense::matvec_rows(weight.dtype, weight.bytes.as_slice(), weight.n_cols, first_row, x, y);
            }
            HostWeight::Packed(packed) => packed_scheme(packed).matvec_rows(packed, first_row, x, y),
        }
    }
}

fn packed_scheme(packed: &Packed) -> &'static dyn schemes::Scheme {
    match schemes::scheme(&packed.spec.scheme) {
        Ok(scheme) => scheme,
        Err(_) => unreachable!("a packed matrix was made by a registered scheme"),
    }
}
