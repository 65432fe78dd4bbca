//! What can go wrong in the core. The border (`py/`) maps each kind to one Python exception.

use std::io;

/// An operation of the core failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A source or a pack could not be read.
    #[error("cannot read at byte {offset}: {error}")]
    Read {
        /// Byte offset within the file or device.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
    /// A pack or a target could not be written.
    #[error("cannot write at byte {offset}: {error}")]
    Write {
        /// Byte offset within the file or device.
        offset: u64,
        /// What the system said.
        error: io::Error,
    },
    /// Repository bytes are not what was stored.
    #[error("{0}")]
    Damaged(String),
    /// The caller asked for something that makes no sense.
    #[error("{0}")]
    Invalid(String),
}

/// Result of the core.
pub type Result<T> = std::result::Result<T, Error>;

/// Shorthand for `Error::Damaged`.
pub fn damaged<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Damaged(what.into()))
}

/// Shorthand for `Error::Invalid`.
pub fn invalid<T>(what: impl Into<String>) -> Result<T> {
    Err(Error::Invalid(what.into()))
}
