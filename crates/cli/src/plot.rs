//! Plots as SVG: lines over two axes, in panels side by side.

use std::fmt::Write as _;

/// Colours of lines, in order.
const COLORS: [&str; 5] = ["#b35806", "#1b7837", "#555555", "#2166ac", "#762a83"];

/// Where an axis begins and ends, and its labels.
pub struct Axis {
    low: f64,
    high: f64,
    is_log: bool,
    ticks: Vec<(f64, String)>,
}

impl Axis {
    /// From the first to the last of these values, each with its label.
    pub fn with_labels(ticks: Vec<(f64, String)>) -> Axis {
        let (low, high) = (ticks.first().map_or(0.0, |tick| tick.0), ticks.last().map_or(0.0, |tick| tick.0));
        Axis { low, high, is_log: false, ticks }
    }

    /// From 0 to `most` or a little farther, with up to six labels at round values.
    pub fn from_zero(most: f64) -> Axis {
        let most = if most.is_finite() && most > 0.0 { most } else { 1.0 };
        let power = 10f64.powf((most / 5.0).log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|of| of * power).into_iter().find(|step| most / step <= 5.0);
        let step = step.unwrap_or(10.0 * power);
        let decimals = (-step.log10().floor()).max(0.0) as usize;
        let tick = |i: u32| (f64::from(i) * step, format!("{:.decimals$}", f64::from(i) * step));
        Axis::with_labels((0..=(most / step).ceil() as u32).map(tick).collect())
    }

    /// Logarithmic, over `values`, with labels at powers of two; those of 1024 end in k or M.
    pub fn log2(values: impl IntoIterator<Item = f64>) -> Axis {
        let (low, high) = values
            .into_iter()
            .filter(|value| value.is_finite() && *value > 0.0)
            .fold((f64::INFINITY, 0.0), |(low, high), value| (value.min(low), value.max(high)));
        let (low, high): (f64, f64) = if low <= high { (low, high) } else { (1.0, 1.0) };
        let (first, last) = (low.log2().ceil() as i32, high.log2().floor() as i32);
        let stride = ((last - first) / 9 + 1) as usize;
        let mut ticks: Vec<f64> = (first..=last).step_by(stride).map(|power| 2f64.powi(power)).collect();
        if ticks.is_empty() {
            ticks = vec![low, high];
        }
        Axis { low, high, is_log: true, ticks: ticks.into_iter().map(|value| (value, binary(value))).collect() }
    }

    /// Where between the ends `value` lies, 0 to 1.
    fn share(&self, value: f64) -> f64 {
        let on_axis = |value: f64| if self.is_log { value.log2() } else { value };
        let (low, high) = (on_axis(self.low), on_axis(self.high));
        if high > low { (on_axis(value) - low) / (high - low) } else { 0.5 }
    }
}

/// `512`, `8k`, `1M`.
fn binary(value: f64) -> String {
    let units = [(f64::from(1 << 20), "M"), (1024.0, "k")];
    let unit = units.into_iter().find(|(unit, _)| value >= *unit && value % unit == 0.0);
    unit.map_or_else(|| value.to_string(), |(unit, name)| format!("{}{name}", value / unit))
}

/// A line with its name.
pub struct Line {
    /// What it is called.
    pub name: String,
    /// Where it goes through.
    pub points: Vec<(f64, f64)>,
}

/// Lines over the same axes.
pub struct Panel {
    /// What is shown.
    pub title: String,
    /// What the horizontal axis counts.
    pub x_title: String,
    /// The horizontal axis.
    pub x: Axis,
    /// The vertical one.
    pub y: Axis,
    /// What is drawn.
    pub lines: Vec<Line>,
}

/// Size of a panel with what stands around it.
const PANEL: (f64, f64) = (640.0, 420.0);
/// Left, top, width and height of the box of its lines.
const BOX: (f64, f64, f64, f64) = (60.0, 60.0, 560.0, 300.0);

/// An SVG file of `panels`, side by side.
pub fn svg(panels: &[Panel]) -> String {
    let (width, height) = (PANEL.0 * panels.len() as f64, PANEL.1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {height}\" font-family=\"sans-serif\" \
         font-size=\"12\">\n<rect width=\"{width}\" height=\"{height}\" fill=\"white\"/>\n"
    );
    for (i, panel) in panels.iter().enumerate() {
        writeln!(svg, "<g transform=\"translate({} 0)\">\n{}</g>", PANEL.0 * i as f64, elements(panel))
            .expect("writing to a string");
    }
    svg + "</svg>\n"
}

fn elements(panel: &Panel) -> String {
    let (left, top, width, height) = BOX;
    let (right, bottom) = (left + width, top + height);
    let x = |value: f64| left + width * panel.x.share(value);
    let y = |value: f64| top + height * (1.0 - panel.y.share(value));
    let mut all = String::new();
    let mut add = |element: String| all.push_str(&(element + "\n"));
    add(format!("<text x=\"{left}\" y=\"20\" font-weight=\"bold\">{}</text>", escape(&panel.title)));
    for (value, label) in &panel.y.ticks {
        let y = y(*value);
        add(format!("<path d=\"M{left} {y:.1}H{right}\" stroke=\"#dddddd\"/>"));
        add(format!("<text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>", left - 6.0, y + 4.0, escape(label)));
    }
    for (value, label) in &panel.x.ticks {
        let (x, y) = (x(*value), bottom + 18.0);
        add(format!("<text x=\"{x:.1}\" y=\"{y}\" text-anchor=\"middle\">{}</text>", escape(label)));
    }
    add(format!("<text x=\"{left}\" y=\"{}\">{}</text>", bottom + 42.0, escape(&panel.x_title)));
    let mut names = String::new();
    for (Line { name, points }, color) in panel.lines.iter().zip(COLORS.iter().cycle()) {
        let points: Vec<String> = points.iter().map(|point| format!("{:.1},{:.1}", x(point.0), y(point.1))).collect();
        let line = points.join(" ");
        add(format!("<polyline points=\"{line}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>"));
        for (x, y) in points.iter().filter_map(|point| point.split_once(',')) {
            add(format!("<circle cx=\"{x}\" cy=\"{y}\" r=\"3\" fill=\"{color}\"/>"));
        }
        write!(names, "<tspan fill=\"{color}\" dx=\"12\">{}</tspan>", escape(name)).expect("writing to a string");
    }
    add(format!("<text x=\"{}\" y=\"42\">{names}</text>", left - 12.0));
    all
}

/// `text` with what XML gives a meaning to written as entities.
fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(axis: &Axis) -> Vec<&str> {
        axis.ticks.iter().map(|(_, label)| label.as_str()).collect()
    }

    #[test]
    fn labels_are_round() {
        assert_eq!(labels(&Axis::from_zero(9.3)), ["0", "2", "4", "6", "8", "10"]);
        assert_eq!(labels(&Axis::from_zero(0.11)), ["0.00", "0.05", "0.10", "0.15"]);
        assert_eq!(labels(&Axis::from_zero(1.0)), ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]);
        assert_eq!(labels(&Axis::from_zero(f64::NAN)).len(), 6);
        assert_eq!(labels(&Axis::log2([1000.0, 9000.0])), ["1k", "2k", "4k", "8k"]);
        assert_eq!(labels(&Axis::log2([1024.0, 1048576.0])), ["1k", "4k", "16k", "64k", "256k", "1M"]);
        assert_eq!(labels(&Axis::log2([100.0, 120.0])), ["100", "120"]);
        assert_eq!(labels(&Axis::log2([0.5, 0.5])), ["0.5"]);
    }

    #[test]
    fn points_lie_between_the_ends() {
        let axis = Axis::log2([16.0, 64.0]);
        assert_eq!([16.0, 32.0, 64.0].map(|value| axis.share(value)), [0.0, 0.5, 1.0]);
        assert_eq!(Axis::log2([16.0]).share(16.0), 0.5, "one point is in the middle");
        assert_eq!(Axis::from_zero(10.0).share(2.5), 0.25);
    }

    #[test]
    fn text_cannot_break_the_file() {
        let line = Line { name: "</svg>".into(), points: vec![(1.0, 1.0)] };
        let (x, y) = (Axis::log2([1.0]), Axis::from_zero(1.0));
        let panel = Panel { title: "a & b".into(), x_title: "tokens".into(), x, y, lines: vec![line] };
        let file = svg(&[panel]);
        assert!(file.contains("a &amp; b") && file.contains(">&lt;/svg&gt;<"), "{file}");
        assert_eq!(file.matches("</svg>").count(), 1);
    }
}
