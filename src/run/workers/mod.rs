//! Workers: child processes of this program. One owns one device and at most one model, and runs whole stages.
//!
//! The parent plans, schedules, commits and shows progress. A worker reads tasks on stdin and answers on stdout, one JSON object per
//! line; what is large it writes into the stage's staging folder itself. It ends when its stdin closes, so none outlives its parent.

mod child;
mod pool;
mod process;
mod protocol;

pub use child::serve;
pub use pool::Workers;
pub use process::{Launch, WorkerError};
