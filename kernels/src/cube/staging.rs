//! Bytes of the host on their way to the device: pieces that threads copy to pinned memory while earlier ones are in transit.

use crate::weight::SharedBytes;
use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cubecl::client::Client;
use cubecl::server::Handle;
use rayon::prelude::*;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes that a thread looks at and copies at a time: they stay in its cache between the two.
const PIECE_BYTES: usize = 2 << 20;

/// Copies `source[range]` to `target` from byte `at` (a multiple of four) on. The last word is filled with zeros; the buffer is whole
/// words. `look` is given every piece's position in `source` and its bytes before they are copied, by several threads.
///
/// Pieces go through the runtime's pinned memory where it has any, so that they are copied while the device works; it bounds how
/// much of it is in use by waiting for what was copied before.
///
/// # Errors
/// What `look` returns for the first piece that it refuses.
pub fn stage<E: Send>(
    client: &Client,
    source: &SharedBytes,
    range: Range<usize>,
    target: &Handle,
    at: usize,
    look: &(impl Fn(usize, &[u8]) -> Result<(), E> + Sync),
) -> Result<(), E> {
    // Every thread would have a stream of its own, and pinned memory with it.
    let stream = target.stream;
    let starts: Vec<usize> = range.clone().step_by(PIECE_BYTES).collect();
    let copy = |start: &usize| {
        let piece = source.slice(*start..(*start + PIECE_BYTES).min(range.end));
        look(*start, piece.as_slice())?;
        stream.executes(|| write(client, &piece, target, at + (start - range.start)));
        Ok(())
    };
    // All pieces are looked at, so that the first that is refused is named whichever thread meets it.
    starts.par_iter().map(copy).collect::<Vec<Result<(), E>>>().into_iter().collect()
}

fn write(client: &Client, piece: &SharedBytes, target: &Handle, at: usize) {
    let n_bytes = piece.as_slice().len();
    let whole = n_bytes / 4 * 4;
    if whole > 0 {
        let mut bytes = in_place(&piece.slice(0..whole));
        client.staging(std::iter::once(&mut bytes), false);
        client.write(&part(target, at, whole), bytes);
    }
    if whole < n_bytes {
        let mut last = piece.as_slice()[whole..].to_vec();
        last.resize(4, 0);
        client.write(&part(target, at + whole, 4), Bytes::from_bytes_vec(last));
    }
}

fn part(target: &Handle, at: usize, n_bytes: usize) -> Handle {
    let behind = target.size_in_used() - (at + n_bytes) as u64;
    target.clone().offset_start(at as u64).offset_end(behind)
}

/// Bytes that stay where they are.
struct InPlace(SharedBytes);

fn in_place(bytes: &SharedBytes) -> Bytes {
    let len = bytes.as_slice().len();
    // SAFETY: all of the slice is initialized.
    unsafe { Bytes::from_controller(Box::new(InPlace(bytes.clone())), len) }
}

impl AllocationController for InPlace {
    fn alloc_align(&self) -> usize {
        1
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _policy: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        // They may lie in a file.
        Err(AccessError::WouldCopy)
    }

    fn memory(&self, _policy: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        let bytes = self.0.as_slice();
        // SAFETY: the same bytes, of a type with the same layout that asks for less.
        Ok(unsafe { std::slice::from_raw_parts(bytes.as_ptr().cast(), bytes.len()) })
    }
}
