//! Linears that transformers and bitsandbytes 0.50 saved quantized: beside a packed `P.weight` its statistics, and the scalars of
//! its state as JSON in a tensor. They are taken as they are; nothing is quantized again.

use super::safetensors_file::{FolderTensor, SafetensorsFolder};
use crate::inference::{InferenceError, StoredQuantization};
use labpipe_kernels::schemes::codebook::{NESTED_BLOCK, decode_nested};
use labpipe_kernels::schemes::dynamic_map::dynamic_map;
use labpipe_kernels::schemes::{Nested, fp4, nf4};
use labpipe_kernels::{Packed, SchemeSpec, scheme};
use safetensors::Dtype;
use serde::Deserialize;
use serde_json::Value;

/// The 4-bit types and their tables.
const KINDS: [(&str, &[f32; 16]); 2] = [("nf4", &nf4::TABLE), ("fp4", &fp4::TABLE)];

/// What multiplies activations in 8 bits where a folder's config names no threshold: transformers' `BitsAndBytesConfig`.
const DEFAULT_THRESHOLD: f32 = 6.0;

/// Tensors of a 4-bit weight's statistics, below its name.
const PARTS_4BIT: [&str; 6] = [
    "absmax",
    "quant_map",
    "nested_absmax",
    "nested_quant_map",
    "quant_state.bitsandbytes__nf4",
    "quant_state.bitsandbytes__fp4",
];

/// A state has some 200 bytes.
const MAX_STATE_BYTES: usize = 1 << 16;

/// Tables are written in f32; some versions computed them in another order.
const TABLE_TOLERANCE: f32 = 1e-6;

/// The scalars of a 4-bit weight's state.
#[derive(Debug, Deserialize)]
struct State {
    quant_type: String,
    blocksize: usize,
    shape: Vec<usize>,
    nested_blocksize: Option<usize>,
    nested_offset: Option<f32>,
}

/// Where one linear's packed weight lies; counts and tables are checked, values are not yet read.
struct Parts<'a> {
    spec: SchemeSpec,
    codes: &'a FolderTensor,
    /// fp32 values, or 8-bit codes with `nested`.
    absmax: &'a FolderTensor,
    absmax_name: String,
    nested: Option<(&'a FolderTensor, f32)>,
}

/// Returns true if the linear of that weight tensor is stored quantized.
pub fn is_packed(folder: &SafetensorsFolder, weight: &str) -> bool {
    KINDS.iter().any(|(kind, _)| folder.raw(&state_name(weight, kind)).is_some())
        || folder.raw(weight).is_some_and(|raw| raw.dtype == Dtype::I8) && folder.raw(&scb_name(weight)).is_some()
}

/// Checks that a packed weight's parts are there and fit its shape, reading no values.
///
/// # Errors
/// `Tensor` that names what was expected and what was found.
pub fn check(folder: &SafetensorsFolder, weight: &str, shape: &[usize]) -> Result<(), InferenceError> {
    locate(folder, weight, shape).map(|_| ())
}

/// Returns the tensors that belong to a packed weight, itself apart.
pub fn side_tensors(folder: &SafetensorsFolder, weight: &str) -> Vec<String> {
    let module = weight.strip_suffix(".weight").unwrap_or(weight);
    let below = PARTS_4BIT.iter().map(|part| format!("{weight}.{part}"));
    let beside = ["SCB", "weight_format"].map(|part| format!("{module}.{part}"));
    below.chain(beside).filter(|name| folder.raw(name).is_some()).collect()
}

/// Checks that a packed weight's statistics are finite.
///
/// # Errors
/// `NotFinite`.
pub fn check_statistics(folder: &SafetensorsFolder, weight: &str) -> Result<(), InferenceError> {
    for name in side_tensors(folder, weight) {
        if let Some(raw) = folder.raw(&name).filter(|raw| raw.dtype == Dtype::F32) {
            finite(&name, raw)?;
        }
    }
    Ok(())
}

fn finite(name: &str, raw: &FolderTensor) -> Result<Vec<f32>, InferenceError> {
    let values = raw.floats();
    match values.iter().position(|value| !value.is_finite()) {
        None => Ok(values),
        Some(index) => Err(InferenceError::NotFinite {
            path: raw.path.to_path_buf(),
            tensor: name.to_owned(),
            index,
            value: values[index],
        }),
    }
}

/// Reads a packed weight.
///
/// # Errors
/// `Tensor` as [`check`], `NotFinite` where a statistic is NaN or infinite.
pub fn read(folder: &SafetensorsFolder, weight: &str, shape: &[usize; 2]) -> Result<Packed, InferenceError> {
    let parts = locate(folder, weight, shape)?;
    let (scales, nested) = match parts.nested {
        None => (finite(&parts.absmax_name, parts.absmax)?, None),
        Some((absmax, offset)) => {
            let codes = parts.absmax.bytes.as_slice().to_vec();
            let absmax = finite(&format!("{weight}.nested_absmax"), absmax)?;
            let nested = Nested { codes, absmax, offset };
            (decode_nested(&nested), Some(nested))
        }
    };
    let codes = parts.codes.bytes.as_slice().to_vec();
    Ok(Packed { spec: parts.spec, n_rows: shape[0], n_cols: shape[1], codes, scales, zeros: Vec::new(), nested })
}

/// Returns the scheme of a packed weight, and the bytes that its codes and statistics take.
///
/// # Errors
/// `Tensor` as [`check`].
pub fn stored_size(
    folder: &SafetensorsFolder,
    weight: &str,
    shape: &[usize; 2],
) -> Result<(SchemeSpec, u64), InferenceError> {
    let parts = locate(folder, weight, shape)?;
    let nested_bytes = parts.nested.map_or(0, |(absmax, _)| absmax.bytes.len() + 4);
    let bytes = parts.codes.bytes.len() + parts.absmax.bytes.len() + nested_bytes;
    Ok((parts.spec, bytes as u64))
}

/// Returns what is stored quantized of these linears; nothing where all are plain floats.
///
/// # Errors
/// `Tensor` where a part is missing or does not fit.
pub fn stored(
    folder: &SafetensorsFolder,
    linears: &[(String, [usize; 2])],
) -> Result<Option<StoredQuantization>, InferenceError> {
    let mut found = StoredQuantization {
        format: "bitsandbytes".to_owned(),
        schemes: Vec::new(),
        n_linears: 0,
        n_params: 0,
        bytes: 0,
    };
    for (module, shape) in linears {
        let weight = format!("{module}.weight");
        if !is_packed(folder, &weight) {
            continue;
        }
        let (spec, bytes) = stored_size(folder, &weight, shape)?;
        found.bytes += bytes;
        found.n_params += (shape[0] * shape[1]) as u64;
        found.n_linears += 1;
        if !found.schemes.contains(&spec) {
            found.schemes.push(spec);
        }
    }
    Ok((found.n_linears > 0).then_some(found))
}

fn state_name(weight: &str, kind: &str) -> String {
    format!("{weight}.quant_state.bitsandbytes__{kind}")
}

/// Returns the name of an 8-bit weight's row statistics: they stand beside the weight, not below it.
fn scb_name(weight: &str) -> String {
    format!("{}.SCB", weight.strip_suffix(".weight").unwrap_or(weight))
}

/// Makes errors about one weight.
struct Place<'a, 'b> {
    folder: &'a SafetensorsFolder,
    weight: &'b str,
}

impl<'a> Place<'a, '_> {
    fn error(&self, part: &str, expected: impl Into<String>, found: impl Into<String>) -> InferenceError {
        let path = self.folder.raw(part).map_or_else(|| self.folder.dir().to_owned(), |raw| raw.path.to_path_buf());
        InferenceError::Tensor { path, tensor: part.to_owned(), expected: expected.into(), found: found.into() }
    }

    /// Returns a part that holds so many elements of that type.
    fn part(&self, name: &str, dtype: Dtype, n: usize) -> Result<&'a FolderTensor, InferenceError> {
        let expected = || format!("{n} values of type {dtype:?} beside {}", self.weight);
        let raw = self.folder.raw(name).ok_or_else(|| self.error(name, expected(), "no such tensor"))?;
        let size = if raw.dtype == Dtype::F32 { 4 } else { 1 };
        if raw.dtype == dtype && Some(raw.bytes.len()) == n.checked_mul(size) {
            return Ok(raw);
        }
        Err(self.error(name, expected(), format!("{:?} of type {:?}", raw.shape, raw.dtype)))
    }

    /// Checks that a table of the file, where it has one, is the one that labpipe decodes with.
    fn table(&self, name: &str, expected: &[f32]) -> Result<(), InferenceError> {
        let Some(raw) = self.folder.raw(name) else { return Ok(()) };
        let found = raw.floats();
        let close = |(a, b): (&f32, &f32)| (a - b).abs() <= TABLE_TOLERANCE;
        if raw.dtype == Dtype::F32 && found.len() == expected.len() && found.iter().zip(expected).all(close) {
            return Ok(());
        }
        Err(self.error(name, "bitsandbytes' own table", "another one"))
    }
}

fn locate<'a>(folder: &'a SafetensorsFolder, weight: &str, shape: &[usize]) -> Result<Parts<'a>, InferenceError> {
    let place = Place { folder, weight };
    let n = shape.iter().try_fold(1usize, |n, size| n.checked_mul(*size));
    let n = n.ok_or_else(|| place.error(weight, "a shape", format!("{shape:?}")))?;
    for (kind, table) in KINDS {
        let name = state_name(weight, kind);
        if let Some(raw) = folder.raw(&name) {
            let state = parse_state(&place, &name, raw, kind, shape)?;
            return locate_4bit(&place, &name, &state, table, n);
        }
    }
    let codes = place.part(weight, Dtype::I8, n)?;
    if codes.shape != shape {
        return Err(place.error(weight, format!("shape {shape:?}"), format!("shape {:?}", codes.shape)));
    }
    check_row_order(&place)?;
    let absmax_name = scb_name(weight);
    let absmax = place.part(&absmax_name, Dtype::F32, shape[0])?;
    let spec = SchemeSpec { outlier_threshold: Some(threshold(folder)?), ..SchemeSpec::new("int8") };
    Ok(Parts { spec: normalized(&place, weight, &spec)?, codes, absmax, absmax_name, nested: None })
}

/// Returns LLM.int8()'s threshold: the config's, or the default where it is left out or null. 0 quantizes every column.
fn threshold(folder: &SafetensorsFolder) -> Result<f32, InferenceError> {
    let written = &folder.quantization_config()["llm_int8_threshold"];
    match (written, written.as_f64()) {
        (Value::Null, _) => Ok(DEFAULT_THRESHOLD),
        (_, Some(threshold)) if threshold >= 0.0 => Ok(threshold as f32),
        _ => {
            let reason = format!("quantization_config.llm_int8_threshold: expected a number from 0, found {written}");
            Err(InferenceError::File { path: folder.dir().join("config.json"), reason })
        }
    }
}

/// Checks that an 8-bit weight's rows lie one after the other: `weight_format` is 0 where bitsandbytes writes it. Older versions wrote
/// layouts of tensor cores too (1 `col32`, 2 `col_turing`, 3 `col_ampere`), which bitsandbytes 0.50 refuses.
fn check_row_order(place: &Place<'_, '_>) -> Result<(), InferenceError> {
    let name = format!("{}.weight_format", place.weight.strip_suffix(".weight").unwrap_or(place.weight));
    let Some(raw) = place.folder.raw(&name) else { return Ok(()) };
    let bytes = raw.bytes.as_slice();
    let is_integer = matches!(raw.dtype, Dtype::U8 | Dtype::I8 | Dtype::I32 | Dtype::I64);
    if is_integer && !bytes.is_empty() && bytes.iter().all(|byte| *byte == 0) {
        return Ok(());
    }
    let found = match bytes {
        [1] => "1 (col32)".to_owned(),
        [2] => "2 (col_turing)".to_owned(),
        [3] => "3 (col_ampere)".to_owned(),
        [other] => other.to_string(),
        _ => format!("{:?} of type {:?}", raw.shape, raw.dtype),
    };
    let expected = "0 (rows one after the other; save the model again with bitsandbytes 0.50 to get it)";
    Err(place.error(&name, expected, found))
}

fn parse_state(
    place: &Place<'_, '_>,
    name: &str,
    raw: &FolderTensor,
    kind: &str,
    shape: &[usize],
) -> Result<State, InferenceError> {
    let bytes = raw.bytes.as_slice();
    if bytes.len() > MAX_STATE_BYTES {
        return Err(place.error(name, "JSON of some 200 bytes", format!("{} bytes", bytes.len())));
    }
    let state: State = serde_json::from_slice(bytes)
        .map_err(|error| place.error(name, "JSON of a quantization state", format!("text that is none ({error})")))?;
    if state.quant_type != kind {
        return Err(place.error(name, format!("quant_type {kind}"), format!("quant_type {:?}", state.quant_type)));
    }
    if state.shape != shape {
        return Err(place.error(name, format!("shape {shape:?}"), format!("shape {:?}", state.shape)));
    }
    Ok(state)
}

fn locate_4bit<'a>(
    place: &Place<'a, '_>,
    name: &str,
    state: &State,
    table: &[f32; 16],
    n: usize,
) -> Result<Parts<'a>, InferenceError> {
    let weight = place.weight;
    let double_quant = state.nested_offset.is_some();
    let spec = SchemeSpec { block_size: Some(state.blocksize), double_quant, ..SchemeSpec::new(&state.quant_type) };
    let spec = normalized(place, name, &spec)?;
    let n_blocks = n.div_ceil(state.blocksize);
    // The codes' storage type is only a container (`bnb_4bit_quant_storage`): bytes count.
    let codes = place.folder.raw(weight).ok_or_else(|| place.error(weight, "packed codes", "no such tensor"))?;
    let n_bytes = codes.bytes.as_slice().len();
    if n_bytes != n.div_ceil(2) {
        return Err(place.error(weight, format!("{} bytes of codes", n.div_ceil(2)), format!("{n_bytes} bytes")));
    }
    place.table(&format!("{weight}.quant_map"), table)?;
    let absmax_name = format!("{weight}.absmax");
    let Some(offset) = state.nested_offset else {
        let absmax = place.part(&absmax_name, Dtype::F32, n_blocks)?;
        return Ok(Parts { spec, codes, absmax, absmax_name, nested: None });
    };
    if state.nested_blocksize != Some(NESTED_BLOCK) || !offset.is_finite() {
        let found = format!("nested_blocksize {:?}, nested_offset {offset}", state.nested_blocksize);
        return Err(place.error(name, format!("nested_blocksize {NESTED_BLOCK} and a finite nested_offset"), found));
    }
    place.table(&format!("{weight}.nested_quant_map"), dynamic_map())?;
    let absmax = place.part(&absmax_name, Dtype::U8, n_blocks)?;
    let nested = place.part(&format!("{weight}.nested_absmax"), Dtype::F32, n_blocks.div_ceil(NESTED_BLOCK))?;
    Ok(Parts { spec, codes, absmax, absmax_name, nested: Some((nested, offset)) })
}

fn normalized(place: &Place<'_, '_>, name: &str, spec: &SchemeSpec) -> Result<SchemeSpec, InferenceError> {
    scheme(&spec.scheme)
        .and_then(|scheme| scheme.normalize(spec))
        .map_err(|error| place.error(name, "a scheme that labpipe has", error.to_string()))
}
