//! The kinds of stage, one file each and one line in [`catalogue`]. Stages talk to the inference port, never to an engine.

mod bench_starts;
mod bench_tokens;
mod bench_watch;
mod capture_activations;
mod chat;
mod decode_bench;
mod diff;
mod load;
mod peak_memory;
mod ppl;
mod prefill_bench;
mod quantize;
mod report;
mod text;
mod tokenizer;

use crate::stage::{Catalogue, Stage};
use std::sync::Arc;

/// Kinds that make a model.
pub const MODELS: &[&str] = &["load", "quantize"];

/// Returns every kind there is.
pub fn catalogue() -> Catalogue {
    let stages: [Arc<dyn Stage>; 8] = [
        Arc::new(load::Load),
        Arc::new(quantize::Quantize),
        Arc::new(prefill_bench::PrefillBench),
        Arc::new(decode_bench::DecodeBench),
        Arc::new(ppl::Ppl),
        Arc::new(capture_activations::CaptureActivations),
        Arc::new(diff::Diff),
        Arc::new(report::Report),
    ];
    Catalogue::new(stages)
}
