//! The Hugging Face hub, played by a small server on this machine: what is asked of it, what lies on disk afterwards, and what each
//! refusal is turned into.
#![cfg(feature = "hub")]

mod support;

use labpipe::event::NullProgress;
use labpipe::hub::{HubError, HubReference, HubSettings, dataset_file, fetch, locate};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use support::Lab;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// How the server treats who asks.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Open,
    /// Files need this token; the list of files does not, as on the hub.
    Gated(&'static str),
    /// It knows nothing.
    Empty,
    /// It knows no such token.
    BadToken,
    Busy,
    /// Large files come changed in one byte.
    Corrupt,
    /// The connection breaks once in the middle of a large file.
    Breaks,
    /// The hash that is sent leads out of the cache.
    Hostile,
}

struct State {
    files: BTreeMap<String, Vec<u8>>,
    access: Access,
    requests: Mutex<Vec<String>>,
    has_broken: AtomicBool,
    is_over: AtomicBool,
}

/// A hub with one repository, whatever its name, and its address.
struct Hub {
    address: SocketAddr,
    state: Arc<State>,
    thread: Option<JoinHandle<()>>,
}

impl Hub {
    fn start(files: &[(&str, Vec<u8>)], access: Access) -> Hub {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let address = listener.local_addr().expect("an address");
        let state = Arc::new(State {
            files: files.iter().map(|(name, bytes)| ((*name).to_owned(), bytes.clone())).collect(),
            access,
            requests: Mutex::default(),
            has_broken: AtomicBool::new(false),
            is_over: AtomicBool::new(false),
        });
        let shared = Arc::clone(&state);
        let thread = std::thread::spawn(move || {
            for stream in listener.incoming().take(10_000) {
                if shared.is_over.load(Ordering::Relaxed) {
                    break;
                }
                let _ = answer(stream.expect("a connection"), &shared, address);
            }
        });
        Hub { address, state, thread: Some(thread) }
    }

    fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }

    fn settings(&self, cache_dir: &Path) -> HubSettings {
        HubSettings { cache_dir: cache_dir.to_owned(), endpoint: self.endpoint(), token: None, is_offline: false }
    }

    fn requests(&self) -> Vec<String> {
        self.state.requests.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Hub {
    fn drop(&mut self) {
        self.state.is_over.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Answers one request and closes the connection.
fn answer(stream: TcpStream, state: &State, address: SocketAddr) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        lines.push(line.trim().to_owned());
    }
    let header = |name: &str| {
        lines
            .iter()
            .find_map(|line| line.split_once(": ").filter(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, v)| v))
    };
    let path = lines.first().and_then(|line| line.split(' ').nth(1)).unwrap_or_default().to_owned();
    let token = header("authorization").unwrap_or("no token");
    state.requests.lock().unwrap_or_else(PoisonError::into_inner).push(format!("{path} {token}"));
    let mut stream = stream;
    let mut reply = |status: &str, headers: &str, body: &[u8]| {
        let head = format!("HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{headers}\r\n", body.len());
        stream.write_all(head.as_bytes())?;
        stream.write_all(body)
    };
    match state.access {
        Access::Empty => return reply("404 Not Found", "", b"{}"),
        Access::BadToken => return reply("401 Unauthorized", "", b"{}"),
        Access::Busy => return reply("503 Service Unavailable", "", b"{}"),
        _ => {}
    }
    if path.starts_with("/api/") {
        let siblings: Vec<String> = state.files.keys().map(|name| format!(r#"{{"rfilename":"{name}"}}"#)).collect();
        let body = format!(r#"{{"sha":"{COMMIT}","siblings":[{}]}}"#, siblings.join(","));
        return reply("200 OK", "Content-Type: application/json\r\n", body.as_bytes());
    }
    if let Access::Gated(expected) = state.access
        && token != format!("Bearer {expected}")
    {
        let status = if token == "no token" { "401 Unauthorized" } else { "403 Forbidden" };
        return reply(status, "", b"{}");
    }
    let is_content = path.starts_with("/content/");
    let name = path.split_once("/resolve/").map_or(path.as_str(), |(_, rest)| rest);
    let name = name.trim_start_matches("/content/").trim_start_matches(&format!("{COMMIT}/")).to_owned();
    let Some(bytes) = state.files.get(&name) else { return reply("404 Not Found", "", b"{}") };
    let is_large = name.ends_with(".safetensors") || name.ends_with(".gguf");
    let etag = if state.access == Access::Hostile { "../../../outside".to_owned() } else { etag(bytes, is_large) };
    if is_large && !is_content {
        // Large files lie elsewhere, as on the hub.
        let headers = format!(
            "Location: http://{address}/content/{name}\r\nX-Repo-Commit: {COMMIT}\r\nX-Linked-Etag: \"{etag}\"\r\n"
        );
        return reply("302 Found", &headers, b"");
    }
    let range = header("range").and_then(|range| range.strip_prefix("bytes=")).and_then(|range| range.split_once('-'));
    let (first, last) = range.unwrap_or(("0", ""));
    let first: usize = first.parse().unwrap_or(0);
    let end = last.parse().map_or(bytes.len(), |last: usize| (last + 1).min(bytes.len()));
    if first >= bytes.len() {
        return reply("416 Range Not Satisfiable", "", b"");
    }
    let mut part = bytes[first..end].to_vec();
    if state.access == Access::Corrupt && is_large && part.len() > 1 {
        part[0] ^= 1;
    }
    let headers = format!(
        "ETag: \"{etag}\"\r\nX-Repo-Commit: {COMMIT}\r\nContent-Range: bytes {first}-{}/{}\r\n",
        end - 1,
        bytes.len()
    );
    if state.access == Access::Breaks && is_large && part.len() > 1 && !state.has_broken.swap(true, Ordering::Relaxed) {
        let head = format!("HTTP/1.1 206 Partial Content\r\nContent-Length: {}\r\n{headers}\r\n", part.len());
        stream.write_all(head.as_bytes())?;
        return stream.write_all(&part[..part.len() / 3]);
    }
    reply("206 Partial Content", &headers, &part)
}

/// Large files are named by their SHA-256, small ones by something shorter.
fn etag(bytes: &[u8], is_large: bool) -> String {
    use sha2::{Digest, Sha256};
    let digits: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    if is_large { digits } else { digits[..40].to_owned() }
}

fn stories260k() -> Vec<(&'static str, Vec<u8>)> {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories260k");
    let names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"];
    let mut files: Vec<_> = names.map(|name| (name, std::fs::read(model.join(name)).expect("a file"))).into();
    files.push(("README.md", b"not needed".to_vec()));
    files.push(("original/consolidated.safetensors", b"not needed".to_vec()));
    files
}

fn id(written: &str) -> HubReference {
    HubReference::parse(written).expect("an id")
}

fn error(hub: &Hub, token: Option<&str>) -> HubError {
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = HubSettings { token: token.map(str::to_owned), ..hub.settings(cache.path()) };
    fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect_err("an error")
}

#[test]
fn a_model_is_downloaded_once_in_the_layout_of_huggingface_hub() {
    let hub = Hub::start(&stories260k(), Access::Open);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = hub.settings(cache.path());
    let path = fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect("a model");
    let repo = cache.path().join("models--org--tiny");
    assert_eq!(path, repo.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read_to_string(repo.join("refs/main")).expect("a ref"), COMMIT);
    for (name, bytes) in stories260k() {
        let is_needed = name != "README.md" && !name.contains('/');
        assert_eq!(path.join(name).is_file(), is_needed, "{name}");
        if is_needed {
            assert_eq!(std::fs::read(path.join(name)).expect("a file"), bytes);
            let target = std::fs::read_link(path.join(name)).expect("a link");
            let is_large = name.ends_with(".safetensors");
            assert_eq!(target, Path::new("../../blobs").join(etag(&bytes, is_large)), "{name}");
        }
    }
    let n_requests = hub.requests().len();
    assert_eq!(fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect("a model"), path);
    assert_eq!(hub.requests().len(), n_requests, "nothing is asked of the hub twice");
    // Another revision of the same content costs a question and no download.
    fetch(&id("hf://org/tiny@v2"), &settings, &NullProgress).expect("a model");
    assert!(hub.requests()[n_requests..].iter().all(|request| !request.starts_with("/content/")));
    assert_eq!(std::fs::read_to_string(repo.join("refs/v2")).expect("a ref"), COMMIT);
}

#[test]
fn shards_one_gguf_file_and_a_dataset_s_file_are_downloaded() {
    let mut files = stories260k();
    files.retain(|(name, _)| *name != "model.safetensors");
    files.push(("model.safetensors.index.json", br#"{"weight_map": {"a": "s-1.safetensors"}}"#.to_vec()));
    files.push(("s-1.safetensors", vec![1; 100]));
    files.push(("unused.safetensors", vec![2; 100]));
    files.push(("x/tiny.gguf", vec![3; 100]));
    files.push(("wikitext-2-raw-v1/test.txt", b"text".to_vec()));
    let hub = Hub::start(&files, Access::Open);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = hub.settings(cache.path());
    let dir = fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect("a model");
    assert!(dir.join("s-1.safetensors").is_file() && !dir.join("unused.safetensors").exists());
    let file = fetch(&id("hf://org/tiny/x/tiny.gguf"), &settings, &NullProgress).expect("a file");
    assert_eq!(std::fs::read(file).expect("its bytes"), [3; 100]);
    let written = "hf://datasets/Salesforce/wikitext/wikitext-2-raw-v1/test.txt";
    let file = dataset_file(written, &settings, &NullProgress).expect("a file");
    assert!(file.starts_with(cache.path().join("datasets--Salesforce--wikitext")));
    assert_eq!(std::fs::read_to_string(file).expect("a text"), "text");
    assert!(
        hub.requests().iter().any(|request| request.starts_with("/api/datasets/Salesforce/wikitext/revision/main"))
    );
    let error = dataset_file("hf://org/tiny/x/tiny.gguf", &settings, &NullProgress).expect_err("no dataset");
    assert!(matches!(error, HubError::Reference { .. }));
    let error = fetch(&id("hf://org/tiny/nowhere.gguf"), &settings, &NullProgress).expect_err("no such file");
    assert!(error.to_string().contains("find nowhere.gguf") && error.to_string().contains("no such file"), "{error}");
}

#[test]
fn what_is_missing_gated_or_refused_says_what_to_do() {
    for (access, token, expected) in [
        (
            Access::Empty,
            None,
            vec!["find hf://org/tiny", "no such repository or revision", "a private one needs HF_TOKEN"],
        ),
        (Access::Empty, Some("t"), vec!["the account of HF_TOKEN may see it"]),
        (Access::Gated("good"), None, vec!["/org/tiny", "ask for access", "set HF_TOKEN to a token of that account"]),
        (Access::Gated("good"), Some("bad"), vec!["ask for access", "check that HF_TOKEN belongs to that account"]),
        (Access::BadToken, Some("bad"), vec!["does not accept the token", "HF_TOKEN"]),
        (Access::Busy, None, vec!["HTTP status 503"]),
    ] {
        let text = error(&Hub::start(&stories260k(), access), token).to_string();
        for part in expected {
            assert!(text.contains(part), "expected {part:?} in {text}");
        }
        assert!(!text.contains("Bearer"), "{text}");
    }
    let hub = Hub::start(&stories260k(), Access::Gated("good"));
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = HubSettings { token: Some("good".to_owned()), ..hub.settings(cache.path()) };
    fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect("a model");
    assert!(hub.requests().iter().all(|request| request.ends_with(" Bearer good")));
}

#[test]
fn nothing_is_asked_of_the_network_when_offline() {
    let hub = Hub::start(&stories260k(), Access::Open);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let offline = HubSettings { is_offline: true, ..hub.settings(cache.path()) };
    let error = fetch(&id("hf://org/tiny"), &offline, &NullProgress).expect_err("an error").to_string();
    assert!(error.contains("HF_HUB_OFFLINE is set") && error.contains("hf://org/tiny"), "{error}");
    assert!(hub.requests().is_empty());
    fetch(&id("hf://org/tiny"), &hub.settings(cache.path()), &NullProgress).expect("a model");
    let n_requests = hub.requests().len();
    fetch(&id("hf://org/tiny"), &offline, &NullProgress).expect("it is in the cache");
    assert_eq!(hub.requests().len(), n_requests);
}

#[test]
fn a_hub_that_is_not_there_is_named() {
    let hub = Hub::start(&[], Access::Open);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = hub.settings(cache.path());
    drop(hub);
    let error = fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect_err("an error");
    assert!(matches!(error, HubError::Unreachable { .. }), "{error}");
    assert!(error.to_string().contains(&settings.endpoint) && error.to_string().contains("HF_ENDPOINT"), "{error}");
}

#[test]
fn a_model_without_safetensors_names_the_gguf_files_that_there_are() {
    let files = [("config.json", b"{}".to_vec()), ("a.Q4_0.gguf", vec![0; 9]), ("pytorch_model.bin", vec![0; 9])];
    let error = error(&Hub::start(&files, Access::Open), None).to_string();
    assert!(error.contains("no safetensors") && error.contains("hf://org/tiny/a.Q4_0.gguf"), "{error}");
}

#[test]
fn a_changed_byte_is_found_and_leaves_nothing_behind() {
    let hub = Hub::start(&stories260k(), Access::Corrupt);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let settings = hub.settings(cache.path());
    let error = fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect_err("an error").to_string();
    assert!(error.contains("model.safetensors") && error.contains("SHA-256"), "{error}");
    assert_eq!(locate(&id("hf://org/tiny"), &settings), None);
    let (_, weights) = stories260k().into_iter().find(|(name, _)| *name == "model.safetensors").expect("the weights");
    assert!(!cache.path().join("models--org--tiny/blobs").join(etag(&weights, true)).exists());
}

#[test]
fn a_broken_transfer_goes_on_where_it_stopped() {
    let hub = Hub::start(&stories260k(), Access::Breaks);
    let cache = tempfile::tempdir().expect("a temporary folder");
    let dir = fetch(&id("hf://org/tiny"), &hub.settings(cache.path()), &NullProgress).expect("a model");
    let (_, weights) = stories260k().into_iter().find(|(name, _)| *name == "model.safetensors").expect("the weights");
    assert_eq!(std::fs::read(dir.join("model.safetensors")).expect("the weights"), weights);
    assert!(hub.state.has_broken.load(Ordering::Relaxed));
}

#[test]
fn a_hash_that_leads_out_of_the_cache_is_refused() {
    let hub = Hub::start(&stories260k(), Access::Hostile);
    let dir = tempfile::tempdir().expect("a temporary folder");
    let settings = hub.settings(&dir.path().join("a/b/hub"));
    let error = fetch(&id("hf://org/tiny"), &settings, &NullProgress).expect_err("an error").to_string();
    assert!(error.contains("../../../outside"), "{error}");
    let mut open = vec![dir.path().to_owned()];
    while let Some(folder) = open.pop() {
        for path in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
            assert!(!path.ends_with("outside"), "{}", path.display());
            open.extend(path.is_dir().then_some(path));
        }
    }
}

/// Runs labpipe with a cache and a hub of its own.
#[cfg(feature = "cpu")]
fn run(lab: &Lab, hub: &Hub, args: &[&str], more: &[(&str, &str)]) -> (Option<i32>, String) {
    let mut command = lab.command(args);
    for name in ["HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "TRANSFORMERS_OFFLINE"] {
        command.env_remove(name);
    }
    command.env("HF_HOME", lab.path("hf")).env("HF_ENDPOINT", hub.endpoint()).envs(more.iter().copied());
    let output = command.output().expect("labpipe starts");
    (output.status.code(), support::text(&output.stdout) + &support::text(&output.stderr))
}

#[cfg(feature = "cpu")]
#[test]
fn a_pipeline_names_a_hub_id_and_runs_again_without_a_network() {
    let mut files = stories260k();
    files.push(("x/text.txt", "Once upon a time there was a little girl. ".repeat(40).into_bytes()));
    let hub = Hub::start(&files, Access::Gated("good"));
    let lab = Lab::new();
    let pipeline = "version: 1\nname: hub\nstages:\n  base: { kind: load, model: org/tiny, dtype: f32 }\n  \
                    ppl: { kind: ppl, model: base, text: hf://datasets/org/texts/x/text.txt, max_length: 64, stride: 64 }\n";
    lab.write("hub.yaml", pipeline);
    let (code, text) = run(&lab, &hub, &["plan", "hub.yaml"], &[]);
    assert!(code == Some(0) && text.contains("2 of 2 stages would run"), "{text}");
    assert!(hub.requests().is_empty(), "a plan downloads nothing");
    let (code, text) = run(&lab, &hub, &["run", "hub.yaml"], &[]);
    assert!(code == Some(2) && text.contains("ask for access") && text.contains("HF_TOKEN"), "{text}");
    let (code, text) = run(&lab, &hub, &["run", "hub.yaml"], &[("HF_TOKEN", "good")]);
    assert!(code == Some(0) && text.contains("hf://org/tiny"), "{text}");
    assert!(!lab.run_json().to_string().contains("good"), "no token in what a run leaves");
    assert_eq!(lab.record("base")["hub"]["commit"], COMMIT);
    let fields: PathBuf = lab.path("cache");
    let manifests = std::process::Command::new("grep").args(["-rhoE", "sha256:[0-9a-f]{64}"]).arg(&fields).output();
    assert!(!manifests.expect("grep").stdout.is_empty(), "the blob's name is the hash in the key");
    let n_requests = hub.requests().len();
    let (code, text) = run(&lab, &hub, &["run", "hub.yaml"], &[("HF_HUB_OFFLINE", "1")]);
    assert!(code == Some(0) && text.contains("cached"), "{text}");
    assert_eq!(hub.requests().len(), n_requests);
    std::fs::remove_dir_all(lab.path("hf")).expect("the cache");
    let (code, text) = run(&lab, &hub, &["run", "hub.yaml"], &[("HF_HUB_OFFLINE", "1")]);
    assert!(code == Some(2) && text.contains("HF_HUB_OFFLINE is set"), "{text}");
}
