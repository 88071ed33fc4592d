//! MXFP4 against torchao 0.18.0 (tests/fixtures/make_mx_vectors.py).

use labpipe_kernels::{SchemeSpec, scheme};
use safetensors::SafeTensors;

#[test]
fn codes_scales_and_values_equal_the_reference() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/mx_vectors.safetensors");
    let bytes = std::fs::read(path).expect("the fixture");
    let fixture = SafeTensors::deserialize(&bytes).expect("safetensors");
    let raw = |name: String| fixture.tensor(&name).unwrap_or_else(|error| panic!("{name}: {error}")).data().to_vec();
    let floats = |name: String| -> Vec<f32> {
        raw(name).as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    for (shape, n_rows, n_cols) in [("16x96", 16, 96), ("7x64", 7, 64)] {
        let mxfp4 = scheme("mxfp4").expect("mxfp4");
        let values = floats(format!("in.{shape}"));
        let packed = mxfp4.pack(&SchemeSpec::new("mxfp4"), &values, n_rows, n_cols).expect("a packed matrix");
        let codes: Vec<u8> = packed.codes.iter().flat_map(|byte| [byte >> 4, byte & 15]).collect();
        assert_eq!(codes, raw(format!("{shape}.codes")), "{shape}");
        let scales: Vec<f64> = packed.scales.iter().map(|scale| f64::from(*scale)).collect();
        let expected: Vec<f64> =
            raw(format!("{shape}.scales")).iter().map(|e8m0| 2.0f64.powi(i32::from(*e8m0) - 127)).collect();
        assert_eq!(scales, expected, "{shape}");
        let mut decoded = vec![f32::NAN; values.len()];
        mxfp4.unpack_rows(&packed, 0, &mut decoded);
        assert_eq!(decoded, floats(format!("{shape}.values")), "{shape}");
    }
}
