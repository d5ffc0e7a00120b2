//! Confirmed publishes from many devices while the broker is killed again and again:
//! nothing that the handler was told SUCCESS for may be missing.
//!
//! `scripts/chaos.sh` runs it at full size and explains how it judges; without
//! variables it is short enough for every run of the tests.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::print_stdout
)]

#[path = "../common/mod.rs"]
mod common;
mod tally;
mod watcher;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use common::{Adapter, Broker, Call, Device, Event, Handler, Peer, Plan, Process, until, within};
use exproto_sidecar::proto::ResultCode;
use tally::Tally;
use tokio::time::{MissedTickBehavior, interval};
use tonic::Status;
use watcher::Watcher;

/// The size of a run.
#[derive(Clone, Copy)]
struct Size {
    devices: usize,
    /// Publishes a second, of all devices together.
    rate: usize,
    kills: usize,
    /// How long the broker works between two kills, and how long it is away.
    up: Duration,
    down: Duration,
    max_gap: Duration,
}

impl Size {
    fn from_environment() -> Self {
        let number = |name: &str, default: usize| {
            std::env::var(format!("CHAOS_{name}"))
                .map_or(default, |text| text.parse().expect("a number"))
        };
        let millis = |name: &str, default| Duration::from_millis(number(name, default) as u64);
        Self {
            devices: number("DEVICES", 20),
            rate: number("RATE", 400),
            kills: number("KILLS", 3),
            up: millis("UP_MS", 1500),
            down: millis("DOWN_MS", 500),
            max_gap: millis("MAX_GAP_MS", 2000),
        }
    }
}

/// The user's service: publishes each line of a device and waits for the broker's
/// word before it takes the next.
async fn serve(adapter: Adapter, tally: Arc<Tally>, event: Event) -> Result<(), Status> {
    match event.call {
        Call::Bytes(bytes) => {
            for line in std::str::from_utf8(&bytes).unwrap().lines() {
                if let Some(device) = line.strip_prefix("I am ") {
                    adapter.authenticate(&event.conn, device).await.ok();
                    let down = format!("down/{device}");
                    adapter.subscribe(&event.conn, &down, 1).await.ok();
                    tally.introduced();
                    continue;
                }
                let (device, number) = line.split_once(' ').unwrap();
                let topic = format!("chaos/{device}");
                let line = line.to_owned();
                let answer = adapter.publish(&event.conn, &topic, 1, line).await;
                let (device, number) = (device.parse().unwrap(), number.parse().unwrap());
                tally.answered(device, number, answer.code == ResultCode::Success);
            }
        }
        Call::Messages(messages) => {
            for message in messages {
                assert!(message.topic.starts_with("down/"), "{}", message.topic);
                tally.reached();
            }
        }
        _ => {}
    }
    Ok(())
}

/// One device: a line each tick, whole lines only, so that none is cut in two by the
/// end. Falling behind, it catches up.
async fn send(mut device: Device, number: usize, tick: Duration, stop: Arc<AtomicBool>) -> Sent {
    let mut ticks = interval(tick);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
    let mut lines = 0;
    while !stop.load(Ordering::Relaxed) {
        ticks.tick().await;
        device.send(format!("{number} {lines}\n")).await;
        lines += 1;
    }
    Sent { device, lines }
}

struct Sent {
    /// Open until everything is answered.
    device: Device,
    lines: usize,
}

/// A broker that knows the watcher's session and nothing else, whenever it starts: it
/// saves once, now, and never again.
async fn broker(devices: usize) -> (Broker, Watcher) {
    let config = "allow_anonymous true\npersistence true\npersistence_location {dir}/\n\
                  autosave_interval 0\nqueue_qos0_messages true\n";
    let mut broker = Broker::absent(config).quiet();
    broker.up().await;
    let watcher = Watcher::start(broker.port, devices);
    let mut connected = watcher.connected.clone();
    let once = connected.wait_for(|times| *times >= 1);
    within("the watcher", once).await.unwrap();
    broker.signal("USR1");
    let saved = broker.dir.path().join("mosquitto.db");
    until("the saved session", || async {
        saved.exists().then_some(())
    })
    .await;
    (broker, watcher)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_confirmed_is_lost_while_the_broker_is_killed() {
    let size = Size::from_environment();
    let longest = run(size, &[("BROKER__POOL_SIZE", "4")]).await;
    assert!(longest <= size.max_gap, "a gap of {longest:?}");
}

/// Each device comes back by itself, after pauses of its own: the longest gap is told and not
/// judged.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nor_is_it_where_each_device_has_a_session_of_its_own() {
    let keys = [("BROKER__POOL_SIZE", "1"), ("BROKER__MODE", "per_client")];
    run(Size::from_environment(), &keys).await;
}

/// The longest time from the broker's return to a device's first confirmation.
async fn run(size: Size, keys: &[(&str, &str)]) -> Duration {
    let (mut broker, watcher) = broker(size.devices).await;
    let handler = Handler::start().await;
    // A callback lasts as long as its publishes do.
    let plan = Plan::new(&broker.url(), &handler.url()).set_all(&[
        ("HANDLER__REQUEST_TIMEOUT", "60s"),
        ("BROKER__PUBLISH_TIMEOUT", "50s"),
        ("LISTENERS__TCP__DEFAULT__MAX_CONN_RATE", "infinity"),
        // The defaults.
        ("BROKER__RECONNECT_MIN", "100ms"),
        ("BROKER__RECONNECT_MAX", "1500ms"),
    ]);
    let plan = plan.set_all(keys);
    let gateway = Process::run(&plan);
    let adapter = Adapter::connect(gateway.address("adapter on").await).await;
    let address = gateway.address("devices on").await;
    let tally = Arc::new(Tally::new(size.devices));
    let service = (adapter, tally.clone());
    handler.behave(move |event| serve(service.0.clone(), service.1.clone(), event));

    let stop = Arc::new(AtomicBool::new(false));
    let tick = Duration::from_secs_f64(size.devices as f64 / size.rate as f64);
    let mut devices = Vec::new();
    for number in 0..size.devices {
        let mut device = Device::dial(address).await;
        device.send(format!("I am {number}\n")).await;
        devices.push(device);
    }
    tally
        .until("introductions", |t| t.introduced == size.devices)
        .await;
    let begun = Instant::now();
    let senders: Vec<_> = devices
        .into_iter()
        .enumerate()
        .map(|(number, device)| tokio::spawn(send(device, number, tick, stop.clone())))
        .collect();

    let mut longest = Duration::ZERO;
    for kill in 1..=size.kills {
        // The broker's life and death are what is given here, not waited for.
        tokio::time::sleep(size.up).await;
        broker.kill();
        tokio::time::sleep(size.down).await;
        broker.up().await;
        tally.broker_is_back();
        let all = |t: &tally::Counts| t.heard_since == size.devices;
        tally.until("every device's confirmation", all).await;
        let gap = tally.gap();
        longest = longest.max(gap);
        let acknowledged = tally.counts().acknowledged;
        println!(
            "kill {kill}/{}: {acknowledged} acknowledged, the last device had its first after {gap:.3?}",
            size.kills
        );
    }
    tokio::time::sleep(size.up).await;
    stop.store(true, Ordering::Relaxed);
    let mut sent = Vec::new();
    for sender in senders {
        sent.push(within("the devices", sender).await.unwrap());
    }
    let lines: usize = sent.iter().map(|sent| sent.lines).sum();
    tally
        .until("all answers", |t| t.acknowledged + t.failed == lines)
        .await;
    let elapsed = begun.elapsed();

    let mut peer = Peer::connect(broker.port).await;
    for number in 0..size.devices {
        peer.publish(&format!("down/{number}"), 1, "still there")
            .await;
    }
    tally
        .until("the subscriptions", |t| t.reached == size.devices)
        .await;
    let verdict = tally.judge(&watcher.seen).await;
    let counts = tally.counts();
    let rate = counts.acknowledged as f64 / elapsed.as_secs_f64();
    println!(
        "\n{} devices, {} publishes a second asked for, {} kills, {elapsed:.1?}\n\
         acknowledged  {} ({rate:.0} a second)\n\
         unconfirmed   {}\n\
         delivered     {}\n\
         lost          {}\n\
         duplicated    {}\n\
         out of order  {}\n\
         longest gap   {longest:.3?} from the broker's return to a device's confirmation\n\
         subscriptions {} of {} work",
        size.devices,
        size.rate,
        size.kills,
        counts.acknowledged,
        counts.failed,
        verdict.delivered,
        verdict.lost,
        verdict.duplicated,
        verdict.out_of_order,
        counts.reached,
        size.devices,
    );
    assert_eq!(verdict.lost, 0, "confirmed and lost");
    assert_eq!(verdict.out_of_order, 0);
    assert_eq!(counts.failed, 0, "the broker was always back in time");
    handler.check();
    drop(sent.into_iter().map(|sent| sent.device).collect::<Vec<_>>());
    longest
}
