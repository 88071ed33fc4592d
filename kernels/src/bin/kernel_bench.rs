//! Times the kernels on a CUDA device, one recorded graph a row: checked against the generic kernel first, weights rotated so that
//! L2 does not hold them. `kernel-bench [gemv|gemm|sweep]`.

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use labpipe_kernels::cube::cublas::{Cublas, Operand};
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Gemv, Kind, Norm, Tuning};
use labpipe_kernels::dense::DenseType;
use labpipe_kernels::weight::{DenseWeight, HostWeight, SharedBytes};
use labpipe_kernels::{Packed, SchemeSpec};
use std::time::Instant;

/// Bytes that the copies of a matrix fill together: several times any L2.
const ROTATED_BYTES: usize = 400 << 20;

#[cube(launch_unchecked)]
fn copy_kernel(from: &[Vector<u32, Const<4>>], to: &mut [Vector<u32, Const<4>>], n: u32) {
    let mut at = ABSOLUTE_POS as u32;
    let stride = CUBE_COUNT_X * CUBE_DIM_X;
    while at < n {
        to[at as usize] = from[at as usize];
        at += stride;
    }
}

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    fn floats(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| (self.next() as f32 / u32::MAX as f32 - 0.5) * 0.2).collect()
    }
}

/// Makes a packed matrix of random codes: packing 50 million values on the host would take longer than the measurement.
fn random_weight(kind: &str, n: usize, k: usize, random: &mut Random) -> HostWeight {
    let spec =
        |scheme: &str, block_size, double_quant| SchemeSpec { block_size, double_quant, ..SchemeSpec::new(scheme) };
    let words = |n: usize, random: &mut Random| (0..n).flat_map(|_| random.next().to_le_bytes()).collect::<Vec<u8>>();
    match kind {
        "f16" => {
            let values: Vec<half::f16> = random.floats(n * k).into_iter().map(half::f16::from_f32).collect();
            let bytes = SharedBytes::from_values(values);
            HostWeight::Dense(DenseWeight { dtype: DenseType::F16, n_rows: n, n_cols: k, bytes })
        }
        "int8" => HostWeight::Packed(Packed {
            spec: spec("int8", None, false),
            n_rows: n,
            n_cols: k,
            codes: words(n * k / 4, random),
            scales: random.floats(n).iter().map(|v| v.abs()).collect(),
            zeros: Vec::new(),
            nested: None,
        }),
        _ => {
            let double_quant = kind == "nf4-double";
            let name = if kind == "int4" { "int4" } else { "nf4" };
            let block = if kind == "int4" { 128 } else { 64 };
            let scales: Vec<f32> = random.floats(n * k / block).iter().map(|v| 0.01 + v.abs()).collect();
            let nested = double_quant.then(|| labpipe_kernels::schemes::nf4::nest(&scales));
            let zeros = (0..n * k / block).map(|_| (random.next() % 16) as u8).collect();
            HostWeight::Packed(Packed {
                spec: spec(name, Some(block), double_quant),
                n_rows: n,
                n_cols: k,
                codes: words(n * k / 8, random),
                scales: match &nested {
                    Some(nested) => labpipe_kernels::schemes::nf4::decode_nested(nested),
                    None => scales,
                },
                zeros,
                nested,
            })
        }
    }
}

/// Returns seconds for one call of `launch`, which is given how often it ran: the median of several replays of a recorded graph.
fn time(client: &Client, n_calls: usize, mut launch: impl FnMut(usize)) -> Option<f64> {
    client.graph_prepare().ok()?;
    for i in 0..n_calls {
        launch(i);
    }
    cubecl::future::block_on(client.sync()).ok()?;
    client.start_capture().ok()?;
    for i in 0..n_calls {
        launch(i);
    }
    let graph = client.stop_capture().map_err(|error| eprintln!("capture: {error}")).ok()?;
    let mut samples = Vec::new();
    for _ in 0..7 {
        let start = Instant::now();
        for _ in 0..5 {
            // SAFETY: all buffers of the recorded launches are still held.
            unsafe { graph.replay() }.ok()?;
        }
        cubecl::future::block_on(client.sync()).ok()?;
        samples.push(start.elapsed().as_secs_f64() / (5 * n_calls) as f64);
    }
    samples.sort_by(f64::total_cmp);
    Some(samples[samples.len() / 2])
}

fn read(client: &Client, handle: &Handle) -> Vec<f32> {
    let bytes = client.read_one(handle.clone()).map(|bytes| bytes.to_vec()).unwrap_or_default();
    bytes.chunks_exact(4).map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])).collect()
}

fn relative_error(got: &[f32], want: &[f32]) -> f64 {
    let noise: f64 = got.iter().zip(want).map(|(g, w)| f64::from(g - w).powi(2)).sum();
    let signal: f64 = want.iter().map(|w| f64::from(*w).powi(2)).sum();
    if got.len() == want.len() { (noise / signal.max(1e-30)).sqrt() } else { f64::NAN }
}

fn copy_ceiling(client: &Client) -> f64 {
    let n_bytes = 1usize << 30;
    let (from, to) = (client.empty(n_bytes), client.empty(n_bytes));
    let n = n_bytes / 16;
    let seconds = time(client, 4, |_| {
        // SAFETY: both buffers hold `n` vectors of 16 bytes.
        unsafe {
            copy_kernel::launch_unchecked(
                client,
                CubeCount::Static(132 * 16, 1, 1),
                CubeDim::new_1d(512),
                BufferArg::from_raw_parts(from.clone(), n),
                BufferArg::from_raw_parts(to.clone(), n),
                n as u32,
            )
        }
    });
    2.0 * n_bytes as f64 / seconds.unwrap_or(f64::INFINITY) / 1e12
}

const SHAPES: [(usize, usize); 5] = [(3072, 3072), (5120, 3072), (8192, 3072), (3072, 8192), (16384, 3072)];

fn gemv_rows(
    client: &Client,
    kinds: &[&str],
    shapes: &[(usize, usize)],
    tunings: &dyn Fn(&DeviceMatrix) -> Vec<Tuning>,
    copy: f64,
    m: usize,
) {
    let mut random = Random(1);
    for kind in kinds {
        for &(n, k) in shapes {
            let weight = random_weight(kind, n, k, &mut random);
            let first = DeviceMatrix::upload(client, &weight).expect("a scheme with kernels");
            let bytes = first.device_bytes() as usize;
            let mut copies = vec![first];
            while copies.len() * bytes < ROTATED_BYTES {
                copies.push(DeviceMatrix::upload(client, &weight).expect("a scheme with kernels"));
            }
            let x = client.create_from_slice(bytemuck::cast_slice(&random.floats(m * k)));
            let norm_weight = client.create_from_slice(bytemuck::cast_slice(&vec![1.0f32; k]));
            let y = client.empty(4 * m * n);
            let want = client.empty(4 * m * n);
            if !cube::gemv_fits(client, &copies[0], m, false) {
                println!("{kind:11} {n:6}x{k:<5} m={m}  not taken");
                continue;
            }
            cube::linear(client, &copies[0], [Element::F32; 2], &x, None, &want, cube::Place::whole(&copies[0]), m);
            let want = read(client, &want);
            for tuning in tunings(&copies[0]) {
                let call = |norm: bool, epilogue| Gemv {
                    x: &x,
                    y: &y,
                    m,
                    norm: norm.then_some(Norm { weight: &norm_weight, eps: 1e-5 }),
                    bias: None,
                    epilogue,
                };
                cube::gemv(client, &copies[0], &call(false, Epilogue::Store), tuning);
                let error = relative_error(&read(client, &y), &want);
                let plain = time(client, 4 * copies.len(), |i| {
                    cube::gemv(client, &copies[i % copies.len()], &call(false, Epilogue::Store), tuning);
                });
                let normed = time(client, 4 * copies.len(), |i| {
                    cube::gemv(client, &copies[i % copies.len()], &call(true, Epilogue::Store), tuning);
                });
                let us = |seconds: Option<f64>| seconds.map_or(f64::NAN, |s| s * 1e6);
                let rate = bytes as f64 / us(plain) / 1e6;
                println!(
                    "{kind:11} {n:6}x{k:<5} m={m} p{} u{} c{:<2} b{}  {:7.2} us {rate:5.2} TB/s {:3.0} %  with norm {:7.2} us  error {error:.1e}",
                    tuning.planes,
                    tuning.unroll,
                    tuning.copies,
                    tuning.cubes_a_processor,
                    us(plain),
                    100.0 * rate / copy,
                    us(normed),
                );
            }
        }
    }
}

fn gemm_rows(client: &Client) {
    let mut blas = match Cublas::open(client) {
        Ok(blas) => blas,
        Err(error) => return println!("cuBLAS: {error}"),
    };
    let mut random = Random(2);
    for m in [512usize, 2048] {
        for (n, k) in [(3072usize, 3072usize), (8192, 3072), (3072, 8192), (16384, 3072)] {
            let halves = |n: usize, random: &mut Random| -> Vec<half::f16> {
                random.floats(n).into_iter().map(half::f16::from_f32).collect()
            };
            let (x_host, w_host) = (halves(m * k, &mut random), halves(n * k, &mut random));
            let x = client.create_from_slice(bytemuck::cast_slice(&x_host));
            let w = client.create_from_slice(bytemuck::cast_slice(&w_host));
            let y = client.empty(2 * m * n);
            let operand = |handle| Operand::of(client, handle, Element::F16).expect("a live buffer");
            let (ox, ow, oy) = (operand(&x), operand(&w), operand(&y));
            let mut run = || blas.matmul(client, ox, k, ow, oy, n, [m, n, k]).expect("a product");
            for _ in 0..5 {
                run();
            }
            let bytes = client.read_one(y.clone()).expect("a result");
            let got: Vec<half::f16> =
                bytes.chunks_exact(2).map(|bytes| half::f16::from_le_bytes([bytes[0], bytes[1]])).collect();
            let mut worst = 0.0f64;
            for i in 0..64 {
                let (row, column) = ((i * 31) % m, (i * 97) % n);
                let want: f64 = (0..k).map(|j| x_host[row * k + j].to_f64() * w_host[column * k + j].to_f64()).sum();
                worst = worst.max((got[row * n + column].to_f64() - want).abs());
            }
            let start = Instant::now();
            let n_runs = 50;
            for _ in 0..n_runs {
                run();
            }
            let queued = start.elapsed().as_secs_f64() / f64::from(n_runs);
            cubecl::future::block_on(client.sync()).expect("a sync");
            let _ = client.read_one(y.clone());
            let seconds = start.elapsed().as_secs_f64() / f64::from(n_runs);
            println!(
                "gemm f16    m={m} {n:6}x{k:<5} {:7.1} us {:6.1} TFLOP/s, host {:5.1} us a call, worst error {worst:.1e}",
                seconds * 1e6,
                2.0 * (m * n * k) as f64 / seconds / 1e12,
                queued * 1e6
            );
        }
    }
}

fn main() {
    let mode = std::env::args().nth(1).unwrap_or_else(|| "gemv".to_owned());
    let client = cubecl::Device::cuda(0).expect("a CUDA device").client();
    let copy = copy_ceiling(&client);
    println!("copy {copy:.2} TB/s");
    if mode == "gemm" || mode == "all" {
        gemm_rows(&client);
    }
    if mode == "sweep" || mode == "all" {
        let many = |matrix: &DeviceMatrix| {
            let mut tunings = Vec::new();
            let (copies, shapes): (u32, &[(u32, u32)]) = match matrix.kind {
                Kind::Codebook4 => (32, &[(4, 6), (8, 3), (8, 6), (16, 2), (16, 3)]),
                _ => (1, &[(4, 3), (4, 6), (8, 2), (8, 3), (16, 2)]),
            };
            for &(planes, unroll) in shapes {
                for cubes_a_processor in [1, 2, 4, 6] {
                    tunings.push(Tuning { planes, unroll, copies, cubes_a_processor });
                }
            }
            tunings
        };
        gemv_rows(&client, &["nf4-double", "int8", "f16"], &SHAPES[1..], &many, copy, 1);
    }
    let best = |matrix: &DeviceMatrix| vec![Tuning::of(matrix)];
    for m in [1, 4, 8] {
        gemv_rows(&client, &["nf4", "nf4-double", "int4", "int8", "f16"], &SHAPES, &best, copy, m);
    }
}
