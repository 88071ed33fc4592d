//! Tables as the terminal shows them.

use comfy_table::{ContentArrangement, Table, presets::UTF8_FULL_CONDENSED};

/// Width where stdout is no terminal, in columns.
const PIPED_WIDTH: u16 = 160;

/// Returns an empty table that keeps to the terminal's width.
pub fn table<'a>(header: impl IntoIterator<Item = &'a str>) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    if !table.is_tty() {
        table.set_width(PIPED_WIDTH);
    }
    table.set_header(header.into_iter().collect::<Vec<_>>());
    table
}
