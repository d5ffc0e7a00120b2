//! A service of the user's over HTTP: says who a device is, what it may do, or gives keys.

use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Bytes;
use axum::http::{HeaderMap, Method, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use serde_json::Value;
use tokio::sync::watch;

use super::{Gate, within};

/// The keys of an authenticator.
pub fn item(number: usize, keys: &[(&str, &str)]) -> Vec<(String, String)> {
    let named = |(name, value): &(&str, &str)| {
        (
            format!("AUTHENTICATION__{number}__{name}"),
            (*value).to_owned(),
        )
    };
    keys.iter().map(named).collect()
}

/// The keys of one of HTTP.
pub fn http_item(number: usize, url: &str) -> Vec<(String, String)> {
    item(
        number,
        &[
            ("MECHANISM", "password_based"),
            ("BACKEND", "http"),
            ("URL", url),
        ],
    )
}

/// A request as the service got it.
#[derive(Clone, Debug)]
pub struct Asked {
    pub method: Method,
    pub uri: Uri,
    pub headers: HeaderMap,
    pub body: String,
}

/// A service that a test tells what to answer.
pub struct Service {
    pub port: u16,
    pub asked: watch::Sender<Vec<Asked>>,
    answer: Arc<Mutex<(u16, &'static str, String)>>,
    gate: Arc<Mutex<Gate>>,
}

impl Service {
    pub async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .unwrap();
        let open = Gate::closed();
        open.open();
        let service = Self {
            port: listener.local_addr().unwrap().port(),
            asked: watch::Sender::default(),
            answer: Arc::new(Mutex::new((204, "text/plain", String::new()))),
            gate: Arc::new(Mutex::new(open)),
        };
        let (asked, answer, gate) = (
            service.asked.clone(),
            service.answer.clone(),
            service.gate.clone(),
        );
        let router = Router::new().fallback(
            move |method: Method, uri: Uri, headers: HeaderMap, body: Bytes| async move {
                let body = String::from_utf8(body.to_vec()).unwrap();
                let request = Asked {
                    method,
                    uri,
                    headers,
                    body,
                };
                asked.send_modify(|all| all.push(request));
                let held = gate.lock().unwrap().clone();
                held.pass().await;
                let (status, kind, body) = answer.lock().unwrap().clone();
                let status = StatusCode::from_u16(status).unwrap();
                let answer: Response = (status, [("content-type", kind)], body).into_response();
                answer
            },
        );
        tokio::spawn(async move { axum::serve(listener, router).await.unwrap() });
        service
    }

    pub fn answers(&self, status: u16, kind: &'static str, body: impl ToString) {
        *self.answer.lock().unwrap() = (status, kind, body.to_string());
    }

    pub fn says(&self, body: &Value) {
        self.answers(200, "application/json", body);
    }

    /// Holds answers until the gate is opened.
    pub fn hold(&self) -> Gate {
        let gate = Gate::closed();
        *self.gate.lock().unwrap() = gate.clone();
        gate
    }

    /// The request with this number, from 1 on.
    pub async fn asked(&self, number: usize) -> Asked {
        let mut asked = self.asked.subscribe();
        let found = asked.wait_for(|all| all.len() >= number);
        within("a request", found).await.unwrap()[number - 1].clone()
    }

    pub fn url(&self, path: &str) -> String {
        format!("http://127.0.0.1:{}{path}", self.port)
    }
}
