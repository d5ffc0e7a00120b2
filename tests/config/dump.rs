//! The documented default file, the effective dump, secrets in both.

use std::fs;

use exproto_sidecar::config::{self, Config};

use crate::support::{env, file, one_fault, pairs, set, toml};

#[test]
fn the_default_file_loads_to_the_default() {
    let text = config::default_file();
    assert_eq!(text, config::default_file());
    assert_eq!(toml(&text).unwrap(), Config::default());
    assert!(text.contains("# node_name = \"<host name>\""));
    assert!(text.contains("\n[listeners.tcp.default.tcp_options]\n"));
    // An inline table has no second line.
    for line in text.lines().filter(|line| !line.contains(" = { ")) {
        assert!(line.len() <= 100, "too long: {line}");
    }
}

#[test]
fn every_key_of_the_default_file_loads_when_uncommented() {
    let text: String = config::default_file()
        .lines()
        .map(|line| {
            line.strip_prefix("# node")
                .map_or(line.to_owned(), |rest| format!("node{rest}"))
        })
        .map(|line| {
            line.strip_prefix("# [h")
                .map_or(line.clone(), |rest| format!("[h{rest}"))
        })
        .map(|line| {
            line.strip_prefix("# address = [")
                .map_or(line.clone(), |rest| format!("address = [{rest}"))
        })
        .map(|line| line + "\n")
        .collect();
    let config = toml(&text).unwrap();
    assert_eq!(&*config.node_name, "<host name>");
    assert_eq!(config.handlers["meters"].address.len(), 2);
}

#[test]
fn a_fixed_password_in_place_of_a_devices_is_not_shown() {
    let with = |password: &str| {
        let config = toml(&format!("[clientinfo_override]\npassword = '{password}'")).unwrap();
        (config.to_toml(), format!("{config:?}"))
    };
    for fixed in ["hunter2", "${clientid}hunter2"] {
        let (dump, debug) = with(fixed);
        assert!(!dump.contains("hunter2") && !debug.contains("hunter2"));
        assert!(dump.contains("password = \"***\""), "{dump}");
    }
    let (dump, _) = with("${clientid}");
    assert!(dump.contains("password = \"${clientid}\""), "{dump}");
    let fault = toml("[clientinfo_override]\npassword = 'hunter2${x}'").unwrap_err();
    assert!(!fault.to_string().contains("hunter2"), "{fault}");
}

#[test]
fn the_dump_loads_again_and_masks_the_secret() {
    let config = toml(
        r#"
        node_name = "a \"b\" \\ c"
        [broker]
        password = "hunter2"
        [handlers.x]
        address = ["https://h:1", "https://h:2"]
        [listeners.tcp.a]
        bind = "[::]:1"
        mountpoint = "${clientid}/"
        max_conn_rate = "infinity"
        max_bytes_rate = 1.5
        access_rules = ["allow 10.0.0.1-10.0.0.9", "deny all"]
        tcp_options.recbuf = 4097
        "#,
    )
    .unwrap();
    assert_eq!(config.broker.password.as_ref().unwrap().expose(), "hunter2");
    assert!(!format!("{config:?} {config:#?}").contains("hunter2"));
    let dump = config.to_toml();
    assert!(
        dump.contains("password = \"***\"") && !dump.contains("hunter2"),
        "{dump}"
    );
    let mut again = toml(&dump).unwrap();
    again.broker.password = config.broker.password.clone();
    assert_eq!(again, config);
}

#[test]
fn a_password_file_is_read_and_its_line_end_dropped() {
    let (dir, path) = file("password", " hunter2 \r\n");
    let config = set(&[("broker.password_file", path.to_str().unwrap())]).unwrap();
    assert_eq!(
        config.broker.password.as_ref().unwrap().expose(),
        " hunter2 "
    );
    let dump = config.to_toml();
    assert!(!dump.contains("hunter2"));
    assert_eq!(toml(&dump).unwrap(), config);

    fs::write(&path, "\n").unwrap();
    one_fault(
        set(&[("broker.password_file", path.to_str().unwrap())]),
        &["broker.password_file", "is empty"],
    );
    one_fault(
        set(&[(
            "broker.password_file",
            dir.path().join("no").to_str().unwrap(),
        )]),
        &[
            "command line --set broker.password_file",
            "cannot be read: No such file",
        ],
    );
    fs::write(&path, "x").unwrap();
    one_fault(
        env(&[
            ("EXPROTO_BROKER__PASSWORD_FILE", path.to_str().unwrap()),
            ("EXPROTO_BROKER__PASSWORD", "hunter2"),
        ]),
        &[
            "environment variable EXPROTO_BROKER__PASSWORD_FILE: broker.password_file: broker.password is set too",
            "(environment variable EXPROTO_BROKER__PASSWORD); allowed: one of them",
        ],
    );
}

#[test]
fn sources_do_not_show_their_values() {
    let sources = config::Sources {
        env: pairs(&[("EXPROTO_BROKER__PASSWORD", "hunter2")]),
        set: pairs(&[("broker.password", "hunter2")]),
        ..config::Sources::default()
    };
    let shown = format!("{sources:?}");
    assert!(shown.contains("EXPROTO_BROKER__PASSWORD") && !shown.contains("hunter2"));
}
