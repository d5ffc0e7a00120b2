//! Faults of files and keys, and the report they come in.

use std::path::Path;

use exproto_sidecar::config::{self, Sources};

use crate::support::{env, faults, file, load_file, one_fault, pairs, set, toml};

#[test]
fn all_faults_come_in_one_report() {
    let (_dir, path) = file(
        "config.toml",
        "shards = 1000\nidle = 1\n[broker]\npool_size = 0\n[listeners.tcp.a]\nbind = 1\n[listeners.tcp.b]\nbind = 1\n",
    );
    let report = config::load(&Sources {
        file: Some(path.clone()),
        env: pairs(&[("EXPROTO_Log__Level", "loud")]),
        set: pairs(&[("broker.url", "tcp://x")]),
    })
    .unwrap_err();
    let name = path.display();
    assert_eq!(
        report.to_string(),
        format!(
            "the configuration has 6 faults:
  file {name}: idle: unknown key; allowed: {}
  file {name}: shards: found 1000; allowed: a whole number, from 0 to 256
  command line --set broker.url: broker.url: found \"tcp://x\"; allowed: mqtt://HOST:PORT or mqtts://HOST:PORT, \
             IPv6 in brackets, without path or query
  file {name}: broker.pool_size: found 0; allowed: a whole number, from 1 to 64
  environment variable EXPROTO_Log__Level: log.level: found \"loud\"; allowed: \"error\" or \"warn\" or \"info\" or \
             \"debug\" or \"trace\"
  file {name}: listeners.tcp.b.bind: found 0.0.0.0:1, but listeners.tcp.a.bind has 0.0.0.0:1 (file {name}); \
             allowed: an address that no other listener, server.bind or admin.bind has",
            "node_name, mountpoint, idle_timeout, raw_publish, clientinfo_mountpoint, authenticate_timeout, shards, \
             shutdown_timeout, server, handler, handlers, broker, authentication, clientinfo_override, authorization, \
             login_attempts, admin, log, queue, listeners"
        )
    );
}

#[test]
fn files_that_cannot_be_used() {
    one_fault(
        load_file(Path::new("no/such.toml")),
        &["file no/such.toml: cannot be read", "(named by --config)"],
    );
    one_fault(
        env(&[("EXPROTO_Config", "no/such.toml")]),
        &[
            "file no/such.toml: cannot be read: No such file",
            "(named by EXPROTO_Config)",
        ],
    );
    let (_dir, path) = file("config.ini", "");
    one_fault(
        load_file(&path),
        &["unknown extension; allowed: .toml, .yaml, .yml, .json"],
    );
    one_fault(
        load_file(&std::env::temp_dir().join("..toml")),
        &["cannot be read"],
    );
}

#[test]
fn syntax_errors_have_a_place_and_do_not_quote_the_line() {
    for (name, text, place) in [
        (
            "config.toml",
            "shards = 1\n[broker]\npassword = \"hunter2\" x\n",
            "file config.toml: line 3, column 22: ",
        ),
        (
            "config.json",
            "{\"broker\":\n {\"password\": \"hunter2\" x}}",
            "file config.json: line 2, column 25: ",
        ),
        (
            "config.yaml",
            "broker:\n  password: \"hunter2\" x\n",
            "file config.yaml: line 2, column ",
        ),
        (
            "config.yaml",
            "broker:\n  password: hunter2\n bad: [\n",
            "file config.yaml: line ",
        ),
        (
            "config.yaml",
            "- hunter2",
            "file config.yaml: line 1, column 1: ",
        ),
        (
            "config.json",
            "[\"hunter2\"]",
            "file config.json: line 1, column ",
        ),
        (
            "config.json",
            "\"hunter2\"",
            "file config.json: line 1, column 9: found no table of keys",
        ),
        (
            "config.yaml",
            "hunter2",
            "file config.yaml: line 1, column 1: ",
        ),
    ] {
        let (_dir, path) = file(name, text);
        let faults = faults(load_file(&path));
        assert_eq!(faults.len(), 1);
        assert!(faults[0].starts_with(place), "{}", faults[0]);
        assert!(!faults[0].contains("hunter2"), "{}", faults[0]);
    }
}

#[test]
fn a_broken_file_is_not_followed_by_misleading_faults() {
    let (_dir, path) = file("config.toml", "x = \n");
    let report = config::load(&Sources {
        file: Some(path),
        env: pairs(&[
            ("EXPROTO_LISTENERS__TCP__M__HANDLER", "m"),
            ("EXPROTO_SHARDS", "x"),
        ]),
        ..Sources::default()
    });
    let faults = faults(report);
    assert_eq!(faults.len(), 2, "{faults:#?}");
    assert!(faults[1].contains("EXPROTO_SHARDS: shards: found \"x\""));
}

#[test]
fn unknown_keys_come_with_a_suggestion() {
    one_fault(
        toml("[broker]\nulr = 'secret'"),
        &[
            "file config.toml: broker.ulr: unknown key; did you mean broker.url?; allowed: url, protocol, ",
        ],
    );
    one_fault(
        toml("pool_size = 1"),
        &["pool_size: unknown key; did you mean broker.pool_size?"],
    );
    one_fault(
        toml("[brokers]\nurl = 'x'"),
        &["brokers: unknown key; did you mean broker?"],
    );
    one_fault(
        toml("[server.ssl_options]\ncert = 'x'"),
        &["server.ssl_options.cert: unknown key; allowed: enable"],
    );
    one_fault(
        env(&[("Exproto_BROKER_URL", "secret")]),
        &[
            "environment variable Exproto_BROKER_URL: broker_url: unknown key; did you mean EXPROTO_BROKER__URL?",
        ],
    );
    one_fault(
        env(&[("EXPROTO_BROKER__ULR", "secret")]),
        &[
            "environment variable EXPROTO_BROKER__ULR: broker.ulr: unknown key; did you mean EXPROTO_BROKER__URL?",
        ],
    );
    one_fault(
        set(&[("zzz", "secret")]),
        &["command line --set zzz: zzz: unknown key; allowed: node_name"],
    );
    one_fault(set(&[("", "x")]), &["unknown key"]);
    one_fault(
        env(&[("EXPROTO_", "x")]),
        &["environment variable EXPROTO_: "],
    );
    assert!(!faults(toml("[broker]\nulr = 'hunter2'"))[0].contains("hunter2"));
    one_fault(
        toml("[listeners.quic.a]\nbind = 1"),
        &["listeners.quic: unknown key; allowed: tcp, ssl, udp, dtls"],
    );
}

#[test]
fn an_unknown_table_names_every_variable_in_it() {
    let faults = faults(env(&[
        ("EXPROTO_MQTT__URL", "x"),
        ("EXPROTO_MQTT__USER", "x"),
    ]));
    assert_eq!(faults.len(), 2);
    assert!(
        faults[0].contains("EXPROTO_MQTT__URL: mqtt: unknown key"),
        "{}",
        faults[0]
    );
    assert!(
        faults[1].contains("EXPROTO_MQTT__USER: mqtt: unknown key"),
        "{}",
        faults[1]
    );
}

#[test]
fn a_key_set_by_two_variables() {
    one_fault(
        env(&[("EXPROTO_SHARDS", "1"), ("exproto_shards", "2")]),
        &["environment variable exproto_shards: shards: EXPROTO_SHARDS sets this key too"],
    );
}

#[test]
fn a_value_in_place_of_a_table_is_not_shown() {
    one_fault(
        env(&[("EXPROTO_BROKER", "mqtt://u:hunter2@b")]),
        &[
            "EXPROTO_BROKER: broker: found text; allowed: a table with the keys url, ",
            "in a variable EXPROTO_BROKER__KEY",
        ],
    );
    one_fault(
        toml("handlers = 1"),
        &["handlers: found a number; allowed: a table"],
    );
    one_fault(
        toml("server = { ssl_options = [] }"),
        &["server.ssl_options: found a list; allowed: a table"],
    );
    assert!(!faults(env(&[("EXPROTO_BROKER", "hunter2")]))[0].contains("hunter2"));
}
