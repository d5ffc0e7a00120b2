//! What users of gRPC expect beside the calls: the health service (grpc.health.v1), and
//! reflection (v1 and v1alpha), which grpcurl and its like read the interface from.

use std::convert::Infallible;
use std::sync::Arc;

use futures_util::future::BoxFuture;
use hyper::body::Incoming;
use tonic::body::Body;
use tonic::codegen::Service;
use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::pb::health_server::HealthServer;
use tonic_health::server::{HealthReporter, HealthService};
use tonic_reflection::server::Builder;

use crate::proto::FILE_DESCRIPTOR_SET;
use crate::proto::connection_adapter_server::SERVICE_NAME;

type Answer = BoxFuture<'static, Result<http::Response<Body>, Infallible>>;
type Serve = Arc<dyn Fn(http::Request<Incoming>) -> Answer + Send + Sync>;

/// Both services. Cheap to clone.
#[derive(Clone)]
pub(super) struct Standard {
    reporter: HealthReporter,
    health: HealthServer<HealthService>,
    reflection: Serve,
    reflection_alpha: Serve,
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
    S: Service<http::Request<Incoming>, Response = http::Response<Body>, Error = Infallible>
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
    pub fn new() -> Result<Self, tonic_reflection::server::Error> {
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
            health: HealthServer::new(service),
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
    pub fn call(&mut self, which: Which, request: http::Request<Incoming>) -> Answer {
        match which {
            Which::Health => self.health.call(request),
            Which::Reflection => (self.reflection)(request),
            Which::ReflectionAlpha => (self.reflection_alpha)(request),
        }
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
