//! A resolver that says what the test wants.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use exproto_sidecar::handler::resolve::Resolve;
use futures_util::future::BoxFuture;

/// Every host name has these addresses.
#[derive(Clone)]
pub struct Names(Arc<Mutex<Result<Vec<IpAddr>, &'static str>>>);

impl Names {
    pub fn new(hosts: &[IpAddr]) -> Self {
        Self(Arc::new(Mutex::new(Ok(hosts.to_vec()))))
    }

    /// From now on.
    pub fn say(&self, hosts: &[IpAddr]) {
        *self.0.lock().unwrap() = Ok(hosts.to_vec());
    }

    /// No name can be resolved from now on.
    pub fn fail(&self, error: &'static str) {
        *self.0.lock().unwrap() = Err(error);
    }
}

impl Resolve for Names {
    fn resolve(&self, _: &str, port: u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>> {
        let answer = self.0.lock().unwrap().clone();
        Box::pin(async move {
            let hosts = answer.map_err(io::Error::other)?.into_iter();
            Ok(hosts.map(|host| SocketAddr::new(host, port)).collect())
        })
    }
}
