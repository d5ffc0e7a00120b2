//! The gRPC server in front of the built-in handler.

use std::time::Duration;

use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;

use super::handler::Lines;
use crate::proto::connection_unary_handler_server::ConnectionUnaryHandlerServer;

/// Connections at a time. A gateway opens one for each of its shards.
const MAX_CONNECTIONS: usize = 1024;

/// Largest callback in bytes: a batch of messages can outgrow gRPC's 4 MiB.
const MAX_CALLBACK: usize = 64 * 1024 * 1024;

/// Callbacks that one connection may have open: one for each device.
const MAX_STREAMS: u32 = 65_536;

/// Flow-control window of a connection. One of HTTP/2's 64 KiB would make a
/// device's bytes wait for another's.
const WINDOW: u32 = 4 * 1024 * 1024;

/// Pause after a failure to accept, such as no free file descriptor.
const PAUSE: Duration = Duration::from_millis(100);

/// Serves on a bound listener for ever. Its connections end with it.
pub(super) async fn serve(listener: std::net::TcpListener, handler: Lines) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => {
            tracing::error!(%error, "the built-in handler cannot listen");
            return;
        }
    };
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, _)) => {
                while connections.try_join_next().is_some() {}
                if connections.len() < MAX_CONNECTIONS {
                    connections.spawn(serve_connection(stream, handler.clone()));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the built-in handler cannot accept; trying on");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, handler: Lines) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY of a gateway's connection");
    }
    let service =
        ConnectionUnaryHandlerServer::new(handler).max_decoding_message_size(MAX_CALLBACK);
    let served = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(MAX_STREAMS)
        .initial_connection_window_size(WINDOW)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(service))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "a gateway's connection to the built-in handler ended");
    }
}
