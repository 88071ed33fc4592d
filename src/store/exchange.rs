//! Puts a new artifact in the place of an old one, so that a kill at any moment leaves one of them whole at its key.
//!
//! Where the system can, both folders change places in one step. Elsewhere the old one is set aside under a name that ends with
//! `.old`, and is put back by the next process if its key is without an artifact.

use super::error::StoreError;
use super::fs::{sync_dir, walk};
use super::manifest::MANIFEST;
use super::quirks::is_unsupported;
use crate::artifact::Key;
use rustix::fs::{CWD, RenameFlags, renameat_with};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

const OLD: &str = ".old";

/// Moves `new` to `target`, and what `target` held to where it can be removed.
///
/// # Errors
/// `Io`; `target` is then what it was, or `recover` makes it that.
pub fn replace(new: &Path, target: &Path) -> Result<(), StoreError> {
    if fs::symlink_metadata(target).is_err() {
        return fs::rename(new, target).map_err(|source| commit_error(new, target, source));
    }
    let exchanged = renameat_with(CWD, new, CWD, target, RenameFlags::EXCHANGE).map_err(io::Error::from);
    match exchanged {
        Ok(()) => {
            sync_both(new, target)?;
            // The new name of the old artifact. What fails to go here is a leftover that the next commit or gc removes.
            let _ = remove_any(new);
            Ok(())
        }
        Err(error) if is_unsupported(&error) || error.kind() == io::ErrorKind::CrossesDevices => {
            replace_in_two_steps(new, target)
        }
        Err(source) => Err(commit_error(new, target, source)),
    }
}

/// Sets the old artifact aside, moves the new one in, removes the old one.
fn replace_in_two_steps(new: &Path, target: &Path) -> Result<(), StoreError> {
    let old = set_aside(new, target)?;
    fs::rename(new, target).map_err(|source| commit_error(new, target, source))?;
    sync_both(new, target)?;
    let _ = remove_any(&old);
    Ok(())
}

fn set_aside(new: &Path, target: &Path) -> Result<PathBuf, StoreError> {
    let mut name = new.file_name().map(|name| name.to_os_string()).unwrap_or_default();
    name.push(OLD);
    let old = new.with_file_name(name);
    match fs::rename(target, &old) {
        Ok(()) => {}
        // An overlay cannot move a folder of its lower layer, such as one that an image brought along: a copy can be moved.
        Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {
            copy_dir(target, &old)?;
            // Without its manifest the folder counts as no artifact, and the copy is put back after a kill.
            fs::remove_file(target.join(MANIFEST)).map_err(StoreError::io("replace", target))?;
            remove_any(target).map_err(StoreError::io("replace", target))?;
        }
        Err(source) => return Err(StoreError::Io { verb: "replace", path: target.to_owned(), source }),
    }
    sync_both(new, target)?;
    Ok(old)
}

/// Copies a folder; the manifest comes last, so that a copy with one is whole.
fn copy_dir(from: &Path, to: &Path) -> Result<(), StoreError> {
    let (mut files, dirs) = walk(from)?;
    for dir in dirs {
        fs::create_dir_all(to.join(&dir)).map_err(StoreError::io("create", to))?;
    }
    files.sort_by_key(|file| file == Path::new(MANIFEST));
    for file in files {
        fs::copy(from.join(&file), to.join(&file)).map_err(StoreError::io("copy", &from.join(&file)))?;
    }
    Ok(())
}

fn commit_error(new: &Path, target: &Path, source: io::Error) -> StoreError {
    if source.kind() == io::ErrorKind::CrossesDevices {
        let tmp = new.parent().unwrap_or(new).display();
        let reason = format!("{tmp} lies on another file system than the cache; put both on one");
        return StoreError::Write { path: target.to_owned(), reason };
    }
    StoreError::Io { verb: "commit", path: target.to_owned(), source }
}

fn sync_both(new: &Path, target: &Path) -> Result<(), StoreError> {
    for dir in [target.parent(), new.parent()].into_iter().flatten() {
        sync_dir(dir)?;
    }
    Ok(())
}

/// Removes a folder with all it holds, or a file or link.
pub fn remove_any(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => fs::remove_dir_all(path),
        Ok(_) => fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(error),
    }
}

/// Puts back the artifacts of a key (or of all keys) that a killed run had set aside and did not replace. The caller holds the
/// key's lock.
///
/// # Errors
/// `Io` where `tmp` can't be listed.
pub fn recover(cache: &Path, key: &Key) -> Result<(), StoreError> {
    let target = cache.join(&key.0);
    if fs::symlink_metadata(target.join(MANIFEST)).is_ok() {
        return Ok(());
    }
    let prefix = format!("{}.", key.0);
    for (name, path) in set_aside_in(cache)? {
        if name.starts_with(&prefix) && path.join(MANIFEST).is_file() {
            remove_any(&target).map_err(StoreError::io("put back", &target))?;
            fs::rename(&path, &target).map_err(StoreError::io("put back", &target))?;
            return sync_both(&path, &target);
        }
    }
    Ok(())
}

/// Removes what killed runs left of a key whose lock is held. In a container every process has the same id: a leftover would
/// otherwise become part of the next artifact.
///
/// # Errors
/// `Io`.
pub fn clear_leftovers(cache: &Path, key: &Key) -> Result<(), StoreError> {
    let tmp = cache.join("tmp");
    let prefix = format!("{}.", key.0);
    for entry in fs::read_dir(&tmp).map_err(StoreError::io("list", &tmp))?.filter_map(Result::ok) {
        if entry.file_name().to_string_lossy().starts_with(&prefix) {
            remove_any(&entry.path()).map_err(StoreError::io("remove", &entry.path()))?;
        }
    }
    Ok(())
}

/// Returns the folders in `tmp` that hold an artifact which was set aside, with their names.
///
/// # Errors
/// `Io` where `tmp` can't be listed.
pub fn set_aside_in(cache: &Path) -> Result<Vec<(String, PathBuf)>, StoreError> {
    let tmp = cache.join("tmp");
    let entries = fs::read_dir(&tmp).map_err(StoreError::io("list", &tmp))?;
    let mut found: Vec<(String, PathBuf)> = entries
        .filter_map(Result::ok)
        .map(|entry| (entry.file_name().to_string_lossy().into_owned(), entry.path()))
        .filter(|(name, _)| name.ends_with(OLD))
        .collect();
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(path: &Path, content: &str) {
        fs::create_dir_all(path.join("sub")).expect("a folder");
        fs::write(path.join("sub/data"), content).expect("a file");
        fs::write(path.join(MANIFEST), content).expect("a file");
    }

    fn cache() -> (tempfile::TempDir, Key, PathBuf, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        fs::create_dir(dir.path().join("tmp")).expect("a folder");
        let key = Key("cd".repeat(32));
        let (target, new) = (dir.path().join(&key.0), dir.path().join("tmp").join(format!("{}.1.0", key.0)));
        folder(&target, "old");
        folder(&new, "new");
        (dir, key, target, new)
    }

    fn content(path: &Path) -> String {
        fs::read_to_string(path.join("sub/data")).expect("a file")
    }

    #[test]
    fn both_ways_of_replacing_leave_the_new_artifact_and_nothing_else() {
        for replace in [replace, replace_in_two_steps] {
            let (dir, _, target, new) = cache();
            replace(&new, &target).expect("a replacement");
            assert_eq!(content(&target), "new");
            assert_eq!(fs::read_dir(dir.path().join("tmp")).expect("the folder").count(), 0);
        }
    }

    #[test]
    fn a_kill_after_each_step_of_the_two_leaves_an_artifact_at_the_key() {
        // Before any step.
        let (dir, key, target, new) = cache();
        recover(dir.path(), &key).expect("nothing to do");
        assert_eq!(content(&target), "old");
        // Between the two: the old one is aside, the new one not in yet.
        let old = set_aside(&new, &target).expect("set aside");
        assert!(!target.exists());
        recover(dir.path(), &key).expect("put back");
        assert!(content(&target) == "old" && !old.exists());
        // After both, before the old one is removed.
        let old = set_aside(&new, &target).expect("set aside");
        fs::rename(&new, &target).expect("moved in");
        recover(dir.path(), &key).expect("nothing to do");
        assert!(content(&target) == "new" && old.exists());
    }

    #[test]
    fn a_copy_that_a_kill_cut_short_is_not_put_back() {
        let (dir, key, target, new) = cache();
        let old = PathBuf::from(format!("{}{OLD}", new.display()));
        copy_dir(&target, &old).expect("a copy");
        assert_eq!(content(&old), "old");
        // A whole copy replaces what is left of the folder that was being removed.
        fs::remove_file(target.join(MANIFEST)).expect("removal began");
        recover(dir.path(), &key).expect("put back");
        assert!(content(&target) == "old" && target.join(MANIFEST).is_file() && !old.exists());
        copy_dir(&target, &old).expect("a copy");
        fs::remove_file(old.join(MANIFEST)).expect("cut short");
        fs::remove_dir_all(&target).expect("removed");
        recover(dir.path(), &key).expect("an answer");
        assert!(!target.exists());
    }
}
