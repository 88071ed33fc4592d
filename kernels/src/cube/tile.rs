//! Launches that turn a tile of a file's values into a part of a matrix.

use super::Element;
use super::launch::cube_count;
use super::quantize::{
    Book, Reading, UNITS, absmax_kernel, codebook_codes_kernel, convert_kernel, int4_codes_kernel, int4_stats_kernel,
    int8_codes_kernel,
};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// One part's place in the buffers of its matrix.
pub struct Target<'a> {
    pub codes: (&'a Handle, usize),
    pub scales: (&'a Handle, usize),
    pub aux: (&'a Handle, usize),
    pub first_code_word: usize,
    pub first_scale: usize,
    pub first_aux_word: usize,
}

/// Buffer of a known number of words.
///
/// # Safety
/// `handle` holds as many.
pub unsafe fn buffer((handle, n): (&Handle, usize)) -> BufferArg {
    // SAFETY: the caller's promise.
    unsafe { BufferArg::from_raw_parts(handle.clone(), n) }
}

/// Takes the largest magnitude of `raw - offset` for each `len` values into `absmax` from `first` on.
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn launch_absmax(
    client: &Client,
    raw: (&Handle, usize),
    absmax: (&Handle, usize),
    n: usize,
    len: usize,
    first: usize,
    offset: f32,
    reading: Reading,
) {
    let lanes = (len / 8).next_power_of_two().clamp(1, UNITS as usize);
    let runs_a_cube = UNITS as usize / lanes;
    // SAFETY: the buffers have the lengths given; the kernel writes a value a run from `first` on.
    unsafe {
        absmax_kernel::launch_unchecked(
            client,
            cube_count(n.div_ceil(len).div_ceil(runs_a_cube)),
            CubeDim::new_1d(UNITS),
            buffer(raw),
            buffer(absmax),
            n as u32,
            len as u32,
            first as u32,
            offset,
            lanes as u32,
            reading,
        );
    }
}

/// Values of a file on the device.
pub struct Tile<'a> {
    pub raw: (&'a Handle, usize),
    /// Index of the first value in its part, and their number.
    pub first: usize,
    pub n: usize,
    pub n_cols: usize,
    pub reading: Reading,
}

impl Tile<'_> {
    pub fn convert(&self, client: &Client, element: Element, target: &Target<'_>) {
        let a_word = 4 / element.size_bytes();
        // SAFETY: the buffers have the lengths given, and the tile's words lie within the codes.
        unsafe {
            convert_kernel::launch_unchecked(
                client,
                cube_count(self.n.div_ceil(a_word * UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(self.raw),
                buffer(target.codes),
                self.n as u32,
                (target.first_code_word + self.first / a_word) as u32,
                self.reading,
            );
        }
    }

    #[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
    pub fn codebook(
        &self,
        client: &Client,
        book: Book,
        block_size: usize,
        thresholds: (&Handle, usize),
        absmax: (&Handle, usize),
        first_scale: usize,
        target: &Target<'_>,
    ) {
        let first_block = first_scale + self.first / block_size;
        launch_absmax(client, self.raw, absmax, self.n, block_size, first_block, 0.0, self.reading);
        // SAFETY: as above.
        unsafe {
            codebook_codes_kernel::launch_unchecked(
                client,
                cube_count(self.n.div_ceil(8 * UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(self.raw),
                buffer(absmax),
                buffer(thresholds),
                buffer(target.codes),
                self.n as u32,
                block_size as u32,
                first_block as u32,
                (target.first_code_word + self.first / 8) as u32,
                book,
                self.reading,
            );
        }
    }

    pub fn int8(&self, client: &Client, target: &Target<'_>) {
        let first_row = target.first_scale + self.first / self.n_cols;
        launch_absmax(client, self.raw, target.scales, self.n, self.n_cols, first_row, 0.0, self.reading);
        // SAFETY: as above; a tile is whole rows.
        unsafe {
            int8_codes_kernel::launch_unchecked(
                client,
                cube_count(self.n.div_ceil(4 * UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(self.raw),
                buffer(target.scales),
                buffer(target.codes),
                self.n as u32,
                self.n_cols as u32,
                first_row as u32,
                (target.first_code_word + self.first / 4) as u32,
                self.reading,
            );
        }
    }

    pub fn int4(&self, client: &Client, group: usize, symmetric: bool, target: &Target<'_>) {
        let (n_rows, first_row) = (self.n / self.n_cols, self.first / self.n_cols);
        let (groups, row_bytes) = (self.n_cols.div_ceil(group), self.n_cols.div_ceil(2));
        let first_stat = (target.first_aux_word + first_row * groups) as u32;
        // SAFETY: as above; a tile is whole rows, eight or a multiple of it unless it is the last.
        unsafe {
            int4_stats_kernel::launch_unchecked(
                client,
                cube_count((n_rows * groups).div_ceil(UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(self.raw),
                buffer(target.aux),
                n_rows as u32,
                self.n_cols as u32,
                group as u32,
                first_stat,
                symmetric,
                self.reading,
            );
            int4_codes_kernel::launch_unchecked(
                client,
                cube_count((n_rows * row_bytes).div_ceil(4 * UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(self.raw),
                buffer(target.aux),
                buffer(target.codes),
                n_rows as u32,
                self.n_cols as u32,
                group as u32,
                first_stat,
                (target.first_code_word + first_row * row_bytes / 4) as u32,
                self.reading,
            );
        }
    }
}
