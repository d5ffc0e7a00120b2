//! Everything together: a broker, a handler and a gateway in this process.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use exproto_sidecar::config::{self, Config, Sources};
use exproto_sidecar::gateway::{Drained, Gateway};
use exproto_sidecar::handler::resolve::{Resolve, System};
use exproto_sidecar::proto::ConnInfo;

use super::{Adapter, Admin, Answer, Broker, Call, Device, Handler, within};

/// A name that no other test has, at any time.
pub fn node_name(prefix: &str) -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    format!("{prefix}-{}-{number}", std::process::id())
}

/// The environment of a gateway; every address has port 0.
#[derive(Clone)]
pub struct Plan(Vec<(String, String)>);

impl Plan {
    pub fn new(broker_url: &str, handler_url: &str) -> Self {
        Self(Vec::new())
            .set("NODE_NAME", &node_name("node"))
            .set("SHARDS", "2")
            .set("SERVER__BIND", "127.0.0.1:0")
            .set("ADMIN__BIND", "127.0.0.1:0")
            .set("LISTENERS__TCP__DEFAULT__BIND", "127.0.0.1:0")
            .set("HANDLER__ADDRESS", handler_url)
            .set("BROKER__URL", broker_url)
            .set("BROKER__PROTOCOL", if super::V4 { "4" } else { "5" })
            .set(
                "BROKER__MODE",
                if super::OWN { "per_client" } else { "pool" },
            )
            .set("BROKER__POOL_SIZE", if super::OWN { "1" } else { "2" })
            .set("BROKER__RECONNECT_MIN", "20ms")
            .set("BROKER__RECONNECT_MAX", "200ms")
    }

    /// Sets a key, without the prefix `EXPROTO_`.
    pub fn set(mut self, key: &str, value: &str) -> Self {
        let key = format!("EXPROTO_{key}");
        self.0.retain(|(name, _)| *name != key);
        self.0.push((key, value.to_owned()));
        self
    }

    pub fn set_all(self, keys: &[(&str, &str)]) -> Self {
        keys.iter()
            .fold(self, |plan, (key, value)| plan.set(key, value))
    }

    pub fn env(&self) -> &[(String, String)] {
        &self.0
    }

    pub fn config(&self) -> Config {
        let sources = Sources {
            env: self.0.clone(),
            ..Sources::default()
        };
        config::load(&sources).unwrap_or_else(|report| panic!("{report}"))
    }
}

/// See the module. Dropping it cuts everything off; [`Stage::finish`] drains.
pub struct Stage {
    pub gateway: Gateway,
    pub handler: Handler,
    pub adapter: Adapter,
    pub admin: Admin,
    pub plan: Plan,
    // Last: the gateway goes first.
    pub broker: Broker,
}

impl Stage {
    /// With the defaults; ready.
    pub async fn start() -> Self {
        Self::with(&[]).await
    }

    /// With these keys, without the prefix `EXPROTO_`; ready.
    pub async fn with(keys: &[(&str, &str)]) -> Self {
        let broker = Broker::start().await;
        Self::around(broker, keys).await
    }

    /// With this broker; ready.
    pub async fn around(broker: Broker, keys: &[(&str, &str)]) -> Self {
        let handler = Handler::start().await;
        let stage = Self::assemble(broker, handler, keys).await;
        within("the gateway to be ready", stage.gateway.ready()).await;
        stage
    }

    /// With what is there, which need not be running.
    pub async fn assemble(broker: Broker, handler: Handler, keys: &[(&str, &str)]) -> Self {
        Self::resolving(broker, handler, keys, Arc::new(System)).await
    }

    /// The same with a resolver of host names.
    pub async fn resolving(
        broker: Broker,
        handler: Handler,
        keys: &[(&str, &str)],
        resolver: Arc<dyn Resolve>,
    ) -> Self {
        let plan = Plan::new(&broker.url(), &handler.url()).set_all(keys);
        let starting = Gateway::start_resolving(&plan.config(), resolver, |_| ()).await;
        let gateway = starting.unwrap();
        let adapter = Adapter::connect(gateway.addresses().adapter.tcp().unwrap()).await;
        let admin = Admin(gateway.addresses().admin.unwrap());
        Self {
            gateway,
            handler,
            adapter,
            admin,
            plan,
            broker,
        }
    }

    /// Where devices connect.
    pub fn devices(&self) -> SocketAddr {
        self.gateway.addresses().listeners["tcp.default"]
    }

    /// A device of which the handler was told.
    pub async fn device(&self) -> Device {
        self.introduce(Device::dial(self.devices()).await).await
    }

    /// A device with small buffers, of which the handler was told.
    pub async fn small_device(&self) -> Device {
        self.introduce(Device::dial_small(self.devices()).await)
            .await
    }

    async fn introduce(&self, mut device: Device) -> Device {
        device.conn = self.handler.created(device.port()).await;
        device
    }

    /// What the handler was told of a connection.
    pub fn conninfo(&self, conn: &str) -> ConnInfo {
        let events = self.handler.events().into_iter();
        let mut infos = events.filter(|event| event.conn == conn);
        let info = infos.find_map(|event| match event.call {
            Call::Created(info) => Some(info),
            _ => None,
        });
        info.unwrap()
    }

    /// A device that is a client.
    pub async fn client(&self, clientid: &str) -> Device {
        let device = self.device().await;
        self.adapter.authenticate(&device.conn, clientid).await.ok();
        device
    }

    /// A device that is a client and subscribed.
    pub async fn subscriber(&self, clientid: &str, filter: &str, qos: u32) -> Device {
        let device = self.client(clientid).await;
        self.subscribe(&device, filter, qos).await.ok();
        device
    }

    pub async fn subscribe(&self, device: &Device, filter: &str, qos: u32) -> Answer {
        self.adapter.subscribe(&device.conn, filter, qos).await
    }

    pub async fn publish(&self, device: &Device, topic: &str, qos: u32, payload: &str) -> Answer {
        let payload = payload.to_owned();
        self.adapter
            .publish(&device.conn, topic, qos, payload)
            .await
    }

    /// Waits for the end of a device's connection and gives the reason.
    pub async fn closed(&self, device: &Device) -> String {
        self.handler.closed(&device.conn).await
    }

    /// Drains, and asserts that nothing was left behind and that every rule held.
    pub async fn finish(self) {
        let drained = within("the drain", self.gateway.drain()).await;
        let nothing = Drained {
            connections: 0,
            publishes: 0,
        };
        assert_eq!(drained, nothing);
        self.handler.check();
    }
}
