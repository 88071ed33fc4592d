//! Removes what nothing refers to any more, what was not used for longest, and what killed runs left.

use super::cache::{LOCK_POLL, Store};
use super::error::StoreError;
use super::exchange::remove_any;
use super::leftovers::{modified, size};
use super::lock::{FileLock, try_lock};
use super::manifest::{MANIFEST, Manifest};
use crate::artifact::Key;
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

/// What to remove.
#[derive(Debug, Clone, Copy)]
pub struct GcRequest<'a> {
    /// Artifacts that a run in here refers to stay; so do those of every other results folder that used this cache.
    pub results: &'a Path,
    /// What is younger stays.
    pub older_than: Duration,
    /// Remove what was not used for longest, referred to or not, until the artifacts fit; instead of what nothing refers to.
    pub max_bytes: Option<u64>,
    /// Tell, and remove nothing.
    pub dry_run: bool,
    /// Count references that can't be read as none.
    pub force: bool,
}

/// What gc removed, or would remove.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GcReport {
    /// Artifacts and staging folders: (name in the cache, bytes, why)
    pub removed: Vec<(String, u64, String)>,
    pub n_kept: usize,
    pub kept_bytes: u64,
    /// Of those kept: what running runs use or plan to.
    pub n_in_use: usize,
    /// Small files without a use: temporary ones, locks and notes of keys that are gone.
    pub n_leftovers: usize,
    /// References that `force` let pass, with the reason why they can't be read.
    pub ignored: Vec<(PathBuf, String)>,
}

/// One artifact as gc weighs it.
struct Candidate {
    key: Key,
    bytes: u64,
    used_at: SystemTime,
    made_at: SystemTime,
    measures: bool,
    is_referred: bool,
    is_in_use: bool,
}

impl Store {
    /// Removes artifacts and leftovers. `wait` is called while another process finds out what is cached, or removes; it returns false
    /// to give up.
    ///
    /// # Errors
    /// `References` where it can't be told what is in use: nothing is removed then. `Cancelled`, `Io`.
    pub fn gc(&self, request: &GcRequest<'_>, wait: &dyn Fn() -> bool) -> Result<GcReport, StoreError> {
        let _lock = self.gc_lock(wait)?;
        let start = self.now()?;
        let keys = self.keys()?;
        let references = self.references(request.results);
        if let (Some((path, reason)), false, false) = (references.unreadable.first(), request.force, keys.is_empty()) {
            let n = references.unreadable.len() - 1;
            let more = if n == 0 { String::new() } else { format!(" (and {n} more like it)") };
            return Err(StoreError::References { path: path.clone(), reason: format!("{reason}{more}") });
        }
        let (active, ended) = self.active_keys()?;
        let mut report = GcReport { ignored: references.unreadable.clone(), ..GcReport::default() };
        let mut candidates = Vec::new();
        for key in keys {
            candidates.push(self.candidate(key, &references.keys, &active, start)?);
        }
        let mut kept: BTreeSet<String> = candidates.iter().map(|candidate| candidate.key.0.clone()).collect();
        for (candidate, why) in chosen(&candidates, request, start) {
            if self.remove_artifact(candidate, why, request.dry_run, &mut report)? {
                kept.remove(&candidate.key.0);
            }
        }
        let of_kept = || candidates.iter().filter(|candidate| kept.contains(&candidate.key.0));
        report.n_kept = of_kept().count();
        report.kept_bytes = of_kept().map(|candidate| candidate.bytes).sum();
        report.n_in_use = of_kept().filter(|candidate| candidate.is_in_use).count();
        self.remove_staging(request.dry_run, &mut report)?;
        let mut leftovers = ended;
        leftovers.extend(self.leftovers(&kept, &references, active.is_empty(), start)?);
        for path in leftovers {
            report.n_leftovers += 1;
            if !request.dry_run {
                remove_any(&path).map_err(StoreError::io("remove", &path))?;
            }
        }
        if request.force && !request.dry_run {
            self.forget_results(&references.unreadable)?;
        }
        Ok(report)
    }

    fn gc_lock(&self, wait: &dyn Fn() -> bool) -> Result<FileLock, StoreError> {
        loop {
            match try_lock(&self.gc_lock_path())? {
                Some(lock) => return Ok(lock),
                None if wait() => std::thread::sleep(LOCK_POLL),
                None => return Err(StoreError::Cancelled { key: "what is cached".to_owned() }),
            }
        }
    }

    /// Returns the time now by the clock of the cache's file system, which may not be this machine's.
    fn now(&self) -> Result<SystemTime, StoreError> {
        let path = self.gc_lock_path();
        match fs::write(&path, b"\n") {
            // gc is what makes room on a full disk.
            Err(error) if is_full(&error) => return Ok(SystemTime::now()),
            other => other.map_err(StoreError::io("write", &path))?,
        }
        fs::metadata(&path).and_then(|meta| meta.modified()).map_err(StoreError::io("read", &path))
    }

    fn candidate(
        &self,
        key: Key,
        referred: &BTreeSet<String>,
        active: &BTreeSet<String>,
        start: SystemTime,
    ) -> Result<Candidate, StoreError> {
        let dir = self.artifact_dir(&key);
        let made_at = modified(&dir.join(MANIFEST)).or_else(|| modified(&dir)).unwrap_or(SystemTime::UNIX_EPOCH);
        let used_at = modified(&self.used_path(&key)).unwrap_or(made_at).max(made_at);
        let measures = Manifest::read(&dir).is_ok_and(|(manifest, _)| manifest.fields.contains_key("device"));
        // Committed, or written by the holder of its lock, since gc began.
        let is_in_use = active.contains(&key.0) || made_at >= start || !self.is_free(&key)?;
        let is_referred = referred.contains(&key.0);
        Ok(Candidate { bytes: size(&dir)?, key, used_at, made_at, measures, is_referred, is_in_use })
    }

    /// Returns true if no process holds the key's lock.
    pub(super) fn is_free(&self, key: &Key) -> Result<bool, StoreError> {
        let path = self.lock_path(key);
        // Looking makes no file.
        if !path.exists() { Ok(true) } else { Ok(try_lock(&path)?.is_some()) }
    }

    /// Returns false where a process has taken the key meanwhile.
    fn remove_artifact(
        &self,
        candidate: &Candidate,
        why: String,
        dry_run: bool,
        report: &mut GcReport,
    ) -> Result<bool, StoreError> {
        let key = &candidate.key;
        if !dry_run {
            let lock_path = self.lock_path(key);
            let Some(_lock) = try_lock(&lock_path)? else { return Ok(false) };
            // Moved away first: a reader finds it whole or not at all.
            let dir = self.artifact_dir(key);
            let gone = self.dir().join("tmp").join(format!("{}.{}.gone", key.0, std::process::id()));
            remove_any(&gone).map_err(StoreError::io("remove", &gone))?;
            let moved = fs::rename(&dir, &gone);
            let path = if moved.is_ok() { &gone } else { &dir };
            remove_any(path).map_err(StoreError::io("remove", path))?;
        }
        report.removed.push((key.0.clone(), candidate.bytes, why));
        Ok(true)
    }
}

/// Returns what to remove, with the reason.
fn chosen<'a>(candidates: &'a [Candidate], request: &GcRequest<'_>, start: SystemTime) -> Vec<(&'a Candidate, String)> {
    let is_old = |candidate: &&Candidate| {
        start.duration_since(candidate.made_at).unwrap_or_default() >= request.older_than && !candidate.is_in_use
    };
    let mut free: Vec<&Candidate> = candidates.iter().filter(is_old).collect();
    let Some(max_bytes) = request.max_bytes else {
        free.retain(|candidate| !candidate.is_referred);
        return free.into_iter().map(|candidate| (candidate, "no run refers to it".to_owned())).collect();
    };
    // Measurements are small, and repeating one gives other numbers: they go last.
    free.sort_by_key(|candidate| (candidate.measures, candidate.used_at, candidate.key.clone()));
    let mut bytes: u64 = candidates.iter().map(|candidate| candidate.bytes).sum();
    let mut chosen = Vec::new();
    for candidate in free {
        if bytes <= max_bytes {
            break;
        }
        bytes = bytes.saturating_sub(candidate.bytes);
        let days = start.duration_since(candidate.used_at).unwrap_or_default().as_secs() / 86_400;
        let measured = if candidate.measures { "; a measurement: repeating it gives other numbers" } else { "" };
        chosen.push((candidate, format!("last used {days} days ago{measured}")));
    }
    chosen
}

/// Returns true if a disk or a quota is full.
fn is_full(error: &std::io::Error) -> bool {
    matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{FORMAT_VERSION, KeyFields, Record, RecordHead, key_of};
    use crate::store::ManifestDraft;
    use serde_json::{Map, json};

    struct Lab {
        _dir: tempfile::TempDir,
        store: Store,
        results: PathBuf,
    }

    impl Lab {
        fn new() -> Lab {
            let dir = tempfile::tempdir().expect("a temporary folder");
            let store = Store::open(&dir.path().join("cache")).expect("a store");
            let results = dir.path().join("results");
            fs::create_dir(&results).expect("a folder");
            Lab { _dir: dir, store, results }
        }

        /// Commits an artifact of 1,000 bytes and some; `days` since it was used.
        fn commit(&self, stage: &str, measures: bool, days: u64) -> Key {
            let mut fields = KeyFields::from([("kind".into(), stage.into())]);
            if measures {
                fields.insert("device".into(), "cpu".into());
            }
            let key = key_of(&fields);
            let head = RecordHead {
                format_version: FORMAT_VERSION,
                pipeline: "p".to_owned(),
                run_id: "r".to_owned(),
                produced_by_run: "r".to_owned(),
                stage: stage.to_owned(),
                kind: "load".to_owned(),
                key: key.0.clone(),
                cached: false,
                started_at: String::new(),
                duration_s: 0.5,
                device: None,
                params: Map::new(),
                read_files: std::collections::BTreeMap::new(),
                execution: None,
            };
            let staging = self.store.begin(&key, &|| true).expect("a staging folder");
            fs::write(staging.dir().join("data"), [0; 1000]).expect("a file");
            staging.commit(ManifestDraft { record: Record { head, body: Map::new() }, fields }).expect("a commit");
            let then = SystemTime::now() - Duration::from_secs(days * 86_400 + 1);
            for path in [self.store.artifact_dir(&key).join(MANIFEST), self.store.used_path(&key)] {
                fs::File::open(path).and_then(|file| file.set_modified(then)).expect("a time");
            }
            key
        }

        fn run(&self, keys: &[&Key]) {
            let stages: Vec<_> = keys.iter().map(|key| json!({ "key": key.0 })).collect();
            fs::create_dir_all(self.results.join("p/r")).expect("a folder");
            let text = json!({ "format_version": 1, "stages": stages }).to_string();
            fs::write(self.results.join("p/r/run.json"), text).expect("run.json");
        }

        fn gc(&self, change: impl Fn(&mut GcRequest<'_>)) -> Result<GcReport, StoreError> {
            let mut request = GcRequest {
                results: &self.results,
                older_than: Duration::ZERO,
                max_bytes: None,
                dry_run: false,
                force: false,
            };
            change(&mut request);
            self.store.gc(&request, &|| false)
        }

        fn has(&self, key: &Key) -> bool {
            self.store.get(key).is_some()
        }
    }

    #[test]
    fn what_a_run_refers_to_or_plans_or_computes_stays() {
        let lab = Lab::new();
        let [referred, planned, locked, free] = ["a", "b", "c", "d"].map(|stage| lab.commit(stage, false, 3));
        lab.run(&[&referred]);
        let run = lab.store.list_run("r2", "p", BTreeSet::from([planned.clone()])).expect("a run");
        let staging = lab.store.begin(&locked, &|| true).expect("its lock");
        let report = lab.gc(|_| {}).expect("a report");
        assert_eq!((report.removed.len(), report.n_kept, report.n_in_use), (1, 3, 2), "{report:?}");
        assert!(lab.has(&referred) && lab.has(&planned) && lab.has(&locked) && !lab.has(&free));
        drop((run, staging));
        let report = lab.gc(|request| request.dry_run = true).expect("a report");
        assert!(report.removed.len() == 2 && lab.has(&planned), "{report:?}");
        assert_eq!(lab.gc(|request| request.older_than = Duration::from_secs(4 * 86_400)).expect("a report").n_kept, 3);
        assert_eq!(lab.gc(|_| {}).expect("a report").n_kept, 1);
        // Locks and notes of keys that are gone are gone too.
        assert!(!lab.store.lock_path(&free).exists() && !lab.store.used_path(&free).exists());
        assert!(lab.store.lock_path(&referred).exists() && lab.store.used_path(&referred).exists());
    }

    #[test]
    fn nothing_is_removed_where_references_can_t_be_read_unless_forced() {
        let lab = Lab::new();
        let key = lab.commit("a", false, 1);
        lab.run(&[]);
        fs::write(lab.results.join("p/r/run.json"), "{\"format_ver").expect("cut");
        let error = lab.gc(|_| {}).expect_err("refused").to_string();
        assert!(error.contains("p/r/run.json") && error.contains("--force") && lab.has(&key), "{error}");
        fs::remove_dir_all(&lab.results).expect("gone");
        let error = lab.gc(|request| request.max_bytes = Some(0)).expect_err("refused").to_string();
        assert!(error.contains("results") && lab.has(&key), "{error}");
        let report = lab.gc(|request| request.force = true).expect("a report");
        assert!(report.removed.len() == 1 && report.ignored.len() == 1 && !lab.has(&key), "{report:?}");
        assert!(lab.gc(|_| {}).is_ok(), "an empty cache has nothing to lose");
    }

    #[test]
    fn a_budget_removes_what_was_not_used_for_longest_and_measurements_last() {
        let lab = Lab::new();
        let (measured, old, new) = (lab.commit("m", true, 9), lab.commit("o", false, 5), lab.commit("n", false, 2));
        lab.run(&[&measured, &old, &new]);
        let bytes = lab.gc(|_| {}).expect("a report").kept_bytes;
        let fits = lab.gc(|request| request.max_bytes = Some(bytes)).expect("a report");
        assert!(fits.removed.is_empty() && fits.n_kept == 3, "{fits:?}");
        let report = lab.gc(|request| request.max_bytes = Some(bytes - 1)).expect("a report");
        assert_eq!(report.removed[0].0, old.0, "{report:?}");
        assert!(report.removed.len() == 1 && report.removed[0].2.contains("5 days"), "{report:?}");
        let report = lab.gc(|request| request.max_bytes = Some(1)).expect("a report");
        assert_eq!(report.removed.iter().map(|one| &one.0).collect::<Vec<_>>(), [&new.0, &measured.0]);
        assert!(report.removed[1].2.contains("a measurement"), "{report:?}");
    }

    #[test]
    fn what_killed_runs_left_goes_and_what_labpipe_did_not_write_stays() {
        let lab = Lab::new();
        let key = lab.commit("a", false, 1);
        lab.run(&[&key]);
        let dir = lab.store.dir().to_owned();
        let other = Key("ab".repeat(32));
        for name in [format!("tmp/{}.1.0", other.0), format!("tmp/{}.7.gone", other.0), "tmp/notes".to_owned()] {
            fs::create_dir_all(dir.join(name)).expect("a folder");
        }
        fs::create_dir_all(dir.join("index/gone")).expect("a folder");
        let then = SystemTime::now() - Duration::from_secs(120);
        let files = [
            dir.join(".file_hashes.json.12.3"),
            dir.join("index/p/.x.json.12.3"),
            dir.join("locks").join(&other.0),
            dir.join("runs/killed"),
            lab.results.join("p/r/.run.json.12.3"),
            lab.results.join(".latest.12.3"),
        ];
        for path in &files {
            fs::write(path, "x").expect("a file");
            fs::File::open(path).and_then(|file| file.set_modified(then)).expect("a time");
        }
        let own = [dir.join("notes.txt"), dir.join(".notes"), lab.results.join("p/r/.notes.1"), dir.join("tmp/notes")];
        for path in &own[..3] {
            fs::write(path, "mine").expect("a file");
        }
        let told = lab.gc(|request| request.dry_run = true).expect("a report");
        assert!(files.iter().all(|path| path.exists()), "a dry run removes nothing");
        let report = lab.gc(|_| {}).expect("a report");
        assert_eq!((report.removed.len(), report.n_kept), (2, 1), "{report:?}");
        assert_eq!(told.removed, report.removed);
        for path in &files {
            assert!(!path.exists(), "{}", path.display());
        }
        assert!(!dir.join("index/gone").exists() && dir.join("index/p").exists());
        assert!(own.iter().all(|path| path.exists()) && lab.has(&key));
    }
}
