//! Every scheme on ragged shapes and bad input: round trips under named budgets, products against decoded values.

use labpipe_kernels::{SCHEMES, Scheme, SchemeError, SchemeSpec, reconstruction_error, scheme};
use proptest::prelude::*;

/// Lowest signal-to-noise ratio of a round trip of normal values, dB.
const BUDGET_DB: [(&str, f64); 5] = [("nf4", 20.0), ("fp4", 17.0), ("int8", 40.0), ("int4", 18.0), ("mxfp4", 17.0)];
/// Largest difference between a product from codes and one from decoded values, relative to Σ|w·x|.
const MATVEC_BUDGET: f32 = 2e-6;

fn spec(name: &str) -> SchemeSpec {
    SchemeSpec::new(name)
}

fn variants() -> Vec<SchemeSpec> {
    let mut variants: Vec<SchemeSpec> = SCHEMES.iter().map(|scheme| spec(scheme.name())).collect();
    variants.push(SchemeSpec { double_quant: true, ..spec("nf4") });
    variants.push(SchemeSpec { block_size: Some(128), ..spec("nf4") });
    variants.push(SchemeSpec { block_size: Some(1024), double_quant: true, ..spec("fp4") });
    variants.push(SchemeSpec { symmetric: true, ..spec("int4") });
    variants.push(SchemeSpec { block_size: Some(32), ..spec("int4") });
    variants
}

fn get(spec: &SchemeSpec) -> &'static dyn Scheme {
    scheme(&spec.scheme).expect("a registered scheme")
}

/// Sums of uniform numbers: nearly normal, the same in every run.
fn normal(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    (0..n).map(|_| (0..6).map(|_| uniform()).sum::<f32>() - 3.0).collect()
}

#[test]
fn round_trips_stay_within_their_error_budget_on_ragged_shapes() {
    for spec in variants() {
        for (n_rows, n_cols) in [(16, 256), (64, 172), (5, 64), (3, 1000)] {
            let values = normal(n_rows * n_cols, 7);
            let packed = get(&spec).pack(&spec, &values, n_rows, n_cols).expect("a packed matrix");
            let (mse, sqnr_db) = reconstruction_error(&values, &packed);
            let budget = BUDGET_DB.iter().find(|(name, _)| *name == spec.scheme).expect("a budget").1;
            assert!(mse > 0.0 && sqnr_db.expect("a ratio") > budget, "{spec:?} {n_rows}x{n_cols}: {sqnr_db:?}");
        }
    }
}

#[test]
fn zeros_stay_zeros_and_nf4_decodes_them_to_minus_zero() {
    for spec in variants() {
        let packed = get(&spec).pack(&spec, &[0.0; 130], 1, 130).expect("a packed matrix");
        let mut out = [f32::NAN; 130];
        get(&spec).unpack_rows(&packed, 0, &mut out);
        assert!(out.iter().all(|value| *value == 0.0), "{spec:?}");
        if spec.scheme == "nf4" && !spec.double_quant {
            assert!(packed.codes.iter().all(|code| *code == 0) && out.iter().all(|value| value.is_sign_negative()));
        }
    }
}

#[test]
fn values_that_are_not_finite_and_shapes_that_do_not_fit_are_refused() {
    for spec in variants() {
        let mut values = vec![1.0f32; 64];
        assert!(matches!(get(&spec).pack(&spec, &values, 3, 30), Err(SchemeError::Shape { .. })));
        values[9] = f32::NAN;
        let error = get(&spec).pack(&spec, &values, 1, 64).expect_err("an error");
        assert!(matches!(error, SchemeError::NotFinite { index: 9, .. }), "{error:?}");
    }
    assert!(scheme("nf5").is_err());
    let bad = SchemeSpec { block_size: Some(63), ..spec("nf4") };
    assert!(matches!(get(&bad).normalize(&bad), Err(SchemeError::BlockSize { found: 63, .. })));
}

#[test]
fn an_odd_number_of_values_packs_code_7_behind_the_last() {
    let packed = get(&spec("nf4")).pack(&spec("nf4"), &[1.0, -1.0, 1.0], 1, 3).expect("a packed matrix");
    assert_eq!(packed.codes, [0xf0, 0xf7]);
}

#[test]
fn packed_bytes_change_only_with_the_scheme_s_version() {
    let golden =
        [("nf4", 1, 0x3829_u16), ("fp4", 1, 0xfe57), ("int8", 1, 0x90ab), ("int4", 2, 0x7de3), ("mxfp4", 1, 0xa309)];
    let values = normal(4 * 96, 3);
    for (name, version, digest) in golden {
        let packed = get(&spec(name)).pack(&spec(name), &values, 4, 96).expect("a packed matrix");
        let bytes = packed.codes.iter().copied().chain(packed.scales.iter().flat_map(|scale| scale.to_le_bytes()));
        let found = bytes.fold(0u16, |hash, byte| hash.rotate_left(5) ^ u16::from(byte).wrapping_mul(0x9e37));
        assert_eq!((get(&spec(name)).version(), found), (version, digest), "{name}: found {found:#06x}");
    }
}

proptest! {
    #[test]
    fn products_from_codes_equal_products_of_decoded_values(
        n_rows in 1usize..9, n_cols in 1usize..300, seed in 0u64..1000, variant in 0..variants().len()
    ) {
        let spec = &variants()[variant];
        let values = normal(n_rows * n_cols, seed);
        let x = normal(n_cols, seed + 1);
        let packed = get(spec).pack(spec, &values, n_rows, n_cols).expect("a packed matrix");
        let mut decoded = vec![f32::NAN; n_rows * n_cols];
        get(spec).unpack_rows(&packed, 0, &mut decoded);
        let mut y = vec![f32::NAN; n_rows];
        get(spec).matvec_rows(&packed, 0, &x, &mut y);
        for (row, y) in decoded.chunks_exact(n_cols).zip(&y) {
            let exact: f64 = row.iter().zip(&x).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
            let size: f32 = row.iter().zip(&x).map(|(w, x)| (w * x).abs()).sum();
            prop_assert!((*y - exact as f32).abs() <= MATVEC_BUDGET * size + 1e-12, "{} against {}", y, exact);
        }
        let last = n_rows - 1;
        let mut row = vec![f32::NAN; n_cols];
        get(spec).unpack_rows(&packed, last, &mut row);
        prop_assert_eq!(&row[..], &decoded[last * n_cols..]);
    }
}

#[test]
fn outlier_columns_are_multiplied_in_full_and_others_in_8_bits() {
    let (n_rows, n_cols, m) = (40, 96, 9);
    let w = normal(n_rows * n_cols, 5);
    let mut x = normal(m * n_cols, 6);
    x[3 * n_cols + 7] = 60.0;
    let error = |threshold: Option<f32>| {
        let spec = SchemeSpec { outlier_threshold: threshold, ..spec("int8") };
        let packed = get(&spec).pack(&spec, &w, n_rows, n_cols).expect("a packed matrix");
        let mut out = vec![f32::NAN; m * n_rows];
        assert_eq!(get(&spec).product(&packed, &x, m, &mut out), threshold.is_some());
        let mut decoded = vec![f32::NAN; n_rows * n_cols];
        get(&spec).unpack_rows(&packed, 0, &mut decoded);
        let products = x
            .chunks_exact(n_cols)
            .flat_map(|x| decoded.chunks_exact(n_cols).map(move |w| w.iter().zip(x).map(|(w, x)| w * x).sum::<f32>()));
        let one_by_one: Vec<f32> = x
            .chunks_exact(n_cols)
            .flat_map(|x| {
                let mut y = vec![f32::NAN; n_rows];
                get(&spec).product(&packed, x, 1, &mut y);
                y
            })
            .collect();
        let worst =
            |out: &[f32]| products.clone().zip(out).map(|(exact, found)| (exact - found).abs()).fold(0.0, f32::max);
        (worst(&out), worst(&one_by_one))
    };
    // A row with an outlier keeps its resolution only where the outlier is left out of its scale.
    let ((split, split_alone), (whole, _)) = (error(Some(6.0)), error(Some(0.0)));
    assert!(split < 0.3 && split_alone < 0.3 && whole > 2.0 * split, "{split} {split_alone} {whole}");
    for bad in [-1.0, f32::NAN, f32::INFINITY] {
        let bad = SchemeSpec { outlier_threshold: Some(bad), ..spec("int8") };
        assert!(matches!(get(&bad).normalize(&bad), Err(SchemeError::Threshold { .. })));
    }
    let misplaced = SchemeSpec { outlier_threshold: Some(6.0), ..spec("nf4") };
    assert!(matches!(get(&misplaced).normalize(&misplaced), Err(SchemeError::Setting { .. })));
}

#[test]
fn int4_scales_are_values_of_fp16_and_never_decode_to_nan() {
    let int4 = get(&spec("int4"));
    // The smallest scale, 1e-5/15, is a subnormal of fp16; the largest saturates.
    let tiny = int4.pack(&spec("int4"), &[0.0, 1e-6], 1, 2).expect("a packed matrix");
    assert_eq!(tiny.scales, [half::f16::from_f32(1e-5 / 15.0).to_f32()]);
    let huge = int4.pack(&spec("int4"), &[-3e38, 3e38], 1, 2).expect("a packed matrix");
    let mut out = [f32::NAN; 2];
    int4.unpack_rows(&huge, 0, &mut out);
    assert!(out.iter().all(|value| value.is_finite()), "{out:?}");
}

#[test]
fn int4_follows_its_formula_with_and_without_zero_points() {
    let half = |value: f32| half::f16::from_f32(value).to_f32();
    let (n_rows, n_cols, group) = (3, 100, 32);
    let values: Vec<f32> = normal(n_rows * n_cols, 11).iter().map(|value| value * 0.02 + 0.004).collect();
    for symmetric in [false, true] {
        let spec = SchemeSpec { block_size: Some(group), symmetric, ..spec("int4") };
        let packed = get(&spec).pack(&spec, &values, n_rows, n_cols).expect("a packed matrix");
        let mut decoded = vec![f32::NAN; values.len()];
        get(&spec).unpack_rows(&packed, 0, &mut decoded);
        let groups = values.chunks(n_cols).flat_map(|row| row.chunks(group));
        let decoded = decoded.chunks(n_cols).flat_map(|row| row.chunks(group));
        for (i, (group, decoded)) in groups.zip(decoded).enumerate() {
            let max = group.iter().copied().fold(f32::MIN, f32::max);
            let min = group.iter().copied().fold(f32::MAX, f32::min);
            let (scale, zero) = if symmetric {
                (half(max.abs().max(min.abs()).max(1e-5) / 7.0), 8.0)
            } else {
                let scale = half((max - min).max(1e-5) / 15.0);
                (scale, (-min / scale).round_ties_even().clamp(0.0, 15.0))
            };
            assert_eq!((packed.scales[i], f32::from(packed.zeros[i])), (scale, zero), "group {i}");
            for (value, decoded) in group.iter().zip(decoded) {
                let code = (value / scale + zero).round_ties_even().clamp(0.0, 15.0);
                assert_eq!(*decoded, (code - zero) * scale, "group {i}");
            }
        }
    }
}
