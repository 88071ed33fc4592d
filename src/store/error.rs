//! Why the store could not read or write.

use super::manifest::Damage;
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
    #[error("write {path}: {reason}")]
    Write { path: PathBuf, reason: String },
    #[error("use the artifact {key} of stage {stage}: {damage}; run again, and it is computed anew")]
    Damaged { key: String, stage: String, damage: Damage },
    #[error(
        "tell which artifacts are in use: {path}: {reason}; nothing was removed. Mend or remove it, or use --force to count it as \
         referring to nothing"
    )]
    References { path: PathBuf, reason: String },
    #[error("read {path}: it changed while it was read; run again when nothing writes to it any more")]
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
