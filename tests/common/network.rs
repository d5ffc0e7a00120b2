//! A network of the test's own, in which packets can be dropped.

use std::process::{Command, Stdio};

/// Where a machine is that [`vanish`] takes out of the network.
pub const FAR: &str = "10.9.0.1";

/// Set for the test that runs in a network of its own.
const INSIDE: &str = "EXPROTO_TEST_OWN_NETWORK";

/// Whether this test is in a network of its own, with the loopback and [`FAR`]. If it is not,
/// it has been run in one, and has passed there: the caller is done. Where the system
/// allows no namespaces, nothing is tested, and said so.
pub fn own(test: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let unshare = || {
        let mut unshare = Command::new("unshare");
        unshare.args(["--user", "--map-root-user", "--net"]);
        unshare
    };
    let allowed = unshare().arg("true").output().unwrap();
    if !allowed.status.success() {
        let why = String::from_utf8_lossy(&allowed.stderr);
        println!("not tested: no network of its own here: {why}");
        return false;
    }
    let up = format!(
        "ip link set lo up && ip address add {FAR}/32 dev lo && \
         exec \"$0\" --exact {test} --nocapture"
    );
    let mut inside = unshare();
    inside.args(["sh", "-c", &up]);
    inside.arg(std::env::current_exe().unwrap());
    inside.env(INSIDE, "1").stderr(Stdio::inherit());
    let inside = inside.output().unwrap();
    let text = String::from_utf8_lossy(&inside.stdout);
    assert!(inside.status.success(), "{text}");
    assert!(text.contains("1 passed"), "{text}");
    false
}

/// Drops every packet to [`FAR`] and from it, without a word to anybody.
pub fn vanish() {
    ip("address delete", "dev lo");
    ip("route add blackhole", "");
}

/// Lets them through again.
pub fn return_again() {
    ip("route delete blackhole", "");
    ip("address add", "dev lo");
}

fn ip(what: &str, more: &str) {
    let far = format!("{FAR}/32");
    let arguments = what
        .split(' ')
        .chain([&*far])
        .chain(more.split_whitespace());
    let output = Command::new("ip").args(arguments).output().unwrap();
    assert!(output.status.success(), "{what}: {output:?}");
}
