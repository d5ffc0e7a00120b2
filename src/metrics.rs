//! Every metric of the gateway: names, units, help and labels in one place.
//!
//! Handles are looked up once and kept; labels never hold a connection id, a
//! client id or a topic.

mod auth;
mod counted;

use std::sync::Arc;
use std::time::Duration;

use metrics::{
    Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, SharedString, Unit,
};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

pub use auth::{AuthMetrics, AuthenticatorMetrics, SourceMetrics};
pub use counted::{Counted, Share};

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

const CONNECTIONS: &str = "exproto_connections";
const OPENED: &str = "exproto_connections_opened_total";
const CLOSED: &str = "exproto_connections_closed_total";
const REFUSED: &str = "exproto_connections_refused_total";
const RELOADS: &str = "exproto_listener_reloads_total";
const ACCEPT_ERRORS: &str = "exproto_accept_errors_total";
const PANICS: &str = "exproto_connection_panics_total";
const RECEIVED_BYTES: &str = "exproto_received_bytes_total";
const SENT_BYTES: &str = "exproto_sent_bytes_total";
const DATAGRAMS_RECEIVED: &str = "exproto_datagrams_received_total";
const DATAGRAMS_SENT: &str = "exproto_datagrams_sent_total";
const DATAGRAMS_DROPPED: &str = "exproto_datagrams_dropped_total";
const RECEIVE_ERRORS: &str = "exproto_receive_errors_total";
const READS_PAUSED: &str = "exproto_reads_paused_total";
const CALLBACKS: &str = "exproto_callbacks_total";
const CALLBACK_SECONDS: &str = "exproto_callback_duration_seconds";
const CALLBACKS_IN_FLIGHT: &str = "exproto_callbacks_in_flight";
const CALLBACKS_RETRIED: &str = "exproto_callbacks_retried_total";
const CLOSED_LOST: &str = "exproto_closed_callbacks_lost_total";
const STREAMS_OPENED: &str = "exproto_handler_streams_opened_total";
const STREAMS_ENDED: &str = "exproto_handler_streams_ended_total";
const UNACKNOWLEDGED: &str = "exproto_handler_stream_unacknowledged";
const RESENT: &str = "exproto_handler_stream_resent_total";
const HANDLER_UP: &str = "exproto_handler_channels_up";
const HANDLER_CHANNELS: &str = "exproto_handler_channels";
const CONNECTIONS_HELD: &str = "exproto_connections_held";
const FAILOVERS: &str = "exproto_handler_failovers_total";
const ADAPTER_CALLS: &str = "exproto_adapter_calls_total";
const ADAPTER_CALL_SECONDS: &str = "exproto_adapter_call_duration_seconds";
const ADAPTER_REFUSED: &str = "exproto_adapter_refused_total";
const ADAPTER_CONNECTIONS: &str = "exproto_adapter_connections";
const ADAPTER_RELOADS: &str = "exproto_adapter_reloads_total";
const DELIVERED: &str = "exproto_messages_delivered_total";
const DROPPED: &str = "exproto_messages_dropped_total";
const AUTHENTICATIONS: &str = "exproto_authentications_total";
const AUTHENTICATION_SECONDS: &str = "exproto_authentication_duration_seconds";
const AUTHENTICATIONS_IN_FLIGHT: &str = "exproto_authentications_in_flight";
const AUTHENTICATION_RELOADS: &str = "exproto_authentication_reloads_total";
const AUTHORIZATION_REQUESTS: &str = "exproto_authorization_requests_total";
const AUTHORIZATIONS: &str = "exproto_authorizations_total";
const LOGIN_ATTEMPTS_LIMITED: &str = "exproto_login_attempts_limited_total";
const LINKS_UP: &str = "exproto_broker_links_up";
const LINK_UP: &str = "exproto_broker_link_up";
const SESSIONS: &str = "exproto_broker_sessions";
const SESSIONS_UP: &str = "exproto_broker_sessions_up";
const SESSIONS_REFUSED: &str = "exproto_broker_sessions_refused_total";
const SESSIONS_KICKED: &str = "exproto_broker_sessions_kicked_total";
const PUBLISHED: &str = "exproto_broker_published_total";
const RECEIVED: &str = "exproto_broker_received_total";
const UNCLAIMED: &str = "exproto_broker_unclaimed_total";
const ACKNOWLEDGED_EARLY: &str = "exproto_broker_acknowledged_early_total";
const RECONNECTS: &str = "exproto_broker_reconnects_total";
const PUBLISH_TIMEOUTS: &str = "exproto_broker_publish_timeouts_total";
const OUTBOX_FULL: &str = "exproto_broker_outbox_full_total";
const OUTBOX_MESSAGES: &str = "exproto_broker_outbox_messages";
const NOT_RESTORED: &str = "exproto_broker_subscriptions_not_restored_total";
const MISSING: &str = "exproto_broker_subscriptions_missing";
const OVERLAPS_REFUSED: &str = "exproto_broker_overlaps_refused_total";
const TOO_LARGE: &str = "exproto_broker_too_large_total";
const RETAINED_NOT_FETCHED: &str = "exproto_broker_retained_not_fetched_total";

/// The table that `docs/metrics.md` repeats: kind, name, unit, labels, help.
#[rustfmt::skip]
const TABLE: &[(Kind, &str, Unit, &str, &str)] = &[
    (Kind::Gauge, CONNECTIONS, Unit::Count, "listener", "Device connections that are open."),
    (Kind::Counter, OPENED, Unit::Count, "listener", "Device connections accepted."),
    (Kind::Counter, CLOSED, Unit::Count, "listener, reason", "Device connections ended, by the reason that OnSocketClosed gives."),
    (Kind::Counter, REFUSED, Unit::Count, "listener, reason", "Device connections refused before any callback, by reason: access_rules, max_connections, max_connections_per_address, max_conn_rate, proxy_protocol, proxy_protocol_trusted, max_handshakes, handshake_failed, handshake_silent, setup."),
    (Kind::Counter, RELOADS, Unit::Count, "listener, outcome", "Changes of certificate and key files, by outcome: ok, or failed where the old ones stay in use."),
    (Kind::Counter, ACCEPT_ERRORS, Unit::Count, "listener", "Failures to accept, such as no free file descriptor."),
    (Kind::Counter, PANICS, Unit::Count, "listener", "Connections ended by a fault of the gateway's own."),
    (Kind::Counter, RECEIVED_BYTES, Unit::Bytes, "listener", "Bytes received from devices."),
    (Kind::Counter, SENT_BYTES, Unit::Bytes, "listener", "Bytes sent to devices."),
    (Kind::Counter, READS_PAUSED, Unit::Count, "listener", "Times that reading from a device paused for max_bytes_rate or max_messages_rate."),
    (Kind::Counter, DATAGRAMS_RECEIVED, Unit::Count, "listener", "Datagrams received, those of handshakes and of strangers too."),
    (Kind::Counter, DATAGRAMS_SENT, Unit::Count, "listener", "Datagrams sent."),
    (Kind::Counter, DATAGRAMS_DROPPED, Unit::Count, "listener, reason", "Datagrams dropped, by reason. Received: queue_full (the connection's), queues_full (the shard's), rate (max_bytes_rate, max_messages_rate), closed (they waited when their connection ended), draining, bad_address. To be sent: too_large, send_failed."),
    (Kind::Counter, RECEIVE_ERRORS, Unit::Count, "listener", "Failures of a UDP socket to receive."),
    (Kind::Counter, CALLBACKS, Unit::Count, "handler, method, outcome", "Callbacks to handlers that ended, by outcome: ok, unavailable, or the gRPC status."),
    (Kind::Histogram, CALLBACK_SECONDS, Unit::Seconds, "handler, method", "Time from a callback's first try to its answer."),
    (Kind::Gauge, CALLBACKS_IN_FLIGHT, Unit::Count, "handler", "Callbacks that wait for their answer."),
    (Kind::Counter, CALLBACKS_RETRIED, Unit::Count, "handler", "Callbacks sent again because the handler was unavailable."),
    (Kind::Counter, CLOSED_LOST, Unit::Count, "handler", "OnSocketClosed callbacks that no handler took."),
    (Kind::Counter, STREAMS_OPENED, Unit::Count, "handler, method", "With handler.streaming: streams opened."),
    (Kind::Counter, STREAMS_ENDED, Unit::Count, "handler, method, outcome", "With handler.streaming: streams that ended, by outcome: ok, broken (its messages are sent again), and those whose messages are sent again each by itself: error (a status other than UNAVAILABLE), late (no answer within request_timeout), early (answered before its end)."),
    (Kind::Gauge, UNACKNOWLEDGED, Unit::Count, "handler", "With handler.streaming: callbacks with bytes and messages that wait to be sent or whose stream is not answered."),
    (Kind::Counter, RESENT, Unit::Count, "handler", "With handler.streaming: callbacks sent again because their stream was not answered with OK; a handler may have had them before."),
    (Kind::Gauge, HANDLER_UP, Unit::Count, "handler", "Connected channels to the handler; each shard keeps one for each address."),
    (Kind::Gauge, HANDLER_CHANNELS, Unit::Count, "handler, address, state", "Channels to the handler by the address of the configuration and their state: up, not_serving (new connections go elsewhere), down. Each shard keeps one for each IP address that a host name resolves to."),
    (Kind::Gauge, CONNECTIONS_HELD, Unit::Count, "handler", "Connections held: a callback of theirs waits for a handler that is away. With handler.streaming one whose bytes and whose messages both wait counts as two."),
    (Kind::Counter, FAILOVERS, Unit::Count, "handler", "Connections that moved to another address of their handler."),
    (Kind::Counter, ADAPTER_CALLS, Unit::Count, "method, code", "Calls of handlers to the adapter, by result code, or by gRPC's status where that is not OK: CANCELLED where the handler did not wait for the answer, DEADLINE_EXCEEDED where its grpc-timeout was over, OUT_OF_RANGE where the request was larger than server.max_message_size, UNAUTHENTICATED without a token. The method is \"other\" for what is no call."),
    (Kind::Histogram, ADAPTER_CALL_SECONDS, Unit::Seconds, "method", "Time from a handler's call to its answer; waiting for the broker or for a slow device is in it."),
    (Kind::Counter, ADAPTER_REFUSED, Unit::Count, "reason", "What handlers were refused, by reason: unauthenticated (a call without a token that is known), foreign (with server.isolate_handlers: a call about a connection of another handler, answered with CONN_PROCESS_NOT_ALIVE), max_connections (a connection too many), handshake_failed (no TLS, or no word of HTTP/2 within 10 s), unread (a request that is not whole after 30 s, or one too many of those that are not), watches (of health, one too many)."),
    (Kind::Gauge, ADAPTER_CONNECTIONS, Unit::Count, "", "Connections of handlers to the adapter."),
    (Kind::Counter, ADAPTER_RELOADS, Unit::Count, "what, outcome", "Changes of the adapter's files, tls or tokens, by outcome: ok, or failed where the old ones stay in use."),
    (Kind::Counter, DELIVERED, Unit::Count, "", "Messages that a handler took, counted for each connection."),
    (Kind::Counter, DROPPED, Unit::Count, "reason", "Messages that no handler got, by reason: queue_full; connection_closed, before it was taken or handed over; bad_topic, of which the topic was not UTF-8."),
    (Kind::Gauge, LINK_UP, Unit::Count, "member", "1 where this connection to the broker is up, 0 where it is not: the pool's by number, and with MQTT 3.1.1 the one for what is retained, by that word."),
    (Kind::Counter, AUTHENTICATIONS, Unit::Count, "authenticator, number, outcome", "Answers of authenticators, by what they are (file, http, mqtt, jwt), their number in the configuration, and outcome: allow, deny, ignore, or error where there was none that can be used (a service that is away, a token that nobody known has signed)."),
    (Kind::Histogram, AUTHENTICATION_SECONDS, Unit::Seconds, "authenticator, number", "Time that an authenticator took for its answer, waiting for its turn included."),
    (Kind::Gauge, AUTHENTICATIONS_IN_FLIGHT, Unit::Count, "", "Authentications under way."),
    (Kind::Counter, AUTHENTICATION_RELOADS, Unit::Count, "outcome", "Changes of files of users, keys and rules, and requests for keys to a JWKS endpoint, by outcome: ok, or failed where the old ones stay in use."),
    (Kind::Counter, AUTHORIZATIONS, Unit::Count, "outcome", "Publishes and subscriptions checked against rules, by outcome: allow, deny."),
    (Kind::Counter, AUTHORIZATION_REQUESTS, Unit::Count, "number, outcome", "Requests to services with rules of access, by their number in the configuration (authorization.sources) and outcome: allow, deny, ignore, or error where there was no answer that can be used. What is remembered is not asked for."),
    (Kind::Counter, LOGIN_ATTEMPTS_LIMITED, Unit::Count, "by", "Authentications refused unseen after too many failed ones, by address or clientid."),
    (Kind::Gauge, LINKS_UP, Unit::Count, "", "Pool members connected to the broker."),
    (Kind::Gauge, SESSIONS, Unit::Count, "", "Devices' own sessions at the broker (broker.mode = per_client), those without a link included."),
    (Kind::Gauge, SESSIONS_UP, Unit::Count, "", "Those that are connected."),
    (Kind::Counter, SESSIONS_REFUSED, Unit::Count, "", "Devices refused because broker.max_sessions are open."),
    (Kind::Counter, SESSIONS_KICKED, Unit::Count, "", "Devices' own sessions that the broker ended."),
    (Kind::Counter, PUBLISHED, Unit::Count, "", "Messages sent to the broker."),
    (Kind::Counter, RECEIVED, Unit::Count, "", "Messages received from the broker."),
    (Kind::Counter, UNCLAIMED, Unit::Count, "", "Messages received that no connection was subscribed to any more."),
    (Kind::Counter, ACKNOWLEDGED_EARLY, Unit::Count, "", "Messages acknowledged to the broker before a slow handler took them, so that others are not held up."),
    (Kind::Counter, RECONNECTS, Unit::Count, "", "Attempts to connect to the broker after a failed or lost connection."),
    (Kind::Counter, PUBLISH_TIMEOUTS, Unit::Count, "", "Publishes without a confirmation in time."),
    (Kind::Counter, OUTBOX_FULL, Unit::Count, "", "Publishes refused because the outbox was full."),
    (Kind::Gauge, OUTBOX_MESSAGES, Unit::Count, "", "Publishes that wait to be sent to the broker."),
    (Kind::Counter, NOT_RESTORED, Unit::Count, "", "Subscriptions that the broker refused when they were restored."),
    (Kind::Gauge, MISSING, Unit::Count, "", "Subscriptions that the broker does not have because it refused to restore them. They are asked for again, after a second first and every minute at last."),
    (Kind::Counter, OVERLAPS_REFUSED, Unit::Count, "", "With MQTT 3.1.1: subscriptions refused because they overlap with others on every connection that may be opened."),
    (Kind::Counter, TOO_LARGE, Unit::Count, "", "Messages from the broker dropped because they were larger than broker.max_packet_size; most brokers of MQTT 5 drop them themselves."),
    (Kind::Counter, RETAINED_NOT_FETCHED, Unit::Count, "", "With MQTT 3.1.1: filters whose retained messages could not be fetched, because too many waited or the broker refused."),
];

/// Bounds of the latency histograms, in seconds: from a call on loopback to the
/// default time-out.
const SECONDS_BUCKETS: &[f64] = &[
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5,
    5.0, 10.0,
];

/// Where metrics are registered and read. Cheap to clone.
#[derive(Clone)]
pub struct Metrics {
    recorder: Arc<PrometheusRecorder>,
}

impl Metrics {
    /// An empty set; every gateway has its own.
    pub fn new() -> Result<Self, metrics_exporter_prometheus::BuildError> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), SECONDS_BUCKETS)?
            .build_recorder();
        for (kind, name, unit, _, help) in TABLE {
            let (name, unit) = (KeyName::from_const_str(name), Some(*unit));
            let help = SharedString::const_str(help);
            match kind {
                Kind::Counter => recorder.describe_counter(name, unit, help),
                Kind::Gauge => recorder.describe_gauge(name, unit, help),
                Kind::Histogram => recorder.describe_histogram(name, unit, help),
            }
        }
        Ok(Self {
            recorder: Arc::new(recorder),
        })
    }

    /// Reads what was recorded, as Prometheus text.
    pub fn handle(&self) -> PrometheusHandle {
        self.recorder.handle()
    }

    /// The table of all metrics in Markdown, for the documentation.
    pub fn markdown() -> String {
        let mut text = String::from("| metric | type | labels | meaning |\n|---|---|---|---|\n");
        for (kind, name, _, labels, help) in TABLE {
            let kind = match kind {
                Kind::Counter => "counter",
                Kind::Gauge => "gauge",
                Kind::Histogram => "histogram",
            };
            text.push_str(&format!("| `{name}` | {kind} | {labels} | {help} |\n"));
        }
        text
    }

    fn counter(&self, name: &'static str, labels: Vec<Label>) -> Counter {
        let key = Key::from_parts(name, labels);
        self.recorder.register_counter(&key, &METADATA)
    }

    fn gauge(&self, name: &'static str, labels: Vec<Label>) -> Gauge {
        let key = Key::from_parts(name, labels);
        self.recorder.register_gauge(&key, &METADATA)
    }

    fn histogram(&self, name: &'static str, labels: Vec<Label>) -> Histogram {
        let key = Key::from_parts(name, labels);
        self.recorder.register_histogram(&key, &METADATA)
    }
}

const METADATA: Metadata<'static> = Metadata::new(module_path!(), Level::INFO, None);

fn label(name: &'static str, value: impl Into<SharedString>) -> Label {
    Label::new(name, value)
}

/// Why connections are refused.
const REFUSALS: [&str; 10] = [
    "access_rules",
    "max_connections",
    "max_connections_per_address",
    "max_conn_rate",
    "proxy_protocol",
    "proxy_protocol_trusted",
    "max_handshakes",
    "handshake_failed",
    "handshake_silent",
    "setup",
];

fn messages_dropped(metrics: &Metrics, reason: &'static str) -> Counter {
    metrics.counter(DROPPED, vec![label("reason", reason)])
}

fn datagrams_dropped(metrics: &Metrics, listener: &str, reason: &'static str) -> Counter {
    let labels = vec![
        label("listener", listener.to_owned()),
        label("reason", reason),
    ];
    metrics.counter(DATAGRAMS_DROPPED, labels)
}

/// Metrics of one listener and its connections.
#[derive(Clone)]
pub struct ListenerMetrics {
    metrics: Metrics,
    listener: String,
    /// By reason; whoever floods a listener must not make it look them up.
    refused: Arc<[(&'static str, Counter)]>,
    /// Connections open.
    pub open: Gauge,
    /// Connections accepted.
    pub opened: Counter,
    /// Failures to accept.
    pub accept_errors: Counter,
    /// Connections ended by a fault of ours.
    pub panics: Counter,
    /// Bytes from devices.
    pub received_bytes: Counter,
    /// Bytes to devices.
    pub sent_bytes: Counter,
    /// Pauses for a rate limit.
    pub reads_paused: Counter,
    /// Datagrams beyond a rate limit.
    pub dropped_rate: Counter,
    /// Messages that handlers took.
    pub delivered: Counter,
    /// Messages dropped because a queue was full.
    pub dropped_full: Counter,
    /// Messages dropped because their connection ended.
    pub dropped_closed: Counter,
}

impl ListenerMetrics {
    /// `listener` is `<kind>.<name>`.
    pub fn new(metrics: &Metrics, listener: &str) -> Self {
        let labels = || vec![label("listener", listener.to_owned())];
        let dropped = |reason| messages_dropped(metrics, reason);
        Self {
            open: metrics.gauge(CONNECTIONS, labels()),
            opened: metrics.counter(OPENED, labels()),
            accept_errors: metrics.counter(ACCEPT_ERRORS, labels()),
            panics: metrics.counter(PANICS, labels()),
            refused: REFUSALS
                .map(|reason| {
                    let mut labels = labels();
                    labels.push(label("reason", reason));
                    (reason, metrics.counter(REFUSED, labels))
                })
                .into(),
            received_bytes: metrics.counter(RECEIVED_BYTES, labels()),
            sent_bytes: metrics.counter(SENT_BYTES, labels()),
            reads_paused: metrics.counter(READS_PAUSED, labels()),
            dropped_rate: datagrams_dropped(metrics, listener, "rate"),
            delivered: metrics.counter(DELIVERED, Vec::new()),
            dropped_full: dropped("queue_full"),
            dropped_closed: dropped("connection_closed"),
            metrics: metrics.clone(),
            listener: listener.to_owned(),
        }
    }

    /// Counts a connection refused before any callback.
    pub fn refused(&self, reason: &'static str) {
        let mut refused = self.refused.iter();
        if let Some((_, counter)) = refused.find(|(known, _)| *known == reason) {
            counter.increment(1);
        }
    }

    /// Datagrams received, sent, and failures to receive.
    pub fn datagrams(&self) -> [Counter; 3] {
        let names = [DATAGRAMS_RECEIVED, DATAGRAMS_SENT, RECEIVE_ERRORS];
        names.map(|name| {
            let labels = vec![label("listener", self.listener.clone())];
            self.metrics.counter(name, labels)
        })
    }

    /// Datagrams dropped for this reason.
    pub fn datagrams_dropped(&self, reason: &'static str) -> Counter {
        datagrams_dropped(&self.metrics, &self.listener, reason)
    }

    /// Counts that files have changed and what became of it.
    pub fn reloaded(&self, outcome: &'static str) {
        let labels = vec![
            label("listener", self.listener.clone()),
            label("outcome", outcome),
        ];
        self.metrics.counter(RELOADS, labels).increment(1);
    }

    /// Counts a connection's end.
    pub fn closed(&self, reason: &'static str) {
        let labels = vec![
            label("listener", self.listener.clone()),
            label("reason", reason),
        ];
        self.metrics.counter(CLOSED, labels).increment(1);
    }
}

/// How a stream to a handler ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StreamOutcome {
    /// It was answered with OK.
    Ok,
    /// The channel broke, or the handler was unavailable.
    Broken,
    /// It was answered with another status.
    Error,
    /// It was not answered in time.
    Late,
    /// It was answered with OK before its end.
    Early,
}

/// Metrics of one handler.
#[derive(Clone)]
pub struct HandlerMetrics {
    metrics: Metrics,
    handler: String,
    /// Callbacks that wait for their answer.
    pub in_flight: Gauge,
    /// Callbacks sent again.
    pub retried: Counter,
    /// OnSocketClosed that no handler took.
    pub closed_lost: Counter,
    /// Events handed to streams and not known to be taken.
    pub unacknowledged: Gauge,
    /// Events of streams sent again.
    pub resent: Counter,
    /// Connected channels.
    pub channels_up: Gauge,
    /// Connections whose callback waits for a handler that is away.
    pub held: Gauge,
    /// Connections that moved to another address.
    pub failovers: Counter,
    ok: [Counter; METHODS.len()],
    seconds: [Histogram; METHODS.len()],
}

/// The callbacks, in the order of [`crate::handler::Event::method_index`].
pub const METHODS: [&str; 5] = [
    "OnSocketCreated",
    "OnReceivedBytes",
    "OnReceivedMessages",
    "OnTimerTimeout",
    "OnSocketClosed",
];

impl HandlerMetrics {
    /// `handler` is its name in the configuration.
    pub fn new(metrics: &Metrics, handler: &str) -> Self {
        let labels = || vec![label("handler", handler.to_owned())];
        let by_method = |method: &'static str| {
            vec![
                label("handler", handler.to_owned()),
                label("method", method),
            ]
        };
        Self {
            in_flight: metrics.gauge(CALLBACKS_IN_FLIGHT, labels()),
            retried: metrics.counter(CALLBACKS_RETRIED, labels()),
            closed_lost: metrics.counter(CLOSED_LOST, labels()),
            unacknowledged: metrics.gauge(UNACKNOWLEDGED, labels()),
            resent: metrics.counter(RESENT, labels()),
            channels_up: metrics.gauge(HANDLER_UP, labels()),
            held: metrics.gauge(CONNECTIONS_HELD, labels()),
            failovers: metrics.counter(FAILOVERS, labels()),
            ok: METHODS.map(|method| {
                let mut labels = by_method(method);
                labels.push(label("outcome", "ok"));
                metrics.counter(CALLBACKS, labels)
            }),
            seconds: METHODS.map(|method| metrics.histogram(CALLBACK_SECONDS, by_method(method))),
            metrics: metrics.clone(),
            handler: handler.to_owned(),
        }
    }

    /// The handler's name in the configuration.
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// Records a callback that the handler took.
    pub fn succeeded(&self, method: usize, elapsed: Duration) {
        if let (Some(ok), Some(seconds)) = (self.ok.get(method), self.seconds.get(method)) {
            ok.increment(1);
            seconds.record(elapsed.as_secs_f64());
        }
    }

    /// Counts a stream that was opened.
    pub fn stream_opened(&self, method: usize) {
        let method = METHODS.get(method).copied().unwrap_or_default();
        let labels = vec![
            label("handler", self.handler.clone()),
            label("method", method),
        ];
        self.metrics.counter(STREAMS_OPENED, labels).increment(1);
    }

    /// Counts a stream that ended.
    pub fn stream_ended(&self, method: usize, outcome: StreamOutcome) {
        let method = METHODS.get(method).copied().unwrap_or_default();
        let outcome = match outcome {
            StreamOutcome::Ok => "ok",
            StreamOutcome::Broken => "broken",
            StreamOutcome::Error => "error",
            StreamOutcome::Late => "late",
            StreamOutcome::Early => "early",
        };
        let labels = vec![
            label("handler", self.handler.clone()),
            label("method", method),
            label("outcome", outcome),
        ];
        self.metrics.counter(STREAMS_ENDED, labels).increment(1);
    }

    /// Those of the channels to one address of the configuration.
    pub fn channels(&self, address: &str) -> ChannelMetrics {
        let gauge = |state: &'static str| {
            let labels = vec![
                label("handler", self.handler.clone()),
                label("address", address.to_owned()),
                label("state", state),
            ];
            self.metrics.gauge(HANDLER_CHANNELS, labels)
        };
        ChannelMetrics {
            handler: self.handler.clone(),
            all_up: self.channels_up.clone(),
            up: gauge("up"),
            not_serving: gauge("not_serving"),
            down: gauge("down"),
        }
    }

    /// Records a callback that failed for good.
    pub fn failed(&self, method: usize, outcome: &str) {
        let method = METHODS.get(method).copied().unwrap_or_default();
        let labels = vec![
            label("handler", self.handler.clone()),
            label("method", method),
            label("outcome", outcome.to_owned()),
        ];
        self.metrics.counter(CALLBACKS, labels).increment(1);
    }
}

/// How a channel to a handler is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ChannelState {
    /// Connected.
    Up,
    /// Connected, but for new connections.
    NotServing,
    /// Not connected.
    Down,
}

/// Metrics of the channels to one address of a handler.
#[derive(Clone)]
pub struct ChannelMetrics {
    handler: String,
    all_up: Gauge,
    up: Gauge,
    not_serving: Gauge,
    down: Gauge,
}

impl ChannelMetrics {
    /// The handler's name in the configuration.
    pub fn handler(&self) -> &str {
        &self.handler
    }

    /// Counts one more channel, for as long as the value lives; it is down.
    pub fn presence(&self) -> Presence {
        self.down.increment(1.0);
        Presence {
            metrics: self.clone(),
            state: ChannelState::Down,
        }
    }

    fn count(&self, state: ChannelState, by: f64) {
        match state {
            ChannelState::Up => self.up.increment(by),
            ChannelState::NotServing => self.not_serving.increment(by),
            ChannelState::Down => self.down.increment(by),
        }
        if state != ChannelState::Down {
            self.all_up.increment(by);
        }
    }
}

/// A channel in the metrics.
pub struct Presence {
    metrics: ChannelMetrics,
    state: ChannelState,
}

impl Presence {
    /// The channel is so from now on.
    pub fn set(&mut self, state: ChannelState) {
        self.metrics.count(self.state, -1.0);
        self.metrics.count(state, 1.0);
        self.state = state;
    }
}

impl Drop for Presence {
    fn drop(&mut self) {
        self.metrics.count(self.state, -1.0);
    }
}

/// Metrics of the adapter.
#[derive(Clone)]
pub struct AdapterMetrics {
    metrics: Metrics,
    /// Connections of handlers.
    pub connections: Gauge,
    /// Calls without a token that is known.
    pub unauthenticated: Counter,
    /// Calls about connections of other handlers.
    pub foreign: Counter,
    /// Connections that are too many.
    pub max_connections: Counter,
    /// Connections without a TLS handshake, or without a word of HTTP/2.
    pub handshake_failed: Counter,
    /// Requests that were not whole in time, or were too many.
    pub unread: Counter,
    /// Watches of health that were too many.
    pub watches: Counter,
    seconds: [Histogram; ADAPTER_METHODS.len()],
    succeeded: [Counter; ADAPTER_METHODS.len()],
}

/// The adapter's calls, in the order of their counters.
pub const ADAPTER_METHODS: [&str; 8] = [
    "Send",
    "Close",
    "Authenticate",
    "StartTimer",
    "Publish",
    "Subscribe",
    "Unsubscribe",
    "RawPublish",
];

impl AdapterMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        let refused = |reason| metrics.counter(ADAPTER_REFUSED, vec![label("reason", reason)]);
        Self {
            connections: metrics.gauge(ADAPTER_CONNECTIONS, Vec::new()),
            unauthenticated: refused("unauthenticated"),
            foreign: refused("foreign"),
            max_connections: refused("max_connections"),
            handshake_failed: refused("handshake_failed"),
            unread: refused("unread"),
            watches: refused("watches"),
            seconds: ADAPTER_METHODS.map(|method| {
                metrics.histogram(ADAPTER_CALL_SECONDS, vec![label("method", method)])
            }),
            succeeded: ADAPTER_METHODS.map(|method| {
                let labels = vec![label("method", method), label("code", "SUCCESS")];
                metrics.counter(ADAPTER_CALLS, labels)
            }),
            metrics: metrics.clone(),
        }
    }

    /// Counts that files have changed and what became of it.
    pub fn reloaded(&self, what: &'static str, outcome: &'static str) {
        let labels = vec![label("what", what), label("outcome", outcome)];
        self.metrics.counter(ADAPTER_RELOADS, labels).increment(1);
    }

    /// Counts a call that took so long; `code` is the name of the result code, or of gRPC's status
    /// where that is not OK.
    pub fn answered(&self, method: usize, code: &'static str, took: Duration) {
        if let Some(histogram) = self.seconds.get(method) {
            histogram.record(took);
        }
        match self.succeeded.get(method) {
            Some(counter) if code == "SUCCESS" => counter.increment(1),
            _ => {
                let method = ADAPTER_METHODS.get(method).copied().unwrap_or("other");
                let labels = vec![label("method", method), label("code", code)];
                self.metrics.counter(ADAPTER_CALLS, labels).increment(1);
            }
        }
    }
}

/// Metrics of the broker pool.
#[derive(Clone)]
pub struct BrokerMetrics {
    /// Members connected.
    pub links_up: Gauge,
    /// Devices' own sessions.
    pub sessions: Gauge,
    /// Those that are connected.
    pub sessions_up: Gauge,
    /// Devices refused for want of room.
    pub sessions_refused: Counter,
    /// Sessions that the broker ended.
    pub sessions_kicked: Counter,
    /// Messages sent.
    pub published: Counter,
    /// Messages received.
    pub received: Counter,
    /// Messages received for nobody.
    pub unclaimed: Counter,
    /// Messages acknowledged before they were taken.
    pub acknowledged_early: Counter,
    /// Attempts to connect again.
    pub reconnects: Counter,
    /// Publishes unconfirmed in time.
    pub publish_timeouts: Counter,
    /// Publishes refused for want of room.
    pub outbox_full: Counter,
    /// Publishes that wait to be sent.
    pub outbox_messages: Gauge,
    /// Subscriptions refused when restored.
    pub not_restored: Counter,
    /// Subscriptions refused when restored and not there yet.
    pub missing: Gauge,
    /// Subscriptions refused because they overlap.
    pub overlaps_refused: Counter,
    /// Messages dropped because they were too large.
    pub too_large: Counter,
    /// Filters whose retained messages were not fetched.
    pub retained_not_fetched: Counter,
    /// Messages dropped because their connection had ended.
    pub dropped_closed: Counter,
    /// Messages dropped because their topic was not UTF-8.
    pub dropped_bad_topic: Counter,
    metrics: Metrics,
}

impl BrokerMetrics {
    /// Registers them.
    pub fn new(metrics: &Metrics) -> Self {
        let counter = |name| metrics.counter(name, Vec::new());
        let gauge = |name| metrics.gauge(name, Vec::new());
        Self {
            links_up: gauge(LINKS_UP),
            sessions: gauge(SESSIONS),
            sessions_up: gauge(SESSIONS_UP),
            sessions_refused: counter(SESSIONS_REFUSED),
            sessions_kicked: counter(SESSIONS_KICKED),
            published: counter(PUBLISHED),
            received: counter(RECEIVED),
            unclaimed: counter(UNCLAIMED),
            acknowledged_early: counter(ACKNOWLEDGED_EARLY),
            reconnects: counter(RECONNECTS),
            publish_timeouts: counter(PUBLISH_TIMEOUTS),
            outbox_full: counter(OUTBOX_FULL),
            outbox_messages: gauge(OUTBOX_MESSAGES),
            not_restored: counter(NOT_RESTORED),
            missing: gauge(MISSING),
            overlaps_refused: counter(OVERLAPS_REFUSED),
            too_large: counter(TOO_LARGE),
            retained_not_fetched: counter(RETAINED_NOT_FETCHED),
            dropped_closed: messages_dropped(metrics, "connection_closed"),
            dropped_bad_topic: messages_dropped(metrics, "bad_topic"),
            metrics: metrics.clone(),
        }
    }

    /// Whether a connection to the broker is up; `member` is its number, or what it is for.
    pub fn link_up(&self, member: String) -> Gauge {
        self.metrics.gauge(LINK_UP, vec![label("member", member)])
    }
}
