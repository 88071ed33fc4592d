//! NF4 against bitsandbytes 0.50.2 (tests/fixtures/bnb_nf4_vectors.json at the workspace's root; README.md there).

use labpipe_kernels::schemes::Nested;
use labpipe_kernels::schemes::dynamic_map::dynamic_map;
use labpipe_kernels::schemes::nf4::{TABLE, decode_nested, nest};
use labpipe_kernels::{Packed, SchemeSpec, scheme};
use serde_json::Value;

fn fixture() -> Value {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/bnb_nf4_vectors.json");
    serde_json::from_str(&std::fs::read_to_string(path).expect("the fixture")).expect("JSON")
}

fn floats(value: &Value) -> Vec<f32> {
    value["data"].as_array().expect("a list").iter().map(|v| v.as_f64().expect("a number") as f32).collect()
}

fn bytes(value: &Value) -> Vec<u8> {
    floats(value).iter().map(|v| *v as u8).collect()
}

/// One input of the fixture, e.g. `ragged_5x37` in `float16`.
struct Case {
    fixture: Value,
    prefix: String,
    dtype: &'static str,
}

impl Case {
    fn get(&self, field: &str) -> &Value {
        &self.fixture[format!("{}.{field}", self.prefix)]
    }
}

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for shape in ["randn_64x128", "ragged_5x37", "zeros_4x64"] {
        for dtype in ["float32", "float16"] {
            cases.push(Case { fixture: fixture(), prefix: format!("{shape}.{dtype}.bs64"), dtype });
        }
    }
    cases
}

fn pack(case: &Case, double_quant: bool) -> Packed {
    let shape: Vec<usize> = case.get("in")["shape"]
        .as_array()
        .expect("a shape")
        .iter()
        .map(|n| n.as_u64().expect("a size") as usize)
        .collect();
    let spec = SchemeSpec { block_size: Some(64), double_quant, ..SchemeSpec::new("nf4") };
    scheme("nf4").expect("nf4").pack(&spec, &floats(case.get("in")), shape[0], shape[1]).expect("a packed matrix")
}

fn unpack(packed: &Packed) -> Vec<f32> {
    let mut out = vec![f32::NAN; packed.n_rows * packed.n_cols];
    scheme("nf4").expect("nf4").unpack_rows(packed, 0, &mut out);
    out
}

fn round_to(dtype: &str, values: Vec<f32>) -> Vec<f32> {
    match dtype {
        "float16" => values.into_iter().map(|v| half::f16::from_f32(v).to_f32()).collect(),
        _ => values,
    }
}

#[test]
fn the_dynamic_map_equals_the_reference() {
    assert_eq!(dynamic_map().to_vec(), floats(&fixture()["dynamic_map_256"]));
}

#[test]
fn packed_bytes_absmax_and_values_equal_the_reference() {
    for case in cases() {
        let packed = pack(&case, false);
        assert_eq!(packed.codes, bytes(case.get("packed")), "{}", case.prefix);
        assert_eq!(packed.scales, floats(case.get("absmax")), "{}", case.prefix);
        assert_eq!(round_to(case.dtype, unpack(&packed)), floats(case.get("dequant")), "{}", case.prefix);
    }
    assert_eq!(TABLE.to_vec(), floats(&fixture()["nf4_code"]));
}

#[test]
fn nested_codes_equal_the_reference_and_its_statistics_agree_within_1e_6() {
    for case in cases() {
        let packed = pack(&case, true);
        let nested = packed.nested.as_ref().expect("second-level statistics");
        assert_eq!(nested.codes, bytes(case.get("dq.absmax_u8")), "{}", case.prefix);
        let close = |a: f32, b: f32| (a - b).abs() <= 1e-6 * b.abs();
        assert!(close(nested.offset, floats(case.get("dq.offset"))[0]), "{}", case.prefix);
        for (found, expected) in nested.absmax.iter().zip(floats(case.get("dq.nested_absmax"))) {
            assert!(close(*found, expected), "{}: {found} against {expected}", case.prefix);
        }
    }
}

#[test]
fn decoding_from_the_reference_s_own_statistics_is_exact() {
    for case in cases() {
        let nested = Nested {
            codes: bytes(case.get("dq.absmax_u8")),
            absmax: floats(case.get("dq.nested_absmax")),
            offset: floats(case.get("dq.offset"))[0],
        };
        let packed = Packed { scales: decode_nested(&nested), nested: Some(nested), ..pack(&case, true) };
        assert_eq!(round_to(case.dtype, unpack(&packed)), floats(case.get("dq.dequant")), "{}", case.prefix);
    }
    assert_eq!(nest(&[2.0, 2.0]).offset, 2.0);
}
