//! The sections about who a device is.

use std::path::PathBuf;

use figment::value::Value;

use super::names::words;
use super::page::Page;
use super::reader::{Reader, Scope};
use super::schema::{Item, Section, section, unconfigured};

words! {
    /// How devices prove who they are.
    pub enum Mechanism {
        /// With a password.
        PasswordBased = "password_based",
    }

    /// Who knows the passwords.
    pub enum Backend {
        /// A file of hashes.
        File = "file",
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
}

impl Authenticator {
    /// Whether it is asked at all.
    pub fn is_enabled(&self) -> bool {
        match self {
            Self::File(options) => options.enable,
        }
    }
}

impl Item for Authenticator {
    fn read(reader: &mut Reader<'_>, scope: &Scope<'_>, value: &Value) -> Option<Self> {
        reader.require(scope, "mechanism", value);
        let mechanism = reader.value(scope, "mechanism", std::convert::identity)?;
        match mechanism {
            Mechanism::PasswordBased => {
                reader.require(scope, "backend", value);
                match reader.value(scope, "backend", std::convert::identity)? {
                    Backend::File => {
                        reader.require(scope, "path", value);
                        Some(Self::File(Section::read(reader, scope)))
                    }
                }
            }
        }
    }

    fn write(&self, page: &mut Page) {
        match self {
            Self::File(options) => Section::write(options, page),
        }
    }

    fn examples() -> Vec<(&'static str, Self)> {
        vec![(
            " A file of users, made with exproto-sidecar passwd:",
            Self::File(unconfigured()),
        )]
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
