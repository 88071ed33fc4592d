//! Products of one matrix: vectors by the tensor-core kernel, many rows by cuBLAS.

use crate::weights::{Random, random_weight};
use crate::{read, relative_error, time};
use cubecl::client::Client;
use labpipe_kernels::cube::cublas::{Cublas, Operand};
use labpipe_kernels::cube::gemv::Epilogue;
use labpipe_kernels::cube::{self, DeviceMatrix, Element, Gemv, Norm, Tuning};
use std::time::Instant;

/// Bytes that the copies of a matrix fill together: several times any L2.
pub const ROTATED_BYTES: usize = 400 << 20;

const SHAPES: [(usize, usize); 5] = [(3072, 3072), (5120, 3072), (8192, 3072), (3072, 8192), (16384, 3072)];

pub fn gemv_rows(client: &Client, kinds: &[&str], copy: f64, m: usize) {
    let mut random = Random(1);
    for kind in kinds {
        for (n, k) in SHAPES {
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
            {
                let tuning = Tuning::of(&copies[0]);
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

pub fn gemm_rows(client: &Client) -> Result<(), Box<dyn std::error::Error>> {
    let mut blas = Cublas::open(client)?;
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
            let operand = |handle| Operand::of(client, handle, Element::F16);
            let (ox, ow, oy) = (operand(&x)?, operand(&w)?, operand(&y)?);
            let mut run = || blas.matmul(client, ox, k, ow, oy, n, [m, n, k], false);
            for _ in 0..5 {
                run()?;
            }
            let bytes = client.read_one(y.clone())?;
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
                run()?;
            }
            let queued = start.elapsed().as_secs_f64() / f64::from(n_runs);
            cubecl::future::block_on(client.sync())?;
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
    Ok(())
}
