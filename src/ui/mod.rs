//! What a user sees of a run: bars on a terminal, plain lines elsewhere, JSON lines for machines; all on stderr. The summary
//! table goes to stdout. It knows events, nothing of what they come from.

mod bars;
mod lines;
mod summary;
mod table;

pub use bars::Bars;
pub use lines::{JsonLines, PlainLines};
pub use summary::summary_table;
pub use table::table;

use crate::event::{EventSink, Level};
use std::io::IsTerminal;
use std::sync::Arc;

/// How events are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// Bars on a terminal, plain lines elsewhere.
    Auto,
    Plain,
    Json,
}

/// Builds the sink; notes below `level` are left out.
pub fn sink(format: LogFormat, level: Level) -> Arc<dyn EventSink> {
    match format {
        LogFormat::Json => Arc::new(JsonLines),
        LogFormat::Auto if std::io::stderr().is_terminal() => Arc::new(Bars::new(level)),
        LogFormat::Auto | LogFormat::Plain => Arc::new(PlainLines { level }),
    }
}
