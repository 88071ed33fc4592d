//! What a plan asks of the world, answered from the store.

use crate::inference::EngineInfo;
use crate::plan::{Facts, Key, KeyFields};
use crate::store::{FileHashes, Store};
use std::path::Path;

/// Facts about one pipeline.
pub struct StoreFacts {
    pub store: Store,
    pub hashes: FileHashes,
    pub pipeline: String,
    pub engine: EngineInfo,
}

impl Facts for StoreFacts {
    fn file_hash(&self, path: &Path) -> Result<String, String> {
        self.hashes.get(path).map_err(|error| error.to_string())
    }

    fn artifact(&self, key: &Key) -> Option<String> {
        self.store.get(key).map(|artifact| artifact.manifest.digest)
    }

    fn last(&self, stage: &str) -> Option<(Key, KeyFields)> {
        self.store.last(&self.pipeline, stage)
    }

    fn engine(&self) -> EngineInfo {
        self.engine.clone()
    }
}
