//! "Did you mean": the known name nearest to one that isn't known.

/// Returns a hint that names the most similar of `known`, or lists them where none is near and they are few.
pub fn did_you_mean<'a>(found: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let known: Vec<&str> = known.into_iter().collect();
    let nearest = known
        .iter()
        .map(|name| (strsim::damerau_levenshtein(&found.to_lowercase(), &name.to_lowercase()), *name))
        .min();
    match nearest {
        Some((distance, name)) if distance <= 1 + found.len().min(name.len()) / 3 => {
            Some(format!("did you mean {name:?}?"))
        }
        _ if !known.is_empty() && known.len() <= 16 => Some(format!("expected one of: {}", known.join(", "))),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_is_suggested_and_few_names_are_listed() {
        assert_eq!(
            did_you_mean("blok_size", ["block_size", "config"]).as_deref(),
            Some("did you mean \"block_size\"?")
        );
        assert_eq!(did_you_mean("zzz", ["a_b", "c_d"]).as_deref(), Some("expected one of: a_b, c_d"));
        assert_eq!(did_you_mean("x", []), None);
    }
}
