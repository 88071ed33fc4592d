//! Metadata values: numbers as they are, texts and arrays as places in the file.

use super::cursor::Cursor;
use std::ops::Range;

/// The longest text accepted as one value: chat templates are some kilobytes.
const MAX_TEXT_BYTES: u64 = 1 << 24;
/// The longest array accepted: vocabularies have some hundred thousand entries.
const MAX_ITEMS: u64 = 1 << 24;

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum MetaValue {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    /// Where the text lies; it is UTF-8.
    Text(Range<usize>),
    Array(MetaArray),
}

/// An array: its items are read when they are asked for.
#[derive(Debug, Clone, PartialEq)]
pub struct MetaArray {
    pub(super) item_type: u32,
    pub n_items: usize,
    pub(super) range: Range<usize>,
}

/// Returns the size in bytes of a value of a fixed-size type.
fn fixed_size(value_type: u32) -> Option<u64> {
    match value_type {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Reads one value and leaves the cursor behind it.
///
/// # Errors
/// A phrase, where it is cut off, too long or of an unknown type.
pub fn read_value(cursor: &mut Cursor<'_>, bytes: &[u8]) -> Result<MetaValue, String> {
    match cursor.u32("the value's type")? {
        TEXT => Ok(MetaValue::Text(cursor.text(MAX_TEXT_BYTES, "the text")?.0)),
        ARRAY => Ok(MetaValue::Array(read_array(cursor)?)),
        value_type => {
            let n = fixed_size(value_type).ok_or_else(|| format!("its type {value_type} is not known"))?;
            let range = cursor.skip(n, "the value")?;
            scalar(value_type, &bytes[range])
        }
    }
}

fn read_array(cursor: &mut Cursor<'_>) -> Result<MetaArray, String> {
    let item_type = cursor.u32("the items' type")?;
    let n = cursor.u64("the number of items")?;
    // A text takes at least the eight bytes of its length.
    let at_least = fixed_size(item_type).unwrap_or(8);
    if n > MAX_ITEMS || n.checked_mul(at_least).is_none_or(|n_bytes| n_bytes > cursor.n_left() as u64) {
        return Err(format!("it claims {n} items, more than the file has room for"));
    }
    let start = cursor.position();
    match (item_type, fixed_size(item_type)) {
        (_, Some(size)) => {
            cursor.skip(n * size, "the items")?;
        }
        (TEXT, _) => {
            for _ in 0..n {
                cursor.skip_text("a text of the array")?;
            }
        }
        (ARRAY, _) => return Err("it is an array of arrays, which no model needs".to_owned()),
        _ => return Err(format!("the type {item_type} of its items is not known")),
    }
    let n_items = usize::try_from(n).map_err(|_| "it is too long for this machine".to_owned())?;
    Ok(MetaArray { item_type, n_items, range: start..cursor.position() })
}

fn scalar(value_type: u32, raw: &[u8]) -> Result<MetaValue, String> {
    let mut wide = [0u8; 8];
    wide[..raw.len()].copy_from_slice(raw);
    let (bits, n_unused) = (u64::from_le_bytes(wide), 64 - 8 * raw.len() as u32);
    Ok(match value_type {
        0 | 2 | 4 | 10 => MetaValue::Unsigned(bits),
        1 | 3 | 5 | 11 => MetaValue::Signed((bits << n_unused) as i64 >> n_unused),
        6 => MetaValue::Float(f64::from(f32::from_bits(bits as u32))),
        12 => MetaValue::Float(f64::from_bits(bits)),
        _ if bits <= 1 => MetaValue::Bool(bits == 1),
        _ => return Err(format!("a truth value is 0 or 1, not {bits}")),
    })
}

impl MetaArray {
    /// Returns the numbers of an array of numbers or truth values; nothing for other arrays.
    pub(super) fn numbers(&self, bytes: &[u8]) -> Option<Vec<MetaValue>> {
        let size = usize::try_from(fixed_size(self.item_type)?).ok()?;
        bytes[self.range.clone()].chunks_exact(size).map(|raw| scalar(self.item_type, raw).ok()).collect()
    }

    /// Returns the texts of an array of texts; nothing for other arrays or where one is not UTF-8.
    pub(super) fn texts<'a>(&self, bytes: &'a [u8]) -> Option<Vec<&'a str>> {
        if self.item_type != TEXT {
            return None;
        }
        let mut cursor = Cursor::new(bytes, self.range.start);
        (0..self.n_items).map(|_| cursor.text(MAX_TEXT_BYTES, "a text").ok().map(|(_, text)| text)).collect()
    }
}

impl MetaValue {
    /// Returns a whole number that is not negative.
    pub fn as_u64(&self) -> Option<u64> {
        match self {
            MetaValue::Unsigned(value) => Some(*value),
            MetaValue::Signed(value) => u64::try_from(*value).ok(),
            _ => None,
        }
    }

    /// Returns any number.
    pub fn as_f64(&self) -> Option<f64> {
        match self {
            MetaValue::Unsigned(value) => Some(*value as f64),
            MetaValue::Signed(value) => Some(*value as f64),
            MetaValue::Float(value) => Some(*value),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_signed_numbers_keep_their_sign() {
        assert_eq!(scalar(1, &[0xff]), Ok(MetaValue::Signed(-1)));
        assert_eq!(scalar(3, &[0xfe, 0xff]), Ok(MetaValue::Signed(-2)));
        assert_eq!(scalar(11, &(-3i64).to_le_bytes()), Ok(MetaValue::Signed(-3)));
        assert_eq!(scalar(4, &[1, 2, 0, 0]), Ok(MetaValue::Unsigned(513)));
        assert!(scalar(7, &[2]).is_err());
    }
}
