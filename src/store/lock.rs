//! Advisory locks that die with their process: `flock`, and where a file system has none a file that only one process can create.

use super::error::StoreError;
use super::quirks::{is_unsupported, note_once};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Times that a lock file may vanish while it is opened before inode numbers are taken to be unstable.
const N_REOPENED: usize = 100;

/// A lock, released when dropped, also by the death of the process.
#[derive(Debug)]
pub struct FileLock(#[expect(dead_code, reason = "held for its Drop")] Held);

#[derive(Debug)]
#[expect(dead_code, reason = "held for their Drop")]
enum Held {
    Flock(File),
    File(OwnedFile),
}

/// Who holds a lock file, in words that another process on the same machine can check.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Holder {
    pub host: String,
    /// Changes when the machine starts anew.
    pub boot: String,
    pub pid: u32,
    /// When the process started, in clock ticks since the machine did: process ids are used again.
    pub started: String,
}

impl Holder {
    /// Returns this process.
    pub fn this_process() -> Holder {
        let line = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let pid = std::process::id();
        Holder {
            host: line("/proc/sys/kernel/hostname"),
            boot: line("/proc/sys/kernel/random/boot_id"),
            pid,
            started: start_of(pid).unwrap_or_default(),
        }
    }

    /// Returns true if the process is known to have ended. One on another machine is not known to.
    pub fn is_gone(&self) -> bool {
        let own = Holder::this_process();
        if self.host != own.host || own.boot.is_empty() {
            return false;
        }
        self.boot != own.boot || start_of(self.pid).is_none_or(|started| started != self.started)
    }
}

/// Returns the start time of a process as `/proc/<pid>/stat` has it (its 22nd field), or `None` if there is no such process or it has
/// ended and only waits to be reaped.
fn start_of(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses, which may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    if matches!(state, "Z" | "X" | "x") { None } else { fields.nth(18).map(str::to_owned) }
}

/// Takes a lock for this process alone, or returns `None` if another has it.
///
/// # Errors
/// `Io` where the file can't be made or read.
pub fn try_lock(path: &Path) -> Result<Option<FileLock>, StoreError> {
    match flock(path, File::try_lock) {
        Ok(found) => Ok(found.map(|file| FileLock(Held::Flock(file)))),
        Err(error) if is_unsupported(&error) => {
            note_without_locks(path, &error);
            Ok(OwnedFile::create(path)?.map(|file| FileLock(Held::File(file))))
        }
        Err(source) => Err(StoreError::Io { verb: "lock", path: path.to_owned(), source }),
    }
}

/// Takes a lock that others may have too, or returns `None` if one has it alone. Without `flock` nothing is locked: then
/// `Some(None)`.
///
/// # Errors
/// `Io` where the file can't be made or read.
pub fn try_lock_shared(path: &Path) -> Result<Option<Option<FileLock>>, StoreError> {
    match flock(path, File::try_lock_shared) {
        Ok(found) => Ok(found.map(|file| Some(FileLock(Held::Flock(file))))),
        Err(error) if is_unsupported(&error) => {
            note_without_locks(path, &error);
            Ok(Some(None))
        }
        Err(source) => Err(StoreError::Io { verb: "lock", path: path.to_owned(), source }),
    }
}

fn note_without_locks(path: &Path, error: &io::Error) {
    let dir = path.parent().unwrap_or(path).display();
    note_once(
        "flock",
        format!(
            "the file system of {dir} has no locks ({error}): lock files stand in for them, which hold between processes of one \
             machine; don't run labpipe on this cache from two machines at once, nor cache gc beside a run on another machine"
        ),
    );
}

/// Opens and locks a file. Whoever removes a lock file holds its lock, so a file that is not the one at its path any more is opened
/// anew.
fn flock(path: &Path, lock: fn(&File) -> Result<(), TryLockError>) -> io::Result<Option<File>> {
    for _ in 0..N_REOPENED {
        // NFS takes an exclusive lock only of a file that is open for writing.
        let file = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
        match lock(&file) {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(None),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let own = file.metadata()?;
        if fs::metadata(path).is_ok_and(|now| (now.dev(), now.ino()) == (own.dev(), own.ino())) {
            return Ok(Some(file));
        }
    }
    Err(io::Error::other("the lock file is replaced again and again; are inode numbers stable on this file system?"))
}

/// A file that stands for a lock and is removed when dropped. One that a killed process left is recognized by its process id.
#[derive(Debug)]
struct OwnedFile {
    path: PathBuf,
}

impl OwnedFile {
    fn create(lock: &Path) -> Result<Option<OwnedFile>, StoreError> {
        let name = lock.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let path = lock.with_file_name(format!("{name}.held"));
        for _ in 0..2 {
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(mut file) => {
                    let text = serde_json::to_vec(&Holder::this_process()).unwrap_or_default();
                    file.write_all(&text).map_err(StoreError::io("write", &path))?;
                    return Ok(Some(OwnedFile { path }));
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let holder = fs::read(&path).ok().and_then(|bytes| serde_json::from_slice::<Holder>(&bytes).ok());
                    if !holder.is_some_and(|holder| holder.is_gone()) {
                        return Ok(None);
                    }
                    let _ = fs::remove_file(&path);
                }
                Err(source) => return Err(StoreError::Io { verb: "create", path, source }),
            }
        }
        Ok(None)
    }
}

impl Drop for OwnedFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_whose_file_was_removed_meanwhile_is_taken_on_the_new_file() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("lock");
        let first = try_lock(&path).expect("a lock").expect("it is free");
        assert!(try_lock(&path).expect("an answer").is_none());
        fs::remove_file(&path).expect("removed by its holder");
        let second = try_lock(&path).expect("a lock").expect("a new file is free");
        drop(first);
        assert!(try_lock(&path).expect("an answer").is_none(), "the second still holds");
        drop(second);
        let shared = try_lock_shared(&path).expect("a lock").expect("free");
        assert!(try_lock_shared(&path).expect("a lock").is_some() && try_lock(&path).expect("an answer").is_none());
        drop(shared);
    }

    #[test]
    fn a_lock_file_is_one_process_s_until_it_ends() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let path = dir.path().join("key");
        let held = OwnedFile::create(&path).expect("a file").expect("it is free");
        assert!(OwnedFile::create(&path).expect("an answer").is_none(), "this process lives");
        drop(held);
        // What a killed process left: its id is free, or another process has it now.
        let own = Holder::this_process();
        for (gone, is_free) in [
            (Holder { pid: u32::MAX, ..own.clone() }, true),
            (Holder { started: "1".to_owned(), ..own.clone() }, true),
            (Holder { boot: "another".to_owned(), ..own.clone() }, true),
            (Holder { host: "another".to_owned(), pid: u32::MAX, ..own.clone() }, false),
        ] {
            fs::write(dir.path().join("key.held"), serde_json::to_vec(&gone).expect("JSON")).expect("a file");
            assert_eq!(OwnedFile::create(&path).expect("an answer").is_some(), is_free, "{gone:?}");
        }
    }

    #[test]
    fn a_process_that_ended_and_was_not_reaped_is_gone() {
        let mut child = std::process::Command::new("true").spawn().expect("a process");
        let (id, own) = (child.id(), Holder::this_process());
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while start_of(id).is_some() {
            assert!(std::time::Instant::now() < deadline, "it ends within a minute");
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        assert!(Path::new(&format!("/proc/{id}/stat")).exists(), "it is still listed");
        assert!(Holder { pid: id, ..own.clone() }.is_gone() && !own.is_gone());
        child.wait().expect("reaped");
    }
}
