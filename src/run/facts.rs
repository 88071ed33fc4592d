//! What a plan asks of the world, answered from the store and from the disk.

use super::sources::{Sources, read_config};
use crate::inference::EngineInfo;
use crate::plan::{Facts, Key, KeyFields, Located, SourceKind};
use crate::quantization::QuantizationConfig;
use crate::store::Store;
use std::path::Path;

/// Facts about one pipeline.
pub struct StoreFacts<'a> {
    pub store: Store,
    pub sources: &'a Sources,
    pub pipeline: String,
    pub engine: EngineInfo,
}

impl Facts for StoreFacts<'_> {
    fn locate(&self, kind: SourceKind, written: &str) -> Result<Located, String> {
        self.sources.locate(kind, written).map_err(|error| error.to_string())
    }

    fn quantization_config(&self, path: &Path) -> Option<QuantizationConfig> {
        read_config(path)
    }

    fn file_hash(&self, path: &Path) -> Result<String, String> {
        self.sources.hash(path).map_err(|error| error.to_string())
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
