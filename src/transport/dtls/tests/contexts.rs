//! Contexts: what is refused, and with which words.

use super::*;

#[test]
fn problems_name_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let good = options(dir.path());
    let other = identity(dir.path(), "other");
    let write = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let nothing = write("nothing", "");
    let bad_psk = write("bad-psk", "meter:xyz");
    let with = |change: &dyn Fn(&mut Options)| {
        let mut options = good.clone();
        change(&mut options);
        Context::new(&options).unwrap_err().to_string()
    };
    let cases = [
        (
            with(&|o| o.identities[0].certfile = dir.path().join("absent")),
            "absent: No such file",
        ),
        (
            with(&|o| o.identities[0].certfile = nothing.clone()),
            "nothing: a certificate in PEM is needed: ",
        ),
        (
            with(&|o| o.identities[0].keyfile = nothing.clone()),
            "nothing: a private key in PEM, without passphrase, is needed: ",
        ),
        (
            with(&|o| o.identities[0].keyfile = other.keyfile.clone()),
            "other-key.pem: is not the key of ",
        ),
        (with(&|o| o.identities.push(other.clone())), "other.pem: "),
        (
            with(&|o| o.psk_file = Some(bad_psk.clone())),
            "bad-psk: line 1: the key must be in hex",
        ),
        (
            with(&|o| o.psk_file = Some(nothing.clone())),
            "nothing: holds no pre-shared key",
        ),
        (
            with(&|o| o.client_certificates = ClientCertificates::Asked),
            "their authorities are needed",
        ),
        (
            with(&|o| {
                o.client_certificates = ClientCertificates::Required;
                o.client_authorities = vec![nothing.clone()];
            }),
            "nothing: a certificate in PEM is needed: ",
        ),
        (
            with(&|o| {
                o.identities.clear();
                o.psk_file = None;
            }),
            "a certificate or a file of pre-shared keys is needed",
        ),
        (with(&|o| o.mtu = 100), "MTU"),
        (with(&|o| o.max_message = 20_000), "16384"),
    ];
    for (error, expected) in cases {
        assert!(error.contains(expected), "{error:?} lacks {expected:?}");
    }
}

#[test]
fn a_certificate_alone_or_a_key_alone_will_do() {
    let dir = tempfile::tempdir().unwrap();
    let both = options(dir.path());
    let keys = Options {
        identities: Vec::new(),
        ..both.clone()
    };
    let keys = Context::new(&keys).unwrap();
    established(&keys, Device::with("PSK-AES128-CCM8"));
    let certificate = Options {
        psk_file: None,
        ..both
    };
    let certificate = Context::new(&certificate).unwrap();
    established(&certificate, Device::new());
    assert_eq!(
        format!("{certificate:?}"),
        "Context { mtu: 1200, max_message: 16384, .. }"
    );
}
