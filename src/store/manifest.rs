//! An artifact's manifest, and whether a folder is what its manifest says. Every reader of a manifest goes through here: names that
//! lead out of the folder are refused before anything is opened.

use super::fs::{hash_pieces, walk};
use crate::artifact::{FORMAT_VERSION, Key, KeyFields, Record, key_of};
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

pub const MANIFEST: &str = "manifest.json";
pub const RECORD: &str = "record.json";
/// Longest name of a file or folder that file systems take, in bytes.
const MAX_NAME_BYTES: usize = 255;

/// What an artifact's folder holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    pub format_version: u32,
    pub key: String,
    pub pipeline: String,
    pub stage: String,
    pub kind: String,
    /// RFC 3339, UTC.
    pub created_at: String,
    /// blake3 over the files' hashes and the record's body: what consumers of a measurement have in their key.
    pub digest: String,
    /// Every file but this one.
    pub files: Vec<FileEntry>,
    /// What the key was made of.
    pub fields: KeyFields,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// Relative to the artifact's folder, with `/`.
    pub name: String,
    pub bytes: u64,
    pub blake3: String,
}

/// What is wrong with an artifact: the file in its folder, and how.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct Damage {
    pub file: String,
    pub reason: String,
}

impl Damage {
    fn new(file: &str, reason: impl Into<String>) -> Damage {
        Damage { file: file.to_owned(), reason: reason.into() }
    }
}

/// An artifact's manifest and record, as far as they can be verified without reading the other files.
#[derive(Debug, Clone)]
pub struct Inspected {
    pub manifest: Manifest,
    pub record: Record,
    /// blake3 of the manifest's own bytes: tells one commit of a key from another.
    pub manifest_blake3: String,
}

impl FileEntry {
    /// Returns true for what a person reads: neither Parquet nor weights.
    pub fn is_for_people(&self) -> bool {
        !self.name.ends_with(".parquet") && !self.name.ends_with(".safetensors") && self.name != RECORD
    }
}

impl Manifest {
    /// Reads a manifest's text.
    ///
    /// # Errors
    /// Where it is no manifest of this version, or a name in it is none of a file in the artifact's own folder.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, Damage> {
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| Damage::new(MANIFEST, error.to_string()))?;
        if manifest.format_version != FORMAT_VERSION {
            let reason = format!("format_version {} is not {FORMAT_VERSION}", manifest.format_version);
            return Err(Damage::new(MANIFEST, reason));
        }
        let mut seen = BTreeSet::new();
        for file in &manifest.files {
            let fault = name_fault(&file.name).or((!seen.insert(&file.name)).then_some("stands twice"));
            if let Some(fault) = fault {
                return Err(Damage::new(MANIFEST, format!("the file name {:?} {fault}", file.name)));
            }
        }
        if !manifest.files.iter().any(|file| file.name == RECORD) {
            return Err(Damage::new(MANIFEST, format!("it does not list {RECORD}")));
        }
        Ok(manifest)
    }

    /// Reads the manifest of an artifact's folder.
    ///
    /// # Errors
    /// As [`Manifest::parse`]; also where folder or file is a link.
    pub fn read(dir: &Path) -> Result<(Manifest, String), Damage> {
        let is_folder = fs::symlink_metadata(dir).map_err(|error| Damage::new(MANIFEST, error.to_string()))?.is_dir();
        if !is_folder {
            return Err(Damage::new(MANIFEST, "the artifact is a link or a file, not a folder"));
        }
        let bytes = read_regular(dir, MANIFEST)?;
        Ok((Manifest::parse(&bytes)?, blake3::hash(&bytes).to_hex().to_string()))
    }
}

/// Returns what is wrong with the name of a file in an artifact, if something is.
pub fn name_fault(name: &str) -> Option<&'static str> {
    let part_fault = |part: &str| match part {
        "" => Some("is absolute or has an empty part"),
        "." | ".." => Some("leads out of the artifact's folder"),
        _ if part.len() > MAX_NAME_BYTES => Some("is too long"),
        _ => None,
    };
    if name.is_empty() {
        return Some("is empty");
    }
    if name.chars().any(|c| c == '\\' || c.is_control()) {
        return Some("holds a backslash or a control character");
    }
    if name == MANIFEST {
        return Some("is the manifest's own");
    }
    name.split('/').find_map(part_fault)
}

/// Reads a file of an artifact, which must be a regular file.
fn read_regular(dir: &Path, name: &str) -> Result<Vec<u8>, Damage> {
    regular_size(dir, name)?;
    fs::read(dir.join(name)).map_err(|error| Damage::new(name, error.to_string()))
}

/// Returns the size of a file of an artifact. Neither it nor a folder on the way to it may be a link.
fn regular_size(dir: &Path, name: &str) -> Result<u64, Damage> {
    let mut path = dir.to_owned();
    let mut parts = name.split('/').peekable();
    while let Some(part) = parts.next() {
        path.push(part);
        let meta = fs::symlink_metadata(&path).map_err(|error| Damage::new(name, error.to_string()))?;
        match (parts.peek().is_some(), meta.is_dir(), meta.is_file()) {
            (true, true, _) => {}
            (false, _, true) => return Ok(meta.len()),
            _ => return Err(Damage::new(name, "it is a link or a special file")),
        }
    }
    Err(Damage::new(name, "it has no name"))
}

/// Reads an artifact's folder: manifest and record verified, every file there with its size. The content of the other files is
/// not read.
///
/// # Errors
/// The first thing that is not as it was committed.
pub fn inspect(dir: &Path, key: &Key) -> Result<Inspected, Damage> {
    let (manifest, manifest_blake3) = Manifest::read(dir)?;
    if manifest.key != key.0 || key_of(&manifest.fields) != *key {
        return Err(Damage::new(MANIFEST, "it belongs to another key than its folder"));
    }
    for file in &manifest.files {
        let bytes = regular_size(dir, &file.name)?;
        if bytes != file.bytes {
            return Err(Damage::new(&file.name, format!("expected {} bytes, found {bytes}", file.bytes)));
        }
    }
    let bytes = read_regular(dir, RECORD)?;
    let is_record = |file: &&FileEntry| file.name == RECORD;
    let expected = manifest.files.iter().find(is_record).map(|file| file.blake3.as_str());
    if expected != Some(blake3::hash(&bytes).to_hex().as_str()) {
        return Err(Damage::new(RECORD, "its content changed"));
    }
    let record = parse_record(&bytes)?;
    let head = &record.head;
    let is_own = [
        (&head.key, &manifest.key),
        (&head.pipeline, &manifest.pipeline),
        (&head.stage, &manifest.stage),
        (&head.kind, &manifest.kind),
        (&head.started_at, &manifest.created_at),
    ];
    if is_own.iter().any(|(of_record, of_manifest)| of_record != of_manifest) {
        return Err(Damage::new(MANIFEST, "it and the record name different stages"));
    }
    if digest(&manifest.files, &record) != manifest.digest {
        return Err(Damage::new(MANIFEST, "its digest is not that of its files"));
    }
    Ok(Inspected { manifest, record, manifest_blake3 })
}

/// Reads a record's text.
///
/// # Errors
/// Where it is none.
pub fn parse_record(bytes: &[u8]) -> Result<Record, Damage> {
    let value = serde_json::from_slice(bytes).map_err(|error| Damage::new(RECORD, error.to_string()))?;
    Record::from_json(value).map_err(|error| Damage::new(RECORD, error.to_string()))
}

/// Hashes what an artifact says, leaving out when and in which run it was made. The record is taken as it reads back from disk.
pub fn digest(files: &[FileEntry], record: &Record) -> String {
    let mut hasher = blake3::Hasher::new();
    for file in files.iter().filter(|file| file.name != RECORD) {
        hasher.update(file.name.as_bytes()).update(b"\0").update(file.blake3.as_bytes()).update(b"\n");
    }
    hasher.update(serde_json::to_string(&record.body).unwrap_or_default().as_bytes());
    hasher.finalize().to_hex().to_string()
}

/// Hashes files of an artifact on all cores and returns the first one, in the manifest's order, that is not as it was committed.
/// `None` once `keep_going` returns false.
pub fn check_contents(
    dir: &Path,
    files: &[&FileEntry],
    keep_going: &(dyn Fn() -> bool + Sync),
) -> Option<Result<(), Damage>> {
    let check = |file: &&FileEntry| -> Option<Result<(), Damage>> {
        let found = hash_pieces(&dir.join(&file.name), |_| Ok(keep_going()));
        match found {
            Ok(None) => None,
            Ok(Some(hash)) if hash == file.blake3 => Some(Ok(())),
            Ok(Some(_)) => Some(Err(Damage::new(&file.name, "its content changed"))),
            Err(error) => Some(Err(Damage::new(&file.name, error.to_string()))),
        }
    };
    let found: Vec<Option<Result<(), Damage>>> = files.par_iter().map(check).collect();
    found.into_iter().find(|one| !matches!(one, Some(Ok(())))).unwrap_or(Some(Ok(())))
}

/// Returns a file beside the listed ones, if there is one.
pub fn stranger(dir: &Path, manifest: &Manifest) -> Option<Damage> {
    let (files, dirs) = match walk(dir) {
        Ok(found) => found,
        Err(error) => return Some(Damage::new(MANIFEST, error.to_string())),
    };
    let listed: BTreeSet<&Path> = manifest.files.iter().map(|file| Path::new(&file.name)).collect();
    let is_stranger =
        |path: &&std::path::PathBuf| path.as_path() != Path::new(MANIFEST) && !listed.contains(path.as_path());
    let folder = |path: &&std::path::PathBuf| {
        !path.as_os_str().is_empty() && !listed.iter().any(|file| file.starts_with(path.as_path()))
    };
    let found = files.iter().find(is_stranger).or_else(|| dirs.iter().find(folder))?;
    Some(Damage::new(&found.to_string_lossy(), "the manifest does not list it"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn names_that_lead_out_of_the_folder_are_refused() {
        for name in [
            "",
            "/etc/passwd",
            "../x",
            "a/../../x",
            "a/..",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "..\\x",
            "a\0b",
            "a\nb",
            "manifest.json",
            &"x".repeat(256),
        ] {
            assert!(name_fault(name).is_some(), "{name:?}");
        }
        for name in ["record.json", "activations/lm_head.output.parquet", "a..b", "..a", "x: y", "ü/é.md"] {
            assert_eq!(name_fault(name), None, "{name:?}");
        }
    }

    proptest! {
        #[test]
        fn an_accepted_name_stays_below_its_folder(name in "[a./\\\\\u{0}é]{0,12}") {
            if name_fault(&name).is_none() {
                let path = Path::new("/cache/key").join(&name);
                prop_assert!(path.starts_with("/cache/key") && path != Path::new("/cache/key"));
                prop_assert!(path.components().all(|part| !matches!(part, std::path::Component::ParentDir)));
            }
        }
    }

    #[test]
    fn a_manifest_without_its_record_or_with_a_name_twice_is_refused() {
        let manifest = |files: &str| {
            let text = format!(
                r#"{{"format_version":1,"key":"k","pipeline":"p","stage":"s","kind":"load","created_at":"","digest":"","files":[{files}],"fields":{{}}}}"#
            );
            Manifest::parse(text.as_bytes())
        };
        let file = |name: &str| format!(r#"{{"name":"{name}","bytes":1,"blake3":""}}"#);
        assert!(manifest(&file("record.json")).is_ok());
        for (files, why) in [
            (file("a"), "does not list record.json"),
            (format!("{0},{0}", file("record.json")), "stands twice"),
            (format!("{},{}", file("record.json"), file("/etc/passwd")), "absolute"),
            (format!("{},{}", file("record.json"), file("../../x")), "leads out"),
        ] {
            let error = manifest(&files).expect_err("refused").to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
