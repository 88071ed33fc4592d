//! A small GGUF writer, and the folder of a tiny model turned into a GGUF file as llama.cpp's converter does it.
#![allow(dead_code, reason = "each test program uses its own part of this")]

use half::f16;
use serde_json::Value as Json;
use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::path::{Path, PathBuf};

/// A metadata value.
#[derive(Debug, Clone)]
pub enum Value {
    U32(u32),
    F32(f32),
    Bool(bool),
    Text(String),
    Bools(Vec<bool>),
    U32s(Vec<u32>),
}

/// A tensor of f32 values, outermost dimension first.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub shape: Vec<usize>,
    pub values: Vec<f32>,
}

/// A file that is not written yet.
#[derive(Debug, Clone, Default)]
pub struct Gguf {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

fn array(item_type: u32, n: usize, items: Vec<u8>) -> (u32, Vec<u8>) {
    (9, [item_type.to_le_bytes().as_slice(), &(n as u64).to_le_bytes(), &items].concat())
}

fn encoded(value: &Value) -> (u32, Vec<u8>) {
    match value {
        Value::U32(value) => (4, value.to_le_bytes().to_vec()),
        Value::F32(value) => (6, value.to_le_bytes().to_vec()),
        Value::Bool(value) => (7, vec![u8::from(*value)]),
        Value::Text(value) => (8, text(value)),
        Value::Bools(values) => array(7, values.len(), values.iter().map(|value| u8::from(*value)).collect()),
        Value::U32s(values) => array(4, values.len(), values.iter().flat_map(|value| value.to_le_bytes()).collect()),
    }
}

impl Gguf {
    pub fn set(&mut self, key: &str, value: Value) -> &mut Gguf {
        self.metadata.insert(key.to_owned(), value);
        self
    }

    pub fn tensor(&mut self, name: &str, shape: &[usize], values: Vec<f32>) -> &mut Gguf {
        assert_eq!(shape.iter().product::<usize>(), values.len(), "{name}");
        self.tensors.insert(name.to_owned(), Tensor { shape: shape.to_vec(), values });
        self
    }

    /// Writes the file, every tensor as F32.
    pub fn write(&self, path: &Path) {
        let mut bytes = [b"GGUF".as_slice(), &3u32.to_le_bytes()].concat();
        bytes.extend((self.tensors.len() as u64).to_le_bytes());
        bytes.extend((self.metadata.len() as u64).to_le_bytes());
        for (key, value) in &self.metadata {
            let (value_type, value) = encoded(value);
            bytes.extend([text(key).as_slice(), &value_type.to_le_bytes(), &value].concat());
        }
        let mut data: Vec<u8> = Vec::new();
        for (name, tensor) in &self.tensors {
            bytes.extend(text(name));
            bytes.extend((tensor.shape.len() as u32).to_le_bytes());
            bytes.extend(tensor.shape.iter().rev().flat_map(|dim| (*dim as u64).to_le_bytes()));
            bytes.extend(0u32.to_le_bytes());
            bytes.extend((data.len() as u64).to_le_bytes());
            data.extend(tensor.values.iter().flat_map(|value| value.to_le_bytes()));
            data.resize(data.len().next_multiple_of(32), 0);
        }
        bytes.resize(bytes.len().next_multiple_of(32), 0);
        bytes.extend(data);
        std::fs::write(path, bytes).expect("a file");
    }
}

/// Reads the f16 tensors of a safetensors file.
fn safetensors(path: &Path) -> BTreeMap<String, Tensor> {
    let bytes = std::fs::read(path).expect("the weights");
    let n = u64::from_le_bytes(bytes[..8].try_into().expect("eight bytes")) as usize;
    let header: Json = serde_json::from_slice(&bytes[8..8 + n]).expect("a header");
    let size = |value: &Json| value.as_u64().expect("a number") as usize;
    let entries = header.as_object().expect("a mapping").iter().filter(|(name, _)| *name != "__metadata__");
    entries
        .map(|(name, entry)| {
            assert_eq!(entry["dtype"], "F16", "{name}");
            let offsets = 8 + n + size(&entry["data_offsets"][0])..8 + n + size(&entry["data_offsets"][1]);
            let values =
                bytes[offsets].as_chunks::<2>().0.iter().map(|raw| f16::from_le_bytes(*raw).to_f32()).collect();
            let shape = entry["shape"].as_array().expect("a shape").iter().map(size).collect();
            (name.clone(), Tensor { shape, values })
        })
        .collect()
}

/// Puts rows that rotate halves of a head into the order that rotates neighbouring pairs.
pub fn interleave(tensor: &Tensor, n_heads: usize) -> Tensor {
    let n_rows = tensor.shape[0];
    let (width, head_dim) = (tensor.values.len() / n_rows, n_rows / n_heads);
    let row_of = |row: usize| {
        let (head, within) = (row / head_dim, row % head_dim);
        head * head_dim + within / 2 + within % 2 * (head_dim / 2)
    };
    let rows = (0..n_rows).flat_map(|row| tensor.values[row_of(row) * width..][..width].to_vec());
    Tensor { shape: tensor.shape.clone(), values: rows.collect() }
}

fn tensor_name(name: &str, has_out_norms: bool) -> Option<String> {
    let name = name.replace("model.language_model.", "model.");
    match name.as_str() {
        "model.embed_tokens.weight" => return Some("token_embd.weight".to_owned()),
        "model.norm.weight" => return Some("output_norm.weight".to_owned()),
        "lm_head.weight" => return Some("output.weight".to_owned()),
        _ => {}
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let module = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.qkv_proj" => "attn_qkv",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" if has_out_norms => "post_attention_norm",
        "post_attention_layernorm" | "pre_feedforward_layernorm" => "ffn_norm",
        "post_feedforward_layernorm" => "post_ffw_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" | "mlp.gate_up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        other => panic!("{other}"),
    };
    Some(format!("blk.{layer}.{module}.{kind}"))
}

pub fn family_folder(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/families").join(case)
}

/// Returns a family's fixture as a GGUF file.
pub fn of_family(case: &str) -> Gguf {
    let folder = family_folder(case);
    let config = std::fs::read_to_string(folder.join("config.json")).expect("the config");
    let config: Json = serde_json::from_str(&config).expect("JSON");
    let config = config.get("text_config").unwrap_or(&config).clone();
    let arch = match config["model_type"].as_str().expect("a family") {
        "mistral" => "llama",
        "gemma3_text" => "gemma3",
        other => other,
    };
    let mut gguf = Gguf::default();
    write_metadata(&mut gguf, arch, &config);
    write_rope(&mut gguf, arch, &config);
    write_tensors(&mut gguf, arch, &config, &safetensors(&folder.join("model.safetensors")));
    gguf
}

fn size(config: &Json, field: &str) -> usize {
    config[field].as_u64().unwrap_or_else(|| panic!("{field}")) as usize
}

fn head_dim(config: &Json) -> usize {
    config["head_dim"]
        .as_u64()
        .map_or(size(config, "hidden_size") / size(config, "num_attention_heads"), |n| n as usize)
}

fn write_metadata(gguf: &mut Gguf, arch: &str, config: &Json) {
    gguf.set("general.architecture", Value::Text(arch.to_owned()));
    gguf.set("general.name", Value::Text("a tiny model".to_owned()));
    let n_layers = size(config, "num_hidden_layers");
    for (key, value) in [
        ("embedding_length", size(config, "hidden_size")),
        ("feed_forward_length", size(config, "intermediate_size")),
        ("block_count", n_layers),
        ("attention.head_count", size(config, "num_attention_heads")),
        ("attention.head_count_kv", size(config, "num_key_value_heads")),
        ("context_length", size(config, "max_position_embeddings")),
        ("attention.key_length", head_dim(config)),
        ("attention.value_length", head_dim(config)),
    ] {
        gguf.set(&format!("{arch}.{key}"), Value::U32(value as u32));
    }
    let number = |field: &str| config[field].as_f64().map(|value| value as f32);
    for (key, value) in [
        ("attention.layer_norm_rms_epsilon", number("rms_norm_eps")),
        ("attn_logit_softcapping", number("attn_logit_softcapping")),
        ("final_logit_softcapping", number("final_logit_softcapping")),
    ] {
        value.map(|value| gguf.set(&format!("{arch}.{key}"), Value::F32(value)));
    }
    if let Some(window) = config["sliding_window"].as_u64() {
        gguf.set(&format!("{arch}.attention.sliding_window"), Value::U32(window as u32));
    }
    let pattern = format!("{arch}.attention.sliding_window_pattern");
    if let Some(period) = config["sliding_window_pattern"].as_u64() {
        gguf.set(&pattern, Value::U32(period as u32));
    }
    if config["use_sliding_window"] == true {
        let first = size(config, "max_window_layers");
        gguf.set(&pattern, Value::Bools((0..n_layers).map(|layer| layer >= first).collect()));
    }
    config["bos_token_id"].as_u64().map(|id| gguf.set("tokenizer.ggml.bos_token_id", Value::U32(id as u32)));
}

fn write_rope(gguf: &mut Gguf, arch: &str, config: &Json) {
    let key = |name: &str| format!("{arch}.rope.{name}");
    let part = config["partial_rotary_factor"].as_f64().unwrap_or(1.0);
    let n_rotated = (head_dim(config) as f64 * part) as usize;
    gguf.set(&key("dimension_count"), Value::U32(n_rotated as u32));
    let default = if arch == "gemma3" { 1e6 } else { 1e4 };
    let theta = config["rope_theta"].as_f64().unwrap_or(default);
    gguf.set(&key("freq_base"), Value::F32(theta as f32));
    if let Some(original) = config["original_max_position_embeddings"].as_u64() {
        gguf.set(&key("scaling.original_context_length"), Value::U32(original as u32));
    }
    let scaling = &config["rope_scaling"];
    let number = |field: &str| scaling[field].as_f64().unwrap_or_else(|| panic!("{field}"));
    let numbers = |field: &str| -> Vec<f32> {
        scaling[field]
            .as_array()
            .expect("a list")
            .iter()
            .map(|value| value.as_f64().expect("a number") as f32)
            .collect()
    };
    let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str()).unwrap_or("none");
    match kind {
        "none" => {}
        "linear" | "yarn" => {
            gguf.set(&key("scaling.type"), Value::Text(kind.to_owned()));
            gguf.set(&key("scaling.factor"), Value::F32(number("factor") as f32));
            if let Some(original) = scaling["original_max_position_embeddings"].as_u64() {
                gguf.set(&key("scaling.original_context_length"), Value::U32(original as u32));
            }
            for field in ["beta_fast", "beta_slow"] {
                if let Some(value) = scaling[field].as_f64() {
                    gguf.set(&key(&format!("scaling.yarn_{field}")), Value::F32(value as f32));
                }
            }
        }
        "longrope" => {
            let original = size(config, "original_max_position_embeddings") as f64;
            let scale = size(config, "max_position_embeddings") as f64 / original;
            let attention = (1.0 + scale.ln() / original.ln()).sqrt();
            gguf.set(&key("scaling.attn_factor"), Value::F32(attention as f32));
            gguf.tensor("rope_factors_short.weight", &[n_rotated / 2], numbers("short_factor"));
            gguf.tensor("rope_factors_long.weight", &[n_rotated / 2], numbers("long_factor"));
        }
        "llama3" => {
            let (low, high) = (number("low_freq_factor"), number("high_freq_factor"));
            let original = number("original_max_position_embeddings");
            let divisor = |i: usize| {
                let wavelength = TAU * theta.powf(2.0 * i as f64 / n_rotated as f64);
                let smooth = ((original / wavelength - low) / (high - low)).clamp(0.0, 1.0);
                (1.0 / ((1.0 - smooth) / number("factor") + smooth)) as f32
            };
            gguf.tensor("rope_freqs.weight", &[n_rotated / 2], (0..n_rotated / 2).map(divisor).collect());
        }
        other => panic!("{other} has no form in GGUF"),
    }
}

fn write_tensors(gguf: &mut Gguf, arch: &str, config: &Json, tensors: &BTreeMap<String, Tensor>) {
    let is_gemma = arch.starts_with("gemma");
    let is_interleaved = matches!(arch, "llama" | "smollm3");
    // GGUF has no field for the scale of Gemma's scores and llama.cpp takes 1/√head_dim: what differs goes into the queries.
    let scale =
        config["query_pre_attn_scalar"].as_f64().map_or(1.0, |scalar| (head_dim(config) as f64 / scalar).sqrt());
    let has_q_norm = tensors.keys().any(|name| name.contains("q_norm"));
    for (name, tensor) in tensors {
        let Some(gguf_name) = tensor_name(name, is_gemma || arch == "olmo2") else { continue };
        let mut tensor = tensor.clone();
        if is_gemma && name.ends_with("norm.weight") {
            tensor.values.iter_mut().for_each(|value| *value += 1.0);
        }
        if name.contains(if has_q_norm { "q_norm" } else { "q_proj" }) {
            tensor.values.iter_mut().for_each(|value| *value = (f64::from(*value) * scale) as f32);
        }
        if is_interleaved && name.contains("self_attn.q_proj") {
            tensor = interleave(&tensor, size(config, "num_attention_heads"));
        }
        if is_interleaved && name.contains("self_attn.k_proj") {
            tensor = interleave(&tensor, size(config, "num_key_value_heads"));
        }
        gguf.tensors.insert(gguf_name, tensor);
    }
}
