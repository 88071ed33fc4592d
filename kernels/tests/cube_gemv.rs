//! The tensor-core matrix-vector kernel against the generic kernels: every scheme, number of rows, epilogue and half type. Only CUDA
//! has what it takes; elsewhere these tests say that they were left out (`nvrtc` still compiles the kernel).
#![cfg(any(feature = "wgpu", feature = "cuda"))]

use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::ops::Gate;
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Gemv, Norm, Place, Residual, Tuning};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, scheme};

/// Halves for x and for decoded weights, fp32 sums: 2⁻¹¹ a factor, relative to the norm of the result.
const F16_BUDGET: f64 = 1e-3;

/// How much more is allowed where gate and up are multiplied: both are rounded, and the few outputs of a small matrix are led by those
/// whose gate is steep.
const GATED_FACTOR: f64 = 3.0;

/// As above for bf16's 2⁻⁸.
const BF16_BUDGET: f64 = 8e-3;

/// Rows × columns: one tile, ragged numbers of steps, rows wide enough for several steps a plane.
const SHAPES: [(usize, usize); 4] = [(16, 64), (48, 192), (32, 1024), (96, 8192)];

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 24) as f32 - 0.5
        })
        .collect()
}

fn packed(name: &str, double_quant: bool, n: usize, k: usize) -> HostWeight {
    let scheme = scheme(name).expect("a known scheme");
    let block_size = (name != "int8").then_some(64);
    let spec = SchemeSpec { block_size, double_quant, ..SchemeSpec::new(name) };
    let spec = scheme.normalize(&spec).expect("settings that fit");
    HostWeight::Packed(scheme.pack(&spec, &values(n * k, 7), n, k).expect("finite values"))
}

fn weights(n: usize, k: usize) -> Vec<(&'static str, HostWeight, f64)> {
    let f16s: Vec<half::f16> = values(n * k, 3).iter().map(|v| half::f16::from_f32(*v)).collect();
    let bf16s: Vec<half::bf16> = values(n * k, 3).iter().map(|v| half::bf16::from_f32(*v)).collect();
    let dense = |dtype, bytes| HostWeight::Dense(DenseWeight { dtype, n_rows: n, n_cols: k, bytes });
    vec![
        ("nf4", packed("nf4", false, n, k), F16_BUDGET),
        ("nf4 double quant", packed("nf4", true, n, k), F16_BUDGET),
        ("fp4", packed("fp4", false, n, k), F16_BUDGET),
        ("int4", packed("int4", false, n, k), F16_BUDGET),
        ("int8", packed("int8", false, n, k), F16_BUDGET),
        ("f16", dense(DenseType::F16, SharedBytes::from_values(f16s)), F16_BUDGET),
        ("bf16", dense(DenseType::Bf16, SharedBytes::from_values(bf16s)), BF16_BUDGET),
    ]
}

fn floats(client: &Client, values: &[f32]) -> Handle {
    client.create_from_slice(bytemuck::cast_slice(values))
}

fn read(client: &Client, handle: Handle, n: usize) -> Vec<f32> {
    let bytes = client.read_one(handle).expect("readable results");
    bytemuck::pod_collect_to_vec::<u8, f32>(&bytes)[..n].to_vec()
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let noise: f64 = got.iter().zip(want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
    let signal: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
    (noise / signal).sqrt()
}

/// What a launch is asked for beside its matrix.
#[derive(Debug, Clone, Copy)]
struct Call {
    m: usize,
    norm: bool,
    bias: bool,
    epilogue: Epilogue,
}

/// What the generic kernels make of it.
fn reference(client: &Client, matrix: &DeviceMatrix, call: Call, [x, norm, bias, y]: [&[f32]; 4]) -> Vec<f32> {
    let (n, k) = (matrix.n_rows, matrix.n_cols);
    let (x, normed) = (floats(client, x), client.empty(4 * call.m * k));
    let norm = floats(client, norm);
    let step = Residual { x: &x, delta: None, delta_norm: None, norm: Some((&norm, &normed)), eps: 1e-5 };
    cube::add_norm(client, Element::F32, &step, call.m, k);
    let input = if call.norm { &normed } else { &x };
    let out = client.empty(4 * call.m * n);
    let bias = call.bias.then(|| floats(client, bias));
    cube::linear(client, matrix, [Element::F32; 2], input, bias.as_ref(), &out, Place::whole(matrix), call.m);
    let gate = match call.epilogue {
        Epilogue::SiluMul => Gate::Silu,
        Epilogue::GeluMul => Gate::GeluTanh,
        Epilogue::Store => return read(client, out, call.m * n),
        Epilogue::Add => {
            let sums = read(client, out, call.m * n);
            return sums.iter().zip(y).map(|(sum, y)| sum + y).collect();
        }
    };
    let gated = client.empty(2 * call.m * n);
    cube::gate(client, Element::F32, gate, true, &out, &gated, [call.m, n / 2]);
    read(client, gated, call.m * n / 2)
}

#[test]
fn the_tensor_core_kernel_agrees_with_the_generic_ones() {
    let client = cubecl::Device::default().client();
    if client.name() != "cuda" {
        return eprintln!("left out: {} has no tensor-core kernels here", client.name());
    }
    let mut n_calls = 0;
    let mut failures = Vec::new();
    for (n, k) in SHAPES {
        for (name, weight, budget) in weights(n, k) {
            let matrix = DeviceMatrix::upload(&client, &weight).expect("a scheme with kernels");
            // Each combination is compiled by itself: what is independent is not combined.
            for m in if k > 4096 { &[1][..] } else { &[1, 2, 8] } {
                let m = *m;
                let (x, norm, bias) = (values(m * k, 11), values(k, 12), values(n, 13));
                let epilogues = [Epilogue::Store, Epilogue::SiluMul, Epilogue::Add, Epilogue::GeluMul];
                for epilogue in epilogues.into_iter().take(if m == 1 { 4 } else { 2 }) {
                    let is_paired = matches!(epilogue, Epilogue::SiluMul | Epilogue::GeluMul);
                    let call = Call { m, norm: m != 2, bias: epilogue != Epilogue::Store, epilogue };
                    if !cube::gemv_fits(&client, &matrix, m, is_paired) {
                        continue;
                    }
                    let n_out = m * if is_paired { n / 2 } else { n };
                    let before = if epilogue == Epilogue::Add { values(n_out, 14) } else { vec![f32::NAN; n_out] };
                    let want = reference(&client, &matrix, call, [&x, &norm, &bias, &before]);
                    let (x_device, y) = (floats(&client, &x), floats(&client, &before));
                    let (norm_device, bias_device) = (floats(&client, &norm), floats(&client, &bias));
                    let launch = Gemv {
                        x: &x_device,
                        y: &y,
                        m,
                        norm: call.norm.then_some(Norm { weight: &norm_device, eps: 1e-5 }),
                        bias: call.bias.then_some(&bias_device),
                        epilogue,
                    };
                    cube::gemv(&client, &matrix, &launch, Tuning::of(&matrix));
                    let error = relative_error(&read(&client, y, n_out), &want);
                    let budget = if is_paired { GATED_FACTOR * budget } else { budget };
                    if error.is_nan() || error >= budget {
                        failures.push(format!("{name} {n}x{k} {call:?}: relative error {error:.2e}"));
                    }
                    n_calls += 1;
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {n_calls}: {failures:#?}", failures.len());
    assert!(n_calls > 150, "{n_calls} launches were taken");
}
