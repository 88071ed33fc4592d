//! What a pipeline names outside the cache, as it lies on disk: where, which files, with which content. And whether it is still so when a
//! stage reads it.

use crate::dataset;
use crate::hub::{
    HubReference, HubSettings, ModelLocation, dataset_reference, is_model_file, is_template_folder, locate, shards,
};
use crate::pipeline::Pipeline;
use crate::plan::{Located, LocatedFile, Source, SourceFile, SourceKind, named_sources, tidy_path};
use crate::quantization::{self, QuantizationConfig};
use crate::stage::Catalogue;
use crate::store::{FileHashes, Stamp, StoreError};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, Metadata};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// The files that pipelines name.
pub struct Sources {
    /// Relative paths start here.
    root: PathBuf,
    hub: HubSettings,
    hashes: FileHashes,
}

/// How files stood when a stage began, by name.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stamps(BTreeMap<String, (PathBuf, Stamp)>);

/// Why something outside the cache can't be used. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    #[error("{written}: {what} (looked in {})", root.display())]
    Nowhere { written: String, what: &'static str, root: PathBuf },
    #[error("{0}")]
    Elsewhere(String),
    #[error("list {}: {source}", path.display())]
    List { path: PathBuf, source: io::Error },
    #[error("read {}: {reason}", path.display())]
    File { path: PathBuf, reason: String },
    #[error("read {name}: it changed while the run was going on, its content is not what was planned with; run again")]
    Changed { name: String },
    #[error("read {name}: it was written to while the stage read it; run again when it is left alone")]
    Touched { name: String },
    #[error(
        "read {name}: it is gone, though it was there when the run was planned; put it back, or run again without it"
    )]
    Gone { name: String },
    #[error("read {name}: it was not there when the run was planned; run again")]
    Appeared { name: String },
    #[error(transparent)]
    Store(StoreError),
}

impl SourceError {
    /// Names the file that can't be read. What the store advises is about its own folders.
    fn of(error: StoreError) -> SourceError {
        match error {
            StoreError::Io { path, source, .. } => SourceError::File { path, reason: source.to_string() },
            other => SourceError::Store(other),
        }
    }
}

impl Sources {
    pub fn new(root: &Path, hub: HubSettings, hashes: FileHashes) -> Sources {
        Sources { root: root.to_owned(), hub, hashes }
    }

    /// Returns the files that something consists of.
    ///
    /// # Errors
    /// `Nowhere` and `Elsewhere` where it is not there, `List` and `File` where it can't be looked at.
    pub fn locate(&self, kind: SourceKind, written: &str) -> Result<Located, SourceError> {
        if let Some(reference) = hub_reference(kind, written, &self.root)? {
            let name = reference.to_string();
            let files = match locate(&reference, &self.hub) {
                Some(dir) if dir.is_dir() => model_files(&name, &dir)?,
                path => vec![LocatedFile { name: name.clone(), path }],
            };
            return Ok(Located { name, files });
        }
        if kind == SourceKind::Text {
            let path = dataset::locate(written, &self.root, &self.hub);
            let path = path.map_err(|error| SourceError::Elsewhere(error.to_string()))?;
            return Ok(Located {
                name: written.to_owned(),
                files: vec![LocatedFile { name: written.to_owned(), path }],
            });
        }
        let (name, path) = (tidy_path(written), self.root.join(written));
        let nowhere = |what| SourceError::Nowhere { written: written.to_owned(), what, root: self.root.clone() };
        let no_model = "no such model folder or GGUF file";
        let meta = match fs::metadata(&path) {
            Ok(meta) => meta,
            Err(error) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&error.kind()) => {
                return Err(nowhere(if kind == SourceKind::Model { no_model } else { "no such file" }));
            }
            Err(error) => return Err(SourceError::File { path, reason: error.to_string() }),
        };
        if kind == SourceKind::Model && meta.is_dir() {
            return Ok(Located { files: model_files(&name, &path)?, name });
        }
        let is_gguf = path.extension().is_some_and(|extension| extension == "gguf");
        match (kind, meta.is_file()) {
            (SourceKind::Model, true) if !is_gguf => Err(nowhere(no_model)),
            (_, true) => Ok(Located { files: vec![LocatedFile { name: name.clone(), path: Some(path) }], name }),
            (SourceKind::Model, false) => Err(nowhere(no_model)),
            (_, false) => Err(nowhere("it is no file")),
        }
    }

    /// Returns a file's content hash.
    ///
    /// # Errors
    /// `Store`.
    pub fn hash(&self, path: &Path) -> Result<String, SourceError> {
        self.hashes.get(path).map_err(SourceError::of)
    }

    /// Writes down the hashes that were computed.
    ///
    /// # Errors
    /// `Store`.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.hashes.flush()
    }

    /// Checks that what a stage reads is what was planned with: the same files, with the same content. A file that was not touched
    /// costs a look at its stamp.
    ///
    /// # Errors
    /// `Changed`, `Gone`, `Appeared`; whatever keeps a file from being read.
    pub fn verify(&self, sources: &[&Source]) -> Result<Stamps, SourceError> {
        let mut stamps = Stamps::default();
        sources.iter().try_for_each(|source| self.verify_one(source, &mut stamps))?;
        Ok(stamps)
    }

    /// Checks the same after a stage, and that nothing was written to meanwhile: a file that was replaced and put back has the content
    /// that was planned with, and may have been read with another.
    ///
    /// # Errors
    /// As [`Sources::verify`], and `Touched`.
    pub fn verify_since(&self, before: &Stamps, sources: &[&Source]) -> Result<(), SourceError> {
        let after = self.verify(sources)?;
        match after.0.iter().find(|(name, stamp)| before.0.get(*name) != Some(*stamp)) {
            Some((name, _)) => Err(SourceError::Touched { name: name.clone() }),
            None => Ok(()),
        }
    }

    fn verify_one(&self, source: &Source, stamps: &mut Stamps) -> Result<(), SourceError> {
        let located = match self.locate(source.kind, &source.written) {
            Ok(located) => located,
            Err(SourceError::Nowhere { .. } | SourceError::Elsewhere(_)) => {
                return Err(SourceError::Gone { name: source.written.clone() });
            }
            Err(error) => return Err(error),
        };
        let names: BTreeSet<&str> = located.files.iter().map(|file| file.name.as_str()).collect();
        if let Some(planned) = source.files.iter().find(|planned| !names.contains(planned.name.as_str())) {
            return Err(SourceError::Gone { name: planned.name.clone() });
        }
        for file in &located.files {
            let name = || file.name.clone();
            let planned = source.files.iter().find(|planned| planned.name == file.name);
            let planned = planned.ok_or_else(|| SourceError::Appeared { name: name() })?;
            let Some(path) = &file.path else {
                // Nothing was there when it was planned either: the stage reports that.
                let was_there = planned.path.is_some();
                if was_there { return Err(SourceError::Gone { name: name() }) } else { continue }
            };
            let looked = FileHashes::stamp(path).and_then(|stamp| Ok((stamp, self.hashes.get(path)?)));
            let (stamp, hash) = match looked {
                Ok(found) => found,
                Err(StoreError::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                    return Err(SourceError::Gone { name: name() });
                }
                Err(error) => return Err(SourceError::of(error)),
            };
            stamps.0.insert(file.name.clone(), stamp);
            if hash != planned.hash && !means_the_same(source, planned, path) {
                return Err(SourceError::Changed { name: name() });
            }
        }
        Ok(())
    }
}

/// Returns what on the hub is named: a model by its id, a text only where it begins with `hf://`.
///
/// # Errors
/// `Elsewhere` for a text that begins with `hf://` and goes on wrongly.
fn hub_reference(kind: SourceKind, written: &str, root: &Path) -> Result<Option<HubReference>, SourceError> {
    let found = match kind {
        SourceKind::Model => ModelLocation::parse(written, root).map(|location| match location {
            ModelLocation::Hub(reference) => Some(reference),
            ModelLocation::Path(_) => None,
        }),
        SourceKind::Text if written.starts_with("hf://") => dataset_reference(written).map(Some),
        _ => Ok(None),
    };
    found.map_err(|error| SourceError::Elsewhere(error.to_string()))
}

/// Returns everything that a pipeline names on the hub, each once. The plan reports what is wrong with an id, with its stage.
pub fn hub_references(pipeline: &Pipeline, catalogue: &Catalogue, root: &Path) -> Vec<HubReference> {
    let mut found: Vec<HubReference> = Vec::new();
    for (kind, written) in named_sources(pipeline, catalogue) {
        if let Ok(Some(reference)) = hub_reference(kind, &written, root)
            && !found.contains(&reference)
        {
            found.push(reference);
        }
    }
    found
}

/// Returns true for a quantization config that was edited and means what it meant.
fn means_the_same(source: &Source, planned: &SourceFile, path: &Path) -> bool {
    let Some(before) = source.config.as_ref().filter(|_| planned.field.is_empty()) else { return false };
    read_config(path).is_some_and(|now| now.canonical() == before.canonical())
}

/// Reads a quantization config; `None` where it is damaged, which the stage that reads it reports.
pub fn read_config(path: &Path) -> Option<QuantizationConfig> {
    let text = fs::read_to_string(path).ok()?;
    let stem = path.file_stem().map(|stem| stem.to_string_lossy().into_owned()).unwrap_or_default();
    quantization::parse(&text, &path.to_string_lossy(), &stem).ok()
}

/// Lists the files of a model folder that determine what is computed, sorted.
fn model_files(written: &str, dir: &Path) -> Result<Vec<LocatedFile>, SourceError> {
    let mut names = Vec::new();
    for name in entries(dir, &is_model_file)? {
        let path = dir.join(&name);
        regular(&path)?;
        names.push(name);
    }
    for folder in entries(dir, &is_template_folder)? {
        let path = dir.join(&folder);
        // A file of that name means nothing.
        if !metadata(&path)?.is_dir() {
            continue;
        }
        for name in entries(&path, &|name| name.ends_with(".jinja"))? {
            regular(&path.join(&name))?;
            names.push(format!("{folder}/{name}"));
        }
    }
    // Shards may be called anything. The stage that opens them reports one that is missing.
    let shards = shards(dir).unwrap_or_default().into_iter();
    for name in shards.filter(|name| !is_model_file(name) && dir.join(name).symlink_metadata().is_ok()) {
        regular(&dir.join(&name))?;
        names.push(name);
    }
    names.sort();
    let file = |name: String| LocatedFile { path: Some(dir.join(&name)), name: format!("{written}/{name}") };
    Ok(names.into_iter().map(file).collect())
}

/// Returns the names in a folder that are wanted. One that is no UTF-8 and would be wanted but for that is an error: it could not be
/// told from another.
fn entries(dir: &Path, is_wanted: &dyn Fn(&str) -> bool) -> Result<Vec<String>, SourceError> {
    let list = |source| SourceError::List { path: dir.to_owned(), source };
    let mut names = Vec::new();
    for entry in fs::read_dir(dir).map_err(list)? {
        match entry.map_err(list)?.file_name().into_string() {
            Ok(name) if is_wanted(&name) => names.push(name),
            Err(name) if is_wanted(&name.to_string_lossy()) => {
                let reason = "its name is not UTF-8; rename it, or remove it".to_owned();
                return Err(SourceError::File { path: dir.join(name), reason });
            }
            _ => {}
        }
    }
    Ok(names)
}

/// Checks that a model's file is one: no folder, no pipe, no link that leads nowhere.
fn regular(path: &Path) -> Result<(), SourceError> {
    let meta = metadata(path)?;
    let what = if meta.is_dir() { "it is a folder" } else { "it is no regular file" };
    match meta.is_file() {
        true => Ok(()),
        false => Err(SourceError::File { path: path.to_owned(), reason: format!("{what}; a file is expected there") }),
    }
}

fn metadata(path: &Path) -> Result<Metadata, SourceError> {
    fs::metadata(path).map_err(|error| {
        let target = fs::read_link(path).ok().filter(|_| error.kind() == ErrorKind::NotFound);
        let reason = match target {
            Some(target) => format!("it is a link to {}, which is not there", target.display()),
            None => error.to_string(),
        };
        SourceError::File { path: path.to_owned(), reason }
    })
}

#[cfg(test)]
mod tests;
