//! Times the kernels on a CUDA device, one recorded graph a row: checked against the generic kernels first, weights rotated so that
//! L2 does not hold them. `kernel-bench [gemv|gemm|step|sweep [KINDS]|once [KIND]]`; `once` is what a profiler looks at.

mod products;
mod step;
mod weights;

use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;
use labpipe_kernels::cube::nvidia::CudaParts;
use labpipe_kernels::cube::overlap;
use std::time::Instant;

#[cube(launch_unchecked)]
fn copy_kernel(from: &[Vector<u32, Const<4>>], to: &mut [Vector<u32, Const<4>>], n: u32) {
    let mut at = ABSOLUTE_POS as u32;
    let stride = CUBE_COUNT_X * CUBE_DIM_X;
    while at < n {
        to[at as usize] = from[at as usize];
        at += stride;
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
    if overlap::is_known(client) {
        overlap::overlap(client).map_err(|error| eprintln!("{error}")).ok()?;
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

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mode = std::env::args().nth(1).unwrap_or_else(|| "gemv".to_owned());
    if !["gemv", "gemm", "step", "sweep", "once"].contains(&mode.as_str()) {
        return Err(format!("kernel-bench knows gemv, gemm, step, sweep and once, not {mode:?}").into());
    }
    // The driver is asked first: cubecl panics where there is none.
    if let Some(missing) = CudaParts::find().missing(0) {
        return Err(format!("kernel-bench takes an NVIDIA GPU: {missing}").into());
    }
    let client = cubecl::Device::cuda(0)?.client();
    let copy = copy_ceiling(&client);
    println!("copy {copy:.2} TB/s");
    match mode.as_str() {
        "gemm" => products::gemm_rows(&client)?,
        "step" => step::step_rows(&client, copy),
        "sweep" => step::sweep_rows(&client, copy),
        "once" => step::once(&client),
        _ => {
            for m in [1, 4, 8] {
                products::gemv_rows(&client, &["nf4", "nf4-double", "int4", "int8", "f16"], copy, m);
            }
        }
    }
    Ok(())
}
