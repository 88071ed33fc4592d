//! Content hashes of files outside the cache, remembered by path, size, modification time and inode.

use super::error::StoreError;
use super::fs::write_atomically;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// Returns a file's blake3.
///
/// # Errors
/// `Io`.
pub fn hash_file(path: &Path) -> Result<String, StoreError> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(StoreError::io("read", path))?;
    hasher.update_reader(&mut file).map_err(StoreError::io("read", path))?;
    Ok(hasher.finalize().to_hex().to_string())
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Remembered {
    bytes: u64,
    mtime_ns: i128,
    inode: u64,
    blake3: String,
}

/// Hashes that are computed once for a file that stays as it is.
#[derive(Debug)]
pub struct FileHashes {
    path: PathBuf,
    known: Mutex<BTreeMap<String, Remembered>>,
}

impl FileHashes {
    /// Reads what is remembered in `cache/file_hashes.json`; a damaged file counts as empty.
    pub fn open(cache_dir: &Path) -> FileHashes {
        let path = cache_dir.join("file_hashes.json");
        let known = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice(&bytes).ok()).unwrap_or_default();
        FileHashes { path, known: Mutex::new(known) }
    }

    /// Returns a file's blake3, computing it only where the file changed; for a blob of the Hugging Face cache that is named by its
    /// SHA-256, that name (`sha256:…`).
    ///
    /// # Errors
    /// `Io` where the file can't be read.
    pub fn get(&self, path: &Path) -> Result<String, StoreError> {
        let meta = fs::metadata(path).map_err(StoreError::io("read", path))?;
        let real = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        if let Some(sha256) = hub_blob_sha256(&real) {
            return Ok(format!("sha256:{sha256}"));
        }
        let name = real.to_string_lossy().into_owned();
        let mtime_ns = i128::from(meta.mtime()) * 1_000_000_000 + i128::from(meta.mtime_nsec());
        let is_same =
            |known: &Remembered| (known.bytes, known.mtime_ns, known.inode) == (meta.len(), mtime_ns, meta.ino());
        let mut known = self.known.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(remembered) = known.get(&name).filter(|remembered| is_same(remembered)) {
            return Ok(remembered.blake3.clone());
        }
        let blake3 = hash_file(path)?;
        known.insert(name, Remembered { bytes: meta.len(), mtime_ns, inode: meta.ino(), blake3: blake3.clone() });
        let bytes = serde_json::to_vec(&*known).unwrap_or_default();
        write_atomically(&self.path, &bytes)?;
        Ok(blake3)
    }
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

    #[test]
    fn a_hub_blob_named_by_its_sha256_is_not_read() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let blobs = dir.path().join("models--org--name/blobs");
        fs::create_dir_all(&blobs).expect("a folder");
        let hashes = FileHashes::open(dir.path());
        let sha256 = "0123456789abcdef".repeat(4);
        fs::write(blobs.join(&sha256), b"anything").expect("a blob");
        fs::write(blobs.join(&sha256[..40]), b"config").expect("a blob");
        let pointer = dir.path().join("model.safetensors");
        std::os::unix::fs::symlink(blobs.join(&sha256), &pointer).expect("a link");
        assert_eq!(hashes.get(&pointer).expect("a hash"), format!("sha256:{sha256}"));
        let of_git_file = hashes.get(&blobs.join(&sha256[..40])).expect("a hash");
        assert_eq!(of_git_file, blake3::hash(b"config").to_hex().to_string());
        fs::rename(&blobs, dir.path().join("blobs")).expect("a move");
        let elsewhere = hashes.get(&dir.path().join("blobs").join(&sha256)).expect("a hash");
        assert_eq!(elsewhere, blake3::hash(b"anything").to_hex().to_string());
    }

    #[test]
    fn a_changed_file_gets_a_new_hash_and_a_damaged_memory_is_forgotten() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a");
        fs::write(&path, b"one").expect("a file");
        let first = FileHashes::open(dir.path()).get(&path).expect("a hash");
        fs::write(dir.path().join("file_hashes.json"), b"{").expect("damage");
        assert_eq!(FileHashes::open(dir.path()).get(&path).expect("a hash"), first);
        fs::write(&path, b"three").expect("a file");
        assert_ne!(FileHashes::open(dir.path()).get(&path).expect("a hash"), first);
    }
}
