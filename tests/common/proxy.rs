//! A TCP relay before the broker, with which a test breaks the line in every way in
//! which networks do.
//!
//! | | open connections | new ones |
//! |---|---|---|
//! | [`Proxy::cut`] | closed | closed at once |
//! | [`Proxy::reset`] | reset (RST) | work |
//! | [`Proxy::blackhole`] | swallow everything, stay open | the same |
//! | [`Proxy::hold`] | the server's bytes wait | the same |
//! | [`Proxy::delay`] | bytes arrive later, both ways | the same |
//! | [`Proxy::slow`] | so many bytes a second, each way | the same |
//!
//! [`Proxy::mend`] ends all of them. A connection that has swallowed anything never
//! comes back, as one whose packets a firewall dropped for too long.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::within;

/// Relays between the gateway and a port.
pub struct Proxy {
    pub port: u16,
    control: Arc<watch::Sender<Control>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Clone, Default)]
struct Control {
    /// What the server sends waits.
    hold: bool,
    /// New connections are closed at once.
    refuse: bool,
    /// Connections swallow everything.
    blackhole: bool,
    delay: Duration,
    /// Bytes a second each way.
    rate: Option<usize>,
    /// The number of the next connection.
    next: u64,
    /// Connections before this number are ended...
    ended: u64,
    /// ...with RST or FIN.
    rst: bool,
    /// Connections before this number swallow everything for ever.
    lost: u64,
}

impl Control {
    fn swallows(&self, connection: u64) -> bool {
        self.blackhole || connection < self.lost
    }
}

impl Proxy {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let control = Arc::new(watch::Sender::new(Control::default()));
        let own_port = listener.local_addr().unwrap().port();
        let relays = control.clone();
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                let mut number = 0;
                relays.send_modify(|control| {
                    number = control.next;
                    control.next += 1;
                });
                if !relays.borrow().refuse {
                    tokio::spawn(relay(client, port, number, relays.subscribe()));
                }
            }
        });
        Self {
            port: own_port,
            control,
            task,
        }
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// How many connections were made to it so far.
    pub fn connections(&self) -> u64 {
        self.control.borrow().next
    }

    /// Waits until so many connections were made to it, ever.
    pub async fn dialled(&self, times: u64) {
        let mut control = self.control.subscribe();
        let what = format!("{times} connections to the proxy");
        let dialled = control.wait_for(|control| control.next >= times);
        within(&what, dialled).await.unwrap();
    }

    /// Holds back what the server answers from now on.
    pub fn hold(&self) {
        self.control.send_modify(|control| control.hold = true);
    }

    /// Lets go of what was held back.
    pub fn release(&self) {
        self.control.send_modify(|control| control.hold = false);
    }

    /// Bytes arrive so much later, both ways.
    pub fn delay(&self, delay: Duration) {
        self.control.send_modify(|control| control.delay = delay);
    }

    /// So many bytes a second pass, each way.
    pub fn slow(&self, rate: usize) {
        self.control
            .send_modify(|control| control.rate = Some(rate));
    }

    /// Cuts every connection; what was held back is lost. New ones are refused until
    /// [`Proxy::mend`].
    pub fn cut(&self) {
        self.control.send_modify(|control| {
            control.ended = control.next;
            control.rst = false;
            control.refuse = true;
        });
    }

    /// Resets every connection, both ways; new ones work.
    pub fn reset(&self) {
        self.control.send_modify(|control| {
            control.ended = control.next;
            control.rst = true;
        });
    }

    /// Connections, also new ones, are open and nothing comes through, until
    /// [`Proxy::mend`]. Those of that time stay lost.
    pub fn blackhole(&self) {
        self.control.send_modify(|control| control.blackhole = true);
    }

    /// New connections work; open ones unless they have swallowed anything.
    pub fn mend(&self) {
        self.control.send_modify(|control| {
            if control.blackhole {
                control.lost = control.next;
            }
            *control = Control {
                next: control.next,
                ended: control.ended,
                rst: control.rst,
                lost: control.lost,
                ..Control::default()
            };
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// One connection, until either side or the test ends it.
async fn relay(mut client: TcpStream, port: u16, number: u64, control: watch::Receiver<Control>) {
    if control.borrow().swallows(number) {
        let mut sink = tokio::io::sink();
        let _ = tokio::io::copy(&mut client, &mut sink).await;
        return;
    }
    let Ok(mut server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else {
        return;
    };
    client.set_nodelay(true).unwrap();
    server.set_nodelay(true).unwrap();
    let mut end = control.clone();
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    tokio::select! {
        () = copy(from_client, to_server, number, false, &control) => {}
        () = copy(from_server, to_client, number, true, &control) => {}
        _ = end.wait_for(|control| number < control.ended) => {}
    }
    let control = control.borrow();
    if number < control.ended && control.rst {
        for stream in [&client, &server] {
            let socket = socket2::SockRef::from(stream);
            socket.set_linger(Some(Duration::ZERO)).unwrap();
        }
    }
}

/// One direction, until it ends. Reading goes on while bytes are on their way, so
/// that a delay costs no throughput.
async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    number: u64,
    from_server: bool,
    control: &watch::Receiver<Control>,
) {
    let (on_its_way, mut arriving) = mpsc::channel::<(Instant, Vec<u8>)>(64);
    let read = async {
        let mut buffer = vec![0; 64 * 1024];
        while let Ok(count @ 1..) = from.read(&mut buffer).await {
            let due = Instant::now() + control.borrow().delay;
            let bytes = buffer[..count].to_vec();
            if on_its_way.send((due, bytes)).await.is_err() {
                return;
            }
        }
        // The end, too, comes behind what is on its way.
        drop(on_its_way);
        std::future::pending().await
    };
    let mut control = control.clone();
    let write = async {
        while let Some((due, bytes)) = arriving.recv().await {
            tokio::time::sleep_until(due).await;
            if from_server {
                let _ = control.wait_for(|control| !control.hold).await;
            }
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let now = control.borrow().clone();
                if now.swallows(number) {
                    break;
                }
                let piece = now.rate.map_or(rest.len(), |rate| (rate / 20).max(1));
                let (head, tail) = rest.split_at(piece.min(rest.len()));
                if to.write_all(head).await.is_err() {
                    return;
                }
                if now.rate.is_some() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
                rest = tail;
            }
        }
        // A server that hung up meanwhile is not heard of either.
        if from_server && control.borrow().swallows(number) {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        () = read => {}
        () = write => {}
    }
}
