//! The native core of imager: everything that touches every byte.
//!
//! Plain Rust below, the border to Python in `py`. One direction: `py` calls
//! `scan`, `fetch`, `compare`, which use `pack`, `record`, `page`, `known`,
//! `index`, `merge`, which use `codec`, `crypto`, `digest`, `io`. Beside them `fs` reads the
//! allocation maps of filesystems.

pub mod bytes;
pub mod codec;
pub mod compare;
pub mod crypto;
pub mod digest;
pub mod error;
pub mod export;
pub mod fetch;
pub mod filter;
pub mod fs;
pub mod gather;
pub mod index;
pub mod io;
pub mod known;
pub mod marks;
pub mod merge;
pub mod names;
pub mod pack;
pub mod page;
pub mod record;
pub mod repack;
pub mod scan;
pub mod seal;
pub mod slots;
pub mod source;
pub mod workers;

mod py;
