//! The report for a program. Times are in microseconds unless their name says otherwise,
//! memory is in bytes.

use std::time::Duration;

use hdrhistogram::Histogram;
use serde_json::{Map, Value, json};

use super::{PERCENTILES, ProcessReport, Report, per_second};
use crate::options::Scenario;

/// All of it.
pub fn render(report: &Report) -> Value {
    let options = &report.options;
    let counts = &report.counts;
    let messages = options.scenario.has_messages();
    let processes = report.processes.iter();
    let samples = report.samples.iter().map(|sample| {
        json!({
            "at_s": sample.at.as_secs_f64(),
            "phase": sample.phase,
            "per_second": per_second(sample.done, sample.length),
            "p50_us": sample.p50.map(micros),
            "p99_us": sample.p99.map(micros),
            "outstanding": sample.outstanding,
            "lost": sample.lost,
            "processes": sample.processes.iter().zip(&report.processes).map(|(usage, process)| {
                json!({
                    "name": process.name,
                    "cpu": usage.and_then(|(cpu, _)| cpu),
                    "memory": usage.map(|(_, memory)| memory),
                })
            }).collect::<Vec<_>>(),
        })
    });
    json!({
        "version": env!("CARGO_PKG_VERSION"),
        "scenario": options.scenario.name(),
        "transport": options.transport.name(),
        "gateway": options.gateway,
        "devices": options.devices,
        "payload": messages.then_some(options.payload),
        "qos": messages.then_some(options.qos),
        "window": (messages && options.rate.is_none()).then(|| options.window()),
        "rate": options.rate,
        "built_in_handler": options.has_handler(),
        "bench_threads": options.threads(),
        "processors": std::thread::available_parallelism().map_or(0, usize::from),
        "ended_early": report.ended_early,
        "measured_s": report.measured.as_secs_f64(),
        "throughput": (options.scenario != Scenario::Idle).then(|| report.throughput()),
        "messages": {
            "completed": counts.completed,
            "sent": counts.sent,
            "arrived": counts.arrived,
            "lost": counts.lost,
            "lost_while_warming_up": counts.lost_before,
            "under_way_at_the_end": counts.unsettled,
            "duplicated": counts.duplicated,
            "late": counts.late,
            "out_of_order": counts.out_of_order,
            "unknown": counts.unknown,
            "not_sent": counts.skipped,
        },
        "fan_out": (options.scenario == Scenario::Fanout).then(|| json!({
            "published": counts.published,
            "reached_every_device": counts.complete,
            "latency_us": latency(&report.to_all),
        })),
        "connections": {
            "opened": counts.connected,
            "failed": counts.refused,
            "closed_by_gateway": counts.closed,
            "opening_s": report.connecting.as_secs_f64(),
            "per_second": per_second(counts.connected, report.connecting),
        },
        "latency_us": latency(&report.latency),
        "processes": processes.map(|process| of_process(process, report)).collect::<Vec<_>>(),
        "handler": {
            "callbacks": report.callbacks,
            "messages_per_callback": report.messages_each_callback(),
            "failed_calls": report.failures,
            "first_failure": report.trouble,
        },
        "samples": samples.collect::<Vec<_>>(),
    })
}

fn of_process(process: &ProcessReport, report: &Report) -> Value {
    let per_unit = match report.options.scenario {
        Scenario::Storm => "cpu_us_per_connection",
        _ => "cpu_us_per_message",
    };
    json!({
        "name": process.name,
        "cpu": process.processors(report.measured),
        "cpu_s": process.cpu.map(|cpu| cpu.as_secs_f64()),
        per_unit: process.cpu_each(report.units()).map(in_micros),
        "memory": {
            "before": process.before,
            "connected": process.connected,
            "end": process.end,
            "per_connection": process.memory_each(report.options.scenario, report.counts.connected),
        },
    })
}

fn latency(histogram: &Histogram<u64>) -> Value {
    if histogram.is_empty() {
        return Value::Null;
    }
    let mut all = Map::new();
    for percentile in PERCENTILES {
        let value = micros(histogram.value_at_percentile(percentile));
        all.insert(format!("p{percentile}"), json!(value));
    }
    all.insert("min".to_owned(), json!(micros(histogram.min())));
    all.insert("mean".to_owned(), json!(histogram.mean() / 1e3));
    all.insert("max".to_owned(), json!(micros(histogram.max())));
    Value::Object(all)
}

fn micros(nanos: u64) -> f64 {
    in_micros(Duration::from_nanos(nanos))
}

fn in_micros(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}
