//! See `crate::hot`.

pub(crate) use super::dtls::hot::{dtls_opened, dtls_sealed};
pub(crate) use super::udp::hot::udp_peer;
