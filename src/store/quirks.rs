//! What a file system cannot do. labpipe goes on without it, and the user is told once per process and subject.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Mutex, PoisonError};

#[derive(Default)]
struct Notes {
    told: BTreeSet<&'static str>,
    waiting: Vec<String>,
}

static NOTES: Mutex<Notes> = Mutex::new(Notes { told: BTreeSet::new(), waiting: Vec::new() });

/// Keeps a warning for [`take_notes`]; the second one on a subject is dropped.
pub fn note_once(subject: &'static str, text: String) {
    let mut notes = NOTES.lock().unwrap_or_else(PoisonError::into_inner);
    if notes.told.insert(subject) {
        notes.waiting.push(text);
    }
}

/// Returns the warnings that were not shown yet.
pub fn take_notes() -> Vec<String> {
    std::mem::take(&mut NOTES.lock().unwrap_or_else(PoisonError::into_inner).waiting)
}

/// Returns true if the file system (or the system) does not have an operation, as opposed to failing at it. NFS without a lock
/// daemon says `ENOLCK`; FUSE file systems say `ENOSYS`, `EINVAL` or `ENOTSUP`.
pub fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let known = [Errno::NOSYS, Errno::OPNOTSUPP, Errno::NOTSUP, Errno::INVAL, Errno::NOLCK, Errno::NOTTY];
    error.kind() == io::ErrorKind::Unsupported
        || Errno::from_io_error(error).is_some_and(|errno| known.contains(&errno))
}

/// Returns true if a folder can be read and not written.
pub fn is_read_only(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::PermissionDenied)
}
