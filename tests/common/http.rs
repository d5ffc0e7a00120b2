//! A look at the admin server.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::{until, within};

/// The admin server of a gateway.
#[derive(Clone, Copy)]
pub struct Admin(pub SocketAddr);

/// What it answered.
#[derive(Debug, Clone)]
pub struct Page {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Admin {
    /// `None` while there is no server, or no longer.
    pub async fn try_get(&self, path: &str) -> Option<Page> {
        let mut stream = TcpStream::connect(self.0).await.ok()?;
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.ok()?;
        let (head, body) = answer.split_once("\r\n\r\n")?;
        let status = head.split(' ').nth(1)?.parse().ok()?;
        Some(Page {
            status,
            head: head.to_owned(),
            body: body.to_owned(),
        })
    }

    pub async fn get(&self, path: &str) -> Page {
        within("a page", self.try_get(path)).await.expect(path)
    }

    /// The value of a metric, `name` or `name{labels}` as it is printed; 0 where it
    /// is not.
    pub async fn metric(&self, name: &str) -> f64 {
        value(&self.get("/metrics").await.body, name)
    }

    /// Waits until the metric is as wanted.
    pub async fn metric_until(&self, name: &str, wanted: impl Fn(f64) -> bool) -> f64 {
        until(name, || async {
            Some(self.metric(name).await).filter(|value| wanted(*value))
        })
        .await
    }

    /// Waits until `/readyz` answers with this status, and gives its text.
    pub async fn ready_until(&self, status: u16, part: &str) -> String {
        let what = format!("{status} and {part:?} from /readyz");
        until(&what, || async {
            let page = self.try_get("/readyz").await?;
            (page.status == status && page.body.contains(part)).then_some(page.body)
        })
        .await
    }
}

fn value(page: &str, name: &str) -> f64 {
    page.lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok())
        .unwrap_or(0.0)
}
