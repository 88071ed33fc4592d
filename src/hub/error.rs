//! Why something on the hub is not to be had, and what to do about it.

use std::path::PathBuf;

/// What went wrong with the hub. The text fits "failed to {error}".
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HubError {
    #[error("read the hub id {written:?}: {reason}")]
    Reference { written: String, reason: String },
    #[error(
        "find {id}: it is not in the Hugging Face cache at {cache} and HF_HUB_OFFLINE is set; unset it, or download it on a machine \
         with a network and bring the cache here (HF_HOME names another)"
    )]
    Offline { id: String, cache: PathBuf },
    #[error(
        "find {id}: it is not in the Hugging Face cache at {cache}, and this labpipe was built without downloads (feature hub)"
    )]
    NotBuilt { id: String, cache: PathBuf },
    #[error("find {what} at {endpoint}: there is no such {noun}; check its spelling{}", private(*.has_token))]
    Missing { what: String, noun: &'static str, endpoint: String, has_token: bool },
    #[error("download {id}: its owner must let you in first; ask for access at {page}, then {}", token_advice(*.has_token))]
    Gated { id: String, page: String, has_token: bool },
    #[error(
        "find {id} at {endpoint}: the hub does not accept the token; get a valid one, or unset HF_TOKEN for what is public"
    )]
    Token { id: String, endpoint: String },
    #[error("reach {endpoint}: {reason}; HF_ENDPOINT names a mirror, and a copy of the cache needs no network")]
    Unreachable { endpoint: String, reason: String },
    #[error("download {id}: {reason}")]
    Server { id: String, reason: String },
    #[error("download {file} of {id}: {reason}; it was removed, run the same command again")]
    Damaged { id: String, file: String, reason: String },
    #[error("load {id}: it has no safetensors{}", gguf_advice(.id, .gguf_files))]
    NoWeights { id: String, gguf_files: Vec<String> },
    #[error("write {path}: {source}")]
    Io { path: PathBuf, source: std::io::Error },
    #[error("cancelled")]
    Cancelled,
}

fn private(has_token: bool) -> &'static str {
    if has_token { ", and that the account of HF_TOKEN may see it" } else { "; a private one needs HF_TOKEN" }
}

fn token_advice(has_token: bool) -> &'static str {
    if has_token {
        "check that HF_TOKEN belongs to that account and may read gated repositories"
    } else {
        "set HF_TOKEN to a token of that account"
    }
}

fn gguf_advice(id: &str, files: &[String]) -> String {
    match files.first() {
        Some(first) => format!("; it has {} GGUF files, name one of them: hf://{id}/{first}", files.len()),
        None => "; convert it to safetensors first".to_owned(),
    }
}
