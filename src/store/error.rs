//! Why the store could not read or write.

use std::io;
use std::path::{Path, PathBuf};

/// An error of the store. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    #[error("{verb} {path}: {source}{}", remedy(source))]
    Io { verb: &'static str, path: PathBuf, source: io::Error },
    #[error("read {path}: {reason}")]
    Format { path: PathBuf, reason: String },
    #[error("write {path}: {reason}")]
    Parquet { path: PathBuf, reason: String },
    #[error("read {path}: it changed while it was read; run again when whoever writes it is done")]
    Unsteady { path: PathBuf },
    #[error("wait for another labpipe that computes {key}: cancelled")]
    Cancelled { key: String },
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "; free some space (labpipe cache gc removes what no run refers to) and run again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "; choose another folder with --cache or --results"
        }
        _ => "",
    }
}

impl StoreError {
    /// Returns a function that wraps an I/O error with what was being done.
    pub fn io(verb: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError + use<> {
        let path = path.to_owned();
        move |source| StoreError::Io { verb, path, source }
    }

    /// Returns true where the disk is full.
    pub fn is_disk_full(&self) -> bool {
        let full =
            |source: &io::Error| matches!(source.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded);
        matches!(self, StoreError::Io { source, .. } if full(source))
    }
}
