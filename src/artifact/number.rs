//! Numbers that need not be finite, as records hold them.
//!
//! JSON has no infinity and no NaN. A record writes them as the texts `inf`, `-inf` and `nan`; null is left to what could not be
//! measured. Records of earlier versions have null for all three: a null where a number must be is read as NaN.

use crate::units::non_finite;
use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde::ser::{SerializeSeq, Serializer};
use std::fmt;

/// A number of any kind.
struct Number(f64);

impl serde::Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Number, D::Error> {
        deserialize(deserializer).map(Number)
    }
}

/// Writes a number.
///
/// # Errors
/// What the serializer fails with.
pub fn serialize<S: Serializer>(value: &f64, serializer: S) -> Result<S::Ok, S::Error> {
    match non_finite(*value) {
        Some(word) => serializer.serialize_str(word),
        None => serializer.serialize_f64(*value),
    }
}

/// Reads a number; null is NaN.
///
/// # Errors
/// Where there is something else.
pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    struct NumberVisitor;
    impl Visitor<'_> for NumberVisitor {
        type Value = f64;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a number, \"inf\", \"-inf\" or \"nan\"")
        }

        fn visit_f64<E>(self, value: f64) -> Result<f64, E> {
            Ok(value)
        }

        fn visit_i64<E>(self, value: i64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_u64<E>(self, value: u64) -> Result<f64, E> {
            Ok(value as f64)
        }

        fn visit_unit<E>(self) -> Result<f64, E> {
            Ok(f64::NAN)
        }

        fn visit_str<E: Error>(self, text: &str) -> Result<f64, E> {
            match text {
                "inf" => Ok(f64::INFINITY),
                "-inf" => Ok(f64::NEG_INFINITY),
                "nan" => Ok(f64::NAN),
                other => Err(E::invalid_value(serde::de::Unexpected::Str(other), &self)),
            }
        }
    }
    deserializer.deserialize_any(NumberVisitor)
}

/// Numbers of which null says that they could not be measured.
pub mod optional {
    use super::Number;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes a number or null.
    ///
    /// # Errors
    /// What the serializer fails with.
    pub fn serialize<S: Serializer>(value: &Option<f64>, serializer: S) -> Result<S::Ok, S::Error> {
        value.map(Number).serialize(serializer)
    }

    /// Reads a number or null.
    ///
    /// # Errors
    /// Where there is something else.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<f64>, D::Error> {
        Ok(Option::<Number>::deserialize(deserializer)?.map(|number| number.0))
    }
}

/// Lists of numbers.
pub mod list {
    use super::{Number, SerializeSeq};
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes a list.
    ///
    /// # Errors
    /// What the serializer fails with.
    pub fn serialize<S: Serializer>(values: &[f64], serializer: S) -> Result<S::Ok, S::Error> {
        let mut seq = serializer.serialize_seq(Some(values.len()))?;
        for value in values {
            seq.serialize_element(&Number(*value))?;
        }
        seq.end()
    }

    /// Reads a list.
    ///
    /// # Errors
    /// Where an item is no number.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<f64>, D::Error> {
        Ok(Vec::<Number>::deserialize(deserializer)?.into_iter().map(|number| number.0).collect())
    }
}
