//! At trace level, in both formats, the program that is delivered: what devices and the
//! gateway show the broker is nowhere, whether it lets them in, refuses them, is away or
//! throws them out.

use exproto_sidecar::proto::ResultCode;
use tokio::io::AsyncReadExt;

use super::common::{Adapter, Admin, Answer, Broker, Device, Handler, Plan, Process, until};
use super::{MODE, info, rival_as};

const ANNS: &str = "pa55word-of-ann";
const BOBS: &str = "pa55word-of-bob";
const WRONG: &str = "pa55word-that-is-wrong";
const GATEWAYS: &str = "pa55word-of-the-gateway";

const USERS: [(&str, &str); 3] = [("gateway", GATEWAYS), ("ann", ANNS), ("bob", BOBS)];

const ACL: &str = "user gateway\ntopic readwrite #\npattern readwrite own/%u/#\n";

/// The program, and all that it has said where it must not show a secret.
struct Scene {
    broker: Broker,
    handler: Handler,
    process: Process,
    adapter: Adapter,
    admin: Admin,
    said: Vec<String>,
}

impl Scene {
    async fn with(format: &str) -> Self {
        let (broker, handler) = tokio::join!(Broker::guarded(&USERS, ACL), Handler::start());
        let plan = Plan::new(&broker.url(), &handler.url()).set_all(&[
            MODE,
            ("BROKER__POOL_SIZE", "1"),
            ("LOG__LEVEL", "trace"),
            ("LOG__FORMAT", format),
            ("BROKER__USERNAME", "gateway"),
            ("BROKER__PASSWORD", GATEWAYS),
            ("BROKER__PUBLISH_TIMEOUT", "1s"),
            ("BROKER__WILL__TOPIC", "own/${username}/gone"),
            ("BROKER__WILL__PAYLOAD", "${clientid} of ${username}"),
        ]);
        let process = Process::run(&plan);
        let adapter = Adapter::connect(process.address("adapter on").await).await;
        let admin = process.admin().await;
        Self {
            broker,
            handler,
            process,
            adapter,
            admin,
            said: Vec::new(),
        }
    }

    async fn login(&mut self, clientid: &str, username: &str, password: &str) -> (Device, Answer) {
        let mut device = Device::dial(self.process.address("devices on").await).await;
        device.conn = self.handler.created(device.port()).await;
        let conn = &device.conn;
        let answer = self
            .adapter
            .authenticate_as(conn, info(clientid, username), password)
            .await;
        self.said.push(answer.message.clone());
        (device, answer)
    }

    async fn page(&mut self, path: &str) {
        let page = self.admin.get(path).await.body;
        self.said.push(page);
    }

    /// How a device's connection ended.
    async fn closed(&mut self, device: &Device) -> String {
        let reason = self.handler.closed(&device.conn).await;
        self.said.push(reason.clone());
        reason
    }
}

async fn run(format: &str) {
    let mut scene = Scene::with(format).await;
    let up = "exproto_broker_sessions_up";

    // It lets them in.
    let (ann, answer) = scene.login("a1", "ann", ANNS).await;
    answer.ok();
    let (bob, answer) = scene.login("b1", "bob", BOBS).await;
    answer.ok();
    for device in [&ann, &bob] {
        let conn = &device.conn;
        scene.adapter.subscribe(conn, "own/#", 1).await.ok();
        for topic in ["own/ann/x", "own/bob/x"] {
            let answer = scene.adapter.publish(conn, topic, 1, "x").await;
            scene.said.push(answer.message);
        }
        scene.handler.payloads(conn, 1).await;
    }
    scene.page("/readyz").await;

    // It refuses them.
    for (username, password) in [("ann", WRONG), ("eve", ANNS), ("", BOBS)] {
        let (_, answer) = scene.login("c1", username, password).await;
        answer.refused(ResultCode::PermissionDeny);
    }
    // No topic can be made of this name.
    let (_, answer) = scene.login("c2", "a#", WRONG).await;
    answer.refused(ResultCode::ParamsTypeError);

    // Somebody else has the session.
    let port = scene.broker.port;
    let rivals = tokio::spawn(async move {
        loop {
            let mut stream = rival_as(port, "a1", Some(("ann", ANNS))).await;
            let _ = stream.read_to_end(&mut Vec::new()).await;
        }
    });
    assert_eq!(scene.closed(&ann).await, "kicked");
    rivals.abort();

    // It is away, for those that are there and for newcomers.
    scene.broker.kill();
    scene.admin.metric_until(up, |up| up == 0.0).await;
    let answer = scene.adapter.publish(&bob.conn, "own/bob/x", 1, "x").await;
    scene.said.push(answer.refused(ResultCode::Unknown));
    let (_, answer) = scene.login("a1", "ann", ANNS).await;
    answer.refused(ResultCode::Unknown);
    scene.page("/readyz").await;

    // It is back, and knows one of them no more, and not the gateway either.
    let [_, ann_, _] = USERS;
    scene.broker.users(&[ann_, ("gateway", "another one")]);
    scene.broker.up().await;
    assert_eq!(scene.closed(&bob).await, "kicked");
    let admin = &scene.admin;
    until("a word on the refused gateway", || async move {
        let page = admin.get("/readyz").await.body;
        page.contains("not authorized").then_some(())
    })
    .await;
    for page in ["/readyz", "/metrics"] {
        scene.page(page).await;
    }
    scene.process.signal("TERM");
    assert_eq!(scene.process.exit().await, Some(0));

    let log = [scene.process.log(), scene.process.output()].concat();
    for part in [
        "a device's broker link is up",
        "a device's broker link is down",
        "the broker refused the connection",
        "the broker closed the connection",
        "refused",
    ] {
        let is_told = log.iter().any(|line| line.contains(part));
        assert!(is_told, "no line says {part:?}, of {}", log.len());
    }
    let lines = log.iter().chain(&scene.said);
    for line in lines {
        for shape in shapes("pa55word") {
            assert!(!line.contains(&shape), "{shape} in: {line}");
        }
    }
}

/// A text as logs may show it: itself, hexadecimal, numbers, and base64 at each offset.
fn shapes(text: &str) -> Vec<String> {
    use base64::Engine;
    let hex: String = text.bytes().map(|byte| format!("{byte:02x}")).collect();
    let numbers: Vec<_> = text.bytes().map(|byte| byte.to_string()).collect();
    let mut shapes = vec![text.to_owned(), hex.to_uppercase(), hex, numbers.join(", ")];
    for offset in 0..3 {
        let padded = [&vec![0; offset][..], text.as_bytes()].concat();
        let encoded = base64::engine::general_purpose::STANDARD_NO_PAD.encode(padded);
        // The first and the last characters depend on what is around it.
        shapes.push(encoded[4..encoded.len() - 2].to_owned());
    }
    shapes
}

#[tokio::test]
async fn no_password_of_a_session_is_anywhere_in_the_text_format() {
    run("text").await;
}

#[tokio::test]
async fn no_password_of_a_session_is_anywhere_in_the_json_format() {
    run("json").await;
}
