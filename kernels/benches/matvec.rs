//! Matrix-vector products from stored weights: every scheme beside plain floats of the same shape.
//!
//! `cargo bench -p labpipe-kernels --features burn`

use divan::Bencher;
use divan::counter::ItemsCount;
use labpipe_kernels::burn_ext::linear_into;
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{SchemeSpec, scheme};

/// `[out, in]`: SmolLM2-135M's linears, then Llama-3.2-3B's.
const SHAPES: [(usize, usize); 5] = [(576, 576), (1536, 576), (576, 1536), (3072, 3072), (8192, 3072)];
const KINDS: [&str; 8] = ["f32", "f16", "bf16", "nf4", "nf4-double", "fp4", "int8", "int4"];

fn main() {
    divan::main();
}

fn values(n: usize) -> Vec<f32> {
    let mut state = 1u64;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32 / (1u64 << 23) as f32 - 1.0) * 0.05
        })
        .collect()
}

fn weight(kind: &str, n_rows: usize, n_cols: usize) -> HostWeight {
    let values = values(n_rows * n_cols);
    let dense = |dtype, bytes| HostWeight::Dense(DenseWeight { dtype, n_rows, n_cols, bytes });
    let half = |bits: fn(f32) -> u16| SharedBytes::from_values(values.iter().map(|v| bits(*v)).collect::<Vec<u16>>());
    match kind {
        "f32" => dense(DenseType::F32, SharedBytes::from_values(values)),
        "f16" => dense(DenseType::F16, half(|v| half::f16::from_f32(v).to_bits())),
        "bf16" => dense(DenseType::Bf16, half(|v| half::bf16::from_f32(v).to_bits())),
        _ => {
            let name = kind.trim_end_matches("-double");
            let spec = SchemeSpec { double_quant: name != kind, ..SchemeSpec::new(name) };
            let scheme = scheme(name).expect("a registered scheme");
            HostWeight::Packed(scheme.pack(&spec, &values, n_rows, n_cols).expect("a packed matrix"))
        }
    }
}

/// One vector, all threads: what decoding does. The counter is weights per second.
#[divan::bench(args = SHAPES.iter().flat_map(|shape| KINDS.map(|kind| format!("{}x{} {kind}", shape.0, shape.1))))]
#[expect(clippy::ptr_arg, reason = "divan hands over what it was given")]
fn matvec(bencher: Bencher<'_, '_>, case: &String) {
    let (shape, kind) = case.split_once(' ').expect("a shape and a kind");
    let (rows, cols) = shape.split_once('x').expect("rows and columns");
    let (n_rows, n_cols) = (rows.parse().expect("rows"), cols.parse().expect("columns"));
    let weight = weight(kind, n_rows, n_cols);
    let x = values(n_cols);
    let mut y = vec![0.0f32; n_rows];
    bencher
        .counter(ItemsCount::new(n_rows * n_cols))
        .bench_local(|| linear_into(&weight, &x, 1, divan::black_box(&mut y)));
}
