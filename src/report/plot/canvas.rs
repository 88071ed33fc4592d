//! A list of shapes in pixels, drawn by plotters' bitmap and SVG backends alike.

use super::PlotError;
use plotters::backend::{BitMapBackend, DrawingBackend, SVGBackend};
use plotters::coord::Shift;
use plotters::drawing::{DrawingArea, IntoDrawingArea};
use plotters::element::{Circle, PathElement, Polygon, Rectangle};
use plotters::style::text_anchor::{HPos, Pos, VPos};
use plotters::style::{
    FontDesc, FontFamily, FontStyle, FontTransform, RGBAColor, ShapeStyle, TextStyle, register_font,
};
use std::sync::OnceLock;

/// The embedded font first; where an SVG's viewer lacks it, one of about its width.
const FONT_FAMILY: &str = "DejaVu Sans, Verdana, sans-serif";
static FONT: &[u8] = include_bytes!("../../../assets/fonts/DejaVuSans.ttf");

/// Pixels of a PNG for each of the canvas in each direction, if not set otherwise: for sharp text on dense screens.
const PNG_SCALE: f64 = 2.0;
/// plotters rounds coordinates to whole units; an SVG is drawn this much larger and shown smaller.
const SVG_SCALE: f64 = 8.0;

/// Height of DejaVu Sans' line box, as its file has it, in em: plotters' bitmap fonts are sized by it.
const LINE_BOX_EM: f64 = 1.164;
/// Height of a capital letter in em.
const CAP_HEIGHT_EM: f64 = 0.729;

/// A colour with its opacity (0 to 1).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Color(pub u8, pub u8, pub u8, pub f64);

impl Color {
    pub const BLUE: Color = Color(0x00, 0x72, 0xB2, 1.0);
    pub const VERMILLION: Color = Color(0xD5, 0x5E, 0x00, 1.0);
    pub const INK: Color = Color(0x22, 0x22, 0x22, 1.0);
    pub const GREY: Color = Color(0x6B, 0x6B, 0x6B, 1.0);
    pub const GRID: Color = Color(0xE2, 0xE2, 0xE2, 1.0);
    pub const BAND: Color = Color(0xF5, 0xF5, 0xF5, 1.0);
    pub const WHITE: Color = Color(0xFF, 0xFF, 0xFF, 1.0);

    /// Returns this colour with another opacity.
    pub const fn opacity(self, opacity: f64) -> Color {
        Color(self.0, self.1, self.2, opacity)
    }

    fn rgba(self) -> RGBAColor {
        RGBAColor(self.0, self.1, self.2, self.3)
    }
}

/// Which point of a text its position names, along the line of text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Align {
    Start,
    Middle,
    End,
}

/// One thing to draw; lengths in pixels, y downwards.
#[derive(Debug, Clone, PartialEq)]
pub enum Shape {
    Rect { x: f64, y: f64, width: f64, height: f64, color: Color },
    Line { points: Vec<(f64, f64)>, width: f64, color: Color },
    Polygon { points: Vec<(f64, f64)>, color: Color },
    Circle { x: f64, y: f64, radius: f64, color: Color },
    Text { x: f64, y: f64, text: String, size: f64, align: Align, upward: bool, color: Color },
}

/// A drawing of fixed size on white.
#[derive(Debug, Clone, PartialEq)]
pub struct Canvas {
    pub width: u32,
    pub height: u32,
    /// Pixels of a PNG for each of the canvas in each direction.
    pub png_scale: f64,
    pub shapes: Vec<Shape>,
}

impl Canvas {
    /// Returns an empty canvas, sized in pixels.
    pub fn new(width: u32, height: u32) -> Canvas {
        Canvas { width, height, png_scale: PNG_SCALE, shapes: Vec::new() }
    }

    pub fn rect(&mut self, (x, y): (f64, f64), (width, height): (f64, f64), color: Color) {
        self.shapes.push(Shape::Rect { x, y, width, height, color });
    }

    pub fn line(&mut self, points: Vec<(f64, f64)>, width: f64, color: Color) {
        self.shapes.push(Shape::Line { points, width, color });
    }

    /// Draws a straight line in dashes of 6 pixels with gaps of 4.
    pub fn dashed(&mut self, from: (f64, f64), to: (f64, f64), width: f64, color: Color) {
        let (dx, dy) = (to.0 - from.0, to.1 - from.1);
        let length = dx.hypot(dy);
        let at = |distance: f64| (from.0 + dx * distance / length, from.1 + dy * distance / length);
        for dash_idx in 0..(length / 10.0).ceil() as usize {
            let start = dash_idx as f64 * 10.0;
            self.line(vec![at(start), at((start + 6.0).min(length))], width, color);
        }
    }

    pub fn circle(&mut self, (x, y): (f64, f64), radius: f64, color: Color) {
        self.shapes.push(Shape::Circle { x, y, radius, color });
    }

    /// Draws a square standing on its corner.
    pub fn diamond(&mut self, (x, y): (f64, f64), radius: f64, color: Color) {
        let points = vec![(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)];
        self.shapes.push(Shape::Polygon { points, color });
    }

    /// Writes text whose middle line is at `y`; `size` is the em in pixels.
    pub fn text(&mut self, (x, y): (f64, f64), text: impl Into<String>, size: f64, align: Align, color: Color) {
        self.shapes.push(Shape::Text { x, y, text: text.into(), size, align, upward: false, color });
    }

    /// Writes text that runs upward, its middle line at `x`.
    pub fn text_upward(&mut self, (x, y): (f64, f64), text: impl Into<String>, size: f64, align: Align, color: Color) {
        self.shapes.push(Shape::Text { x, y, text: text.into(), size, align, upward: true, color });
    }

    /// Returns the picture as PNG, `png_scale` pixels for one of the canvas in each direction.
    ///
    /// # Errors
    /// Where a shape can't be drawn or the image not encoded.
    pub fn to_png(&self) -> Result<Vec<u8>, PlotError> {
        let target =
            Target { scale: self.png_scale, font_size_em: LINE_BOX_EM, top_em: LINE_BOX_EM / 2.0, draws_pixels: true };
        let (width, height) = self.size(&target);
        // White already: a backend fills pixel by pixel, slowly.
        let mut pixels = vec![255u8; width as usize * height as usize * 3];
        let area = BitMapBackend::with_buffer(&mut pixels, (width, height)).into_drawing_area();
        self.draw(&area, &target)?;
        drop(area);
        let mut bytes = Vec::new();
        let failed = |error: png::EncodingError| PlotError::Encode(error.to_string());
        let mut encoder = png::Encoder::new(&mut bytes, width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut writer = encoder.write_header().map_err(failed)?;
        writer.write_image_data(&pixels).map_err(failed)?;
        writer.finish().map_err(failed)?;
        Ok(bytes)
    }

    /// Returns the picture as SVG.
    ///
    /// # Errors
    /// Where a shape can't be drawn.
    pub fn to_svg(&self) -> Result<String, PlotError> {
        // 1.24 and 0.76 are how plotters-svg 0.3.7 turns a font's size into CSS, and its top into a baseline.
        let target = Target { scale: SVG_SCALE, font_size_em: 1.24, top_em: 0.76, draws_pixels: false };
        let (width, height) = self.size(&target);
        let mut text = String::new();
        let area = SVGBackend::with_string(&mut text, (width, height)).into_drawing_area();
        area.fill(&Color::WHITE.rgba()).map_err(draw_error)?;
        self.draw(&area, &target)?;
        drop(area);
        let drawn = format!("<svg width=\"{width}\" height=\"{height}\"");
        let shown = format!("<svg width=\"{}\" height=\"{}\"", self.width, self.height);
        Ok(text.replacen(&drawn, &shown, 1))
    }

    fn size(&self, target: &Target) -> (u32, u32) {
        (target.px(f64::from(self.width)).unsigned_abs(), target.px(f64::from(self.height)).unsigned_abs())
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, target: &Target) -> Result<(), PlotError> {
        load_font()?;
        for shape in &self.shapes {
            target.draw(area, shape)?;
        }
        area.present().map_err(draw_error)
    }
}

fn draw_error(error: impl std::fmt::Display) -> PlotError {
    PlotError::Draw(error.to_string())
}

/// Returns the width of a text in pixels, `size` being the em.
pub fn text_width(text: &str, size: f64) -> f64 {
    let measured = load_font().ok().and_then(|()| {
        // Measured large: plotters rounds to whole pixels.
        let font = FontDesc::new(FontFamily::Name(FONT_FAMILY), 100.0 * LINE_BOX_EM, FontStyle::Normal);
        font.layout_box(text).ok()
    });
    match measured {
        Some(((left, _), (right, _))) => f64::from(right - left) / 100.0 * size,
        None => text.chars().count() as f64 * size * 0.6,
    }
}

fn load_font() -> Result<(), PlotError> {
    static LOADED: OnceLock<bool> = OnceLock::new();
    let is_loaded = LOADED.get_or_init(|| register_font(FONT_FAMILY, FontStyle::Normal, FONT).is_ok());
    if *is_loaded { Ok(()) } else { Err(PlotError::Font) }
}

/// What differs between backends.
struct Target {
    /// Units of the backend for one pixel of the canvas.
    scale: f64,
    /// The backend's font size for an em of 1.
    font_size_em: f64,
    /// From the top of what the backend takes for a text's box to its baseline, in em.
    top_em: f64,
    /// It is a bitmap: slanted lines and circles are drawn pixel by pixel.
    draws_pixels: bool,
}

impl Target {
    fn px(&self, value: f64) -> i32 {
        (value * self.scale).round() as i32
    }

    fn points(&self, points: &[(f64, f64)]) -> Vec<(i32, i32)> {
        points.iter().map(|&(x, y)| (self.px(x), self.px(y))).collect()
    }

    fn draw<DB: DrawingBackend>(&self, area: &DrawingArea<DB, Shift>, shape: &Shape) -> Result<(), PlotError> {
        let filled = |color: &Color| ShapeStyle { color: color.rgba(), filled: true, stroke_width: 0 };
        match shape {
            Shape::Rect { x, y, width, height, color } => {
                let corners = [(self.px(*x), self.px(*y)), (self.px(x + width), self.px(y + height))];
                area.draw(&Rectangle::new(corners, filled(color)))
            }
            Shape::Line { points, width, color } if self.draws_pixels && !is_upright(points) => {
                for ends in points.windows(2) {
                    self.draw_covered(area, ends[0], ends[1], width / 2.0, *color)?;
                }
                Ok(())
            }
            Shape::Line { points, width, color } => {
                let stroke_width = self.px(*width).max(1).unsigned_abs();
                let style = ShapeStyle { color: color.rgba(), filled: false, stroke_width };
                area.draw(&PathElement::new(self.points(points), style))
            }
            Shape::Polygon { points, color } => area.draw(&Polygon::new(self.points(points), filled(color))),
            Shape::Circle { x, y, radius, color } if self.draws_pixels => {
                return self.draw_covered(area, (*x, *y), (*x, *y), *radius, *color);
            }
            Shape::Circle { x, y, radius, color } => {
                area.draw(&Circle::new((self.px(*x), self.px(*y)), self.px(*radius), filled(color)))
            }
            Shape::Text { x, y, text, size, align, upward, color } => {
                // Backends disagree about where a text's middle is, so the baseline is placed by hand.
                let to_top = (CAP_HEIGHT_EM / 2.0 - self.top_em) * size;
                let (x, y) = if *upward { (x + to_top, *y) } else { (*x, y + to_top) };
                area.draw_text(text, &self.text_style(*size, *align, *upward, *color), (self.px(x), self.px(y)))
            }
        }
        .map_err(draw_error)
    }

    /// Draws all that is within `radius` of a line, by how much of each pixel that covers: plotters rounds corners and
    /// centers to whole pixels, which makes a line's width depend on its slope and small circles square.
    fn draw_covered<DB: DrawingBackend>(
        &self,
        area: &DrawingArea<DB, Shift>,
        from: (f64, f64),
        to: (f64, f64),
        radius: f64,
        color: Color,
    ) -> Result<(), PlotError> {
        let (from, to) = ((from.0 * self.scale, from.1 * self.scale), (to.0 * self.scale, to.1 * self.scale));
        let reach = radius * self.scale + 0.5;
        let pixels = |a: f64, b: f64| (a.min(b) - reach).floor() as i32..=(a.max(b) + reach).ceil() as i32;
        for y in pixels(from.1, to.1) {
            for x in pixels(from.0, to.0) {
                let center = (f64::from(x) + 0.5, f64::from(y) + 0.5);
                let coverage = (reach - distance(center, from, to)).clamp(0.0, 1.0);
                if coverage > 0.0 {
                    let color = color.opacity(color.3 * coverage);
                    area.draw_pixel((x, y), &color.rgba()).map_err(draw_error)?;
                }
            }
        }
        Ok(())
    }

    fn text_style(&self, size: f64, align: Align, upward: bool, color: Color) -> TextStyle<'static> {
        let font_size = size * self.scale * self.font_size_em;
        let transform = if upward { FontTransform::Rotate270 } else { FontTransform::None };
        let font = FontDesc::new(FontFamily::Name(FONT_FAMILY), font_size, FontStyle::Normal).transform(transform);
        let h_pos = match align {
            Align::Start => HPos::Left,
            Align::Middle => HPos::Center,
            Align::End => HPos::Right,
        };
        font.color(&color.rgba()).pos(Pos::new(h_pos, VPos::Top))
    }
}

/// Returns true where every part of a line is horizontal or vertical.
fn is_upright(points: &[(f64, f64)]) -> bool {
    points.windows(2).all(|ends| ends[0].0 == ends[1].0 || ends[0].1 == ends[1].1)
}

/// Returns the distance of a point from the line between two ends.
fn distance(point: (f64, f64), from: (f64, f64), to: (f64, f64)) -> f64 {
    let (dx, dy) = (to.0 - from.0, to.1 - from.1);
    let length_square = dx * dx + dy * dy;
    let along = if length_square > 0.0 {
        (((point.0 - from.0) * dx + (point.1 - from.1) * dy) / length_square).clamp(0.0, 1.0)
    } else {
        0.0
    };
    (point.0 - from.0 - along * dx).hypot(point.1 - from.1 - along * dy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_png_has_the_scaled_canvas_size_and_is_the_same_each_time() {
        let mut canvas = Canvas::new(120, 40);
        canvas.text((60.0, 20.0), "−MSE · µs", 12.0, Align::Middle, Color::INK);
        canvas.dashed((0.0, 0.0), (120.0, 40.0), 1.0, Color::BLUE);
        let bytes = canvas.to_png().unwrap();
        assert_eq!(&bytes[..8], b"\x89PNG\r\n\x1a\n");
        assert_eq!(bytes[16..24], [0, 0, 0, 240, 0, 0, 0, 80]);
        assert_eq!(bytes, canvas.to_png().unwrap());
    }

    #[test]
    fn an_svg_escapes_text_and_is_shown_in_canvas_size() {
        let mut canvas = Canvas::new(120, 40);
        canvas.text((60.0, 20.0), "a < b & c", 12.0, Align::Start, Color::INK);
        let text = canvas.to_svg().unwrap();
        assert!(text.starts_with("<svg width=\"120\" height=\"40\" viewBox=\"0 0 960 320\""), "{text}");
        assert!(text.contains("a &lt; b &amp; c"));
        assert!(text.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn text_is_measured_with_the_embedded_font() {
        assert!((text_width("MMMM", 10.0) - 34.5).abs() < 0.5, "{}", text_width("MMMM", 10.0));
        assert!(text_width("iiii", 10.0) < text_width("MMMM", 10.0));
    }
}
