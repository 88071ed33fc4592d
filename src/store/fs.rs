//! Files written so that a reader sees the old content or the new, never a part.

use super::error::StoreError;
use super::quirks::{is_unsupported, note_once};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes that are read at once where a file is hashed or copied.
const PIECE_BYTES: usize = 1 << 20;

/// Returns a name beside `path` that no other process or thread uses.
pub fn aside(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    path.with_file_name(format!(".{name}.{}.{n}", std::process::id()))
}

/// Returns true for a name that [`aside`] makes: `.name.pid.n`.
pub fn is_aside(name: &str) -> bool {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit());
    let mut parts = name.rsplitn(3, '.');
    let (n, pid, rest) = (parts.next(), parts.next(), parts.next());
    n.is_some_and(is_number)
        && pid.is_some_and(is_number)
        && rest.is_some_and(|rest| rest.len() > 1 && rest.starts_with('.'))
}

/// Writes a whole file: aside, synced, renamed in.
///
/// # Errors
/// `Io`; what was there before stays then.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let temporary = aside(path);
    let write = || -> io::Result<()> {
        let mut file = create_aside(&temporary)?;
        file.write_all(bytes)?;
        sync(&file, &temporary)?;
        fs::rename(&temporary, path)
    };
    write().map_err(|source| {
        // The error that matters is the one being reported.
        let _ = fs::remove_file(&temporary);
        StoreError::Io { verb: "write", path: path.to_owned(), source }
    })
}

/// Creates a temporary file. A killed process of the same id may have left its own, or a link in its place: it goes first.
fn create_aside(temporary: &Path) -> io::Result<File> {
    let _ = fs::remove_file(temporary);
    OpenOptions::new().write(true).create_new(true).open(temporary)
}

/// Syncs a file or folder. A file system that has no such operation is reported once and used all the same.
///
/// # Errors
/// What the device says: a full or broken disk among them.
pub fn sync(file: &File, path: &Path) -> io::Result<()> {
    match file.sync_all() {
        Err(error) if is_unsupported(&error) => {
            let dir = path.parent().unwrap_or(path).display();
            note_once(
                "fsync",
                format!(
                    "the file system of {dir} can't sync files ({error}): after a power failure the newest artifacts and records may \
                     be damaged; labpipe cache verify finds them"
                ),
            );
            Ok(())
        }
        other => other,
    }
}

/// Makes a folder and its parents.
///
/// # Errors
/// `Io`; where a link that leads nowhere stands in the way it is named.
pub fn create_dirs(path: &Path) -> Result<(), StoreError> {
    fs::create_dir_all(path).map_err(|source| {
        let dangling = path.ancestors().find(|part| part.is_symlink() && !part.exists());
        match dangling {
            Some(link) => StoreError::Format {
                path: link.to_owned(),
                reason: "it is a link that leads nowhere; make the folder it names, or remove the link".to_owned(),
            },
            None => StoreError::Io { verb: "create", path: path.to_owned(), source },
        }
    })
}

/// Syncs a folder, so that renames in it last.
///
/// # Errors
/// `Io`.
pub fn sync_dir(path: &Path) -> Result<(), StoreError> {
    File::open(path).and_then(|dir| sync(&dir, path)).map_err(StoreError::io("sync", path))
}

/// Returns the files below a folder, relative to it, sorted: links and special files among them.
///
/// # Errors
/// `Io` where a folder can't be listed.
pub fn files_below(dir: &Path) -> Result<Vec<PathBuf>, StoreError> {
    Ok(walk(dir)?.0)
}

/// Returns the files and the folders below a folder, relative to it, each sorted. Links are not followed.
///
/// # Errors
/// `Io` where a folder can't be listed.
pub fn walk(dir: &Path) -> Result<(Vec<PathBuf>, Vec<PathBuf>), StoreError> {
    let (mut files, mut dirs) = (Vec::new(), Vec::new());
    let mut open = vec![PathBuf::new()];
    while let Some(relative) = open.pop() {
        let path = dir.join(&relative);
        for entry in fs::read_dir(&path).map_err(StoreError::io("list", &path))? {
            let entry = entry.map_err(StoreError::io("list", &path))?;
            let name = relative.join(entry.file_name());
            let kind = entry.file_type().map_err(StoreError::io("list", &path))?;
            if kind.is_dir() { open.push(name) } else { files.push(name) }
        }
        dirs.push(relative);
    }
    files.sort();
    dirs.sort();
    Ok((files, dirs))
}

/// Hashes a file piece by piece, with `each` called for every piece; returns `None` once `each` returns false.
///
/// # Errors
/// What reading or `each` says.
pub fn hash_pieces(path: &Path, mut each: impl FnMut(&[u8]) -> io::Result<bool>) -> io::Result<Option<String>> {
    let mut file = File::open(path)?;
    let mut hasher = blake3::Hasher::new();
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        let n = match file.read(&mut piece) {
            Ok(0) => return Ok(Some(hasher.finalize().to_hex().to_string())),
            Ok(n) => n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error),
        };
        hasher.update(&piece[..n]);
        if !each(&piece[..n])? {
            return Ok(None);
        }
    }
}

/// Copies a file and returns its blake3: written aside and renamed in if `accept` returns true for the hash.
///
/// # Errors
/// `Io`; what was there before stays then.
pub fn copy_hashing(from: &Path, to: &Path, accept: impl Fn(&str) -> bool) -> Result<bool, StoreError> {
    let temporary = aside(to);
    let copy = || -> io::Result<bool> {
        let mut out = create_aside(&temporary)?;
        let hash = hash_pieces(from, |piece| out.write_all(piece).map(|()| true))?.unwrap_or_default();
        let is_accepted = accept(&hash);
        if is_accepted {
            fs::rename(&temporary, to)?
        } else {
            fs::remove_file(&temporary)?
        }
        Ok(is_accepted)
    };
    copy().map_err(|source| {
        let _ = fs::remove_file(&temporary);
        StoreError::Io { verb: "copy", path: to.to_owned(), source }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn temporary_names_are_recognized_and_others_are_not() {
        assert!(is_aside(&aside(Path::new("a/run.json")).file_name().expect("a name").to_string_lossy()));
        for name in ["run.json", ".git", ".a.b.c", "notes.1.2", "..1.2", ".1.2", ".x.1.", ".x..2"] {
            assert!(!is_aside(name), "{name}");
        }
    }

    #[test]
    fn a_link_that_leads_nowhere_is_named() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let link = dir.path().join("results");
        std::os::unix::fs::symlink("nowhere", &link).expect("a link");
        let error = create_dirs(&link.join("p")).expect_err("no folder").to_string();
        assert!(error.contains("results") && error.contains("leads nowhere"), "{error}");
    }
}
