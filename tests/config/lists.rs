//! Lists of tables: in files, in variables, in both.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use exproto_sidecar::config::{self, Authenticator, Sources, UserIdType};

use crate::support::{env, file, one_fault, pairs, set, toml};

fn paths(authenticators: &BTreeMap<u16, Authenticator>) -> Vec<&Path> {
    let files = authenticators.values().filter_map(|one| match one {
        Authenticator::File(file) => Some(file.path.as_path()),
        _ => None,
    });
    files.collect()
}

const TWO: &str = r#"
[[authentication]]
mechanism = "password_based"
backend = "file"
path = "one"

[[authentication]]
mechanism = "password_based"
backend = "file"
path = "two"
user_id_type = "clientid"
"#;

#[test]
fn a_list_keeps_its_order_and_the_dump_loads_again() {
    let config = toml(TWO).unwrap();
    assert_eq!(
        paths(&config.authentication),
        [Path::new("one"), Path::new("two")]
    );
    let Authenticator::File(second) = &config.authentication[&2] else {
        panic!("not a file");
    };
    assert_eq!(second.user_id_type, UserIdType::ClientId);
    let dump = config.to_toml();
    assert_eq!(dump.matches("[[authentication]]").count(), 2, "{dump}");
    assert_eq!(toml(&dump).unwrap(), config);
    assert!(
        toml("authentication = []")
            .unwrap()
            .authentication
            .is_empty()
    );
}

#[test]
fn yaml_and_json_have_lists_too() {
    let yaml = "authentication:\n- mechanism: password_based\n  backend: file\n  path: one\n";
    let json = r#"{"authentication": [{"mechanism": "password_based", "backend": "file", "path": "one"}]}"#;
    for (name, text) in [("config.yaml", yaml), ("config.json", json)] {
        let (_dir, path) = file(name, text);
        let config = crate::support::load_file(&path).unwrap();
        assert_eq!(paths(&config.authentication), [Path::new("one")]);
    }
}

#[test]
fn variables_make_a_list_and_change_one_of_a_file() {
    let one = |number: &str, path: &str| {
        let key = |name: &str| format!("EXPROTO_AUTHENTICATION__{number}__{name}");
        [
            (key("MECHANISM"), "password_based".to_owned()),
            (key("BACKEND"), "file".to_owned()),
            (key("PATH"), path.to_owned()),
        ]
    };
    // By number, not by letter, and with gaps.
    let variables = [one("10", "ten"), one("2", "two")].concat();
    let config = config::load(&Sources {
        env: variables,
        ..Sources::default()
    });
    let config = config.unwrap();
    assert_eq!(
        paths(&config.authentication),
        [Path::new("two"), Path::new("ten")]
    );

    let (_dir, path) = file("config.toml", TWO);
    let config = config::load(&Sources {
        file: Some(path),
        env: pairs(&[("EXPROTO_AUTHENTICATION__2__PATH", "other")]),
        set: pairs(&[("authentication.1.enable", "false")]),
    });
    let config = config.unwrap();
    assert_eq!(
        paths(&config.authentication),
        [Path::new("one"), Path::new("other")]
    );
    assert!(!config.authentication[&1].is_enabled());
    assert!(config.authentication[&2].is_enabled());
}

#[test]
fn faults_of_lists_name_the_item() {
    one_fault(
        env(&[("EXPROTO_AUTHENTICATION__1__PATH", "x")]),
        &["authentication.1.mechanism", "required"],
    );
    one_fault(
        env(&[("EXPROTO_AUTHENTICATION__FIRST__PATH", "x")]),
        &[
            "EXPROTO_AUTHENTICATION__FIRST__PATH",
            "found the number \"first\"",
        ],
    );
    one_fault(
        toml(&TWO.replace("path = \"two\"", "path = \"two\"\npasswd = 1")),
        &[
            "authentication.2.passwd",
            "unknown key; allowed: mechanism, backend",
        ],
    );
    one_fault(
        toml(&TWO.replace("path = \"two\"", "")),
        &["authentication.2.path", "required"],
    );
    one_fault(
        set(&[("authentication", "file")]),
        &["authentication: found text; allowed: a table"],
    );
    one_fault(
        toml("authentication = [1]"),
        &["authentication: found a list"],
    );
    let (_dir, path) = file("config.toml", TWO);
    fs::write(&path, TWO.replace("\"file\"", "\"files\"")).unwrap();
    let report = crate::support::load_file(&path).unwrap_err();
    assert_eq!(report.faults().len(), 2, "{report}");
}

#[test]
fn a_table_in_place_of_a_list_is_told_how_to_be_one() {
    let table = TWO.replace("[[authentication]]", "[authentication]");
    let first = table.split("\n\n").next().unwrap();
    one_fault(
        toml(first),
        &[
            "authentication: found one table; allowed: a list of tables, [[authentication]] in place of [authentication]",
        ],
    );
    one_fault(
        env(&[("EXPROTO_AUTHENTICATION__MECHANISM", "jwt")]),
        &["EXPROTO_AUTHENTICATION__1__MECHANISM as a variable"],
    );
    one_fault(
        toml("[authorization.sources]\ntype = 'file'\npath = 'x'"),
        &["[[authorization.sources]] in place of"],
    );
}

#[test]
fn what_is_written_as_for_emqx_is_told_what_it_is_here() {
    let jwt = |line: &str| {
        toml(&format!(
            "[[authentication]]\nmechanism = 'jwt'\nendpoint = 'http://h/'\n{line}"
        ))
    };
    for (line, here) in [
        (
            "use_jwks = true",
            "unknown key; as in EMQX? here the keys come from endpoint",
        ),
        ("algorithm = 'hmac-based'", "here the key says it"),
        ("ssl = { enable = true }", "here it is ssl_options"),
    ] {
        one_fault(jwt(line), &["authentication.1", here]);
    }
    for (lines, here) in [
        (
            "mechanism = 'password_based'\nbackend = 'built_in_database'",
            "here users are in a file: \"file\"",
        ),
        (
            "mechanism = 'password_based'\nbackend = 'mysql'",
            "\"http\"; allowed: \"file\"",
        ),
        (
            "mechanism = 'scram'",
            "as in EMQX? here there is none; allowed: \"password_based\"",
        ),
    ] {
        one_fault(toml(&format!("[[authentication]]\n{lines}")), &[here]);
    }
}
