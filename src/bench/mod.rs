//! The sampling loop of measurements, and the rows that their records hold.
//!
//! This room knows neither model nor clock: a closure returns each sample's seconds as the engine timed them, so
//! tests script latencies instead of sleeping.

mod results;
mod sample;

pub use results::{BenchError, decode_label, decode_result, prefill_label, prefill_result};
pub use sample::{Cancellable, SamplePlan, sample};
