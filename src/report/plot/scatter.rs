//! One module's outputs: the reference's values against the candidate's.

use super::axis::Axis;
use super::canvas::{Align, text_width};
use super::{Canvas, Color};
use crate::artifact::ModuleDiff;
use crate::report::numbers::{significant, thousands};

const WIDTH: u32 = 560;
const HEIGHT: u32 = 600;
const LEFT: f64 = 78.0;
const TOP: f64 = 82.0;
/// Side of the plotting square.
const SIDE: f64 = 452.0;

/// Draws `(reference, candidate)` pairs with the y = x line, both axes alike. `names` are what the two models are
/// called.
pub fn scatter(row: &ModuleDiff, points: &[(f32, f32)], names: (&str, &str)) -> Canvas {
    let mut canvas = Canvas::new(WIDTH, HEIGHT);
    // There may be hundreds of these.
    canvas.png_scale = 1.5;
    let center = f64::from(WIDTH) / 2.0;
    canvas.text((center, 24.0), fit(&row.module, 15.0, 540.0), 15.0, Align::Middle, Color::INK);
    let sqnr = row.sqnr_db.map_or_else(|| "n/a".to_owned(), |db| format!("{db:.1} dB"));
    let numbers = format!("MSE {} · cosine {:.5} · SQNR {sqnr}", significant(row.mse), row.cosine);
    canvas.text((center, 45.0), numbers, 12.0, Align::Middle, Color::GREY);
    let counts = format!("{} values shown, of {} tokens", thousands(points.len()), thousands(row.n_tokens));
    canvas.text((center, 63.0), counts, 12.0, Align::Middle, Color::GREY);

    let finite = points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
    let axis = Axis::linear(finite.clone().flat_map(|&(x, y)| [f64::from(x), f64::from(y)]), 6);
    frame(&mut canvas, &axis);
    let (radius, opacity) = match points.len() {
        0..=500 => (2.5, 0.55),
        501..=2000 => (2.0, 0.4),
        _ => (1.5, 0.3),
    };
    for &(x, y) in finite {
        let at = (LEFT + axis.position(f64::from(x)) * SIDE, TOP + (1.0 - axis.position(f64::from(y))) * SIDE);
        canvas.circle(at, radius, Color::BLUE.opacity(opacity));
    }
    canvas.dashed((LEFT, TOP + SIDE), (LEFT + SIDE, TOP), 1.4, Color::VERMILLION);
    legend(&mut canvas);
    let under = (LEFT + SIDE / 2.0, TOP + SIDE + 44.0);
    canvas.text(under, fit(&format!("reference: {}", names.0), 13.0, SIDE), 13.0, Align::Middle, Color::INK);
    let beside = (18.0, TOP + SIDE / 2.0);
    canvas.text_upward(beside, fit(&format!("candidate: {}", names.1), 13.0, SIDE), 13.0, Align::Middle, Color::INK);
    canvas
}

fn frame(canvas: &mut Canvas, axis: &Axis) {
    for tick in axis.ticks() {
        let (x, y) = (LEFT + tick.position * SIDE, TOP + (1.0 - tick.position) * SIDE);
        canvas.line(vec![(x, TOP), (x, TOP + SIDE)], 0.8, Color::GRID);
        canvas.line(vec![(LEFT, y), (LEFT + SIDE, y)], 0.8, Color::GRID);
        canvas.text((x, TOP + SIDE + 16.0), tick.label.clone(), 11.0, Align::Middle, Color::GREY);
        canvas.text((LEFT - 8.0, y), tick.label, 11.0, Align::End, Color::GREY);
    }
    canvas.line(vec![(LEFT, TOP), (LEFT, TOP + SIDE), (LEFT + SIDE, TOP + SIDE)], 1.0, Color::INK);
}

fn legend(canvas: &mut Canvas) {
    let (x, y) = (LEFT + 12.0, TOP + 12.0);
    canvas.rect((x, y), (96.0, 44.0), Color::WHITE.opacity(0.85));
    canvas.circle((x + 17.0, y + 13.0), 3.0, Color::BLUE);
    canvas.text((x + 36.0, y + 13.0), "values", 11.0, Align::Start, Color::INK);
    canvas.dashed((x + 6.0, y + 31.0), (x + 28.0, y + 31.0), 1.4, Color::VERMILLION);
    canvas.text((x + 36.0, y + 31.0), "y = x", 11.0, Align::Start, Color::INK);
}

/// Shortens a text in its middle until it fits into `width` pixels.
fn fit(text: &str, size: f64, width: f64) -> String {
    let chars: Vec<char> = text.chars().collect();
    let mut n_kept = chars.len();
    let mut fitted = text.to_owned();
    while text_width(&fitted, size) > width && n_kept > 4 {
        n_kept -= 1;
        let head: String = chars[..n_kept / 2].iter().collect();
        let tail: String = chars[chars.len() - (n_kept - n_kept / 2)..].iter().collect();
        fitted = format!("{head}…{tail}");
    }
    fitted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::plot::canvas::Shape;
    use crate::report::testing::module_diffs;

    fn circles(canvas: &Canvas) -> Vec<(f64, f64)> {
        let center = |shape: &Shape| match shape {
            Shape::Circle { x, y, .. } => Some((*x, *y)),
            _ => None,
        };
        canvas.shapes.iter().filter_map(center).collect()
    }

    #[test]
    fn equal_values_lie_on_the_diagonal_of_equal_axes() {
        let row = &module_diffs(1)[1];
        let canvas = scatter(row, &[(-3.0, -3.0), (0.5, 0.5), (7.0, 7.0)], ("fp16", "nf4"));
        for (x, y) in &circles(&canvas)[..3] {
            assert!(((x - LEFT) - (TOP + SIDE - y)).abs() < 1e-9);
        }
    }

    #[test]
    fn a_single_point_and_values_that_are_not_finite_do_no_harm() {
        let row = &module_diffs(1)[1];
        let canvas = scatter(row, &[(2.0, 2.0), (f32::NAN, 1.0), (1.0, f32::INFINITY)], ("fp16", "nf4"));
        assert_eq!(circles(&canvas).len(), 2, "the point and the legend's");
        assert!(circles(&scatter(row, &[], ("fp16", "nf4"))).len() == 1);
    }

    #[test]
    fn long_names_are_shortened_in_the_middle() {
        let fitted = fit(&"model.layers.".repeat(20), 15.0, 300.0);
        assert!(text_width(&fitted, 15.0) <= 300.0 && fitted.contains('…'), "{fitted}");
        assert_eq!(fit("lm_head", 15.0, 300.0), "lm_head");
    }
}
