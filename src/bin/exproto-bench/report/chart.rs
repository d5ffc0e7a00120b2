//! The report as a drawing: what was done each second, and how latency is spread.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{Report, per_second, text};
use crate::options::Scenario;

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 560.0;

/// Percentiles at the lower edge of the second panel; each as far from the last as its
/// rest is a tenth of it.
const TICKS: [(f64, &str); 6] = [
    (0.0, "0 %"),
    (50.0, "50 %"),
    (90.0, "90 %"),
    (99.0, "99 %"),
    (99.9, "99.9 %"),
    (99.99, "99.99 %"),
];

/// Lines at which a panel can be read.
const STEPS: u32 = 4;

/// Where a panel is drawn.
struct Panel {
    left: f64,
    top: f64,
    width: f64,
    height: f64,
}

const OVER_TIME: Panel = Panel {
    left: 80.0,
    top: 70.0,
    width: 650.0,
    height: 180.0,
};

const SPREAD: Panel = Panel {
    left: 80.0,
    top: 320.0,
    width: 650.0,
    height: 190.0,
};

impl Panel {
    /// A point by its shares of width and height, from the lower left.
    fn at(&self, x: f64, y: f64) -> (f64, f64) {
        (
            self.left + self.width * x.clamp(0.0, 1.0),
            self.top + self.height * (1.0 - y.clamp(0.0, 1.0)),
        )
    }
}

/// An SVG document.
pub fn render(report: &Report) -> String {
    let mut svg = String::new();
    // Writing to a string cannot fail.
    let _ = draw(report, &mut svg);
    svg
}

fn draw(report: &Report, out: &mut String) -> std::fmt::Result {
    writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" \
         font-family=\"sans-serif\" font-size=\"12\" fill=\"#333\">\n\
         <rect width=\"{WIDTH}\" height=\"{HEIGHT}\" fill=\"#fff\"/>"
    )?;
    let summary = text::render(report);
    let title = summary.lines().next().unwrap_or_default();
    label(out, (20.0, 28.0), "start", 16, title)?;
    over_time(report, out)?;
    spread(&report.latency, report.options.scenario, out)?;
    writeln!(out, "</svg>")
}

/// What was done each second.
fn over_time(report: &Report, out: &mut String) -> std::fmt::Result {
    let what = match report.options.scenario {
        Scenario::Storm | Scenario::Idle => "connections a second",
        _ => "messages a second",
    };
    let panel = &OVER_TIME;
    label(out, (panel.left, panel.top - 10.0), "start", 12, what)?;
    let rates = report.samples.iter();
    // A step for each: also a run of less than a second has one.
    let rates: Vec<(Duration, f64)> = rates
        .flat_map(|sample| {
            let rate = per_second(sample.done, sample.length);
            [sample.at.saturating_sub(sample.length), sample.at].map(|at| (at, rate))
        })
        .collect();
    let highest = rates.iter().map(|(_, rate)| *rate).fold(0.0, f64::max);
    let highest = round_up(highest);
    let end = report.samples.last().map_or(1.0, |s| s.at.as_secs_f64());
    for step in 0..=STEPS {
        let share = f64::from(step) / f64::from(STEPS);
        grid(out, panel, share, &format!("{:.0}", highest * share))?;
    }
    for step in 0..=STEPS {
        let share = f64::from(step) / f64::from(STEPS);
        let (x, y) = panel.at(share, 0.0);
        label(
            out,
            (x, y + 16.0),
            "middle",
            11,
            &format!("{:.1} s", end * share),
        )?;
    }
    let points = rates
        .iter()
        .map(|(at, rate)| panel.at(at.as_secs_f64() / end, rate / highest));
    line(out, points)
}

/// How long how many took.
fn spread(histogram: &Histogram<u64>, scenario: Scenario, out: &mut String) -> std::fmt::Result {
    let panel = &SPREAD;
    if histogram.is_empty() {
        return Ok(());
    }
    let what = match scenario {
        Scenario::Storm => "time until a connection was answered, by percentile",
        _ => "latency by percentile",
    };
    label(out, (panel.left, panel.top - 10.0), "start", 12, what)?;
    // Decades from the fastest to the slowest.
    let low = decade(histogram.min()).floor();
    let high = decade(histogram.max()).ceil().max(low + 1.0);
    let mut power = low;
    while power <= high {
        let value = Duration::from_secs_f64(10_f64.powf(power) / 1e9);
        grid(out, panel, (power - low) / (high - low), &text::time(value))?;
        power += 1.0;
    }
    for (percentile, name) in TICKS {
        let (x, y) = panel.at(place(percentile), 0.0);
        label(out, (x, y + 16.0), "middle", 11, name)?;
    }
    let points = (0..=200_u32).map(|step| {
        let share = f64::from(step) / 200.0;
        let value = histogram.value_at_percentile(percentile_at(share));
        panel.at(share, (decade(value) - low) / (high - low))
    });
    line(out, points)
}

/// Where a percentile is drawn: 0 to 1, with 99.99 % at the right edge.
fn place(percentile: f64) -> f64 {
    -(1.0 - percentile / 100.0).log10() / 4.0
}

/// The percentile at a place.
fn percentile_at(place: f64) -> f64 {
    100.0 * (1.0 - 10_f64.powf(-4.0 * place))
}

/// The logarithm of nanoseconds.
#[allow(clippy::cast_precision_loss)]
fn decade(nanos: u64) -> f64 {
    (nanos.max(1) as f64).log10()
}

/// The next of 1, 2, 5, 10, 20 ...: a scale that reads well.
fn round_up(value: f64) -> f64 {
    if value <= 1.0 {
        return 1.0;
    }
    let power = 10_f64.powf(value.log10().floor());
    let steps = [1.0, 2.0, 5.0, 10.0];
    let fits = steps.into_iter().find(|step| step * power >= value);
    fits.unwrap_or(10.0) * power
}

fn grid(out: &mut String, panel: &Panel, share: f64, name: &str) -> std::fmt::Result {
    let ((x1, y), (x2, _)) = (panel.at(0.0, share), panel.at(1.0, share));
    writeln!(
        out,
        "<line x1=\"{x1:.1}\" y1=\"{y:.1}\" x2=\"{x2:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>"
    )?;
    label(out, (x1 - 8.0, y + 4.0), "end", 11, name)
}

fn line(out: &mut String, points: impl Iterator<Item = (f64, f64)>) -> std::fmt::Result {
    let points: Vec<String> = points.map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
    writeln!(
        out,
        "<polyline points=\"{}\" fill=\"none\" stroke=\"#1663a6\" stroke-width=\"2\"/>",
        points.join(" ")
    )
}

fn label(
    out: &mut String,
    (x, y): (f64, f64),
    anchor: &str,
    size: u32,
    text: &str,
) -> std::fmt::Result {
    let text = text
        .replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;");
    writeln!(
        out,
        "<text x=\"{x:.1}\" y=\"{y:.1}\" text-anchor=\"{anchor}\" font-size=\"{size}\">{text}</text>"
    )
}

#[cfg(test)]
mod tests {
    use super::super::tests::report;
    use super::*;

    #[test]
    fn percentiles_are_spread_by_what_is_left() {
        let places: Vec<f64> = TICKS.iter().map(|(p, _)| place(*p)).collect();
        assert!(places.is_sorted());
        for (wanted, found) in [0.0, 0.075, 0.25, 0.5, 0.75, 1.0].into_iter().zip(places) {
            assert!((wanted - found).abs() < 0.001, "{wanted} {found}");
            assert!((place(percentile_at(wanted)) - wanted).abs() < 1e-9);
        }
    }

    #[test]
    fn scales_end_in_round_numbers() {
        let scales = [0.0, 1.0, 1.1, 3.0, 9_999.0, 10_000.0, 11_000.0].map(round_up);
        let expected = [1.0, 1.0, 2.0, 5.0, 10_000.0, 10_000.0, 20_000.0];
        for (found, wanted) in scales.into_iter().zip(expected) {
            assert!((found - wanted).abs() < 1e-6, "{found} {wanted}");
        }
    }

    /// Everything that is drawn lies within the drawing, and the text is escaped.
    #[test]
    fn a_report_is_drawn() {
        let svg = render(&report());
        assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<polyline").count(), 2);
        assert!(svg.contains("echo over tcp, 3 devices") && svg.contains("99.9 %"));
        for points in svg.split("points=\"").skip(1) {
            let points = points.split('"').next().unwrap();
            assert!(points.split(' ').count() > 1);
            for point in points.split([' ', ',']) {
                let number: f64 = point.parse().unwrap();
                assert!((0.0..=WIDTH).contains(&number), "{number}");
            }
        }
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }

    #[test]
    fn a_single_sample_is_a_line() {
        let mut short = report();
        short.samples.truncate(1);
        let svg = render(&short);
        // 400 of 500 a second, all along.
        assert!(svg.contains("points=\"80.0,106.0 730.0,106.0\""), "{svg}");
    }

    #[test]
    fn an_empty_report_is_drawn_too() {
        let mut empty = report();
        empty.samples.clear();
        empty.latency.reset();
        let svg = render(&empty);
        assert_eq!(svg.matches("<polyline").count(), 1);
        assert!(!svg.contains("NaN") && !svg.contains("inf"));
    }
}
