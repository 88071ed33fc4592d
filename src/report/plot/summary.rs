//! A diff at a glance: negative MSE and cosine similarity of every module, in execution order.

use super::axis::Axis;
use super::canvas::{Align, text_width};
use super::{Canvas, Color};
use crate::artifact::ModuleDiff;
use crate::report::numbers::thousands;

const LEFT: f64 = 92.0;
const RIGHT: f64 = 84.0;
const TOP: f64 = 104.0;
const PLOT_HEIGHT: f64 = 400.0;
/// Decades of MSE shown at most; smaller values share the place next to 0.
const N_DECADES: i32 = 10;
/// Most modules whose names are all written under the axis.
const N_NAMED: usize = 64;

/// Where things are on the canvas.
struct Layout {
    plot_width: f64,
    n_modules: usize,
    mse: Axis,
    cosine: Axis,
}

impl Layout {
    fn x(&self, module_idx: usize) -> f64 {
        LEFT + (module_idx as f64 + 0.5) / self.n_modules as f64 * self.plot_width
    }

    /// Left edge of a module's column.
    fn edge(&self, module_idx: usize) -> f64 {
        LEFT + module_idx as f64 / self.n_modules as f64 * self.plot_width
    }

    fn y(&self, axis: &Axis, value: f64) -> f64 {
        TOP + (1.0 - axis.position(value)) * PLOT_HEIGHT
    }
}

/// Draws −MSE (left axis, a decade a step) and cosine (right axis) over the modules. `subtitle` says what was compared.
pub fn summary(rows: &[ModuleDiff], subtitle: &str) -> Canvas {
    let n_modules = rows.len().max(1);
    let column = if n_modules <= N_NAMED { 24.0 } else { 9.0 };
    let plot_width = (n_modules as f64 * column).clamp(860.0, 2400.0);
    let layout = Layout {
        plot_width,
        n_modules,
        mse: Axis::negative_symlog(rows.iter().map(|row| -row.mse), N_DECADES),
        cosine: Axis::linear(rows.iter().map(|row| row.cosine).chain([1.0]), 6),
    };
    let names = tick_names(rows, plot_width);
    let names_height = names.iter().map(|(_, name)| text_width(name, 11.0)).fold(0.0, f64::max);
    let height = TOP + PLOT_HEIGHT + names_height + 58.0;
    let mut canvas = Canvas::new((LEFT + plot_width + RIGHT) as u32, height.ceil() as u32);
    let center = LEFT + plot_width / 2.0;
    canvas.text((center, 26.0), "How far each module's output is from the reference", 17.0, Align::Middle, Color::INK);
    canvas.text((center, 50.0), subtitle, 12.0, Align::Middle, Color::GREY);

    layers(&mut canvas, &layout, rows);
    axes(&mut canvas, &layout);
    series(&mut canvas, &layout, rows);
    for (module_idx, name) in names {
        let x = layout.x(module_idx);
        canvas.line(vec![(x, TOP + PLOT_HEIGHT), (x, TOP + PLOT_HEIGHT + 4.0)], 1.0, Color::GREY);
        canvas.text_upward((x, TOP + PLOT_HEIGHT + 9.0), name, 11.0, Align::End, Color::INK);
    }
    let counted = format!("modules in execution order (n = {})", thousands(rows.len()));
    canvas.text((center, height - 18.0), counted, 13.0, Align::Middle, Color::INK);
    legend(&mut canvas, center);
    canvas
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
    if last.is_empty() || last.chars().all(|c| c.is_ascii_digit()) { row.op.clone() } else { last.to_owned() }
}

/// Shades every other layer and writes its number above.
fn layers(canvas: &mut Canvas, layout: &Layout, rows: &[ModuleDiff]) {
    let mut start_idx = 0;
    let mut labelled_until = f64::NEG_INFINITY;
    for group in rows.chunk_by(|a, b| a.layer_idx == b.layer_idx) {
        let (from, to) = (layout.edge(start_idx), layout.edge(start_idx + group.len()));
        start_idx += group.len();
        let Some(layer_idx) = group[0].layer_idx else {
            continue;
        };
        if layer_idx.is_multiple_of(2) {
            canvas.rect((from, TOP), (to - from, PLOT_HEIGHT), Color::BAND);
        }
        let long = format!("layer {layer_idx}");
        let label = if text_width(&long, 11.0) + 6.0 <= to - from { long } else { layer_idx.to_string() };
        let (middle, half) = ((from + to) / 2.0, text_width(&label, 11.0) / 2.0 + 3.0);
        if middle - half >= labelled_until {
            canvas.text((middle, TOP - 10.0), label, 11.0, Align::Middle, Color::GREY);
            labelled_until = middle + half;
        }
    }
}

fn axes(canvas: &mut Canvas, layout: &Layout) {
    let right = LEFT + layout.plot_width;
    let bottom = TOP + PLOT_HEIGHT;
    for tick in layout.mse.ticks() {
        let y = TOP + (1.0 - tick.position) * PLOT_HEIGHT;
        canvas.line(vec![(LEFT, y), (right, y)], 1.0, Color::GRID);
        canvas.text((LEFT - 8.0, y), tick.label, 12.0, Align::End, Color::BLUE);
    }
    for tick in layout.cosine.ticks() {
        let y = TOP + (1.0 - tick.position) * PLOT_HEIGHT;
        canvas.line(vec![(right, y), (right + 5.0, y)], 1.0, Color::VERMILLION);
        canvas.text((right + 9.0, y), tick.label, 12.0, Align::Start, Color::VERMILLION);
    }
    canvas.line(vec![(LEFT, TOP), (LEFT, bottom)], 1.2, Color::BLUE);
    canvas.line(vec![(right, TOP), (right, bottom)], 1.2, Color::VERMILLION);
    canvas.line(vec![(LEFT, bottom), (right, bottom)], 1.0, Color::INK);
    let middle = TOP + PLOT_HEIGHT / 2.0;
    canvas.text_upward((20.0, middle), "\u{2212}MSE (activation units², log steps)", 13.0, Align::Middle, Color::BLUE);
    canvas.text_upward(
        (right + RIGHT - 18.0, middle),
        "cosine similarity (1 = same direction)",
        13.0,
        Align::Middle,
        Color::VERMILLION,
    );
}

fn series(canvas: &mut Canvas, layout: &Layout, rows: &[ModuleDiff]) {
    let points = |axis: &Axis, value: fn(&ModuleDiff) -> f64| -> Vec<(f64, f64)> {
        rows.iter().enumerate().map(|(idx, row)| (layout.x(idx), layout.y(axis, value(row)))).collect()
    };
    let mse = points(&layout.mse, |row| -row.mse);
    let cosine = points(&layout.cosine, |row| row.cosine);
    let radius = if rows.len() <= N_NAMED { 4.0 } else { 2.8 };
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
    let entries = [("\u{2212}MSE, left axis", Color::BLUE), ("cosine, right axis", Color::VERMILLION)];
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
