//! A disk in memory, for the tests of the readers.

use proptest::prelude::*;

use super::disk::ReadAt;

/// Bytes that can be read.
pub struct Memory(pub Vec<u8>);

impl ReadAt for Memory {
    fn read_at_least(&self, buffer: &mut [u8], offset: u64, _enough: usize) -> crate::error::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|at| self.0.get(at..)).unwrap_or(&[]);
        let length = rest.len().min(buffer.len());
        buffer[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

/// Bytes to be changed in the first `within` bytes of a disk.
pub fn mutations(within: usize) -> impl Strategy<Value = Vec<(usize, u8)>> {
    prop::collection::vec((0..within, prop_oneof![any::<u8>(), Just(0), Just(0xFF), Just(0x80), Just(1)]), 1..12)
}
