//! Reading and writing at offsets, with buffers aligned for O_DIRECT.
//!
//! Invariant: a short read or write is never taken for a whole one.

use std::alloc::{alloc_zeroed, dealloc, handle_alloc_error, Layout};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use crate::error::{Error, Result};

/// Alignment that every device we know of is content with.
pub const ALIGN: usize = 4096;

/// A buffer at an address that O_DIRECT accepts.
pub struct Aligned {
    pointer: *mut u8,
    layout: Layout,
}

// SAFETY: the buffer is owned by this value alone, like a Box<[u8]>.
unsafe impl Send for Aligned {}

impl Aligned {
    /// `length` zero bytes.
    pub fn new(length: usize) -> Self {
        let Ok(layout) = Layout::from_size_align(length.max(ALIGN), ALIGN) else {
            handle_alloc_error(Layout::new::<u8>())
        };
        // SAFETY: the layout's size is not zero.
        let pointer = unsafe { alloc_zeroed(layout) };
        if pointer.is_null() {
            handle_alloc_error(layout)
        }
        Self { pointer, layout }
    }
}

impl Drop for Aligned {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.pointer, self.layout) }
    }
}

impl std::ops::Deref for Aligned {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the pointer is valid for the layout's size while self lives, and initialised.
        unsafe { std::slice::from_raw_parts(self.pointer, self.layout.size()) }
    }
}

impl std::ops::DerefMut for Aligned {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and self is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.pointer, self.layout.size()) }
    }
}

/// A descriptor that Python keeps open during the call.
#[derive(Clone, Copy, Debug)]
pub struct Fd(RawFd);

impl Fd {
    /// Borrow a descriptor. Negative numbers are refused.
    pub fn new(fd: RawFd) -> Result<Self> {
        if fd < 0 {
            return crate::error::invalid("not a file descriptor");
        }
        Ok(Self(fd))
    }

    fn borrow(&self) -> BorrowedFd<'_> {
        // SAFETY: the caller of the core keeps the descriptor open for the whole call; it
        // is not -1. Were it closed, the calls below would fail with EBADF.
        unsafe { BorrowedFd::borrow_raw(self.0) }
    }

    /// Read at `offset` until `enough` bytes are there or the file ends; how much was read.
    /// `buffer` may be longer, so that a direct read can have an aligned length.
    pub fn read_at_least(&self, buffer: &mut [u8], offset: u64, enough: usize) -> Result<usize> {
        let mut done = 0;
        while done < enough {
            match rustix::io::pread(self.borrow(), &mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Read { offset: offset + done as u64, error: error.into() }),
            }
        }
        Ok(done)
    }

    /// Read exactly `buffer`; a file that ends earlier is an error.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let done = self.read_at_least(buffer, offset, buffer.len())?;
        if done < buffer.len() {
            let error = io::Error::new(io::ErrorKind::UnexpectedEof, "it ends here, earlier than it should");
            return Err(Error::Read { offset: offset + done as u64, error });
        }
        Ok(())
    }

    /// Write all of `buffer` at `offset`.
    pub fn write_all_at(&self, mut buffer: &[u8], mut offset: u64) -> Result<()> {
        while !buffer.is_empty() {
            match rustix::io::pwrite(self.borrow(), buffer, offset) {
                Ok(0) => {
                    let error = io::Error::new(io::ErrorKind::WriteZero, "nothing could be written");
                    return Err(Error::Write { offset, error });
                }
                Ok(count) => {
                    buffer = &buffer[count..];
                    offset += count as u64;
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(Error::Write { offset, error: error.into() }),
            }
        }
        Ok(())
    }

    /// Size of the file.
    pub fn size(&self) -> Result<u64> {
        match rustix::fs::fstat(self.borrow()) {
            Ok(stat) => Ok(stat.st_size.max(0) as u64),
            Err(error) => Err(Error::Read { offset: 0, error: error.into() }),
        }
    }

    /// Number of the descriptor.
    pub fn raw(&self) -> RawFd {
        self.borrow().as_raw_fd()
    }
}

/// Whether all bytes are zero. Compares the slice with itself shifted by a
/// machine word's worth, which the compiler turns into vector code.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (chunks, rest) = bytes.as_chunks::<64>();
    for chunk in chunks {
        if chunk.iter().fold(0u8, |a, b| a | b) != 0 {
            return false;
        }
    }
    rest.iter().all(|&b| b == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zero_test_sees_every_position() {
        for length in [0, 1, 63, 64, 65, 4096, 4097] {
            let mut bytes = vec![0; length];
            assert!(is_zero(&bytes));
            for at in 0..length {
                bytes[at] = 1;
                assert!(!is_zero(&bytes), "{at} of {length}");
                bytes[at] = 0;
            }
        }
    }

    #[test]
    fn buffers_are_aligned() {
        let mut buffer = Aligned::new(100_000);
        assert_eq!(buffer.as_ptr() as usize % ALIGN, 0);
        buffer[99_999] = 1;
        assert!(!is_zero(&buffer));
    }
}
