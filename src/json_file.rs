//! JSON files that other programs wrote: a byte order mark is skipped, and what is not JSON is named.

use serde::de::{DeserializeSeed, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use std::fmt;

/// A key that occurs twice in one mapping, with different values. The last one counts, as in Python.
#[derive(Debug, Clone, PartialEq)]
pub struct RepeatedKey {
    /// The keys that lead to it: `rope_scaling.factor`.
    pub path: String,
    /// The value before, which is ignored.
    pub first: Value,
    /// The value that counts.
    pub last: Value,
}

/// Parses a JSON file's bytes.
///
/// # Errors
/// What is wrong with them, as a sentence's end that begins with `not valid JSON`; line and column where they are known.
pub fn parse_json(bytes: &[u8]) -> Result<Value, String> {
    let text = text_of(bytes)?;
    serde_json::from_str(text).map_err(|error| explain(text, &error))
}

/// Parses a JSON file's bytes and reports the keys that stand twice with different values.
///
/// # Errors
/// As [`parse_json`].
pub fn parse_json_with_repeats(bytes: &[u8]) -> Result<(Value, Vec<RepeatedKey>), String> {
    let text = text_of(bytes)?;
    let mut repeated = Vec::new();
    let mut deserializer = serde_json::Deserializer::from_str(text);
    let value = Reader { path: String::new(), repeated: &mut repeated }
        .deserialize(&mut deserializer)
        .and_then(|value| deserializer.end().map(|()| value))
        .map_err(|error| explain(text, &error))?;
    Ok((value, repeated))
}

/// Returns the text without its byte order mark.
fn text_of(bytes: &[u8]) -> Result<&str, String> {
    let other_encoding = match bytes {
        [0xFF, 0xFE, 0, 0, ..] | [0, 0, 0xFE, 0xFF, ..] | [b'{' | b'[', 0, 0, 0, ..] | [0, 0, 0, ..] => Some("UTF-32"),
        [0xFF, 0xFE, ..] | [0xFE, 0xFF, ..] | [b'{' | b'[', 0, ..] | [0, b'{' | b'[', ..] => Some("UTF-16"),
        _ => None,
    };
    if let Some(encoding) = other_encoding {
        return Err(format!("not valid JSON: the text is {encoding}; save the file as UTF-8"));
    }
    let bytes = bytes.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(bytes);
    let text = std::str::from_utf8(bytes).map_err(|error| {
        let (line, column) = position(bytes, error.valid_up_to());
        format!("not valid JSON: not UTF-8 at line {line} column {column}")
    })?;
    if text.trim().is_empty() {
        return Err("not valid JSON: the file is empty".to_owned());
    }
    Ok(text)
}

/// Returns the line and the column of a byte, both counted from 1.
fn position(bytes: &[u8], at: usize) -> (usize, usize) {
    let before = &bytes[..at.min(bytes.len())];
    let line_start = before.iter().rposition(|byte| *byte == b'\n').map_or(0, |newline| newline + 1);
    (before.iter().filter(|byte| **byte == b'\n').count() + 1, at - line_start + 1)
}

/// Returns a parser's error, or that the value there is one of the literals that Python writes and JSON does not have.
fn explain(text: &str, error: &serde_json::Error) -> String {
    let (line, column) = (error.line(), error.column());
    let in_line = text.split('\n').nth(line.saturating_sub(1)).unwrap_or_default();
    let near = |from: usize| in_line.as_bytes().get(from..).unwrap_or_default();
    for literal in ["-Infinity", "Infinity", "NaN"] {
        // A parser stops at the first character that does not fit, or behind it.
        let is_here = (0..=2).any(|back| near(column.saturating_sub(back)).starts_with(literal.as_bytes()));
        if is_here {
            return format!(
                "not valid JSON: {literal} at line {line} column {column} is no JSON number; Python writes it, and a config has no use for it"
            );
        }
    }
    format!("not valid JSON: {error}")
}

/// Builds a value and notes repeated keys on the way.
struct Reader<'a> {
    path: String,
    repeated: &'a mut Vec<RepeatedKey>,
}

impl Reader<'_> {
    fn below(&mut self, key: &str) -> Reader<'_> {
        let path = if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) };
        Reader { path, repeated: self.repeated }
    }
}

impl<'de> DeserializeSeed<'de> for Reader<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Reader<'_> {
    type Value = Value;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Value, E> {
        Ok(Number::from_f64(value).map_or(Value::Null, Value::Number))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(Value::from(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(mut self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        loop {
            let key = list.len().to_string();
            match items.next_element_seed(self.below(&key))? {
                Some(item) => list.push(item),
                None => return Ok(Value::Array(list)),
            }
        }
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut entries: A) -> Result<Value, A::Error> {
        let mut map = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(self.below(&key))?;
            if let Some(first) = map.insert(key.clone(), value.clone())
                && first != value
            {
                let path = self.below(&key).path;
                self.repeated.push(RepeatedKey { path, first, last: value });
            }
        }
        Ok(Value::Object(map))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_byte_order_mark_is_skipped() {
        assert_eq!(parse_json(b"\xEF\xBB\xBF{\"a\": 1}"), Ok(json!({"a": 1})));
        assert_eq!(parse_json(b" {\"a\": [1, 2.5, null]}\r\n"), Ok(json!({"a": [1, 2.5, null]})));
    }

    #[test]
    fn other_encodings_are_named() {
        let utf16: Vec<u8> = "{\"a\": 1}".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let marked = [&[0xFF, 0xFE], &utf16[..]].concat();
        for bytes in [&utf16, &marked] {
            assert_eq!(parse_json(bytes), Err("not valid JSON: the text is UTF-16; save the file as UTF-8".to_owned()));
        }
        let big: Vec<u8> = "{}".chars().flat_map(|c| u32::from(c).to_be_bytes()).collect();
        assert!(parse_json(&big).is_err_and(|error| error.contains("UTF-32")));
        let latin = parse_json(b"{\n \"name\": \"caf\xE9\"}");
        assert_eq!(latin, Err("not valid JSON: not UTF-8 at line 2 column 14".to_owned()));
        assert_eq!(parse_json(b"\xEF\xBB\xBF \n"), Err("not valid JSON: the file is empty".to_owned()));
    }

    #[test]
    fn what_is_no_json_has_a_line_and_a_column() {
        let error = parse_json(b"{\n  \"a\": 1,\n}").expect_err("an error");
        assert!(error.starts_with("not valid JSON: ") && error.ends_with("at line 3 column 1"), "{error}");
    }

    #[test]
    fn the_literals_that_python_writes_are_named() {
        for literal in ["NaN", "Infinity", "-Infinity"] {
            for text in
                [format!("{{\"a\": 1,\n \"rope_theta\": {literal}}}"), format!("{{\"b\": 0,\n \"a\": [{literal}]}}")]
            {
                for parsed in
                    [parse_json(text.as_bytes()), parse_json_with_repeats(text.as_bytes()).map(|(value, _)| value)]
                {
                    let error = parsed.expect_err("an error");
                    assert!(error.starts_with(&format!("not valid JSON: {literal} at line 2 ")), "{error}");
                }
            }
        }
        // Inside a string they are text.
        assert_eq!(parse_json(br#"{"a": "NaN"}"#), Ok(json!({"a": "NaN"})));
    }

    #[test]
    fn keys_that_stand_twice_are_reported_where_their_values_differ() {
        let text = br#"{"a": 1, "b": {"c": [{"d": 1, "d": 2}], "e": 3}, "a": 1, "f": true, "f": null}"#;
        let (value, repeated) = parse_json_with_repeats(text).expect("JSON");
        assert_eq!(value, parse_json(text).expect("JSON"));
        assert_eq!(value, json!({"a": 1, "b": {"c": [{"d": 2}], "e": 3}, "f": null}));
        let found: Vec<_> = repeated.iter().map(|key| (key.path.as_str(), &key.first, &key.last)).collect();
        assert_eq!(found, [("b.c.0.d", &json!(1), &json!(2)), ("f", &json!(true), &json!(null))]);
    }

    #[test]
    fn both_parsers_agree_on_every_kind_of_value() {
        let text = br#"{"i": -3, "u": 18446744073709551615, "f": 1e-5, "big": 1e22, "s": "\u00e9\n", "n": null, "b": false, "l": [[], {}]}"#;
        assert_eq!(parse_json_with_repeats(text).expect("JSON").0, parse_json(text).expect("JSON"));
        assert!(parse_json_with_repeats(b"{} x").is_err());
    }
}
