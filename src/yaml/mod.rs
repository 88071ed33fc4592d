//! YAML as a tree in which every value and key has its place and plain scalars keep their spelling.
//!
//! Scalars are read by the core schema of YAML 1.2. The tree is bounded: nesting, the size that aliases add, and the length of the
//! text. It does not know what a pipeline or a config is.

mod build;
mod error;
mod node;
mod scalar;
mod text;

pub use build::{MAX_DEPTH, parse};
pub use error::YamlError;
pub use node::{Key, Node, NodeValue, Place, TreeSize, Untyped};
pub use scalar::{is_yaml_1_1_bool, resolve_plain};
pub use text::{MAX_TEXT_BYTES, decode};
