//! Reads little-endian numbers and length-prefixed texts from bytes that may end or lie at any point.

use std::ops::Range;

/// A position in a file's bytes. Its errors are phrases without the file's name.
pub struct Cursor<'a> {
    bytes: &'a [u8],
    position: usize,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8], position: usize) -> Cursor<'a> {
        Cursor { bytes, position }
    }

    pub fn position(&self) -> usize {
        self.position
    }

    /// Returns how many bytes follow.
    pub fn n_left(&self) -> usize {
        self.bytes.len().saturating_sub(self.position)
    }

    /// Steps over `n` bytes and returns where they lie.
    ///
    /// # Errors
    /// A phrase, where fewer follow.
    pub fn skip(&mut self, n: u64, what: &str) -> Result<Range<usize>, String> {
        let n_bytes = usize::try_from(n).ok().filter(|n| *n <= self.n_left()).ok_or_else(|| {
            format!("{what} takes {n} bytes at byte {}, but the file ends after {}", self.position, self.bytes.len())
        })?;
        let range = self.position..self.position + n_bytes;
        self.position = range.end;
        Ok(range)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N], String> {
        let range = self.skip(N as u64, what)?;
        let mut raw = [0u8; N];
        raw.copy_from_slice(&self.bytes[range]);
        Ok(raw)
    }

    pub fn u32(&mut self, what: &str) -> Result<u32, String> {
        Ok(u32::from_le_bytes(self.array(what)?))
    }

    pub fn u64(&mut self, what: &str) -> Result<u64, String> {
        Ok(u64::from_le_bytes(self.array(what)?))
    }

    /// Reads where a text of at most `max` bytes lies.
    ///
    /// # Errors
    /// A phrase, where it is longer, cut off or no UTF-8.
    pub fn text(&mut self, max: u64, what: &str) -> Result<(Range<usize>, &'a str), String> {
        let n = self.u64(what)?;
        if n > max {
            return Err(format!("{what} claims {n} bytes; at most {max} are accepted"));
        }
        let range = self.skip(n, what)?;
        let text = std::str::from_utf8(&self.bytes[range.clone()]).map_err(|_| format!("{what} is not UTF-8"))?;
        Ok((range, text))
    }

    /// Steps over a text without looking at it.
    ///
    /// # Errors
    /// A phrase, where it is cut off.
    pub fn skip_text(&mut self, what: &str) -> Result<(), String> {
        let n = self.u64(what)?;
        self.skip(n, what).map(|_| ())
    }
}
