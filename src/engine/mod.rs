//! The engine: burn on the device chosen at run time. It knows neither YAML nor the command line.
//!
//! A model family is one file in `families/`; the executor in `forward` interprets what it says. Weights stay in their
//! stored form and are multiplied by the kernels crate's backend extension.

mod account;
mod attention;
#[cfg(any(feature = "cuda", test))]
mod board;
mod burn_engine;
mod checkpoint;
mod computed_with;
mod device;
#[cfg(any(feature = "cuda", test))]
mod energy_meter;
mod families;
mod footprint;
mod forward;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod gpu;
mod host_decode;
mod host_load;
mod host_sums;
mod kv_cache;
mod memory;
mod model;
mod model_room;
#[cfg(feature = "cuda")]
mod nvidia;
mod pinning;
mod placing;
mod proc_files;
mod processor_speed;
mod rope;
mod save;
mod score;
mod source;
mod spec;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod step_decode;
mod survey;
mod tap;
mod weights;

pub use burn_engine::BurnEngine;
pub use device::{build, build_within};
pub use families::FAMILIES;
pub use memory::{keep_freed_memory, rss_anon_bytes};
#[cfg(feature = "cuda")]
pub use nvidia::gpus;
pub use pinning::pin_threads;
pub use processor_speed::{know_processor_speeds, processor_speeds};
