//! Launches that read logits: the choice of a token, likelihoods, and the clock that is read when a step ends.

use super::launch::buffer;
use super::ops::{choose_kernel, nll_kernel, stamp_kernel};
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Returns how many units work on a row of logits.
fn row_units(client: &Client) -> u32 {
    if client.name() == "cuda" { 1024 } else { 256 }
}

/// Returns true where steps can be timed by the device's own clock.
pub fn has_clock(client: &Client) -> bool {
    client.name() == "cuda"
}

/// Starts a clock: its first reading is now. The caller asked [`has_clock`].
///
/// # Shapes
/// `clock` two words a reading, `n_clock` words.
pub fn stamp(client: &Client, clock: &Handle, n_clock: usize) {
    // SAFETY: the buffer has room for a reading.
    unsafe {
        stamp_kernel::launch_unchecked(client, CubeCount::Static(1, 1, 1), CubeDim::new_1d(32), buffer(clock, n_clock))
    }
}

/// Chooses the next token greedily and moves the state on; with a clock, whose buffer has room for as many readings as the state for
/// tokens, it reads that too.
pub fn choose(client: &Client, logits: &Handle, vocab: usize, state: &Handle, n_state: usize, clock: Option<&Handle>) {
    let units = row_units(client);
    // SAFETY: the buffers have the lengths given; without a clock, none is touched.
    unsafe {
        choose_kernel::launch_unchecked(
            client,
            CubeCount::Static(1, 1, 1),
            CubeDim::new_1d(units),
            buffer(logits, vocab),
            buffer(state, n_state),
            buffer(clock.unwrap_or(logits), if clock.is_some() { 2 * n_state } else { 1 }),
            vocab as u32,
            units,
            clock.is_some(),
        )
    }
}

/// Writes each row's negative log-likelihood of its target and its first choice.
///
/// # Shapes
/// `logits` `[n, vocab]` f32; `targets`, `nll`, `choice` `[n_targets]`, rows `first..first + n` of them.
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn score(
    client: &Client,
    logits: &Handle,
    targets: &Handle,
    nll: &Handle,
    choice: &Handle,
    n_targets: usize,
    [first, n]: [usize; 2],
    vocab: usize,
) {
    let units = row_units(client);
    // SAFETY: the buffers have the lengths given.
    unsafe {
        nll_kernel::launch_unchecked(
            client,
            CubeCount::Static(n as u32, 1, 1),
            CubeDim::new_1d(units),
            buffer(logits, n * vocab),
            buffer(targets, n_targets),
            buffer(nll, n_targets),
            buffer(choice, n_targets),
            vocab as u32,
            first as u32,
            units,
        )
    }
}
