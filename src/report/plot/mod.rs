//! Plots: pure functions from numbers to a [`Canvas`], which becomes PNG or SVG.
//!
//! Colours are those of Okabe and Ito ("Color universal design", 2008), which colour-blind readers can tell apart;
//! series also differ by marker.

mod axis;
mod canvas;
mod frontier;
mod scatter;
mod summary;

pub use canvas::{Canvas, Color};
pub use frontier::{FrontierPoint, frontier};
pub use scatter::scatter;
pub use summary::summary;

/// Why a plot could not be drawn.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum PlotError {
    #[error("load the embedded font")]
    Font,
    #[error("draw: {0}")]
    Draw(String),
    #[error("encode PNG: {0}")]
    Encode(String),
}
