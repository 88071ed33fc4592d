//! The extension of burn's cubecl backend against the one on Flex, which the host's schemes compute: every stored form, with few rows of
//! x and with many. It runs on whatever device cubecl finds first, as `cube_kernels` does.
#![cfg(feature = "burn-cube")]

mod support;

use burn::tensor::{DType, Device, Int, Tensor, TensorData};
use labpipe_kernels::burn_ext::row_ops;
use labpipe_kernels::burn_ext::{DeviceWeight, LargeProducts, StoredWeight, exact_matmul, stored_linear, stored_rows};
use labpipe_kernels::cube::DeviceMatrix;
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, scheme};
use std::sync::Arc;
use support::values;

/// fp32 sums in another order, relative to the norm of the result.
const BUDGET: f64 = 5e-6;

fn packed(spec: SchemeSpec, n: usize, k: usize) -> HostWeight {
    let scheme = scheme(&spec.scheme).expect("a known scheme");
    let spec = scheme.normalize(&spec).expect("settings that fit");
    HostWeight::Packed(scheme.pack(&spec, &values(n * k, 7), n, k).expect("finite values"))
}

fn weights(n: usize, k: usize) -> Vec<(&'static str, HostWeight)> {
    let f32s = values(n * k, 3);
    let dense = |dtype, bytes| HostWeight::Dense(DenseWeight { dtype, n_rows: n, n_cols: k, bytes });
    let f16s: Vec<half::f16> = f32s.iter().map(|v| half::f16::from_f32(*v)).collect();
    let bf16s: Vec<half::bf16> = f32s.iter().map(|v| half::bf16::from_f32(*v)).collect();
    let of = |name: &str| packed(SchemeSpec::new(name), n, k);
    vec![
        ("nf4", of("nf4")),
        ("nf4 double quant", packed(SchemeSpec { double_quant: true, ..SchemeSpec::new("nf4") }, n, k)),
        ("fp4", of("fp4")),
        ("mxfp4", of("mxfp4")),
        ("int8", of("int8")),
        ("int4", of("int4")),
        ("f32", dense(DenseType::F32, SharedBytes::from_values(f32s))),
        ("f16", dense(DenseType::F16, SharedBytes::from_values(f16s))),
        ("bf16", dense(DenseType::Bf16, SharedBytes::from_values(bf16s))),
    ]
}

fn placed(weight: &HostWeight, device: &cubecl::Device) -> Arc<StoredWeight> {
    let client = device.client();
    let (matrix, threshold) = match weight {
        HostWeight::Packed(packed) => (DeviceMatrix::upload_packed(&client, packed), packed.spec.outlier_threshold),
        HostWeight::Dense(_) => (DeviceMatrix::upload(&client, weight), None),
    };
    let large = Arc::new(LargeProducts::open(&client));
    let weight = DeviceWeight::new(matrix.expect("a form that kernels know"), device.clone(), threshold, large);
    Arc::new(StoredWeight::Device(weight))
}

fn read<const D: usize>(tensor: Tensor<D>) -> Vec<f32> {
    tensor.into_data_dtype(DType::F32).try_into_vec().expect("f32 values")
}

fn product(x: &[f32], [m, k]: [usize; 2], weight: &Arc<StoredWeight>, device: &Device) -> Vec<f32> {
    let x = Tensor::<2>::from_data(TensorData::new(x.to_vec(), [m, k]), device);
    read(stored_linear(x, weight).expect("a weight where x is"))
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    assert_eq!(got.len(), want.len());
    let noise: f64 = got.iter().zip(want).map(|(g, w)| (f64::from(*g) - f64::from(*w)).powi(2)).sum();
    let signal: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
    (noise / signal.max(1e-30)).sqrt()
}

#[test]
fn products_are_the_hosts() {
    let cube = cubecl::Device::default();
    let (device, host) = (Device::new(cube.clone()), Device::flex());
    for [n, k] in [[192, 128], [70, 96]] {
        for (name, weight) in weights(n, k) {
            let on_device = placed(&weight, &cube);
            let on_host = Arc::new(StoredWeight::Host(weight));
            // One row, a few, and so many that a matrix is decoded first.
            for m in [1, 5, 9, 33] {
                let x = values(m * k, 11);
                let want = product(&x, [m, k], &on_host, &host);
                let got = product(&x, [m, k], &on_device, &device);
                let error = relative_error(&got, &want);
                assert!(error < BUDGET, "{name} [{n}, {k}], {m} rows: {error:.2e}");
            }
        }
    }
}

#[test]
fn large_products_of_halves_without_cublas_are_the_hosts() {
    let cube = cubecl::Device::default();
    let client = cube.client();
    if client.name() != "cuda" {
        return eprintln!("left out: this device computes in f32 alone");
    }
    let (device, host) = (Device::new(cube.clone()), Device::flex());
    // Whole tiles, a head that is decoded in several panels, and sizes that no tile fits.
    for [m, n, k] in [[128, 256, 384], [256, 33_024, 2_048], [67, 70, 96]] {
        for (name, weight) in weights(n, k).into_iter().filter(|(name, _)| ["f16", "bf16", "nf4"].contains(name)) {
            let matrix = DeviceMatrix::upload(&client, &weight).expect("a form that kernels know");
            let large = Arc::new(LargeProducts::with_burn("a test".to_owned()));
            let on_device = Arc::new(StoredWeight::Device(DeviceWeight::new(matrix, cube.clone(), None, large)));
            let on_host = Arc::new(StoredWeight::Host(weight));
            let dtype = if name == "bf16" { DType::BF16 } else { DType::F16 };
            let run = |weight: &Arc<StoredWeight>, device: &Device| {
                let x = Tensor::<2>::from_data(TensorData::new(values(m * k, 11), [m, k]), device).cast(dtype);
                read(stored_linear(x, weight).expect("a weight where x is"))
            };
            let error = relative_error(&run(&on_device, &device), &run(&on_host, &host));
            // Results are rounded to the type; a decoded panel's weights are too.
            let budget = if dtype == DType::BF16 { 4e-3 } else { 1e-3 };
            assert!(error < budget, "{name} [{m}, {k}] · [{n}, {k}]ᵀ: {error:.2e}");
        }
    }
}

#[test]
fn llm_int8_multiplies_as_on_the_host() {
    let cube = cubecl::Device::default();
    let (device, host) = (Device::new(cube.clone()), Device::flex());
    let (n, k) = (72, 160);
    for threshold in [0.0, 6.0] {
        let spec = SchemeSpec { outlier_threshold: Some(threshold), ..SchemeSpec::new("int8") };
        let weight = packed(spec, n, k);
        let on_device = placed(&weight, &cube);
        let on_host = Arc::new(StoredWeight::Host(weight));
        for m in [1, 3, 19] {
            let mut x: Vec<f32> = values(m * k, 5).iter().map(|value| 20.0 * value).collect();
            // Outliers in two columns, one of them in the last row alone.
            x[7] = 61.0;
            x[(m - 1) * k + 90] = -6.5;
            let want = product(&x, [m, k], &on_host, &host);
            let got = product(&x, [m, k], &on_device, &device);
            let error = relative_error(&got, &want);
            assert!(error < 1e-5, "threshold {threshold}, {m} rows: {error:.2e}");
            // Values far from a rounding threshold: the difference to plain INT8 is what quantizing x costs.
            let SchemeSpec { scheme, .. } = SchemeSpec::new("int8");
            let plain = placed(&packed(SchemeSpec::new(&scheme), n, k), &cube);
            let cost = relative_error(&product(&x, [m, k], &plain, &device), &want);
            assert!(cost > 1e-4, "threshold {threshold}, {m} rows: x was not quantized ({cost:.2e})");
        }
    }
}

#[test]
fn rows_of_a_weight_are_the_hosts() {
    let cube = cubecl::Device::default();
    let (device, host) = (Device::new(cube.clone()), Device::flex());
    for (name, weight) in weights(40, 96) {
        let on_device = placed(&weight, &cube);
        let on_host = Arc::new(StoredWeight::Host(weight));
        let rows = |weight: &Arc<StoredWeight>, device: &Device| {
            let ids = Tensor::<1, Int>::from_data(TensorData::new(vec![3i32, 0, 39, 3], [4]), device);
            read(stored_rows(ids, weight).expect("a weight where the ids are"))
        };
        let error = relative_error(&rows(&on_device, &device), &rows(&on_host, &host));
        assert!(error < BUDGET, "{name}: {error:.2e}");
    }
}

#[test]
fn exact_products_of_tensors_are_the_hosts() {
    let (device, host) = (Device::new(cubecl::Device::default()), Device::flex());
    // Grouped heads over keys as attention has them: strided views.
    let run = |device: &Device| {
        let q = Tensor::<3>::from_data(TensorData::new(values(2 * 12 * 16, 1), [2, 12, 16]), device);
        let k = Tensor::<3>::from_data(TensorData::new(values(21 * 2 * 16, 2), [21, 2, 16]), device);
        read(exact_matmul(q, k.permute([1, 2, 0])))
    };
    let error = relative_error(&run(&device), &run(&host));
    assert!(error < 1e-6, "{error:.2e}");
}

#[test]
fn a_weight_that_lies_elsewhere_is_an_error() {
    let cube = cubecl::Device::default();
    let (_, weight) = weights(16, 32).remove(0);
    let on_device = placed(&weight, &cube);
    let x = |device: &Device| Tensor::<2>::from_data(TensorData::new(vec![0.5f32; 32], [1, 32]), device);
    let error = stored_linear(x(&Device::flex()), &on_device).expect_err("nothing is copied in silence");
    assert!(error.to_string().contains("multiply activations on"), "{error}");
    let on_host = Arc::new(StoredWeight::Host(weight));
    assert!(stored_linear(x(&Device::new(cube)), &on_host).is_err());
}

#[test]
fn norms_rotations_and_attention_are_what_their_formulae_say() {
    let device = Device::new(cubecl::Device::default());
    let (n, n_heads, n_kv_heads, head_dim, rotary_dim) = (5, 6, 2, 24, 16);
    let tensor = |values: Vec<f32>, shape: [usize; 2]| Tensor::<2>::from_data(TensorData::new(values, shape), &device);

    let (x, weight) = (values(n * 144, 1), values(144, 2));
    let want: Vec<f32> = x
        .chunks_exact(144)
        .flat_map(|row| {
            let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / 144.0;
            let scale = 1.0 / (mean + 1e-5).sqrt();
            row.iter().zip(&weight).map(move |(v, w)| (f64::from(*v) * scale * f64::from(*w)) as f32)
        })
        .collect();
    let got = read(row_ops::rms_norm(tensor(x.clone(), [n, 144]), tensor(weight.clone(), [1, 144]), 1e-5));
    assert!(relative_error(&got, &want) < 1e-6, "norms: {:.2e}", relative_error(&got, &want));

    // Angles of position i and pair j, the sines negated in the first half.
    let angle = |i: usize, j: usize| 0.3 * i as f32 + 0.7 * (j % (rotary_dim / 2)) as f32;
    let table = |f: &dyn Fn(usize, usize) -> f32| -> Tensor<3> {
        let values: Vec<f32> = (0..n * rotary_dim).map(|at| f(at / rotary_dim, at % rotary_dim)).collect();
        Tensor::from_data(TensorData::new(values, [n, 1, rotary_dim]), &device)
    };
    let cos = table(&|i, j| angle(i, j).cos());
    let sin = table(&|i, j| if j < rotary_dim / 2 { -angle(i, j).sin() } else { angle(i, j).sin() });
    let want: Vec<f32> = (0..n * 144)
        .map(|at| {
            let (i, dim, half) = (at / 144, at % head_dim, rotary_dim / 2);
            match dim {
                dim if dim < half => x[at] * angle(i, dim).cos() - x[at + half] * angle(i, dim).sin(),
                dim if dim < rotary_dim => x[at] * angle(i, dim).cos() + x[at - half] * angle(i, dim).sin(),
                _ => x[at],
            }
        })
        .collect();
    let got = read(row_ops::rotate(tensor(x.clone(), [n, 144]), cos, sin, head_dim));
    assert!(relative_error(&got, &want) < 1e-6, "rotations: {:.2e}", relative_error(&got, &want));

    // Queries from position 3 on over 8 keys; the last case sees three keys each and caps its scores.
    let (k, v) = (values(8 * 48, 4), values(8 * 48, 5));
    for (soft_cap, window) in [(None, None), (Some(0.2f32), Some(3))] {
        let sizes = row_ops::Attention { n_heads, n_kv_heads, head_dim, scale: 2.0, soft_cap, window };
        let position = Tensor::<1, Int>::from_data(TensorData::new(vec![3i32], [1]), &device);
        let [q, keys, sums] = [tensor(x.clone(), [n, 144]), tensor(k.clone(), [8, 48]), tensor(v.clone(), [8, 48])];
        let got = read(row_ops::attention(q, keys, sums, position, sizes));
        let mut want = Vec::new();
        for i in 0..n {
            for head in 0..n_heads {
                let kv = head / (n_heads / n_kv_heads) * head_dim;
                let first = window.map_or(0, |window| (3 + i + 1usize).saturating_sub(window));
                let score = |key: usize| {
                    let at = i * 144 + head * head_dim;
                    let dot: f32 = (0..head_dim).map(|d| x[at + d] * k[key * 48 + kv + d]).sum();
                    soft_cap.map_or(2.0 * dot, |cap| cap * (2.0 * dot / cap).tanh())
                };
                let weights: Vec<f32> = (first..=3 + i).map(|key| score(key).exp()).collect();
                let total: f32 = weights.iter().sum();
                want.extend((0..head_dim).map(|d| {
                    let sum: f32 = (first..).zip(&weights).map(|(key, w)| w * v[key * 48 + kv + d]).sum();
                    sum / total
                }));
            }
        }
        let error = relative_error(&got, &want);
        assert!(error < 2e-6, "attention, window {window:?}: {error:.2e}");
    }
}

#[test]
fn argmax_takes_the_first_of_equal_values() {
    let device = Device::new(cubecl::Device::default());
    let width = 1000;
    let mut rows = vec![-1.0f32; 4 * width];
    // The last value; two equal ones; a row of equal ones; and one whose largest is negative infinity's neighbour.
    rows[width - 1] = 0.5;
    (rows[width + 700], rows[width + 301]) = (2.0, 2.0);
    rows[3 * width..].fill(f32::NEG_INFINITY);
    rows[3 * width + 5] = -3e38;
    let x = Tensor::<2>::from_data(TensorData::new(rows, [4, width]), &device);
    let found: Vec<i64> = row_ops::argmax(x).into_data_dtype(DType::I64).try_into_vec().expect("places");
    assert_eq!(found, [999, 301, 0, 5]);
}
