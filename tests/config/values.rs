//! Faults of values.

use exproto_sidecar::config;

use crate::support::{env, faults, one_fault, toml};

#[test]
fn bad_values() {
    let cases: &[(&str, &str)] = &[
        (
            "shards = -1",
            "shards: found -1; allowed: a whole number, from 0 to 256",
        ),
        ("shards = 1.5", "shards: found 1.5; allowed: a whole number"),
        (
            "shards = true",
            "shards: found true; allowed: a whole number",
        ),
        (
            "raw_publish = 'yes'",
            "raw_publish: found \"yes\"; allowed: true or false",
        ),
        (
            "raw_publish = 1",
            "raw_publish: found 1; allowed: true or false",
        ),
        (
            "node_name = ''",
            "node_name: found \"\"; allowed: 1 to 255 bytes of text",
        ),
        (
            "node_name = 7",
            "node_name: found 7; allowed: 1 to 255 bytes of text",
        ),
        (
            "node_name = \"a\\nb\"",
            "node_name: found \"a\\nb\"; allowed: 1 to 255 bytes",
        ),
        (
            "idle_timeout = 30",
            "idle_timeout: found 30; allowed: \"infinity\" or a duration such as \"30s\"",
        ),
        (
            "idle_timeout = '0s'",
            "idle_timeout: found \"0s\"; allowed: \"infinity\" or a duration",
        ),
        ("idle_timeout = '0s'", "at least 1ms"),
        (
            "shutdown_timeout = 'infinity'",
            "shutdown_timeout: found \"infinity\"; allowed: a duration",
        ),
        (
            "mountpoint = 'a/#'",
            "mountpoint: found \"a/#\"; allowed: the beginning of a topic",
        ),
        (
            "mountpoint = '${client}/'",
            "placeholders are ${clientid} and ${username}",
        ),
        (
            "[handler]\nmax_batch = 0",
            "handler.max_batch: found 0; allowed: a whole number, at least 1",
        ),
        (
            "[handler]\nrequest_timeout = '0ms'",
            "handler.request_timeout: found \"0ms\"; allowed: a duration",
        ),
        (
            "[handler]\nservice_name = 'X'",
            "allowed: \"ConnectionUnaryHandler\" or \"ConnectionHandler\"",
        ),
        (
            "[handler]\nstreaming = true",
            "handler.streaming: found true with handler.service_name = \"ConnectionUnaryHandler\"; allowed: with \"ConnectionHandler\", or false",
        ),
        (
            "[handlers.a]\naddress = 'http://a'\nstreaming = true",
            "handlers.a.streaming: found true with handlers.a.service_name",
        ),
        (
            "[handler]\nstream_max_age = '0ms'",
            "handler.stream_max_age: found \"0ms\"; allowed: a duration",
        ),
        (
            "[handler]\nstream_max_messages = 0",
            "handler.stream_max_messages: found 0; allowed: a whole number, at least 1",
        ),
        (
            "[handler]\non_unavailable = 'drop'",
            "handler.on_unavailable: found \"drop\"; allowed: \"hold\" or \"close\"",
        ),
        (
            "[handler]\naddress = []",
            "handler.address: found []; allowed: one or a list of: http://HOST:PORT",
        ),
        (
            "[handler]\naddress = ''",
            "handler.address: found \"\"; allowed: one or a list of: http://HOST:PORT",
        ),
        (
            "[handler]\naddress = ['http://a:1', 'b:2']",
            "handler.address: found \"b:2\"; allowed: http://HOST:PORT",
        ),
        (
            "[handler]\naddress = 'http://a:1/x'",
            "found \"http://a:1/x\"; allowed: http://HOST:PORT",
        ),
        (
            "[handler]\naddress = 'http://u:p@a:1'",
            "found \"http://***@a:1\"; allowed",
        ),
        (
            "[broker]\nurl = 'mqtt://u:p/w@b'",
            "broker.url: found \"mqtt://***@b\"; allowed: mqtt://HOST:PORT",
        ),
        (
            "[broker]\nurl = 'mqtt://u:p@b'",
            "belong in broker.username and broker.password or broker.password_file",
        ),
        (
            "[broker]\npool_size = 65",
            "broker.pool_size: found 65; allowed: a whole number, from 1 to 64",
        ),
        (
            "[broker]\nprotocol = 3",
            "broker.protocol: found 3; allowed: 4 or 5",
        ),
        (
            "[broker]\nprotocol = '3'",
            "broker.protocol: found \"3\"; allowed: 4 or 5",
        ),
        (
            "[broker]\nclient_id_prefix = ''",
            "broker.client_id_prefix: found \"\"; allowed: 1 to 32 characters",
        ),
        (
            "[broker]\nclient_id_prefix = 'a/b'",
            "broker.client_id_prefix: found \"a/b\"; allowed: 1 to 32",
        ),
        (
            "[broker]\nkeep_alive = '1s'",
            "broker.keep_alive: found \"1s\"; allowed: a duration",
        ),
        ("[broker]\nkeep_alive = '1s'", "from 5s to 65535s"),
        (
            "[broker]\nreceive_maximum = 65536",
            "broker.receive_maximum: found 65536; allowed: a whole number, from 1 to 65535",
        ),
        ("[broker]\nmax_packet_size = '1GiB'", "from 1KiB to 256MiB"),
        (
            "[broker]\noutbox_max_bytes = '1MB'",
            "broker.outbox_max_bytes: found \"1MB\"; allowed: a size such as \"64KiB\"",
        ),
        (
            "[broker]\nreconnect_min = '6s'",
            "broker.reconnect_min: found 6s; allowed: not more than broker.reconnect_max, which is 1500ms",
        ),
        (
            "[broker]\nmode = 'own'",
            "broker.mode: found \"own\"; allowed: \"pool\" or \"per_client\"",
        ),
        (
            "[broker]\nmode = 'per_client'\npool_size = 8",
            "broker.pool_size: found 8 with broker.mode = \"per_client\"",
        ),
        (
            "[broker]\nmode = 'per_client'\nprotocol = 4",
            "broker.protocol: found 4 with broker.mode = \"per_client\"",
        ),
        (
            "[broker]\nmax_sessions = 5",
            "broker.max_sessions: found a value with broker.mode = \"pool\"",
        ),
        (
            "[broker.will]\ntopic = 'gone'",
            "broker.will.topic: found a value with broker.mode = \"pool\"",
        ),
        (
            "[broker.will]\nretain = true",
            "broker.will.retain: found a value with broker.mode = \"pool\"",
        ),
        (
            "[broker]\nmode = 'per_client'\nwill = { topic = 'a/#' }",
            "broker.will.topic: found \"a/#\"; allowed: a topic, which has no + and no #",
        ),
        (
            "[broker]\nmode = 'per_client'\nwill = { payload = 'gone' }",
            "broker.will.payload: found a value without broker.will.topic; allowed: with it",
        ),
        (
            "[broker]\nmode = 'per_client'\n[[authentication]]\nmechanism = 'password_based'\nbackend = 'mqtt'",
            "authentication.1.backend: found \"mqtt\" with broker.mode = \"per_client\"",
        ),
        (
            "[broker]\nmode = 'per_client'\nwill = { topic = 'x', payload = '${password}' }",
            "broker.will.payload: found ${password}, which has no value here; allowed: placeholders \
             are ${clientid} ${username} ${peerhost} ${cert_common_name} ${cert_subject} ${proto_name}",
        ),
        (
            "[broker]\nmode = 'per_client'\nwill = { topic = '${device}' }",
            "broker.will.topic: found \"${device}\"; allowed: text; placeholders are ${clientid} \
             ${username} ${peerhost} ${cert_common_name} ${cert_subject} ${proto_name}",
        ),
        (
            "[clientinfo_override]\nusername = '${password}'",
            "clientinfo_override.username: found ${password}, which has no value here",
        ),
        (
            "[clientinfo_override]\nclientid = 'a-${password}'",
            "clientinfo_override.clientid: found ${password}, which has no value here",
        ),
        (
            "[clientinfo_override]\npassword = '${topic}'",
            "clientinfo_override.password: found ${topic}, which has no value here; allowed: \
             placeholders are ${clientid} ${username} ${peerhost} ${cert_common_name} ${cert_subject} \
             ${proto_name} ${password}",
        ),
        (
            "[[authentication]]\nmechanism = 'password_based'\nbackend = 'http'\nurl = 'http://h/${topic}'",
            "authentication.1.url: found ${topic}, which has no value here",
        ),
        (
            "[[authentication]]\nmechanism = 'jwt'\nendpoint = 'http://h/${clientid}'",
            "authentication.1.endpoint: found ${clientid}, which has no value here; allowed: no placeholders",
        ),
        (
            "[[authorization.sources]]\ntype = 'http'\nurl = 'http://h/'\nbody = { p = '${password}' }",
            "authorization.sources.1.body: found ${password}, which has no value here; allowed: \
             placeholders are ${clientid} ${username} ${peerhost} ${cert_common_name} ${cert_subject} \
             ${proto_name} ${action} ${topic} ${qos}",
        ),
        (
            "[admin]\nbind = 'localhost:1'",
            "admin.bind: found \"localhost:1\"; allowed: an IP address and port",
        ),
        (
            "[log]\nformat = 'xml'",
            "log.format: found \"xml\"; allowed: \"text\" or \"json\"",
        ),
        (
            "[queue]\npolicy = 'x'",
            "queue.policy: found \"x\"; allowed: \"drop_oldest\" or \"close\"",
        ),
        (
            "[listeners.tcp.default]\nmax_connections = 0",
            "max_connections: found 0; allowed: \"infinity\" or a whole number, at least 1",
        ),
        (
            "[listeners.tcp.default]\nmax_conn_rate = 0",
            "max_conn_rate: found 0; allowed: \"infinity\" or a number per second, more than 0",
        ),
        (
            "[listeners.tcp.default]\naccess_rules = ['deny all', 'x']",
            "access_rules: found \"x\"; allowed: \"allow\" or \"deny\"",
        ),
        (
            "[listeners.tcp.default]\nmountpoint = '+'",
            "listeners.tcp.default.mountpoint: found \"+\"",
        ),
        (
            "[listeners.tcp.default]\ntcp_options.backlog = 0",
            "tcp_options.backlog: found 0; allowed: a whole number, from 1 to 65535",
        ),
        (
            "[listeners.tcp.default]\ntcp_options.recbuf = 'x'",
            "tcp_options.recbuf: found \"x\"; allowed: a size",
        ),
        (
            "shutdown_timeout = 1979-05-27",
            "shutdown_timeout: found a table; allowed: a duration",
        ),
    ];
    for (text, expected) in cases {
        one_fault(toml(text), &["file config.toml: ", expected]);
    }
}

#[test]
fn secrets_are_not_shown_by_faults() {
    for text in [
        "[broker]\npassword = 70070",
        "[broker]\npassword = ['70070']",
        "[broker.password]\nx = '70070'",
    ] {
        let faults = faults(toml(text));
        assert_eq!(faults.len(), 1);
        assert!(
            faults[0].contains("broker.password: found ***; allowed: text (in quotes)"),
            "{}",
            faults[0]
        );
        assert!(!faults[0].contains("70070"));
    }
}

#[test]
fn no_text_makes_any_key_panic() {
    let odd = [
        "",
        " ",
        "-",
        "-1",
        "+1",
        "1e400",
        "NaN",
        "99999999999999999999999999999999999999999",
        "[",
        "[[]]",
        "[1]",
        ",",
        "[\"\"]",
        "[]\nx = 1",
        "\0",
        "é",
        "${",
        "://",
        "http://[",
        "mqtt://@",
        "::",
        ":",
        "allow ",
        "allow -",
        "0",
        "18446744073709551615h",
        "18446744073709551615GiB",
        "infinity",
    ];
    for key in config::keys() {
        for text in odd {
            if let Err(report) = env(&[(&key.variable, text)]) {
                let line = report.to_string();
                // A listener that lacks its certificate is named too.
                let listener = key.path.split(".default").next().unwrap();
                assert!(
                    line.contains(&key.variable) || line.contains(listener),
                    "{line}"
                );
            }
        }
    }
}
