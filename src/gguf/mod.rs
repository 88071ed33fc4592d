//! GGUF files: header, metadata, tensors and the tokenizer in them. The room knows the container and its block formats, no model:
//! which tensor plays which part is the engine's business.
//!
//! Every count, length and offset is checked against the file's real size before anything is allocated for it; metadata stays in
//! the memory map until it is asked for.

mod blocks;
mod cursor;
mod error;
mod file;
mod k_blocks;
mod metadata;
mod pre_tokenizer;
mod tokenizer;
mod types;

pub use error::GgufError;
pub use file::{GgufFile, GgufTensor};
pub use metadata::{MetaArray, MetaValue};
pub use tokenizer::{tokenizer_config, tokenizer_json};
pub use types::{GGML_TYPES, GgmlType};
