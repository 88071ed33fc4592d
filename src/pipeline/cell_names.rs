//! How the values of a matrix variable are named in addresses and folders. Pure.

use std::collections::BTreeMap;

/// Longest name of a value in bytes. Longer ones are cut.
const MAX_NAME_BYTES: usize = 60;
/// Digits of blake3 that keep a name apart from others.
const N_DIGITS: usize = 8;

/// Returns the names of values, given as text and wished-for name. A name that is long or holds control characters is cut and
/// cleaned, and so are those that differ in case only or not at all; each of these ends with eight digits of the blake3 of the value's
/// text.
pub fn cell_names(values: &[(String, String)]) -> Vec<String> {
    let mut n_same: BTreeMap<String, usize> = BTreeMap::new();
    for (_, name) in values {
        *n_same.entry(name.to_lowercase()).or_default() += 1;
    }
    let of = |(text, name): &(String, String)| {
        let is_plain = name.len() <= MAX_NAME_BYTES && !name.is_empty() && !name.chars().any(char::is_control);
        if is_plain && n_same.get(&name.to_lowercase()) == Some(&1) {
            return name.clone();
        }
        let mut short = String::new();
        for c in name.chars().map(|c| if c.is_control() { '-' } else { c }) {
            if short.len() + c.len_utf8() > MAX_NAME_BYTES - N_DIGITS - 1 {
                break;
            }
            short.push(c);
        }
        format!("{short}-{}", &blake3::hash(text.as_bytes()).to_hex()[..N_DIGITS])
    };
    values.iter().map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(values: &[&str]) -> Vec<String> {
        cell_names(&values.iter().map(|text| ((*text).to_owned(), (*text).to_owned())).collect::<Vec<_>>())
    }

    #[test]
    fn short_values_are_named_as_they_are() {
        assert_eq!(names(&["nf4", "int8", "0.5"]), ["nf4", "int8", "0.5"]);
    }

    #[test]
    fn long_values_and_values_that_differ_in_case_get_names_of_their_own() {
        let long = "long-description-of-a-text-".repeat(12);
        let found = names(&[&format!("{long}1"), &format!("{long}2"), "A", "a", "b", "x\ny", ""]);
        let lower: std::collections::BTreeSet<String> = found.iter().map(|name| name.to_lowercase()).collect();
        assert_eq!(lower.len(), 7, "{found:?}");
        assert!(found.iter().all(|name| name.len() <= MAX_NAME_BYTES && !name.contains('\n')), "{found:?}");
        // BLAKE3 of "a" begins with 17762fdd.
        assert_eq!((found[3].as_str(), found[4].as_str()), ("a-17762fdd", "b"));
    }
}
