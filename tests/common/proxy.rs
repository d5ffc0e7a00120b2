//! A TCP relay before the broker, with which a test holds answers back or cuts the
//! line.

use std::net::Ipv4Addr;
use std::sync::Arc;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Relays between the gateway and a port.
pub struct Proxy {
    pub port: u16,
    control: Arc<watch::Sender<Control>>,
    task: tokio::task::JoinHandle<()>,
}

#[derive(Default)]
struct Control {
    /// What the server sends waits.
    hold: bool,
    /// New connections are closed at once.
    refuse: bool,
    /// Connections of an earlier line are closed.
    line: u64,
}

impl Proxy {
    pub async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let control = Arc::new(watch::Sender::new(Control::default()));
        let relay = control.clone();
        let own_port = listener.local_addr().unwrap().port();
        let task = tokio::spawn(async move {
            loop {
                let (client, _) = listener.accept().await.unwrap();
                if relay.borrow().refuse {
                    continue;
                }
                let relay = relay.clone();
                tokio::spawn(async move {
                    let Ok(server) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await else {
                        return;
                    };
                    client.set_nodelay(true).unwrap();
                    server.set_nodelay(true).unwrap();
                    let line = relay.borrow().line;
                    let mut cut = relay.subscribe();
                    let (from_client, to_client) = client.into_split();
                    let (from_server, to_server) = server.into_split();
                    tokio::select! {
                        _ = copy(from_client, to_server, None) => {}
                        _ = copy(from_server, to_client, Some(relay.subscribe())) => {}
                        _ = cut.wait_for(|control| control.line != line) => {}
                    }
                });
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

    /// Holds back what the server answers from now on.
    pub fn hold(&self) {
        self.control.send_modify(|control| control.hold = true);
    }

    /// Lets go of what was held back.
    pub fn release(&self) {
        self.control.send_modify(|control| control.hold = false);
    }

    /// Cuts every connection; what was held back is lost. New ones are refused until
    /// [`Proxy::mend`].
    pub fn cut(&self) {
        self.control.send_modify(|control| {
            control.line += 1;
            control.refuse = true;
        });
    }

    pub fn mend(&self) {
        self.control.send_modify(|control| {
            control.hold = false;
            control.refuse = false;
        });
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn copy(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut gate: Option<watch::Receiver<Control>>,
) -> std::io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        if let Some(gate) = &mut gate {
            let _ = gate.wait_for(|control| !control.hold).await;
        }
        to.write_all(&buffer[..count]).await?;
    }
}
