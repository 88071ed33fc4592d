//! Matrices on the device made of a file's bytes, tile by tile: copied as they are, quantized or converted there.

use super::decode::OFFSETS;
use super::form::Sizes;
use super::launch::cube_count;
use super::quantize::{Book, Reading, UNITS, nested_codes_kernel};
use super::staging::stage;
use super::tile::{Target, Tile, buffer, launch_absmax};
use super::{DeviceMatrix, Element, FileMatrix, Form};
use crate::schemes::codebook::{NESTED_BLOCK, nested_offset};
use crate::schemes::dynamic_map::{dynamic_map, middles};
use crate::schemes::{fp4, nf4};
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::{Handle, ServerError};
use rayon::prelude::*;
use std::future::Future;
use std::io;
use std::pin::Pin;

/// Makes matrices on a device. What is read of the host is bounded by tiles in pinned memory; what the device holds besides the
/// matrices, by a tile and the block scales of those whose second level is not settled.
pub struct MatrixLoader<'a> {
    client: &'a Client,
    scratch: Option<Handle>,
    thresholds: [Option<Handle>; 2],
    middles: Option<Handle>,
    /// Stands for buffers that a form does not have.
    nothing: Handle,
    /// Matrices whose block scales are on their way to the host: those of this turn, those of the last.
    unsettled: [Vec<Unsettled<'a>>; 2],
}

type Reads<'a> = Pin<Box<dyn Future<Output = Result<Vec<Bytes>, ServerError>> + Send + 'a>>;

/// A matrix whose second-level scales are still to be made: their offset is a mean that the host takes, in the host's order.
struct Unsettled<'a> {
    reads: Reads<'a>,
    parts: Vec<UnsettledPart>,
    scales: (Handle, usize),
    aux: (Handle, usize),
    tables: Handle,
    table: &'static [f32; 16],
}

struct UnsettledPart {
    absmax: Handle,
    n_blocks: usize,
    first_nested: usize,
    first_word: usize,
}

/// Returns memory of its own, outside of the runtime's pools, which goes back to the driver when its last handle does: what weights and
/// caches want. Pools take pages as large as their largest buffer, and keep them.
pub fn kept(client: &Client, n_bytes: usize) -> Handle {
    client.memory_dedicated_allocation(n_bytes, |n_bytes| client.empty(n_bytes))
}

impl<'a> MatrixLoader<'a> {
    pub fn new(client: &'a Client) -> MatrixLoader<'a> {
        MatrixLoader {
            client,
            scratch: None,
            thresholds: [None, None],
            middles: None,
            nothing: client.create_from_slice(&[0; 4]),
            unsettled: [Vec::new(), Vec::new()],
        }
    }

    /// Makes one matrix of `parts`, their rows one after the other. `look` is given pieces of them before they are copied: part, byte
    /// within it, the bytes or why they were not read; several threads call it.
    ///
    /// Where `form` has second-level scales, they are there after the next but one [`turn`](Self::turn), or [`settle`](Self::settle).
    ///
    /// # Errors
    /// What `look` returns for the first piece that it refuses.
    pub fn load<E: Send>(
        &mut self,
        form: Form,
        n_cols: usize,
        parts: &[FileMatrix],
        look: impl Fn(usize, usize, io::Result<&[u8]>) -> Result<(), E> + Sync,
    ) -> Result<DeviceMatrix, E> {
        let sizes: Vec<Sizes> = parts.iter().map(|part| form.sizes(part.n_rows, n_cols)).collect();
        let words = |n: usize| n.div_ceil(4).max(1);
        let n_codes = words(sizes.iter().map(|size| size.code_bytes).sum());
        let n_scales = sizes.iter().map(|size| size.scales).sum::<usize>().max(1);
        let n_aux = words(sizes.iter().map(|size| size.aux_bytes).sum());
        let codes = kept(self.client, 4 * n_codes);
        let scales =
            if n_scales > 1 || sizes[0].scales > 0 { kept(self.client, 4 * n_scales) } else { self.nothing.clone() };
        let aux = if sizes[0].aux_bytes > 0 { kept(self.client, 4 * n_aux) } else { self.nothing.clone() };
        let (tables, n_tables, table) = self.tables(form);
        let mut waiting = Vec::new();
        let (mut first_code_word, mut first_scale, mut first_aux_word) = (0, 0, 0);
        for (part_idx, (part, size)) in parts.iter().zip(&sizes).enumerate() {
            let target = Target {
                codes: (&codes, n_codes),
                scales: (&scales, n_scales),
                aux: (&aux, n_aux),
                first_code_word,
                first_scale,
                first_aux_word,
            };
            waiting.extend(self.fill(form, n_cols, part, &target, |at, bytes| look(part_idx, at, bytes))?);
            first_code_word += size.code_bytes / 4;
            first_scale += size.scales;
            first_aux_word += size.aux_bytes / 4;
        }
        if let (false, Some(table)) = (waiting.is_empty(), table) {
            let reads = Box::pin(self.client.read_async(waiting.iter().map(|part| part.absmax.clone()).collect()));
            let (scales, aux) = ((scales.clone(), n_scales), (aux.clone(), n_aux));
            self.unsettled[0].push(Unsettled { reads, parts: waiting, scales, aux, tables: tables.clone(), table });
        }
        let mut starts = parts.iter().scan(0u32, |row, part| Some(std::mem::replace(row, *row + part.n_rows as u32)));
        starts.next();
        Ok(DeviceMatrix {
            kind: form.kind(),
            format: form.format(),
            n_rows: parts.iter().map(|part| part.n_rows).sum(),
            n_cols,
            codes,
            scales,
            aux,
            tables,
            segments: std::array::from_fn(|_| starts.next().unwrap_or(u32::MAX)),
            lens: [n_codes, n_scales, n_aux, n_tables],
        })
    }

    /// Returns the buffer of a form's tables, its length, and the code values that belong into it.
    fn tables(&mut self, form: Form) -> (Handle, usize, Option<&'static [f32; 16]>) {
        let Form::Codebook { book, nested, .. } = form else { return (self.nothing.clone(), 1, None) };
        let table = match book {
            Book::Nf4 => &nf4::TABLE,
            Book::Fp4 => &fp4::TABLE,
        };
        if nested {
            let n = OFFSETS as usize + 3;
            return (self.client.empty(4 * n), n, Some(table));
        }
        (self.client.create_from_slice(bytemuck::cast_slice(table)), table.len(), Some(table))
    }

    /// Fills one part of a matrix; returns what its second level waits for.
    fn fill<E: Send>(
        &mut self,
        form: Form,
        n_cols: usize,
        part: &FileMatrix,
        target: &Target<'_>,
        look: impl Fn(usize, io::Result<&[u8]>) -> Result<(), E> + Sync,
    ) -> Result<Option<UnsettledPart>, E> {
        let (n_values, size) = (part.n_rows * n_cols, part.reading.source.size_bytes());
        if form == Form::Plain(part.reading.source) {
            let at = 4 * target.first_code_word;
            stage(self.client, &part.bytes, 0..n_values * size, target.codes.0, at, &look)?;
            return Ok(None);
        }
        let mut waiting = None;
        if let Form::Codebook { block_size, nested: true, .. } = form {
            let n_blocks = n_values.div_ceil(block_size);
            let absmax = self.client.empty(4 * n_blocks);
            let (first_nested, first_word) = (target.first_scale, target.first_aux_word);
            waiting = Some(UnsettledPart { absmax, n_blocks, first_nested, first_word });
        }
        let tile = form.tile_values(part.reading, n_cols).min(n_values.max(1));
        for first in (0..n_values).step_by(tile) {
            let n = tile.min(n_values - first);
            let scratch = self.scratch((n * size).div_ceil(4));
            stage(self.client, &part.bytes, first * size..(first + n) * size, &scratch.0, 0, &look)?;
            let tile = Tile { raw: (&scratch.0, scratch.1), first, n, n_cols, reading: part.reading };
            self.make(form, &tile, target, waiting.as_ref());
        }
        Ok(waiting)
    }

    /// Returns a buffer of at least so many words that is free once the kernels launched so far have run.
    fn scratch(&mut self, n_words: usize) -> (Handle, usize) {
        let fits = |held: &Handle| held.size() as usize / 4 >= n_words;
        if !self.scratch.as_ref().is_some_and(fits) {
            // The old one goes first.
            self.scratch = None;
        }
        let held = self.scratch.get_or_insert_with(|| self.client.empty(4 * n_words));
        (held.clone(), held.size() as usize / 4)
    }

    fn thresholds(&mut self, book: Book) -> (Handle, usize) {
        let values: &[f32] = match book {
            Book::Nf4 => &nf4::THRESHOLDS,
            Book::Fp4 => &fp4::THRESHOLDS,
        };
        let client = self.client;
        let slot = self.thresholds[usize::from(book == Book::Fp4)]
            .get_or_insert_with(|| client.create_from_slice(bytemuck::cast_slice(values)));
        (slot.clone(), values.len())
    }

    /// Launches what a tile becomes.
    fn make(&mut self, form: Form, tile: &Tile<'_>, target: &Target<'_>, waiting: Option<&UnsettledPart>) {
        match form {
            Form::Plain(element) => tile.convert(self.client, element, target),
            Form::Codebook { book, block_size, .. } => {
                let thresholds = self.thresholds(book);
                let (absmax, first) = match waiting {
                    Some(part) => ((&part.absmax, part.n_blocks), 0),
                    None => (target.scales, target.first_scale),
                };
                tile.codebook(self.client, book, block_size, (&thresholds.0, thresholds.1), absmax, first, target);
            }
            Form::Int8 => tile.int8(self.client, target),
            Form::Int4 { group, symmetric } => tile.int4(self.client, group, symmetric, target),
        }
    }

    /// Ends a turn (a block of a model): second levels of the turn before are settled, whose scales have arrived meanwhile.
    ///
    /// # Errors
    /// The device's failures.
    pub fn turn(&mut self) -> Result<(), ServerError> {
        let before = std::mem::take(&mut self.unsettled[1]);
        self.unsettled.swap(0, 1);
        self.settle_all(before)
    }

    /// Settles all second levels.
    ///
    /// # Errors
    /// The device's failures.
    pub fn settle(&mut self) -> Result<(), ServerError> {
        self.turn()?;
        self.turn()
    }

    fn settle_all(&mut self, matrices: Vec<Unsettled<'a>>) -> Result<(), ServerError> {
        let mut read = Vec::with_capacity(matrices.len());
        for matrix in matrices {
            read.push((
                cubecl::future::block_on(matrix.reads)?,
                matrix.parts,
                matrix.scales,
                matrix.aux,
                matrix.tables,
                matrix.table,
            ));
        }
        let means: Vec<Vec<f32>> = read
            .par_iter()
            .map(|(bytes, parts, ..)| {
                let of = |(bytes, part): (&Bytes, &UnsettledPart)| {
                    let values = bytes.as_chunks::<4>().0.iter().map(|raw| f32::from_le_bytes(*raw));
                    nested_offset(values.take(part.n_blocks))
                };
                bytes.par_iter().zip(parts).map(of).collect()
            })
            .collect();
        for ((_, parts, scales, aux, tables, table), offsets) in read.iter().zip(means) {
            for (part, offset) in parts.iter().zip(&offsets) {
                self.nest(part, *offset, (&scales.0, scales.1), (&aux.0, aux.1));
            }
            let mut values = table.to_vec();
            values.extend_from_slice(dynamic_map());
            values.extend((0..3).map(|slot| offsets.get(slot).unwrap_or(&offsets[0])));
            self.client.write(tables, Bytes::from_bytes_vec(bytemuck::cast_slice(&values).to_vec()));
        }
        Ok(())
    }

    fn nest(&mut self, part: &UnsettledPart, offset: f32, scales: (&Handle, usize), aux: (&Handle, usize)) {
        let n = part.n_blocks;
        let client = self.client;
        let values = middles();
        let middles = self.middles.get_or_insert_with(|| client.create_from_slice(bytemuck::cast_slice(&values)));
        let absmax = (&part.absmax, n);
        let reading = Reading { source: Element::F32, base: Element::F32 };
        launch_absmax(client, absmax, scales, n, NESTED_BLOCK, part.first_nested, offset, reading);
        // SAFETY: the buffers have the lengths given; the kernel writes `n / 4` words from `first_word` on.
        unsafe {
            nested_codes_kernel::launch_unchecked(
                client,
                cube_count(n.div_ceil(4 * UNITS as usize)),
                CubeDim::new_1d(UNITS),
                buffer(absmax),
                buffer(scales),
                buffer((middles, values.len())),
                buffer(aux),
                n as u32,
                part.first_nested as u32,
                part.first_word as u32,
                offset,
            );
        }
    }
}

impl Drop for MatrixLoader<'_> {
    /// Waits for what a loading that was given up had asked for: wgpu reuses a buffer that was not read to the end.
    fn drop(&mut self) {
        for matrix in self.unsettled.iter_mut().flat_map(std::mem::take) {
            // Whoever gave up has the reason.
            let _ = cubecl::future::block_on(matrix.reads);
        }
    }
}
