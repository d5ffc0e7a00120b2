//! The sections about who a device is.

use std::convert::identity;
use std::path::PathBuf;
use std::time::Duration;

use figment::value::Value;

use super::names::words;
use super::page::Page;
use super::reader::{Reader, Scope};
use super::schema::{Item, Nested, Section, Within, section, unconfigured};
use super::template::{HttpUrl, SecretTemplate, Template, TemplateTable};
use super::types::{ClientTls, TICK};
use super::values::Secret;

words! {
    /// How devices prove who they are.
    pub enum Mechanism {
        /// With a password.
        PasswordBased = "password_based",
        /// With a signed token.
        Jwt = "jwt",
    }

    /// Who knows the passwords.
    pub enum Backend {
        /// A file of hashes.
        File = "file",
        /// A service.
        Http = "http",
        /// The broker.
        Mqtt = "mqtt",
    }

    /// How a service is asked.
    pub enum HttpMethod {
        /// With a body.
        Post = "post",
        /// With a query.
        Get = "get",
    }

    /// What it means when there is no answer that can be used.
    pub enum OnError {
        /// The next one is asked.
        Ignore = "ignore",
        /// The device is refused.
        Deny = "deny",
    }

    /// Where a token is.
    pub enum From {
        /// In place of the password.
        Password = "password",
        /// In place of the user name.
        Username = "username",
    }

    /// What users are found by.
    pub enum UserIdType {
        /// The user name.
        Username = "username",
        /// The client id.
        ClientId = "clientid",
    }
}

/// One of `[[authentication]]`: who is asked whether a device is who it says.
#[derive(Clone, Debug, PartialEq)]
pub enum Authenticator {
    /// A file of users.
    File(UserFile),
    /// A service.
    Http(Box<HttpService>),
    /// The broker.
    Mqtt(BrokerLogin),
    /// Who signs tokens.
    Jwt(Box<JwtOptions>),
}

impl Authenticator {
    /// Whether it is asked at all.
    pub fn is_enabled(&self) -> bool {
        match self {
            Self::File(options) => options.enable,
            Self::Http(options) => options.enable,
            Self::Mqtt(options) => options.enable,
            Self::Jwt(options) => options.enable,
        }
    }
}

impl Item for Authenticator {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, value: &Value) -> Option<Self> {
        reader.require(scope, "mechanism", value);
        if reader.value::<Mechanism>(scope, "mechanism", identity)? == Mechanism::Jwt {
            return Some(Self::Jwt(Box::new(Section::read(reader, scope))));
        }
        reader.require(scope, "backend", value);
        Some(match reader.value(scope, "backend", identity)? {
            Backend::File => {
                reader.require(scope, "path", value);
                Self::File(Section::read(reader, scope))
            }
            Backend::Http => {
                reader.require(scope, "url", value);
                Self::Http(Box::new(Section::read(reader, scope)))
            }
            Backend::Mqtt => Self::Mqtt(Section::read(reader, scope)),
        })
    }

    fn write(&self, page: &mut Page) {
        match self {
            Self::File(options) => Section::write(options, page),
            Self::Http(options) => Section::write(&**options, page),
            Self::Mqtt(options) => Section::write(options, page),
            Self::Jwt(options) => Section::write(&**options, page),
        }
    }

    fn examples() -> Vec<(&'static str, Self)> {
        vec![
            (
                " A file of users, made with exproto-sidecar passwd:",
                Self::File(unconfigured()),
            ),
            (
                " A service, asked over HTTP as EMQX asks it:",
                Self::Http(Box::new(unconfigured())),
            ),
            (
                " The broker: a CONNECT with what the device says is tried there:",
                Self::Mqtt(unconfigured()),
            ),
            (
                " JSON Web Tokens, with one of secret, public_key, jwks_file and endpoint:",
                Self::Jwt(Box::new(unconfigured())),
            ),
        ]
    }
}

section! {
    /// A file of users and the hashes of their passwords.
    pub struct UserFile {
        /// How devices prove who they are: "password_based". Required.
        mechanism: Mechanism = "password_based",

        /// Who knows the passwords: "file". Required.
        backend: Backend = "file",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// The file: a line for each user, NAME:HASH, as exproto-sidecar passwd makes it, with
        /// :superuser behind it for whom no access rule counts. Hashes are argon2id or bcrypt. It is
        /// read again when it changes. Required.
        path: PathBuf = "users.txt",

        /// What NAME is: the "username" or the "clientid" of a device.
        user_id_type: UserIdType = "username",
    }
}

section! {
    /// A service that decides.
    pub struct HttpService {
        /// How devices prove who they are: "password_based". Required.
        mechanism: Mechanism = "password_based",

        /// Who knows the passwords: "http". Required.
        backend: Backend = "http",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// "post", or "get", which puts the body into the query.
        method: HttpMethod = "post",

        /// The service: "http://HOST:PORT/PATH", https:// for TLS. Path and query may have
        /// placeholders, which are escaped: ${clientid} ${username} ${password} ${peerhost}
        /// ${cert_common_name} ${cert_subject} ${proto_name}. Required.
        url: HttpUrl = "http://127.0.0.1:8080/auth",

        /// Headers, with placeholders. With content-type "application/x-www-form-urlencoded" the body
        /// is a form. Values that could be secret are not shown.
        headers: TemplateTable = "",

        /// The members of the JSON object, or of the form, with placeholders.
        body: TemplateTable = "{ clientid = '${clientid}', username = '${username}', password = '${password}' }",

        /// The longest that an answer takes, waiting for its turn included. A duration.
        request_timeout: Duration = Within("5s", TICK..),

        /// The longest that connecting takes. A duration.
        connect_timeout: Duration = Within("5s", TICK..),

        /// The most requests at a time, 1 to 1024; further ones wait for their turn.
        pool_size: usize = Within("8", 1..=1024),

        /// What no answer, one of another status than 200 and 204, or one that makes no sense means:
        /// "ignore", as in EMQX, or "deny".
        on_error: OnError = "ignore",

        /// TLS towards an https:// service.
        ssl_options: ClientTls = Nested,
    }
}

section! {
    /// The broker decides.
    pub struct BrokerLogin {
        /// How devices prove who they are: "password_based". Required.
        mechanism: Mechanism = "password_based",

        /// Who knows the passwords: "mqtt", the broker of `[broker]`. Required.
        backend: Backend = "mqtt",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// The client id of the attempt, with placeholders as above. The broker ends another
        /// connection that has it.
        clientid: Template = "${clientid}",

        /// The longest that an attempt takes, waiting for its turn included; several addresses of the
        /// broker share it. A duration.
        request_timeout: Duration = Within("5s", TICK..),

        /// The most attempts at a time, 1 to 1024; further ones wait for their turn.
        pool_size: usize = Within("32", 1..=1024),

        /// What it means when the broker is not there or says neither yes nor no: "ignore" or "deny".
        on_error: OnError = "ignore",
    }
}

section! {
    /// Tokens.
    pub struct JwtOptions {
        /// How devices prove who they are: "jwt". Required.
        mechanism: Mechanism = "jwt",

        /// Whether it is asked: true or false.
        enable: bool = "true",

        /// Where the token is: "password" or "username".
        from: From = "password",

        /// The secret that HS256, HS384 and HS512 are made with, at least 32 bytes. "" for none.
        /// Never shown. See secret_file.
        secret: Option<Secret> = "",

        /// File with the secret, in place of secret; a line end behind it is left out. "" for none.
        secret_file: Option<PathBuf> = "",

        /// Whether the secret is written in base64: true or false.
        secret_base64_encoded: bool = "false",

        /// PEM file with the public key of RS*, PS*, ES256, ES384 or EdDSA. "" for none.
        public_key: Option<PathBuf> = "",

        /// File with a set of public keys (JWKS). "" for none.
        jwks_file: Option<PathBuf> = "",

        /// Service that gives a set of public keys (JWKS). "" for none.
        endpoint: Option<HttpUrl> = "",

        /// How often the endpoint is asked; also when a token names a key that is not in the set, which
        /// waits for the answer. A duration, at least 1s.
        refresh_interval: Duration = Within("5m", Duration::from_secs(1)..),

        /// The longest that the endpoint's answer takes, and that a token waits for the first keys, or
        /// for a request that has begun. A duration.
        request_timeout: Duration = Within("5s", TICK..),

        /// What claims must be, with placeholders: `{ sub = "${clientid}" }`.
        verify_claims: TemplateTable = "",

        /// The claim with rules of access: EMQX's list, or its object of pub, sub and all.
        acl_claim_name: String = "acl",

        /// Whether a connection is closed when its token's exp has passed, reason expired: true or
        /// false.
        disconnect_after_expire: bool = "true",

        /// How much the clocks may differ for exp and nbf. A duration from 0s to 30s.
        leeway: Duration = Within("0s", ..=Duration::from_secs(30)),

        /// What it means when there is no token, or none that the keys have signed: "ignore", as in
        /// EMQX, or "deny". A signed token that has expired or has other claims is always denied.
        on_error: OnError = "ignore",

        /// TLS towards an https:// endpoint.
        ssl_options: ClientTls = Nested,
    }
}

section! {
    /// `[clientinfo_override]`: what devices are in place of what they say.
    pub struct ClientInfoOverride {
        /// The client id, such as "${cert_common_name}". "" for what the handler says.
        clientid: Template = "",

        /// The user name. "" for what the handler says.
        username: Template = "",

        /// The password. "" for what the handler says. Not shown where it could be secret.
        password: SecretTemplate = "",
    }
}
