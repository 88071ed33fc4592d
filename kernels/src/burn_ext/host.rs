//! `x · Wᵀ` on the host: matrix-vector products straight from the stored form, matrix-matrix products a panel at a time.

use crate::weight::HostWeight;
use rayon::prelude::*;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes of f32 rows that one thread holds dequantized: about the share of L2 that a panel may take.
pub const PANEL_BYTES: usize = 1 << 19;

/// Matrix-vector products of fewer multiply-adds than this are done on the calling thread: handing them out costs more.
const PARALLEL_MIN_MACS: usize = 1 << 16;

/// The same for products of matrices, which do more with each byte.
const PARALLEL_MIN_GEMM_MACS: usize = 1 << 20;

/// From so many rows of x on, a panel's decoding pays and the products go through gemm.
const GEMM_MIN_ROWS: usize = 4;

static PEAK_PANEL_BYTES: AtomicUsize = AtomicUsize::new(0);

/// Returns the largest panel of dequantized rows that any thread has held so far, in bytes.
pub fn peak_panel_bytes() -> usize {
    PEAK_PANEL_BYTES.load(Ordering::Relaxed)
}

/// Writes `x · Wᵀ` into `out`, accumulated in fp32.
///
/// # Shapes
/// `x` `[m, in]`, `weight` `[out, in]`, `out` `[m, out]`, all row-major.
pub fn linear_into(weight: &HostWeight, x: &[f32], m: usize, out: &mut [f32]) {
    let (n_rows, n_cols) = (weight.n_rows(), weight.n_cols());
    assert_eq!(x.len(), m * n_cols, "linear: x does not fill [{m}, {n_cols}]");
    assert_eq!(out.len(), m * n_rows, "linear: out does not fill [{m}, {n_rows}]");
    if m == 0 || n_rows == 0 || weight.product(x, m, out) {
        return;
    }
    if m < GEMM_MIN_ROWS {
        for (x_row, out_row) in x.chunks_exact(n_cols).zip(out.chunks_exact_mut(n_rows)) {
            matvec(weight, x_row, out_row);
        }
    } else if let Some(values) = weight.as_f32() {
        let parallelism = if m * n_rows * n_cols < PARALLEL_MIN_GEMM_MACS {
            gemm::Parallelism::None
        } else {
            gemm::Parallelism::Rayon(0)
        };
        gemm_rows(values, n_rows, n_cols, x, m, Target { out: out.as_mut_ptr(), stride: n_rows }, parallelism);
    } else {
        by_panels(weight, x, m, out);
    }
}

fn matvec(weight: &HostWeight, x: &[f32], out: &mut [f32]) {
    let (n_rows, n_cols) = (weight.n_rows(), weight.n_cols());
    if n_rows * n_cols < PARALLEL_MIN_MACS {
        return weight.matvec_rows(0, x, out);
    }
    let n_chunks = rayon::current_num_threads() * 4;
    let chunk_rows = n_rows.div_ceil(n_chunks).max(16);
    out.par_chunks_mut(chunk_rows).enumerate().for_each(|(chunk_idx, rows)| {
        weight.matvec_rows(chunk_idx * chunk_rows, x, rows);
    });
}

/// Where a panel's products go: `out[i·stride + j]` for row i of x and column j of the panel.
#[derive(Clone, Copy)]
struct Target {
    out: *mut f32,
    stride: usize,
}

// SAFETY: each panel writes only its own columns of the output, which no other panel touches.
unsafe impl Send for Target {}
// SAFETY: as above; the pointer is only written through, at places that belong to one panel alone.
unsafe impl Sync for Target {}

impl Target {
    fn columns_from(self, first: usize) -> Target {
        // SAFETY: `first` is below the output's row length, so the pointer stays inside the first row.
        Target { out: unsafe { self.out.add(first) }, stride: self.stride }
    }
}

fn by_panels(weight: &HostWeight, x: &[f32], m: usize, out: &mut [f32]) {
    let (n_rows, n_cols) = (weight.n_rows(), weight.n_cols());
    let fit = (PANEL_BYTES / (4 * n_cols)).max(8);
    let share = n_rows.div_ceil(rayon::current_num_threads());
    let panel_rows = fit.min(share.next_multiple_of(8)).max(1);
    let n_panels = n_rows.div_ceil(panel_rows);
    let target = Target { out: out.as_mut_ptr(), stride: n_rows };
    let run = |panel: &mut Vec<f32>, panel_idx: usize| {
        let first = panel_idx * panel_rows;
        let rows = panel_rows.min(n_rows - first);
        panel.resize(rows * n_cols, 0.0);
        PEAK_PANEL_BYTES.fetch_max(panel.len() * 4, Ordering::Relaxed);
        weight.unpack_rows(first, panel);
        gemm_rows(panel, rows, n_cols, x, m, target.columns_from(first), gemm::Parallelism::None);
    };
    if m * n_rows * n_cols < PARALLEL_MIN_GEMM_MACS {
        let mut panel = Vec::new();
        (0..n_panels).for_each(|panel_idx| run(&mut panel, panel_idx));
    } else {
        (0..n_panels).into_par_iter().for_each_init(Vec::new, run);
    }
}

/// Writes `x · Wᵀ` for f32 rows: `w` `[n_rows, n_cols]`, `x` `[m, n_cols]`.
fn gemm_rows(
    w: &[f32],
    n_rows: usize,
    n_cols: usize,
    x: &[f32],
    m: usize,
    target: Target,
    parallelism: gemm::Parallelism,
) {
    assert!(w.len() >= n_rows * n_cols && x.len() >= m * n_cols && target.stride >= n_rows);
    // SAFETY: the assertion above covers both inputs; the target has `m` rows of `stride` ≥ `n_rows` elements.
    unsafe {
        gemm::gemm(
            m,
            n_rows,
            n_cols,
            target.out,
            1,
            target.stride as isize,
            false,
            x.as_ptr(),
            1,
            n_cols as isize,
            w.as_ptr(),
            n_cols as isize,
            1,
            0.0f32,
            1.0f32,
            false,
            false,
            false,
            parallelism,
        );
    }
}
