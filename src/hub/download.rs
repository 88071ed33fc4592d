//! Downloads through hf-hub, with what it leaves out: names are checked before they become paths, sizes and hashes after the
//! download, and a revision is recorded once all files of its commit are there.

use super::cache::{CONFIG, INDEX, WEIGHTS, is_model_file, shards};
use super::error::HubError;
use super::reference::{HubReference, RepoKind, is_path};
use super::settings::HubSettings;
use crate::event::{Level, Progress};
use hf_hub::api::sync::{Api, ApiBuilder, ApiError, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::Read;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::time::Duration;

const MIB: u64 = 1 << 20;
/// How often a broken transfer is taken up again where it stopped.
const N_RETRIES: usize = 3;

/// Downloads what `reference` names and returns where it lies.
///
/// # Errors
/// `Missing`, `Gated`, `Token`, `Unreachable`, `Server`, `Damaged`, `NoWeights`, `Io`, `Cancelled`.
pub fn download(
    reference: &HubReference,
    settings: &HubSettings,
    progress: &dyn Progress,
) -> Result<PathBuf, HubError> {
    let hub = Hub::new(reference, settings, progress)?;
    let (commit, files) = hub.look_up()?;
    let snapshot = hub.repo_dir().join("snapshots").join(&commit);
    let repo = hub.repo_at(&commit);
    match &reference.file {
        Some(file) => hub.get_all(&repo, &snapshot, std::slice::from_ref(file))?,
        None => hub.get_model(&repo, &snapshot, &files)?,
    }
    hub.record_revision(&commit)?;
    Ok(reference.file.as_ref().map_or(snapshot.clone(), |file| snapshot.join(file)))
}

struct Hub<'a> {
    reference: &'a HubReference,
    settings: &'a HubSettings,
    progress: &'a dyn Progress,
    api: Api,
}

/// A file that is to be fetched.
struct Wanted {
    name: String,
    /// Names the blob; the content's SHA-256 where it has 64 digits.
    etag: String,
    n_bytes: u64,
}

impl<'a> Hub<'a> {
    fn new(
        reference: &'a HubReference,
        settings: &'a HubSettings,
        progress: &'a dyn Progress,
    ) -> Result<Hub<'a>, HubError> {
        // hf-hub works on absolute paths only.
        let cache_dir = std::path::absolute(&settings.cache_dir).map_err(io(&settings.cache_dir))?;
        fs::create_dir_all(&cache_dir).map_err(io(&cache_dir))?;
        let api = ApiBuilder::from_cache(Cache::new(cache_dir))
            .with_endpoint(settings.endpoint.clone())
            .with_token(settings.token.clone())
            .with_retries(N_RETRIES)
            .with_progress(false)
            .with_user_agent("labpipe", env!("CARGO_PKG_VERSION"))
            .build()
            .map_err(|error| HubError::Server { id: reference.to_string(), reason: error.to_string() })?;
        Ok(Hub { reference, settings, progress, api })
    }

    fn repo_dir(&self) -> PathBuf {
        self.settings.cache_dir.join(self.reference.folder_name())
    }

    fn repo_at(&self, revision: &str) -> ApiRepo {
        let kind = match self.reference.kind {
            RepoKind::Model => RepoType::Model,
            RepoKind::Dataset => RepoType::Dataset,
        };
        self.api.repo(Repo::with_revision(self.reference.repo.clone(), kind, revision.to_owned()))
    }

    fn server(&self, reason: impl Into<String>) -> HubError {
        HubError::Server { id: self.reference.to_string(), reason: reason.into() }
    }

    /// Returns the commit that the revision names, and the names of its files.
    fn look_up(&self) -> Result<(String, Vec<String>), HubError> {
        let info = self.repo_at(&self.reference.revision).info().map_err(|error| self.lookup_error(error))?;
        if info.sha.is_empty() || info.sha.len() > 64 || !info.sha.chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(self.server(format!("the hub names {:?} as its commit", info.sha)));
        }
        let files: Vec<String> = info.siblings.into_iter().map(|file| file.rfilename).collect();
        match &self.reference.file {
            Some(file) if !files.contains(file) => Err(self.missing(file.clone(), "file in that repository")),
            _ => Ok((info.sha, files)),
        }
    }

    fn get_model(&self, repo: &ApiRepo, snapshot: &Path, files: &[String]) -> Result<(), HubError> {
        let has = |name: &str| files.iter().any(|file| file == name);
        let is_small = |name: &String| is_path(name) && is_model_file(name) && !name.ends_with(".safetensors");
        let is_needed = |name: &String| *name != INDEX || !has(WEIGHTS);
        let mut wanted: Vec<String> = files.iter().filter(|name| !name.contains('/')).cloned().collect();
        wanted.retain(|name| (is_small(name) && is_needed(name)) || name.starts_with("chat_template."));
        if has(WEIGHTS) {
            wanted.push(WEIGHTS.to_owned());
        } else if !has(INDEX) {
            let gguf_files = files.iter().filter(|name| name.ends_with(".gguf")).cloned().collect();
            return Err(HubError::NoWeights { id: self.reference.repo.clone(), gguf_files });
        }
        if !has(CONFIG) {
            return Err(self.missing(CONFIG.to_owned(), "file in that repository"));
        }
        self.get_all(repo, snapshot, &wanted)?;
        if has(WEIGHTS) {
            return Ok(());
        }
        let shards = shards(snapshot).ok_or_else(|| self.server(format!("{INDEX} names no files of its folder")))?;
        self.get_all(repo, snapshot, &shards.into_iter().collect::<Vec<_>>())
    }

    /// Fetches files that the snapshot lacks.
    fn get_all(&self, repo: &ApiRepo, snapshot: &Path, names: &[String]) -> Result<(), HubError> {
        let mut wanted = Vec::new();
        for name in names.iter().filter(|name| !snapshot.join(name).is_file()) {
            wanted.push(self.look_at(repo, name)?);
        }
        let n_bytes: u64 = wanted.iter().map(|file| file.n_bytes).sum();
        if !wanted.is_empty() {
            self.progress.begin(Some(n_bytes.div_ceil(MIB)), "MiB");
        }
        let mut count = Count { progress: self.progress, n_bytes: 0, n_told: 0 };
        for file in &wanted {
            if self.progress.is_cancelled() {
                return Err(HubError::Cancelled);
            }
            self.get(repo, snapshot, file, &mut count)?;
        }
        Ok(())
    }

    /// Asks for a file's size and hash.
    fn look_at(&self, repo: &ApiRepo, name: &str) -> Result<Wanted, HubError> {
        let found = self.guarded(|| self.api.metadata(&repo.url(name)))?;
        let metadata = found.map_err(|error| self.file_error(name, error))?;
        let etag = metadata.etag().to_owned();
        // It becomes a file's name.
        let is_plain =
            !etag.is_empty() && etag.len() <= 128 && etag.chars().all(|c| c.is_ascii_alphanumeric() || c == '-');
        if !is_plain || !metadata.commit_hash().chars().all(|c| c.is_ascii_alphanumeric()) {
            return Err(self.server(format!("the hub sent {etag:?} as the hash of {name}")));
        }
        Ok(Wanted { name: name.to_owned(), etag, n_bytes: metadata.size() as u64 })
    }

    fn get(&self, repo: &ApiRepo, snapshot: &Path, file: &Wanted, count: &mut Count<'_>) -> Result<(), HubError> {
        let blob = self.repo_dir().join("blobs").join(&file.etag);
        let pointer = snapshot.join(&file.name);
        let mut was_told = false;
        let mut was_restarted = false;
        while !blob.is_file() {
            if self.progress.is_cancelled() {
                return Err(HubError::Cancelled);
            }
            let before = count.n_bytes;
            let result =
                self.guarded(|| repo.download_with_progress(&file.name, FileProgress { count: &mut *count, before }))?;
            match result {
                Ok(_) => {
                    self.check(&blob, file)?;
                    break;
                }
                Err(ApiError::LockAcquisition(_)) => {
                    if !was_told {
                        let text = format!("another process downloads {}; waiting for it", file.name);
                        self.progress.note(Level::Info, &text);
                        was_told = true;
                    }
                    std::thread::sleep(Duration::from_millis(500));
                }
                // What an earlier try left is longer than the file: it belongs to something else.
                Err(error) if !was_restarted && is_bad_resume(&error) => {
                    was_restarted = true;
                    let part = blob.with_extension("part");
                    fs::remove_file(&part).map_err(io(&part))?;
                }
                Err(error) => return Err(self.file_error(&file.name, error)),
            }
        }
        link(&blob, &pointer)
    }

    /// Compares a downloaded file with what the hub said of it.
    fn check(&self, blob: &Path, file: &Wanted) -> Result<(), HubError> {
        let n_bytes = fs::metadata(blob).map_err(io(blob))?.len();
        let mut reason =
            (n_bytes != file.n_bytes).then(|| format!("{n_bytes} bytes came, {} were announced", file.n_bytes));
        if reason.is_none() && file.etag.len() == 64 {
            let is_same = sha256(blob).map_err(io(blob))? == file.etag;
            reason = (!is_same).then(|| "its SHA-256 is not the one that the hub names".to_owned());
        }
        let Some(reason) = reason else { return Ok(()) };
        fs::remove_file(blob).map_err(io(blob))?;
        Err(HubError::Damaged { id: self.reference.to_string(), file: file.name.clone(), reason })
    }

    /// Lets the revision name the commit, now that all files are there.
    fn record_revision(&self, commit: &str) -> Result<(), HubError> {
        if self.reference.revision == commit {
            return Ok(());
        }
        let path = self.repo_dir().join("refs").join(&self.reference.revision);
        let dir = path.parent().unwrap_or(&path);
        fs::create_dir_all(dir).map_err(io(dir))?;
        let staged = path.with_file_name(format!(".{}.{}", commit, std::process::id()));
        fs::write(&staged, commit).map_err(io(&staged))?;
        fs::rename(&staged, &path).map_err(io(&path))
    }

    /// hf-hub panics where a server's answer makes no sense; to us that is an error like others.
    fn guarded<T>(&self, work: impl FnOnce() -> T) -> Result<T, HubError> {
        catch_unwind(AssertUnwindSafe(work)).map_err(|_| self.server("the hub's answer makes no sense"))
    }

    fn missing(&self, what: String, noun: &'static str) -> HubError {
        let endpoint = self.reference.page(&self.settings.endpoint);
        HubError::Missing { what, noun, endpoint, has_token: self.settings.token.is_some() }
    }

    fn lookup_error(&self, error: ApiError) -> HubError {
        let (id, has_token) = (self.reference.to_string(), self.settings.token.is_some());
        match status(&error) {
            Some(401) if has_token => HubError::Token { id, endpoint: self.settings.endpoint.clone() },
            // Without a token the hub does not tell whether a repository is private or not there.
            Some(401 | 404) => HubError::Missing {
                what: id,
                noun: "repository or revision",
                endpoint: self.settings.endpoint.clone(),
                has_token,
            },
            Some(403) => self.gated(),
            _ => self.other(error),
        }
    }

    fn file_error(&self, name: &str, error: ApiError) -> HubError {
        match status(&error) {
            Some(401 | 403) => self.gated(),
            Some(404) => self.missing(name.to_owned(), "file in that repository"),
            _ => self.other(error),
        }
    }

    fn gated(&self) -> HubError {
        HubError::Gated {
            id: self.reference.to_string(),
            page: self.reference.page(&self.settings.endpoint),
            has_token: self.settings.token.is_some(),
        }
    }

    fn other(&self, error: ApiError) -> HubError {
        match (&error, status(&error)) {
            (_, Some(429)) => self.server("the hub asks for a pause (HTTP 429); try again in some minutes"),
            (_, Some(status)) => self.server(format!("the hub answered with HTTP status {status}")),
            (ApiError::TooManyRetries(cause), _) => {
                self.server(format!("it broke off too often ({cause}); run it again"))
            }
            (ApiError::RequestError(cause), _) => {
                HubError::Unreachable { endpoint: self.settings.endpoint.clone(), reason: cause.to_string() }
            }
            _ => self.server(error.to_string()),
        }
    }
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> HubError {
    let path = path.to_owned();
    |source| HubError::Io { path, source }
}

/// Returns a file's SHA-256 in lower-case digits.
fn sha256(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; MIB as usize];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()),
            n => hasher.update(&buffer[..n]),
        }
    }
}

/// Returns the HTTP status that an error carries.
fn status(error: &ApiError) -> Option<u16> {
    match error {
        ApiError::RequestError(cause) => match cause.as_ref() {
            ureq::Error::StatusCode(status) => Some(*status),
            _ => None,
        },
        ApiError::TooManyRetries(cause) => status(cause),
        _ => None,
    }
}

fn is_bad_resume(error: &ApiError) -> bool {
    matches!(error, ApiError::InvalidResume) || status(error) == Some(416)
}

/// Makes `pointer` a link to `blob`, as hf-hub does for what it downloaded itself.
fn link(blob: &Path, pointer: &Path) -> Result<(), HubError> {
    if pointer.is_file() {
        return Ok(());
    }
    let dir = pointer.parent().unwrap_or(pointer);
    fs::create_dir_all(dir).map_err(io(dir))?;
    let (blob, dir) = (fs::canonicalize(blob).map_err(io(blob))?, fs::canonicalize(dir).map_err(io(dir))?);
    let shared = blob.components().zip(dir.components()).take_while(|(a, b)| a == b).count();
    let mut target: PathBuf = dir.components().skip(shared).map(|_| "..").collect();
    target.extend(blob.components().skip(shared));
    match std::os::unix::fs::symlink(&target, pointer) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => Err(io(pointer)(error)),
        _ => Ok(()),
    }
}

/// Counts bytes over all files and tells whole MiB.
struct Count<'a> {
    progress: &'a dyn Progress,
    n_bytes: u64,
    n_told: u64,
}

impl Count<'_> {
    fn add(&mut self, n: u64) {
        self.n_bytes += n;
        let n_whole = self.n_bytes / MIB;
        if n_whole > self.n_told {
            self.progress.advance(n_whole - self.n_told);
            self.n_told = n_whole;
        }
    }
}

/// One file's part of the count.
struct FileProgress<'a, 'b> {
    count: &'a mut Count<'b>,
    before: u64,
}

impl hf_hub::api::Progress for FileProgress<'_, '_> {
    /// Called anew at every try, each of which counts what it already has.
    fn init(&mut self, _size: usize, _name: &str) {
        self.count.n_bytes = self.before;
    }

    fn update(&mut self, n: usize) {
        self.count.add(n as u64);
    }

    fn finish(&mut self) {}
}
