//! NF4 and FP4 at every block size, with and without double quantization, and LLM.int8(), against bitsandbytes 0.50.2
//! (tests/fixtures/make_bnb_vectors.py).

use half::f16;
use labpipe_kernels::schemes::{Nested, codebook, fp4, nf4};
use labpipe_kernels::{Packed, SchemeSpec, scheme};
use safetensors::{Dtype, SafeTensors};

/// Zeros of FP4: the CPU backend of bitsandbytes gives a value that rounds to zero either of them, its CUDA kernel (and labpipe) the
/// one with the value's sign.
const ZEROS: [u8; 2] = [0, 8];

fn with_fixture(test: impl Fn(&Fixture<'_>)) {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/bnb_vectors.safetensors");
    let bytes = std::fs::read(path).expect("the fixture");
    test(&Fixture(SafeTensors::deserialize(&bytes).expect("safetensors")));
}

struct Fixture<'a>(SafeTensors<'a>);

impl Fixture<'_> {
    fn bytes(&self, name: &str) -> Vec<u8> {
        self.0.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}")).data().to_vec()
    }

    fn floats(&self, name: &str) -> Vec<f32> {
        let tensor = self.0.tensor(name).unwrap_or_else(|error| panic!("{name}: {error}"));
        match tensor.dtype() {
            Dtype::F32 => tensor.data().as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw)).collect(),
            Dtype::F16 => {
                tensor.data().as_chunks::<2>().0.iter().map(|raw| f16::from_le_bytes(*raw).to_f32()).collect()
            }
            other => panic!("{name} is {other:?}"),
        }
    }

    /// Calls `check` with every matrix of the two codebooks: its prefix, what labpipe makes of it, its values.
    fn each(&self, check: impl Fn(&str, &Packed)) {
        let mut n_seen = 0;
        for name in self
            .0
            .names()
            .iter()
            .filter_map(|name| name.strip_suffix(".codes"))
            .filter(|name| !name.starts_with("int8"))
        {
            let parts: Vec<&str> = name.split('.').collect();
            let (kind, shape) = (parts[0], parts[parts.len() - 1]);
            let block_size = parts[1].trim_start_matches("bs").parse().expect("a block size");
            let double_quant = parts.contains(&"dq");
            let (n_rows, n_cols) = shape.split_once('x').expect("a shape");
            let (n_rows, n_cols) = (n_rows.parse().expect("rows"), n_cols.parse().expect("columns"));
            let spec = SchemeSpec { block_size: Some(block_size), double_quant, ..SchemeSpec::new(kind) };
            let values = self.floats(&format!("in.{shape}"));
            check(
                name,
                &scheme(kind).expect("a scheme").pack(&spec, &values, n_rows, n_cols).expect("a packed matrix"),
            );
            n_seen += 1;
        }
        assert_eq!(n_seen, 2 * 2 * (3 + 6));
    }
}

#[test]
fn the_tables_equal_the_reference() {
    with_fixture(|fixture| {
        assert_eq!(nf4::TABLE.to_vec(), fixture.floats("nf4.table"));
        assert_eq!(fp4::TABLE.to_vec(), fixture.floats("fp4.table"));
    });
}

#[test]
fn codes_equal_the_reference_at_every_block_size() {
    with_fixture(|fixture| {
        fixture.each(|name, packed| {
            let expected = fixture.bytes(&format!("{name}.codes"));
            assert_eq!(packed.codes.len(), expected.len(), "{name}");
            for (i, (found, expected)) in packed.codes.iter().zip(&expected).enumerate() {
                for (found, expected) in [(found >> 4, expected >> 4), (found & 15, expected & 15)] {
                    let both_zero = name.starts_with("fp4") && ZEROS.contains(&found) && ZEROS.contains(&expected);
                    assert!(found == expected || both_zero, "{name} byte {i}: {found} against {expected}");
                }
            }
        });
    });
}

#[test]
fn block_scales_equal_the_reference_and_nested_statistics_agree_within_1e_6() {
    with_fixture(|fixture| {
        fixture.each(|name, packed| match &packed.nested {
            None => assert_eq!(packed.scales, fixture.floats(&format!("{name}.absmax")), "{name}"),
            Some(nested) => {
                let close = |found: f32, expected: f32| (found - expected).abs() <= 1e-6 * expected.abs();
                assert!(close(nested.offset, fixture.floats(&format!("{name}.offset"))[0]), "{name}");
                let expected = fixture.floats(&format!("{name}.nested_absmax"));
                assert_eq!(nested.absmax.len(), expected.len(), "{name}");
                assert!(nested.absmax.iter().zip(expected).all(|(found, expected)| close(*found, expected)), "{name}");
                assert_eq!(nested.codes, fixture.bytes(&format!("{name}.absmax")), "{name}");
            }
        });
    });
}

#[test]
fn decoding_the_reference_s_own_bytes_is_exact() {
    with_fixture(|fixture| {
        fixture.each(|name, packed| {
            let codes = fixture.bytes(&format!("{name}.codes"));
            let packed = match &packed.nested {
                None => Packed { codes, ..packed.clone() },
                Some(_) => {
                    let nested = Nested {
                        codes: fixture.bytes(&format!("{name}.absmax")),
                        absmax: fixture.floats(&format!("{name}.nested_absmax")),
                        offset: fixture.floats(&format!("{name}.offset"))[0],
                    };
                    let scales = codebook::decode_nested(&nested);
                    Packed { codes, scales, nested: Some(nested), ..packed.clone() }
                }
            };
            let expected = fixture.floats(&format!("{name}.values"));
            let mut found = vec![f32::NAN; expected.len()];
            let first_row = packed.n_rows - expected.len() / packed.n_cols;
            scheme(&packed.spec.scheme).expect("a scheme").unpack_rows(&packed, first_row, &mut found);
            assert_eq!(found, expected, "{name}");
        });
    });
}

#[test]
fn llm_int8_equals_the_reference_with_and_without_its_outlier_columns() {
    with_fixture(|fixture| {
        let (w, x) = (fixture.floats("int8.w"), fixture.floats("int8.x"));
        for threshold in [6.0f32, 0.0] {
            let spec = SchemeSpec { outlier_threshold: Some(threshold), ..SchemeSpec::new("int8") };
            let int8 = scheme("int8").expect("int8");
            let packed = int8.pack(&spec, &w, 24, 96).expect("a packed matrix");
            assert_eq!(packed.codes, fixture.bytes("int8.codes"));
            assert_eq!(packed.scales, fixture.floats("int8.absmax"));
            let mut found = vec![f32::NAN; 7 * 24];
            assert!(int8.product(&packed, &x, 7, &mut found));
            for (i, (found, expected)) in
                found.iter().zip(fixture.floats(&format!("int8.t{threshold}.product"))).enumerate()
            {
                // This backend writes 1/127² as 6.200124e-5, 1.8e-5 more than it is; products are below 30.
                assert!((found - expected).abs() <= 6e-4, "threshold {threshold}, {i}: {found} against {expected}");
            }
        }
    });
}
