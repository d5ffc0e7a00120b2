//! What a session of one's own at the broker costs (`broker.mode = "per_client"`), beside the
//! pool: `cargo bench --bench sessions`.
//!
//! Method: the gateway runs as a program of its own, beside a real Mosquitto and a handler
//! that authenticates each device and subscribes it to one filter. SESSIONS devices over TCP
//! connect, fifty at a time, after FIRST that are not counted. The gateway's resident set
//! (VmRSS of /proc/PID/status) is read before and after, when nothing has come from a device
//! for IDLE: the difference, divided by SESSIONS, is what one costs. That is allocator,
//! runtime, tables and the connection of the device itself, which the line of the pool shows
//! alone; the kernel's buffers are not in it. Processor time is the gateway's during that
//! time, in which each session pings once (keep_alive is 30 s); the time to open all is from
//! the first connect to the last answer to a Subscribe, and most of it is the broker's and
//! this program's. At the end each device gets a message, so that none of them is a dead one.
//!
//! `EXPROTO_BENCH_SESSIONS=5000`, `EXPROTO_BENCH_MODES=pool,per_client`.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    missing_docs
)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use common::{Adapter, Broker, Device, Handler, Peer, Plan, Process};

/// Sessions that are opened at the same time.
const AT_ONCE: usize = 50;

/// Between two readings nothing happens for so long.
const IDLE: Duration = Duration::from_secs(30);

/// Devices that are there before it is measured.
const FIRST: usize = 500;

/// Of the clock of /proc/PID/stat: USER_HZ, which Linux has fixed.
const TICKS_A_SECOND: f64 = 100.0;

fn variable(name: &str, default: &str) -> String {
    std::env::var(format!("EXPROTO_BENCH_{name}")).unwrap_or_else(|_| default.to_owned())
}

/// A number of /proc/PID/status.
fn status(pid: u32, name: &str) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix(name));
    let number = line.unwrap().trim_start_matches(':').split_whitespace();
    number.into_iter().next().unwrap().parse().unwrap()
}

/// Seconds of processor time since the start.
fn processor(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    // The name may hold anything; what follows it does not.
    let fields: Vec<&str> = stat
        .rsplit(')')
        .next()
        .unwrap()
        .split_whitespace()
        .collect();
    let ticks: f64 = fields[11..13]
        .iter()
        .map(|ticks| ticks.parse::<f64>().unwrap())
        .sum();
    ticks / TICKS_A_SECOND
}

struct Scene {
    handler: Handler,
    adapter: Adapter,
    address: SocketAddr,
}

impl Scene {
    async fn open(&self, number: usize) -> Device {
        let mut device = Device::dial(self.address).await;
        device.conn = self.handler.created(device.port()).await;
        let clientid = format!("device-{number}");
        self.adapter
            .authenticate(&device.conn, &clientid)
            .await
            .ok();
        let filter = format!("down/{number}");
        self.adapter.subscribe(&device.conn, &filter, 1).await.ok();
        device
    }

    async fn fill(&self, devices: &mut Vec<Device>, total: usize) {
        for first in (devices.len()..total).step_by(AT_ONCE) {
            let numbers = first..total.min(first + AT_ONCE);
            let opened = numbers.map(|number| self.open(number));
            devices.extend(futures_util::future::join_all(opened).await);
        }
    }
}

async fn run(mode: &str, sessions: usize) {
    let broker = Broker::start().await.quiet();
    let handler = Handler::start().await;
    let plan = Plan::new(&broker.url(), &handler.url()).set_all(&[
        ("BROKER__MODE", mode),
        ("BROKER__POOL_SIZE", "1"),
        ("IDLE_TIMEOUT", "1h"),
        ("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "infinity"),
    ]);
    let process = Process::run(&plan);
    let admin = process.admin().await;
    admin.ready_until(200, "ready").await;
    let scene = Scene {
        adapter: Adapter::connect(process.address("adapter on").await).await,
        address: process.address("devices on").await,
        handler,
    };
    let pid = process.id();
    let mut devices = Vec::new();
    scene.fill(&mut devices, FIRST).await;
    tokio::time::sleep(IDLE).await;
    let before = status(pid, "VmRSS");
    let began = Instant::now();
    scene.fill(&mut devices, FIRST + sessions).await;
    let opening = began.elapsed();
    // What opening has left to be done is done.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let used = processor(pid);
    tokio::time::sleep(IDLE).await;
    let idle = processor(pid) - used;
    let (after, threads) = (status(pid, "VmRSS"), status(pid, "Threads"));
    let each = (after - before) as f64 / sessions as f64;
    println!(
        "{mode:>10}: {each:.2} KiB each ({sessions} idle, {before} -> {after} KiB resident), \
         {threads} threads, {idle:.2} s of processor time in {} s, {:.1} s to open all",
        IDLE.as_secs(),
        opening.as_secs_f64()
    );
    let mut peer = Peer::connect(broker.port).await;
    for (number, device) in devices.iter().enumerate() {
        peer.publish(&format!("down/{number}"), 1, number.to_string())
            .await;
        let texts = scene.handler.payloads(&device.conn, 1).await;
        assert_eq!(texts, [number.to_string()]);
    }
}

fn main() {
    let _ = rlimit::increase_nofile_limit(u64::MAX);
    let sessions = variable("SESSIONS", "5000").parse().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .unwrap();
    for mode in variable("MODES", "pool,per_client").split(',') {
        runtime.block_on(run(mode, sessions));
    }
}
