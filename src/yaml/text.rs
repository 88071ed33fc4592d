//! From bytes to the characters of a YAML text.

use super::error::YamlError;
use super::node::Place;

/// Longest text that is read, in bytes: room for 100,000 stages.
pub const MAX_TEXT_BYTES: usize = 32 << 20;

/// Takes a file's bytes for text.
///
/// # Errors
/// Where there are too many, or they are not UTF-8.
pub fn decode(bytes: Vec<u8>) -> Result<String, YamlError> {
    let refused = |line: usize, message: String, hint: &str| {
        Err(YamlError { at: Place { line, column: 1 }, message, hint: Some(hint.to_owned()) })
    };
    if bytes.len() > MAX_TEXT_BYTES {
        return refused(1, format!("it is longer than {} MiB", MAX_TEXT_BYTES >> 20), "is it the file that is meant?");
    }
    let is_utf_16 = bytes.starts_with(&[0xff, 0xfe]) || bytes.starts_with(&[0xfe, 0xff]);
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(_) if is_utf_16 => refused(1, "it is UTF-16".to_owned(), "save it as UTF-8"),
        Err(error) => {
            let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
            let line = before.iter().filter(|byte| **byte == b'\n').count() + 1;
            refused(line, format!("line {line} is not UTF-8"), "save it as UTF-8")
        }
    }
}

/// Refuses what YAML allows in no text: control characters.
///
/// # Errors
/// The first of them.
pub fn check_characters(text: &str) -> Result<(), YamlError> {
    let is_allowed = |c: char| !c.is_control() || ['\t', '\n', '\r', '\u{85}'].contains(&c);
    let Some(at) = text.find(|c: char| !is_allowed(c)) else { return Ok(()) };
    let (before, rest) = text.split_at(at);
    let line = before.matches('\n').count() + 1;
    let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
    let code = rest.chars().next().map_or(0, u32::from);
    let message = format!("the control character U+{code:04X}");
    Err(YamlError::new(Place { line, column }, message, Some("is it a text file, saved as UTF-8?")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_utf_8_of_a_bounded_length_is_text() {
        assert_eq!(decode("größe\n".into()), Ok("größe\n".to_owned()));
        let refusal = |bytes: &[u8]| decode(bytes.to_vec()).expect_err("no text").message;
        assert_eq!(refusal(b"a: 1\nb: \xe9\n"), "line 2 is not UTF-8");
        assert_eq!(refusal(b"\xff\xfea\0"), "it is UTF-16");
        assert_eq!(refusal(&vec![b'#'; MAX_TEXT_BYTES + 1]), "it is longer than 32 MiB");
        let error = check_characters("a\n  \u{7}").expect_err("a bell");
        assert_eq!((error.at, error.message.ends_with("U+0007")), (Place { line: 2, column: 3 }, true));
        assert_eq!(check_characters("tab\t, line\r\n, \u{85}, \u{2028}"), Ok(()));
    }
}
