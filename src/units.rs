//! Units as labpipe prints them, and the element types a model's weights are stored or multiplied in.

use serde::{Deserialize, Serialize};
use std::fmt;

/// Bytes in one GiB (2³⁰).
pub const GIB: f64 = (1u64 << 30) as f64;

/// An element type of weights or arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DType {
    F32,
    F16,
    Bf16,
}

impl DType {
    /// Every element type, in the order in which error messages name them.
    pub const ALL: [DType; 3] = [DType::F32, DType::F16, DType::Bf16];

    /// Returns the size of one element in bytes.
    pub fn size_bytes(self) -> usize {
        match self {
            DType::F32 => 4,
            DType::F16 | DType::Bf16 => 2,
        }
    }

    /// Returns the name used in pipeline files and records (`f32`, `f16`, `bf16`).
    pub fn name(self) -> &'static str {
        match self {
            DType::F32 => "f32",
            DType::F16 => "f16",
            DType::Bf16 => "bf16",
        }
    }

    /// Reads labpipe's names and PyTorch's (`float16`, `torch.bfloat16`, `half`).
    pub fn parse(text: &str) -> Option<DType> {
        let name = text.strip_prefix("torch.").unwrap_or(text).to_ascii_lowercase();
        match name.as_str() {
            "f32" | "fp32" | "float32" | "float" => Some(DType::F32),
            "f16" | "fp16" | "float16" | "half" => Some(DType::F16),
            "bf16" | "bfloat16" => Some(DType::Bf16),
            _ => None,
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Formats a byte count with a binary unit: `1.02 MiB`.
pub fn format_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit_idx = 0;
    while value >= 1024.0 && unit_idx + 1 < UNITS.len() {
        value /= 1024.0;
        unit_idx += 1;
    }
    if unit_idx == 0 { format!("{bytes} B") } else { format!("{value:.2} {}", UNITS[unit_idx]) }
}

/// Reads a size in bytes: `20GiB`, `1.5 TB`, `500M`, or plain bytes. Returns `None` for anything else.
pub fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(end);
    let unit = unit.trim().to_ascii_lowercase();
    let bytes = match unit.as_str() {
        "" | "b" => Some(1.0),
        _ => {
            let power = unit.chars().next().and_then(|first| "kmgt".find(first)).map(|i| i as i32 + 1);
            let base = match unit.get(1..) {
                Some("" | "ib") => Some(1024.0_f64),
                Some("b") => Some(1000.0),
                _ => None,
            };
            base.zip(power).map(|(base, power)| base.powi(power))
        }
    };
    match (number.parse::<f64>(), bytes) {
        (Ok(number), Some(bytes)) if number * bytes < u64::MAX as f64 => Some((number * bytes) as u64),
        _ => None,
    }
}

/// Formats a duration with a unit that keeps three or four significant digits: `12.3 ms`.
pub fn format_seconds(seconds: f64) -> String {
    let magnitude = seconds.abs();
    if !magnitude.is_finite() {
        return "n/a".to_owned();
    }
    if magnitude >= 60.0 {
        let whole = magnitude as u64;
        format!("{} min {:02} s", whole / 60, whole % 60)
    } else if magnitude >= 1.0 {
        format!("{seconds:.2} s")
    } else if magnitude >= 1e-3 {
        format!("{:.2} ms", seconds * 1e3)
    } else {
        format!("{:.1} µs", seconds * 1e6)
    }
}

/// Returns the word for a number that is not finite: `inf`, `-inf`, `nan`.
pub fn non_finite(value: f64) -> Option<&'static str> {
    match value {
        value if value.is_nan() => Some("nan"),
        f64::INFINITY => Some("inf"),
        f64::NEG_INFINITY => Some("-inf"),
        _ => None,
    }
}

/// Formats a number with about four significant digits, switching to scientific notation far from 1.
pub fn format_significant(value: f64) -> String {
    let magnitude = value.abs();
    if let Some(word) = non_finite(value) {
        word.to_owned()
    } else if magnitude == 0.0 {
        "0".to_owned()
    } else if !(1e-3..1e6).contains(&magnitude) {
        format!("{value:.3e}")
    } else if magnitude >= 1000.0 {
        format!("{value:.0}")
    } else if magnitude >= 100.0 {
        format!("{value:.1}")
    } else if magnitude >= 1.0 {
        format!("{value:.3}")
    } else {
        format!("{value:.4}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_kinds_of_units() {
        for (text, bytes) in [
            ("20GiB", 20 << 30),
            ("1.5 kB", 1500),
            ("500M", 500 << 20),
            ("7", 7),
            ("0b", 0),
            ("2TiB", 2 << 40),
            ("3gb", 3_000_000_000),
        ] {
            assert_eq!(parse_size(text), Some(bytes), "{text}");
        }
        for text in ["", "GiB", "-1", "1.2.3", "5 XiB", "1e30GiB", "20GiBs", "9999999999TiB", "ü"] {
            assert!(parse_size(text).is_none(), "{text}");
        }
    }

    #[test]
    fn element_types_read_pytorch_names() {
        assert_eq!(DType::parse("torch.bfloat16"), Some(DType::Bf16));
        assert_eq!(DType::parse("float16"), Some(DType::F16));
        assert_eq!(DType::parse("int8"), None);
    }

    #[test]
    fn numbers_carry_their_unit() {
        assert_eq!(format_bytes(1_044_992), "1020.50 KiB");
        assert_eq!(format_seconds(0.0123), "12.30 ms");
        assert_eq!(format_significant(0.000123), "1.230e-4");
    }
}
