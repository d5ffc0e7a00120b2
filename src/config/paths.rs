//! Lists of files.

use std::ops::Deref;
use std::path::PathBuf;

use figment::value::Value;

use super::value::{
    ConfigValue, Rejected, list_from_text, list_from_value, list_to_text, list_to_toml,
};

/// Files, in order; none of them is allowed too.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files(Vec<PathBuf>);

impl Deref for Files {
    type Target = [PathBuf];

    fn deref(&self) -> &[PathBuf] {
        &self.0
    }
}

impl ConfigValue for Files {
    fn allowed() -> String {
        format!("{} or a list of them; \"\" for none", PathBuf::allowed())
    }

    fn from_text(text: &str) -> Result<Self, Rejected> {
        list_from_text(text).map(Self).map_err(reworded)
    }

    fn from_value(value: &Value) -> Result<Self, Rejected> {
        list_from_value(value).map(Self).map_err(reworded)
    }

    fn to_text(&self) -> String {
        list_to_text(&self.0)
    }

    fn to_toml(&self) -> String {
        match self.0.as_slice() {
            [] => "\"\"".to_owned(),
            [one] => one.to_toml(),
            several => list_to_toml(several),
        }
    }
}

fn reworded(rejected: Rejected) -> Rejected {
    Rejected {
        allowed: Files::allowed(),
        ..rejected
    }
}
