//! labpipe's YAML tree against serde-saphyr's reading of the same files.

use serde_json::Value;
use std::path::{Path, PathBuf};

fn yaml_files(folder: &str) -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let entries = std::fs::read_dir(&folder).expect("the folder");
    let paths = entries.map(|entry| entry.expect("an entry").path());
    paths.filter(|path| path.extension().is_some_and(|ending| ending == "yaml" || ending == "yml")).collect()
}

#[test]
fn every_yaml_file_of_the_repository_reads_as_serde_saphyr_reads_it() {
    let folders = ["pipelines", "experiments", ".github/workflows"];
    let files: Vec<PathBuf> = folders.iter().flat_map(|folder| yaml_files(folder)).collect();
    assert!(files.len() > 10, "{files:?}");
    for path in files {
        let text = std::fs::read_to_string(&path).expect("a text");
        let expected: Value = serde_yaml::from_str(&text).expect("YAML");
        let found = labpipe::yaml::parse(&text).expect("YAML").to_json();
        assert_eq!(found, expected, "{}", path.display());
    }
}
