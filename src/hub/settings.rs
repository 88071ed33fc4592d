//! Where the cache is, which hub is asked, and as whom: the environment variables that `huggingface_hub` reads.

use std::fmt;
use std::path::{Path, PathBuf};

const ENDPOINT: &str = "https://huggingface.co";

/// How the hub is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct HubSettings {
    /// Folder that holds `models--ORG--NAME`.
    pub cache_dir: PathBuf,
    /// Without a slash at its end.
    pub endpoint: String,
    /// Sent to the endpoint and, as hf-hub does it, to the storage that it refers to for a file's size; never shown.
    pub token: Option<String>,
    /// Nothing is asked of the network.
    pub is_offline: bool,
}

impl HubSettings {
    /// Reads `HF_HUB_CACHE`, `HF_HOME`, `XDG_CACHE_HOME`, `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH` and `HF_HUB_OFFLINE`.
    pub fn from_env() -> HubSettings {
        HubSettings::from_vars(&|name| std::env::var(name).ok().filter(|value| !value.trim().is_empty()))
    }

    fn from_vars(var: &dyn Fn(&str) -> Option<String>) -> HubSettings {
        let home = var("HF_HOME").map(PathBuf::from).unwrap_or_else(|| {
            let cache = var("XDG_CACHE_HOME").map(PathBuf::from);
            cache.unwrap_or_else(|| PathBuf::from(var("HOME").unwrap_or_default()).join(".cache")).join("huggingface")
        });
        let cache_dir = var("HF_HUB_CACHE").or_else(|| var("HUGGINGFACE_HUB_CACHE")).map(PathBuf::from);
        let token_path = var("HF_TOKEN_PATH").map_or_else(|| home.join("token"), PathBuf::from);
        let is_true = |value: String| ["1", "on", "yes", "true"].contains(&value.trim().to_ascii_lowercase().as_str());
        HubSettings {
            cache_dir: cache_dir.unwrap_or_else(|| home.join("hub")),
            endpoint: var("HF_ENDPOINT").unwrap_or_else(|| ENDPOINT.to_owned()).trim_end_matches('/').to_owned(),
            token: var("HF_TOKEN").or_else(|| var("HUGGING_FACE_HUB_TOKEN")).or_else(|| token_file(&token_path)),
            is_offline: var("HF_HUB_OFFLINE").or_else(|| var("TRANSFORMERS_OFFLINE")).is_some_and(is_true),
        }
    }
}

fn token_file(path: &Path) -> Option<String> {
    std::fs::read_to_string(path).ok().map(|token| token.trim().to_owned()).filter(|token| !token.is_empty())
}

impl fmt::Debug for HubSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let token = self.token.as_ref().map(|_| "…");
        f.debug_struct("HubSettings")
            .field("cache_dir", &self.cache_dir)
            .field("endpoint", &self.endpoint)
            .field("token", &token)
            .field("is_offline", &self.is_offline)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(vars: &[(&str, &str)]) -> HubSettings {
        HubSettings::from_vars(&|name| vars.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).to_owned()))
    }

    #[test]
    fn the_cache_is_where_huggingface_hub_has_it() {
        assert_eq!(settings(&[("HOME", "/h")]).cache_dir, Path::new("/h/.cache/huggingface/hub"));
        assert_eq!(settings(&[("HOME", "/h"), ("HF_HOME", "/x")]).cache_dir, Path::new("/x/hub"));
        assert_eq!(settings(&[("HF_HOME", "/x"), ("HF_HUB_CACHE", "/y")]).cache_dir, Path::new("/y"));
        assert_eq!(settings(&[("XDG_CACHE_HOME", "/c")]).cache_dir, Path::new("/c/huggingface/hub"));
    }

    #[test]
    fn a_token_is_never_shown() {
        let settings = settings(&[("HF_TOKEN", "hf_secret"), ("HF_HUB_OFFLINE", "1"), ("HF_ENDPOINT", "http://x/")]);
        assert_eq!(settings.token.as_deref(), Some("hf_secret"));
        assert!(settings.is_offline && settings.endpoint == "http://x");
        assert!(!format!("{settings:?}").contains("hf_secret"));
    }
}
