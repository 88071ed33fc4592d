//! The account of a model's files: which of their entries were used, and which were not.

use serde::{Deserialize, Serialize};

/// What the files of a model hold and what was made of it. `load` commits it, so that no part of a model is left out in silence.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SourceAccount {
    /// One entry per set of fields, keys or tensors.
    pub parts: Vec<AccountPart>,
    /// The element types of the weights as the files store them, largest share of bytes first.
    pub element_types: Vec<StoredType>,
}

/// One set of entries: the fields of a file, its metadata keys, or its tensors.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AccountPart {
    /// `config.json`, `GGUF metadata`, `tensors`, `tokenizer_config.json`.
    pub source: String,
    /// Entries that the model was made from.
    pub n_used: usize,
    /// Entries known to have no effect on what labpipe computes.
    pub n_harmless: usize,
    /// Entries that are neither, sorted. They are named in one warning.
    pub unused: Vec<String>,
    /// What else a user must hear of this part, a sentence each: `rope_scaling is used and rope_parameters ignored, as in transformers`.
    pub warnings: Vec<String>,
}

/// The weights of one element type.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoredType {
    /// As the format names it: `F16`, `BF16`, `Q4_1`, `bitsandbytes nf4`.
    pub name: String,
    pub n_tensors: usize,
    pub n_params: u64,
    /// Bytes in the file.
    pub bytes: u64,
}

impl StoredType {
    /// Returns true for plain floats; other types hold blocks of codes, and their values were rounded when the file was made.
    pub fn is_plain(&self) -> bool {
        ["F64", "F32", "F16", "BF16"].contains(&self.name.as_str())
    }
}

/// Returns element types in words, with their shares of the bytes where there are several: `Q4_1 89 %, F32 11 %`. Plain floats are
/// called as a `dtype` is: `bf16`. Of many types the largest are named. `None` where nothing is known.
pub fn stored_words(types: &[StoredType]) -> Option<String> {
    let total: u64 = types.iter().map(|one| one.bytes).sum();
    let share = |one: &StoredType| match 100.0 * one.bytes as f64 / total.max(1) as f64 {
        percent if percent < 1.0 => "<1 %".to_owned(),
        percent if percent > 99.0 && percent < 100.0 => ">99 %".to_owned(),
        percent => format!("{percent:.0} %"),
    };
    let name = |one: &StoredType| if one.is_plain() { one.name.to_lowercase() } else { one.name.clone() };
    match types {
        [] => None,
        [only] => Some(name(only)),
        several => {
            let named = several.iter().take(MAX_TYPES).map(|one| format!("{} {}", name(one), share(one)));
            let words = named.collect::<Vec<_>>().join(", ");
            Some(match several.len().saturating_sub(MAX_TYPES) {
                0 => words,
                n => format!("{words}, {n} more"),
            })
        }
    }
}

/// Element types named in words; the record holds all of them.
const MAX_TYPES: usize = 3;
/// Names shown in a warning; the record holds all of them.
const MAX_NAMED: usize = 6;

impl AccountPart {
    /// Returns the warnings of this part: its own, and one that names its unused entries.
    pub fn all_warnings(&self) -> Vec<String> {
        let mut warnings = self.warnings.clone();
        if !self.unused.is_empty() {
            let named = self.unused.iter().take(MAX_NAMED).cloned().collect::<Vec<_>>().join(", ");
            let more = match self.unused.len().saturating_sub(MAX_NAMED) {
                0 => String::new(),
                n => format!(" and {n} more"),
            };
            warnings.push(format!("{}: {} not used: {named}{more}", self.source, self.unused.len()));
        }
        warnings
    }
}

impl SourceAccount {
    /// Returns every part's warnings, in order.
    pub fn warnings(&self) -> Vec<String> {
        self.parts.iter().flat_map(AccountPart::all_warnings).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unused_entries_are_one_warning_that_names_the_first() {
        let unused = (0..8).map(|i| format!("extra.{i}")).collect();
        let part = AccountPart { source: "tensors".to_owned(), unused, ..AccountPart::default() };
        let expected = "tensors: 8 not used: extra.0, extra.1, extra.2, extra.3, extra.4, extra.5 and 2 more";
        assert_eq!(part.all_warnings(), [expected]);
        assert!(AccountPart::default().all_warnings().is_empty());
    }

    #[test]
    fn element_types_are_told_with_their_shares_of_the_bytes() {
        let stored = |name: &str, bytes| StoredType { name: name.to_owned(), n_tensors: 1, n_params: 1, bytes };
        assert_eq!(stored_words(&[]), None);
        assert_eq!(stored_words(&[stored("BF16", 7)]).as_deref(), Some("bf16"));
        let mixed = [stored("Q4_1", 890), stored("Q8_0", 105), stored("F32", 5)];
        assert_eq!(stored_words(&mixed).as_deref(), Some("Q4_1 89 %, Q8_0 10 %, f32 <1 %"));
        let many = [stored("Q4_K", 60), stored("Q6_K", 30), stored("Q5_K", 6), stored("Q8_0", 3), stored("F32", 1)];
        assert_eq!(stored_words(&many).as_deref(), Some("Q4_K 60 %, Q6_K 30 %, Q5_K 6 %, 2 more"));
        let norms = [stored("F16", 9_999), stored("F32", 1)];
        assert_eq!(stored_words(&norms).as_deref(), Some("f16 >99 %, f32 <1 %"));
        assert!(norms.iter().all(StoredType::is_plain) && !mixed[0].is_plain());
    }
}
