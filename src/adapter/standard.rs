//! What users of gRPC expect beside the calls: the health service (grpc.health.v1), and
//! reflection (v1 and v1alpha), which grpcurl and its like read the interface from.

use std::convert::Infallible;
use std::future::ready;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use http_body_util::BodyExt;
use metrics::Counter;
use tokio::sync::Semaphore;
use tonic::Status;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tonic_reflection::server::Builder;

use super::body::Bounded;
use crate::proto::FILE_DESCRIPTOR_SET;
use crate::proto::connection_adapter_server::SERVICE_NAME;

type Answer = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;
type Serve = Arc<dyn Fn(http::Request<Bounded>) -> Answer + Send + Sync>;

/// The longest question about health, bytes: a service's name, of which two are known. Anybody
/// may ask.
const MAX_QUESTION: usize = 1024;

/// Watches of health at once.
const MAX_WATCHES: usize = 1024;

/// Both services.
pub(super) struct Standard {
    reporter: HealthReporter,
    health: HealthServer<HealthService>,
    reflection: Serve,
    reflection_alpha: Serve,
    watches: Arc<Semaphore>,
    refused: Counter,
}

/// Which of them a request is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Which {
    /// Anybody may ask: what it tells is no secret, and those who ask have no token.
    Health,
    Reflection,
    ReflectionAlpha,
}

impl Which {
    /// By the path, `/package.Service/Method`; `None` for what is neither.
    pub fn of(path: &str) -> Option<Self> {
        // Nearly every request is another one.
        let path = path.strip_prefix("/grpc.")?;
        [
            ("health.v1.Health/", Self::Health),
            ("reflection.v1.ServerReflection/", Self::Reflection),
            (
                "reflection.v1alpha.ServerReflection/",
                Self::ReflectionAlpha,
            ),
        ]
        .into_iter()
        .find_map(|(service, which)| path.starts_with(service).then_some(which))
    }
}

fn serve<S>(service: S) -> Serve
where
    S: Service<http::Request<Bounded>, Response = http::Response<Body>, Error = Infallible>
        + Clone
        + Send
        + Sync
        + 'static,
    S::Future: Send + 'static,
{
    Arc::new(move |request| Box::pin(service.clone().call(request)))
}

impl Standard {
    /// Not serving yet, once [`Standard::tell`] was called.
    ///
    /// # Errors
    /// The interface that was compiled in cannot be read: a fault of the build.
    ///
    /// `refused` counts the watches that are too many.
    pub fn new(refused: Counter) -> Result<Self, tonic_reflection::server::Error> {
        let builder = || {
            Builder::configure()
                .register_encoded_file_descriptor_set(FILE_DESCRIPTOR_SET)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
                .with_service_name(SERVICE_NAME)
                .with_service_name(HealthServer::<HealthService>::NAME)
        };
        let reporter = HealthReporter::new();
        let service = HealthService::from_health_reporter(reporter.clone());
        Ok(Self {
            health: HealthServer::new(service).max_decoding_message_size(MAX_QUESTION),
            watches: Arc::new(Semaphore::new(MAX_WATCHES)),
            refused,
            reporter,
            reflection: serve(builder().build_v1()?),
            reflection_alpha: serve(builder().build_v1alpha()?),
        })
    }

    /// Whether the gateway serves, as a whole ("") and by the name of its service.
    pub async fn tell(&self, serves: bool) {
        let status = match serves {
            true => ServingStatus::Serving,
            false => ServingStatus::NotServing,
        };
        for name in ["", SERVICE_NAME] {
            self.reporter.set_service_status(name, status).await;
        }
    }

    /// Ends the watches: nothing more will be told.
    pub async fn end(&self) {
        for name in ["", SERVICE_NAME] {
            self.reporter.clone().clear_service_status(name).await;
        }
    }

    /// Answers a request.
    pub fn call(&self, which: Which, request: http::Request<Bounded>) -> Answer {
        match which {
            Which::Health if request.uri().path().ends_with("/Watch") => self.watch(request),
            Which::Health => self.health.clone().call(request),
            Which::Reflection => (self.reflection)(request),
            Which::ReflectionAlpha => (self.reflection_alpha)(request),
        }
    }
}

impl Standard {
    /// A watch stays open: there may be so many, whoever has them.
    fn watch(&self, request: http::Request<Bounded>) -> Answer {
        let Ok(place) = self.watches.clone().try_acquire_owned() else {
            self.refused.increment(1);
            let status = Status::resource_exhausted("there are too many watches: use Check");
            return Box::pin(ready(Ok(status.into_http())));
        };
        let answer = self.health.clone().call(request);
        Box::pin(async move {
            // It is held for as long as the answer goes on.
            let held = |body: Body| {
                Body::new(body.map_frame(move |frame| {
                    let _ = &place;
                    frame
                }))
            };
            answer.await.map(|response| response.map(held))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_name_services() {
        for (path, which) in [
            ("/grpc.health.v1.Health/Check", Some(Which::Health)),
            (
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                Some(Which::Reflection),
            ),
            (
                "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                Some(Which::ReflectionAlpha),
            ),
            ("/emqx.exproto.v1.ConnectionAdapter/Send", None),
            ("/grpc.health.v1.Healthy/Check", None),
            ("/", None),
        ] {
            assert_eq!(Which::of(path), which, "{path}");
        }
    }
}
