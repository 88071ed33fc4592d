//! Plain scalars by the core schema of YAML 1.2 (section 10.3.2).

use super::node::NodeValue;

/// Returns what a plain scalar stands for: null, a boolean, a number, else its text. A whole number beyond 64 bits becomes a float.
pub fn resolve_plain(text: &str) -> NodeValue {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => NodeValue::Null,
        "true" | "True" | "TRUE" => NodeValue::Bool(true),
        "false" | "False" | "FALSE" => NodeValue::Bool(false),
        ".nan" | ".NaN" | ".NAN" => NodeValue::Float(f64::NAN),
        _ => number(text).unwrap_or_else(|| NodeValue::Text(text.to_owned())),
    }
}

/// Returns true for the words that YAML 1.1 reads as booleans and YAML 1.2 as texts.
pub fn is_yaml_1_1_bool(text: &str) -> bool {
    ["yes", "no", "on", "off", "y", "n"].contains(&text.to_ascii_lowercase().as_str())
}

fn number(text: &str) -> Option<NodeValue> {
    let radix = |digits: &str, radix: u32| {
        let is_number = !digits.is_empty() && digits.chars().all(|c| c.is_digit(radix));
        let value = is_number.then(|| u128::from_str_radix(digits, radix)).and_then(Result::ok)?;
        Some(i64::try_from(value).map_or(NodeValue::Float(value as f64), NodeValue::Int))
    };
    if let Some(digits) = text.strip_prefix("0o") {
        return radix(digits, 8);
    }
    if let Some(digits) = text.strip_prefix("0x") {
        return radix(digits, 16);
    }
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if [".inf", ".Inf", ".INF"].contains(&unsigned) {
        let sign = if text.starts_with('-') { -1.0 } else { 1.0 };
        return Some(NodeValue::Float(sign * f64::INFINITY));
    }
    if !unsigned.is_empty() && unsigned.bytes().all(|byte| byte.is_ascii_digit()) {
        let whole = text.parse().map(NodeValue::Int);
        return whole.or_else(|_| text.parse().map(NodeValue::Float)).ok();
    }
    is_float(unsigned).then(|| text.parse().ok().map(NodeValue::Float)).flatten()
}

/// `( \. [0-9]+ | [0-9]+ ( \. [0-9]* )? ) ( [eE] [-+]? [0-9]+ )?`
fn is_float(text: &str) -> bool {
    let (mantissa, exponent) = match text.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent.strip_prefix(['-', '+']).unwrap_or(exponent))),
        None => (text, None),
    };
    let are_digits = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let has_digits = !(whole.is_empty() && fraction.is_empty());
    has_digits && are_digits(whole) && are_digits(fraction) && exponent.is_none_or(|e| !e.is_empty() && are_digits(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plain_scalars_follow_the_core_schema() {
        // The examples of YAML 1.2.2, section 10.3.2, and the spellings of YAML 1.1 that 1.2 reads otherwise.
        for (text, value) in [
            ("0", 0),
            ("-0", 0),
            ("0400", 400),
            ("+12", 12),
            ("-19", -19),
            ("0o7", 7),
            ("0o400", 256),
            ("0x3A", 58),
            ("0x100", 256),
            ("9223372036854775807", i64::MAX),
        ] {
            assert_eq!(resolve_plain(text), NodeValue::Int(value), "{text}");
        }
        for (text, value) in [
            ("0.", 0.0),
            ("-0.0", -0.0),
            (".5", 0.5),
            ("+12e03", 12e3),
            ("-2E+05", -2e5),
            ("1e-5", 1e-5),
            ("3.10", 3.1),
            ("99999999999999999999", 1e20),
            (".inf", f64::INFINITY),
            ("-.Inf", f64::NEG_INFINITY),
        ] {
            assert_eq!(resolve_plain(text), NodeValue::Float(value), "{text}");
        }
        for text in [
            "2_56",
            "0b1",
            "12:30:45",
            "2026-11-28",
            "yes",
            "on",
            "1e",
            "e5",
            ".",
            "-",
            "+.",
            "0x",
            "0o8",
            "nan",
            "inf",
            "--1",
        ] {
            assert_eq!(resolve_plain(text), NodeValue::Text(text.to_owned()), "{text}");
        }
        assert!(matches!(resolve_plain(".NaN"), NodeValue::Float(value) if value.is_nan()));
        assert_eq!((resolve_plain("~"), resolve_plain("True")), (NodeValue::Null, NodeValue::Bool(true)));
    }
}
