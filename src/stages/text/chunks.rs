//! A text file in pieces of valid UTF-8, so that a large one is never in memory whole.

use crate::stage::StageError;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

/// Bytes that are read at once.
const CHUNK_BYTES: usize = 1 << 16;
/// Bytes that are looked at to tell UTF-16 without a byte order mark.
const SAMPLE_BYTES: usize = 4096;

/// Reads a file piece by piece.
pub struct TextChunks {
    path: PathBuf,
    file: File,
    /// Bytes of a character that the last piece cut.
    rest: Vec<u8>,
    /// Bytes handed over so far.
    n_bytes: u64,
    begins_with_bom: bool,
}

impl TextChunks {
    /// Opens a file.
    ///
    /// # Errors
    /// `Read`.
    pub fn open(path: &Path) -> Result<TextChunks, StageError> {
        let file =
            File::open(path).map_err(|error| StageError::Read { path: path.to_owned(), reason: error.to_string() })?;
        Ok(TextChunks { path: path.to_owned(), file, rest: Vec::new(), n_bytes: 0, begins_with_bom: false })
    }

    /// Returns true where the file begins with UTF-8's byte order mark; known once the first piece was read.
    pub fn begins_with_bom(&self) -> bool {
        self.begins_with_bom
    }

    /// Returns the next piece; none at the end.
    ///
    /// # Errors
    /// `Read`, naming the encoding where the file is not UTF-8.
    pub fn next(&mut self) -> Result<Option<String>, StageError> {
        loop {
            let mut bytes = std::mem::take(&mut self.rest);
            let n_before = bytes.len();
            let mut part = Read::by_ref(&mut self.file).take(CHUNK_BYTES as u64);
            part.read_to_end(&mut bytes).map_err(|error| self.fail(error.to_string()))?;
            let is_last = bytes.len() == n_before;
            if self.n_bytes == 0 && n_before == 0 {
                self.look_at_the_start(&bytes)?;
            }
            if bytes.is_empty() {
                return Ok(None);
            }
            let n_valid = match std::str::from_utf8(&bytes) {
                Ok(_) => bytes.len(),
                Err(error) if error.error_len().is_none() && !is_last => error.valid_up_to(),
                Err(error) => {
                    let at = self.n_bytes + error.valid_up_to() as u64;
                    return Err(self
                        .fail(format!("not UTF-8 text (the byte at {at} begins no character); convert it to UTF-8")));
                }
            };
            self.rest = bytes.split_off(n_valid);
            self.n_bytes += n_valid as u64;
            let text = String::from_utf8(bytes).map_err(|error| self.fail(format!("not UTF-8 text ({error})")))?;
            if !text.is_empty() {
                return Ok(Some(text));
            }
        }
    }

    fn look_at_the_start(&mut self, bytes: &[u8]) -> Result<(), StageError> {
        self.begins_with_bom = bytes.starts_with(b"\xef\xbb\xbf");
        match other_encoding(bytes) {
            None => Ok(()),
            Some(encoding) => Err(self.fail(format!(
                "it is {encoding} text, not UTF-8; convert it: iconv -f {} -t UTF-8 {} > NEW.txt",
                encoding.split(' ').next().unwrap_or(encoding),
                self.path.display()
            ))),
        }
    }

    fn fail(&self, reason: String) -> StageError {
        StageError::Read { path: self.path.clone(), reason }
    }
}

/// Returns the encoding that a file's start speaks for, where it is not UTF-8.
fn other_encoding(bytes: &[u8]) -> Option<&'static str> {
    match bytes {
        [0xff, 0xfe, 0, 0, ..] => return Some("UTF-32"),
        [0xff, 0xfe, ..] => return Some("UTF-16 (little-endian)"),
        [0xfe, 0xff, ..] => return Some("UTF-16 (big-endian)"),
        _ => {}
    }
    let sample = &bytes[..bytes.len().min(SAMPLE_BYTES)];
    let zeros = |first: usize| sample.iter().skip(first).step_by(2).filter(|byte| **byte == 0).count();
    let (even, odd, half) = (zeros(0), zeros(1), sample.len() / 2);
    // Latin letters in UTF-16 have one byte of zero each.
    let is_most = |n: usize, other: usize| half >= 4 && n * 10 >= half * 7 && other * 10 <= half;
    match () {
        () if is_most(odd, even) => Some("UTF-16LE without a byte order mark"),
        () if is_most(even, odd) => Some("UTF-16BE without a byte order mark"),
        () => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(bytes: &[u8]) -> Result<String, String> {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("t.txt");
        std::fs::write(&path, bytes).expect("a file");
        let mut chunks = TextChunks::open(&path).expect("a file");
        let mut text = String::new();
        while let Some(piece) = chunks.next().map_err(|error| error.to_string())? {
            text.push_str(&piece);
        }
        Ok(text)
    }

    #[test]
    fn characters_that_a_piece_cuts_stay_whole() {
        for shift in 0..4 {
            let text = "x".repeat(CHUNK_BYTES - shift) + &"grüße 你好 🌍 ".repeat(9000);
            assert_eq!(read(text.as_bytes()).expect("a text"), text);
        }
        assert_eq!(read(b"").expect("a text"), "");
        assert_eq!(read(b"a\0b").expect("a text"), "a\0b");
    }

    #[test]
    fn other_encodings_are_named() {
        let utf_16 = |mark: bool, text: &str| -> Vec<u8> {
            let units = mark.then_some(0xfeff).into_iter().chain(text.encode_utf16());
            units.flat_map(u16::to_le_bytes).collect()
        };
        let big: Vec<u8> = "Once upon a time".encode_utf16().flat_map(u16::to_be_bytes).collect();
        for (bytes, named) in [
            (utf_16(true, "Once upon"), "UTF-16 (little-endian)"),
            (utf_16(false, "Once upon a time"), "iconv -f UTF-16LE"),
            (big, "iconv -f UTF-16BE"),
            (b"gr\xfc\xdfe".to_vec(), "byte at 2"),
            (b"cut \xe4\xbd".to_vec(), "byte at 4"),
            ([vec![b'x'; CHUNK_BYTES], vec![0xff; 9]].concat(), "byte at 65536"),
        ] {
            let error = read(&bytes).expect_err("an error");
            assert!(error.contains(named), "{error}");
        }
    }
}
