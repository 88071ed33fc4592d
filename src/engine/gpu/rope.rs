//! Rotary tables on the device, one a kind of attention.

use super::weights::bytemuck_bytes;
use crate::engine::rope::RopeSpec;
use cubecl::bytes::Bytes;
use cubecl::client::Client;
use cubecl::server::Handle;
use labpipe_kernels::cube;

/// Cosines and sines of all positions a cache holds.
pub struct RopeTable {
    /// `[capacity, rotary_dim / 2, 2]` f32.
    pub handle: Handle,
    spec: RopeSpec,
    capacity: usize,
    /// Length of the sequence that the frequencies were made for.
    n_seq: usize,
}

impl RopeTable {
    pub fn new(client: &Client, spec: &RopeSpec, capacity: usize) -> RopeTable {
        let handle = upload(client, &rows(spec, capacity, 1));
        RopeTable { handle, spec: spec.clone(), capacity, n_seq: 1 }
    }

    /// Makes the table that of a sequence of `n_seq` tokens, where frequencies depend on that. Keys in the cache keep theirs.
    pub fn prepare(&mut self, client: &Client, n_seq: usize) {
        if self.spec.depends_on_length() && n_seq != self.n_seq {
            self.handle = upload(client, &rows(&self.spec, self.capacity, n_seq));
            self.n_seq = n_seq;
        }
    }

    /// Returns true where a recorded step can't use one table for all positions.
    pub fn depends_on_length(&self) -> bool {
        self.spec.depends_on_length()
    }
}

/// Copies a table to memory of its own, as long as the cache it belongs to.
fn upload(client: &Client, values: &[f32]) -> Handle {
    let bytes = bytemuck_bytes(values);
    let handle = cube::kept(client, bytes.len());
    client.write(&handle, Bytes::from_bytes_vec(bytes.to_vec()));
    handle
}

fn rows(spec: &RopeSpec, capacity: usize, n_seq: usize) -> Vec<f32> {
    let frequencies = spec.inverse_frequencies(n_seq);
    let factor = spec.attention_factor() as f32;
    let mut values = Vec::with_capacity(capacity * frequencies.len() * 2);
    for position in 0..capacity {
        for frequency in &frequencies {
            // The angle in f32, as the reference implementation takes it.
            let angle = position as f32 * *frequency as f32;
            values.extend([factor * angle.cos(), factor * angle.sin()]);
        }
    }
    values
}
