//! Serving images at random access, over the NBD protocol.
//!
//! `image` reads blocks out of packs through caches; `wire` is the protocol's bytes, `session` one
//! client, `server` all of them. What the core cannot know by itself (map pages, packs, records that
//! moved) it asks a `Supply` for.

pub mod cache;
pub mod image;
pub mod server;
pub mod session;
pub mod wire;
