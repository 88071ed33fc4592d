//! A stage's record: the head that all kinds share, and the body that each kind has a type for.

use super::Execution;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;

/// Version of every JSON file labpipe writes; it grows when a field changes its meaning.
pub const FORMAT_VERSION: u32 = 1;

/// A cache key: 64 hex digits of blake3.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(pub String);

impl Key {
    /// Returns true if this is the form of a key: 64 lowercase hex digits. Anything else names no folder of the cache.
    pub fn is_well_formed(&self) -> bool {
        self.0.len() == 64 && self.0.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte))
    }

    /// Returns the first 12 digits, for people.
    pub fn short(&self) -> &str {
        self.0.get(..12).unwrap_or(&self.0)
    }
}

/// The fields that went into a key, by dotted name (`params.block_size`, `files.models/x/config.json`, `inputs.model`,
/// `engine.numerics`, `device`): committed beside the artifact, so that a later miss can name the field that changed.
pub type KeyFields = BTreeMap<String, String>;

/// Returns the hash of a set of fields.
pub fn key_of(fields: &KeyFields) -> Key {
    let mut hasher = blake3::Hasher::new();
    for (name, value) in fields {
        // Lengths keep fields apart whatever they hold.
        hasher.update(format!("{}:{name}={}:{value}\n", name.len(), value.len()).as_bytes());
    }
    Key(hasher.finalize().to_hex().to_string())
}

/// What is true of a stage's record whatever its kind; the kind's own fields stand beside these.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct RecordHead {
    pub format_version: u32,
    pub pipeline: String,
    /// The run that shows this record.
    pub run_id: String,
    /// The run that computed it (another one where `cached`).
    pub produced_by_run: String,
    /// The stage's address, `nf4` or `nf4[config=int8]`.
    pub stage: String,
    pub kind: String,
    /// 64 hex digits.
    pub key: String,
    pub cached: bool,
    /// RFC 3339, UTC.
    pub started_at: String,
    pub duration_s: f64,
    /// Name of the device that computed it, e.g. `cpu: AMD EPYC 7B13`; null where none was used.
    pub device: Option<String>,
    /// Canonical parameters, defaults filled in.
    pub params: Map<String, Value>,
    /// Files outside the cache that it read, by name: blake3 of their content. Absent where there are none, and in older records.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub read_files: BTreeMap<String, String>,
    /// How its model was run. Absent where none was, and in older records.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub execution: Option<Execution>,
}

/// A stage's record: head and body, one flat JSON object on disk.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub head: RecordHead,
    pub body: Map<String, Value>,
}

/// The fields of a record that its kind alone has. One type writes and reads them.
pub trait RecordBody: Serialize + DeserializeOwned {
    /// The kind of stage.
    const KIND: &'static str;

    /// Returns the fields.
    fn to_fields(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(fields)) => fields,
            // Every body is a struct with string keys: it always becomes an object.
            _ => unreachable!("a record body serializes to an object"),
        }
    }
}

/// Why a record can't be read. The text fits "failed to {error}".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    #[error("read the record of {stage}: it has format_version {found}, this labpipe reads {}; {}", FORMAT_VERSION, remedy(*found))]
    Format { stage: String, found: u32 },
    #[error("read the record of {stage}: it is one of kind {found}, not {wanted}")]
    Kind { stage: String, found: String, wanted: &'static str },
    #[error(
        "read the record of {stage}: field {field}: {reason}; the file is damaged, or another version of labpipe wrote it: run the stage again with --force"
    )]
    Field { stage: String, field: String, reason: String },
}

fn remedy(format_version: u32) -> &'static str {
    if format_version > FORMAT_VERSION { "it is newer: use the labpipe that wrote it" } else { "run the stage again" }
}

impl Record {
    /// Returns the flat JSON object: the head's fields, then the body's.
    pub fn to_json(&self) -> Value {
        let mut object = match serde_json::to_value(&self.head) {
            Ok(Value::Object(object)) => object,
            // RecordHead is a struct with string keys: it always becomes an object.
            _ => unreachable!("a record head serializes to an object"),
        };
        object.extend(self.body.clone());
        Value::Object(object)
    }

    /// Splits a flat JSON object into head and body.
    ///
    /// # Errors
    /// `Format` for a record of another format, `Field` where a field of the head is missing or has another type.
    pub fn from_json(value: Value) -> Result<Record, RecordError> {
        let stage = value["stage"].as_str().unwrap_or("a stage").to_owned();
        if let Some(found) = value["format_version"].as_u64().and_then(|found| u32::try_from(found).ok())
            && found != FORMAT_VERSION
        {
            return Err(RecordError::Format { stage, found });
        }
        let head: RecordHead = from_value(&value, &stage)?;
        let head_fields = serde_json::to_value(&head).unwrap_or_default();
        let mut body = match value {
            Value::Object(object) => object,
            _ => Map::new(),
        };
        body.retain(|name, _| head_fields.get(name).is_none());
        Ok(Record { head, body })
    }

    /// Reads the body.
    ///
    /// # Errors
    /// `Kind`; `Field` where one is missing or has another type.
    pub fn read<T: RecordBody>(&self) -> Result<T, RecordError> {
        if self.head.kind != T::KIND {
            let (stage, found) = (self.head.stage.clone(), self.head.kind.clone());
            return Err(RecordError::Kind { stage, found, wanted: T::KIND });
        }
        from_value(&Value::Object(self.body.clone()), &self.head.stage)
    }
}

/// Reads a value, and says which field of it could not be read.
fn from_value<T: DeserializeOwned>(value: &Value, stage: &str) -> Result<T, RecordError> {
    let read = |value: Value| serde_json::from_value::<T>(value).map_err(|error| error.to_string());
    read(value.clone()).map_err(|complaint| {
        let fails = |part: Value| read(part).is_err_and(|found| found == complaint);
        let missing = complaint.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
        let at = locate(value, &fails, missing.is_some());
        let (field, reason) = match missing {
            Some(name) if at.is_empty() => (name.to_owned(), "it is missing".to_owned()),
            Some(name) => (format!("{at}.{name}"), "it is missing".to_owned()),
            None => (at, in_words(&complaint)),
        };
        RecordError::Field { stage: stage.to_owned(), field, reason }
    })
}

/// Returns the path of the innermost part that is to blame for a complaint. Lists and objects are read in order up to the first
/// mistake: the shortest beginning that fails in the same way ends with it. Where a field is missing, that is the object that lacks
/// it: what stands beside the gap is not to blame, and neither is a list that fails when it is empty too.
fn locate(value: &Value, fails: &dyn Fn(Value) -> bool, is_missing: bool) -> String {
    let joined = |name: String, inner: String| {
        let dot = if inner.is_empty() || inner.starts_with('[') { "" } else { "." };
        format!("{name}{dot}{inner}")
    };
    match value {
        Value::Object(fields) => {
            let first = |n: usize, last: &Value| -> Value {
                let mut part: Map<String, Value> =
                    fields.iter().take(n).map(|(name, value)| (name.clone(), value.clone())).collect();
                part.extend(fields.keys().nth(n).map(|name| (name.clone(), last.clone())));
                Value::Object(part)
            };
            let Some((n, (name, field))) = fields.iter().enumerate().find(|(n, (_, field))| fails(first(*n, field)))
            else {
                return String::new();
            };
            let emptied = match field {
                Value::Array(_) => Some(Value::Array(Vec::new())),
                Value::Object(_) => Some(Value::Object(Map::new())),
                _ => None,
            };
            if is_missing && emptied.is_none_or(|emptied| fails(first(n, &emptied))) {
                return String::new();
            }
            joined(name.clone(), locate(field, &|part| fails(first(n, &part)), is_missing))
        }
        Value::Array(items) => {
            let first = |n: usize, last: &Value| Value::Array(items[..n].iter().chain([last]).cloned().collect());
            let Some((n, item)) = items.iter().enumerate().find(|(n, item)| fails(first(*n, item))) else {
                return String::new();
            };
            joined(format!("[{n}]"), locate(item, &|part| fails(first(n, &part)), is_missing))
        }
        _ => String::new(),
    }
}

/// Says what was expected without the names of types.
fn in_words(reason: &str) -> String {
    let (found, expected) = reason.rsplit_once(", expected ").unwrap_or((reason, ""));
    let expected = match expected {
        "" => return reason.to_owned(),
        "f64" | "f32" => "a number",
        "usize" | "u64" | "u32" | "i64" => "a whole number",
        "a boolean" => "true or false",
        "a string" => "a text",
        "a sequence" => "a list",
        other if other.starts_with("struct ") => "an object",
        other => other,
    };
    let found = found.trim_start_matches("invalid type: ").trim_start_matches("invalid value: ");
    format!("expected {expected}, found {found}")
}
