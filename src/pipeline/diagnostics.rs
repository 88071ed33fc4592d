//! Collects problems and shows them with file, line, column, snippet and hint.

use super::types::{Diagnostic, PipelineError};
use crate::yaml::{Place, YamlError};
use std::collections::HashSet;
use std::fmt::Write;

/// Longest part of a line that a snippet shows, in characters.
const SNIPPET_WIDTH: usize = 120;
/// Most problems that are shown one by one.
const N_SHOWN: usize = 100;

/// Problems found so far.
#[derive(Debug, Default)]
pub struct Problems {
    found: Vec<Diagnostic>,
    seen: HashSet<Diagnostic>,
}

impl Problems {
    /// Notes a problem at a place; the same one twice (from two cells of a matrix) stands once.
    pub fn add(&mut self, at: Place, message: impl Into<String>, hint: Option<String>) {
        let place = (at.line > 0).then_some(at);
        self.push(Diagnostic {
            line: place.map(|place| place.line),
            column: place.map(|place| place.column),
            message: message.into(),
            hint,
        });
    }

    pub fn push(&mut self, diagnostic: Diagnostic) {
        if self.seen.insert(diagnostic.clone()) {
            self.found.push(diagnostic);
        }
    }

    /// Notes why the text is no YAML.
    pub fn add_yaml(&mut self, error: YamlError) {
        self.add(error.at, error.message, error.hint);
    }

    pub fn is_empty(&self) -> bool {
        self.found.is_empty()
    }

    /// Returns the error that holds them all, in the order of their places.
    pub fn into_error(mut self, origin: &str, text: &str) -> PipelineError {
        self.found.sort_by_key(|diagnostic| (diagnostic.line.unwrap_or(0), diagnostic.column.unwrap_or(0)));
        PipelineError { origin: origin.to_owned(), text: text.to_owned(), diagnostics: self.found }
    }
}

impl PipelineError {
    /// Returns the diagnostics as a person reads them.
    pub fn render(&self) -> String {
        let mut out = String::new();
        let lines: Vec<&str> = self.text.lines().collect();
        for diagnostic in self.diagnostics.iter().take(N_SHOWN) {
            // Writing to a String can't fail.
            let _ = self.render_one(&mut out, diagnostic, &lines);
            out.push('\n');
        }
        let n = self.diagnostics.len();
        if n > N_SHOWN {
            let _ = writeln!(out, "... and {} more\n", n - N_SHOWN);
        }
        let _ = write!(out, "{n} error{} in {}", if n == 1 { "" } else { "s" }, self.origin);
        out
    }

    fn render_one(&self, out: &mut String, diagnostic: &Diagnostic, lines: &[&str]) -> std::fmt::Result {
        writeln!(out, "error: {}", diagnostic.message)?;
        let snippet = diagnostic.line.and_then(|line| lines.get(line - 1).map(|text| (line, *text)));
        match snippet {
            None => writeln!(out, "  --> {}", self.origin)?,
            Some((line, text)) => {
                let column = diagnostic.column.unwrap_or(1);
                writeln!(out, "  --> {}:{line}:{column}", self.origin)?;
                let (shown, caret) = snippet_line(text, column);
                let gutter = " ".repeat(line.to_string().len());
                writeln!(out, "{gutter} |\n{line} | {shown}\n{gutter} | {}^", " ".repeat(caret))?;
            }
        }
        if let Some(hint) = &diagnostic.hint {
            writeln!(out, "  = hint: {hint}")?;
        }
        Ok(())
    }
}

/// Cuts a long line around its column; returns it with the caret's offset.
fn snippet_line(text: &str, column: usize) -> (String, usize) {
    let chars: Vec<char> = text.chars().map(|c| if c == '\t' { ' ' } else { c }).collect();
    let at = (column - 1).min(chars.len());
    let first = if at > SNIPPET_WIDTH * 3 / 4 { at - SNIPPET_WIDTH / 2 } else { 0 };
    let shown: String = chars[first..].iter().take(SNIPPET_WIDTH).collect();
    (shown, at - first)
}
