//! Several addresses of a broker: each tried in turn, the last good one first.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use common::{Admin, Broker, Handler, Peer, Plan, Process, Proxy, Stage, within};

const ANONYMOUS: &str = "allow_anonymous true\n";

/// The gateway moves to the address that works, and takes its subscriptions along;
/// `/readyz` names the address, or what is wrong with each.
#[tokio::test]
async fn the_next_address_is_tried() {
    let mut first = Broker::absent(ANONYMOUS);
    let second = Broker::start().await;
    let urls = format!("{},{}", first.url(), second.url());
    let keys = [("BROKER__URL", urls.as_str())];
    let mut stage = Stage::around(second, &keys).await;
    let connected = format!("+ broker link 0: connected to {}", stage.broker.url());
    stage.admin.ready_until(200, &connected).await;
    let device = stage.subscriber("c", "down", 1).await;
    stage.broker.kill();
    let missing = format!("; {}: Connection refused", first.url());
    let text = stage.admin.ready_until(503, &missing).await;
    let reason = format!("no broker: {}: Connection refused", stage.broker.url());
    assert!(text.contains(&reason), "{text}");
    first.up().await;
    let connected = format!("+ broker link 1: connected to {}", first.url());
    stage.admin.ready_until(200, &connected).await;
    let mut peer = Peer::connect(first.port).await;
    peer.publish("down", 1, "over there").await;
    assert_eq!(
        stage.handler.payloads(&device.conn, 1).await,
        ["over there"]
    );
    peer.subscribe("up").await;
    stage.publish(&device, "up", 1, "and back").await.ok();
    assert_eq!(peer.next_text().await.2, "and back");
    stage.finish().await;
}

/// A link that was lost is made again at the address where it was; the others are
/// left alone.
#[tokio::test]
async fn a_lost_link_begins_with_its_last_address() {
    let broker = Broker::start().await;
    let (dead, good) = tokio::join!(Proxy::to(broker.port), Proxy::to(broker.port));
    dead.cut();
    let urls = format!("{},{}", dead.url(), good.url());
    let keys = [("BROKER__URL", urls.as_str()), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::around(broker, &keys).await;
    // The first ends what session an earlier run may have left.
    assert_eq!((dead.connections(), good.connections()), (1, 2));
    for times in 3..6 {
        good.reset();
        // Its state is told before it dials again.
        good.dialled(times).await;
        stage.admin.ready_until(200, "ready").await;
        assert_eq!((dead.connections(), good.connections()), (1, times));
    }
    stage.finish().await;
}

/// Back at a broker that still has an old session of ours, the subscriptions of now
/// count and not those of then.
#[tokio::test]
async fn an_old_session_is_brought_up_to_date() {
    let (first, second) = tokio::join!(Broker::start(), Broker::start());
    let (at_first, at_second) = tokio::join!(Proxy::to(first.port), Proxy::to(second.port));
    let urls = format!("{},{}", at_first.url(), at_second.url());
    let keys = [("BROKER__URL", urls.as_str()), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::around(first, &keys).await;
    let device = stage.subscriber("c", "old", 1).await;
    at_first.cut();
    let connected = format!("connected to {}", at_second.url());
    stage.admin.ready_until(200, &connected).await;
    stage.subscribe(&device, "new", 1).await.ok();
    at_first.mend();
    at_second.cut();
    let connected = format!("connected to {}", at_first.url());
    stage.admin.ready_until(200, &connected).await;
    let mut peer = Peer::connect(stage.broker.port).await;
    peer.publish("old", 1, "one").await;
    peer.publish("new", 1, "two").await;
    assert_eq!(
        stage.handler.payloads(&device.conn, 2).await,
        ["one", "two"]
    );
    stage.finish().await;
}

/// Rule 4: a broker that takes over without the session sends a new subscriber what is
/// retained there, which may have been under way when the first was lost.
#[tokio::test]
async fn retained_messages_come_from_the_broker_that_takes_over() {
    let (first, second) = tokio::join!(Broker::start(), Broker::start());
    let at_first = Proxy::to(first.port).await;
    let urls = format!("{},{}", at_first.url(), second.url());
    let keys = [("BROKER__URL", urls.as_str()), ("BROKER__POOL_SIZE", "1")];
    let stage = Stage::around(first, &keys).await;
    Peer::connect(second.port)
        .await
        .retain("state", "kept")
        .await;
    let device = stage.subscriber("c", "state", 1).await;
    at_first.cut();
    assert_eq!(stage.handler.payloads(&device.conn, 1).await, ["kept"]);
    stage.finish().await;
}

/// The log tells once where the links went, not for every attempt.
#[tokio::test]
async fn the_log_names_the_address() {
    let (broker, handler) = tokio::join!(Broker::start(), Handler::start());
    let dead = Broker::absent(ANONYMOUS);
    let urls = format!("{},{}", dead.url(), broker.url());
    let plan = Plan::new(&urls, &handler.url()).set("BROKER__POOL_SIZE", "1");
    let mut program = Process::run(&plan);
    let mut broker = broker;
    let line = program.logged("trying the next address").await;
    assert!(line.contains(&dead.url()), "{line}");
    let line = program.logged("broker link is up").await;
    assert!(line.contains(&broker.url()), "{line}");
    let admin = Admin(program.address("admin on").await);
    broker.kill();
    let both = format!("{}: Connection refused", dead.url());
    program.logged(&format!("; {both}")).await;
    let reconnects = "exproto_broker_reconnects_total";
    let before = admin.metric(reconnects).await;
    admin.metric_until(reconnects, |n| n > before + 3.5).await;
    program.signal("TERM");
    assert_eq!(within("the end", program.exit()).await, Some(0));
    let count = |part: &str| program.log().iter().filter(|l| l.contains(part)).count();
    assert_eq!(count("trying the next address"), 1, "{:?}", program.log());
    assert!(count("broker link is down") <= 3, "{:?}", program.log());
}
