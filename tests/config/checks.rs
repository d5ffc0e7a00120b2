//! Faults that only show when several keys, or the file system, are looked at.

use std::fs;

use tempfile::TempDir;

use crate::support::{env, one_fault, set, toml};

#[test]
fn listeners_on_one_address() {
    let two = |a: &str, b: &str| {
        toml(&format!(
            "admin.bind = ''\n[listeners.tcp.a]\nbind = '{a}'\n[listeners.tcp.b]\nbind = '{b}'"
        ))
    };
    one_fault(
        two("0.0.0.0:7993", "127.0.0.1:7993"),
        &["listeners.tcp.b.bind: found 127.0.0.1:7993, but listeners.tcp.a.bind has 0.0.0.0:7993"],
    );
    two("127.0.0.1:7993", "127.0.0.2:7993").unwrap();
    two("127.0.0.1:0", "127.0.0.1:0").unwrap();
    one_fault(
        two("0.0.0.0:9100", "127.0.0.1:1"),
        &[
            "listeners.tcp.a.bind: found 0.0.0.0:9100, but server.bind has 127.0.0.1:9100 (built-in default)",
        ],
    );
    one_fault(
        set(&[("server.bind", "7993")]),
        &["--set server.bind: server.bind: found 0.0.0.0:7993, but listeners.tcp.default.bind has"],
    );
    one_fault(
        set(&[("admin.bind", "127.0.0.1:9100")]),
        &["admin.bind: found 127.0.0.1:9100, but server.bind"],
    );
    let off =
        toml("[listeners.tcp.a]\nbind = 1\n[listeners.tcp.b]\nbind = 1\nenable = false").unwrap();
    assert!(!off.listeners.tcp["b"].common.enable);
}

#[test]
fn listener_names_and_kinds() {
    for kind in ["tcp", "ssl", "udp", "dtls"] {
        // A name is not enough of a listener, unless it is "default".
        let config = toml(&format!("[listeners.{kind}.default]\nenable = false")).unwrap();
        let all: Vec<_> = config.listeners.all().map(|l| l.full_name()).collect();
        assert_eq!(all, [format!("{kind}.default")], "and no other");
        let key = format!("listeners.{kind}.x.bind: found nothing; this key is required");
        let off = format!("EXPROTO_LISTENERS__{}__X__ENABLE", kind.to_uppercase());
        one_fault(env(&[(&off, "false")]), &[&key]);
    }
    one_fault(
        toml("[listeners.tcp.meters]\nenable = true"),
        &["file config.toml: listeners.tcp.meters.bind: found nothing; this key is required"],
    );
    one_fault(
        env(&[("EXPROTO_LISTENERS__TCP__METERS__ENABLE", "true")]),
        &["EXPROTO_LISTENERS__TCP__METERS__ENABLE: listeners.tcp.meters.bind: found nothing"],
    );
    one_fault(
        toml("[listeners.tcp.\"My.Meters\"]\nbind = 1"),
        &["found the name \"My.Meters\"; allowed: 1 to 64 of the characters a-z, 0-9, _ and -"],
    );
    let config = env(&[("EXPROTO_LISTENERS__TCP__DEFAULT__BIND", "127.0.0.1:1")]).unwrap();
    assert_eq!(
        config.listeners.tcp["default"].bind.to_string(),
        "127.0.0.1:1"
    );
    let config = env(&[("EXPROTO_LISTENERS__TCP__METERS__BIND", "1")]).unwrap();
    assert_eq!(config.listeners.tcp.keys().collect::<Vec<_>>(), ["meters"]);
    let config = env(&[("EXPROTO_LISTENERS__TCP__DEFAULT__ENABLE", "false")]).unwrap();
    assert!(!config.listeners.tcp["default"].common.enable);
}

#[test]
fn handler_names() {
    one_fault(
        toml("[handlers.a]\naddress = 'http://a'\n[listeners.tcp.default]\nhandler = 'b'"),
        &["listeners.tcp.default.handler: found \"b\", which is no handler; allowed: default, a"],
    );
    one_fault(
        toml("[handlers.default]\naddress = 'http://a'"),
        &["handlers.default: the name \"default\" stands for the table [handler]"],
    );
    one_fault(
        toml("[handlers.a]\nmax_batch = 1"),
        &["handlers.a.address: found nothing; this key is required"],
    );
    one_fault(
        toml("[handlers.'A B']\naddress = 'http://a'"),
        &["found the name \"A B\""],
    );
    let config = env(&[
        ("EXPROTO_HANDLERS__METERS__ADDRESS", "http://m:1"),
        ("EXPROTO_LISTENERS__TCP__DEFAULT__HANDLER", "meters"),
    ])
    .unwrap();
    assert_eq!(
        config.handler_named("meters").unwrap().address[0].to_string(),
        "http://m:1"
    );
    assert_eq!(config.handler_named("default"), Some(&config.handler));
}

#[test]
fn tls_files_and_schemes() {
    let dir = TempDir::new().unwrap();
    let pem = dir.path().join("x.pem");
    fs::write(&pem, "x").unwrap();
    let pem = pem.to_str().unwrap();
    let here = dir.path().to_str().unwrap();

    one_fault(
        set(&[("server.ssl_options.enable", "true")]),
        &[
            "server.ssl_options.enable: found true without server.ssl_options.certfile and server.ssl_options.keyfile",
        ],
    );
    one_fault(
        set(&[("server.ssl_options.certfile", pem)]),
        &[
            "server.ssl_options.certfile: set without server.ssl_options.keyfile; allowed: both or neither",
        ],
    );
    let server = |extra: &[(&str, &str)]| {
        let base = [
            ("server.ssl_options.enable", "true"),
            ("server.ssl_options.certfile", pem),
            ("server.ssl_options.keyfile", pem),
        ];
        set(&[&base, extra].concat())
    };
    assert!(server(&[]).unwrap().server.ssl_options.enable);
    one_fault(
        server(&[("server.ssl_options.keyfile", "no/key.pem")]),
        &["server.ssl_options.keyfile: found \"no/key.pem\", which cannot be read: No such file"],
    );
    one_fault(
        server(&[("server.ssl_options.cacertfile", here)]),
        &["cacertfile: found", "it is a directory"],
    );
    one_fault(
        server(&[("server.ssl_options.verify", "verify_peer")]),
        &["server.ssl_options.verify: found \"verify_peer\" without server.ssl_options.cacertfile"],
    );
    one_fault(
        set(&[("broker.ssl_options.cacertfile", pem)]),
        &[
            "broker.ssl_options.cacertfile: set, but broker.url does not use TLS; allowed: with mqtts:// only",
        ],
    );
    for mixed in ["mqtt://a,mqtts://b", "[\"mqtts://b\", \"mqtt://a\"]"] {
        let tls = ("broker.ssl_options.cacertfile", pem);
        let config = set(&[("broker.url", mixed), tls]).unwrap();
        assert_eq!(config.broker.url.len(), 2);
    }
    for repeated in ["mqtt://a,mqtts://b,mqtt://A:1883", "mqtts://a:1,mqtt://a:1"] {
        one_fault(
            set(&[("broker.url", repeated)]),
            &["broker.url: found mqtt://", "allowed: each of them once"],
        );
    }
    one_fault(
        set(&[("handler.ssl_options.cacertfile", pem)]),
        &[
            "handler.ssl_options.cacertfile: set, but handler.address does not use TLS; allowed: with https:// only",
        ],
    );
    one_fault(
        set(&[
            ("handlers.a.address", "https://a"),
            ("handlers.a.ssl_options.keyfile", pem),
        ]),
        &["handlers.a.ssl_options.keyfile: set without handlers.a.ssl_options.certfile"],
    );
    set(&[
        ("broker.url", "mqtts://b"),
        ("broker.ssl_options.cacertfile", pem),
    ])
    .unwrap();
    one_fault(
        set(&[
            ("broker.url", "mqtts://b"),
            ("broker.ssl_options.cacertfile", "no.pem"),
        ]),
        &["broker.ssl_options.cacertfile: found \"no.pem\", which cannot be read"],
    );
}

#[test]
fn ports_of_tcp_and_udp_are_apart() {
    toml("[listeners.tcp.a]\nbind = 1\n[listeners.udp.a]\nbind = 1").unwrap();
    one_fault(
        toml("[listeners.udp.a]\nbind = 1\n[listeners.udp.b]\nbind = '127.0.0.1:1'"),
        &["listeners.udp.b.bind: found 127.0.0.1:1, but listeners.udp.a.bind has 0.0.0.0:1"],
    );
}

#[test]
fn tls_of_listeners() {
    let dir = TempDir::new().unwrap();
    let [cert, key, other] = ["cert.pem", "key.pem", "other.pem"].map(|name| {
        let path = dir.path().join(name);
        fs::write(&path, "x").unwrap();
        path.display().to_string()
    });
    let ssl = |options: &str| {
        toml(&format!(
            "[listeners.ssl.a]\nbind = 1\nssl_options = {{ {options} }}"
        ))
    };
    let both = format!("certfile = '{cert}', keyfile = '{key}'");
    ssl(&both).unwrap();
    ssl(&format!(
        "certfile = ['{cert}', '{other}'], keyfile = ['{key}', '{other}']"
    ))
    .unwrap();
    ssl(&format!(
        "{both}, cacertfile = '{other}', verify = 'verify_peer', fail_if_no_peer_cert = true"
    ))
    .unwrap();
    for (options, problem) in [
        (
            String::new(),
            "ssl_options.certfile: found nothing; allowed: ",
        ),
        (
            format!("certfile = '{cert}'"),
            "ssl_options.keyfile: found nothing; allowed: ",
        ),
        (
            format!("certfile = ['{cert}', '{other}'], keyfile = '{key}'"),
            "ssl_options.keyfile: found 1 for 2 in listeners.ssl.a.ssl_options.certfile; allowed: as many",
        ),
        (
            format!("certfile = '/missing.pem', keyfile = '{key}'"),
            "ssl_options.certfile: found \"/missing.pem\", which cannot be read",
        ),
        (
            format!("{both}, verify = 'verify_peer'"),
            "ssl_options.verify: found \"verify_peer\" without listeners.ssl.a.ssl_options.cacertfile",
        ),
        (
            format!("{both}, fail_if_no_peer_cert = true"),
            "ssl_options.fail_if_no_peer_cert: found true without",
        ),
    ] {
        one_fault(ssl(&options), &["listeners.ssl.a.", problem]);
    }
    toml("[listeners.ssl.a]\nbind = 1\nenable = false").unwrap();
    let dtls = |options: &str| {
        toml(&format!(
            "[listeners.dtls.a]\nbind = 1\ndtls_options = {{ {options} }}"
        ))
    };
    dtls(&format!("psk_file = '{other}'")).unwrap();
    dtls(&format!("psk_file = '{other}', {both}")).unwrap();
    one_fault(
        dtls(""),
        &[
            "dtls_options.certfile: found nothing; allowed: ",
            ", or a psk_file",
        ],
    );
    one_fault(
        dtls(&format!("psk_file = '{other}', keyfile = '{key}'")),
        &["dtls_options.certfile"],
    );
    one_fault(
        dtls("psk_file = '/missing'"),
        &["dtls_options.psk_file: found \"/missing\""],
    );
}

#[test]
fn a_health_check_has_both_halves() {
    let udp = |check: &str| {
        toml(&format!(
            "[listeners.udp.a]\nbind = 1\nhealth_check = {{ {check} }}"
        ))
    };
    udp("request = 'ping', reply = 'pong'").unwrap();
    udp("request = 'ping'").unwrap();
    one_fault(
        udp("reply = 'pong'"),
        &["listeners.udp.a.health_check.reply: set without"],
    );
}

/// Handlers that cannot be told apart cannot be kept apart.
#[test]
fn isolation_needs_a_token_of_each_handler() {
    one_fault(
        toml("[server]\nisolate_handlers = true"),
        &["server.isolate_handlers: found true without handler.adapter_token_file; allowed: "],
    );
    one_fault(
        toml(
            "[server]\nisolate_handlers = true\n[handler]\nadapter_token_file = 'a'\n\
             [handlers.meters]\naddress = 'http://127.0.0.1:9002'\n\
             [listeners.tcp.meters]\nbind = 7994\nhandler = 'meters'",
        ),
        &["found true without handlers.meters.adapter_token_file; allowed: "],
    );
    // One that no listener names needs none.
    toml(
        "[server]\nisolate_handlers = true\n[handler]\nadapter_token_file = 'a'\n\
         [handlers.meters]\naddress = 'http://127.0.0.1:9002'",
    )
    .unwrap();
}

#[test]
fn the_adapter_on_a_path() {
    let unix = ("server.bind", "unix:/run/x.sock");
    set(&[unix, ("server.socket_mode", "0600")]).unwrap();
    one_fault(
        set(&[("server.socket_mode", "0600")]),
        &[
            "server.socket_mode: set without a Unix socket in server.bind; allowed: with \"unix:/PATH\"",
        ],
    );
    one_fault(
        set(&[("server.bind", "unix:x.sock")]),
        &["server.bind: found \"unix:x.sock\"; allowed: unix:/PATH with an absolute path"],
    );
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file.pem");
    fs::write(&file, "").unwrap();
    let file = file.display().to_string();
    let tls = [
        unix,
        ("server.ssl_options.enable", "true"),
        ("server.ssl_options.certfile", &file),
        ("server.ssl_options.keyfile", &file),
    ];
    one_fault(
        set(&tls),
        &[
            "server.ssl_options.enable: found true with a Unix socket in server.bind; allowed: false",
        ],
    );
}

/// TLS files that nobody has turned on would leave everything in the clear.
#[test]
fn tls_that_is_not_on() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("file.pem");
    fs::write(&file, "").unwrap();
    let file = file.display().to_string();
    let files = [
        ("server.ssl_options.certfile", file.as_str()),
        ("server.ssl_options.keyfile", &file),
    ];
    one_fault(
        set(&files),
        &["server.ssl_options.certfile: set, but server.ssl_options.enable is not; allowed: with"],
    );
    one_fault(
        set(&[("server.ssl_options.verify", "verify_peer")]),
        &["server.ssl_options.verify: set, but server.ssl_options.enable is not"],
    );
    let off = [files[0], files[1], ("server.ssl_options.enable", "false")];
    set(&off).unwrap();
    one_fault(
        set(&[("handler.ssl_options.verify", "verify_none")]),
        &[
            "handler.ssl_options.verify: found \"verify_none\", but handler.address does not use TLS",
        ],
    );
}
