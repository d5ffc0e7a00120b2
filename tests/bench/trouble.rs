//! What the bench says where something is missing or wrong, and its exit codes.

use std::net::{TcpListener, UdpSocket};
use std::process::Stdio;

use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Command;
use tokio::time::Instant;

use crate::assert_counts;
use crate::common::{Proxy, free_port, within};
use crate::scene::{Scene, finish};

/// Runs it with these arguments and nothing else there, and gives the exit code and what it
/// says.
async fn alone(arguments: &str) -> (i32, String) {
    let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
    command.args(arguments.split_ascii_whitespace());
    let output = finish(command).await;
    let said = String::from_utf8(output.stderr).unwrap();
    (output.status.code().unwrap(), said)
}

#[tokio::test]
async fn what_is_missing_is_said() {
    let scene = Scene::start().await;
    let nobody = format!("127.0.0.1:{}", free_port());
    let here = scene.handler.clone();

    let (code, said) = scene.fail("echo --payload 5").await;
    assert!(code == 2 && said.contains("--payload"), "{code} {said}");

    let without_gateway = |option: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
        command.args(["echo", "--handler", &here, option, &nobody]);
        command
    };
    let output = finish(without_gateway("--adapter")).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(said.contains("adapter") && said.contains(&nobody), "{said}");

    let other = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = other.local_addr().unwrap();
    let (code, said) = scene.fail(&format!("echo --handler {taken}")).await;
    assert!(
        code == 4 && said.contains(&taken.to_string()),
        "{code} {said}"
    );
    drop(other);

    // The gateway calls another address than that at which the bench listens.
    let (code, said) = scene
        .fail(&format!("echo --handler {nobody} --ready-timeout 500ms"))
        .await;
    assert!(
        code == 6 && said.contains("has not called"),
        "{code} {said}"
    );
}

#[tokio::test]
async fn a_broker_or_gateway_that_is_not_there_is_told_apart() {
    let mut scene = Scene::start().await;
    scene.broker.kill();
    let (code, said) = scene.fail("uplink").await;
    assert!(code == 5 && said.contains("MQTT broker"), "{code} {said}");
    // Nothing of an echo passes the broker.
    let report = scene
        .run("echo --messages 50 --devices 2 --warmup 0s")
        .await;
    assert_counts(&report, 50);

    let nobody = free_port();
    let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
    command
        .args(["echo", "--gateway", &format!("127.0.0.1:{nobody}")])
        .args(["--handler", "none"]);
    let output = finish(command).await;
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(3), "{said}");
    assert!(said.contains(&nobody.to_string()), "{said}");
}

/// A gateway that was without a handler tries it again after a pause. That is waited for, and
/// is no part of what is measured.
#[tokio::test]
async fn the_clock_starts_when_the_gateway_has_found_the_handler() {
    let handler = free_port();
    let proxy = Proxy::to(handler).await;
    proxy.cut();
    let address = format!("http://127.0.0.1:{}", proxy.port);
    let scene = Scene::with(&[("HANDLER__ADDRESS", &address)]).await;
    let mut bench = scene
        .command(&format!("storm --devices 30 --handler 127.0.0.1:{handler}"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut progress = BufReader::new(bench.stderr.take().unwrap()).lines();
    let said = within("a word on it", progress.next_line()).await.unwrap();
    let said = said.unwrap();
    let of_it = format!("calls the handler at 127.0.0.1:{handler}");
    assert!(
        said.starts_with("waiting") && said.contains(&of_it),
        "{said}"
    );
    // The pauses are long by now.
    proxy.dialled(4).await;
    let mended = Instant::now();
    proxy.mend();
    let output = within("the bench to end", bench.wait_with_output());
    assert_eq!(output.await.unwrap().status.code(), Some(0));
    let since = mended.elapsed().as_secs_f64();
    let report = scene.report();
    assert_eq!(report["connections"]["opened"], 30);
    let slowest = report["latency_us"]["max"].as_f64().unwrap() / 1e6;
    let opening = report["connections"]["opening_s"].as_f64().unwrap();
    assert!(slowest <= opening && opening < since, "{report:#}");
}

/// Devices that a limit of the listener turns away are counted, and it is no success.
#[tokio::test]
async fn a_storm_that_is_turned_away_says_why() {
    let scene = Scene::with(&[("LISTENERS__TCP__DEFAULT__MAX_CONNECTIONS", "20")]).await;
    let (code, said) = scene.fail("storm --devices 60").await;
    let report = scene.report();
    let opened = report["connections"]["opened"].as_u64().unwrap();
    let failed = report["connections"]["failed"].as_u64().unwrap();
    assert!((1..=20).contains(&opened), "{report:#}");
    assert_eq!(opened + failed, 60);
    assert_eq!(code, 3, "{said}");
    let told = format!("{failed} of 60 connections were not opened");
    assert!(said.contains(&told), "{said}");
    assert!(
        said.contains("max_conn_rate") && said.contains("max_connections"),
        "{said}"
    );
    // Also where there is room for a few of the devices that go ahead.
    let scene = Scene::with(&[("LISTENERS__TCP__DEFAULT__MAX_CONNECTIONS", "2")]).await;
    let (code, said) = scene.fail("idle --devices 9 --duration 1ms").await;
    assert!(
        code == 3 && said.contains("max_connections"),
        "{code} {said}"
    );
}

/// What would spoil the end of a run is found out before it: there is no gateway here, which
/// would be said otherwise.
#[tokio::test]
async fn what_cannot_be_reported_is_said_at_once() {
    let dir = TempDir::new().unwrap();
    let at = dir.path().display();
    for (options, code, part) in [
        ("--chart x.png".to_owned(), 2, "must end in .svg"),
        (format!("--json {at}/none/x.json"), 1, "cannot be written"),
        (format!("--chart {at}/none/x.svg"), 1, "cannot be written"),
        (format!("--json {at}"), 1, "cannot be written"),
        (
            "--pid gateway=4194305".to_owned(),
            2,
            "--pid gateway=4194305",
        ),
    ] {
        let nobody = free_port();
        let end = alone(&format!("echo --adapter 127.0.0.1:{nobody} {options}")).await;
        assert!(end.0 == code && end.1.contains(part), "{options}: {end:?}");
    }
    // A run that comes to nothing leaves no file, and none changed.
    std::fs::write(dir.path().join("old.json"), "old").unwrap();
    for name in ["old.json", "new.json"] {
        let nobody = free_port();
        let gateway = format!("--handler none --gateway 127.0.0.1:{nobody}");
        let end = alone(&format!("echo {gateway} --json {at}/{name}")).await;
        assert_eq!(end.0, 3, "{end:?}");
    }
    let old = std::fs::read_to_string(dir.path().join("old.json"));
    assert_eq!(old.unwrap(), "old");
    assert!(!dir.path().join("new.json").exists());
}

/// A gateway that hangs takes what the kernel takes for it: connections and datagrams.
#[tokio::test]
async fn a_gateway_that_hangs_gives_no_answer() {
    let limits = "--timeout 300ms --ready-timeout 300ms";
    // Nobody accepts.
    let frozen = TcpListener::bind("127.0.0.1:0").unwrap();
    let (adapter, handler) = (frozen.local_addr().unwrap(), free_port());
    let both = format!("--handler 127.0.0.1:{handler} --adapter {adapter}");
    let (code, said) = alone(&format!("echo {both} {limits}")).await;
    let told = said.contains("adapter") && said.contains("no answer to a call");
    assert!(code == 3 && told, "{code} {said}");

    let device = UdpSocket::bind("127.0.0.1:0").unwrap();
    let silent = device.local_addr().unwrap();
    let scene = Scene::start().await;
    let adapter = scene.gateway.addresses().adapter.clone();
    for handler in [
        "none".to_owned(),
        format!("{} --adapter {adapter}", scene.handler),
    ] {
        let arguments = format!("--transport udp --gateway {silent} --handler {handler}");
        let (code, said) = alone(&format!("echo {arguments} {limits}")).await;
        let told = said.contains(&silent.to_string()) && said.contains("no answer within 300ms");
        assert!(
            code == 6 && told && !said.contains("refused"),
            "{code} {said}"
        );
    }
}
