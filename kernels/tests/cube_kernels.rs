//! The cubecl kernels against the host's schemes, on ragged and tiny shapes, with poisoned outputs.
//!
//! They run on whatever device cubecl finds first among the runtimes linked: CUDA where there is a GPU, else wgpu, which a software
//! Vulkan serves too.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use cubecl::client::Client;
use labpipe_kernels::cube::{self, DeviceMatrix, Element};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, scheme};

/// fp32 sums in another order: relative to the norm of the result.
const SUM_BUDGET: f64 = 2e-6;

fn client() -> Client {
    cubecl::Device::default().client()
}

/// Values like those of a trained layer, from a linear congruential generator.
fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut uniform = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
    };
    (0..n).map(|_| 0.1 * (uniform() + uniform() + uniform())).collect()
}

fn packed(
    name: &str,
    block_size: Option<usize>,
    double_quant: bool,
    symmetric: bool,
    n: usize,
    k: usize,
) -> HostWeight {
    let spec = SchemeSpec { block_size, double_quant, symmetric, ..SchemeSpec::new(name) };
    let scheme = scheme(name).expect("a known scheme");
    let spec = scheme.normalize(&spec).expect("settings that fit");
    HostWeight::Packed(scheme.pack(&spec, &values(n * k, 7), n, k).expect("finite values"))
}

fn weights(n: usize, k: usize) -> Vec<(String, HostWeight)> {
    let f32s = values(n * k, 3);
    let dense = |dtype, bytes| HostWeight::Dense(DenseWeight { dtype, n_rows: n, n_cols: k, bytes });
    let f16s: Vec<half::f16> = f32s.iter().map(|v| half::f16::from_f32(*v)).collect();
    let bf16s: Vec<half::bf16> = f32s.iter().map(|v| half::bf16::from_f32(*v)).collect();
    vec![
        ("nf4".to_owned(), packed("nf4", None, false, false, n, k)),
        ("nf4 blocks of 256".to_owned(), packed("nf4", Some(256), false, false, n, k)),
        ("nf4 double quant".to_owned(), packed("nf4", None, true, false, n, k)),
        ("int8".to_owned(), packed("int8", None, false, false, n, k)),
        ("int4".to_owned(), packed("int4", None, false, false, n, k)),
        ("int4 symmetric, groups of 32".to_owned(), packed("int4", Some(32), false, true, n, k)),
        ("f32".to_owned(), dense(DenseType::F32, SharedBytes::from_values(f32s))),
        ("f16".to_owned(), dense(DenseType::F16, SharedBytes::from_values(f16s))),
        ("bf16".to_owned(), dense(DenseType::Bf16, SharedBytes::from_values(bf16s))),
    ]
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let (mut noise, mut signal) = (0.0f64, 0.0f64);
    for (g, w) in got.iter().zip(want) {
        noise += (f64::from(*g) - f64::from(*w)).powi(2);
        signal += f64::from(*w).powi(2);
    }
    (noise / signal.max(1e-30)).sqrt()
}

fn read(client: &Client, handle: cubecl::server::Handle, n: usize) -> Vec<f32> {
    let bytes = client.read_one(handle).expect("readable results");
    bytemuck::pod_collect_to_vec::<u8, f32>(&bytes)[..n].to_vec()
}

const SHAPES: [(usize, usize); 5] = [(1, 64), (7, 63), (48, 64), (65, 172), (130, 320)];

#[test]
fn dequantized_values_are_the_hosts_bit_for_bit() {
    let client = client();
    for (n, k) in SHAPES {
        for (name, weight) in weights(n, k) {
            let matrix = DeviceMatrix::upload(&client, &weight).expect("a known scheme");
            let out = client.create_from_slice(bytemuck::cast_slice(&vec![f32::NAN; n * k]));
            cube::dequantize(&client, &matrix, Element::F32, 0, n, &out);
            let got = read(&client, out, n * k);
            let mut want = vec![0.0f32; n * k];
            weight.unpack_rows(0, &mut want);
            let max_ulp = max_ulp(&client, &name);
            for (i, (g, w)) in got.iter().zip(&want).enumerate() {
                let ulp = (i64::from(g.to_bits() as i32) - i64::from(w.to_bits() as i32)).abs();
                assert!(ulp <= max_ulp || *g == *w, "{name} {n}x{k} value {i}: {g} for {w}, {ulp} ulp");
            }
        }
    }
}

#[test]
fn products_agree_with_the_host_on_ragged_shapes() {
    let client = client();
    for (n, k) in SHAPES {
        for m in [1, 3, 9] {
            let x = values(m * k, 11);
            let x_device = client.create_from_slice(bytemuck::cast_slice(&x));
            for (name, weight) in weights(n, k) {
                let matrix = DeviceMatrix::upload(&client, &weight).expect("a known scheme");
                let out = client.create_from_slice(bytemuck::cast_slice(&vec![f32::NAN; m * n]));
                cube::linear(
                    &client,
                    &matrix,
                    [Element::F32; 2],
                    &x_device,
                    None,
                    &out,
                    cube::Place::whole(&matrix),
                    m,
                );
                let got = read(&client, out, m * n);
                let mut want = vec![0.0f32; m * n];
                for (x, y) in x.chunks_exact(k).zip(want.chunks_exact_mut(n)) {
                    weight.matvec_rows(0, x, y);
                }
                let error = relative_error(&got, &want);
                assert!(error < SUM_BUDGET, "{name} {m}x{n}x{k}: relative error {error:.2e}");
            }
        }
    }
}

/// CUDA decodes as the host does; a fused multiply-add moves second-level scales, and WGSL may regroup INT8's two factors.
fn max_ulp(client: &Client, name: &str) -> i64 {
    match (client.name(), name) {
        (_, name) if name.contains("double") => 2,
        ("cuda", _) => 0,
        (_, "int8") => 1,
        _ => 0,
    }
}
