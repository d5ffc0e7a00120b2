//! An MQTT peer that is not the gateway.

use std::time::Duration;

use rumqttc::v5::mqttbytes::v5::{ConnectProperties, Packet, Publish, PublishProperties};
use rumqttc::v5::mqttbytes::{self, QoS};
use rumqttc::{mqttbytes as mqttbytes4, v5};
use tokio::sync::mpsc;

use super::{node_name, within};

/// A client of the broker, connected.
pub struct Peer {
    client: Client,
    messages: mpsc::UnboundedReceiver<Publish>,
    answers: mpsc::UnboundedReceiver<Acknowledged>,
    task: tokio::task::JoinHandle<()>,
}

enum Client {
    V4(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

/// What the broker answered, in either version.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Acknowledged {
    Connect,
    Subscribe,
    /// PUBACK or PUBCOMP: a broker without QoS 2 answers such a publish with PUBACK.
    Publish,
}

impl Peer {
    pub async fn connect(port: u16) -> Self {
        Self::connect_as(port, None).await
    }

    /// With user name and password.
    pub async fn connect_as(port: u16, login: Option<(&str, &str)>) -> Self {
        let mut options = v5::MqttOptions::new(node_name("peer"), "127.0.0.1", port);
        if let Some((username, password)) = login {
            options.set_credentials(username, password);
        }
        Self::connect_with(options, None).await
    }

    /// With the session that was there, which stays when this one is dropped.
    pub async fn durable(port: u16, client_id: &str) -> Self {
        let mut options = v5::MqttOptions::new(client_id, "127.0.0.1", port);
        options.set_clean_start(false);
        Self::connect_with(options, Some(3600)).await
    }

    async fn connect_with(mut options: v5::MqttOptions, expiry: Option<u32>) -> Self {
        options.set_keep_alive(Duration::from_secs(60));
        options.set_connect_properties(ConnectProperties {
            max_packet_size: Some(4 << 20),
            receive_maximum: Some(u16::MAX),
            session_expiry_interval: expiry,
            ..ConnectProperties::new()
        });
        let (client, mut events) = v5::AsyncClient::new(options, 100);
        let (message, messages) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        // Its poll is not cancel safe: it has a task of its own.
        let task = tokio::spawn(async move {
            loop {
                let acknowledged = match events.poll().await {
                    Ok(v5::Event::Incoming(Packet::Publish(publish))) => {
                        let _ = message.send(publish);
                        continue;
                    }
                    Ok(v5::Event::Incoming(Packet::ConnAck(_))) => Acknowledged::Connect,
                    Ok(v5::Event::Incoming(Packet::SubAck(_))) => Acknowledged::Subscribe,
                    Ok(v5::Event::Incoming(Packet::PubAck(_) | Packet::PubComp(_))) => {
                        Acknowledged::Publish
                    }
                    Ok(_) => continue,
                    Err(error) => {
                        println!("the peer's link: {error}");
                        return;
                    }
                };
                let _ = answer.send(acknowledged);
            }
        });
        Self::connected(Client::V5(client), messages, answers, task).await
    }

    /// With MQTT 3.1.1, for brokers that speak nothing else.
    pub async fn connect_v4(port: u16, login: Option<(&str, &str)>) -> Self {
        use rumqttc::{Event, Packet};
        let mut options = rumqttc::MqttOptions::new(node_name("peer"), "127.0.0.1", port);
        if let Some((username, password)) = login {
            options.set_credentials(username, password);
        }
        options.set_keep_alive(Duration::from_secs(60));
        options.set_max_packet_size(4 << 20, 4 << 20);
        let (client, mut events) = rumqttc::AsyncClient::new(options, 100);
        let (message, messages) = mpsc::unbounded_channel();
        let (answer, answers) = mpsc::unbounded_channel();
        let task = tokio::spawn(async move {
            loop {
                let acknowledged = match events.poll().await {
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let _ = message.send(Publish {
                            retain: publish.retain,
                            ..Publish::new(
                                publish.topic,
                                mqttbytes::qos(publish.qos as u8).unwrap(),
                                publish.payload,
                                None,
                            )
                        });
                        continue;
                    }
                    Ok(Event::Incoming(Packet::ConnAck(_))) => Acknowledged::Connect,
                    Ok(Event::Incoming(Packet::SubAck(_))) => Acknowledged::Subscribe,
                    Ok(Event::Incoming(Packet::PubAck(_) | Packet::PubComp(_))) => {
                        Acknowledged::Publish
                    }
                    Ok(_) => continue,
                    Err(error) => {
                        println!("the peer's link: {error}");
                        return;
                    }
                };
                let _ = answer.send(acknowledged);
            }
        });
        Self::connected(Client::V4(client), messages, answers, task).await
    }

    async fn connected(
        client: Client,
        messages: mpsc::UnboundedReceiver<Publish>,
        answers: mpsc::UnboundedReceiver<Acknowledged>,
        task: tokio::task::JoinHandle<()>,
    ) -> Self {
        let mut peer = Self {
            client,
            messages,
            answers,
            task,
        };
        peer.answer(Acknowledged::Connect).await;
        peer
    }

    async fn answer(&mut self, expected: Acknowledged) {
        let what = format!("the answer to a {expected:?}");
        loop {
            let answer = within(&what, self.answers.recv()).await;
            if answer.expect("the peer's link broke") == expected {
                return;
            }
        }
    }

    /// Subscribes at QoS 2, so that messages come as they were published.
    pub async fn subscribe(&mut self, filter: &str) {
        match &self.client {
            Client::V5(client) => client.subscribe(filter, QoS::ExactlyOnce).await.unwrap(),
            Client::V4(client) => {
                let qos = mqttbytes4::QoS::ExactlyOnce;
                client.subscribe(filter, qos).await.unwrap();
            }
        }
        self.answer(Acknowledged::Subscribe).await;
    }

    /// Publishes; from QoS 1 on returns when the broker has it.
    pub async fn publish(&mut self, topic: &str, qos: u8, payload: impl Into<Vec<u8>>) {
        self.put(topic, qos, false, payload, None).await;
    }

    /// Publishes a retained message.
    pub async fn retain(&mut self, topic: &str, payload: impl Into<Vec<u8>>) {
        self.put(topic, 1, true, payload, None).await;
    }

    pub async fn publish_with(&mut self, topic: &str, properties: &[(&str, &str)]) {
        let user_properties = properties
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let properties = PublishProperties {
            user_properties,
            ..PublishProperties::default()
        };
        self.put(topic, 1, false, "with properties", Some(properties))
            .await;
    }

    async fn put(
        &mut self,
        topic: &str,
        qos: u8,
        retain: bool,
        payload: impl Into<Vec<u8>>,
        properties: Option<PublishProperties>,
    ) {
        let payload = payload.into();
        match &self.client {
            Client::V5(client) => {
                let properties = properties.unwrap_or_default();
                let qos = mqttbytes::qos(qos).unwrap();
                client
                    .publish_with_properties(topic, qos, retain, payload, properties)
                    .await
                    .unwrap();
            }
            Client::V4(client) => {
                let qos = mqttbytes4::qos(qos).unwrap();
                client.publish(topic, qos, retain, payload).await.unwrap();
            }
        }
        if qos > 0 {
            self.answer(Acknowledged::Publish).await;
        }
    }

    /// The next message.
    pub async fn next(&mut self) -> Publish {
        within("a message at the peer", self.messages.recv())
            .await
            .expect("the peer's link broke")
    }

    /// Topic, QoS and payload of the next message, as text.
    pub async fn next_text(&mut self) -> (String, u8, String) {
        let publish = self.next().await;
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
        (
            text(&publish.topic),
            publish.qos as u8,
            text(&publish.payload),
        )
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.task.abort();
    }
}
