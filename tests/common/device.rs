//! A device: a plain TCP socket.

use std::net::SocketAddr;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpSocket, TcpStream};

use super::within;

/// A device, and the name by which the handler knows it.
pub struct Device {
    pub stream: TcpStream,
    /// Empty until the handler was told of it.
    pub conn: String,
}

impl Device {
    pub async fn dial(address: SocketAddr) -> Self {
        let stream = within("a connection", TcpStream::connect(address)).await;
        Self::over(stream.unwrap())
    }

    /// From an address of its own.
    pub async fn dial_from(host: &str, address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(format!("{host}:0").parse().unwrap()).unwrap();
        let stream = within("a connection", socket.connect(address)).await;
        Self::over(stream.unwrap())
    }

    /// With a small receive buffer: it takes little before it is read.
    pub async fn dial_small(address: SocketAddr) -> Self {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        socket.set_send_buffer_size(4096).unwrap();
        let stream = within("a connection", socket.connect(address)).await;
        Self::over(stream.unwrap())
    }

    fn over(stream: TcpStream) -> Self {
        stream.set_nodelay(true).unwrap();
        Self {
            stream,
            conn: String::new(),
        }
    }

    pub fn port(&self) -> u16 {
        self.stream.local_addr().unwrap().port()
    }

    pub async fn send(&mut self, bytes: impl AsRef<[u8]>) {
        within("room to write", self.stream.write_all(bytes.as_ref()))
            .await
            .unwrap();
    }

    /// Reads exactly so many bytes.
    pub async fn read(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        within("bytes at the device", self.stream.read_exact(&mut bytes))
            .await
            .unwrap();
        bytes
    }

    /// Reads so many bytes as text.
    pub async fn read_text(&mut self, count: usize) -> String {
        String::from_utf8(self.read(count).await).unwrap()
    }

    /// Reads until the gateway has closed.
    pub async fn read_all(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        within("the end at the device", self.stream.read_to_end(&mut bytes))
            .await
            .unwrap();
        bytes
    }

    /// Waits until the gateway has closed, in whatever way, without a byte before.
    pub async fn closed(&mut self) {
        let mut byte = [0];
        let read = within("the end at the device", self.stream.read(&mut byte)).await;
        assert!(matches!(read, Ok(0) | Err(_)), "a byte: {byte:?}");
    }

    /// Sends nothing more, but still reads.
    pub async fn finish(&mut self) {
        self.stream.shutdown().await.unwrap();
    }

    /// Resets the connection.
    #[allow(clippy::needless_pass_by_value)]
    pub fn reset(self) {
        let socket = socket2::SockRef::from(&self.stream);
        socket.set_linger(Some(Duration::ZERO)).unwrap();
    }
}
