//! Placeholders where they have no value, or one that nobody is to see.

use super::super::Config;
use super::super::auth::Authenticator;
use super::super::authz::RuleSource;
use super::super::placeholders::{allowed_at, of};
use super::super::template::{HttpUrl, Piece, Template, TemplateTable};
use super::Checks;

impl Checks<'_> {
    pub(super) fn placeholders(&mut self, config: &Config) {
        let will = &config.broker.will;
        self.filled("broker.will.topic", &will.topic);
        self.filled("broker.will.payload", &will.payload);
        let overrides = &config.clientinfo_override;
        self.filled("clientinfo_override.clientid", &overrides.clientid);
        self.filled("clientinfo_override.username", &overrides.username);
        self.filled("clientinfo_override.password", overrides.password.expose());
        for (number, authenticator) in &config.authentication {
            let table = format!("authentication.{number}");
            match authenticator {
                Authenticator::File(_) => {}
                Authenticator::Http(service) => {
                    self.request(&table, &service.url, [&service.headers, &service.body]);
                }
                Authenticator::Mqtt(login) => {
                    self.filled(&format!("{table}.clientid"), &login.clientid);
                }
                Authenticator::Jwt(jwt) => {
                    if let Some(endpoint) = &jwt.endpoint {
                        self.filled(&format!("{table}.endpoint"), &endpoint.path);
                    }
                    self.all_filled(&format!("{table}.verify_claims"), &jwt.verify_claims);
                }
            }
        }
        for (number, source) in &config.authorization.sources {
            if let RuleSource::Http(service) = source {
                let table = format!("authorization.sources.{number}");
                self.request(&table, &service.url, [&service.headers, &service.body]);
            }
        }
    }

    fn request(&mut self, table: &str, url: &HttpUrl, tables: [&TemplateTable; 2]) {
        self.filled(&format!("{table}.url"), &url.path);
        for (name, templates) in ["headers", "body"].iter().zip(tables) {
            self.all_filled(&format!("{table}.{name}"), templates);
        }
    }

    fn all_filled(&mut self, key: &str, templates: &TemplateTable) {
        for (_, template) in templates.iter() {
            self.filled(key, template);
        }
    }

    fn filled(&mut self, key: &str, template: &Template) {
        let known = of(key);
        for piece in template.pieces() {
            if let Piece::Fill(placeholder) = piece
                && !known.contains(placeholder)
            {
                let allowed = allowed_at(key);
                let problem =
                    format!("found {placeholder}, which has no value here; allowed: {allowed}");
                self.fault(key, problem);
            }
        }
    }
}
