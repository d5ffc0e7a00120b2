//! A device's connection, whatever transport carries it.
//!
//! ```text
//! transport --socket--> task <---inbox--- handle <--- adapter's commands
//!                        | ^                  ^
//!                inputs  v | actions          +------ broker's deliveries
//!                      machine
//!                        |
//!                        v one callback at a time, or several on streams
//!                     handler
//! ```
//!
//! A private `task`, a cloneable `handle`, an entry in the `registry`, and a
//! [`machine`] that decides.

mod calls;
pub mod command;
mod context;
mod forsaken;
mod handle;
pub(crate) mod hot;
mod linger;
pub mod machine;
pub mod own;
mod queue;
mod rates;
mod reason;
mod registry;
mod serve;
mod task;

pub use context::{ListenerContext, Settings};
pub use forsaken::close_forsaken;
pub use handle::{Authentication, Client, Handle, Refused};
pub use queue::{Limits, Policy};
pub use reason::CloseReason;
pub use registry::{NotFound, Registry};
pub use serve::{Connection, serve};

#[cfg(test)]
mod tests;
