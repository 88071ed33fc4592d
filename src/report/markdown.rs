//! Markdown's small parts: tables, code, escapes.

/// A table that is built row by row.
#[derive(Debug, Clone, Default)]
pub struct Table {
    header: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// Starts a table with its column names.
    pub fn new<S: Into<String>>(header: impl IntoIterator<Item = S>) -> Table {
        Table { header: header.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    pub fn row<S: Into<String>>(&mut self, cells: impl IntoIterator<Item = S>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// Returns the table, cells escaped, with a line break at its end. Columns whose cells all begin with a digit or a
    /// sign
    /// are aligned right.
    pub fn render(&self) -> String {
        let rule: Vec<&str> =
            (0..self.header.len()).map(|idx| if self.is_numeric(idx) { "---:" } else { "---" }).collect();
        let mut text = line(&self.header);
        text.push_str(&format!("| {} |\n", rule.join(" | ")));
        for row in &self.rows {
            text.push_str(&line(row));
        }
        text
    }

    fn is_numeric(&self, column_idx: usize) -> bool {
        let mut cells =
            self.rows.iter().filter_map(|row| row.get(column_idx)).filter(|cell| !is_filler(cell)).peekable();
        cells.peek().is_some()
            && cells.all(|cell| cell.starts_with(|c: char| c.is_ascii_digit() || matches!(c, '-' | '−' | '+')))
    }
}

fn is_filler(cell: &str) -> bool {
    cell.starts_with("not ") || cell.starts_with("n/a") || cell.starts_with("exact")
}

fn line(cells: &[String]) -> String {
    let cells: Vec<String> = cells.iter().map(|cell| escape(cell)).collect();
    format!("| {} |\n", cells.join(" | "))
}

/// Keeps a text within its table cell: pipes are escaped, line breaks become spaces.
pub fn escape(text: &str) -> String {
    text.replace('|', "\\|").replace(['\n', '\r'], " ")
}

/// Returns text as code.
pub fn code(text: &str) -> String {
    format!("`{}`", text.replace('`', "'").replace(['\n', '\r'], " "))
}

/// Returns text on one line that can't open a link, a tag or emphasis.
pub fn plain(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => escaped.push(' '),
            '*' | '_' | '<' | '>' | '[' | ']' | '`' | '\\' => {
                escaped.push('\\');
                escaped.push(c);
            }
            c => escaped.push(c),
        }
    }
    escaped
}

/// Joins words as a sentence does: `a, b and c`.
pub fn listed(words: &[String]) -> String {
    match words {
        [] => String::new(),
        [one] => one.clone(),
        [head @ .., last] => format!("{} and {last}", head.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pipes_and_line_breaks_stay_within_their_cell() {
        let mut table = Table::new(["a", "b"]);
        table.row(["x|y\nz", "1.5 ms"]);
        assert_eq!(table.render(), "| a | b |\n| --- | ---: |\n| x\\|y z | 1.5 ms |\n");
    }

    #[test]
    fn titles_open_nothing() {
        assert_eq!(plain("a <b>_c_\n[d](e)"), "a \\<b\\>\\_c\\_ \\[d\\](e)");
        assert_eq!(code("a`b"), "`a'b`");
        assert_eq!(listed(&["a".into(), "b".into(), "c".into()]), "a, b and c");
    }
}
