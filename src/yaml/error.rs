//! Why a text is no YAML that labpipe reads, in words for its author.

use super::node::Place;
use granit_parser::{ErrorKind, ScanError};

/// One problem with its place.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct YamlError {
    pub at: Place,
    /// Lowercase.
    pub message: String,
    pub hint: Option<String>,
}

impl YamlError {
    pub(super) fn new(at: Place, message: impl Into<String>, hint: Option<&str>) -> YamlError {
        YamlError { at, message: format!("read as YAML: {}", message.into()), hint: hint.map(str::to_owned) }
    }

    pub(super) fn syntax(error: &ScanError, text: &str) -> YamlError {
        let at = Place { line: error.marker().line(), column: error.marker().col() + 1 };
        if let Some(at) = indenting_tab(text, at.line) {
            return YamlError::new(at, "a tab indents this line", Some("YAML indents with spaces"));
        }
        let (message, hint) = words(error.kind());
        YamlError::new(at, message, hint)
    }
}

/// Returns the place of a tab in the indentation of a line, or of the line above it.
fn indenting_tab(text: &str, line: usize) -> Option<Place> {
    let lines = text.lines().enumerate().skip(line.saturating_sub(2)).take(2);
    lines
        .filter_map(|(idx, line)| {
            let indentation = line.len() - line.trim_start_matches([' ', '\t']).len();
            line[..indentation].find('\t').map(|column| Place { line: idx + 1, column: column + 1 })
        })
        .last()
}

fn words(kind: &ErrorKind) -> (String, Option<&'static str>) {
    const QUOTE: &str =
        "put quotes around a text that holds \": \", \" #\" or begins with one of [ ] { } * & ! % @ ` |";
    let (message, hint) = match kind {
        ErrorKind::MappingValueNotAllowed | ErrorKind::InvalidColonPlacement => {
            ("a colon stands where no key can be", Some(QUOTE))
        }
        ErrorKind::ExpectedBlockMappingKey | ErrorKind::SimpleKeyExpected | ErrorKind::InvalidSimpleKey => (
            "expected \"key: value\"",
            Some("the keys of one mapping begin in the same column; a colon and a space follow each"),
        ),
        ErrorKind::ExpectedBlockSequenceEntry => {
            ("expected \"- item\"", Some("the items of one list begin in the same column"))
        }
        ErrorKind::ExpectedFlowMappingSeparator => ("expected , or } in a mapping that begins with {", Some(QUOTE)),
        ErrorKind::ExpectedFlowSequenceSeparator => ("expected , or ] in a list that begins with [", Some(QUOTE)),
        ErrorKind::UnclosedFlowCollection { .. }
        | ErrorKind::UnexpectedEofFlowSequence
        | ErrorKind::UnexpectedEofFlowMapping
        | ErrorKind::UnexpectedEofImplicitFlowMapping => ("a bracket is not closed", None),
        ErrorKind::MisplacedFlowCollectionEnd | ErrorKind::MismatchedFlowCollectionEnd { .. } => {
            ("a closing bracket has no opening one", None)
        }
        ErrorKind::UnclosedQuotedScalar => ("a quote is not closed", None),
        ErrorKind::InvalidTrailingSingleQuotedScalar | ErrorKind::InvalidTrailingDoubleQuotedScalar => {
            ("text follows a closing quote", Some("quotes go around the whole value"))
        }
        ErrorKind::UnknownQuotedScalarEscape => {
            ("an escape sequence that YAML does not have", Some("single quotes take a backslash as it is"))
        }
        ErrorKind::UnknownAnchor => ("an alias (*name) without an anchor (&name) before it", Some(QUOTE)),
        ErrorKind::UnexpectedCharacter { .. } | ErrorKind::MissingAnchorOrAliasName => {
            ("a value begins with a character that has a meaning in YAML", Some(QUOTE))
        }
        ErrorKind::RecursionLimitExceeded => ("lists and mappings are nested too deeply", None),
        ErrorKind::InvalidIndentation | ErrorKind::InvalidFlowScalarIndent | ErrorKind::InvalidQuotedScalarIndent => {
            ("the indentation fits no level above it", None)
        }
        ErrorKind::UnsupportedYamlMajorVersion => ("another version of YAML than 1", None),
        ErrorKind::ExpectedDocumentStart | ErrorKind::InvalidDocumentEnd => {
            ("text follows the end of the document", None)
        }
        other => return (other.to_string(), None),
    };
    (message.to_owned(), hint)
}
