//! Drawing: numbers in, one SVG out, to be put into a page.
//!
//! Colours here are names that the page's style sheet gives their light and dark values, so that figures follow the page.

use crate::eval::EvalError;
use plotters::coord::Shift;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;
use std::ops::Range;

pub const INK: RGBColor = RGBColor(0x10, 0x10, 0x10);
pub const MUTED: RGBColor = RGBColor(0x6b, 0x6b, 0x70);
pub const GRID: RGBColor = RGBColor(0xe3, 0xe3, 0xe6);
pub const HARMFUL: RGBColor = RGBColor(0xd5, 0x5e, 0x00);
pub const HARMLESS: RGBColor = RGBColor(0x00, 0x72, 0xb2);
pub const LOOK_ALIKE: RGBColor = RGBColor(0xcc, 0x79, 0xa7);
pub const NATIVE: RGBColor = RGBColor(0x00, 0x9e, 0x73);
pub const CONTROL: RGBColor = RGBColor(0x8a, 0x8a, 0x92);

type Canvas<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Chart<'a, 'b> = ChartContext<'a, SVGBackend<'b>, Cartesian2d<RangedCoordf64, RangedCoordf64>>;

/// Width and height of figures, in their own units: the page scales them.
const SIZE: (u32, u32) = (640, 380);

/// Draws on a canvas of `size`, and gives the SVG with `label` for those who can't see it.
fn svg(
    label: &str,
    size: (u32, u32),
    draw: impl FnOnce(&Canvas<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> Result<String, EvalError> {
    let mut text = String::new();
    {
        let canvas = SVGBackend::with_string(&mut text, size).into_drawing_area();
        let drawn = draw(&canvas).and_then(|()| Ok(canvas.present()?));
        drawn.map_err(|error| EvalError::Plot { figure: label.into(), reason: error.to_string() })?;
    }
    let (_, content) = text.split_once("<svg").and_then(|(_, rest)| rest.split_once('>')).unwrap_or_default();
    let (width, height) = size;
    let label = label.replace('&', "&amp;").replace('"', "&quot;").replace('<', "&lt;");
    Ok(format!("<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{label}\">{content}"))
}

fn font(size: f64) -> TextStyle<'static> {
    ("sans-serif", size).into_font().color(&INK)
}

/// Axes with names, and a faint grid.
fn axes<'a, 'b>(
    canvas: &'a Canvas<'b>,
    (x, x_name): (Range<f64>, &str),
    (y, y_name): (Range<f64>, &str),
) -> Result<Chart<'a, 'b>, Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(canvas)
        .margin(10)
        .margin_right(18)
        .x_label_area_size(54)
        .y_label_area_size(68)
        .build_cartesian_2d(x, y)?;
    chart
        .configure_mesh()
        .x_desc(x_name)
        .y_desc(y_name)
        .x_labels(8)
        .y_labels(6)
        .axis_style(MUTED)
        .bold_line_style(GRID)
        .light_line_style(TRANSPARENT)
        .label_style(font(16.0))
        .axis_desc_style(font(17.0))
        .x_label_formatter(&tick)
        .y_label_formatter(&tick)
        .draw()?;
    Ok(chart)
}

/// A number on an axis, without the digits that say nothing.
fn tick(value: &f64) -> String {
    let text = format!("{value:.4}");
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

/// A range that shows all of `values` with some room, never empty.
fn around(values: impl Iterator<Item = f64> + Clone) -> Range<f64> {
    let finite = values.filter(|value| value.is_finite());
    let low = finite.clone().fold(f64::INFINITY, f64::min);
    let high = finite.fold(f64::NEG_INFINITY, f64::max);
    if low > high {
        return 0.0..1.0;
    }
    let room = if high > low { 0.04 * (high - low) } else { 0.5 };
    low - room..high + room
}

/// A histogram of several classes on the same bins, as shares of each class.
pub struct Histogram {
    /// Lower edge of the first bin.
    pub start: f64,
    pub width: f64,
    /// Counts of each class.
    pub counts: Vec<Vec<usize>>,
}

/// Bins of a histogram.
const BINS: usize = 32;

impl Histogram {
    pub fn new(classes: &[&[f64]]) -> Self {
        let all = classes.iter().flat_map(|class| class.iter().copied());
        let Range { start, end } = around(all);
        let width = (end - start) / BINS as f64;
        let count = |class: &&[f64]| {
            let mut counts = vec![0; BINS];
            for value in class.iter() {
                counts[(((value - start) / width) as usize).min(BINS - 1)] += 1;
            }
            counts
        };
        Self { start, width, counts: classes.iter().map(count).collect() }
    }

    pub fn edge(&self, bin: usize) -> f64 {
        self.start + bin as f64 * self.width
    }

    /// Share of its class that is in a bin.
    pub fn share(&self, class: usize, bin: usize) -> f64 {
        let all: usize = self.counts[class].iter().sum();
        self.counts[class][bin] as f64 / all.max(1) as f64
    }

    pub fn draw(&self, label: &str, colours: &[RGBColor], threshold: Option<f64>) -> Result<String, EvalError> {
        let shares = (0..self.counts.len()).flat_map(|class| (0..BINS).map(move |bin| self.share(class, bin)));
        let top = 1.08 * shares.fold(0.01, f64::max);
        let x = self.start.min(threshold.unwrap_or(f64::INFINITY))
            ..self.edge(BINS).max(threshold.map_or(f64::NEG_INFINITY, |at| at + self.width));
        svg(label, SIZE, |canvas| {
            let names = ("score, in standard deviations of benign prompts", "share of the class");
            let mut chart = axes(canvas, (x, names.0), (0.0..top, names.1))?;
            for (class, colour) in colours.iter().enumerate().take(self.counts.len()) {
                chart.draw_series((0..BINS).map(|bin| {
                    let corners = [(self.edge(bin), self.share(class, bin)), (self.edge(bin + 1), 0.0)];
                    Rectangle::new(corners, colour.mix(0.28).filled())
                }))?;
                let outline = (0..BINS).flat_map(|bin| {
                    let share = self.share(class, bin);
                    [(self.edge(bin), share), (self.edge(bin + 1), share)]
                });
                chart.draw_series(LineSeries::new(outline, colour.stroke_width(2)))?;
            }
            if let Some(at) = threshold {
                chart.draw_series(DashedLineSeries::new([(at, 0.0), (at, top)], 6, 4, INK.stroke_width(2)))?;
            }
            Ok(())
        })
    }
}

/// One line of a figure.
pub struct Line {
    pub colour: RGBColor,
    pub points: Vec<(f64, f64)>,
    pub dashed: bool,
    /// Low and high of each point, if it has an interval.
    pub interval: Vec<(f64, f64)>,
}

impl Line {
    pub fn new(colour: RGBColor, points: Vec<(f64, f64)>) -> Self {
        Self { colour, points, dashed: false, interval: Vec::new() }
    }
}

/// Lines over numbers that may have intervals, with a dot at every point if there are few.
pub fn lines(
    label: &str,
    (x_name, x): (&str, Option<Range<f64>>),
    (y_name, y): (&str, Option<Range<f64>>),
    lines: &[Line],
) -> Result<String, EvalError> {
    let xs = lines.iter().flat_map(|line| line.points.iter().map(|point| point.0));
    let points = lines.iter().flat_map(|line| line.points.iter().map(|point| point.1));
    let bounds = lines.iter().flat_map(|line| line.interval.iter().flat_map(|(low, high)| [*low, *high]));
    let x = x.unwrap_or_else(|| around(xs));
    let y = y.unwrap_or_else(|| around(points.chain(bounds)));
    svg(label, SIZE, |canvas| {
        let mut chart = axes(canvas, (x, x_name), (y, y_name))?;
        for line in lines {
            let style = line.colour.stroke_width(if line.dashed { 1 } else { 3 });
            if line.dashed {
                chart.draw_series(DashedLineSeries::new(line.points.iter().copied(), 5, 4, style))?;
                continue;
            }
            if !line.interval.is_empty() {
                let low = line.points.iter().zip(&line.interval).map(|(point, bounds)| (point.0, bounds.0));
                let high = line.points.iter().zip(&line.interval).rev().map(|(point, bounds)| (point.0, bounds.1));
                let band: Vec<_> = low.chain(high).collect();
                chart.draw_series([Polygon::new(band, line.colour.mix(0.16).filled())])?;
            }
            chart.draw_series(LineSeries::new(line.points.iter().copied(), style))?;
            if line.points.len() <= 64 && line.points.len() > 1 {
                chart.draw_series(line.points.iter().map(|point| Circle::new(*point, 3, line.colour.filled())))?;
            }
        }
        Ok(())
    })
}

/// A row of [`intervals`]: a name, and a value with its interval for each colour.
pub struct Dots {
    pub name: String,
    pub values: Vec<(RGBColor, f64, f64, f64)>,
}

/// Shares with their intervals from 0 to 1, a row each: how controls compare at a glance.
pub fn intervals(label: &str, x_name: &str, rows: &[Dots]) -> Result<String, EvalError> {
    const ROW: i32 = 44;
    const LEFT: i32 = 246;
    let (width, height) = (SIZE.0 as i32, ROW * rows.len() as i32 + 62);
    let right = width - 26;
    let at = |value: f64| LEFT + ((right - LEFT) as f64 * value.clamp(0.0, 1.0)).round() as i32;
    svg(label, (SIZE.0, height as u32), |canvas| {
        let bottom = height - 52;
        let middle = |style: TextStyle<'static>| {
            style.pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Center,
                plotters::style::text_anchor::VPos::Top,
            ))
        };
        for step in 0..=5 {
            let value = f64::from(step) / 5.0;
            canvas.draw(&PathElement::new([(at(value), 8), (at(value), bottom)], GRID))?;
            canvas.draw(&Text::new(format!("{:.0} %", 100.0 * value), (at(value), bottom + 7), middle(font(16.0))))?;
        }
        canvas.draw(&Text::new(x_name.to_owned(), ((LEFT + right) / 2, bottom + 29), middle(font(17.0))))?;
        for (index, Dots { name, values }) in rows.iter().enumerate() {
            let top = 8 + ROW * index as i32;
            let style = font(16.0).pos(plotters::style::text_anchor::Pos::new(
                plotters::style::text_anchor::HPos::Right,
                plotters::style::text_anchor::VPos::Center,
            ));
            canvas.draw(&Text::new(name.clone(), (LEFT - 14, top + ROW / 2), style))?;
            let gap = ROW / (values.len() as i32 + 1);
            for (place, (colour, value, low, high)) in values.iter().enumerate() {
                let y = top + gap * (place as i32 + 1);
                let whisker = PathElement::new([(at(*low), y), (at(*high), y)], colour.mix(0.55).stroke_width(4));
                canvas.draw(&whisker)?;
                canvas.draw(&Circle::new((at(*value), y), 6, colour.filled()))?;
            }
        }
        Ok(())
    })
}

/// Values of pairs of layers as colours, dark for low and bright for high, with a scale beside them.
pub fn heat_map(label: &str, cells: &[(u32, u32, f64)]) -> Result<String, EvalError> {
    let last = |of: fn(&(u32, u32, f64)) -> u32| f64::from(cells.iter().map(of).max().unwrap_or(0));
    let (x, y) = (last(|cell| cell.0), last(|cell| cell.1));
    let low = cells.iter().map(|cell| cell.2).fold(f64::INFINITY, f64::min);
    let high = cells.iter().map(|cell| cell.2).fold(f64::NEG_INFINITY, f64::max);
    let span = if high > low { high - low } else { 1.0 };
    svg(label, (SIZE.0, 440), |canvas| {
        let (map, scale) = canvas.split_horizontally(SIZE.0 as i32 - 96);
        let mut chart = axes(&map, (-0.5..x + 0.5, "source layer"), (-0.5..y + 0.5, "target layer"))?;
        chart.draw_series(cells.iter().map(|(source, target, value)| {
            let (source, target) = (f64::from(*source), f64::from(*target));
            let corners = [(source - 0.5, target - 0.5), (source + 0.5, target + 0.5)];
            Rectangle::new(corners, heat((value - low) / span).filled())
        }))?;
        let (_, height) = scale.dim_in_pixel();
        let (top, bottom) = (14, height as i32 - 60);
        for y in top..bottom {
            let share = f64::from(bottom - y) / f64::from(bottom - top);
            scale.draw(&Rectangle::new([(4, y), (22, y + 1)], heat(share).filled()))?;
        }
        for step in 0..=4 {
            let share = f64::from(step) / 4.0;
            let y = bottom - (f64::from(bottom - top) * share) as i32;
            scale.draw(&Text::new(format!("{:.2}", low + span * share), (30, y - 6), font(16.0)))?;
        }
        Ok(())
    })
}

/// A scale that is as even to the eye as viridis, whose stops these are.
fn heat(share: f64) -> RGBColor {
    const STOPS: [(u8, u8, u8); 6] =
        [(68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37)];
    let at = share.clamp(0.0, 1.0) * (STOPS.len() - 1) as f64;
    let (low, high) = (STOPS[at.floor() as usize], STOPS[at.ceil() as usize]);
    let mix = |a: u8, b: u8| (f64::from(a) + (f64::from(b) - f64::from(a)) * at.fract()).round() as u8;
    RGBColor(mix(low.0, high.0), mix(low.1, high.1), mix(low.2, high.2))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_is_in_a_bin() {
        let (a, b) = ([0.0, 1.0, 1.0, -3.5], [7.25]);
        let histogram = Histogram::new(&[&a, &b]);
        assert_eq!(histogram.counts.iter().map(|counts| counts.iter().sum::<usize>()).collect::<Vec<_>>(), [4, 1]);
        for (class, values) in [&a[..], &b[..]].into_iter().enumerate() {
            for value in values {
                let bin =
                    (0..BINS).find(|bin| histogram.edge(*bin) <= *value && *value < histogram.edge(bin + 1)).unwrap();
                assert!(histogram.counts[class][bin] > 0);
            }
        }
        // One value only, and none.
        assert_eq!(Histogram::new(&[&[2.0]]).counts[0].iter().sum::<usize>(), 1);
        assert_eq!(Histogram::new(&[&[]]).share(0, 0), 0.0);
    }

    #[test]
    fn ticks_say_no_more_than_they_must() {
        assert_eq!([0.5, -0.0, 12.0, 0.05].map(|x| tick(&x)), ["0.5", "0", "12", "0.05"]);
    }

    #[test]
    fn the_scale_goes_from_dark_to_bright() {
        let brightness = |share: f64| {
            let RGBColor(r, g, b) = heat(share);
            0.2126 * f64::from(r) + 0.7152 * f64::from(g) + 0.0722 * f64::from(b)
        };
        assert!((0..20).all(|step| brightness(f64::from(step) / 20.0) < brightness(f64::from(step + 1) / 20.0)));
    }
}
