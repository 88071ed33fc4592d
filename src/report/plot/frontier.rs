//! What a byte buys: perplexity against the bytes of the weights, a point for each model.

use super::axis::Axis;
use super::canvas::{Align, text_width};
use super::{Canvas, Color};

const WIDTH: f64 = 960.0;
const HEIGHT: f64 = 600.0;
const LEFT: f64 = 92.0;
const TOP: f64 = 84.0;
const PLOT_WIDTH: f64 = 828.0;
const PLOT_HEIGHT: f64 = 436.0;
/// From this ratio of largest to smallest perplexity on, the axis is logarithmic.
const LOG_FROM_RATIO: f64 = 20.0;

/// One model.
#[derive(Debug, Clone, PartialEq)]
pub struct FrontierPoint {
    pub label: String,
    pub weights_mib: f64,
    pub perplexity: f64,
    /// Ends of its 95 % interval.
    pub ends: Option<(f64, f64)>,
    /// Not quantized: drawn as what the others are held against.
    pub is_baseline: bool,
}

/// Draws the models; `subtitle` says how perplexity was measured.
pub fn frontier(points: &[FrontierPoint], subtitle: &str) -> Canvas {
    let mut canvas = Canvas::new(WIDTH as u32, HEIGHT as u32);
    let center = LEFT + PLOT_WIDTH / 2.0;
    canvas.text((center, 26.0), "Perplexity against weight memory", 17.0, Align::Middle, Color::INK);
    canvas.text((center, 50.0), subtitle, 12.0, Align::Middle, Color::GREY);
    let x_axis = Axis::linear(points.iter().map(|point| point.weights_mib * 1.04).chain([0.0]), 8);
    let y_axis = perplexity_axis(points);
    axes(&mut canvas, &x_axis, &y_axis);
    let place = |point: &FrontierPoint| {
        let x = LEFT + x_axis.position(point.weights_mib) * PLOT_WIDTH;
        (x, y_of(&y_axis, point.perplexity))
    };
    let places: Vec<(f64, f64)> = points.iter().map(place).collect();
    for (point, &(x, y)) in points.iter().zip(&places) {
        let color = if point.is_baseline { Color::VERMILLION } else { Color::BLUE };
        if let Some((low, high)) = point.ends {
            let ends = [high, low].map(|value| y_of(&y_axis, value));
            canvas.line(vec![(x, ends[0]), (x, ends[1])], 1.2, color.opacity(0.5));
            for end in ends {
                canvas.line(vec![(x - 5.0, end), (x + 5.0, end)], 1.2, color.opacity(0.5));
            }
        }
        marker(&mut canvas, (x, y), point.is_baseline);
    }
    for (point, (at, align)) in points.iter().zip(place_labels(points, &places, &y_axis)) {
        canvas.text(at, point.label.clone(), 12.0, align, Color::INK);
    }
    legend(&mut canvas, points);
    canvas
}

fn y_of(axis: &Axis, perplexity: f64) -> f64 {
    TOP + (1.0 - axis.position(perplexity)) * PLOT_HEIGHT
}

fn perplexity_axis(points: &[FrontierPoint]) -> Axis {
    let spread = points.iter().flat_map(|point| {
        let (low, high) = point.ends.unwrap_or((point.perplexity, point.perplexity));
        [low, point.perplexity, high]
    });
    let min = points.iter().map(|point| point.perplexity).fold(f64::INFINITY, f64::min);
    let max = points.iter().map(|point| point.perplexity).fold(0.0, f64::max);
    if max > min * LOG_FROM_RATIO { Axis::log(spread) } else { Axis::linear(spread, 7) }
}

fn axes(canvas: &mut Canvas, x_axis: &Axis, y_axis: &Axis) {
    let (right, bottom) = (LEFT + PLOT_WIDTH, TOP + PLOT_HEIGHT);
    for tick in x_axis.ticks() {
        let x = LEFT + tick.position * PLOT_WIDTH;
        canvas.line(vec![(x, TOP), (x, bottom)], 1.0, Color::GRID);
        canvas.text((x, bottom + 18.0), tick.label, 12.0, Align::Middle, Color::GREY);
    }
    for tick in y_axis.ticks() {
        let y = TOP + (1.0 - tick.position) * PLOT_HEIGHT;
        canvas.line(vec![(LEFT, y), (right, y)], 1.0, Color::GRID);
        canvas.text((LEFT - 8.0, y), tick.label, 12.0, Align::End, Color::GREY);
    }
    canvas.line(vec![(LEFT, TOP), (LEFT, bottom), (right, bottom)], 1.0, Color::INK);
    canvas.text((LEFT + PLOT_WIDTH / 2.0, bottom + 46.0), "weights as stored (MiB)", 13.0, Align::Middle, Color::INK);
    let unit = if matches!(y_axis, Axis::Log { .. }) { ", log scale" } else { "" };
    let label = format!("perplexity (lower is better{unit})");
    canvas.text_upward((22.0, TOP + PLOT_HEIGHT / 2.0), label, 13.0, Align::Middle, Color::INK);
}

fn marker(canvas: &mut Canvas, at: (f64, f64), is_baseline: bool) {
    if is_baseline {
        canvas.diamond(at, 7.0, Color::VERMILLION);
    } else {
        canvas.circle(at, 5.5, Color::BLUE);
    }
}

/// A rectangle: left, top, right, bottom.
type Box4 = (f64, f64, f64, f64);

/// Puts each label where it covers least: right, left, above, below, or further away.
fn place_labels(points: &[FrontierPoint], places: &[(f64, f64)], y_axis: &Axis) -> Vec<((f64, f64), Align)> {
    let mut taken: Vec<Box4> = places.iter().map(|&(x, y)| (x - 8.0, y - 8.0, x + 8.0, y + 8.0)).collect();
    for (point, &(x, y)) in points.iter().zip(places) {
        let (low, high) = point.ends.unwrap_or((point.perplexity, point.perplexity));
        taken.push((x - 6.0, y_of(y_axis, high) - 2.0, x + 6.0, y_of(y_axis, low).max(y) + 2.0));
    }
    let mut labels = Vec::with_capacity(points.len());
    for (point, &(x, y)) in points.iter().zip(places) {
        let width = text_width(&point.label, 12.0);
        let mut candidates = vec![((x + 12.0, y), Align::Start), ((x - 12.0, y), Align::End)];
        for distance in [17.0, 32.0, 47.0, 62.0] {
            for y in [y - distance, y + distance] {
                candidates.push(((x, y), Align::Middle));
                candidates.push(((x + 8.0, y), Align::Start));
                candidates.push(((x - 8.0, y), Align::End));
            }
        }
        let cost = |&((x, y), align): &((f64, f64), Align)| {
            let area = label_box((x, y), align, width);
            outside(area) + taken.iter().map(|other| overlap(area, *other)).sum::<f64>()
        };
        // The first of the cheapest, so that near places win.
        let best = candidates.iter().copied().reduce(|best, next| if cost(&next) < cost(&best) { next } else { best });
        let best = best.unwrap_or(((x + 12.0, y), Align::Start));
        taken.push(label_box(best.0, best.1, width));
        labels.push(best);
    }
    labels
}

fn label_box((x, y): (f64, f64), align: Align, width: f64) -> Box4 {
    let left = match align {
        Align::Start => x,
        Align::Middle => x - width / 2.0,
        Align::End => x - width,
    };
    (left, y - 7.0, left + width, y + 7.0)
}

fn overlap(a: Box4, b: Box4) -> f64 {
    let width = a.2.min(b.2) - a.0.max(b.0);
    let height = a.3.min(b.3) - a.1.max(b.1);
    width.max(0.0) * height.max(0.0)
}

/// Returns a cost for what would be clipped at the frame.
fn outside((left, top, right, bottom): Box4) -> f64 {
    let over = [LEFT - left, TOP - top, right - (LEFT + PLOT_WIDTH), bottom - (TOP + PLOT_HEIGHT)];
    over.into_iter().map(|pixels| pixels.max(0.0) * 100.0).sum()
}

fn legend(canvas: &mut Canvas, points: &[FrontierPoint]) {
    let mut entries = vec![("quantized", false), ("not quantized", true)];
    entries.retain(|(_, is_baseline)| points.iter().any(|point| point.is_baseline == *is_baseline));
    let note = points.iter().any(|point| point.ends.is_some()).then_some("bars: 95 % intervals");
    let mut x = LEFT + 4.0;
    for (text, is_baseline) in entries {
        marker(canvas, (x + 8.0, 70.0), is_baseline);
        canvas.text((x + 20.0, 70.0), text, 12.0, Align::Start, Color::INK);
        x += 44.0 + text_width(text, 12.0);
    }
    if let Some(note) = note {
        canvas.text((x, 70.0), note, 12.0, Align::Start, Color::GREY);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::plot::canvas::Shape;

    fn point(label: &str, weights_mib: f64, perplexity: f64) -> FrontierPoint {
        FrontierPoint {
            label: label.to_owned(),
            weights_mib,
            perplexity,
            ends: Some((perplexity - 0.2, perplexity + 0.2)),
            is_baseline: false,
        }
    }

    #[test]
    fn labels_of_neighbouring_points_do_not_cover_each_other() {
        let points: Vec<_> = ["nf4", "nf4-double", "bitsandbytes-style", "int4"]
            .iter()
            .enumerate()
            .map(|(idx, label)| point(label, 0.15 + 0.001 * idx as f64, 11.4))
            .collect();
        let places: Vec<_> = points.iter().map(|point| (200.0 + point.weights_mib * 100.0, 300.0)).collect();
        let axis = perplexity_axis(&points);
        let boxes: Vec<Box4> = place_labels(&points, &places, &axis)
            .into_iter()
            .zip(&points)
            .map(|((at, align), point)| label_box(at, align, text_width(&point.label, 12.0)))
            .collect();
        for (idx, a) in boxes.iter().enumerate() {
            assert!(boxes[idx + 1..].iter().all(|b| overlap(*a, *b) == 0.0));
        }
    }

    #[test]
    fn very_different_perplexities_share_a_logarithmic_axis() {
        assert!(matches!(perplexity_axis(&[point("a", 1.0, 9.0), point("b", 1.0, 4000.0)]), Axis::Log { .. }));
        assert!(matches!(perplexity_axis(&[point("a", 1.0, 9.0), point("b", 1.0, 11.0)]), Axis::Linear { .. }));
        let canvas = frontier(&[point("a", 1.0, 9.0), point("b", 0.5, 4000.0)], "two models");
        assert!(
            canvas.shapes.iter().any(|shape| matches!(shape, Shape::Text { text, .. } if text.contains("log scale")))
        );
    }
}
