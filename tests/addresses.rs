//! IPv4 and IPv6: listeners on either, and on both at once.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing
)]

mod common;

use std::net::{IpAddr, SocketAddr};
use std::path::Path;

use common::{Authority, Device, DtlsDevice, Stage, within};
use exproto_sidecar::proto::SocketType;
use exproto_sidecar::tls;
use tempfile::TempDir;
use tokio::net::{TcpStream, UdpSocket};
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::pki_types::ServerName;

const KINDS: [(&str, SocketType); 4] = [
    ("tcp", SocketType::Tcp),
    ("ssl", SocketType::Ssl),
    ("udp", SocketType::Udp),
    ("dtls", SocketType::Dtls),
];

/// A gateway with a listener of each kind at one address, and what devices need.
struct Place {
    stage: Stage,
    authority: Authority,
    _dir: TempDir,
}

impl Place {
    async fn new(bind: &str, keys: &[(&str, &str)]) -> Self {
        let dir = TempDir::new().unwrap();
        let authority = Authority::new(dir.path(), "authority");
        let server = authority.server("meters.example");
        let mut all = Vec::new();
        for (kind, _) in KINDS {
            let key = |key: &str| format!("LISTENERS__{}__DEFAULT__{key}", kind.to_uppercase());
            all.push((key("BIND"), bind.to_owned()));
            all.extend(keys.iter().map(|(k, value)| (key(k), (*value).to_owned())));
            if kind == "ssl" || kind == "dtls" {
                let options = format!("{}_OPTIONS__", kind.to_uppercase());
                all.push((key(&format!("{options}CERTFILE")), server.cert.clone()));
                all.push((key(&format!("{options}KEYFILE")), server.key.clone()));
            }
        }
        let all: Vec<_> = all.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect();
        Self {
            stage: Stage::with(&all).await,
            authority,
            _dir: dir,
        }
    }

    fn address(&self, kind: &str, host: &str) -> SocketAddr {
        let name = format!("{kind}.default");
        let port = self.stage.gateway.addresses().listeners[&*name].port();
        (host.parse::<IpAddr>().unwrap(), port).into()
    }

    /// A device of this kind that connects to `host`: its port, and what keeps it there.
    async fn device(&self, kind: &str, host: &str) -> (u16, Box<dyn std::any::Any>) {
        let to = self.address(kind, host);
        match kind {
            "tcp" => {
                let device = Device::dial(to).await;
                (device.port(), Box::new(device))
            }
            "ssl" => {
                let ca = self.authority.file();
                let config = tls::client(Some(Path::new(&ca)), None, true, &[]).unwrap();
                let tcp = TcpStream::connect(to).await.unwrap();
                let port = tcp.local_addr().unwrap().port();
                let name = ServerName::try_from("meters.example").unwrap();
                let connecting = TlsConnector::from(config).connect(name, tcp);
                let stream = within("the handshake", connecting).await.unwrap();
                (port, Box::new(stream))
            }
            "udp" => {
                let own = SocketAddr::new(to.ip(), 0);
                let socket = UdpSocket::bind(own).await.unwrap();
                socket.connect(to).await.unwrap();
                socket.send(b"x").await.unwrap();
                (socket.local_addr().unwrap().port(), Box::new(socket))
            }
            _ => {
                let mut device = DtlsDevice::connect(to.ip(), to).await;
                let port = device.wire().socket.local_addr().unwrap().port();
                (port, Box::new(device))
            }
        }
    }

    /// Devices of all kinds over this address are served, and known by it.
    async fn serves(&self, host: &str) {
        for (kind, socktype) in KINDS {
            let (port, kept) = self.device(kind, host).await;
            let conn = self.stage.handler.created(port).await;
            let info = self.stage.conninfo(&conn);
            assert_eq!(info.socktype(), socktype);
            let (peer, local) = (info.peername.unwrap(), info.sockname.unwrap());
            assert_eq!((peer.host.as_str(), peer.port), (host, port.into()));
            let own = self.address(kind, host).port();
            assert_eq!((local.host.as_str(), local.port), (host, own.into()));
            drop(kept);
        }
    }

    /// Devices of all kinds from this address are refused by the access rules.
    async fn denies(&self, host: &str) {
        for (kind, _) in KINDS {
            let to = self.address(kind, host);
            match kind {
                "tcp" | "ssl" => Device::dial(to).await.closed().await,
                // Whatever it says: nobody looks at it.
                _ => {
                    let socket = UdpSocket::bind(SocketAddr::new(to.ip(), 0)).await.unwrap();
                    socket.send_to(b"x", to).await.unwrap();
                }
            }
            let refused = format!(
                "exproto_connections_refused_total{{listener=\"{kind}.default\",reason=\"access_rules\"}}"
            );
            let admin = &self.stage.admin;
            admin.metric_until(&refused, |n| n > 0.5).await;
        }
    }
}

/// `[::1]` is IPv6 alone, on every transport.
#[tokio::test]
async fn devices_over_ipv6() {
    let place = Place::new("[::1]:0", &[]).await;
    place.serves("::1").await;
    place.stage.finish().await;
}

/// `[::]` is every address of both families; a device over IPv4 is known by its plain
/// IPv4 address.
#[tokio::test]
async fn devices_over_both() {
    let place = Place::new("[::]:0", &[]).await;
    place.serves("127.0.0.1").await;
    place.serves("::1").await;
    place.stage.finish().await;
}

/// Rules for IPv4 are for devices over IPv4 also where the socket is one of IPv6, and
/// rules for IPv6 for the others.
#[tokio::test]
async fn rules_see_the_plain_address() {
    let place = Place::new("[::]:0", &[("ACCESS_RULES", "deny 127.0.0.0/8")]).await;
    place.denies("127.0.0.1").await;
    place.serves("::1").await;
    place.stage.finish().await;
    let place = Place::new("[::]:0", &[("ACCESS_RULES", "allow 127.0.0.1, deny all")]).await;
    place.denies("::1").await;
    place.serves("127.0.0.1").await;
    place.stage.finish().await;
}
