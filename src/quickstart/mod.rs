//! The `quickstart` command.

use crate::config::Config;

/// Runs it.
pub fn run(_: &Config) -> anyhow::Result<()> {
    anyhow::bail!("later")
}
