//! What an id names: `org/name`, `hf://org/name@revision/file.gguf`, `hf://datasets/org/name/path`.

use super::error::HubError;
use std::fmt;
use std::path::{Path, PathBuf};

const SCHEME: &str = "hf://";
const MAIN: &str = "main";

/// What kind of repository.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RepoKind {
    Model,
    Dataset,
}

/// A repository on the hub at a revision, or one file of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubReference {
    pub kind: RepoKind,
    /// `meta-llama/Llama-3.2-3B-Instruct`.
    pub repo: String,
    /// A branch, a tag or a commit; `main` unless given.
    pub revision: String,
    /// A path in the repository.
    pub file: Option<String>,
}

/// What a pipeline file names as a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelLocation {
    /// A folder or a file, as written.
    Path(PathBuf),
    Hub(HubReference),
}

impl ModelLocation {
    /// Tells paths from hub ids. What exists below `root` is a path. So is what starts with a folder that exists there: a typing
    /// error in `models/x` is no repository of `models`.
    ///
    /// # Errors
    /// `Reference` for a text that begins with `hf://` and goes on wrongly.
    pub fn parse(written: &str, root: &Path) -> Result<ModelLocation, HubError> {
        if written.starts_with(SCHEME) {
            return HubReference::parse(written).map(ModelLocation::Hub);
        }
        let path = ModelLocation::Path(PathBuf::from(written));
        let first = written.split('/').next().unwrap_or_default();
        if root.join(written).exists() || first.is_empty() || root.join(first).exists() || written.ends_with(".gguf") {
            return Ok(path);
        }
        let is_id = written.split('@').next().unwrap_or_default().split('/').count() == 2;
        match HubReference::parse(&format!("{SCHEME}{written}")) {
            Ok(reference) if is_id && reference.file.is_none() && reference.kind == RepoKind::Model => {
                Ok(ModelLocation::Hub(reference))
            }
            _ => Ok(path),
        }
    }
}

impl HubReference {
    /// Reads `hf://[datasets/]ORG/NAME[@REVISION][/PATH]`; a slash in a revision is written `%2F`.
    ///
    /// # Errors
    /// `Reference`, telling what is wrong.
    pub fn parse(written: &str) -> Result<HubReference, HubError> {
        let fail = |reason: &str| HubError::Reference { written: written.to_owned(), reason: reason.to_owned() };
        let rest = written.strip_prefix(SCHEME).ok_or_else(|| fail("it does not begin with hf://"))?;
        let (kind, rest) = match rest.strip_prefix("datasets/") {
            Some(rest) => (RepoKind::Dataset, rest),
            None => (RepoKind::Model, rest.strip_prefix("models/").unwrap_or(rest)),
        };
        let mut segments = rest.split('/');
        let mut repo = Vec::new();
        let mut revision = MAIN.to_owned();
        for segment in segments.by_ref().take(2) {
            let (name, at) = segment.split_once('@').map_or((segment, None), |(name, at)| (name, Some(at)));
            if !is_repo_word(name) {
                return Err(fail("expected ORG/NAME of letters, digits and . - _ "));
            }
            repo.push(name);
            if let Some(at) = at {
                revision = at.replace("%2F", "/").replace("%2f", "/");
                break;
            }
        }
        if !is_path(&revision) {
            return Err(fail("the revision after @ is not the name of a branch, a tag or a commit"));
        }
        let file: Vec<&str> = segments.collect();
        let file = (!file.is_empty()).then(|| file.join("/"));
        if file.as_ref().is_some_and(|file| !is_path(file)) {
            return Err(fail("the path in the repository is empty in part, leads out of it or has unusual characters"));
        }
        Ok(HubReference { kind, repo: repo.join("/"), revision, file })
    }

    /// Returns the folder of the cache that is this repository's.
    pub fn folder_name(&self) -> String {
        let kind = match self.kind {
            RepoKind::Model => "models",
            RepoKind::Dataset => "datasets",
        };
        format!("{kind}--{}", self.repo.replace('/', "--"))
    }

    /// Returns the repository's page below an endpoint.
    pub fn page(&self, endpoint: &str) -> String {
        let kind = if self.kind == RepoKind::Dataset { "datasets/" } else { "" };
        format!("{endpoint}/{kind}{}", self.repo)
    }
}

/// The form that recipes and keys hold; `main` is left out.
impl fmt::Display for HubReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = if self.kind == RepoKind::Dataset { "datasets/" } else { "" };
        write!(f, "{SCHEME}{kind}{}", self.repo)?;
        if self.revision != MAIN {
            write!(f, "@{}", self.revision.replace('/', "%2F"))?;
        }
        match &self.file {
            Some(file) => write!(f, "/{file}"),
            None => Ok(()),
        }
    }
}

fn is_repo_word(word: &str) -> bool {
    let has_edge = word.starts_with(['.', '-']) || word.ends_with(['.', '-']);
    !word.is_empty()
        && word.len() <= 96
        && !has_edge
        && !word.contains("--")
        && !word.contains("..")
        && word.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Returns true for a relative path that stays inside its folder and goes into a URL as it is.
pub fn is_path(path: &str) -> bool {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._-+=,@~()/".contains(c);
    path.chars().all(is_plain)
        && path.split('/').all(|segment| !segment.is_empty() && segment != "." && segment != "..")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_and_written_back() {
        for (written, repo, revision, file) in [
            ("hf://org/name", "org/name", "main", None),
            ("hf://gpt2", "gpt2", "main", None),
            ("hf://org/name@v1.0", "org/name", "v1.0", None),
            ("hf://org/name@refs%2Fpr%2F1/a/b.gguf", "org/name", "refs/pr/1", Some("a/b.gguf")),
            ("hf://datasets/Salesforce/wikitext/w/test.parquet", "Salesforce/wikitext", "main", Some("w/test.parquet")),
        ] {
            let reference = HubReference::parse(written).expect("a reference");
            assert_eq!((reference.repo.as_str(), reference.revision.as_str()), (repo, revision));
            assert_eq!(reference.file.as_deref(), file);
            assert_eq!(reference.to_string(), written);
        }
    }

    #[test]
    fn ids_that_lead_out_of_the_cache_are_refused() {
        for written in [
            "hf://",
            "hf://../name",
            "hf://org/..",
            "hf://org/name/../../x",
            "hf://org/name@../x",
            "hf://org/name@",
            "hf://org/name//x",
            "hf://a--b/c",
            "hf://org/na me",
            "hf://org/name/a b",
            "org/name",
            "hf://org/name/x\\y",
        ] {
            assert!(HubReference::parse(written).is_err(), "{written}");
        }
    }

    #[test]
    fn a_path_that_is_there_is_no_hub_id_and_neither_is_one_whose_folder_is() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        std::fs::create_dir_all(dir.path().join("models/tiny")).expect("a folder");
        let parse = |written: &str| ModelLocation::parse(written, dir.path()).expect("a location");
        for path in ["models/tiny", "models/typo", "/somewhere/else", "tiny", "a/b/c", "org/file.gguf", "../x/y"] {
            assert_eq!(parse(path), ModelLocation::Path(PathBuf::from(path)));
        }
        for (written, id) in [("org/name", "hf://org/name"), ("org/name@v2", "hf://org/name@v2")] {
            let ModelLocation::Hub(reference) = parse(written) else { panic!("{written} is a hub id") };
            assert_eq!(reference.to_string(), id);
        }
        assert!(ModelLocation::parse("hf://org/../x", dir.path()).is_err());
    }
}
