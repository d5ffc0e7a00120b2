//! A resolver that says what the test wants.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use exproto_sidecar::handler::resolve::Resolve;
use futures_util::future::BoxFuture;
use tokio::sync::watch;

use super::within;

/// Every host name has these addresses.
#[derive(Clone)]
pub struct Names(Arc<watch::Sender<(Answer, usize)>>);

type Answer = Result<Vec<IpAddr>, &'static str>;

impl Names {
    pub fn new(hosts: &[IpAddr]) -> Self {
        Self(Arc::new(watch::Sender::new((Ok(hosts.to_vec()), 0))))
    }

    /// From now on.
    pub fn say(&self, hosts: &[IpAddr]) {
        self.0
            .send_modify(|(answer, _)| *answer = Ok(hosts.to_vec()));
    }

    /// No name can be resolved from now on.
    pub fn fail(&self, error: &'static str) {
        self.0.send_modify(|(answer, _)| *answer = Err(error));
    }

    /// Waits until it was asked so many times more.
    pub async fn asked(&self, times: usize) {
        let mut state = self.0.subscribe();
        let all = state.borrow().1 + times;
        let what = format!("{times} questions for names");
        let asked = state.wait_for(|(_, asked)| *asked >= all);
        within(&what, asked).await.unwrap();
    }
}

impl Resolve for Names {
    fn resolve(&self, _: &str, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        let mut answer = Err("");
        self.0.send_modify(|state| {
            state.1 += 1;
            answer.clone_from(&state.0);
        });
        Box::pin(async move {
            let hosts = answer.map_err(io::Error::other)?.into_iter();
            Ok(hosts.map(|host| SocketAddr::new(host, port)).collect())
        })
    }
}
