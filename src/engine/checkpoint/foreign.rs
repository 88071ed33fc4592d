//! Recognizes quantized weights that labpipe does not read: by what a folder declares, and by the names and types of its tensors.

use super::safetensors_file::FolderTensor;
use crate::inference::InferenceError;
use crate::json_file::parse_json;
use safetensors::Dtype;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// A method as configs spell it, and as its authors write it.
const METHODS: [(&str, &str); 20] = [
    ("gptq", "GPTQ"),
    ("awq", "AWQ"),
    ("fp8", "FP8"),
    ("fbgemm_fp8", "FBGEMM FP8"),
    ("compressed-tensors", "compressed-tensors"),
    ("modelopt", "NVIDIA ModelOpt"),
    ("aqlm", "AQLM"),
    ("hqq", "HQQ"),
    ("eetq", "EETQ"),
    ("quanto", "quanto"),
    ("torchao", "torchao"),
    ("mxfp4", "MXFP4"),
    ("mxfp8", "MXFP8"),
    ("nvfp4", "NVFP4"),
    ("exl2", "EXL2"),
    ("exl3", "EXL3"),
    ("bitnet", "BitNet"),
    ("vptq", "VPTQ"),
    ("spqr", "SpQR"),
    ("quark", "Quark"),
];

/// Files beside config.json in which a method says how it quantized, and the method.
const SIDE_FILES: [(&str, &str); 6] = [
    ("quantize_config.json", "GPTQ"),
    ("quant_config.json", "AWQ"),
    ("hf_quant_config.json", "NVIDIA ModelOpt"),
    ("quanto_qmap.json", "quanto"),
    ("quantization_map.json", "quanto"),
    ("qmodel.pt", "HQQ"),
];

/// Refuses a folder whose config.json, or a file beside it, declares a quantization other than bitsandbytes'.
///
/// # Errors
/// `ForeignQuantization`.
pub fn refuse_declared(dir: &Path, config: &Value) -> Result<(), InferenceError> {
    let declared = [config, &config["text_config"]].into_iter().find_map(declared_in).or_else(|| {
        let (file, method) = SIDE_FILES.iter().find(|(file, _)| dir.join(file).is_file())?;
        let side = parse_json(&std::fs::read(dir.join(file)).unwrap_or_default()).unwrap_or_default();
        let named = ["quant_method", "method"].iter().find_map(|key| side[*key].as_str()).map(method_name);
        let algorithm = side["quantization"]["quant_algo"].as_str().map_or(String::new(), |name| format!(", {name}"));
        Some((format!("{}{algorithm}", named.as_deref().unwrap_or(method)), format!("{file} lies beside it")))
    });
    match declared {
        None => Ok(()),
        Some((method, evidence)) => Err(InferenceError::ForeignQuantization { path: dir.to_owned(), method, evidence }),
    }
}

/// Refuses tensors that look quantized by a method that labpipe does not read, though nothing declares it.
///
/// # Errors
/// `ForeignQuantization`, naming one such tensor.
pub fn refuse_inferred(dir: &Path, tensors: &BTreeMap<String, FolderTensor>) -> Result<(), InferenceError> {
    let found = tensors.iter().find_map(|(name, tensor)| Some((name, method_of(tensors, name, tensor)?)));
    match found {
        None => Ok(()),
        Some((name, method)) => {
            let evidence = format!("tensor {name} looks so, though config.json does not say it");
            Err(InferenceError::ForeignQuantization { path: dir.to_owned(), method: method.to_owned(), evidence })
        }
    }
}

fn method_name(written: &str) -> String {
    let lower = written.to_lowercase();
    METHODS.iter().find(|(name, _)| *name == lower).map_or_else(|| written.to_owned(), |(_, name)| (*name).to_owned())
}

/// Returns the method that a config declares and where.
fn declared_in(config: &Value) -> Option<(String, String)> {
    let is_set = |value: &&Value| match value {
        Value::Null => false,
        Value::Object(fields) => !fields.is_empty(),
        _ => true,
    };
    // MLX writes both keys, and the method in neither.
    if let Some(section) = config.get("quantization").filter(is_set) {
        let method = section["quant_method"].as_str().map(method_name);
        let is_mlx = section["bits"].is_number() || section["mode"].is_string();
        let method = method.or_else(|| is_mlx.then(|| "MLX".to_owned()));
        return Some((method.unwrap_or_else(unnamed), "quantization in config.json".to_owned()));
    }
    ["quantization_config", "compression_config"].into_iter().find_map(|key| {
        let section = config.get(key).filter(is_set)?;
        let flag = |name: &str| section[name].as_bool() == Some(true);
        match section["quant_method"].as_str() {
            // transformers, too, takes these two for bitsandbytes whatever else stands there.
            _ if flag("load_in_4bit") || flag("load_in_8bit") => None,
            Some("bitsandbytes") => None,
            Some(method) => Some((method_name(method), format!("{key}.quant_method {method:?} in config.json"))),
            None => Some((unnamed_method(key, section), format!("{key} in config.json names no quant_method"))),
        }
    })
}

fn unnamed() -> String {
    "a method that is not named".to_owned()
}

/// Guesses the method of a config that names none from its fields.
fn unnamed_method(key: &str, section: &Value) -> String {
    let has = |field: &str| section.get(field).is_some();
    if key == "compression_config" || has("config_groups") || has("quantization_status") {
        "compressed-tensors".to_owned()
    } else if has("quant_algo") {
        "NVIDIA ModelOpt".to_owned()
    } else if has("q_group_size") || has("w_bit") {
        "AWQ".to_owned()
    } else if has("bits") && has("group_size") {
        "GPTQ or a method like it".to_owned()
    } else {
        unnamed()
    }
}

/// Returns the method that writes tensors of this name and type, with what it writes beside them.
fn method_of(tensors: &BTreeMap<String, FolderTensor>, name: &str, tensor: &FolderTensor) -> Option<&'static str> {
    use Dtype::{F8_E4M3, F8_E5M2, I8, U32};
    let (base, leaf) = name.rsplit_once('.')?;
    let beside = |leaf: &str| tensors.get(&format!("{base}.{leaf}"));
    let is_f8 = |tensor: &FolderTensor| matches!(tensor.dtype, F8_E4M3 | F8_E5M2);
    match leaf {
        "qweight" => Some(match (beside("qzeros").is_some(), beside("g_idx"), beside("scales")) {
            (_, Some(_), _) => "GPTQ",
            // GPTQ packs eight codes along the input, AWQ along the output.
            (true, None, Some(scales)) if scales.shape.last() == tensor.shape.last() => "GPTQ",
            (true, None, Some(_)) => "AWQ",
            _ => "GPTQ or AWQ",
        }),
        "q_weight" => Some("EXL2"),
        "trellis" => Some("EXL3"),
        "weight_packed" => Some("compressed-tensors"),
        "weight_scale_inv" => Some("FP8"),
        "weight_scale" => match beside("weight") {
            Some(weight) if is_f8(weight) => Some("FP8"),
            Some(weight) if weight.dtype == I8 => Some("compressed-tensors (INT8)"),
            Some(weight) if weight.dtype == Dtype::U8 => Some("NVIDIA ModelOpt"),
            _ => None,
        },
        "weight_scales" if beside("weight").is_some_and(|weight| weight.dtype == I8) => Some("EETQ"),
        "weight" if is_f8(tensor) => Some("FP8"),
        "weight" if tensor.dtype == U32 && beside("scales").is_some() => Some("MLX"),
        "codebooks" if beside("codes").is_some() => Some("AQLM"),
        "W_q" => Some("HQQ"),
        "_data" if base.ends_with(".weight") && beside("_scale").is_some() => Some("quanto"),
        _ if leaf.ends_with("weight_qdata") => Some("torchao"),
        _ => {
            let blocks = leaf.strip_suffix("_blocks")?;
            beside(&format!("{blocks}_scales")).is_some_and(|scales| scales.dtype == Dtype::U8).then_some("MXFP4")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use labpipe_kernels::weight::SharedBytes;
    use serde_json::json;
    use std::sync::Arc;

    fn message(result: Result<(), InferenceError>) -> String {
        result.expect_err("an error").to_string()
    }

    #[test]
    fn a_method_that_config_json_declares_is_named_with_the_field() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let declared = |config: Value| message(refuse_declared(dir.path(), &config));
        for (config, method, field) in [
            (json!({"quantization_config": {"quant_method": "gptq", "bits": 4}}), "GPTQ", "quantization_config"),
            (json!({"quantization_config": {"quant_method": "AWQ"}}), "AWQ", "quantization_config"),
            (json!({"quantization_config": {"quant_method": "new-one"}}), "new-one", "quant_method \"new-one\""),
            (json!({"text_config": {"quantization_config": {"quant_method": "fp8"}}}), "FP8", "quant_method"),
            (json!({"compression_config": {"quantization_status": "frozen"}}), "compressed-tensors", "compression"),
            (json!({"quantization": {"group_size": 64, "bits": 4}}), "MLX", "quantization in config.json"),
            (json!({"quantization_config": {"bits": 4, "group_size": 128}}), "GPTQ or a method", "no quant_method"),
            (json!({"quantization_config": {"quant_algo": "FP8"}}), "ModelOpt", "no quant_method"),
            (json!({"quantization_config": "int4"}), "not named", "quantization_config"),
        ] {
            let error = declared(config);
            assert!(error.contains(method) && error.contains(field), "{error}");
        }
        for config in [
            json!({}),
            json!({"quantization_config": null}),
            json!({"quantization_config": {}}),
            json!({"quantization_config": {"quant_method": "bitsandbytes"}}),
            json!({"quantization_config": {"load_in_8bit": true}}),
        ] {
            refuse_declared(dir.path(), &config).expect("nothing foreign");
        }
    }

    #[test]
    fn a_method_that_a_side_file_declares_is_named_with_the_file() {
        for (file, text, method) in [
            ("quantize_config.json", r#"{"bits": 4, "group_size": 128}"#, "GPTQ"),
            ("quantize_config.json", r#"{"bits": 4, "quant_method": "awq"}"#, "AWQ"),
            ("quant_config.json", r#"{"w_bit": 4}"#, "AWQ"),
            ("hf_quant_config.json", r#"{"quantization": {"quant_algo": "NVFP4"}}"#, "NVIDIA ModelOpt, NVFP4"),
        ] {
            let dir = tempfile::tempdir().expect("a temporary folder");
            std::fs::write(dir.path().join(file), text).expect("a file");
            let error = message(refuse_declared(dir.path(), &json!({})));
            assert!(error.contains(method) && error.contains(file), "{error}");
        }
    }

    #[test]
    fn a_method_that_nothing_declares_is_inferred_from_names_and_types() {
        let tensor = |dtype, shape: &[usize]| FolderTensor {
            dtype,
            shape: shape.to_vec(),
            bytes: SharedBytes::from_values(Vec::<u8>::new()),
            path: Arc::from(Path::new("model.safetensors")),
            file_name: None,
        };
        type Entry = (&'static str, Dtype, &'static [usize]);
        let cases: [(&str, &[Entry]); 12] = [
            (
                "GPTQ ",
                &[("qweight", Dtype::I32, &[8, 64]), ("qzeros", Dtype::I32, &[1, 8]), ("scales", Dtype::F16, &[1, 64])],
            ),
            (
                "AWQ ",
                &[("qweight", Dtype::I32, &[64, 8]), ("qzeros", Dtype::I32, &[1, 8]), ("scales", Dtype::F16, &[1, 64])],
            ),
            ("GPTQ ", &[("qweight", Dtype::I32, &[8, 64]), ("g_idx", Dtype::I32, &[64])]),
            ("FP8 ", &[("weight", Dtype::F8_E4M3, &[64, 64])]),
            ("FP8 ", &[("weight_scale_inv", Dtype::F32, &[1, 1])]),
            ("compressed-tensors ", &[("weight_packed", Dtype::I32, &[64, 8])]),
            ("compressed-tensors (INT8)", &[("weight", Dtype::I8, &[64, 64]), ("weight_scale", Dtype::F32, &[64, 1])]),
            (
                "MLX ",
                &[("weight", Dtype::U32, &[64, 8]), ("scales", Dtype::F16, &[64, 1]), ("biases", Dtype::F16, &[64, 1])],
            ),
            ("AQLM ", &[("codes", Dtype::I16, &[64, 8, 1]), ("codebooks", Dtype::F16, &[1, 256, 1, 8])]),
            ("EXL2 ", &[("q_weight", Dtype::I32, &[8, 64])]),
            ("EETQ ", &[("weight", Dtype::I8, &[64, 64]), ("weight_scales", Dtype::F16, &[64])]),
            ("MXFP4 ", &[("up_proj_blocks", Dtype::U8, &[64, 2, 16]), ("up_proj_scales", Dtype::U8, &[64, 2])]),
        ];
        for (method, entries) in cases {
            let tensors: BTreeMap<String, FolderTensor> = entries
                .iter()
                .map(|(leaf, dtype, shape)| (format!("model.layers.0.mlp.{leaf}"), tensor(*dtype, shape)))
                .collect();
            let error = message(refuse_inferred(Path::new("models/x"), &tensors));
            assert!(error.contains(method) && error.contains("model.layers.0.mlp."), "{method}: {error}");
        }
        let plain = [("weight", Dtype::F16), ("bias", Dtype::F32), ("SCB", Dtype::F32), ("weight_format", Dtype::U8)];
        let plain = plain.map(|(leaf, dtype)| (format!("model.layers.0.mlp.up_proj.{leaf}"), tensor(dtype, &[64])));
        refuse_inferred(Path::new("models/x"), &BTreeMap::from(plain)).expect("nothing foreign");
    }
}
