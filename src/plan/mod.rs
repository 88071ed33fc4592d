//! Plans: the DAG of a pipeline's stages, each with its cache key and the reason it will or won't run. Pure: what it must know
//! of the world it asks through [`Facts`].

mod build;
mod explain;
mod external;
mod keys;
mod select;
mod types;

pub use build::{Facts, MissingFile, PlanError, build, miss_reason, model_of};
pub use external::{Located, LocatedFile, Source, SourceFile, SourceKind, named_sources, tidy_path};
pub use keys::{InputKey, resolve_key};
pub use select::{Remeasure, Selection};
pub use types::{Key, KeyFields, Plan, PlanEdge, PlanNode, Reason};
