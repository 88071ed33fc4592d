//! The names of folders in the results and in the cache's index. Pure: what becomes a path is decided here.

/// Longest folder name in bytes. File systems take 255 at most, those that encrypt names 143.
pub const MAX_FOLDER_BYTES: usize = 120;
/// Digits of blake3 in the name of a folder whose text could not be taken as it is.
const N_DIGITS: usize = 8;
/// Names of devices on Windows, whose file servers refuse them.
const DEVICES: [&str; 5] = ["aux", "con", "nul", "prn", "clock$"];

/// Returns the name of the folder that stands for a text. A text that every file system takes is its own name. Of any other, what
/// can't stand in a name becomes `-`, what is too long is cut, and `~` and eight digits of the text's blake3 keep it apart from all
/// others.
pub fn folder_name(text: &str) -> String {
    if is_plain(text) {
        return text.to_owned();
    }
    let hash = blake3::hash(text.as_bytes()).to_hex();
    let room = MAX_FOLDER_BYTES - N_DIGITS - 1;
    let mut name = String::new();
    for c in text.chars().map(|c| if is_allowed(c) || (!c.is_ascii() && !c.is_control()) { c } else { '-' }) {
        if name.len() + c.len_utf8() > room {
            break;
        }
        name.push(c);
    }
    // Neither hidden nor a relative path.
    if name.starts_with('.') {
        name.replace_range(..1, "-");
    }
    format!("{name}~{}", &hash[..N_DIGITS])
}

/// Returns true for a text that is its own folder's name everywhere. Letters beyond ASCII are spelled in two ways that some file
/// systems take for one, so they get digits too.
fn is_plain(text: &str) -> bool {
    let stem = text.split('.').next().unwrap_or_default().to_ascii_lowercase();
    let is_port = |name: &str| {
        ["com", "lpt"]
            .iter()
            .any(|port| name.strip_prefix(port).is_some_and(|n| n.len() == 1 && n.as_bytes()[0].is_ascii_digit()))
    };
    !text.is_empty()
        && text.len() <= MAX_FOLDER_BYTES
        && text.chars().all(is_allowed)
        && !text.starts_with(['.', ' '])
        && !text.ends_with(['.', ' '])
        && !DEVICES.contains(&stem.as_str())
        && !is_port(&stem)
}

fn is_allowed(c: char) -> bool {
    c.is_ascii_alphanumeric() || "-_=,.+@%#&()[]{}!'^$; ".contains(c)
}

/// Returns the folders of a stage's address below its run's folder: `[stage]`, or `[cell, stage]` for the copy of a cell.
pub fn stage_folders(address: &str) -> Vec<String> {
    match address.strip_suffix(']').and_then(|rest| rest.split_once('[')) {
        Some((stage, cell)) => vec![folder_name(cell), folder_name(stage)],
        None => vec![folder_name(address)],
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::{Component, Path};

    #[test]
    fn what_every_file_system_takes_is_its_own_name() {
        for text in ["ppl", "config=int8", "config=nf4,seed=1", "n=0.5", "fp16_base", "a b"] {
            assert_eq!(folder_name(text), text);
        }
        assert_eq!(stage_folders("ppl[config=int8]"), ["config=int8", "ppl"]);
    }

    #[test]
    fn what_one_does_not_take_is_replaced_and_kept_apart_by_digits() {
        for text in [
            "", ".", "..", "../x", "/etc", "a/b", "a\\b", "a:b", "a\0b", "x.", " x", "con", "NUL.txt", "com1", "é",
            "a~b",
        ] {
            let name = folder_name(text);
            assert_eq!(name.rsplit_once('~').map(|(_, digits)| digits.len()), Some(8), "{text:?} -> {name:?}");
        }
        assert_ne!(folder_name("a/b"), folder_name("a:b"));
        let (one, other) =
            (folder_name(&format!("{}1", "x".repeat(400))), folder_name(&format!("{}2", "x".repeat(400))));
        assert!(one != other && one.len() == MAX_FOLDER_BYTES, "{one}");
    }

    proptest! {
        #[test]
        fn a_folder_stays_below_the_run_and_no_two_texts_share_one(a in "\\PC{0,200}|[./\\\\~a\u{0}]{0,6}", b in "\\PC{0,200}") {
            let name = folder_name(&a);
            prop_assert!(name.len() <= MAX_FOLDER_BYTES && !name.is_empty());
            let parts: Vec<Component<'_>> = Path::new(&name).components().collect();
            prop_assert!(matches!(parts[..], [Component::Normal(part)] if part == name.as_str()));
            prop_assert!(a == b || name != folder_name(&b));
        }
    }
}
