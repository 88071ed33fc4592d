//! blake3 of a file, large ones on all cores, and a check that it stayed as it was meanwhile.

use super::error::StoreError;
use super::stamp::{Stamp, now_ns};
use blake3::hazmat::{ChainingValue, HasherExt, Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use blake3::{Hash, Hasher};
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes that one thread reads and hashes at a time; a power of two, as the tree of blake3 wants it.
const PIECE: u64 = 4 << 20;
/// Times that a file is read anew because it changed meanwhile.
const TRIES: usize = 4;

/// A file's content, and how the file stood when it was read.
#[derive(Debug, Clone)]
pub struct Reading {
    /// The file itself, links followed.
    pub real: PathBuf,
    pub stamp: Stamp,
    /// blake3, in hexadecimal digits.
    pub hash: String,
    /// When reading began, in nanoseconds since 1970.
    pub read_from_ns: i64,
}

/// Hashes a file that stays as it is meanwhile; one that changes is read again.
///
/// # Errors
/// `Io`; `Unsteady` where it changed each time; `Format` for what is no regular file.
pub fn read_steadily(path: &Path) -> Result<Reading, StoreError> {
    read_watched(path, &mut || {})
}

/// Reads as [`read_steadily`] does, and calls `hashed` after each reading, before it is looked whether the file changed.
fn read_watched(path: &Path, hashed: &mut dyn FnMut()) -> Result<Reading, StoreError> {
    for _ in 0..TRIES {
        let read_from_ns = now_ns();
        let real = fs::canonicalize(path).map_err(StoreError::io("read", path))?;
        // Asked before it is opened: opening a pipe would wait for its writer.
        if !fs::metadata(&real).map_err(StoreError::io("read", path))?.is_file() {
            return Err(StoreError::Format { path: path.to_owned(), reason: "it is no regular file".to_owned() });
        }
        let file = File::open(&real).map_err(StoreError::io("read", path))?;
        let stamp = Stamp::of(&file.metadata().map_err(StoreError::io("read", path))?);
        let hash = match hash_open(&file, stamp.bytes) {
            Ok(hash) => hash,
            // It was cut short while it was read.
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => continue,
            Err(error) => return Err(StoreError::io("read", path)(error)),
        };
        hashed();
        let after = fs::metadata(path).map_err(StoreError::io("read", path))?;
        if Stamp::of(&after) == stamp {
            return Ok(Reading { real, stamp, hash: hash.to_hex().to_string(), read_from_ns });
        }
    }
    Err(StoreError::Unsteady { path: path.to_owned() })
}

fn hash_open(mut file: &File, bytes: u64) -> io::Result<Hash> {
    if bytes <= PIECE {
        let mut hasher = Hasher::new();
        hasher.update_reader(&mut file)?;
        return Ok(hasher.finalize());
    }
    let left = left_subtree_len(bytes);
    let (a, b) = rayon::join(|| subtree(file, 0, left), || subtree(file, left, bytes - left));
    Ok(merge_subtrees_root(&a?, &b?, Mode::Hash))
}

/// Hashes the part of a file that is one subtree of blake3's tree.
fn subtree(file: &File, offset: u64, bytes: u64) -> io::Result<ChainingValue> {
    if bytes <= PIECE {
        let mut buffer = vec![0; usize::try_from(bytes).map_err(io::Error::other)?];
        file.read_exact_at(&mut buffer, offset)?;
        return Ok(Hasher::new().set_input_offset(offset).update(&buffer).finalize_non_root());
    }
    let left = left_subtree_len(bytes);
    let (a, b) = rayon::join(|| subtree(file, offset, left), || subtree(file, offset + left, bytes - left));
    Ok(merge_subtrees_non_root(&a?, &b?, Mode::Hash))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_hashed_in_pieces_has_the_blake3_of_its_bytes() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("a");
        let content: Vec<u8> = (0..PIECE * 5 + 1025).map(|i| (i % 251) as u8).collect();
        for bytes in [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 1024, 5 * PIECE + 1025] {
            let content = &content[..usize::try_from(bytes).expect("a length")];
            fs::write(&path, content).expect("a file");
            assert_eq!(
                read_steadily(&path).expect("a hash").hash,
                blake3::hash(content).to_hex().to_string(),
                "{bytes}"
            );
        }
    }

    /// Reads a file that grows by a byte after each reading, until it has so many.
    fn read_growing(path: &Path, most: usize) -> Result<Reading, StoreError> {
        let mut n_bytes = 1;
        fs::write(path, "a").expect("a file");
        read_watched(path, &mut || {
            if n_bytes < most {
                n_bytes += 1;
                fs::write(path, "a".repeat(n_bytes)).expect("a file");
            }
        })
    }

    #[test]
    fn a_file_that_changes_while_it_is_read_is_read_again_and_one_that_never_rests_is_an_error() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("growing.txt");
        let reading = read_growing(&path, TRIES).expect("it rests in the end");
        assert_eq!(reading.hash, blake3::hash("a".repeat(TRIES).as_bytes()).to_hex().to_string());
        let error = read_growing(&path, 100).expect_err("it changes all the time").to_string();
        assert!(error.contains("growing.txt: it changed while it was read"), "{error}");
    }

    #[test]
    fn a_folder_and_a_pipe_are_no_files_to_read() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let pipe = dir.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status().expect("mkfifo");
        assert!(made.success());
        for path in [dir.path(), &pipe] {
            let error = read_steadily(path).expect_err("no file").to_string();
            assert!(error.contains("no regular file"), "{error}");
        }
    }
}
