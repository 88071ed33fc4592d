//! The engine that tests of models run on: the CPU, or what `LABPIPE_TEST_DEVICE` names, on the path `LABPIPE_TEST_EXECUTION`
//! (`auto`, `burn`, `fused`).
#![allow(dead_code, reason = "each test file uses what it needs")]

use labpipe::engine;
use labpipe::inference::{Engine, ExecutionChoice};
use std::sync::Arc;

/// Returns the device's name.
pub fn device() -> String {
    std::env::var("LABPIPE_TEST_DEVICE").unwrap_or_else(|_| "cpu".to_owned())
}

/// Returns the path that was asked for.
pub fn execution() -> ExecutionChoice {
    match std::env::var("LABPIPE_TEST_EXECUTION") {
        Ok(name) => name.parse().expect("LABPIPE_TEST_EXECUTION is auto, burn or fused"),
        Err(_) => ExecutionChoice::Auto,
    }
}

/// Opens the device on that path.
pub fn engine() -> Arc<dyn Engine> {
    engine::build_within(&device(), None, execution()).expect("the device").0
}
