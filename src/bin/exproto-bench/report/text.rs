//! The report for a person.

use std::fmt::Write;
use std::time::Duration;

use hdrhistogram::Histogram;

use super::{PERCENTILES, Report};
use crate::options::Scenario;

/// All of it, ended by a newline.
pub fn render(report: &Report) -> String {
    let mut text = String::new();
    // Writing to a string cannot fail.
    let _ = write_all(report, &mut text);
    text
}

fn write_all(report: &Report, out: &mut String) -> std::fmt::Result {
    let options = &report.options;
    let scenario = options.scenario;
    let (name, transport) = (scenario.name(), options.transport.name());
    write!(out, "{name} over {transport}, {} devices", options.devices)?;
    if scenario.has_messages() {
        write!(out, ", {} bytes, QoS {}", options.payload, options.qos)?;
        match options.rate {
            Some(rate) => write!(out, ", open loop at {rate}/s")?,
            None => write!(out, ", closed loop, window {}", options.window())?,
        }
    }
    writeln!(out)?;
    if let Some(reason) = &report.ended_early {
        writeln!(out, "  ended early: {reason}")?;
    }
    connections(report, out)?;
    if scenario.has_messages() {
        messages(report, out)?;
    }
    if scenario != Scenario::Idle {
        let what = match scenario {
            Scenario::Storm => "until answered",
            _ => "latency",
        };
        latencies(what, &report.latency, out)?;
    }
    if scenario == Scenario::Fanout {
        latencies("to all", &report.to_all, out)?;
    }
    for process in &report.processes {
        let mut parts = Vec::new();
        if let Some(share) = process.processors(report.measured) {
            parts.push(format!("{:.0} % of a processor", 100.0 * share));
        }
        let unit = match scenario {
            Scenario::Storm => "connection",
            _ => "message",
        };
        if let Some(each) = process.cpu_each(report.units()) {
            parts.push(format!("{} a {unit}", time(each)));
        } else if process.is_too_short() && report.units() > 0 {
            parts.push(format!("too short to tell for a {unit}"));
        }
        if let Some(end) = process.end {
            parts.push(bytes(end));
        }
        if let Some(each) = process.memory_each(report.options.scenario, report.counts.connected) {
            parts.push(format!("{} a connection", bytes(each)));
        }
        if parts.is_empty() {
            parts.push("cannot be read, or has ended".to_owned());
        }
        line(out, &process.name, &parts.join(", "))?;
    }
    if let Some(each) = report.messages_each_callback() {
        let text = format!("{} callbacks, {each:.1} messages each", report.callbacks);
        line(out, "handler", &text)?;
    }
    if let Some(trouble) = &report.trouble {
        let text = format!("{} calls failed, the first: {trouble}", report.failures);
        line(out, "handler", &text)?;
    }
    Ok(())
}

fn connections(report: &Report, out: &mut String) -> std::fmt::Result {
    let counts = &report.counts;
    let rate = super::per_second(counts.connected, report.connecting);
    let mut text = format!(
        "{} opened in {}, {rate:.0}/s",
        counts.connected,
        time(report.connecting)
    );
    for (count, what) in [
        (counts.refused, "failed"),
        (counts.closed, "closed by the gateway"),
    ] {
        if count > 0 {
            write!(text, ", {count} {what}")?;
        }
    }
    line(out, "connections", &text)
}

fn messages(report: &Report, out: &mut String) -> std::fmt::Result {
    let counts = &report.counts;
    let text = format!(
        "{:.0} messages/s over {}",
        report.throughput(),
        time(report.measured)
    );
    line(out, "throughput", &text)?;
    if report.options.scenario == Scenario::Fanout {
        let text = format!(
            "{}, {} reached every device",
            counts.published, counts.complete
        );
        line(out, "published", &text)?;
    }
    let mut text = format!(
        "{} sent, {} arrived, {} lost, {} duplicated",
        counts.sent, counts.arrived, counts.lost, counts.duplicated
    );
    for (count, what) in [
        (counts.unsettled, "under way at the end"),
        (counts.lost_before, "lost while warming up"),
        (counts.late, "late"),
        (counts.out_of_order, "out of order"),
        (counts.unknown, "unknown"),
        (counts.skipped, "not sent, too many under way"),
    ] {
        if count > 0 {
            write!(text, ", {count} {what}")?;
        }
    }
    line(out, "messages", &text)
}

fn latencies(what: &str, histogram: &Histogram<u64>, out: &mut String) -> std::fmt::Result {
    if histogram.is_empty() {
        return line(out, what, "nothing measured");
    }
    let mut parts: Vec<String> = PERCENTILES
        .iter()
        .map(|percentile| {
            let value = histogram.value_at_percentile(*percentile);
            format!("p{percentile} {}", time(Duration::from_nanos(value)))
        })
        .collect();
    parts.push(format!(
        "max {}",
        time(Duration::from_nanos(histogram.max()))
    ));
    line(out, what, &parts.join("  "))
}

fn line(out: &mut String, name: &str, text: &str) -> std::fmt::Result {
    writeln!(out, "  {name:<15} {text}")
}

/// A time with three digits or so.
pub fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    let (value, unit) = if seconds >= 1.0 {
        (seconds, "s")
    } else if seconds >= 1e-3 {
        (seconds * 1e3, "ms")
    } else {
        (seconds * 1e6, "µs")
    };
    let digits = match value {
        0.0 => 0,
        v if v < 10.0 => 2,
        v if v < 100.0 => 1,
        _ => 0,
    };
    format!("{value:.digits$} {unit}")
}

/// Bytes in binary units.
#[allow(clippy::cast_precision_loss)]
pub fn bytes(bytes: u64) -> String {
    let kib = bytes as f64 / 1024.0;
    if kib < 1024.0 {
        format!("{kib:.1} KiB")
    } else {
        format!("{:.1} MiB", kib / 1024.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        let times = [
            0,
            950,
            12_345,
            999_000,
            1_500_000,
            75_000_000,
            2_000_000_000,
        ];
        let texts = times.map(|nanos| time(Duration::from_nanos(nanos)));
        let expected = [
            "0 µs", "0.95 µs", "12.3 µs", "999 µs", "1.50 ms", "75.0 ms", "2.00 s",
        ];
        assert_eq!(texts, expected);
        assert_eq!(bytes(512), "0.5 KiB");
        assert_eq!(bytes(5 << 20), "5.0 MiB");
    }
}
