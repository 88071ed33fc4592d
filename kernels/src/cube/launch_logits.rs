//! Launches that read logits: the choice of a token, likelihoods, and the clock that is read when a step ends.

use super::launch::buffer;
use super::logits::{choose_kernel, nll_kernel, stamp_kernel};
use super::overlap;
use cubecl::client::Client;
use cubecl::prelude::*;
use cubecl::server::Handle;

/// Units of a cube that looks for the largest logit.
const CHOOSE_UNITS: u32 = 256;

/// Logits that a cube looks at where several do: a few for each unit.
const CUBE_LOGITS: usize = 2048;

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

/// Scratch of [`choose`]: made once for a vocabulary.
#[derive(Debug, Clone)]
pub struct ChooseScratch {
    found: Handle,
    counter: Handle,
    n_cubes: u32,
}

impl ChooseScratch {
    /// Plans the search of `vocab` logits: over several cubes where the device lets the last of them combine what all found.
    pub fn new(client: &Client, vocab: usize) -> ChooseScratch {
        let is_split = client.name() == "cuda";
        let n_cubes = if is_split { vocab.div_ceil(CUBE_LOGITS).clamp(1, CHOOSE_UNITS as usize) as u32 } else { 1 };
        let found = client.empty(8 * n_cubes as usize);
        ChooseScratch { found, counter: client.create_from_slice(&[0; 4]), n_cubes }
    }
}

/// Chooses the next token greedily and moves the state on; with a clock, whose buffer has room for as many readings as the state for
/// tokens, it reads that too.
pub fn choose(
    client: &Client,
    (logits, vocab): (&Handle, usize),
    (state, n_state): (&Handle, usize),
    clock: Option<&Handle>,
    scratch: &ChooseScratch,
) {
    // SAFETY: the buffers have the lengths given; without a clock, none is touched.
    unsafe {
        choose_kernel::launch_unchecked(
            client,
            CubeCount::Static(scratch.n_cubes, 1, 1),
            CubeDim::new_1d(CHOOSE_UNITS),
            buffer(logits, vocab),
            buffer(state, n_state),
            buffer(clock.unwrap_or(logits), if clock.is_some() { 2 * n_state } else { 1 }),
            buffer(&scratch.found, 2 * scratch.n_cubes as usize),
            buffer(&scratch.counter, 1),
            vocab as u32,
            scratch.n_cubes,
            CHOOSE_UNITS,
            clock.is_some(),
            overlap::is_known(client),
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
    // A row is one cube's: more units have more of it on its way.
    let units = if client.name() == "cuda" { 1024 } else { CHOOSE_UNITS };
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
