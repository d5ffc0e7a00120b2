//! How devices are authenticated.

use std::sync::Arc;
use std::time::Duration;

use http::header::ACCEPT;
use http::{HeaderName, Method};

use super::{Error, broker, client_tls};
use crate::auth::http::client;
use crate::auth::{self, acl, chain, file, http as service, jwt, limits, mqtt};
use crate::config::{
    Authenticator, ClientTls, Config, From, HttpMethod, HttpService, HttpUrl, JwtOptions, NoMatch,
    RuleService, RuleSource, Template, TemplateTable,
};
use crate::tls::Renewed;

/// The largest set of keys in bytes: certificates of some hundred keys.
const MAX_JWKS: usize = 256 * 1024;

/// How devices are authenticated.
pub fn auth(config: &Config) -> Result<auth::Options, Error> {
    let authenticators = config.authentication.iter();
    let authenticators = authenticators.filter(|(_, options)| options.is_enabled());
    let attempts = &config.login_attempts;
    Ok(auth::Options {
        authenticators: authenticators
            .map(|(number, options)| {
                let key = format!("authentication.{number}");
                let provider = provider(&key, options, config)?;
                Ok(chain::Options { key, provider })
            })
            .collect::<Result<_, Error>>()?,
        limits: limits::Options {
            per_address: attempts.max_per_address.finite(),
            per_clientid: attempts.max_per_clientid.finite(),
            window: attempts.window,
        },
        overrides: auth::Overrides {
            clientid: config.clientinfo_override.clientid.clone(),
            username: config.clientinfo_override.username.clone(),
            password: config.clientinfo_override.password.clone(),
        },
        acl: acl(config)?,
    })
}

fn acl(config: &Config) -> Result<acl::Options, Error> {
    let authorization = &config.authorization;
    let sources = authorization.sources.iter();
    let sources = sources.filter(|(_, source)| source.is_enabled());
    let source = |(number, source): (&u16, &RuleSource)| {
        let key = format!("authorization.sources.{number}");
        let kind = match source {
            RuleSource::File(file) => acl::SourceKind::File(file.path.clone()),
            RuleSource::Http(service) => {
                let request = request(&key, &Request::from(&**service))?;
                acl::SourceKind::Http(Box::new(request), service.on_error)
            }
        };
        Ok(acl::Source { key, kind })
    };
    Ok(acl::Options {
        sources: sources.map(source).collect::<Result<_, Error>>()?,
        no_match: match authorization.no_match {
            NoMatch::Allow => acl::Permission::Allow,
            NoMatch::Deny => acl::Permission::Deny,
        },
        cache_size: authorization.cache_max_size,
        cache_ttl: authorization.cache_ttl,
    })
}

fn provider(
    key: &str,
    options: &Authenticator,
    config: &Config,
) -> Result<chain::ProviderOptions, Error> {
    Ok(match options {
        Authenticator::File(options) => chain::ProviderOptions::File(file::Options {
            path: options.path.clone(),
            user_id_type: options.user_id_type,
        }),
        Authenticator::Http(options) => chain::ProviderOptions::Http(
            Box::new(request(key, &Request::from(&**options))?),
            options.on_error,
        ),
        Authenticator::Mqtt(options) => {
            let mqtt = mqtt::Options {
                broker: broker(config)?,
                clientid: options.clientid.clone(),
                request_timeout: options.request_timeout,
                pool_size: options.pool_size,
            };
            chain::ProviderOptions::Mqtt(Box::new(mqtt), options.on_error)
        }
        Authenticator::Jwt(options) => {
            chain::ProviderOptions::Jwt(Box::new(tokens(key, options)?), options.on_error)
        }
    })
}

fn tls(key: &str, url: &HttpUrl, options: &ClientTls) -> Result<Option<Arc<Renewed>>, Error> {
    url.tls
        .then(|| client_tls(key, options, &[b"http/1.1"]))
        .transpose()
}

fn entries(table: &TemplateTable) -> Vec<(String, Template)> {
    let entries = table.iter();
    entries
        .map(|(name, value)| (name.to_owned(), value.clone()))
        .collect()
}

/// What both sorts of services have.
struct Request<'a> {
    method: HttpMethod,
    url: &'a HttpUrl,
    headers: &'a TemplateTable,
    body: &'a TemplateTable,
    timeouts: (Duration, Duration),
    pool_size: usize,
    ssl_options: &'a ClientTls,
}

macro_rules! request_from {
    ($($section:ident)*) => {$(
        impl<'a> std::convert::From<&'a $section> for Request<'a> {
            fn from(service: &'a $section) -> Self {
                Self {
                    method: service.method,
                    url: &service.url,
                    headers: &service.headers,
                    body: &service.body,
                    timeouts: (service.connect_timeout, service.request_timeout),
                    pool_size: service.pool_size,
                    ssl_options: &service.ssl_options,
                }
            }
        }
    )*};
}

request_from!(HttpService RuleService);

fn request(key: &str, options: &Request<'_>) -> Result<service::Options, Error> {
    let header = |(name, value): (&str, &Template)| {
        let name = HeaderName::from_bytes(name.as_bytes())
            .map_err(|error| Error::new(&format!("{key}.headers"), error))?;
        Ok((name, value.clone()))
    };
    let headers = options.headers.iter().map(header);
    let mut headers = headers.collect::<Result<Vec<_>, Error>>()?;
    // As EMQX does: a service that can answer in several ways answers with what is understood.
    if headers.iter().all(|(name, _)| *name != ACCEPT) {
        headers.extend(Template::parse("application/json").map(|json| (ACCEPT, json)));
    }
    Ok(service::Options {
        method: match options.method {
            HttpMethod::Post => Method::POST,
            HttpMethod::Get => Method::GET,
        },
        url: options.url.clone(),
        headers,
        body: entries(options.body),
        client: client::Options {
            tls: tls(key, options.url, options.ssl_options)?,
            connect_timeout: options.timeouts.0,
            request_timeout: options.timeouts.1,
            pool_size: options.pool_size,
            max_body: service::MAX_BODY,
        },
    })
}

fn tokens(key: &str, options: &JwtOptions) -> Result<jwt::Options, Error> {
    let source = if let Some(secret) = &options.secret {
        jwt::Source::Secret(secret.clone(), options.secret_base64_encoded)
    } else if let Some(path) = &options.public_key {
        jwt::Source::PublicKey(path.clone())
    } else if let Some(path) = &options.jwks_file {
        jwt::Source::JwksFile(path.clone())
    } else if let Some(url) = &options.endpoint {
        let request = service::Options {
            method: Method::GET,
            url: url.clone(),
            headers: Vec::new(),
            body: Vec::new(),
            client: client::Options {
                tls: tls(key, url, &options.ssl_options)?,
                connect_timeout: options.request_timeout,
                request_timeout: options.request_timeout,
                pool_size: 1,
                max_body: MAX_JWKS,
            },
        };
        let interval = options.refresh_interval.max(Duration::from_secs(1));
        jwt::Source::Endpoint(Box::new(request), interval)
    } else {
        let wanted = "one of secret, public_key, jwks_file and endpoint is needed";
        return Err(Error::new(&format!("{key}.mechanism"), wanted));
    };
    Ok(jwt::Options {
        source,
        from_username: options.from == From::Username,
        verify_claims: entries(&options.verify_claims),
        disconnect_after_expire: options.disconnect_after_expire,
        acl_claim_name: options.acl_claim_name.clone(),
        leeway: options.leeway,
    })
}
