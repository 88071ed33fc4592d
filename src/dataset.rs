//! Where a text that a pipeline names lies on this machine: a path below the root, or a file of a data set on the Hugging
//! Face hub, taken from the hub's cache. The one place that knows `hf://datasets/…`; whoever downloads does it here.

use std::path::{Path, PathBuf};

const SCHEME: &str = "hf://";

/// Why a text is not there. The text fits "failed to find {error}".
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    #[error("{source_name}: no such file (looked in {root})")]
    NoFile { source_name: String, root: String },
    #[error("{source_name}: expected hf://datasets/OWNER/NAME[@REVISION]/PATH/IN/THE/DATA/SET")]
    Form { source_name: String },
    #[error(
        "{source_name}: it is not in the Hugging Face cache ({cache}); download it once (hf download --repo-type dataset {repo} {file}), or name a local file"
    )]
    NotCached { source_name: String, cache: String, repo: String, file: String },
}

/// Returns the file that a pipeline's `source` means.
///
/// # Errors
/// `NoFile` for a path that leads nowhere; `Form`, `NotCached` for a hub address.
pub fn locate(source: &str, root: &Path) -> Result<PathBuf, DatasetError> {
    if source.starts_with(SCHEME) {
        return cached(source, &hub_cache());
    }
    let path = root.join(source);
    if path.is_file() {
        return Ok(path);
    }
    Err(DatasetError::NoFile { source_name: source.to_owned(), root: root.display().to_string() })
}

/// A file of a data set.
#[derive(Debug, PartialEq, Eq)]
struct HubFile<'a> {
    /// `Salesforce/wikitext`.
    repo: &'a str,
    revision: &'a str,
    file: &'a str,
}

fn parse(source: &str) -> Option<HubFile<'_>> {
    let rest = source.strip_prefix(SCHEME)?.strip_prefix("datasets/")?;
    let (owner, rest) = rest.split_once('/')?;
    let (name, file) = rest.split_once('/')?;
    let (name, revision) = name.split_once('@').unwrap_or((name, "main"));
    let is_plain = |part: &str| {
        let fits = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        !part.is_empty() && !part.starts_with('.') && part.chars().all(fits)
    };
    // No way out of the cache folder: every part is a name of its own.
    let is_whole = [owner, name].into_iter().chain(file.split('/')).all(is_plain)
        && !revision.is_empty()
        && revision.split('/').all(is_plain);
    let end = SCHEME.len() + "datasets/".len();
    is_whole.then_some(HubFile { repo: &source[end..end + owner.len() + 1 + name.len()], revision, file })
}

/// Looks in the cache that huggingface_hub keeps: `datasets--OWNER--NAME/{refs/REVISION, snapshots/COMMIT/FILE}`.
fn cached(source: &str, cache: &Path) -> Result<PathBuf, DatasetError> {
    let hub = parse(source).ok_or_else(|| DatasetError::Form { source_name: source.to_owned() })?;
    let repo = cache.join(format!("datasets--{}", hub.repo.replace('/', "--")));
    // A revision is a branch or tag, whose commit `refs` names, or a commit itself.
    let commit = std::fs::read_to_string(repo.join("refs").join(hub.revision));
    let commit = commit.map_or_else(|_| hub.revision.to_owned(), |commit| commit.trim().to_owned());
    let path = repo.join("snapshots").join(commit).join(hub.file);
    if path.is_file() {
        return Ok(path);
    }
    Err(DatasetError::NotCached {
        source_name: source.to_owned(),
        cache: cache.display().to_string(),
        repo: hub.repo.to_owned(),
        file: hub.file.to_owned(),
    })
}

/// Returns the hub's cache folder as huggingface_hub finds it.
fn hub_cache() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(cache) = set("HF_HUB_CACHE").or_else(|| set("HUGGINGFACE_HUB_CACHE")) {
        return cache;
    }
    let home = set("HF_HOME").or_else(|| Some(set("XDG_CACHE_HOME")?.join("huggingface")));
    let home = home.or_else(|| Some(std::env::home_dir()?.join(".cache").join("huggingface")));
    home.unwrap_or_else(|| PathBuf::from(".cache/huggingface")).join("hub")
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/test-00000-of-00001.parquet";

    #[test]
    fn a_cached_file_is_found_by_branch_and_by_commit() {
        let cache = tempfile::tempdir().expect("a temporary folder");
        let repo = cache.path().join("datasets--Salesforce--wikitext");
        let folder = repo.join("snapshots/b08601e/wikitext-2-raw-v1");
        std::fs::create_dir_all(&folder).expect("folders");
        std::fs::create_dir_all(repo.join("refs")).expect("folders");
        std::fs::write(repo.join("refs/main"), "b08601e\n").expect("a file");
        std::fs::write(folder.join("test-00000-of-00001.parquet"), "x").expect("a file");
        let found = cached(SOURCE, cache.path()).expect("a file");
        assert!(found.ends_with("snapshots/b08601e/wikitext-2-raw-v1/test-00000-of-00001.parquet"));
        let by_commit = SOURCE.replace("wikitext/", "wikitext@b08601e/");
        assert_eq!(cached(&by_commit, cache.path()), Ok(found));
        let error = cached(&SOURCE.replace("test-", "train-"), cache.path()).expect_err("it is not there").to_string();
        assert!(
            error.contains("hf download --repo-type dataset Salesforce/wikitext wikitext-2-raw-v1/train-"),
            "{error}"
        );
    }

    #[test]
    fn addresses_that_lead_out_of_the_cache_or_nowhere_are_errors() {
        for source in [
            "hf://datasets/a/b",
            "hf://datasets/a",
            "hf://models/a/b/c",
            "hf://datasets/../../etc/passwd",
            "hf://datasets/a/b/../../../etc/passwd",
            "hf://datasets/a/b@../x/f",
            "hf://datasets/a/b//f",
        ] {
            assert!(matches!(cached(source, Path::new("/nowhere")), Err(DatasetError::Form { .. })), "{source}");
        }
        let error = locate("no/such.txt", Path::new("/tmp")).expect_err("it is not there").to_string();
        assert_eq!(error, "no/such.txt: no such file (looked in /tmp)");
    }
}
