//! A GGUF file as a checkpoint: tensors under Hugging Face's names, in Hugging Face's order of rows; the `config.json` that its
//! metadata stands for; what config.json has no field for, written into the spec; and the account of its keys and tensors.
//!
//! Where the metadata leaves something open, llama.cpp decides (sources of 2026-10: `llama-model.cpp`, `llama-context.cpp` and
//! `src/models/`); where llama.cpp leaves out what the model has, transformers does. It knows no forward pass.

mod account;
mod architecture;
mod config;
mod metadata;
mod neutral;
mod rope;
mod spec;
mod tensors;

pub use tensors::{GgufCheckpoint, is_gguf};
