//! Artifacts: the records that stages leave. Field names are a contract with every reader of the JSON.
//!
//! Each kind's body is one type, which the stage writes and everything else reads ([`RecordBody`]); those of `load` and `quantize`
//! hold a model's recipe and stand in `inference`.

mod bench;
mod disturbance;
mod execution;
mod interval;
mod layers;
mod models;
pub mod number;
mod ppl;
mod record;
mod run;

pub use bench::{
    BenchCommon, DecodeRecord, DecodeResult, MemoryFigures, PowerResult, PrefillRecord, PrefillResult, StartResult,
    Statistics,
};
pub use disturbance::{DeviceUse, DiscardedAttempt, Disturbance, HostFigures};
pub use execution::Execution;
pub use interval::BlockInterval;
pub use layers::{CaptureRecord, CapturedTensor, DiffRecord, ModuleDiff};
pub use models::{QuantizeTotals, QuantizedModule, ReportRecord, ReportedFile, SavedFolder};
pub use ppl::{DivergenceResult, KeptLogProbs, PplRecord, PplResult, TokenScores, TokenScoresFile};
pub use record::{FORMAT_VERSION, Key, KeyFields, Record, RecordBody, RecordError, RecordHead, key_of};
pub use run::StageStatus;
