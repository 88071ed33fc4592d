//! A GGUF file, memory-mapped and checked.

use super::cursor::Cursor;
use super::error::GgufError;
use super::metadata::{MetaValue, read_value};
use super::types::GgmlType;
use labpipe_kernels::weight::SharedBytes;
use memmap2::Mmap;
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fs::File;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const MAGIC: &[u8] = b"GGUF";
const ALIGNMENT: u64 = 32;
/// What llama.cpp allows is 64; some converters wrote longer ones.
const MAX_NAME_BYTES: u64 = 1024;
const MAX_KEY_BYTES: u64 = 1 << 16;
const MAX_PAIRS: u64 = 1 << 16;
const MAX_TENSORS: u64 = 1 << 18;
const MAX_DIMS: u32 = 4;
/// The least that a metadata pair (length, type, one byte) and a tensor's description (length, dimensions, one of them, type,
/// offset) take.
const PAIR_BYTES: u64 = 13;
const TENSOR_BYTES: u64 = 32;

/// A tensor as the file stores it.
#[derive(Debug, Clone)]
pub struct GgufTensor {
    pub ty: &'static GgmlType,
    /// Outermost dimension first (a file has them the other way round).
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    range: Range<usize>,
}

impl GgufTensor {
    /// Returns how many values it holds.
    pub fn n_values(&self) -> usize {
        self.shape.iter().product()
    }

    /// Returns the bytes that it takes in the file, padding not counted.
    pub fn n_bytes(&self) -> usize {
        self.range.len()
    }
}

/// A file's metadata and tensors; their bytes stay in the memory map.
#[derive(Debug)]
pub struct GgufFile {
    path: PathBuf,
    file: Arc<File>,
    map: Arc<Mmap>,
    metadata: BTreeMap<String, MetaValue>,
    tensors: BTreeMap<String, GgufTensor>,
}

impl GgufFile {
    /// Maps a file and checks its header, its metadata and the place of every tensor against its length.
    ///
    /// # Errors
    /// `File`, `Metadata` or `Tensor`, naming what is wrong.
    pub fn open(path: &Path) -> Result<GgufFile, GgufError> {
        let fail = |reason: String| GgufError::File { path: path.to_owned(), reason };
        let file = File::open(path).map_err(|error| fail(error.to_string()))?;
        if file.metadata().map_err(|error| fail(error.to_string()))?.len() == 0 {
            return Err(fail("the file is empty; was the download cut short?".to_owned()));
        }
        // SAFETY: labpipe never writes model files; a file cut short by somebody else while it is mapped raises SIGBUS, as
        // with every program that maps models.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| fail(error.to_string()))?;
        let mut file = GgufFile {
            path: path.to_owned(),
            file: Arc::new(file),
            map: Arc::new(map),
            metadata: BTreeMap::new(),
            tensors: BTreeMap::new(),
        };
        let map = Arc::clone(&file.map);
        file.read_header(&map)?;
        Ok(file)
    }

    fn fail(&self, reason: impl Into<String>) -> GgufError {
        GgufError::File { path: self.path.clone(), reason: reason.into() }
    }

    fn tensor_error(&self, tensor: &str, reason: impl Into<String>) -> GgufError {
        GgufError::Tensor { path: self.path.clone(), tensor: tensor.to_owned(), reason: reason.into() }
    }

    /// Returns an error that names a metadata key of this file.
    pub fn metadata_error(&self, key: &str, reason: impl Into<String>) -> GgufError {
        GgufError::Metadata { path: self.path.clone(), key: key.to_owned(), reason: reason.into() }
    }

    fn read_header(&mut self, bytes: &[u8]) -> Result<(), GgufError> {
        if !bytes.starts_with(MAGIC) {
            return Err(self.fail("it does not begin with GGUF; it is no GGUF file"));
        }
        let mut cursor = Cursor::new(bytes, MAGIC.len());
        let cut = |file: &GgufFile, reason: String| file.fail(format!("{reason}; was the download cut short?"));
        let version = cursor.u32("the version").map_err(|reason| cut(self, reason))?;
        match version {
            2 | 3 => {}
            1 => return Err(self.fail("GGUF version 1 is not read; convert it anew with a current converter")),
            swapped if matches!(swapped.swap_bytes(), 1..=3) => {
                return Err(self.fail("it is a big-endian file, which is not read; convert it to little-endian"));
            }
            other => return Err(self.fail(format!("GGUF version {other} is not known (2 and 3 are)"))),
        }
        let n_tensors = cursor.u64("the number of tensors").map_err(|reason| cut(self, reason))?;
        let n_pairs = cursor.u64("the number of metadata pairs").map_err(|reason| cut(self, reason))?;
        let n_left = cursor.n_left() as u64;
        for (what, n, max, least) in
            [("metadata pairs", n_pairs, MAX_PAIRS, PAIR_BYTES), ("tensors", n_tensors, MAX_TENSORS, TENSOR_BYTES)]
        {
            if n.saturating_mul(least) > n_left {
                return Err(self.fail(format!("its header claims {n} {what}, more than the file has room for")));
            }
            if n > max {
                return Err(self.fail(format!("it has {n} {what}, more than the {max} that labpipe reads")));
            }
        }
        for _ in 0..n_pairs {
            self.read_pair(&mut cursor, bytes)?;
        }
        let mut found = Vec::new();
        for _ in 0..n_tensors {
            found.push(self.read_tensor(&mut cursor)?);
        }
        self.place(found, cursor.position(), bytes.len())
    }

    fn read_pair(&mut self, cursor: &mut Cursor<'_>, bytes: &[u8]) -> Result<(), GgufError> {
        let (_, key) = cursor.text(MAX_KEY_BYTES, "a metadata key").map_err(|reason| self.fail(reason))?;
        let value = read_value(cursor, bytes).map_err(|reason| self.metadata_error(key, reason))?;
        match self.metadata.insert(key.to_owned(), value) {
            None => Ok(()),
            Some(_) => Err(self.metadata_error(key, "it is there twice")),
        }
    }

    /// Reads a tensor's description: its range is still relative to the data.
    fn read_tensor(&self, cursor: &mut Cursor<'_>) -> Result<(String, GgufTensor), GgufError> {
        let (_, name) = cursor.text(MAX_NAME_BYTES, "a tensor's name").map_err(|reason| self.fail(reason))?;
        let fail = |reason: String| self.tensor_error(name, reason);
        if name.is_empty() || name.contains("..") || name.contains(['/', '\\']) || name.contains(char::is_control) {
            return Err(fail("no tensor has such a name; the file is damaged".to_owned()));
        }
        let n_dims = cursor.u32("the number of dimensions").map_err(fail)?;
        if !(1..=MAX_DIMS).contains(&n_dims) {
            return Err(fail(format!("it claims {n_dims} dimensions; 1 to {MAX_DIMS} are possible")));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dims {
            let n = cursor.u64("a dimension").map_err(fail)?;
            let n = usize::try_from(n).ok().filter(|n| *n > 0);
            shape.push(n.ok_or_else(|| fail("a dimension is zero or absurd".to_owned()))?);
        }
        let id = cursor.u32("the element type").map_err(fail)?;
        let ty = GgmlType::of(id).ok_or_else(|| fail(format!("its element type {id} is not known")))?;
        let offset = cursor.u64("the offset").map_err(fail)?;
        if !shape[0].is_multiple_of(ty.block_len) {
            return Err(fail(format!("its rows of {} values are no whole blocks of {}", shape[0], ty.block_len)));
        }
        let n_values = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let n_bytes = n_values.and_then(|n| ty.n_bytes(n));
        let start = usize::try_from(offset).ok();
        let end = start.zip(n_bytes).and_then(|(start, n)| start.checked_add(n));
        let (Some(start), Some(end)) = (start, end) else {
            return Err(fail(format!("its shape {shape:?} at offset {offset} is absurd")));
        };
        shape.reverse();
        Ok((name.to_owned(), GgufTensor { ty, shape, range: start..end }))
    }

    /// Puts tensors at their place in the file, where none may reach past its end or into another.
    fn place(&mut self, found: Vec<(String, GgufTensor)>, header_end: usize, file_len: usize) -> Result<(), GgufError> {
        const KEY: &str = "general.alignment";
        let alignment = self.metadata.get(KEY).map_or(Some(ALIGNMENT), MetaValue::as_u64);
        let alignment = alignment
            .and_then(|alignment| usize::try_from(alignment).ok())
            .filter(|alignment| alignment.is_power_of_two() && *alignment <= 1 << 20)
            .ok_or_else(|| self.metadata_error(KEY, "it is no power of two up to 1 MiB"))?;
        let data_start = header_end.next_multiple_of(alignment);
        let mut places: Vec<(Range<usize>, String)> = Vec::new();
        for (name, mut tensor) in found {
            let range = tensor.range.clone();
            if !range.start.is_multiple_of(alignment) {
                let reason = format!("its offset {} is no multiple of {alignment}", range.start);
                return Err(self.tensor_error(&name, reason));
            }
            let end = range.end.checked_add(data_start).filter(|end| *end <= file_len).ok_or_else(|| {
                let n = range.end as u128 + data_start as u128;
                let reason = format!("it ends at byte {n} of a file of {file_len} bytes; was the download cut short?");
                self.tensor_error(&name, reason)
            })?;
            tensor.range = data_start + range.start..end;
            places.push((tensor.range.clone(), name.clone()));
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(self.tensor_error(&name, "it is there twice"));
            }
        }
        places.sort_by_key(|(range, _)| range.start);
        match places.windows(2).find(|pair| pair[1].0.start < pair[0].0.end) {
            None => Ok(()),
            Some(pair) => Err(self.tensor_error(&pair[1].1, format!("it overlaps {}", pair[0].1))),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn tensor(&self, name: &str) -> Option<&GgufTensor> {
        self.tensors.get(name)
    }

    /// Returns every tensor by name.
    pub fn tensors(&self) -> impl Iterator<Item = (&str, &GgufTensor)> {
        self.tensors.iter().map(|(name, tensor)| (name.as_str(), tensor))
    }

    /// Returns every metadata key, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.metadata.keys().map(String::as_str)
    }

    pub fn get(&self, key: &str) -> Option<&MetaValue> {
        self.metadata.get(key)
    }

    /// Returns a text of the metadata; nothing where there is none under that key.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.get(key)? {
            MetaValue::Text(range) => std::str::from_utf8(&self.map[range.clone()]).ok(),
            _ => None,
        }
    }

    /// Returns an array of texts; nothing where there is none under that key.
    ///
    /// # Errors
    /// `Metadata` where it is something else or a text in it is not UTF-8.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<&str>>, GgufError> {
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Array(array)) => array
                .texts(&self.map)
                .map(Some)
                .ok_or_else(|| self.metadata_error(key, "expected an array of UTF-8 texts")),
            Some(_) => Err(self.metadata_error(key, "expected an array of texts")),
        }
    }

    /// Returns an array of numbers; nothing where there is none under that key.
    ///
    /// # Errors
    /// `Metadata` where it is something else.
    pub fn numbers(&self, key: &str) -> Result<Option<Vec<MetaValue>>, GgufError> {
        let wrong = || self.metadata_error(key, "expected an array of numbers");
        match self.get(key) {
            None => Ok(None),
            Some(MetaValue::Array(array)) => array.numbers(&self.map).map(Some).ok_or_else(wrong),
            Some(_) => Err(wrong()),
        }
    }

    /// Returns a tensor's bytes as they lie in the file.
    pub fn bytes(&self, tensor: &GgufTensor) -> SharedBytes {
        let owner: Arc<Mmap> = Arc::clone(&self.map);
        SharedBytes::mapped(owner, Arc::clone(&self.file), tensor.range.clone())
    }

    /// Gives back the resident pages of the file's map; they are read again when next used.
    pub fn drop_pages(&self) {
        #[cfg(unix)]
        // SAFETY: the map is read-only and backed by its file: a dropped page is read from the file again when next used.
        let _ = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
    }

    /// Returns the first value of a tensor of blocks that is NaN or infinite, with its index; it keeps one row a thread. Nothing for
    /// tensors of other types.
    pub fn first_not_finite(&self, tensor: &GgufTensor) -> Option<(usize, f32)> {
        let decode = tensor.ty.decode?;
        let n_cols = tensor.shape.last().copied().unwrap_or(1);
        let row_bytes = tensor.ty.n_bytes(n_cols)?;
        let rows = self.map[tensor.range.clone()].par_chunks_exact(row_bytes).enumerate();
        let found = rows.map_init(
            || vec![0.0f32; n_cols],
            |row, (row_idx, bytes)| {
                decode(bytes, row);
                let column = row.iter().position(|value| !value.is_finite())?;
                Some((row_idx * n_cols + column, row[column]))
            },
        );
        found.find_first(Option::is_some).flatten()
    }

    /// Returns a tensor's values, row-major. Row `i` of what is returned is row `row_of(i)` of the file; a row is the innermost
    /// dimension.
    ///
    /// # Errors
    /// `Tensor` where labpipe can't read its type.
    pub fn values(
        &self,
        name: &str,
        tensor: &GgufTensor,
        row_of: &(dyn Fn(usize) -> usize + Sync),
    ) -> Result<Vec<f32>, GgufError> {
        let Some(decode) = tensor.ty.decode else {
            let reason =
                format!("{} holds no blocks that labpipe reads ({})", tensor.ty.name, GgmlType::readable_names());
            return Err(self.tensor_error(name, reason));
        };
        let n_cols = tensor.shape.last().copied().unwrap_or(1);
        let bytes = &self.map[tensor.range.clone()];
        let row_bytes = bytes.len() / (tensor.shape.iter().product::<usize>() / n_cols);
        let mut values = vec![0.0f32; tensor.shape.iter().product()];
        values.par_chunks_mut(n_cols).enumerate().for_each(|(row_idx, row)| {
            decode(&bytes[row_of(row_idx) * row_bytes..][..row_bytes], row);
        });
        Ok(values)
    }
}
