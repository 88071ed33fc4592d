//! What bitsandbytes 0.50 keeps of one quantized linear on disk, and what transformers' config says of all.

use super::tensor_file::Entry;
use crate::units::DType;
use labpipe_kernels::schemes::codebook::NESTED_BLOCK;
use labpipe_kernels::schemes::dynamic_map::dynamic_map;
use labpipe_kernels::schemes::{fp4, nf4};
use labpipe_kernels::{Packed, SchemeSpec};
use safetensors::Dtype;
use serde_json::{Value, json};

/// The longest decimal text of an f32 that was widened to f64.
const OFFSET_ROOM: usize = 24;

/// Returns torch's name for an element type.
pub fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "float32",
        DType::F16 => "float16",
        DType::Bf16 => "bfloat16",
    }
}

/// Returns the tensors of a linear, before it is packed.
pub fn packed_entries(module: &str, scheme: &SchemeSpec, shape: [usize; 2], dtype: DType) -> Vec<Entry> {
    let entry = |name: String, dtype, shape: Vec<usize>| Entry { name, dtype, shape };
    let weight = format!("{module}.weight");
    if scheme.scheme == "int8" {
        return vec![
            entry(weight, Dtype::I8, shape.to_vec()),
            entry(format!("{module}.SCB"), Dtype::F32, vec![shape[0]]),
            entry(format!("{module}.weight_format"), Dtype::U8, Vec::new()),
        ];
    }
    let n = shape[0] * shape[1];
    let n_blocks = n.div_ceil(scheme.block_size.unwrap_or(64));
    let absmax_dtype = if scheme.double_quant { Dtype::U8 } else { Dtype::F32 };
    let mut entries = vec![
        entry(weight.clone(), Dtype::U8, vec![n.div_ceil(2), 1]),
        entry(format!("{weight}.absmax"), absmax_dtype, vec![n_blocks]),
        entry(format!("{weight}.quant_map"), Dtype::F32, vec![16]),
        entry(state_name(&weight, &scheme.scheme), Dtype::U8, vec![state_bytes(scheme, shape, dtype, 0.0).len()]),
    ];
    if scheme.double_quant {
        entries.push(entry(format!("{weight}.nested_absmax"), Dtype::F32, vec![n_blocks.div_ceil(NESTED_BLOCK)]));
        entries.push(entry(format!("{weight}.nested_quant_map"), Dtype::F32, vec![256]));
    }
    entries
}

/// Returns the bytes of each of those tensors.
pub fn packed_tensors(module: &str, packed: &Packed, dtype: DType) -> Vec<(String, Vec<u8>)> {
    let weight = format!("{module}.weight");
    let scheme = &packed.spec;
    if scheme.scheme == "int8" {
        return vec![
            (weight, packed.codes.clone()),
            (format!("{module}.SCB"), little_endian(&packed.scales)),
            // Rows one after another, the only order that is still written.
            (format!("{module}.weight_format"), vec![0]),
        ];
    }
    let table = if scheme.scheme == "fp4" { &fp4::TABLE } else { &nf4::TABLE };
    let offset = packed.nested.as_ref().map_or(0.0, |nested| nested.offset);
    let mut tensors = vec![
        (weight.clone(), packed.codes.clone()),
        (format!("{weight}.quant_map"), little_endian(table)),
        (state_name(&weight, &scheme.scheme), state_bytes(scheme, [packed.n_rows, packed.n_cols], dtype, offset)),
    ];
    match &packed.nested {
        None => tensors.push((format!("{weight}.absmax"), little_endian(&packed.scales))),
        Some(nested) => {
            tensors.push((format!("{weight}.absmax"), nested.codes.clone()));
            tensors.push((format!("{weight}.nested_absmax"), little_endian(&nested.absmax)));
            tensors.push((format!("{weight}.nested_quant_map"), little_endian(dynamic_map())));
        }
    }
    tensors
}

/// Returns `quantization_config` for config.json. transformers matches the names of modules that it leaves alone from their start.
pub fn quantization_config(scheme: &SchemeSpec, compute: DType, kept: &[&str]) -> Value {
    let is_8bit = scheme.scheme == "int8";
    json!({
        "quant_method": "bitsandbytes",
        "load_in_4bit": !is_8bit,
        "load_in_8bit": is_8bit,
        "_load_in_4bit": !is_8bit,
        "_load_in_8bit": is_8bit,
        "bnb_4bit_compute_dtype": dtype_name(compute),
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_quant_type": if is_8bit { "fp4" } else { scheme.scheme.as_str() },
        "bnb_4bit_use_double_quant": scheme.double_quant,
        "llm_int8_enable_fp32_cpu_offload": false,
        "llm_int8_has_fp16_weight": false,
        "llm_int8_skip_modules": kept,
        "llm_int8_threshold": f64::from(scheme.outlier_threshold.unwrap_or(6.0)),
    })
}

fn state_name(weight: &str, kind: &str) -> String {
    format!("{weight}.quant_state.bitsandbytes__{kind}")
}

/// Returns the scalars of a state as JSON, padded with blanks to a length that does not depend on the offset.
fn state_bytes(scheme: &SchemeSpec, shape: [usize; 2], dtype: DType, offset: f32) -> Vec<u8> {
    let state = |offset: f64| {
        let mut state = json!({
            "quant_type": scheme.scheme,
            "blocksize": scheme.block_size.unwrap_or(64),
            "dtype": dtype_name(dtype),
            "shape": shape,
        });
        if scheme.double_quant {
            state["nested_blocksize"] = json!(NESTED_BLOCK);
            state["nested_dtype"] = json!("float32");
            state["nested_offset"] = json!(offset);
        }
        state.to_string()
    };
    let room = if scheme.double_quant { OFFSET_ROOM } else { 0 };
    let n_bytes = state(0.0).len() + room;
    format!("{:n_bytes$}", state(f64::from(offset))).into_bytes()
}

fn little_endian(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
