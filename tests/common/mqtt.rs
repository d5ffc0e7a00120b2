//! An MQTT peer that is not the gateway.

use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{ConnectProperties, Packet, Publish, PublishProperties};
use rumqttc::v5::{AsyncClient, Event, MqttOptions};
use tokio::sync::mpsc;

use super::{node_name, within};

/// A client of the broker, connected.
pub struct Peer {
    client: AsyncClient,
    messages: mpsc::UnboundedReceiver<Publish>,
    answers: mpsc::UnboundedReceiver<Packet>,
    task: tokio::task::JoinHandle<()>,
}

impl Peer {
    pub async fn connect(port: u16) -> Self {
        Self::connect_as(port, None).await
    }

    /// With user name and password.
    pub async fn connect_as(port: u16, login: Option<(&str, &str)>) -> Self {
        let mut options = MqttOptions::new(node_name("peer"), "127.0.0.1", port);
        if let Some((username, password)) = login {
            options.set_credentials(username, password);
        }
        options.set_keep_alive(Duration::from_secs(60));
        options.set_connect_properties(ConnectProperties {
            max_packet_size: Some(4 << 20),
            receive_maximum: Some(u16::MAX),
            ..ConnectProperties::new()
        });
        let (client, mut events) = AsyncClient::new(options, 100);
        let (message, messages) = mpsc::unbounded_channel();
        let (answer, mut answers) = mpsc::unbounded_channel();
        // Its poll is not cancel safe: it has a task of its own.
        let task = tokio::spawn(async move {
            loop {
                match events.poll().await {
                    Ok(Event::Incoming(Packet::Publish(publish))) => {
                        let _ = message.send(publish);
                    }
                    Ok(Event::Incoming(packet)) => {
                        let _ = answer.send(packet);
                    }
                    Ok(Event::Outgoing(_)) => {}
                    Err(_) => return,
                }
            }
        });
        let connected = within("CONNACK", answers.recv()).await;
        assert!(
            matches!(connected, Some(Packet::ConnAck(_))),
            "{connected:?}"
        );
        Self {
            client,
            messages,
            answers,
            task,
        }
    }

    async fn answer(&mut self, what: &str, is_it: impl Fn(&Packet) -> bool) {
        loop {
            let packet = within(what, self.answers.recv()).await;
            if is_it(&packet.expect("the peer's link broke")) {
                return;
            }
        }
    }

    /// Subscribes at QoS 2, so that messages come as they were published.
    pub async fn subscribe(&mut self, filter: &str) {
        self.client
            .subscribe(filter, QoS::ExactlyOnce)
            .await
            .unwrap();
        self.answer("SUBACK", |p| matches!(p, Packet::SubAck(_)))
            .await;
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
        let level = match qos {
            0 => QoS::AtMostOnce,
            1 => QoS::AtLeastOnce,
            _ => QoS::ExactlyOnce,
        };
        let properties = properties.unwrap_or_default();
        self.client
            .publish_with_properties(topic, level, retain, payload, properties)
            .await
            .unwrap();
        match qos {
            0 => {}
            1 => {
                self.answer("PUBACK", |p| matches!(p, Packet::PubAck(_)))
                    .await
            }
            _ => {
                self.answer("PUBCOMP", |p| matches!(p, Packet::PubComp(_)))
                    .await
            }
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
