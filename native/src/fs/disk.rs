//! Reading a partition, and integers out of what was read.
//!
//! Invariant: nothing outside the partition is ever handed out, and no read of an integer goes
//! past the end of its bytes. Reads are of whole pages at aligned addresses, as O_DIRECT wants.

use crate::io::{Aligned, Fd, ALIGN};

use super::{doubt, Doubt, Sure};

/// The longest single read.
pub const LONGEST: usize = 8 << 20;

/// Where bytes come from: a descriptor, or a test's memory.
pub trait ReadAt {
    /// Read at `offset` until `enough` bytes are there or the end is reached; how much was read.
    fn read_at_least(&self, buffer: &mut [u8], offset: u64, enough: usize) -> crate::error::Result<usize>;
}

impl ReadAt for Fd {
    fn read_at_least(&self, buffer: &mut [u8], offset: u64, enough: usize) -> crate::error::Result<usize> {
        Fd::read_at_least(self, buffer, offset, enough)
    }
}

/// A partition of `size` bytes from `start`.
pub struct Disk<R> {
    source: R,
    start: u64,
    size: u64,
}

impl<R: ReadAt> Disk<R> {
    /// `None` where the range makes no sense.
    pub fn new(source: R, start: u64, size: u64) -> Option<Self> {
        let end = start.checked_add(size)?;
        // Offsets of the system are signed; the rest keeps sums of offsets from wrapping.
        (end <= 1 << 62).then_some(Self { source, start, size })
    }

    /// The same partition, its bytes from elsewhere.
    pub fn with<S: ReadAt>(&self, source: S) -> Disk<S> {
        Disk { source, start: self.start, size: self.size }
    }

    /// Where its bytes come from; offsets there count from the device's first byte.
    pub fn source(&self) -> &R {
        &self.source
    }

    /// The partition's first byte.
    pub fn start(&self) -> u64 {
        self.start
    }

    /// Bytes of the partition.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Exactly `length` bytes at `offset` of the partition.
    pub fn read(&self, offset: u64, length: usize) -> Sure<Piece> {
        let inside = offset.checked_add(length as u64).is_some_and(|end| end <= self.size);
        if !inside || length > LONGEST {
            return doubt(format!("it refers to {length} bytes at {offset}, which lie outside"));
        }
        let first = (self.start + offset) / ALIGN as u64 * ALIGN as u64;
        let skip = (self.start + offset - first) as usize;
        let mut buffer = Aligned::new((skip + length).next_multiple_of(ALIGN));
        match self.source.read_at_least(&mut buffer, first, skip + length) {
            Ok(got) if got >= skip + length => Ok(Piece { buffer, skip, length }),
            Ok(_) => doubt(format!("its device ends before byte {}", offset + length as u64)),
            Err(error) => doubt(format!("its metadata cannot be read: {error}")),
        }
    }
}

/// Bytes that were read.
pub struct Piece {
    buffer: Aligned,
    skip: usize,
    length: usize,
}

impl Piece {
    /// All of them.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[self.skip..self.skip + self.length]
    }

    /// Integers out of them.
    pub fn view(&self) -> View<'_> {
        View(self.bytes())
    }
}

/// Integers out of untrusted bytes, at offsets.
#[derive(Clone, Copy)]
pub struct View<'a>(pub &'a [u8]);

impl<'a> View<'a> {
    /// The bytes `[at, at + length)`.
    pub fn part(&self, at: usize, length: usize) -> Sure<&'a [u8]> {
        let end = at.checked_add(length);
        end.and_then(|end| self.0.get(at..end)).ok_or_else(|| Doubt("a structure of it is cut short".into()))
    }

    fn array<const N: usize>(&self, at: usize) -> Sure<[u8; N]> {
        let mut out = [0; N];
        out.copy_from_slice(self.part(at, N)?);
        Ok(out)
    }

    /// One byte.
    pub fn u8(&self, at: usize) -> Sure<u8> {
        Ok(self.array::<1>(at)?[0])
    }

    /// 16 bits, little-endian.
    pub fn le16(&self, at: usize) -> Sure<u16> {
        Ok(u16::from_le_bytes(self.array(at)?))
    }

    /// 32 bits, little-endian.
    pub fn le32(&self, at: usize) -> Sure<u32> {
        Ok(u32::from_le_bytes(self.array(at)?))
    }

    /// 64 bits, little-endian.
    pub fn le64(&self, at: usize) -> Sure<u64> {
        Ok(u64::from_le_bytes(self.array(at)?))
    }

    /// 16 bits, big-endian.
    pub fn be16(&self, at: usize) -> Sure<u16> {
        Ok(u16::from_be_bytes(self.array(at)?))
    }

    /// 32 bits, big-endian.
    pub fn be32(&self, at: usize) -> Sure<u32> {
        Ok(u32::from_be_bytes(self.array(at)?))
    }

    /// 64 bits, big-endian.
    pub fn be64(&self, at: usize) -> Sure<u64> {
        Ok(u64::from_be_bytes(self.array(at)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_outside_is_read() {
        let file = tempfile::tempfile().expect("a file");
        file.set_len(1 << 20).expect("a size");
        let fd = Fd::new(std::os::fd::AsRawFd::as_raw_fd(&file)).expect("a descriptor");
        let disk = Disk::new(fd, 512, 4096).expect("a range");
        assert_eq!(disk.read(0, 4096).expect("inside").bytes().len(), 4096);
        for (offset, length) in [(1, 4096), (4096, 1), (u64::MAX, 2), (0, LONGEST + 1)] {
            assert!(disk.read(offset, length).is_err());
        }
        assert!(Disk::new(fd, u64::MAX, 1).is_none());
        let beyond = Disk::new(fd, 1 << 20, 4096).expect("a range");
        assert!(beyond.read(0, 1).is_err());
    }
}
