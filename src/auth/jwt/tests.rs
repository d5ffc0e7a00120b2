use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    self, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair, RsaKeyPair,
};
use aws_lc_rs::{encoding::AsDer, hmac};
use proptest::prelude::*;

use super::super::tests::attempt;
use super::*;

const SECRET: &str = "a secret of thirty-two bytes or more";

fn part(value: &Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn token(header: &Value, claims: &Value, sign: impl Fn(&[u8]) -> Vec<u8>) -> String {
    let message = format!("{}.{}", part(header), part(claims));
    let signature = sign(message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

fn hs256(claims: &Value) -> String {
    token(&serde_json::json!({"alg": "HS256"}), claims, |m| {
        hmac_of(SECRET.as_bytes(), m)
    })
}

fn hmac_of(secret: &[u8], message: &[u8]) -> Vec<u8> {
    let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
    hmac::sign(&key, message).as_ref().to_vec()
}

fn options(source: Source) -> Options {
    Options {
        source,
        from_username: false,
        verify_claims: vec![("sub".to_owned(), Template::parse("${clientid}").unwrap())],
        disconnect_after_expire: true,
        acl_claim_name: "acl".to_owned(),
        leeway: Duration::from_secs(5),
    }
}

fn with_secret() -> JwtAuthenticator {
    JwtAuthenticator::new(&options(Source::Secret(Secret::new(SECRET), false))).unwrap()
}

fn says(authenticator: &JwtAuthenticator, token: &str) -> Result<Decision, String> {
    let mut attempt = attempt("c1", "ann");
    attempt.password = Secret::new(token);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    let said = runtime.block_on(authenticator.ask(&attempt, true));
    said.map_err(|fault| fault.text().to_owned())
}

fn seconds(offset: i64) -> i64 {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    i64::try_from(now.as_secs()).unwrap() + offset
}

#[test]
fn claims_are_judged_once_the_signature_fits() {
    let jwt = with_secret();
    let valid = serde_json::json!({"sub": "c1", "exp": seconds(60), "is_superuser": true});
    let Ok(Decision::Allow(grant)) = says(&jwt, &hs256(&valid)) else {
        panic!("refused");
    };
    assert!(grant.is_superuser);
    let expires = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds(65) as u64);
    assert!(expires.duration_since(grant.expire_at.unwrap()).unwrap() < Duration::from_secs(30));
    assert_eq!(grant.rules_until, grant.expire_at);
    for (claims, part) in [
        (
            serde_json::json!({"sub": "c1", "exp": seconds(-10)}),
            "expired",
        ),
        (
            serde_json::json!({"sub": "c1", "nbf": seconds(60)}),
            "not valid yet",
        ),
        (serde_json::json!({"sub": "c2"}), "claim sub"),
        (serde_json::json!({}), "claim sub"),
        (serde_json::json!({"sub": "c1", "exp": "soon"}), "no time"),
        (
            serde_json::json!({"sub": "c1", "acl": {"pub": "x"}}),
            "rules of access",
        ),
    ] {
        let said = says(&jwt, &hs256(&claims));
        let Ok(Decision::Deny(why)) = said else {
            panic!("{said:?} for {claims}");
        };
        assert!(why.contains(part), "{why}");
    }
    // Within the leeway.
    let late = serde_json::json!({"sub": "c1", "exp": seconds(-1), "nbf": seconds(1)});
    assert!(matches!(says(&jwt, &hs256(&late)), Ok(Decision::Allow(_))));
}

#[test]
fn what_nobody_trusted_has_signed_is_no_token() {
    let jwt = with_secret();
    let claims = serde_json::json!({"sub": "c1"});
    let header = |alg: &str| serde_json::json!({"alg": alg});
    let right = |m: &[u8]| hmac_of(SECRET.as_bytes(), m);
    for (text, why) in [
        (
            token(&header("none"), &claims, |_| Vec::new()),
            "not signed",
        ),
        (token(&header("NonE"), &claims, right), "not signed"),
        (
            token(&header("HS256"), &claims, |_| Vec::new()),
            "none of the keys",
        ),
        (
            token(&header("HS256"), &claims, |m| hmac_of(b"other", m)),
            "none of the keys",
        ),
        (token(&header("HS512"), &claims, right), "none of the keys"),
        (token(&header("RS256"), &claims, right), "none of the keys"),
        (
            token(
                &serde_json::json!({"alg": "HS256", "crit": ["x"]}),
                &claims,
                right,
            ),
            "extensions",
        ),
        (token(&serde_json::json!({}), &claims, right), "no token"),
        (
            token(&header("HS256"), &serde_json::json!([1]), right),
            "no token",
        ),
        ("a.b".to_owned(), "no token"),
        ("a.b.c.d".to_owned(), "no token"),
        (String::new(), "no token"),
        ("x".repeat(MAX_TOKEN + 1), "more than"),
    ] {
        let said = says(&jwt, &text).unwrap_err();
        assert!(said.contains(why), "{said} for {text}");
    }
    // Another one's claims under a good signature.
    let good = hs256(&claims);
    let other = hs256(&serde_json::json!({"sub": "c2"}));
    let (_, signature) = good.rsplit_once('.').unwrap();
    let (message, _) = other.rsplit_once('.').unwrap();
    assert!(says(&jwt, &format!("{message}.{signature}")).is_err());
}

fn pem(der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    format!("-----BEGIN PUBLIC KEY-----\n{text}\n-----END PUBLIC KEY-----\n")
}

#[test]
fn a_public_key_is_never_a_shared_secret() {
    let pair = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let der = pair.public_key().as_der().unwrap();
    let text = pem(der.as_ref());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("key.pem");
    std::fs::write(&path, &text).unwrap();
    let jwt = JwtAuthenticator::new(&options(Source::PublicKey(path))).unwrap();
    let claims = serde_json::json!({"sub": "c1"});
    let signed = |encoding: &'static dyn signature::RsaEncoding, alg: &str| {
        token(&serde_json::json!({"alg": alg}), &claims, |message| {
            let mut out = vec![0; pair.public_modulus_len()];
            pair.sign(encoding, &SystemRandom::new(), message, &mut out)
                .unwrap();
            out
        })
    };
    for (encoding, alg) in [
        (
            &signature::RSA_PKCS1_SHA256 as &'static dyn signature::RsaEncoding,
            "RS256",
        ),
        (&signature::RSA_PKCS1_SHA512, "RS512"),
        (&signature::RSA_PSS_SHA256, "PS256"),
    ] {
        assert!(
            matches!(says(&jwt, &signed(encoding, alg)), Ok(Decision::Allow(_))),
            "{alg}"
        );
    }
    for secret in [text.as_bytes(), der.as_ref()] {
        let header = serde_json::json!({"alg": "HS256"});
        let forged = token(&header, &claims, |m| hmac_of(secret, m));
        assert!(says(&jwt, &forged).is_err());
    }
    // And the other way round it cannot be configured.
    let confused = options(Source::Secret(Secret::new(text), false));
    assert!(JwtAuthenticator::new(&confused).is_err());
    let short = options(Source::Secret(Secret::new("short"), false));
    assert!(JwtAuthenticator::new(&short).is_err());
}

#[test]
fn sets_hold_keys_of_several_kinds() {
    let random = SystemRandom::new();
    let ec = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap();
    let ed = Ed25519KeyPair::generate().unwrap();
    let rsa = RsaKeyPair::generate(KeySize::Rsa2048).unwrap();
    let b64 = |bytes: &[u8]| URL_SAFE_NO_PAD.encode(bytes);
    let point = ec.public_key().as_ref();
    // SEQUENCE, INTEGER of 257 bytes with a zero in front, INTEGER of three (RFC 8017, A.1.1).
    let pkcs1 = rsa.public_key().as_ref();
    let (modulus, exponent) = (&pkcs1[9..265], &pkcs1[267..]);
    let set = serde_json::json!({"keys": [
        {"kty": "EC", "crv": "P-256", "kid": "ec", "x": b64(&point[1..33]), "y": b64(&point[33..])},
        {"kty": "OKP", "crv": "Ed25519", "kid": "ed", "x": b64(ed.public_key().as_ref())},
        {"kty": "RSA", "kid": "rsa", "alg": "RS256", "use": "sig", "n": b64(modulus), "e": b64(exponent)},
        {"kty": "oct", "kid": "oct", "k": b64(SECRET.as_bytes())},
    ]});
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("jwks.json");
    std::fs::write(&path, set.to_string()).unwrap();
    let jwt = JwtAuthenticator::new(&options(Source::JwksFile(path.clone()))).unwrap();
    let claims = serde_json::json!({"sub": "c1"});
    let header = |alg: &str, kid: &str| serde_json::json!({"alg": alg, "kid": kid});
    let by_ec = |m: &[u8]| ec.sign(&random, m).unwrap().as_ref().to_vec();
    let by_ed = |m: &[u8]| ed.sign(m).as_ref().to_vec();
    let by_rsa = |m: &[u8]| {
        let mut out = vec![0; rsa.public_modulus_len()];
        rsa.sign(&signature::RSA_PKCS1_SHA256, &random, m, &mut out)
            .unwrap();
        out
    };
    let good = [
        token(&header("ES256", "ec"), &claims, by_ec),
        token(&header("EdDSA", "ed"), &claims, by_ed),
        token(&header("RS256", "rsa"), &claims, by_rsa),
        token(&serde_json::json!({"alg": "ES256"}), &claims, by_ec),
    ];
    for text in good {
        assert!(
            matches!(says(&jwt, &text), Ok(Decision::Allow(_))),
            "{text}"
        );
    }
    let bad = [
        token(&header("ES256", "ed"), &claims, by_ec),
        token(&header("ES256", "gone"), &claims, by_ec),
        token(&header("PS256", "rsa"), &claims, by_rsa),
        token(&header("HS256", "oct"), &claims, |m| {
            hmac_of(SECRET.as_bytes(), m)
        }),
    ];
    for text in bad {
        assert!(says(&jwt, &text).is_err(), "{text}");
    }
    std::fs::write(&path, r#"{"keys": []}"#).unwrap();
    assert!(JwtAuthenticator::new(&options(Source::JwksFile(path))).is_err());
}

proptest! {
    #[test]
    fn nonsense_never_panics_and_is_never_let_in(text in "[A-Za-z0-9_.{}\"-]{0,100}") {
        prop_assert!(says(&with_secret(), &text).is_err());
    }
}
