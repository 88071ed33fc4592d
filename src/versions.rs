//! Exact versions of the crates that this program is built from, as Cargo.lock has them: a patch release may change numbers too.

use std::collections::BTreeMap;

/// Crates that decide which tokens a text becomes.
const TEXT: [&str; 7] = [
    "arrow",
    "fancy-regex",
    "minijinja",
    "minijinja-contrib",
    "parquet",
    "tokenizers",
    "unicode-normalization-alignments",
];

/// Returns the crates whose version may change numbers, texts or files: (name, version), sorted by name.
pub fn all() -> impl Iterator<Item = (&'static str, &'static str)> {
    env!("LABPIPE_CRATES").split(' ').filter_map(|pair| pair.split_once('='))
}

/// Returns those of the named crates that Cargo.lock has.
pub fn of(names: &[&str]) -> BTreeMap<String, String> {
    let known = all().filter(|(name, _)| names.contains(name));
    known.map(|(name, version)| (name.to_owned(), version.to_owned())).collect()
}

/// Returns the crates that decide which tokens a text becomes.
pub fn of_text() -> BTreeMap<String, String> {
    of(&TEXT)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_crate_of_texts_has_its_exact_version() {
        let lock = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.lock")).expect("Cargo.lock");
        let versions = of_text();
        assert_eq!(versions.len(), TEXT.len(), "{versions:?}");
        for (name, version) in versions {
            assert!(lock.contains(&format!("name = \"{name}\"\nversion = \"{version}\"\n")), "{name} {version}");
        }
    }
}
