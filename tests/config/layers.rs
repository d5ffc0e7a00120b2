//! Layers: which one wins, what a variable can say, the file formats.

use std::time::Duration;

use exproto_sidecar::config::{self, Config, Limit, Sources};

use crate::support::{env, file, load_file, one_fault, pairs};

#[test]
fn nothing_configured_is_the_contract_s_default() {
    let config = env(&[]).unwrap();
    assert_eq!(config, Config::default());
    assert_eq!(config.server.bind.to_string(), "127.0.0.1:9100");
    assert_eq!(
        config.handler.address[0].to_string(),
        "http://127.0.0.1:9001"
    );
    assert_eq!(config.broker.url[0].to_string(), "mqtt://127.0.0.1:1883");
    assert_eq!(config.idle_timeout, Limit::Finite(Duration::from_secs(30)));
    assert_eq!(config.authenticate_timeout, Limit::Infinity);
    assert_eq!(config.admin.bind.unwrap().to_string(), "127.0.0.1:9180");
    let tcp: Vec<_> = config.listeners.tcp.iter().collect();
    assert_eq!(tcp.len(), 1);
    assert_eq!(tcp[0].0, "default");
    assert_eq!(tcp[0].1.bind.to_string(), "0.0.0.0:7993");
    assert!(tcp[0].1.common.mountpoint.is_empty());
    assert_eq!(tcp[0].1.common.max_connections, Limit::Finite(1_024_000));
    assert!(!config.node_name.is_empty());
}

#[test]
fn later_layers_win() {
    let (_dir, path) = file(
        "config.toml",
        "[broker]\nurl = 'mqtt://file'\npool_size = 2\nusername = 'file'\n",
    );
    let config = config::load(&Sources {
        file: Some(path),
        env: pairs(&[
            ("EXPROTO_BROKER__URL", "mqtt://env"),
            ("exproto_Broker__Username", "env"),
            ("PATH", "x"),
        ]),
        set: pairs(&[
            ("broker.url", "mqtt://set"),
            ("broker.url", "mqtt://set-again"),
        ]),
    })
    .unwrap();
    assert_eq!(config.broker.url[0].host, "set-again");
    assert_eq!(config.broker.username.as_deref(), Some("env"));
    assert_eq!(config.broker.pool_size, 2);
}

/// Turns off what cannot be without a certificate, or without a key.
fn off(key: &config::Key) -> (&'static str, &'static str) {
    match key.path.split('.').nth(1) {
        Some("ssl") => ("EXPROTO_LISTENERS__SSL__DEFAULT__ENABLE", "false"),
        Some("dtls") => ("EXPROTO_LISTENERS__DTLS__DEFAULT__ENABLE", "false"),
        // Tokens need one of several keys.
        Some("4") => ("EXPROTO_AUTHENTICATION__4__ENABLE", "false"),
        _ => ("EXPROTO_RAW_PUBLISH", "true"),
    }
}

/// The other keys of an item of a list: alone, a key does not say what the item is.
fn companions<'k>(
    key: &config::Key,
    keys: &'k [config::Key],
) -> impl Iterator<Item = (&'k str, &'k str)> {
    let mut parts = key.path.split('.');
    let numbered = |part: &str| part.parse::<u16>().is_ok();
    let place = parts.clone().skip(1).position(numbered);
    let item: Option<Vec<&str>> = place.map(|place| parts.by_ref().take(place + 2).collect());
    let prefix = item.map(|item| item.join(".") + ".");
    let own = key.path.clone();
    keys.iter()
        .filter(move |other| {
            other.path != own && prefix.as_ref().is_some_and(|p| other.path.starts_with(p))
        })
        .map(|other| (other.variable.as_str(), other.default.as_str()))
}

#[test]
fn every_key_can_be_set_by_its_variable() {
    let keys = config::keys();
    assert!(keys.len() > 60);
    for key in keys.iter().filter(|key| key.variable != off(key).0) {
        assert!(!key.doc.is_empty(), "{} is not documented", key.path);
        let mut variables = vec![off(key), (&key.variable, &key.default)];
        let others = companions(key, &keys);
        variables.extend(others.filter(|(variable, _)| *variable != off(key).0));
        let loaded = env(&variables);
        let config =
            loaded.unwrap_or_else(|report| panic!("{}={:?}: {report}", key.variable, key.default));
        let is_listener = key.path.starts_with("listeners.");
        let is_item = companions(key, &keys).next().is_some();
        if key.path != "node_name" && !is_listener && !is_item {
            assert_eq!(config, Config::default(), "{}", key.path);
        }
    }
    let value = |key: &config::Key| match off(key) {
        (variable, value) if key.variable == variable => value.to_owned(),
        _ => key.default.clone(),
    };
    let all: Vec<_> = keys
        .iter()
        .map(|key| (key.variable.to_lowercase(), value(key)))
        .collect();
    config::load(&Sources {
        env: all,
        ..Sources::default()
    })
    .unwrap();
}

#[test]
fn variables_are_never_type_guessed() {
    let config = env(&[
        ("EXPROTO_BROKER__PASSWORD", "007"),
        ("EXPROTO_BROKER__USERNAME", "true"),
        ("EXPROTO_NODE_NAME", "1.50"),
        ("EXPROTO_BROKER__CLIENT_ID_PREFIX", "[x]"),
    ])
    .unwrap();
    assert_eq!(config.broker.password.unwrap().expose(), "007");
    assert_eq!(config.broker.username.unwrap(), "true");
    assert_eq!(&*config.node_name, "1.50");
    assert_eq!(&*config.broker.client_id_prefix, "[x]");
}

#[test]
fn lists_in_a_variable_are_comma_separated_or_a_toml_array() {
    for text in ["http://a:1, http://b:2", "['http://a:1', \"http://b:2\"]"] {
        let config = env(&[("EXPROTO_HANDLER__ADDRESS", text)]).unwrap();
        let shown: Vec<String> = config
            .handler
            .address
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(shown, ["http://a:1", "http://b:2"]);
    }
    let config = env(&[(
        "EXPROTO_LISTENERS__TCP__DEFAULT__ACCESS_RULES",
        "deny 10.0.0.0/8,allow all",
    )])
    .unwrap();
    assert_eq!(
        config.listeners.tcp["default"]
            .common
            .access_rules
            .rules()
            .len(),
        2
    );
    one_fault(
        env(&[("EXPROTO_HANDLER__ADDRESS", "[http://a:1]")]),
        &["comma-separated or as a TOML array"],
    );
}

#[test]
fn config_variable_names_the_file_and_the_command_line_wins() {
    let (_a, by_env) = file("config.toml", "shards = 1");
    let (_b, by_option) = file("config.toml", "shards = 2");
    let mut sources = Sources {
        env: pairs(&[("exproto_config", by_env.to_str().unwrap())]),
        ..Sources::default()
    };
    assert_eq!(config::load(&sources).unwrap().shards, 1);
    sources.file = Some(by_option);
    assert_eq!(config::load(&sources).unwrap().shards, 2);
    env(&[("EXPROTO_CONFIG", "")]).unwrap();
}

#[test]
fn kubernetes_service_links_are_ignored() {
    env(&[
        ("EXPROTO_SIDECAR_SERVICE_HOST", "10.0.0.1"),
        ("EXPROTO_SIDECAR_SERVICE_PORT_ADAPTER", "9100"),
        ("EXPROTO_SIDECAR_PORT", "tcp://10.0.0.1:9100"),
        ("EXPROTO_PORT_7993_TCP_ADDR", "10.0.0.1"),
    ])
    .unwrap();
}

#[test]
fn toml_yaml_and_json_load_the_same() {
    let toml = r#"
        shards = 3
        idle_timeout = "infinity"
        handlers.meters.address = ["http://10.0.0.7:9001", "http://10.0.0.8:9001"]
        server = { ssl_options = { verify = "verify_none" } }
        [listeners.tcp.meters]
        bind = 7994
        handler = "meters"
        max_messages_rate = 0.5
        tcp_options = { nodelay = false, recbuf = "64KiB", sndbuf = 4096 }
    "#;
    let yaml = "
# comment
shards: 3
idle_timeout: infinity
broker:
server: {ssl_options: {verify: verify_none}}
handlers:
  meters:
    address: ['http://10.0.0.7:9001', 'http://10.0.0.8:9001']
listeners:
  tcp:
    meters:
      bind: 7994
      handler: meters
      max_messages_rate: 0.5
      tcp_options: {nodelay: false, recbuf: 64KiB, sndbuf: 4096}
";
    let json = r#"{"shards": 3, "idle_timeout": "infinity",
        "server": {"ssl_options": {"verify": "verify_none"}},
        "handlers": {"meters": {"address": ["http://10.0.0.7:9001", "http://10.0.0.8:9001"]}},
        "listeners": {"tcp": {"meters": {"bind": 7994, "handler": "meters", "max_messages_rate": 0.5,
            "tcp_options": {"nodelay": false, "recbuf": "64KiB", "sndbuf": 4096}}}}}"#;
    let load = |name: &str, text: &str| {
        let (_dir, path) = file(name, text);
        load_file(&path).unwrap_or_else(|report| panic!("{name}: {report}"))
    };
    let expected = load("c.toml", toml);
    assert_eq!(
        expected.listeners.tcp.len(),
        1,
        "a configured listener replaces tcp.default"
    );
    assert_eq!(
        expected.listeners.tcp["meters"].bind.to_string(),
        "0.0.0.0:7994"
    );
    assert_eq!(load("c.yaml", yaml), expected);
    assert_eq!(load("c.YML", yaml), expected);
    assert_eq!(load("c.json", json), expected);
    assert_eq!(load("empty.yaml", "# nothing\n"), Config::default());
    assert_eq!(load("bom.json", "\u{feff}{}"), Config::default());
}
