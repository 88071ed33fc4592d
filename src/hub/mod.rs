//! The Hugging Face hub: what an id names, where it lies in the cache on disk, and how it gets there.
//!
//! The cache has the layout of Python's `huggingface_hub` and is shared with it. What is there is used as it is, without asking
//! the hub; what isn't is downloaded by hf-hub (feature `hub`), checked against the size and the SHA-256 that the hub names,
//! and a snapshot becomes visible under its revision once it is whole.

mod cache;
#[cfg(feature = "hub")]
mod download;
mod error;
mod reference;
mod settings;

pub use cache::{commit, is_model_file, is_template_folder, locate, shards};
pub use error::HubError;
pub use reference::{HubReference, ModelLocation, RepoKind};
pub use settings::HubSettings;

use crate::event::Progress;
use std::path::PathBuf;

/// Returns where a model's folder, or the one file that `reference` names, lies on disk, downloading what is missing.
///
/// # Errors
/// `Offline` where it would have to be downloaded and must not be; whatever went wrong with the hub otherwise.
pub fn fetch(reference: &HubReference, settings: &HubSettings, progress: &dyn Progress) -> Result<PathBuf, HubError> {
    let found = locate(reference, settings);
    match found {
        Some(path) if cache::is_whole(&path) || settings.is_offline => Ok(path),
        _ if settings.is_offline => {
            Err(HubError::Offline { id: reference.to_string(), cache: settings.cache_dir.clone() })
        }
        found => match download(reference, settings, progress) {
            // What is there suffices for much: a model without its tokenizer can still be timed.
            Err(HubError::Unreachable { .. }) if found.is_some() => Ok(found.unwrap_or_default()),
            result => result,
        },
    }
}

/// Reads the id of a dataset's file: `hf://datasets/org/name[@revision]/path`.
///
/// # Errors
/// `Reference` where `written` names no file of a dataset.
pub fn dataset_reference(written: &str) -> Result<HubReference, HubError> {
    let reference = HubReference::parse(written)?;
    if reference.kind != RepoKind::Dataset || reference.file.is_none() {
        let reason = "expected hf://datasets/ORG/NAME[@REVISION]/PATH/OF/THE/FILE".to_owned();
        return Err(HubError::Reference { written: written.to_owned(), reason });
    }
    Ok(reference)
}

/// Returns where a dataset's file lies on disk, downloading it if need be.
///
/// # Errors
/// As [`dataset_reference`] and [`fetch`].
pub fn dataset_file(written: &str, settings: &HubSettings, progress: &dyn Progress) -> Result<PathBuf, HubError> {
    fetch(&dataset_reference(written)?, settings, progress)
}

#[cfg(feature = "hub")]
use download::download;

#[cfg(not(feature = "hub"))]
fn download(reference: &HubReference, settings: &HubSettings, _: &dyn Progress) -> Result<PathBuf, HubError> {
    Err(HubError::NotBuilt { id: reference.to_string(), cache: settings.cache_dir.clone() })
}
