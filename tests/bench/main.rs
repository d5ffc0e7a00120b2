//! `exproto-bench` against a real gateway and broker: that it counts right and says what
//! is wrong. How fast anything is does not matter here.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

#[path = "../common/mod.rs"]
mod common;
mod scene;
mod trouble;

use std::process::Stdio;

use bytes::{Bytes, BytesMut};
use common::{Adapter, Broker, Call, Handler, Plan, within};
use exproto_sidecar::gateway::Gateway;
use scene::{Scene, finish};
use serde_json::Value;
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;

/// So many messages were sent, and each arrived once.
#[track_caller]
fn assert_counts(report: &Value, messages: u64) {
    let counts = &report["messages"];
    assert_eq!(counts["sent"], messages, "{report:#}");
    assert_eq!(counts["arrived"], messages, "{report:#}");
    for nothing in [
        "lost",
        "duplicated",
        "late",
        "unknown",
        "not_sent",
        "out_of_order",
        "under_way_at_the_end",
        "lost_while_warming_up",
    ] {
        assert_eq!(counts[nothing], 0, "{nothing} {report:#}");
    }
    assert_eq!(report["handler"]["failed_calls"], 0, "{report:#}");
    assert_eq!(report["connections"]["closed_by_gateway"], 0, "{report:#}");
    assert!(report["latency_us"]["p99"].as_f64().unwrap() > 0.0);
    assert!(report["throughput"].as_f64().unwrap() > 0.0);
}

#[tokio::test]
async fn uplink_in_a_closed_loop() {
    let scene = Scene::start().await;
    let pid = std::process::id();
    let arguments = format!(
        "uplink --devices 7 --window 3 --peers 2 --messages 500 --warmup 100ms --pid gateway={pid}"
    );
    let report = scene.run(&arguments).await;
    assert_counts(&report, 500);
    assert_eq!(report["connections"]["opened"], 7);
    let names = report["processes"].as_array().unwrap().iter();
    let names: Vec<&Value> = names.map(|process| &process["name"]).collect();
    assert_eq!(names, ["gateway", "bench"]);
    assert!(report["processes"][0]["memory"]["end"].as_u64() > Some(1 << 20));
}

#[tokio::test]
async fn uplink_in_an_open_loop() {
    let scene = Scene::start().await;
    let report = scene
        .run("uplink --devices 3 --rate 400 --messages 200 --warmup 0s --qos 0")
        .await;
    assert_counts(&report, 200);
    // The last was due half a second after the first, less one interval: no earlier.
    assert!(report["measured_s"].as_f64().unwrap() > 0.49, "{report:#}");
}

#[tokio::test]
async fn echo_over_every_transport() {
    let scene = Scene::start().await;
    let ca = scene.file("authority.pem");
    for more in [
        "tcp".to_owned(),
        "ssl".to_owned(),
        format!("ssl --ca {ca}"),
        "udp --window 4".to_owned(),
        "dtls --window 4".to_owned(),
        format!("dtls --window 4 --ca {ca}"),
        "dtls --window 4 --psk bench:00ff10".to_owned(),
    ] {
        let report = scene
            .run(&format!(
                "echo --devices 4 --messages 200 --warmup 0s --transport {more}"
            ))
            .await;
        assert_counts(&report, 200);
    }
}

#[tokio::test]
async fn large_messages_pass_whole() {
    let scene = Scene::start().await;
    let report = scene
        .run("echo --devices 2 --payload 200000 --window 2 --messages 20 --warmup 0s")
        .await;
    assert_counts(&report, 20);
}

#[tokio::test]
async fn downlink_at_every_qos() {
    let scene = Scene::start().await;
    for qos in 0..3 {
        let report = scene
            .run(&format!(
                "downlink --devices 5 --window 2 --messages 300 --qos {qos}"
            ))
            .await;
        assert_counts(&report, 300);
    }
}

#[tokio::test]
async fn fan_out_to_everybody() {
    let scene = Scene::start().await;
    let report = scene
        .run("fanout --devices 30 --messages 20 --warmup 0s --window 2")
        .await;
    assert_counts(&report, 600);
    assert_eq!(report["fan_out"]["published"], 20);
    assert_eq!(report["fan_out"]["reached_every_device"], 20);
}

/// The older service of the interface.
#[tokio::test]
async fn the_handler_serves_streams_too() {
    let scene = Scene::with(&[("HANDLER__SERVICE_NAME", "ConnectionHandler")]).await;
    let report = scene
        .run("uplink --devices 5 --messages 200 --warmup 0s")
        .await;
    assert_counts(&report, 200);
}

#[tokio::test]
async fn idle_connections_and_a_storm() {
    let scene = Scene::start().await;
    let chart = scene.file("chart.svg");
    let report = scene.run("idle --devices 40 --duration 100ms").await;
    assert_eq!(report["connections"]["opened"], 40);
    assert_eq!(report["connections"]["closed_by_gateway"], 0);
    assert!(report["throughput"].is_null() && report["window"].is_null());

    let report = scene
        .run(&format!(
            "storm --devices 60 --connecting 8 --chart {chart}"
        ))
        .await;
    assert_eq!(report["connections"]["opened"], 60);
    assert_eq!(report["connections"]["failed"], 0);
    assert!(report["window"].is_null() && report["payload"].is_null());
    // Shorter than a second, and there is something to see.
    let chart = std::fs::read_to_string(chart).unwrap();
    assert!(chart.starts_with("<svg"));
    assert!(!chart.contains("points=\"\""), "{chart}");
    assert!(!report["samples"].as_array().unwrap().is_empty());

    let report = scene.run("storm --bare --devices 50 --rate 200").await;
    assert_eq!(report["connections"]["opened"], 50);
    let seconds = report["connections"]["opening_s"].as_f64().unwrap();
    assert!(seconds > 0.24, "faster than it should: {report:#}");
}

/// What a signal ends is reported.
#[tokio::test]
async fn ctrl_c_ends_it_with_what_was_measured() {
    let scene = Scene::start().await;
    let mut bench = scene
        .command("echo --devices 2 --warmup 0s --duration 60m")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut progress = BufReader::new(bench.stderr.take().unwrap()).lines();
    let shown = within("progress", async {
        loop {
            let line = progress.next_line().await.unwrap().unwrap();
            if line.contains("measuring") {
                return line;
            }
        }
    });
    assert!(shown.await.contains("p99"));
    let id = bench.id().unwrap().to_string();
    let sent = Command::new("kill").args(["-INT", &id]).status().await;
    assert!(sent.unwrap().success());
    let output = within("the bench to end", bench.wait_with_output());
    let output = output.await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.contains("ended early: SIGINT"), "{text}");
    let report = scene.report();
    assert_eq!(report["ended_early"], "SIGINT");
    assert!(report["messages"]["arrived"].as_u64() > Some(0));
}

/// A handler that was written from what `--help` says of the protocol.
#[tokio::test]
async fn a_handler_of_your_own() {
    let broker = Broker::start().await;
    let handler = Handler::start().await;
    let plan = Plan::new(&broker.url(), &handler.url());
    let gateway = Gateway::start(&plan.config()).await.unwrap();
    within("the gateway to be ready", gateway.ready()).await;
    let adapter = Adapter::connect(gateway.addresses().adapter.tcp().unwrap()).await;
    handler.behave(move |event| {
        let adapter = adapter.clone();
        async move {
            if let Call::Bytes(bytes) = event.call {
                adapter.send(&event.conn, answers(bytes)).await.ok();
            }
            Ok(())
        }
    });
    let dir = TempDir::new().unwrap();
    let file = dir.path().join("report.json");
    let device = gateway.addresses().listeners["tcp.default"];
    let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
    command
        .args([
            "echo",
            "--handler",
            "none",
            "--gateway",
            &device.to_string(),
        ])
        .args(["--devices", "3", "--messages", "100", "--warmup", "0s"])
        .args(["--window", "1", "--json", &file.display().to_string()]);
    let output = finish(command).await;
    assert_eq!(output.status.code(), Some(0), "{output:#?}");
    let report = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_counts(&report, 100);
}

/// W to each H, and each E as it is. With a window of one, frames are whole.
fn answers(mut bytes: Bytes) -> Bytes {
    let mut all = BytesMut::new();
    while bytes.len() >= 24 {
        let length = u32::from_be_bytes(bytes[..4].try_into().unwrap());
        let frame = bytes.split_to(4 + length as usize);
        match frame[4] {
            b'H' => {
                all.extend_from_slice(&20_u32.to_be_bytes());
                all.extend_from_slice(b"W");
                all.extend_from_slice(&frame[5..24]);
            }
            b'E' => all.extend_from_slice(&frame),
            other => panic!("a frame of kind {other}"),
        }
    }
    all.freeze()
}
