//! File names made of addresses and module names: safe everywhere, no two alike.

use std::collections::BTreeSet;

/// Gives out names within one folder.
#[derive(Debug, Default)]
pub struct Names {
    /// In lower case: some file systems don't tell cases apart.
    taken: BTreeSet<String>,
}

impl Names {
    /// Starts with names that are not to be given out.
    pub fn reserved(names: &[&str]) -> Names {
        Names { taken: names.iter().map(|name| name.to_ascii_lowercase()).collect() }
    }

    /// Returns a name for `text`: letters, digits, `.`, `_`, `=` and `-` stay, numbered where it was given out before.
    pub fn give(&mut self, text: &str) -> String {
        let stem = safe(text);
        let mut name = stem.clone();
        let mut n_tries = 1;
        while !self.taken.insert(name.to_ascii_lowercase()) {
            n_tries += 1;
            name = format!("{stem}-{n_tries}");
        }
        name
    }
}

fn safe(text: &str) -> String {
    let kept = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '=' | '-');
    let name: String = text.chars().map(|c| if kept(c) { c } else { '-' }).take(120).collect();
    let name = name.trim_matches(['-', '.']);
    if name.is_empty() { "unnamed".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_safe_and_never_the_same() {
        let mut names = Names::reserved(&["summary"]);
        assert_eq!(names.give("diff[config=int8]"), "diff-config=int8");
        assert_eq!(names.give("diff(config=int8)"), "diff-config=int8-2");
        assert_eq!(names.give("summary"), "summary-2");
        assert_eq!(names.give("../../etc"), "etc");
        assert_eq!(names.give("Summary"), "Summary-3");
        assert_eq!(names.give("///"), "unnamed");
    }
}
