//! A connection as the handler knows it.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

use super::{Adapter, Shared};
use crate::frame::{self, Frame, Kind, Wishes};

/// What happened to a connection.
pub(super) enum Event {
    Bytes(Bytes),
    Messages(Vec<Bytes>),
}

/// What an event from a stream holds until it was worked off: room, and the answer to
/// its stream.
pub(super) type Held = (OwnedSemaphorePermit, mpsc::Sender<()>);

/// See the module.
pub(super) struct Connection {
    conn: String,
    /// Held while an event is worked off: they come one at a time, but for long streams,
    /// which have a queue for it.
    state: tokio::sync::Mutex<State>,
    queue: Mutex<Queue>,
}

#[derive(Default)]
struct State {
    /// Bytes that are no whole frame yet.
    rest: BytesMut,
    /// QoS and topic of uplink frames.
    publish: Option<(u32, String)>,
    /// Whether its hello was done.
    is_set_up: bool,
}

/// Events from long streams that wait for their turn. Bounded by the permits.
#[derive(Default)]
struct Queue {
    events: VecDeque<(Event, Held)>,
    /// Whether a task works it off.
    busy: bool,
}

impl Connection {
    pub(super) fn new(conn: &str) -> Self {
        Self {
            conn: conn.to_owned(),
            state: tokio::sync::Mutex::default(),
            queue: Mutex::default(),
        }
    }

    /// Puts an event behind those that wait; `true` if the caller is to work them off.
    pub(super) fn enqueue(&self, event: Event, held: Held) -> bool {
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        queue.events.push_back((event, held));
        !std::mem::replace(&mut queue.busy, true)
    }

    /// Works off what waits, until nothing does.
    pub(super) async fn work_off(&self, adapter: &Adapter, shared: &Shared) {
        loop {
            let next = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                let next = queue.events.pop_front();
                queue.busy = next.is_some();
                next
            };
            let Some((event, _held)) = next else { return };
            self.handle(event, adapter, shared).await;
        }
    }

    /// Works off one event.
    pub(super) async fn handle(&self, event: Event, adapter: &Adapter, shared: &Shared) {
        let mut state = self.state.lock().await;
        let done = match event {
            Event::Bytes(bytes) => self.bytes(&mut state, bytes, adapter, shared).await,
            Event::Messages(payloads) => self.messages(payloads, adapter).await,
        };
        if let Err(reason) = done {
            shared.failed(&reason);
        }
    }

    async fn bytes(
        &self,
        state: &mut State,
        bytes: Bytes,
        adapter: &Adapter,
        shared: &Shared,
    ) -> Result<(), String> {
        state.rest.extend_from_slice(&bytes);
        loop {
            match frame::read(&mut state.rest) {
                // Left over from an earlier run: a gateway holds what no handler took.
                Ok(Some(frame)) if frame.head.run != shared.run => {}
                Ok(Some(frame)) => self.frame(state, frame, adapter).await?,
                Ok(None) => break,
                Err(error) => {
                    state.rest.clear();
                    return Err(format!("bytes of another protocol: {error}"));
                }
            }
        }
        if state.rest.is_empty() {
            // The frames were cut out of it: a new one is made when it is needed.
            state.rest = BytesMut::new();
        }
        Ok(())
    }

    async fn frame(
        &self,
        state: &mut State,
        frame: Frame,
        adapter: &Adapter,
    ) -> Result<(), String> {
        match frame.head.kind {
            Kind::Uplink => {
                let Some((qos, topic)) = &state.publish else {
                    return Err("an uplink frame without a hello before it".to_owned());
                };
                adapter.publish(&self.conn, topic, *qos, frame.bytes).await
            }
            Kind::Echo => adapter.send(&self.conn, frame.bytes).await,
            Kind::Hello => {
                let done = self.set_up(state, &frame, adapter).await;
                let mut head = frame.head;
                let reason = done.as_ref().err().map(String::as_str);
                head.kind = match reason {
                    None => Kind::Welcome,
                    Some(_) => Kind::Failed,
                };
                let mut answer = BytesMut::new();
                frame::write(head, reason.unwrap_or_default().as_bytes(), &mut answer);
                adapter.send(&self.conn, answer.freeze()).await?;
                done
            }
            kind => Err(format!("a device's frame of kind {kind:?}")),
        }
    }

    async fn set_up(
        &self,
        state: &mut State,
        hello: &Frame,
        adapter: &Adapter,
    ) -> Result<(), String> {
        if state.is_set_up {
            // The device has missed the answer.
            return Ok(());
        }
        let wishes = Wishes::parse(hello.rest());
        if let Some(client) = &wishes.client {
            adapter.authenticate(&self.conn, client).await?;
        }
        for (qos, filter) in &wishes.subscribe {
            adapter.subscribe(&self.conn, filter, *qos).await?;
        }
        state.publish = wishes.publish;
        state.is_set_up = true;
        Ok(())
    }

    async fn messages(&self, payloads: Vec<Bytes>, adapter: &Adapter) -> Result<(), String> {
        for payload in payloads {
            adapter.send(&self.conn, payload).await?;
        }
        Ok(())
    }
}
