//! Launches of a recorded step that begin before the one in front of them has ended (programmatic dependent launch, sm_90 on): a
//! kernel fetches its weights while the last cubes of the kernel before still work, and waits only before it reads what that wrote.
//!
//! Kernels that do this wait by [`await_earlier`] before they touch anything that another launch of the step writes, and before they
//! write anything, so that a launch that has ended says that all before it have. cubecl records every launch behind the end of the
//! one before; [`overlap`] changes that in the recording.

use super::NotTaken;
use cubecl::client::Client;
use cubecl::prelude::*;

/// Waits until all earlier launches have ended and what they wrote is seen. Everything before it may run while they do.
#[cube]
pub(super) fn await_earlier() {
    gpu_asm!("griddepcontrol.wait;");
}

/// As [`await_earlier`], once a value is there: compilers would move what was asked of memory behind the wait.
#[cube]
pub(super) fn await_earlier_with(word: u32) {
    // An operand has to be a value, not a variable; and the comparison is nothing that can be left out.
    let word = word | 0u32;
    gpu_asm!(
        "{{ .reg .pred p; setp.eq.u32 p, {}, 0x7fc1d2e3; @p nanosleep.u32 1; griddepcontrol.wait; }}",
        in(_) word
    );
}

/// Lets the launch behind this one begin, once all cubes have come here.
#[cube]
pub(super) fn let_later_begin() {
    gpu_asm!("griddepcontrol.launch_dependents;");
}

/// Returns `Ok` where kernels are compiled so that they can overlap: on CUDA devices of compute capability 9.0 and up, which are those
/// with clusters, under a driver that records such dependencies.
///
/// # Errors
/// `Runtime`, `Device`, `Driver`.
pub fn support(client: &Client) -> Result<(), NotTaken> {
    match client {
        client if client.name() != "cuda" => Err(NotTaken::Runtime),
        client if !client.features().cube_cluster => Err(NotTaken::Device),
        _ => driver_support(),
    }
}

/// Returns true if kernels are compiled so that their launches can overlap; if not, [`support`] gives the reason.
pub fn is_known(client: &Client) -> bool {
    support(client).is_ok()
}

/// Lets the launches recorded so far overlap where the later of two waits by itself; returns how many do. Called between the start of a
/// capture and its end; on an error the recording is not to be used.
///
/// # Errors
/// `Failed`, with what refused.
#[cfg(feature = "cuda")]
pub fn overlap(client: &Client) -> Result<usize, NotTaken> {
    crate::cuda::overlap::overlap(client).map_err(NotTaken::failed)
}

#[cfg(feature = "cuda")]
use crate::cuda::overlap::driver_support;

/// Fails: no runtime but CUDA's has it.
///
/// # Errors
/// `Runtime`.
#[cfg(not(feature = "cuda"))]
pub fn overlap(_client: &Client) -> Result<usize, NotTaken> {
    Err(NotTaken::Runtime)
}

/// Returns `Ok`: without a driver kernels are compiled and never run.
#[cfg(not(feature = "cuda"))]
fn driver_support() -> Result<(), NotTaken> {
    Ok(())
}
