//! A diff at a glance: negative MSE and cosine similarity of every module, in execution order.

use super::axis::Axis;
use super::canvas::{Align, text_width};
use super::{Canvas, Color};
use crate::artifact::ModuleDiff;
use crate::report::numbers::thousands;

const LEFT: f64 = 92.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 104.0;
const PLOT_HEIGHT: f64 = 380.0;
/// Between the names under one panel and the next panel.
const PANEL_GAP: f64 = 40.0;
/// Decades of MSE shown at most; smaller values share the place next to 0.
const N_DECADES: i32 = 10;
/// Most modules side by side; where there are more, panels stand one above the other.
const N_PER_PANEL: usize = 130;
/// From this many modules in a panel on, markers are small.
const N_LARGE_MARKERS: usize = 64;

/// A part of the modules, drawn side by side. All panels share their axes.
struct Panel<'a> {
    rows: &'a [ModuleDiff],
    top: f64,
    plot_width: f64,
    mse: &'a Axis,
    cosine: &'a Axis,
}

impl Panel<'_> {
    fn x(&self, module_idx: usize) -> f64 {
        self.edge(module_idx) + 0.5 / self.rows.len() as f64 * self.plot_width
    }

    /// Left edge of a module's column.
    fn edge(&self, module_idx: usize) -> f64 {
        LEFT + module_idx as f64 / self.rows.len() as f64 * self.plot_width
    }

    fn y(&self, axis: &Axis, value: f64) -> f64 {
        self.top + (1.0 - axis.position(value)) * PLOT_HEIGHT
    }
}

/// Draws −MSE (left axis, a decade a step) and cosine (right axis) over the modules. `subtitle` says what was compared.
pub fn summary(rows: &[ModuleDiff], subtitle: &str) -> Canvas {
    let parts = split(rows);
    let n_columns = parts.iter().map(|part| part.len()).max().unwrap_or(0);
    let plot_width = (n_columns as f64 * 24.0).clamp(860.0, 1320.0);
    let mse = Axis::negative_symlog(rows.iter().map(|row| -row.mse), N_DECADES);
    // Never narrower than a thousandth, and never past 1, also where all are equal.
    let cosine = Axis::linear(rows.iter().map(|row| row.cosine).chain([0.999, 1.0]), 6);
    let names: Vec<Vec<(usize, String)>> = parts.iter().map(|part| tick_names(part, plot_width)).collect();
    let names_height = names.iter().flatten().map(|(_, name)| text_width(name, 11.0)).fold(0.0, f64::max);
    let panel_height = PLOT_HEIGHT + names_height + PANEL_GAP;
    let height = TOP + panel_height * parts.len() as f64 + 14.0;

    let mut canvas = Canvas::new((LEFT + plot_width + RIGHT) as u32, height.ceil() as u32);
    let center = LEFT + plot_width / 2.0;
    canvas.text((center, 26.0), "How far each module's output is from the reference", 17.0, Align::Middle, Color::INK);
    canvas.text((center, 50.0), subtitle, 12.0, Align::Middle, Color::GREY);
    legend(&mut canvas, center);
    for (panel_idx, (part, names)) in parts.iter().zip(names).enumerate() {
        let top = TOP + panel_height * panel_idx as f64;
        let panel = Panel { rows: part, top, plot_width, mse: &mse, cosine: &cosine };
        layers(&mut canvas, &panel);
        axes(&mut canvas, &panel);
        series(&mut canvas, &panel);
        for (module_idx, name) in names {
            let (x, bottom) = (panel.x(module_idx), top + PLOT_HEIGHT);
            canvas.line(vec![(x, bottom), (x, bottom + 4.0)], 1.0, Color::GREY);
            canvas.text_upward((x, bottom + 9.0), name, 11.0, Align::End, Color::INK);
        }
    }
    let rows_note = if parts.len() > 1 { format!(", in {} rows", parts.len()) } else { String::new() };
    let n_left_out = rows.iter().filter(|row| !row.mse.is_finite() || !row.cosine.is_finite()).count();
    let left_out = match n_left_out {
        0 => String::new(),
        n => format!("; {} with numbers that are not finite, left out", thousands(n)),
    };
    let counted = format!("modules in execution order (n = {}{rows_note}{left_out})", thousands(rows.len()));
    canvas.text((center, height - 18.0), counted, 13.0, Align::Middle, Color::INK);
    canvas
}

/// Splits modules into panels of about equal length, where a layer begins if one does nearby.
fn split(rows: &[ModuleDiff]) -> Vec<&[ModuleDiff]> {
    let n_panels = rows.len().div_ceil(N_PER_PANEL).max(1);
    let starts: Vec<usize> = (1..rows.len()).filter(|&idx| rows[idx].layer_idx != rows[idx - 1].layer_idx).collect();
    let mut parts = Vec::with_capacity(n_panels);
    let mut from = 0;
    for panel_idx in 1..n_panels {
        let even = rows.len() * panel_idx / n_panels;
        let nearest = starts.iter().copied().min_by_key(|start| start.abs_diff(even));
        let to = nearest.filter(|start| start.abs_diff(even) <= N_PER_PANEL / 4).unwrap_or(even);
        parts.push(&rows[from..to]);
        from = to;
    }
    parts.push(&rows[from..]);
    parts
}

/// Returns which modules are named under the axis: all, or so many that names do not touch.
fn tick_names(rows: &[ModuleDiff], plot_width: f64) -> Vec<(usize, String)> {
    let column = plot_width / rows.len().max(1) as f64;
    let every = (14.0 / column).ceil().max(1.0) as usize;
    rows.iter().enumerate().step_by(every).map(|(idx, row)| (idx, short_name(row))).collect()
}

/// Returns a module's name without what its layer's band says already.
fn short_name(row: &ModuleDiff) -> String {
    let last = row.module.rsplit('.').next().unwrap_or(&row.module);
    if last.is_empty() || last.chars().all(|c| c.is_ascii_digit()) {
        row.op.clone()
    } else {
        last.replace("layernorm", "norm")
    }
}

/// Shades every other layer and writes its number above.
fn layers(canvas: &mut Canvas, panel: &Panel<'_>) {
    let mut start_idx = 0;
    let mut labelled_until = f64::NEG_INFINITY;
    for group in panel.rows.chunk_by(|a, b| a.layer_idx == b.layer_idx) {
        let (from, to) = (panel.edge(start_idx), panel.edge(start_idx + group.len()));
        start_idx += group.len();
        let Some(layer_idx) = group[0].layer_idx else {
            continue;
        };
        if layer_idx.is_multiple_of(2) {
            canvas.rect((from, panel.top), (to - from, PLOT_HEIGHT), Color::BAND);
        }
        let long = format!("layer {layer_idx}");
        let label = if text_width(&long, 11.0) + 6.0 <= to - from { long } else { layer_idx.to_string() };
        let (middle, half) = ((from + to) / 2.0, text_width(&label, 11.0) / 2.0 + 3.0);
        if middle - half >= labelled_until {
            canvas.text((middle, panel.top - 10.0), label, 11.0, Align::Middle, Color::GREY);
            labelled_until = middle + half;
        }
    }
}

fn axes(canvas: &mut Canvas, panel: &Panel<'_>) {
    let (top, right, bottom) = (panel.top, LEFT + panel.plot_width, panel.top + PLOT_HEIGHT);
    for tick in panel.mse.ticks() {
        let y = top + (1.0 - tick.position) * PLOT_HEIGHT;
        canvas.line(vec![(LEFT, y), (right, y)], 1.0, Color::GRID);
        canvas.text((LEFT - 8.0, y), tick.label, 12.0, Align::End, Color::BLUE);
    }
    for tick in panel.cosine.ticks() {
        let y = top + (1.0 - tick.position) * PLOT_HEIGHT;
        canvas.line(vec![(right, y), (right + 5.0, y)], 1.0, Color::VERMILLION);
        canvas.text((right + 9.0, y), tick.label, 12.0, Align::Start, Color::VERMILLION);
    }
    canvas.line(vec![(LEFT, top), (LEFT, bottom)], 1.2, Color::BLUE);
    canvas.line(vec![(right, top), (right, bottom)], 1.2, Color::VERMILLION);
    canvas.line(vec![(LEFT, bottom), (right, bottom)], 1.0, Color::INK);
    let middle = top + PLOT_HEIGHT / 2.0;
    canvas.text_upward((20.0, middle), "−MSE (activation units², log steps)", 13.0, Align::Middle, Color::BLUE);
    canvas.text_upward(
        (right + RIGHT - 18.0, middle),
        "cosine similarity (1 = same direction)",
        13.0,
        Align::Middle,
        Color::VERMILLION,
    );
}

fn series(canvas: &mut Canvas, panel: &Panel<'_>) {
    let points = |axis: &Axis, value: fn(&ModuleDiff) -> f64| -> Vec<(f64, f64)> {
        let finite = panel.rows.iter().enumerate().filter(|(_, row)| value(row).is_finite());
        finite.map(|(idx, row)| (panel.x(idx), panel.y(axis, value(row)))).collect()
    };
    let mse = points(panel.mse, |row| -row.mse);
    let cosine = points(panel.cosine, |row| row.cosine);
    let radius = if panel.rows.len() <= N_LARGE_MARKERS { 4.0 } else { 2.8 };
    canvas.line(mse.clone(), 1.2, Color::BLUE.opacity(0.45));
    canvas.line(cosine.clone(), 1.2, Color::VERMILLION.opacity(0.45));
    for at in mse {
        canvas.circle(at, radius, Color::BLUE);
    }
    for at in cosine {
        canvas.diamond(at, radius * 1.2, Color::VERMILLION);
    }
}

fn legend(canvas: &mut Canvas, center: f64) {
    let entries = [("−MSE, left axis", Color::BLUE), ("cosine, right axis", Color::VERMILLION)];
    let widths = entries.map(|(text, _)| text_width(text, 12.0) + 46.0);
    let mut x = center - widths.iter().sum::<f64>() / 2.0;
    for ((text, color), width) in entries.into_iter().zip(widths) {
        canvas.line(vec![(x, 74.0), (x + 24.0, 74.0)], 1.2, color.opacity(0.45));
        if color == Color::BLUE {
            canvas.circle((x + 12.0, 74.0), 4.0, color);
        } else {
            canvas.diamond((x + 12.0, 74.0), 4.8, color);
        }
        canvas.text((x + 31.0, 74.0), text, 12.0, Align::Start, Color::INK);
        x += width;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::plot::canvas::Shape;
    use crate::report::testing::module_diffs;

    #[test]
    fn many_modules_are_split_where_a_layer_begins() {
        let rows = module_diffs(21);
        let parts = split(&rows);
        assert_eq!(parts.iter().map(|part| part.len()).sum::<usize>(), 255);
        assert_eq!(parts.len(), 2);
        assert!(parts.iter().all(|part| part.len() <= N_PER_PANEL + N_PER_PANEL / 4));
        assert_ne!(parts[0].last().unwrap().layer_idx, parts[1][0].layer_idx);
        assert_eq!(split(&module_diffs(3)).len(), 1);
        assert_eq!(split(&[]).len(), 1);
    }

    #[test]
    fn every_module_has_two_markers_and_names_do_not_touch() {
        for n_layers in [1, 3, 21] {
            let rows = module_diffs(n_layers);
            let canvas = summary(&rows, "nf4 against fp16");
            let n_circles = canvas.shapes.iter().filter(|shape| matches!(shape, Shape::Circle { .. })).count();
            assert_eq!(n_circles, rows.len() + 1, "one a module and one in the legend");
            let mut names: Vec<(i64, f64)> = Vec::new();
            for shape in &canvas.shapes {
                if let Shape::Text { x, y, size: 11.0, upward: true, .. } = shape {
                    names.push((*y as i64, *x));
                }
            }
            assert!(names.len() > rows.len() / 3);
            let apart = |pair: &[(i64, f64)]| pair[0].0 != pair[1].0 || pair[1].1 - pair[0].1 >= 12.0;
            assert!(names.windows(2).all(apart));
        }
    }

    #[test]
    fn modules_without_numbers_are_left_out_and_counted() {
        let mut rows = module_diffs(1);
        (rows[2].mse, rows[3].cosine) = (f64::INFINITY, f64::NAN);
        let canvas = summary(&rows, "nf4 against fp16");
        let n_circles = canvas.shapes.iter().filter(|shape| matches!(shape, Shape::Circle { .. })).count();
        assert_eq!(n_circles, rows.len(), "one for each finite MSE and one in the legend");
        let says = |part: &str| {
            canvas.shapes.iter().any(|shape| matches!(shape, Shape::Text { text, .. } if text.contains(part)))
        };
        assert!(says("; 2 with numbers that are not finite, left out"));
    }

    #[test]
    fn equal_models_have_a_cosine_axis_that_ends_at_1() {
        let mut rows = module_diffs(1);
        for row in &mut rows {
            (row.mse, row.cosine, row.sqnr_db) = (0.0, 1.0, None);
        }
        let canvas = summary(&rows, "fp16 against fp16");
        let has =
            |label: &str| canvas.shapes.iter().any(|shape| matches!(shape, Shape::Text { text, .. } if text == label));
        assert!(has("1.0000") && !has("1.0002"), "{:?}", canvas.shapes);
    }

    #[test]
    fn nothing_lies_outside_of_the_canvas() {
        let canvas = summary(&module_diffs(21), "nf4 against fp16");
        let (width, height) = (f64::from(canvas.width), f64::from(canvas.height));
        for shape in &canvas.shapes {
            let inside = match shape {
                Shape::Circle { x, y, radius, .. } => {
                    x - radius >= 0.0 && x + radius <= width && y - radius >= 0.0 && y + radius <= height
                }
                Shape::Text { x, y, text, size, align: Align::End, upward: true, .. } => {
                    *x <= width && y + text_width(text, *size) <= height
                }
                Shape::Text { x, y, .. } => *x >= 0.0 && *x <= width && *y >= 0.0 && *y <= height,
                _ => true,
            };
            assert!(inside, "{shape:?}");
        }
    }
}
