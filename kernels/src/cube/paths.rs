//! Which of the fast ways a device's work takes, and why it doesn't take the others. Results are the same within rounding either way;
//! times are not, so that a caller warns once and records it.

use std::fmt;

/// Why a fast way was not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NotTaken {
    /// Only CUDA has it.
    #[error("only CUDA has it")]
    Runtime,
    #[error("it needs compute capability 9.0")]
    Device,
    /// Versions as CUDA numbers them: 12030 is 12.3.
    #[error("it needs a driver for CUDA {}.{}, this one is for {}.{}", needed / 1000, needed % 1000 / 10, found / 1000, found % 1000 / 10)]
    Driver { needed: i32, found: i32 },
    /// Nothing has been computed yet that would take it.
    #[error("it was not tried yet")]
    Untried,
    #[error("{0}")]
    Failed(String),
}

impl NotTaken {
    /// Takes the text of an error, in one line and without the backtrace that cubecl's errors end with.
    pub fn failed(error: impl fmt::Display) -> NotTaken {
        let text = error.to_string();
        let text = text.split("\nBacktrace").next().unwrap_or_default();
        NotTaken::Failed(text.split_whitespace().collect::<Vec<_>>().join(" "))
    }

    /// Returns true if the machine could have taken it, so that a user should hear of it.
    pub fn is_unexpected(&self) -> bool {
        matches!(self, NotTaken::Driver { .. } | NotTaken::Failed(_))
    }
}

/// What a model's work on a device takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// Version of the cuBLAS that multiplies the matrices of whole sequences, as 13.0.2; without it cubecl's kernels do.
    pub cublas: Result<String, NotTaken>,
    /// A decoded token is one replayed graph; without it, launches one by one.
    pub recorded: Result<(), NotTaken>,
    /// Launches of that graph that begin before the one in front of them has ended; without it, one begins behind the other.
    pub overlapped: Result<usize, NotTaken>,
}

impl Paths {
    /// Returns what a user should hear of: fast ways that this machine has and that were not taken.
    pub fn warnings(&self) -> Vec<String> {
        let ways = [
            ("multiply without cuBLAS", self.cublas.as_ref().err()),
            ("decode without a recorded graph", self.recorded.as_ref().err()),
            ("decode without overlapping launches", self.overlapped.as_ref().err()),
        ];
        let unexpected =
            ways.into_iter().filter_map(|(what, why)| Some((what, why.filter(|why| why.is_unexpected())?)));
        unexpected.map(|(what, why)| format!("{what}, which is slower: {why}")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_machine_could_have_taken_is_warned_of() {
        let paths = Paths {
            cublas: Err(NotTaken::failed("libcublas is not on the library path")),
            recorded: Ok(()),
            overlapped: Err(NotTaken::Driver { needed: 12_030, found: 12_020 }),
        };
        assert_eq!(
            paths.warnings(),
            [
                "multiply without cuBLAS, which is slower: libcublas is not on the library path",
                "decode without overlapping launches, which is slower: it needs a driver for CUDA 12.3, this one is for 12.2",
            ]
        );
        let failed = NotTaken::failed("A validation error happened\nCaused by:\n  a reason\nBacktrace:\n 0: main");
        assert_eq!(failed.to_string(), "A validation error happened Caused by: a reason");
        let others = Paths {
            cublas: Err(NotTaken::Runtime),
            recorded: Err(NotTaken::Untried),
            overlapped: Err(NotTaken::Device),
        };
        assert!(others.warnings().is_empty());
    }
}
