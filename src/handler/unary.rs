//! One call with one message each way.
//!
//! tonic makes no difference between such a call and a stream: it encodes a stream of one
//! message, ends it with a frame of its own, and decodes a stream of one message. This does
//! what is left when there is one. Whatever is not as usual is tonic's.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::{BufMut, Bytes, BytesMut};
use http::header::{CONTENT_TYPE, TE};
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode, Uri, Version};
use http_body_util::BodyExt;
use hyper::body::{Body, Frame, Incoming};
use prost::Message;
use tonic::codec::Streaming;
use tonic::codegen::Service;
use tonic::{Code, Status};
use tonic_prost::ProstDecoder;

use super::link::Channel;
use crate::proto;

/// What is in front of a message: whether it is compressed, and its length.
const PREFIX: usize = 5;

/// A message as gRPC carries it, written into room of the right size.
pub(super) fn framed(length: usize, write: impl FnOnce(&mut BytesMut)) -> Bytes {
    let mut buffer = BytesMut::with_capacity(PREFIX + length);
    buffer.put_u8(0);
    // A callback has some hundred KiB at most.
    buffer.put_u32(length as u32);
    write(&mut buffer);
    buffer.freeze()
}

/// Encodes a request.
pub(super) fn request(message: &impl Message) -> Bytes {
    framed(message.encoded_len(), |buffer| {
        // There is room, which is all that it could lack.
        let _ = message.encode(buffer);
    })
}

/// Encodes a ReceivedMessagesRequest, whose messages would have to be copied for it.
pub(super) fn messages(conn: &String, messages: &[proto::Message]) -> Bytes {
    use prost::encoding::{message, string};
    let length = string::encoded_len(1, conn) + message::encoded_len_repeated(2, messages);
    framed(length, |buffer| {
        string::encode(1, conn, buffer);
        message::encode_repeated(2, messages, buffer);
    })
}

/// A body of one frame, with which it ends.
struct One(Option<Bytes>);

impl Body for One {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }

    fn is_end_stream(&self) -> bool {
        self.0.is_none()
    }
}

/// Makes a call with an encoded request. `headers` are those that it has beside its own.
///
/// # Errors
/// The status of the answer; one with a cause where the channel broke before it.
pub(super) async fn call(
    mut channel: Channel,
    uri: Uri,
    mut headers: HeaderMap,
    encoded: Bytes,
) -> Result<(), Status> {
    poll_fn(|cx| channel.poll_ready(cx)).await?;
    headers.insert(TE, const { HeaderValue::from_static("trailers") });
    headers.insert(
        CONTENT_TYPE,
        const { HeaderValue::from_static("application/grpc") },
    );
    let mut request = Request::new(tonic::body::Body::new(One(Some(encoded))));
    *request.method_mut() = Method::POST;
    *request.version_mut() = Version::HTTP_2;
    *request.uri_mut() = uri;
    *request.headers_mut() = headers;
    let (head, body) = channel.send(request).await?.into_parts();
    refused(&head.headers)?;
    match head.status {
        StatusCode::OK => answered(body).await,
        status => foreign(status, body).await,
    }
}

/// The status in headers or trailers, if there is one and it is not OK.
fn refused(headers: &HeaderMap) -> Result<(), Status> {
    match headers.get(Status::GRPC_STATUS) {
        Some(code) if code != "0" => match Status::from_header_map(headers) {
            Some(status) if status.code() != Code::Ok => Err(status),
            _ => Ok(()),
        },
        _ => Ok(()),
    }
}

/// Reads an answer to its end. What is in the message is of no account: it is empty.
async fn answered(mut body: Incoming) -> Result<(), Status> {
    let mut length = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::from_error(error.into()))?;
        if let Some(data) = frame.data_ref() {
            length += data.len();
        }
        if let Some(trailers) = frame.trailers_ref() {
            refused(trailers)?;
        }
    }
    match length {
        PREFIX.. => Ok(()),
        _ => Err(Status::internal("Missing response message.")),
    }
}

/// The answer of something that is no gRPC server, such as a proxy.
async fn foreign(status: StatusCode, body: Incoming) -> Result<(), Status> {
    let decoder = ProstDecoder::<proto::EmptySuccess>::default();
    let mut answer = Streaming::new_response(decoder, body, status, None, None);
    while answer.message().await?.is_some() {}
    Err(Status::internal("Missing response message."))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_encoded_as_prost_does() {
        let message = |n: u32| proto::Message {
            node: "node".to_owned(),
            id: format!("{n}"),
            qos: n,
            from: String::new(),
            topic: "a/b".to_owned(),
            payload: Bytes::from_static(b"\0\xff"),
            timestamp: 1,
        };
        for count in [0, 1, 3] {
            let whole = proto::ReceivedMessagesRequest {
                conn: "conn".to_owned(),
                messages: (0..count).map(message).collect(),
            };
            let encoded = messages(&whole.conn, &whole.messages);
            assert_eq!(encoded, request(&whole));
            let (prefix, rest) = encoded.split_at(PREFIX);
            assert_eq!(prefix[..1], [0]);
            assert_eq!(prefix[1..], (rest.len() as u32).to_be_bytes());
            assert_eq!(proto::ReceivedMessagesRequest::decode(rest), Ok(whole));
        }
    }
}
