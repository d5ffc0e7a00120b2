//! Who a device is: the chain, files of users, limits; against real programs.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use common::{Answer, Device, PROGRAM, Stage, client, until};
use exproto_sidecar::proto::{ClientInfo, ResultCode};
use tempfile::TempDir;

/// Runs `exproto-sidecar passwd` with this password on its standard input.
fn passwd(arguments: &[&str], password: &str) -> Output {
    let mut child = Command::new(PROGRAM)
        .arg("passwd")
        .args(arguments)
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // A program that needs no password has ended already.
    let _ = child.stdin.take().unwrap().write_all(password.as_bytes());
    child.wait_with_output().unwrap()
}

/// Puts a user into a file.
#[track_caller]
fn add(file: &Path, arguments: &[&str], password: &str) {
    let mut all = vec!["--file", file.to_str().unwrap()];
    all.extend(arguments);
    let output = passwd(&all, password);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
}

fn device(clientid: &str, username: &str) -> Option<ClientInfo> {
    Some(ClientInfo {
        username: username.to_owned(),
        ..client(clientid)
    })
}

/// A login on a new connection.
async fn login(stage: &Stage, clientid: &str, username: &str, password: &str) -> (Device, Answer) {
    let device_ = stage.device().await;
    let info = device(clientid, username);
    let answer = stage
        .adapter
        .authenticate_as(&device_.conn, info, password)
        .await;
    (device_, answer)
}

/// The keys of a file of users, the first authenticator.
fn file_keys(path: &str) -> Vec<(&'static str, &str)> {
    vec![
        ("AUTHENTICATION__1__MECHANISM", "password_based"),
        ("AUTHENTICATION__1__BACKEND", "file"),
        ("AUTHENTICATION__1__PATH", path),
    ]
}

#[tokio::test]
async fn users_of_a_file_are_let_in_with_their_passwords() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("users");
    add(&file, &["ann"], "right\n");
    add(&file, &["--bcrypt", "b:ob"], "richtig");
    let stage = Stage::with(&file_keys(file.to_str().unwrap())).await;

    let (mut ann, answer) = login(&stage, "c1", "ann", "right").await;
    answer.ok();
    login(&stage, "c2", "b:ob", "richtig").await.1.ok();
    for (username, password) in [
        ("ann", "wrong"),
        ("ann", ""),
        ("b:ob", "richtig "),
        ("b:ob", "right"),
    ] {
        let (device, answer) = login(&stage, "c3", username, password).await;
        let why = answer.refused(ResultCode::PermissionDeny);
        assert!(why.contains("file: the password is wrong"), "{why}");
        // It is no client, and may try again.
        stage
            .publish(&device, "t", 0, "x")
            .await
            .refused(ResultCode::PermissionDeny);
        let again = stage
            .adapter
            .authenticate_as(&device.conn, self::device("c3", "ann"), "right");
        again.await.ok();
    }
    let (_, answer) = login(&stage, "c4", "eve", "right").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("not in the file"), "{why}");
    // What was tried has cost nobody a client id.
    let (_, answer) = login(&stage, "c1", "ann", "wrong").await;
    answer.refused(ResultCode::PermissionDeny);
    stage.adapter.send(&ann.conn, "still there").await.ok();
    assert_eq!(ann.read_text(11).await, "still there");

    let allowed =
        r#"exproto_authentications_total{authenticator="file",number="1",outcome="allow"}"#;
    assert!(stage.admin.metric(allowed).await >= 6.0);
    let ignored =
        r#"exproto_authentications_total{authenticator="file",number="1",outcome="ignore"}"#;
    assert_eq!(stage.admin.metric(ignored).await, 1.0);
    assert_eq!(
        stage
            .admin
            .metric("exproto_authentications_in_flight")
            .await,
        0.0
    );
    stage.finish().await;
}

#[tokio::test]
async fn client_ids_can_be_users_and_a_second_authenticator_is_asked_what_the_first_ignores() {
    let folder = TempDir::new().unwrap();
    let [by_name, by_id] = ["names", "ids"].map(|name| folder.path().join(name));
    add(&by_name, &["--bcrypt", "ann"], "one");
    add(&by_id, &["--bcrypt", "00:1b:44:11"], "two");
    let mut keys = file_keys(by_name.to_str().unwrap());
    keys.extend([
        ("AUTHENTICATION__2__MECHANISM", "password_based"),
        ("AUTHENTICATION__2__BACKEND", "file"),
        ("AUTHENTICATION__2__PATH", by_id.to_str().unwrap()),
        ("AUTHENTICATION__2__USER_ID_TYPE", "clientid"),
    ]);
    let stage = Stage::with(&keys).await;
    login(&stage, "00:1b:44:11", "", "two").await.1.ok();
    login(&stage, "x", "ann", "one").await.1.ok();
    // The first has denied it: the second is not asked.
    let (_, answer) = login(&stage, "00:1b:44:11", "ann", "two").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert_eq!(why, "authentication refused: file: the password is wrong");
    stage.finish().await;
}

#[tokio::test]
async fn a_listener_may_do_without() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("users");
    add(&file, &["--bcrypt", "ann"], "right");
    let mut keys = file_keys(file.to_str().unwrap());
    keys.extend([
        ("LISTENERS__TCP__OPEN__BIND", "127.0.0.1:0"),
        ("LISTENERS__TCP__OPEN__ENABLE_AUTHN", "false"),
    ]);
    let stage = Stage::with(&keys).await;
    let open = stage.gateway.addresses().listeners["tcp.open"];
    let mut device = Device::dial(open).await;
    device.conn = stage.handler.created(device.port()).await;
    stage
        .adapter
        .authenticate(&device.conn, "anybody")
        .await
        .ok();
    let (_, answer) = login(&stage, "anybody", "anybody", "secret").await;
    answer.refused(ResultCode::PermissionDeny);
    stage.finish().await;
}

#[tokio::test]
async fn a_changed_file_is_used_and_a_bad_one_is_not() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("users");
    add(&file, &["--bcrypt", "ann"], "old");
    let stage = Stage::with(&file_keys(file.to_str().unwrap())).await;
    login(&stage, "c", "ann", "old").await.1.ok();
    add(&file, &["--bcrypt", "ann"], "new");
    add(&file, &["--bcrypt", "bob"], "bob's");
    let reloads =
        |outcome: &str| format!("exproto_authentication_reloads_total{{outcome=\"{outcome}\"}}");
    stage
        .admin
        .metric_until(&reloads("ok"), |count| count >= 1.0)
        .await;
    until("the new password", || async {
        let (_, answer) = login(&stage, "d", "bob", "bob's").await;
        (answer.code == ResultCode::Success).then_some(())
    })
    .await;
    login(&stage, "c", "ann", "new").await.1.ok();
    login(&stage, "c", "ann", "old")
        .await
        .1
        .refused(ResultCode::PermissionDeny);
    fs::write(&file, "ann:no hash").unwrap();
    stage
        .admin
        .metric_until(&reloads("failed"), |count| count >= 1.0)
        .await;
    login(&stage, "c", "ann", "new").await.1.ok();
    stage.finish().await;
}

#[tokio::test]
async fn who_guesses_is_refused_unseen() {
    let folder = TempDir::new().unwrap();
    let file = folder.path().join("users");
    add(&file, &["--bcrypt", "ann"], "right");
    let mut keys = file_keys(file.to_str().unwrap());
    keys.extend([
        ("LOGIN_ATTEMPTS__MAX_PER_CLIENTID", "3"),
        ("LOGIN_ATTEMPTS__MAX_PER_ADDRESS", "5"),
        ("LOGIN_ATTEMPTS__WINDOW", "1h"),
    ]);
    let stage = Stage::with(&keys).await;
    for _ in 0..3 {
        let (_, answer) = login(&stage, "c", "ann", "wrong").await;
        assert!(answer.refused(ResultCode::PermissionDeny).contains("wrong"));
    }
    let (_, answer) = login(&stage, "c", "ann", "right").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(
        why.contains("too many failed attempts with this client id, wait for 3"),
        "{why}"
    );
    login(&stage, "d", "ann", "right").await.1.ok();
    for clientid in ["e", "f"] {
        login(&stage, clientid, "ann", "wrong")
            .await
            .1
            .refused(ResultCode::PermissionDeny);
    }
    let (_, answer) = login(&stage, "g", "ann", "right").await;
    let why = answer.refused(ResultCode::PermissionDeny);
    assert!(why.contains("from this address"), "{why}");
    let limited = |by: &str| format!("exproto_login_attempts_limited_total{{by=\"{by}\"}}");
    assert_eq!(stage.admin.metric(&limited("clientid")).await, 1.0);
    assert_eq!(stage.admin.metric(&limited("address")).await, 1.0);
    let denied = r#"exproto_authentications_total{authenticator="file",number="1",outcome="deny"}"#;
    assert_eq!(stage.admin.metric(denied).await, 5.0);
    stage.finish().await;
}

#[test]
fn passwd_prints_a_line_or_changes_a_file() {
    let output = passwd(&["--superuser", "ann"], "secret\nsecond line");
    assert!(output.status.success());
    let line = String::from_utf8(output.stdout).unwrap();
    assert!(
        line.starts_with("ann:$argon2id$v=19$m=19456,t=2,p=1$"),
        "{line}"
    );
    assert!(line.ends_with(":superuser\n"), "{line}");

    let folder = TempDir::new().unwrap();
    let file = folder.path().join("users");
    let path = file.to_str().unwrap();
    add(&file, &["--bcrypt", "ann"], "a");
    add(&file, &["--bcrypt", "bob"], "b");
    add(&file, &["--delete", "ann"], "");
    let text = fs::read_to_string(&file).unwrap();
    assert!(
        text.starts_with("bob:$2") && text.lines().count() == 1,
        "{text}"
    );
    for (arguments, password, part) in [
        (vec!["--file", path, "--delete", "ann"], "", "not there"),
        (vec!["ann"], "", "empty"),
        (vec!["#ann"], "x", "name"),
        (vec!["--bcrypt", "ann"], &*"x".repeat(73), "72 bytes"),
        (
            vec!["--file", "/nowhere/users", "ann"],
            "x",
            "/nowhere/users",
        ),
    ] {
        let output = passwd(&arguments, password);
        let told = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(1), "{told}");
        assert!(told.contains(part) && output.stdout.is_empty(), "{told}");
    }
    assert_eq!(fs::read_to_string(&file).unwrap(), text);
}

/// A terminal of its own, in which the program asks.
const TERMINAL: &str = r#"
import os, pty, sys
child, terminal = pty.fork()
if child == 0:
    os.execv(sys.argv[1], sys.argv[1:])
shown = b""
def until(part):
    global shown
    while part not in shown:
        try:
            more = os.read(terminal, 1024)
        except OSError:
            break
        if not more:
            break
        shown += more
for prompt, answer in zip((b"Password: ", b"Again: "), os.environ["ANSWERS"].encode().split()):
    until(prompt)
    os.write(terminal, answer + b"\n")
until(b"never printed")
sys.stdout.buffer.write(shown)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"#;

#[test]
fn passwd_asks_twice_and_shows_nothing_of_what_is_typed() {
    let ask = |answers: &str| {
        Command::new("python3")
            .args(["-c", TERMINAL, PROGRAM, "passwd", "ann"])
            .env("ANSWERS", answers)
            .output()
            .unwrap()
    };
    let output = ask("hunter2 hunter2");
    let shown = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{shown}");
    assert!(shown.contains("ann:$argon2id$"), "{shown}");
    assert!(!shown.contains("hunter2"), "{shown}");
    let output = ask("hunter2 hunter3");
    let shown = String::from_utf8(output.stdout).unwrap();
    assert_eq!(output.status.code(), Some(1), "{shown}");
    assert!(shown.contains("the passwords differ"), "{shown}");
    assert!(
        !shown.contains("hunter") && !shown.contains("argon2id"),
        "{shown}"
    );
}
