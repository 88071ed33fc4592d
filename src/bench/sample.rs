//! Warm-up, then samples.

use crate::event::Progress;
use crate::inference::InferenceError;
use crate::stage::StageError;

/// How many passes to make.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SamplePlan {
    /// Passes made first, whose times are thrown away.
    pub warmup: usize,
    /// Passes whose times are kept.
    pub samples: usize,
}

/// An error that has a value for "the user asked to stop".
pub trait Cancellable {
    fn cancelled() -> Self;
}

impl Cancellable for StageError {
    fn cancelled() -> StageError {
        StageError::Cancelled
    }
}

impl Cancellable for InferenceError {
    fn cancelled() -> InferenceError {
        InferenceError::Cancelled
    }
}

/// Runs `pass` `warmup + samples` times and returns what it returned for each sample, in order.
///
/// `pass` takes the pass's index, counted from 0 over warm-up and samples, and times itself; whatever else happens
/// here is outside of the clock. Progress counts every pass.
///
/// # Errors
/// The first error of `pass`; `E::cancelled()` before the next pass once the user asked to stop.
pub fn sample<T, E: Cancellable>(
    plan: &SamplePlan,
    progress: &dyn Progress,
    mut pass: impl FnMut(usize) -> Result<T, E>,
) -> Result<Vec<T>, E> {
    let n_passes = plan.warmup + plan.samples;
    progress.begin(Some(n_passes as u64), "passes");
    let mut kept = Vec::with_capacity(plan.samples);
    for pass_idx in 0..n_passes {
        if progress.is_cancelled() {
            return Err(E::cancelled());
        }
        let value = pass(pass_idx)?;
        if pass_idx >= plan.warmup {
            kept.push(value);
        }
        progress.advance(1);
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Level, NullProgress};
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Asks to stop after a number of passes.
    struct StopAfter {
        n_passes: u64,
        n_done: AtomicU64,
    }

    impl Progress for StopAfter {
        fn begin(&self, total: Option<u64>, unit: &str) {
            assert_eq!((total, unit), (Some(5), "passes"));
        }
        fn advance(&self, n: u64) {
            self.n_done.fetch_add(n, Ordering::Relaxed);
        }
        fn note(&self, _level: Level, _text: &str) {}
        fn is_cancelled(&self) -> bool {
            self.n_done.load(Ordering::Relaxed) >= self.n_passes
        }
    }

    #[test]
    fn warm_up_passes_are_made_and_thrown_away() {
        let scripted = [9.0, 8.0, 0.3, 0.1, 0.2];
        let plan = SamplePlan { warmup: 2, samples: 3 };
        let kept = sample(&plan, &NullProgress, |pass_idx| Ok::<f64, StageError>(scripted[pass_idx])).unwrap();
        assert_eq!(kept, [0.3, 0.1, 0.2]);
    }

    #[test]
    fn the_first_error_stops_sampling() {
        let mut n_passes = 0;
        let plan = SamplePlan { warmup: 0, samples: 3 };
        let result = sample(&plan, &NullProgress, |pass_idx| {
            n_passes += 1;
            if pass_idx == 1 { Err(InferenceError::Unsupported("broken".to_owned())) } else { Ok(1.0) }
        });
        assert!(matches!(result, Err(InferenceError::Unsupported(_))));
        assert_eq!(n_passes, 2);
    }

    #[test]
    fn a_cancelled_measurement_makes_no_further_pass() {
        let progress = StopAfter { n_passes: 2, n_done: AtomicU64::new(0) };
        let mut n_passes = 0;
        let plan = SamplePlan { warmup: 1, samples: 4 };
        let result: Result<Vec<f64>, StageError> = sample(&plan, &progress, |_| {
            n_passes += 1;
            Ok(1.0)
        });
        assert!(result.is_err_and(|error| error.is_cancelled()));
        assert_eq!(n_passes, 2);
    }
}
