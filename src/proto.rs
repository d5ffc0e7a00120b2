//! The ExProto v1 interface, generated from `proto/exproto.proto`.

#![allow(missing_docs, clippy::all)]

pub mod codec;

use std::fmt;

tonic::include_proto!("emqx.exproto.v1");

/// The interface itself, for reflection: an encoded `FileDescriptorSet`.
pub const FILE_DESCRIPTOR_SET: &[u8] = tonic::include_file_descriptor_set!("exproto");

impl fmt::Debug for AuthenticateRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AuthenticateRequest")
            .field("conn", &self.conn)
            .field("clientinfo", &self.clientinfo)
            .field("password", &"***")
            .finish()
    }
}
