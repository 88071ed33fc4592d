//! A linear layer's weight as it is stored: plain floats (often straight from a memory-mapped file) or packed codes.

use crate::dense::DenseType;
use crate::{Packed, dense, schemes};
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Pages are no smaller than this.
const PAGE_BYTES: usize = 4096;

/// Bytes that somebody else may own: a memory map, a vector.
#[derive(Clone)]
pub struct SharedBytes {
    owner: Arc<dyn AsRef<[u8]> + Send + Sync>,
    range: Range<usize>,
    /// The file that `owner` maps from its beginning on, where it does.
    file: Option<Arc<File>>,
}

impl SharedBytes {
    /// Takes `range` of what `owner` holds; the whole of it where the range reaches past its end.
    pub fn new(owner: Arc<dyn AsRef<[u8]> + Send + Sync>, range: Range<usize>) -> SharedBytes {
        let n_bytes = (*owner).as_ref().len();
        let range = range.start.min(n_bytes)..range.end.min(n_bytes);
        SharedBytes { owner, range, file: None }
    }

    /// Takes `range` of a memory map of the whole of `file`, as [`new`](Self::new) does; [`read_into`](Self::read_into) then leaves the
    /// map alone.
    pub fn mapped(map: Arc<dyn AsRef<[u8]> + Send + Sync>, file: Arc<File>, range: Range<usize>) -> SharedBytes {
        SharedBytes { file: Some(file), ..SharedBytes::new(map, range) }
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
        SharedBytes { owner: Arc::new(Values(values)), range: 0..n_bytes, file: None }
    }

    /// Returns a part of these bytes, of the same owner; less where `range` reaches past their end.
    pub fn slice(&self, range: Range<usize>) -> SharedBytes {
        let (start, end) = (self.range.start.saturating_add(range.start), self.range.start.saturating_add(range.end));
        let range = start.min(self.range.end)..end.min(self.range.end);
        SharedBytes { owner: Arc::clone(&self.owner), range, file: self.file.clone() }
    }

    /// Returns how many there are; reads none of them.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// Copies the bytes from `at` on into `out`. Those of a file are read from it, not through its memory map: mapping page after page
    /// costs the kernel as much as the copy, all threads of a process queue for it, and unmapping them costs it again.
    ///
    /// # Errors
    /// `UnexpectedEof` where `out` reaches past the end, or the file was cut short since it was mapped; its other failures to be read.
    pub fn read_into(&self, at: usize, out: &mut [u8]) -> io::Result<()> {
        let start = self.range.start.saturating_add(at);
        let end = start.saturating_add(out.len());
        if end > self.range.end {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        #[cfg(unix)]
        if let Some(file) = &self.file {
            return std::os::unix::fs::FileExt::read_exact_at(&**file, out, start as u64);
        }
        out.copy_from_slice(&(*self.owner).as_ref()[start..end]);
        Ok(())
    }

    /// Makes every page resident where they are mapped from a file: reads one byte of each.
    pub fn touch_pages(&self) {
        if self.file.is_some() {
            for byte in self.as_slice().iter().step_by(PAGE_BYTES) {
                std::hint::black_box(*byte);
            }
        }
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

    /// Makes its pages resident where it is mapped from a file.
    pub fn touch_pages(&self) {
        if let HostWeight::Dense(dense) = self {
            dense.bytes.touch_pages();
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

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn bytes_of_a_file_are_read_from_it_and_not_past_their_end() {
        let path = std::env::temp_dir().join(format!("labpipe-shared-bytes-{}", std::process::id()));
        std::fs::write(&path, b"0123456789").expect("a writable folder");
        let file = Arc::new(File::open(&path).expect("the file is there"));
        let bytes = SharedBytes::mapped(Arc::new(b"abcdefghij".to_vec()), Arc::clone(&file), 2..9).slice(1..5);
        assert_eq!((bytes.len(), bytes.as_slice()), (4, &b"defg"[..]));
        let mut out = [0; 3];
        bytes.read_into(1, &mut out).expect("bytes that are there");
        assert_eq!(&out, b"456");
        let past_end = bytes.read_into(2, &mut out).expect_err("one byte too many");
        assert_eq!(past_end.kind(), io::ErrorKind::UnexpectedEof);
        std::fs::OpenOptions::new().write(true).open(&path).and_then(|file| file.set_len(5)).expect("a cut");
        let cut = bytes.read_into(1, &mut out).expect_err("a file that ends early");
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        std::fs::remove_file(&path).expect("the file is there");
    }

    #[test]
    fn bytes_in_memory_are_copied() {
        let bytes = SharedBytes::from_values(vec![1u16, 2, 3]).slice(2..6);
        let mut out = [0; 4];
        bytes.read_into(0, &mut out).expect("bytes that are there");
        assert_eq!(out, [2, 0, 3, 0]);
        assert!(bytes.read_into(usize::MAX, &mut out).is_err());
    }
}
