//! Pipeline files: YAML text becomes a checked, expanded [`Pipeline`]. Pure: it opens no file and knows no engine.
//!
//! The text becomes a tree with positions (`yaml`), variables are substituted in it (`variables`), each stage is read alone
//! against its parameters' types (`read`), and the matrix is expanded (`expand`); every problem found on the way is reported.

mod cell_names;
mod diagnostics;
mod expand;
mod graph;
mod matrix;
mod parse;
mod read;
mod schema;
mod suggest;
mod types;
mod variables;

pub use matrix::github_matrix;
pub use parse::parse;
pub use read::expected;
pub use schema::schema;
pub use suggest::did_you_mean;
pub use types::{Cell, Diagnostic, ParseOptions, Pipeline, PipelineError, PipelineStage, matrix_value_name};
