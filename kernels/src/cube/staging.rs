//! Bytes of the host on their way to the device: chunks that threads read into pinned memory while earlier ones are in transit.

use crate::weight::SharedBytes;
use cubecl::bytes::{AccessError, AccessPolicy, AllocationController, AllocationProperty, Bytes};
use cubecl::client::Client;
use cubecl::server::Handle;
use rayon::prelude::*;
use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;

/// Bytes that are copied to the device at a time. Above ten MiB the runtime waits for the chunk before the last when it has started to
/// copy one, so that three are in use at most; pinning a page takes the driver longer than filling it.
const CHUNK_BYTES: usize = 16 << 20;

/// Bytes that a thread reads and looks at at a time: they stay in its cache between the two.
const PIECE_BYTES: usize = 512 << 10;

/// Copies `source[range]` to `target` from byte `at` (a multiple of four) on. The last word is filled with zeros; the buffer is whole
/// words. `look` is given every piece's position in `source` and its bytes, or why they were not read, before they are copied, by
/// several threads.
///
/// Pieces are read into the runtime's pinned memory where it has any, so that they are copied while the device works.
///
/// # Errors
/// What `look` returns for the first piece that it refuses.
pub fn stage<E: Send>(
    client: &Client,
    source: &SharedBytes,
    range: Range<usize>,
    target: &Handle,
    at: usize,
    look: &(impl Fn(usize, io::Result<&[u8]>) -> Result<(), E> + Sync),
) -> Result<(), E> {
    // Pinned memory belongs to a stream, and every thread would have one of its own.
    let stream = target.stream;
    for start in range.clone().step_by(CHUNK_BYTES) {
        let n_bytes = CHUNK_BYTES.min(range.end - start);
        let n_whole = n_bytes.next_multiple_of(4);
        let mut chunk = stream.executes(|| room(client, n_whole));
        fill(source, start, &mut chunk[..n_bytes], look)?;
        chunk[n_bytes..].fill(0);
        let part = part(target, at + (start - range.start), n_whole);
        stream.executes(|| client.write(&part, chunk));
    }
    Ok(())
}

fn fill<E: Send>(
    source: &SharedBytes,
    first: usize,
    chunk: &mut [u8],
    look: &(impl Fn(usize, io::Result<&[u8]>) -> Result<(), E> + Sync),
) -> Result<(), E> {
    let read = |(piece_idx, piece): (usize, &mut [u8])| {
        let at = first + piece_idx * PIECE_BYTES;
        let read = source.read_into(at, piece);
        look(at, read.map(|()| &*piece))
    };
    // All pieces are looked at, so that the first that is refused is named whichever thread meets it.
    let looked: Vec<Result<(), E>> = chunk.par_chunks_mut(PIECE_BYTES).enumerate().map(read).collect();
    looked.into_iter().collect()
}

fn part(target: &Handle, at: usize, n_bytes: usize) -> Handle {
    let behind = target.size_in_used() - (at + n_bytes) as u64;
    target.clone().offset_start(at as u64).offset_end(behind)
}

/// Returns memory for so many bytes: pinned where the runtime has such.
fn room(client: &Client, n_bytes: usize) -> Bytes {
    // SAFETY: nothing reads these bytes: they are asked for staging, and dropped.
    let mut bytes = unsafe { Bytes::from_controller(Box::new(Placeholder(n_bytes)), n_bytes) };
    client.staging(std::iter::once(&mut bytes), false);
    match bytes.property() {
        AllocationProperty::Pinned | AllocationProperty::Native => bytes,
        _ => Bytes::from_bytes_vec(vec![0; n_bytes]),
    }
}

/// Bytes without memory of their own. The runtime puts its own in their place, and asks these to be copied there, which costs nothing; it has no
/// other way to hand out pinned memory.
struct Placeholder(usize);

impl AllocationController for Placeholder {
    fn alloc_align(&self) -> usize {
        1
    }

    fn property(&self) -> AllocationProperty {
        AllocationProperty::Other
    }

    unsafe fn memory_mut(&mut self, _policy: AccessPolicy) -> Result<&mut [MaybeUninit<u8>], AccessError> {
        Err(AccessError::WouldCopy)
    }

    fn memory(&self, _policy: AccessPolicy) -> Result<&[MaybeUninit<u8>], AccessError> {
        Err(AccessError::WouldCopy)
    }

    fn capacity(&self) -> usize {
        self.0
    }

    unsafe fn copy_into(&self, _buf: &mut [u8]) {}
}
