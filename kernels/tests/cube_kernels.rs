//! The cubecl kernels against the host's schemes, on ragged and tiny shapes, with poisoned outputs.
//!
//! They run on whatever device cubecl finds first among the runtimes linked: CUDA where there is a GPU, else wgpu, which a software
//! Vulkan serves too.
#![cfg(any(feature = "wgpu", feature = "cuda"))]

mod support;

use cubecl::client::Client;
use labpipe_kernels::cube::ops::Heads;
use labpipe_kernels::cube::{self, DecodeScratch, DeviceMatrix, Element, LayerCache, Piece, Place};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, scheme};
use support::values;

/// fp32 sums in another order: relative to the norm of the result.
const SUM_BUDGET: f64 = 2e-6;

fn client() -> Client {
    cubecl::Device::default().client()
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
    // Its kernels take rows of whole groups.
    let mxfp4 = k.is_multiple_of(32).then(|| ("mxfp4".to_owned(), packed("mxfp4", None, false, false, n, k)));
    let others = vec![
        ("nf4".to_owned(), packed("nf4", None, false, false, n, k)),
        ("nf4 blocks of 256".to_owned(), packed("nf4", Some(256), false, false, n, k)),
        ("nf4 double quant".to_owned(), packed("nf4", None, true, false, n, k)),
        ("fp4".to_owned(), packed("fp4", None, false, false, n, k)),
        ("fp4 double quant".to_owned(), packed("fp4", None, true, false, n, k)),
        ("int8".to_owned(), packed("int8", None, false, false, n, k)),
        ("int4".to_owned(), packed("int4", None, false, false, n, k)),
        ("int4 symmetric, groups of 32".to_owned(), packed("int4", Some(32), false, true, n, k)),
        ("f32".to_owned(), dense(DenseType::F32, SharedBytes::from_values(f32s))),
        ("f16".to_owned(), dense(DenseType::F16, SharedBytes::from_values(f16s))),
        ("bf16".to_owned(), dense(DenseType::Bf16, SharedBytes::from_values(bf16s))),
    ];
    mxfp4.into_iter().chain(others).collect()
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
fn a_piece_of_a_matrix_is_the_rows_and_columns_that_it_names() {
    let client = client();
    // Columns in whole eights, and ragged ones; rows on both sides of a gap, and one run of them.
    for (n, k, rows, cols) in [
        (48, 64, [3..10, 30..37], 8..40),
        (65, 172, [0..1, 64..65], 3..172),
        (130, 320, [17..130, 0..0], 64..320),
        (130, 320, [5..6, 9..11], 0..320),
    ] {
        for (name, weight) in weights(n, k) {
            let matrix = DeviceMatrix::upload(&client, &weight).expect("a known scheme");
            let piece = Piece { rows: rows.clone(), cols: cols.clone() };
            let n_values = piece.n_rows() * cols.len();
            let out = client.create_from_slice(bytemuck::cast_slice(&vec![f32::NAN; n_values + 1]));
            cube::dequantize_piece(&client, &matrix, Element::F32, &piece, &out);
            let got = read(&client, out, n_values + 1);
            let whole = client.empty(4 * n * k);
            cube::dequantize(&client, &matrix, Element::F32, 0, n, &whole);
            let whole = read(&client, whole, n * k);
            let want = rows.iter().cloned().flatten().flat_map(|row| &whole[row * k..][cols.clone()]);
            assert!(want.eq(&got[..n_values]), "{name} {n}x{k}, rows {rows:?}, columns {cols:?}");
            assert!(got[n_values].is_nan(), "{name} {n}x{k} writes behind its end");
        }
    }
}

#[test]
fn products_are_added_to_what_is_there() {
    let client = client();
    let (m, n, k, stride, y_first) = (9, 65, 172, 80, 10);
    let x = values(m * k, 11);
    let x_device = client.create_from_slice(bytemuck::cast_slice(&x));
    let before = values(m * stride, 5);
    let place = Place { x_row: 0, y_first, y_stride: stride };
    for (name, weight) in weights(n, k) {
        let matrix = DeviceMatrix::upload(&client, &weight).expect("a known scheme");
        let y = client.create_from_slice(bytemuck::cast_slice(&before));
        cube::linear_add(&client, &matrix, [Element::F32; 2], [&x_device, &y], place, m);
        let got = read(&client, y, m * stride);
        let mut want = before.clone();
        for (x, y) in x.chunks_exact(k).zip(want.chunks_exact_mut(stride)) {
            let mut row = vec![0.0f32; n];
            weight.matvec_rows(0, x, &mut row);
            row.iter().zip(&mut y[y_first..]).for_each(|(value, y)| *y += value);
        }
        let error = relative_error(&got, &want);
        assert!(error < SUM_BUDGET, "{name}: relative error {error:.2e}");
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

/// One token behind a cache of random keys and values: the fused kernel against the generic ones.
#[test]
fn decode_attention_agrees_with_the_generic_kernels_at_every_split() {
    let client = client();
    for (n_heads, n_kv_heads, head_dim, capacity, position, window) in [
        (4, 4, 64, 64, 0, u32::MAX),
        (6, 2, 64, 200, 63, u32::MAX),
        (6, 2, 64, 200, 64, u32::MAX),
        (8, 1, 128, 300, 257, u32::MAX),
        (3, 1, 128, 300, 299, 70),
        (6, 2, 64, 600, 513, u32::MAX),
        (3, 1, 128, 5000, 4700, u32::MAX),
        (3, 1, 128, 5000, 4700, 900),
    ] {
        let heads = Heads { n_heads, n_kv_heads, head_dim, qk_norm: false, rotary_dim: head_dim };
        let n_cache = (n_kv_heads * head_dim) as usize * capacity;
        let float = |n: usize, seed| client.create_from_slice(bytemuck::cast_slice(&values(n, seed)));
        let qkv = float(((n_heads + 2 * n_kv_heads) * head_dim) as usize, 5);
        let rope = float(capacity * head_dim as usize, 6);
        let state = client.create_from_slice(bytemuck::cast_slice(&[position, 0, 0, 0]));
        let n_out = (n_heads * head_dim) as usize;
        let poisoned = || client.create_from_slice(bytemuck::cast_slice(&vec![f32::NAN; n_out]));
        let (got, want, q) = (poisoned(), poisoned(), poisoned());
        let caches: Vec<_> = (0..2).map(|_| (float(n_cache, 8), float(n_cache, 9))).collect();
        let layer = |cache: usize| LayerCache {
            element: Element::F32,
            keys: &caches[cache].0,
            values: &caches[cache].1,
            capacity,
            rope: &rope,
            qk_norm: None,
            eps: 1e-5,
            heads,
            window,
            scale: 3.0,
            soft_cap: None,
        };
        cube::rope_append(&client, Element::F32, &layer(0), &qkv, &q, &state, 1);
        cube::attention(&client, Element::F32, &layer(0), &q, &want, &state, 1);
        let Some(scratch) = DecodeScratch::new(&client, &layer(1)) else {
            return eprintln!("left out: this device's planes are narrower than eight lanes");
        };
        cube::decode_attention(&client, &layer(1), &scratch, &qkv, &got, &state);
        let want = read(&client, want, n_out);
        let error = relative_error(&read(&client, got.clone(), n_out), &want);
        assert!(error < 1e-5, "{n_heads}/{n_kv_heads} x {head_dim} at {position} of {capacity}: {error:.2e}");
        // Again: the counters are as they were.
        cube::decode_attention(&client, &layer(1), &scratch, &qkv, &got, &state);
        assert!(relative_error(&read(&client, got, n_out), &want) < 1e-5);
        for (ours, theirs) in [(&caches[1].0, &caches[0].0), (&caches[1].1, &caches[0].1)] {
            let error = relative_error(&read(&client, ours.clone(), n_cache), &read(&client, theirs.clone(), n_cache));
            assert!(error < 1e-6, "the cache's new row: {error:.2e}");
        }
    }
}
