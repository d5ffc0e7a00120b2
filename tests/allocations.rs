//! How often the gateway allocates for a message on its way up and down.
//!
//! The gateway runs in this process, whose allocator counts; devices, handler and MQTT
//! clients are in another, `exproto-bench`. Two runs that differ only in the number of
//! messages are compared, so that what a connection or a start takes is not in it. A
//! window of one keeps messages from being joined: this is the most that one can cost.
//!
//! `cargo test --test allocations -- --nocapture` shows the figures. Where a change makes them
//! better, bring the bounds down to them.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use common::{Broker, Plan, free_port, within};
use exproto_sidecar::gateway::Gateway;
use tokio::process::Command;

/// The system's allocator, counted.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// The only way to learn it; every call goes on to the system's allocator with the
// arguments it came with. What grows in place counts as well.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, size) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Messages of the shorter run, and of the longer one.
const MESSAGES: (u64, u64) = (500, 2500);

struct Scene {
    gateway: Gateway,
    broker: Broker,
    handler: String,
}

impl Scene {
    async fn start() -> Self {
        // Its log would be read here, and counted.
        let mut broker = Broker::absent("allow_anonymous true\n").quiet();
        broker.up().await;
        let handler = format!("127.0.0.1:{}", free_port());
        let plan = Plan::new(&broker.url(), &format!("http://{handler}")).set("SHARDS", "1");
        let gateway = Gateway::start(&plan.config()).await.unwrap();
        Self {
            gateway,
            broker,
            handler,
        }
    }

    /// Allocations while so many messages pass.
    async fn count(&self, scenario: &str, messages: u64) -> u64 {
        let addresses = self.gateway.addresses();
        let mut command = Command::new(env!("CARGO_BIN_EXE_exproto-bench"));
        command
            .args([scenario, "--devices", "2", "--window", "1", "--peers", "1"])
            .args(["--warmup", "0s", "--quiet"])
            .args(["--messages", &messages.to_string()])
            .args(["--gateway", &addresses.listeners["tcp.default"].to_string()])
            .args(["--adapter", &addresses.adapter.to_string()])
            .args(["--handler", &self.handler, "--mqtt", &self.broker.url()])
            .stdin(Stdio::null())
            .kill_on_drop(true);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let output = within("the bench", command.output()).await.unwrap();
        let counted = ALLOCATIONS.load(Ordering::Relaxed) - before;
        let text = String::from_utf8(output.stdout).unwrap();
        let all = format!("{messages} sent, {messages} arrived, 0 lost, 0 duplicated");
        assert!(output.status.success() && text.contains(&all), "{text}");
        counted
    }

    /// Allocations for each message, in hundredths.
    async fn for_each(&self, scenario: &str) -> u64 {
        // What is made once, such as channels and buffers, is there after the first run.
        self.count(scenario, MESSAGES.0).await;
        let short = self.count(scenario, MESSAGES.0).await;
        let long = self.count(scenario, MESSAGES.1).await;
        let each = long.saturating_sub(short) * 100 / (MESSAGES.1 - MESSAGES.0);
        println!(
            "{scenario}: {}.{:02} allocations a message",
            each / 100,
            each % 100
        );
        each
    }
}

/// One test, for all of a process is counted.
#[tokio::test]
async fn a_message_takes_few_allocations() {
    let scene = Scene::start().await;
    // Some above what was counted: 43, 45 and 58.
    for (scenario, most) in [("echo", 45), ("uplink", 48), ("downlink", 61)] {
        let each = scene.for_each(scenario).await;
        // None at all would mean that nothing was counted.
        assert!((100..=most * 100).contains(&each), "{scenario}: {each}");
    }
}
