//! Where a text that a pipeline names lies on this machine: a path below the root, or a file of a data set on the Hugging Face
//! hub.

use crate::event::NullProgress;
use crate::hub::{self, HubError, HubSettings, dataset_file, dataset_reference};
use std::path::{Path, PathBuf};

const SCHEME: &str = "hf://";

/// Why a text is not there. The text fits "failed to find {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    #[error("{source_name}: no such file (looked in {root})")]
    NoFile { source_name: String, root: String },
    #[error("{source_name}: failed to {reason}")]
    Hub { source_name: String, reason: HubError },
}

/// Returns the file that a pipeline's `source` means; nothing for one on the hub that is not in the cache yet. It asks the disk
/// alone.
///
/// # Errors
/// `NoFile` for a path that leads nowhere; `Hub` for what is no address of a data set's file.
pub fn locate(source: &str, root: &Path, settings: &HubSettings) -> Result<Option<PathBuf>, DatasetError> {
    if !source.starts_with(SCHEME) {
        return on_disk(source, root).map(Some);
    }
    let reference = dataset_reference(source).map_err(of(source))?;
    Ok(hub::locate(&reference, settings))
}

/// Returns the file that a pipeline's `source` means, downloading it where it is not in the cache.
///
/// # Errors
/// `NoFile` for a path that leads nowhere; `Hub` for what is no address of a data set's file or not to be had.
pub fn fetch(source: &str, root: &Path) -> Result<PathBuf, DatasetError> {
    if !source.starts_with(SCHEME) {
        return on_disk(source, root);
    }
    dataset_file(source, &HubSettings::from_env(), &NullProgress).map_err(of(source))
}

fn on_disk(source: &str, root: &Path) -> Result<PathBuf, DatasetError> {
    let path = root.join(source);
    if path.is_file() {
        return Ok(path);
    }
    Err(DatasetError::NoFile { source_name: source.to_owned(), root: root.display().to_string() })
}

fn of(source: &str) -> impl Fn(HubError) -> DatasetError {
    move |reason| DatasetError::Hub { source_name: source.to_owned(), reason }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_lead_out_of_the_cache_or_nowhere_are_errors() {
        let settings = HubSettings::from_env();
        for source in [
            "hf://datasets/a/b",
            "hf://datasets/a",
            "hf://models/a/b/c",
            "hf://datasets/../../etc/passwd",
            "hf://datasets/a/b/../../../etc/passwd",
            "hf://datasets/a/b@../x/f",
            "hf://datasets/a/b//f",
        ] {
            assert!(
                matches!(locate(source, Path::new("/nowhere"), &settings), Err(DatasetError::Hub { .. })),
                "{source}"
            );
        }
        let error = locate("no/such.txt", Path::new("/tmp"), &settings).expect_err("it is not there").to_string();
        assert_eq!(error, "no/such.txt: no such file (looked in /tmp)");
    }
}
