//! Compiled kernels on disk: what NVRTC made in one process, the next one loads.
//!
//! cubecl asks a store for a kernel before it compiles it, and puts it there afterwards. This store is memory that is filled from a file
//! when the process starts and written to one when it ends, so no two processes ever write to one file, and a file that is not whole is
//! ignored. Its name holds what its kernels were made by: this very program, the driver, the compiler.

#[cfg(any(feature = "kernel-store", test))]
use cubecl::bytes::Bytes;
#[cfg(any(feature = "kernel-store", test))]
use cubecl_environment::persistence::Origin;
use cubecl_environment::persistence::{MemoryStorage, open};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Names the folder; `off` keeps no kernels.
pub const VARIABLE: &str = "LABPIPE_KERNEL_CACHE";

const MAGIC: &[u8] = b"labpipe kernels 1\n";
const EXTENSION: &str = "kernels";
/// Far more than the kernels of a model take.
const MAX_FILE_BYTES: u64 = 256 << 20;
/// Of programs, drivers and compilers that come and go.
const MAX_FILES: usize = 4;
/// Which of cubecl's namespaces hold kernels.
const NAMESPACES: &str = "cuda";

/// Namespace and key of an entry, as cubecl names them.
type Key = (String, Vec<u8>);
type Entries = BTreeMap<Key, Vec<u8>>;

/// The file of this process's kernels.
#[derive(Debug)]
pub struct KernelStore {
    path: PathBuf,
    /// What is in the file.
    kept: BTreeSet<Key>,
}

/// Returns the folder that kernels are kept in: what [`VARIABLE`] says, or the platform's for caches. Nothing where it says `off`, or
/// there is no such folder.
pub fn folder() -> Option<PathBuf> {
    folder_of(&|name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from))
}

fn folder_of(var: &dyn Fn(&str) -> Option<PathBuf>) -> Option<PathBuf> {
    match var(VARIABLE) {
        Some(off) if off == Path::new("off") => return None,
        Some(folder) => return Some(folder),
        None => {}
    }
    let caches = if cfg!(windows) {
        var("LOCALAPPDATA")
    } else {
        // The specification has relative paths ignored.
        let named = var("XDG_CACHE_HOME").filter(|path| path.is_absolute());
        let own = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
        named.or_else(|| Some(var("HOME")?.join(own)))
    };
    Some(caches?.join("labpipe").join("kernels"))
}

impl KernelStore {
    /// Lets cubecl find the kernels that `compiler` (its version, and its driver's) made for this program before, and keep those that it
    /// makes. Nothing where they are not kept, where programs have no identity of their own, or where cubecl runs already. A file that
    /// can't be read is an empty one.
    #[cfg(feature = "kernel-store")]
    pub fn open(compiler: &str) -> Option<KernelStore> {
        use cubecl::config::cache::CacheConfig;
        use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
        use cubecl_environment::records::RecordLevel;

        let folder = folder()?;
        // Keys do not tell one version of a kernel's code from another.
        let program = buildid::build_id()?;
        let mut config = CubeClRuntimeConfig::from_current_dir().override_from_env();
        config.compilation.cache = true;
        config.environment.path = CacheConfig::Directory(folder.clone());
        config.environment.records.level = RecordLevel::Off;
        CubeClRuntimeConfig::try_set(config).then(|| KernelStore::fill(&folder, program, compiler))
    }

    /// Puts what the file holds into cubecl's memory.
    #[cfg(any(feature = "kernel-store", test))]
    fn fill(folder: &Path, program: &[u8], compiler: &str) -> KernelStore {
        let path = folder.join(file_name(program, compiler));
        let entries = read(&path).unwrap_or_default();
        let kept = entries.keys().cloned().collect();
        for ((namespace, key), value) in entries {
            open(&namespace).insert(&key, Bytes::from_bytes_vec(value), Origin::Local);
        }
        KernelStore { path, kept }
    }

    /// Returns how many entries the file held: a kernel has two, itself and its source's hash.
    pub fn n_kept(&self) -> usize {
        self.kept.len()
    }

    /// Writes the file anew where kernels have been compiled since it was read or written, with what others have put there meanwhile.
    /// Returns whether it did.
    ///
    /// # Errors
    /// Why it can't be written.
    pub fn save(&mut self) -> io::Result<bool> {
        let own = in_memory();
        if own.keys().all(|key| self.kept.contains(key)) {
            return Ok(false);
        }
        let mut entries = read(&self.path).unwrap_or_default();
        entries.extend(own);
        write(&self.path, &entries)?;
        self.kept = entries.into_keys().collect();
        if let Some(folder) = self.path.parent() {
            remove_oldest(folder);
        }
        Ok(true)
    }
}

impl Drop for KernelStore {
    fn drop(&mut self) {
        // A folder that can't be written costs the next process its time, and nothing else.
        let _ = self.save();
    }
}

#[cfg(any(feature = "kernel-store", test))]
fn file_name(program: &[u8], compiler: &str) -> String {
    let made_by = blake3::Hasher::new().update(&(program.len() as u64).to_le_bytes()).update(program).finalize();
    let made_by = blake3::keyed_hash(made_by.as_bytes(), compiler.as_bytes());
    format!("{}.{EXTENSION}", &made_by.to_hex()[..24])
}

fn in_memory() -> Entries {
    let mut entries = Entries::new();
    for summary in MemoryStorage::namespaces().into_iter().filter(|summary| summary.namespace.starts_with(NAMESPACES)) {
        open(&summary.namespace).scan(&mut |key, value| {
            entries.insert((summary.namespace.clone(), key.to_vec()), value.to_vec());
        });
    }
    entries
}

/// A file is the magic, the digest of what follows, and for each entry the lengths (32 bits, little-endian) and bytes of its namespace,
/// key and value.
fn write(path: &Path, entries: &Entries) -> io::Result<()> {
    let mut body = Vec::new();
    for ((namespace, key), value) in entries {
        for part in [namespace.as_bytes(), key, value] {
            let n_bytes = u32::try_from(part.len()).map_err(|_| io::Error::from(io::ErrorKind::InvalidData))?;
            body.extend_from_slice(&n_bytes.to_le_bytes());
            body.extend_from_slice(part);
        }
    }
    let folder = path.parent().ok_or(io::ErrorKind::InvalidInput)?;
    std::fs::create_dir_all(folder)?;
    let beside = path.with_extension(format!("{}.tmp", std::process::id()));
    let written = std::fs::File::create(&beside).and_then(|mut file| {
        file.write_all(MAGIC)?;
        file.write_all(blake3::hash(&body).as_bytes())?;
        file.write_all(&body)
    });
    // Whoever reads meanwhile has the old file or the new one.
    let renamed = written.and_then(|()| std::fs::rename(&beside, path));
    if renamed.is_err() {
        let _ = std::fs::remove_file(&beside);
    }
    renamed
}

/// Returns what a file holds; nothing where it is not there, or not as it was written.
fn read(path: &Path) -> Option<Entries> {
    if std::fs::metadata(path).ok()?.len() > MAX_FILE_BYTES {
        return None;
    }
    let bytes = std::fs::read(path).ok()?;
    let (digest, mut body) = bytes.strip_prefix(MAGIC)?.split_first_chunk::<{ blake3::OUT_LEN }>()?;
    if blake3::hash(body) != *digest {
        return None;
    }
    let mut entries = Entries::new();
    while !body.is_empty() {
        let mut part = || -> Option<Vec<u8>> {
            let (n_bytes, rest) = body.split_first_chunk::<4>()?;
            let (part, rest) = rest.split_at_checked(usize::try_from(u32::from_le_bytes(*n_bytes)).ok()?)?;
            body = rest;
            Some(part.to_vec())
        };
        let (namespace, key, value) = (String::from_utf8(part()?).ok()?, part()?, part()?);
        entries.insert((namespace, key), value);
    }
    Some(entries)
}

/// Removes all but the newest files.
fn remove_oldest(folder: &Path) {
    let Ok(files) = std::fs::read_dir(folder) else { return };
    let mut files: Vec<(SystemTime, PathBuf)> = files
        .filter_map(|file| {
            let path = file.ok()?.path();
            let is_ours = path.extension().is_some_and(|extension| extension == EXTENSION);
            is_ours.then(|| Some((path.metadata().ok()?.modified().ok()?, path)))?
        })
        .collect();
    files.sort();
    for (_, path) in files.iter().rev().skip(MAX_FILES) {
        let _ = std::fs::remove_file(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A folder that goes with the test.
    struct Folder(PathBuf);

    impl Folder {
        fn new(name: &str) -> Folder {
            let path = std::env::temp_dir().join(format!("labpipe-kernels-{name}-{}", std::process::id()));
            let _ = std::fs::remove_dir_all(&path);
            Folder(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn entries(n: u8) -> Entries {
        (0..n).map(|i| (("cuda/1/ptx".to_owned(), vec![i; 3]), vec![i; 1000 * usize::from(i)])).collect()
    }

    #[test]
    fn a_file_holds_what_was_written_and_nothing_once_it_is_damaged() {
        let folder = Folder::new("damage");
        let path = folder.0.join("a.kernels");
        assert_eq!(read(&path), None);
        write(&path, &entries(5)).expect("a writable folder");
        assert_eq!(read(&path), Some(entries(5)));
        let whole = std::fs::read(&path).expect("the file");
        for at in (0..whole.len()).step_by(97) {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            std::fs::write(&path, damaged).expect("a writable folder");
            assert_eq!(read(&path), None, "a bit of byte {at} flipped");
        }
        for n_bytes in [0, 10, MAGIC.len() + 5, whole.len() - 1] {
            std::fs::write(&path, &whole[..n_bytes]).expect("a writable folder");
            assert_eq!(read(&path), None, "{n_bytes} bytes of it");
        }
        // The right digest of nonsense.
        let body = u32::MAX.to_le_bytes();
        std::fs::write(&path, [MAGIC, blake3::hash(&body).as_bytes(), &body].concat()).expect("a writable folder");
        assert_eq!(read(&path), None);
    }

    #[test]
    fn kernels_of_one_process_are_found_by_the_next_and_those_of_others_stay() {
        let folder = Folder::new("processes");
        let mut store = KernelStore::fill(&folder.0, b"program", "13.0");
        assert_eq!(store.n_kept(), 0);
        // What cubecl does once it has compiled something, and something that is no kernel.
        open("cuda/1/ptx").insert(b"key", Bytes::from_bytes_vec(b"code".to_vec()), Origin::Local);
        open("autotune/1").insert(b"key", Bytes::from_bytes_vec(b"choice".to_vec()), Origin::Local);
        // Another process was faster.
        write(&store.path, &entries(2)).expect("a writable folder");
        assert!(store.save().expect("a writable folder"));
        assert!(!store.save().expect("a writable folder"), "nothing is new");
        let found = read(&store.path).expect("the file");
        assert_eq!(found.len(), 3);
        assert_eq!(found[&("cuda/1/ptx".to_owned(), b"key".to_vec())], b"code");

        open("cuda/1/ptx").purge();
        let next = KernelStore::fill(&folder.0, b"program", "13.0");
        assert_eq!(next.n_kept(), 3);
        assert_eq!(open("cuda/1/ptx").get(b"key").as_deref(), Some(&b"code"[..]));
        for (program, compiler) in [(&b"another"[..], "13.0"), (b"program", "12.8")] {
            assert_eq!(KernelStore::fill(&folder.0, program, compiler).n_kept(), 0, "made by {compiler}");
        }
    }

    #[test]
    fn a_folder_that_can_t_be_written_is_an_error_and_not_a_panic() {
        let folder = Folder::new("file");
        std::fs::write(&folder.0, b"no folder").expect("a writable folder");
        assert!(write(&folder.0.join("a.kernels"), &entries(2)).is_err());
        assert_eq!(read(&folder.0.join("a.kernels")), None);
        std::fs::remove_file(&folder.0).expect("the file");
    }

    #[test]
    fn old_files_make_room() {
        let folder = Folder::new("old");
        for i in 0..MAX_FILES as u64 + 2 {
            let path = folder.0.join(format!("{i}.kernels"));
            write(&path, &entries(1)).expect("a writable folder");
            let file = std::fs::OpenOptions::new().write(true).open(&path).expect("the file");
            file.set_modified(SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1000 + i)).expect("a time");
        }
        std::fs::write(folder.0.join("notes.txt"), b"somebody else's").expect("a writable folder");
        remove_oldest(&folder.0);
        let is_there = |name: &str| folder.0.join(name).exists();
        assert!(!is_there("0.kernels") && !is_there("1.kernels") && is_there("2.kernels") && is_there("notes.txt"));
    }

    #[test]
    fn the_folder_is_what_the_variable_says_or_the_user_s_for_caches() {
        let of = |vars: &[(&str, &str)]| {
            folder_of(&|name| vars.iter().find(|(known, _)| *known == name).map(|(_, value)| PathBuf::from(value)))
        };
        let named = [(VARIABLE, "/k"), ("XDG_CACHE_HOME", "/c"), ("HOME", "/h")];
        assert_eq!(of(&named), Some(PathBuf::from("/k")));
        assert_eq!(of(&[(VARIABLE, "off"), ("HOME", "/h")]), None);
        assert_eq!(of(&[]), None);
        if cfg!(target_os = "linux") {
            assert_eq!(of(&named[1..]), Some(PathBuf::from("/c/labpipe/kernels")));
            let relative = [("XDG_CACHE_HOME", "c"), ("HOME", "/h")];
            assert_eq!(of(&relative), Some(PathBuf::from("/h/.cache/labpipe/kernels")));
        }
    }
}
