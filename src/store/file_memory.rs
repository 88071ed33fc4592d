//! Hashes of files outside the cache, remembered for as long as a file stays as it is.

use super::error::StoreError;
use super::file_hash::{Reading, read_steadily};
use super::fs::write_atomically;
use super::stamp::{Stamp, devices_without_change_time};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

const FORMAT_VERSION: u32 = 2;
/// Bytes of a file whose hash is written down at once: the work would be lost with the process.
const LARGE: u64 = 256 << 20;

/// `cache/file_hashes.json`.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct MemoryFile {
    format_version: u32,
    /// By path, links followed.
    files: BTreeMap<String, Remembered>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Remembered {
    stamp: Stamp,
    blake3: String,
}

#[derive(Debug, Default)]
struct State {
    /// What the file says.
    remembered: BTreeMap<String, Remembered>,
    /// What is to be added to it.
    learned: BTreeMap<String, Remembered>,
    /// What this process read: a stamp, the hash, and whether the stamp alone vouches for it from now on.
    read: BTreeMap<PathBuf, (Stamp, String, bool)>,
}

/// Content hashes, computed once for a file that stays as it is. A stamp vouches for a content only where it is older than a tick of the
/// clock that made it: a file that was just written is hashed again. On file systems without a change time nothing is remembered
/// beyond the process.
#[derive(Debug)]
pub struct FileHashes {
    path: PathBuf,
    untrusted: BTreeSet<u64>,
    state: Mutex<State>,
}

impl FileHashes {
    /// Reads what is remembered in `cache/file_hashes.json`; a damaged file, or one of another format, counts as empty.
    pub fn open(cache_dir: &Path) -> FileHashes {
        let path = cache_dir.join("file_hashes.json");
        let state = State { remembered: read_memory(&path), ..State::default() };
        FileHashes { path, untrusted: devices_without_change_time(), state: Mutex::new(state) }
    }

    /// Returns a file's blake3, computing it only where the file changed; for a blob of the Hugging Face cache that is named by its
    /// SHA-256, that name (`sha256:…`).
    ///
    /// # Errors
    /// `Io` where the file can't be read; `Unsteady` where somebody keeps writing into it; `Format` where it is no regular file.
    pub fn get(&self, path: &Path) -> Result<String, StoreError> {
        let (real, stamp) = FileHashes::stamp(path)?;
        if let Some(hash) = self.known(&real, &stamp) {
            return Ok(hash);
        }
        let reading = read_steadily(path)?;
        let hash = reading.hash.clone();
        self.note(reading);
        Ok(hash)
    }

    /// Returns how a file stands, links followed.
    ///
    /// # Errors
    /// `Io`.
    pub fn stamp(path: &Path) -> Result<(PathBuf, Stamp), StoreError> {
        let real = fs::canonicalize(path).map_err(StoreError::io("read", path))?;
        let stamp = Stamp::of(&fs::metadata(&real).map_err(StoreError::io("read", path))?);
        Ok((real, stamp))
    }

    /// Returns the hash that a file's stamp vouches for.
    fn known(&self, real: &Path, stamp: &Stamp) -> Option<String> {
        let mut state = self.lock();
        let was_read = state.read.get(real).cloned();
        if let Some((_, hash, _)) = was_read.filter(|(known, _, is_settled)| *is_settled && known == stamp) {
            return Some(hash);
        }
        let hash = match hub_blob_sha256(real) {
            // Its name vouches for it until somebody writes into it.
            Some(sha256) if !state.read.contains_key(real) => format!("sha256:{sha256}"),
            Some(_) => return None,
            None => state.remembered.get(real.to_str()?).filter(|known| known.stamp == *stamp)?.blake3.clone(),
        };
        state.read.insert(real.to_owned(), (*stamp, hash.clone(), true));
        Some(hash)
    }

    fn note(&self, reading: Reading) {
        let mut state = self.lock();
        let is_settled = reading.stamp.is_settled(reading.read_from_ns);
        let is_trusted = is_settled && !self.untrusted.contains(&reading.stamp.device);
        let is_blob = hub_blob_sha256(&reading.real).is_some();
        if let Some(name) = reading.real.to_str().filter(|_| is_trusted && !is_blob) {
            let known = Remembered { stamp: reading.stamp, blake3: reading.hash.clone() };
            state.learned.insert(name.to_owned(), known);
        }
        state.read.insert(reading.real, (reading.stamp, reading.hash, is_settled));
        drop(state);
        if reading.stamp.bytes >= LARGE {
            // The next flush tells what is wrong.
            let _ = self.flush();
        }
    }

    /// Writes down what this process learned, beside what others wrote meanwhile; files that are gone are forgotten.
    ///
    /// # Errors
    /// `Io`.
    pub fn flush(&self) -> Result<(), StoreError> {
        let mut state = self.lock();
        if state.learned.is_empty() {
            return Ok(());
        }
        // One at a time where the file system has locks; without them another's hashes may be lost, and are computed again.
        let lock = File::create(self.path.with_extension("lock"));
        let _lock = lock.ok().filter(|file| file.lock().is_ok());
        let mut files = read_memory(&self.path);
        files.extend(state.learned.clone());
        files.retain(|name, _| fs::metadata(name).map_or_else(|error| error.kind() != ErrorKind::NotFound, |_| true));
        let memory = MemoryFile { format_version: FORMAT_VERSION, files };
        let bytes = serde_json::to_vec(&memory)
            .map_err(|error| StoreError::Format { path: self.path.clone(), reason: error.to_string() })?;
        write_atomically(&self.path, &bytes)?;
        state.remembered = memory.files;
        state.learned.clear();
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for FileHashes {
    fn drop(&mut self) {
        // Without it files are hashed again.
        let _ = self.flush();
    }
}

fn read_memory(path: &Path) -> BTreeMap<String, Remembered> {
    let memory = fs::read(path).ok().and_then(|bytes| serde_json::from_slice::<MemoryFile>(&bytes).ok());
    memory.filter(|memory| memory.format_version == FORMAT_VERSION).unwrap_or_default().files
}

/// Returns the name of a blob that the Hugging Face cache names by its content: `models--ORG--NAME/blobs/SHA256`. Git's own files
/// have shorter names there.
fn hub_blob_sha256(path: &Path) -> Option<&str> {
    let name = path.file_name()?.to_str()?;
    let is_sha256 = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let blobs = path.parent().filter(|dir| dir.file_name().is_some_and(|name| name == "blobs"))?;
    let repo = blobs.parent()?.file_name()?.to_str()?;
    let is_hub = repo.starts_with("models--") || repo.starts_with("datasets--");
    (is_sha256 && is_hub).then_some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    fn blake3_of(content: &[u8]) -> String {
        blake3::hash(content).to_hex().to_string()
    }

    fn remembered(dir: &Path) -> BTreeMap<String, Remembered> {
        read_memory(&dir.join("file_hashes.json"))
    }

    /// Reads a file as if it had been left alone for long.
    fn learn(hashes: &FileHashes, path: &Path) {
        let mut reading = read_steadily(path).expect("a reading");
        reading.read_from_ns += 10_000_000_000;
        hashes.note(reading);
    }

    #[test]
    fn a_hub_blob_named_by_its_sha256_is_not_read_unless_it_is_written_into() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let blobs = dir.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).expect("a folder");
        let hashes = FileHashes::open(dir.path());
        let sha256 = "0123456789abcdef".repeat(4);
        fs::write(blobs.join(&sha256), b"anything").expect("a blob");
        fs::write(blobs.join(&sha256[..40]), b"config").expect("a blob");
        let pointer = dir.path().join("model.safetensors");
        std::os::unix::fs::symlink(blobs.join(&sha256), &pointer).expect("a link");
        for _ in 0..2 {
            assert_eq!(hashes.get(&pointer).expect("a hash"), format!("sha256:{sha256}"));
        }
        assert_eq!(hashes.get(&blobs.join(&sha256[..40])).expect("a hash"), blake3_of(b"config"));
        fs::write(blobs.join(&sha256), b"something").expect("a blob");
        assert_eq!(hashes.get(&pointer).expect("a hash"), blake3_of(b"something"));
        fs::rename(&blobs, dir.path().join("blobs")).expect("a move");
        let elsewhere = hashes.get(&dir.path().join("blobs").join(&sha256)).expect("a hash");
        assert_eq!(elsewhere, blake3_of(b"something"));
    }

    #[test]
    fn an_edit_that_keeps_size_and_modification_time_is_seen() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (path, reference) = (dir.path().join("a"), dir.path().join("reference"));
        fs::write(&path, b"one").expect("a file");
        let copy_time = |from: &Path, to: &Path| {
            let status = Command::new("touch").arg("-r").arg(from).arg(to).status().expect("touch");
            assert!(status.success());
        };
        let hashes = FileHashes::open(dir.path());
        learn(&hashes, &path);
        assert_eq!(hashes.get(&path).expect("a hash"), blake3_of(b"one"));
        hashes.flush().expect("a memory");
        assert_eq!(remembered(dir.path()).len(), 1);
        fs::write(&reference, b"").expect("a file");
        copy_time(&path, &reference);
        let before = fs::metadata(&path).expect("the file");
        fs::write(&path, b"two").expect("a file");
        copy_time(&reference, &path);
        let after = fs::metadata(&path).expect("the file");
        assert_eq!(before.modified().ok(), after.modified().ok());
        for hashes in [hashes, FileHashes::open(dir.path())] {
            assert_eq!(hashes.get(&path).expect("a hash"), blake3_of(b"two"));
        }
    }

    #[test]
    fn a_file_that_was_just_written_is_hashed_again() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a");
        fs::write(&path, b"one").expect("a file");
        let hashes = FileHashes::open(dir.path());
        hashes.get(&path).expect("a hash");
        hashes.flush().expect("nothing to write");
        assert!(remembered(dir.path()).is_empty());
        // As if the clock had not ticked between two writes: the stamp is the same, the content is not.
        let real = fs::canonicalize(&path).expect("the file");
        if let Some((_, hash, _)) = hashes.lock().read.get_mut(&real) {
            *hash = blake3_of(b"an earlier content");
        }
        assert_eq!(hashes.get(&path).expect("a hash"), blake3_of(b"one"));
    }

    #[test]
    fn a_damaged_memory_counts_as_empty_and_so_does_one_of_the_earlier_format() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a");
        fs::write(&path, b"one").expect("a file");
        let name = fs::canonicalize(&path).expect("the file").to_string_lossy().into_owned();
        let meta = fs::metadata(&path).expect("the file");
        let inode = std::os::unix::fs::MetadataExt::ino(&meta);
        let earlier = format!(r#"{{"{name}": {{"bytes": 3, "mtime_ns": 0, "inode": {inode}, "blake3": "old"}}}}"#);
        for memory in ["{", &earlier, r#"{"format_version": 3, "files": {}}"#] {
            fs::write(dir.path().join("file_hashes.json"), memory).expect("a memory");
            assert_eq!(FileHashes::open(dir.path()).get(&path).expect("a hash"), blake3_of(b"one"));
        }
    }

    #[test]
    fn two_processes_keep_each_other_s_hashes_and_files_that_are_gone_are_forgotten() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let paths = ["a", "b", "gone"].map(|name| dir.path().join(name));
        for path in &paths {
            fs::write(path, b"content").expect("a file");
        }
        let (first, second) = (FileHashes::open(dir.path()), FileHashes::open(dir.path()));
        learn(&first, &paths[0]);
        learn(&first, &paths[2]);
        learn(&second, &paths[1]);
        first.flush().expect("a memory");
        assert_eq!(remembered(dir.path()).len(), 2);
        fs::remove_file(&paths[2]).expect("the file");
        second.flush().expect("a memory");
        let names: Vec<String> = remembered(dir.path()).into_keys().collect();
        assert!(names.len() == 2 && names[0].ends_with("/a") && names[1].ends_with("/b"), "{names:?}");
    }
}
