//! What is read of logits: the choice of the next token, with the clock that says when it was made, and likelihoods of targets.

use super::ops::{STATE_HISTORY, STATE_POSITION, STATE_TOKEN};
use super::overlap::await_earlier;
use super::reduce::{cube_max, cube_sum};
use cubecl::prelude::*;

/// Values that a unit loads before it looks at them.
const IN_FLIGHT: u32 = 8;

/// Writes the device's time as entry `entry` of a clock's readings, two words each.
#[cube]
fn read_clock(clock: &mut [u32], entry: u32) {
    let nanoseconds: u64;
    gpu_asm!("mov.u64 {}, %%globaltimer;", out(_) nanoseconds);
    clock[(2u32 * entry) as usize] = u32::cast_from(nanoseconds & 0xffff_ffffu64);
    clock[(2u32 * entry + 1u32) as usize] = u32::cast_from(nanoseconds >> 32u64);
}

/// Writes when it runs, in nanoseconds of the device's clock, as a clock's first reading. NVIDIA only.
#[cube(launch_unchecked)]
pub fn stamp_kernel(clock: &mut [u32]) {
    if ABSOLUTE_POS == 0 {
        read_clock(clock, 0u32);
    }
}

/// Finds the largest logit of the last row, remembers it as the next token and moves the position on: the end of a recorded step.
/// With a clock it writes when that was, behind the readings of the steps before.
///
/// Cubes look through parts of the row, and the last of them chooses; one cube does where cubes can't hand each other results.
///
/// # Shapes
/// `logits` `[n]`, `state` as the `STATE_` constants say, `clock` two words a reading, `found` `[n_cubes, 2]`: a part's largest logit
/// and where it is; `counter` one word, zero before and after.
#[cube(launch_unchecked)]
#[expect(clippy::too_many_arguments, reason = "a kernel's buffers and sizes")]
pub fn choose_kernel(
    logits: &[f32],
    state: &mut [u32],
    clock: &mut [u32],
    found: &mut [u32],
    counter: &mut [Atomic<u32>],
    n: u32,
    #[comptime] n_cubes: u32,
    #[comptime] units: u32,
    #[comptime] has_clock: bool,
    #[comptime] overlaps: bool,
) {
    if comptime!(overlaps) {
        await_earlier();
    }
    let mut best = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut place = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let part = (n + comptime!(n_cubes - 1)) / n_cubes;
    let first = min(CUBE_POS_X * part, n);
    let (value, index) = best_of_row(logits, first, min(part, n - first));
    best[UNIT_POS_X as usize] = value;
    place[UNIT_POS_X as usize] = first + index;
    fold_best(&mut best, &mut place, units);
    if comptime!(n_cubes > 1) {
        let mut is_last = Shared::<[u32]>::new_slice(1usize);
        if UNIT_POS_X == 0 {
            found[(2u32 * CUBE_POS_X) as usize] = u32::reinterpret(best[0]);
            found[(2u32 * CUBE_POS_X + 1u32) as usize] = place[0];
        }
        sync_storage();
        if UNIT_POS_X == 0 {
            is_last[0] = u32::cast_from(counter[0].fetch_add(1u32) + 1u32 == n_cubes);
        }
        sync_cube();
        if is_last[0] == 0u32 {
            terminate!();
        }
        sync_storage();
        let from = min(UNIT_POS_X, comptime!(n_cubes - 1));
        best[UNIT_POS_X as usize] = f32::reinterpret(found[(2u32 * from) as usize]);
        place[UNIT_POS_X as usize] = found[(2u32 * from + 1u32) as usize];
        fold_best(&mut best, &mut place, units);
    }
    if UNIT_POS_X == 0 {
        if comptime!(n_cubes > 1) {
            counter[0].store(0u32);
        }
        let position = state[STATE_POSITION as usize];
        let n_chosen = state[STATE_HISTORY as usize];
        state[STATE_TOKEN as usize] = place[0];
        state[(STATE_HISTORY + 1u32 + n_chosen) as usize] = place[0];
        state[STATE_HISTORY as usize] = n_chosen + 1u32;
        state[STATE_POSITION as usize] = position + 1u32;
        if comptime!(has_clock) {
            read_clock(clock, n_chosen + 1u32);
        }
    }
}

/// Returns a unit's own largest value of a row and where it is; the first of equals.
#[cube]
fn best_of_row(logits: &[f32], base: u32, n: u32) -> (f32, u32) {
    let mut value = f32::reinterpret(0xff7f_ffffu32);
    let mut index = 0u32;
    let mut at = UNIT_POS_X;
    while at < n {
        // Several loads are on their way at once: the row is read at memory's speed, not at its latency.
        let mut some = Array::<f32>::new(IN_FLIGHT as usize);
        #[unroll]
        for i in 0..IN_FLIGHT {
            let place = at + i * CUBE_DIM_X;
            some[i as usize] = logits[(base + select(place < n, place, at)) as usize];
        }
        #[unroll]
        for i in 0..IN_FLIGHT {
            if some[i as usize] > value {
                value = some[i as usize];
                let place = at + i * CUBE_DIM_X;
                index = select(place < n, place, at);
            }
        }
        at += IN_FLIGHT * CUBE_DIM_X;
    }
    (value, index)
}

/// Returns a unit's own part of the sum over a row of e^(logit - largest).
#[cube]
fn exp_sum_of_row(logits: &[f32], base: u32, n: u32, largest: f32) -> f32 {
    let mut sum = 0.0f32;
    let mut at = UNIT_POS_X;
    while at < n {
        let mut some = Array::<f32>::new(IN_FLIGHT as usize);
        #[unroll]
        for i in 0..IN_FLIGHT {
            let place = at + i * CUBE_DIM_X;
            some[i as usize] = logits[(base + select(place < n, place, at)) as usize];
        }
        #[unroll]
        for i in 0..IN_FLIGHT {
            sum += select(at + i * CUBE_DIM_X < n, (some[i as usize] - largest).exp(), 0.0f32);
        }
        at += IN_FLIGHT * CUBE_DIM_X;
    }
    sum
}

/// Leaves the best of all units in slot 0, the first of equals.
#[cube]
fn fold_best(best: &mut Shared<[f32]>, place: &mut Shared<[u32]>, #[comptime] units: u32) {
    let unit = UNIT_POS_X;
    let width = RuntimeCell::<u32>::new(comptime!(units / 2));
    sync_cube();
    while width.read() > 0u32 {
        let reach = width.read();
        if unit < reach {
            let other = best[(unit + reach) as usize];
            let own = best[unit as usize];
            let other_place = place[(unit + reach) as usize];
            if other > own || (other == own && other_place < place[unit as usize]) {
                best[unit as usize] = other;
                place[unit as usize] = other_place;
            }
        }
        sync_cube();
        width.store(reach / 2u32);
    }
}

/// Negative log-likelihood of each row's target, and the row's own first choice.
///
/// # Shapes
/// `logits` `[n, vocab]`, `targets` from `first` on, `nll` and `choice` likewise.
#[cube(launch_unchecked)]
pub fn nll_kernel(
    logits: &[f32],
    targets: &[u32],
    nll: &mut [f32],
    choice: &mut [u32],
    vocab: u32,
    first: u32,
    #[comptime] units: u32,
) {
    let mut best = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let mut place = Shared::<[u32]>::new_slice(comptime!(units as usize));
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(units as usize));
    let base = CUBE_POS_X * vocab;
    let (value, index) = best_of_row(logits, base, vocab);
    let largest = cube_max(value, &mut scratch);
    let total = cube_sum(exp_sum_of_row(logits, base, vocab, largest), &mut scratch);
    best[UNIT_POS_X as usize] = value;
    place[UNIT_POS_X as usize] = index;
    fold_best(&mut best, &mut place, units);
    if UNIT_POS_X == 0 {
        let row = (first + CUBE_POS_X) as usize;
        nll[row] = largest + total.ln() - logits[(base + targets[row]) as usize];
        choice[row] = place[0];
    }
}
