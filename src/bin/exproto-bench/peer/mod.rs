//! MQTT clients: they receive what devices send up and publish what goes down.
//!
//! MQTT 3.1.1, which every broker speaks, with clean sessions. rumqttc's codec does the
//! work; its client would write each message by itself.

mod ids;
pub mod url;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use rumqttc::mqttbytes::v4::{
    ConnAck, Connect, ConnectReturnCode, Login, Packet, PubAck, PubComp, PubRec, PubRel, Publish,
    Subscribe, SubscribeReasonCode,
};
use rumqttc::mqttbytes::{self, Protocol, QoS};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;

use crate::failure::Failure;
use crate::frame::{self, EVERY_DEVICE, RunId};
use crate::lanes::Lanes;
use ids::Ids;
use url::Broker;

/// Largest packet that is read, in bytes.
const MAX_PACKET: usize = 2 * 1024 * 1024;

/// Bytes that wait to be written before no more publishes are added.
const WRITE_AHEAD: usize = 256 * 1024;

/// Publishes that are taken at a time.
const BATCH: usize = 256;

/// The topics of a run. Devices are spread over the clients by their number.
#[derive(Debug, Clone)]
pub struct Topics {
    run: RunId,
    peers: u32,
}

impl Topics {
    pub fn new(run: RunId, peers: u32) -> Self {
        Self { run, peers }
    }

    /// The client id of an MQTT client of ours.
    pub fn peer(&self, peer: u32) -> String {
        format!("bench-{}-peer-{peer}", self.run)
    }

    /// The client id of a device.
    pub fn client(&self, device: u32) -> String {
        format!("bench-{}-{device}", self.run)
    }

    /// The client id of a device that goes ahead.
    pub fn probe(&self, number: u32) -> String {
        format!("bench-{}-probe-{number}", self.run)
    }

    /// Where a device's uplink frames are published.
    pub fn up(&self, device: u32) -> String {
        let peer = device.checked_rem(self.peers).unwrap_or_default();
        format!("exproto-bench/{}/up/{peer}/{device}", self.run)
    }

    /// What a client subscribes to, to have its share of them.
    pub fn up_filter(&self, peer: u32) -> String {
        format!("exproto-bench/{}/up/{peer}/+", self.run)
    }

    /// Where messages for a device are published.
    pub fn down(&self, device: u32) -> String {
        if device == EVERY_DEVICE {
            return format!("exproto-bench/{}/all", self.run);
        }
        format!("exproto-bench/{}/down/{device}", self.run)
    }
}

/// A client that is connected and subscribed.
pub struct Peer {
    stream: TcpStream,
    inbox: BytesMut,
    broker: String,
}

/// What a client does.
pub struct Work {
    pub lanes: Arc<Lanes>,
    pub topics: Topics,
    pub qos: u8,
    /// Size of the messages that it publishes.
    pub payload: usize,
    /// Lanes of which a message is due.
    pub due: mpsc::UnboundedReceiver<u32>,
}

impl Peer {
    /// Connects and subscribes.
    ///
    /// # Errors
    /// A broker that is not there, that does not answer within `limit`, or that refuses.
    pub async fn connect(
        broker: &Broker,
        client_id: &str,
        filter: Option<(&str, u8)>,
        limit: Duration,
    ) -> Result<Self, Failure> {
        let result = match tokio::time::timeout(limit, open(broker, client_id, filter)).await {
            Ok(result) => result,
            Err(_) => Err(io::Error::other(format!("no answer within {limit:?}"))),
        };
        result.map_err(|error| Failure::Mqtt(format!("the MQTT broker at {broker}: {error}")))
    }

    /// Works until the connection breaks, and says why it did.
    pub async fn run(self, work: Work) -> Failure {
        let broker = self.broker.clone();
        let error = match self.exchange(work).await {
            Ok(()) => io::Error::other("it closed the connection"),
            Err(error) => error,
        };
        Failure::Mqtt(format!("the MQTT broker at {broker}: {error}"))
    }

    async fn exchange(self, mut work: Work) -> io::Result<()> {
        let (mut reader, mut writer) = self.stream.into_split();
        let (mut inbox, mut out) = (self.inbox, BytesMut::new());
        let mut ids = Ids::default();
        let mut wakes = Vec::with_capacity(BATCH);
        let mut publishing = true;
        loop {
            while let Some(packet) = decode(&mut inbox)? {
                take(packet, &work.lanes, &mut ids, &mut out)?;
            }
            let room = ids.free().min(BATCH);
            tokio::select! {
                biased;
                read = reader.read_buf(&mut inbox) => if read? == 0 {
                    return Ok(());
                },
                wrote = writer.write_buf(&mut out), if !out.is_empty() => {
                    wrote?;
                }
                count = work.due.recv_many(&mut wakes, room),
                    if publishing && room > 0 && out.len() < WRITE_AHEAD =>
                {
                    // Nobody is left who could ask for a message.
                    publishing = count > 0;
                }
            }
            for lane in wakes.drain(..) {
                work.publish(lane, &mut ids, &mut out)?;
            }
        }
    }
}

impl Work {
    fn publish(&self, lane: u32, ids: &mut Ids, out: &mut BytesMut) -> io::Result<()> {
        let Some(due) = self.lanes.take(lane) else {
            return Ok(());
        };
        let mut payload = BytesMut::new();
        frame::write_sized(self.lanes.head(lane, due), self.payload, &mut payload);
        let qos = mqttbytes::qos(self.qos).map_err(invalid)?;
        let mut publish = Publish::from_bytes(self.topics.down(lane), qos, payload.freeze());
        if qos != QoS::AtMostOnce {
            let Some(id) = ids.take() else { return Ok(()) };
            publish.pkid = id;
        }
        publish.write(out).map_err(invalid)?;
        Ok(())
    }
}

fn invalid(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("bad MQTT: {error}"))
}

async fn open(broker: &Broker, client_id: &str, filter: Option<(&str, u8)>) -> io::Result<Peer> {
    let stream = TcpStream::connect((broker.host.as_str(), broker.port)).await?;
    stream.set_nodelay(true)?;
    let mut peer = Peer {
        stream,
        inbox: BytesMut::new(),
        broker: broker.to_string(),
    };
    let login = broker.login.as_ref();
    peer.say(&Packet::Connect(Connect {
        protocol: Protocol::V4,
        // A run is short: the broker need not watch over the silence.
        keep_alive: 0,
        client_id: client_id.to_owned(),
        clean_session: true,
        last_will: None,
        login: login.map(|(user, password)| Login::new(user, password)),
    }))
    .await?;
    match peer.hear().await? {
        Packet::ConnAck(ConnAck {
            code: ConnectReturnCode::Success,
            ..
        }) => {}
        Packet::ConnAck(ack) => {
            return Err(io::Error::other(format!("it refuses: {:?}", ack.code)));
        }
        _ => return Err(invalid("no CONNACK")),
    }
    if let Some((filter, qos)) = filter {
        let mut subscribe = Subscribe::new(filter, mqttbytes::qos(qos).map_err(invalid)?);
        subscribe.pkid = 1;
        peer.say(&Packet::Subscribe(subscribe)).await?;
        match peer.hear().await? {
            Packet::SubAck(ack)
                if matches!(*ack.return_codes, [SubscribeReasonCode::Success(_)]) => {}
            Packet::SubAck(_) => {
                return Err(io::Error::other(format!(
                    "it refuses the subscription to {filter}"
                )));
            }
            _ => return Err(invalid("no SUBACK")),
        }
    }
    Ok(peer)
}

impl Peer {
    async fn say(&mut self, packet: &Packet) -> io::Result<()> {
        let mut out = BytesMut::new();
        packet.write(&mut out, usize::MAX).map_err(invalid)?;
        self.stream.write_all(&out).await
    }

    async fn hear(&mut self) -> io::Result<Packet> {
        loop {
            if let Some(packet) = decode(&mut self.inbox)? {
                return Ok(packet);
            }
            if self.stream.read_buf(&mut self.inbox).await? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}

/// The next whole packet.
fn decode(inbox: &mut BytesMut) -> io::Result<Option<Packet>> {
    match Packet::read(inbox, MAX_PACKET) {
        Ok(packet) => Ok(Some(packet)),
        Err(mqttbytes::Error::InsufficientBytes(_)) => Ok(None),
        Err(error) => Err(invalid(error)),
    }
}

/// Reports a message, answers, and frees packet ids.
fn take(packet: Packet, lanes: &Lanes, ids: &mut Ids, out: &mut BytesMut) -> io::Result<()> {
    match packet {
        Packet::Publish(publish) => {
            report(publish.payload, lanes);
            match publish.qos {
                QoS::AtMostOnce => {}
                QoS::AtLeastOnce => {
                    PubAck::new(publish.pkid).write(out).map_err(invalid)?;
                }
                QoS::ExactlyOnce => {
                    PubRec::new(publish.pkid).write(out).map_err(invalid)?;
                }
            }
        }
        Packet::PubRel(rel) => {
            PubComp::new(rel.pkid).write(out).map_err(invalid)?;
        }
        Packet::PubRec(rec) => {
            PubRel::new(rec.pkid).write(out).map_err(invalid)?;
        }
        Packet::PubAck(PubAck { pkid }) | Packet::PubComp(PubComp { pkid }) => ids.give_back(pkid),
        Packet::Disconnect => return Err(io::Error::other("it says goodbye")),
        _ => {}
    }
    Ok(())
}

fn report(payload: Bytes, lanes: &Lanes) {
    match frame::read_one(payload) {
        Ok(frame) => lanes.arrived(frame.head, None),
        Err(_) => lanes.stats.unknown.add(1),
    }
}
