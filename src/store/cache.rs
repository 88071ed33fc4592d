//! The cache: `cache/<key>/{manifest.json, record.json, …}`.

use super::error::StoreError;
use super::exchange::{clear_leftovers, recover, set_aside_in};
use super::fs::create_dirs;
use super::lock::try_lock;
use super::manifest::{Damage, FileEntry, Inspected, MANIFEST, Manifest, RECORD, check_contents, inspect};
use super::quirks::is_read_only;
use super::staging::Staging;
use crate::artifact::{Key, Record};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

pub const LOCK_POLL: Duration = Duration::from_millis(50);

/// Artifacts in a folder. Clones share what was verified.
#[derive(Debug, Clone)]
pub struct Store {
    dir: PathBuf,
    checked: Arc<Mutex<BTreeMap<Key, Checked>>>,
}

/// What this process found when it hashed an artifact's files.
#[derive(Debug, Clone)]
struct Checked {
    /// Of the commit that was verified: another one is verified anew.
    manifest_blake3: String,
    part: Part,
    damage: Option<Damage>,
}

/// Which files of an artifact to verify.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// What is copied into the results.
    ForPeople,
    All,
}

/// What verification found of an artifact, and what it took.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Check {
    /// Files and bytes that were hashed now; none where this process had done it before.
    pub n_files: usize,
    pub bytes: u64,
    pub damage: Option<Damage>,
}

/// A committed artifact.
#[derive(Debug, Clone)]
pub struct Artifact {
    pub key: Key,
    /// Holds the manifest, the record and the stage's own files.
    pub dir: PathBuf,
    pub manifest: Manifest,
    pub record: Record,
}

impl Store {
    /// Opens a cache, making its folders, and puts back what a killed run had set aside.
    ///
    /// # Errors
    /// `Io` where they can't be made.
    pub fn open(dir: &Path) -> Result<Store, StoreError> {
        for sub in ["tmp", "locks", "index", "runs", "used"] {
            match create_dirs(&dir.join(sub)) {
                // A cache that can only be read still serves what it holds.
                Err(StoreError::Io { source, .. }) if is_read_only(&source) && dir.is_dir() => {}
                other => other?,
            }
        }
        let store = Store { dir: dir.to_owned(), checked: Arc::default() };
        for (name, _) in set_aside_in(dir).unwrap_or_default() {
            let key = Key(name.split('.').next().unwrap_or_default().to_owned());
            if key.is_well_formed()
                && let Ok(Some(_lock)) = try_lock(&store.lock_path(&key))
            {
                recover(dir, &key)?;
            }
        }
        Ok(store)
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn artifact_dir(&self, key: &Key) -> PathBuf {
        self.dir.join(&key.0)
    }

    pub(super) fn lock_path(&self, key: &Key) -> PathBuf {
        self.dir.join("locks").join(&key.0)
    }

    /// Returns the artifact of a key if it is whole: manifest and record verified, every file there with its size, and none found
    /// damaged by [`Store::check`]. Anything else counts as missing; the stage is computed again and replaces it.
    pub fn get(&self, key: &Key) -> Option<Artifact> {
        let found = self.inspect(key).ok()?;
        Some(Artifact { key: key.clone(), dir: self.artifact_dir(key), manifest: found.manifest, record: found.record })
    }

    /// Returns what is wrong with the artifact of a key; `None` where it is whole, or where there is none.
    pub fn damage(&self, key: &Key) -> Option<Damage> {
        let is_there = key.is_well_formed() && fs::symlink_metadata(self.artifact_dir(key)).is_ok();
        is_there.then(|| self.inspect(key).err()).flatten()
    }

    /// Returns what tells one commit of a key from another; `None` where there is no readable one.
    pub fn commit_of(&self, key: &Key) -> Option<String> {
        Manifest::read(&self.artifact_dir(key)).ok().map(|(_, manifest_blake3)| manifest_blake3)
    }

    fn inspect(&self, key: &Key) -> Result<Inspected, Damage> {
        if !key.is_well_formed() {
            return Err(Damage { file: MANIFEST.to_owned(), reason: "the key is not well formed".to_owned() });
        }
        let found = inspect(&self.artifact_dir(key), key)?;
        match self.checked(key, &found.manifest_blake3).and_then(|checked| checked.damage) {
            Some(damage) => Err(damage),
            None => Ok(found),
        }
    }

    fn checked(&self, key: &Key, manifest_blake3: &str) -> Option<Checked> {
        let checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        checked.get(key).filter(|checked| checked.manifest_blake3 == manifest_blake3).cloned()
    }

    /// Hashes the files of an artifact, on all cores and once per process. One that is damaged counts as missing from then on.
    /// Returns `None` once `keep_going` returns false.
    pub fn check(&self, key: &Key, part: Part, keep_going: &(dyn Fn() -> bool + Sync)) -> Option<Check> {
        let found = match self.inspect(key) {
            Ok(found) => found,
            Err(damage) => return Some(Check { damage: Some(damage), ..Check::default() }),
        };
        let before = self.checked(key, &found.manifest_blake3);
        if before.is_some_and(|checked| checked.part >= part) {
            return Some(Check::default());
        }
        let wanted = |file: &&FileEntry| file.name != RECORD && (part == Part::All || file.is_for_people());
        let files: Vec<&FileEntry> = found.manifest.files.iter().filter(wanted).collect();
        let damage = check_contents(&self.artifact_dir(key), &files, keep_going)?.err();
        let check = Check { n_files: files.len(), bytes: files.iter().map(|file| file.bytes).sum(), damage };
        self.note_checked(key, found.manifest_blake3, part, check.damage.clone());
        Some(check)
    }

    pub(super) fn note_checked(&self, key: &Key, manifest_blake3: String, part: Part, damage: Option<Damage>) {
        let mut checked = self.checked.lock().unwrap_or_else(PoisonError::into_inner);
        checked.insert(key.clone(), Checked { manifest_blake3, part, damage });
    }

    /// Waits for the key's lock and returns a staging folder. After it returns, ask [`Store::get`] again: another process
    /// may have computed the stage meanwhile.
    ///
    /// # Errors
    /// `Cancelled` once `keep_waiting` returns false; `Io`.
    pub fn begin(&self, key: &Key, keep_waiting: &dyn Fn() -> bool) -> Result<Staging, StoreError> {
        let path = self.lock_path(key);
        let lock = loop {
            match try_lock(&path)? {
                Some(lock) => break lock,
                None if keep_waiting() => std::thread::sleep(LOCK_POLL),
                None => return Err(StoreError::Cancelled { key: key.short().to_owned() }),
            }
        };
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let n = COUNTER.fetch_add(1, Ordering::Relaxed);
        recover(&self.dir, key)?;
        clear_leftovers(&self.dir, key)?;
        let dir = self.dir.join("tmp").join(format!("{}.{}.{n}", key.0, std::process::id()));
        create_dirs(&dir)?;
        Ok(Staging { store: self.clone(), key: key.clone(), dir, _lock: lock })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{FORMAT_VERSION, KeyFields, RecordHead, key_of};
    use crate::store::ManifestDraft;
    use serde_json::Map;

    fn fields() -> KeyFields {
        KeyFields::from([("kind".into(), "load".into())])
    }

    fn draft(stage: &str) -> ManifestDraft {
        let head = RecordHead {
            format_version: FORMAT_VERSION,
            pipeline: "p".to_owned(),
            run_id: "r1".to_owned(),
            produced_by_run: "r1".to_owned(),
            stage: stage.to_owned(),
            kind: "load".to_owned(),
            key: key_of(&fields()).0,
            cached: false,
            started_at: "2026-01-01T00:00:00Z".to_owned(),
            duration_s: 0.5,
            device: None,
            params: Map::new(),
            read_files: BTreeMap::new(),
            execution: None,
        };
        ManifestDraft { record: Record { head, body: Map::new() }, fields: fields() }
    }

    fn store() -> (tempfile::TempDir, Store, Key) {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let store = Store::open(dir.path()).expect("a store");
        (dir, store, key_of(&fields()))
    }

    #[test]
    fn what_is_committed_is_found_and_what_is_dropped_is_not() {
        let (_dir, store, key) = store();
        drop(store.begin(&key, &|| true).expect("a staging folder"));
        assert!(store.get(&key).is_none());
        let staging = store.begin(&key, &|| true).expect("a staging folder");
        fs::write(staging.dir().join("data.bin"), b"abc").expect("a file");
        let artifact = staging.commit(draft("s")).expect("a commit");
        assert_eq!(artifact.manifest.files.len(), 2);
        assert_eq!(store.get(&key).expect("the artifact").manifest, artifact.manifest);
        assert_eq!(store.last("p", "s").expect("an entry").0, key);
    }

    #[test]
    fn a_cut_file_makes_the_artifact_count_as_missing_and_a_commit_replaces_it() {
        let (_dir, store, key) = store();
        for content in [b"one".as_slice(), b"other"] {
            let staging = store.begin(&key, &|| true).expect("a staging folder");
            fs::write(staging.dir().join("data.bin"), content).expect("a file");
            let artifact = staging.commit(draft("s")).expect("a commit");
            assert!(store.get(&key).is_some());
            fs::write(artifact.dir.join("data.bin"), b"x").expect("damage");
            assert!(store.get(&key).is_none());
        }
    }

    #[test]
    fn what_a_killed_run_left_of_a_key_is_not_part_of_the_next_artifact() {
        let (dir, store, key) = store();
        for name in [format!("{}.1.0", key.0), format!("{}.1.old", key.0)] {
            let left = dir.path().join("tmp").join(name);
            fs::create_dir(&left).expect("a folder");
            fs::write(left.join("half.parquet"), b"PAR1").expect("a file");
        }
        let other = dir.path().join("tmp").join("notes");
        fs::create_dir(&other).expect("a folder");
        let artifact = store.begin(&key, &|| true).expect("a staging folder").commit(draft("s")).expect("a commit");
        assert_eq!(artifact.manifest.files.len(), 1);
        let left: Vec<_> = fs::read_dir(dir.path().join("tmp")).expect("the folder").collect();
        assert!(left.len() == 1 && other.is_dir(), "{left:?}");
    }

    #[test]
    fn a_second_process_waits_for_the_key_or_gives_up_when_told() {
        let (_dir, store, key) = store();
        let staging = store.begin(&key, &|| true).expect("a staging folder");
        assert!(matches!(store.begin(&key, &|| false), Err(StoreError::Cancelled { .. })));
        drop(staging);
        assert!(store.begin(&key, &|| false).is_ok());
    }

    fn committed(store: &Store, key: &Key) -> Artifact {
        let staging = store.begin(key, &|| true).expect("a staging folder");
        fs::create_dir(staging.dir().join("sub")).expect("a folder");
        fs::write(staging.dir().join("sub/data.parquet"), b"abcdef").expect("a file");
        fs::write(staging.dir().join("page.md"), b"text").expect("a file");
        staging.commit(draft("s")).expect("a commit")
    }

    #[test]
    fn a_flipped_bit_anywhere_in_an_artifact_is_noticed() {
        let (dir, store, key) = store();
        let artifact = committed(&store, &key);
        for name in ["manifest.json", "record.json", "page.md", "sub/data.parquet"] {
            let path = artifact.dir.join(name);
            let whole = fs::read(&path).expect("a file");
            // One bit of each byte, another one from byte to byte.
            for bit in (0..whole.len()).map(|byte| byte * 8 + byte % 8) {
                let mut flipped = whole.clone();
                flipped[bit / 8] ^= 1 << (bit % 8);
                fs::write(&path, &flipped).expect("damage");
                // A process that has verified nothing yet.
                let fresh = Store { dir: dir.path().to_owned(), checked: Arc::default() };
                let check = fresh.check(&key, Part::All, &|| true).expect("not cancelled");
                assert!(check.damage.is_some() && fresh.get(&key).is_none(), "{name}, bit {bit}");
            }
            fs::write(&path, &whole).expect("mended");
        }
        let fresh = Store::open(dir.path()).expect("a store");
        assert_eq!(fresh.check(&key, Part::All, &|| true).map(|check| (check.n_files, check.damage)), Some((2, None)));
        assert_eq!(fresh.check(&key, Part::All, &|| true), Some(Check::default()), "once per process");
        assert_eq!(store.check(&key, Part::All, &|| true), Some(Check::default()), "its own commit");
        assert_eq!(Store::open(dir.path()).expect("a store").check(&key, Part::All, &|| false), None);
    }

    #[test]
    fn an_artifact_under_another_key_or_with_links_in_it_counts_as_missing() {
        let (dir, store, key) = store();
        let artifact = committed(&store, &key);
        let other = Key("ab".repeat(32));
        fs::rename(&artifact.dir, store.artifact_dir(&other)).expect("moved");
        assert!(store.get(&other).is_none(), "moved to another key");
        std::os::unix::fs::symlink(store.artifact_dir(&other), &artifact.dir).expect("a link");
        assert!(store.get(&key).is_none(), "the folder is a link");
        // A commit replaces the link and leaves what it names.
        let artifact = committed(&store, &key);
        assert!(store.get(&key).is_some() && store.artifact_dir(&other).join("page.md").is_file());
        let page = artifact.dir.join("page.md");
        fs::rename(&page, dir.path().join("outside")).expect("moved");
        std::os::unix::fs::symlink(dir.path().join("outside"), &page).expect("a link");
        assert!(store.damage(&key).expect("damage").to_string().contains("page.md: it is a link"));
        assert!(store.get(&Key("../x".to_owned())).is_none());
    }

    #[test]
    fn a_stage_that_leaves_a_link_commits_nothing() {
        let (_dir, store, key) = store();
        let staging = store.begin(&key, &|| true).expect("a staging folder");
        std::os::unix::fs::symlink("/etc/passwd", staging.dir().join("x")).expect("a link");
        assert!(matches!(staging.commit(draft("s")), Err(StoreError::Write { .. })));
        assert!(store.get(&key).is_none());
    }

    #[test]
    fn what_a_kill_had_set_aside_is_put_back_when_the_cache_is_opened() {
        let (dir, store, key) = store();
        let artifact = committed(&store, &key);
        let old = dir.path().join("tmp").join(format!("{}.1.0.old", key.0));
        fs::rename(&artifact.dir, &old).expect("set aside");
        assert!(store.get(&key).is_none());
        drop(store.begin(&key, &|| true).expect("a staging folder"));
        assert!(store.get(&key).is_some(), "by the next who computes it");
        fs::rename(&artifact.dir, &old).expect("set aside");
        assert!(Store::open(dir.path()).expect("a store").get(&key).is_some(), "by the next who opens it");
    }
}
