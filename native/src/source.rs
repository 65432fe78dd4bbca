//! Reading a source: a device, a file, or a buffer that a stream was read into.
//!
//! Invariant: with `skip`, every byte that could not be read is reported exactly, to the
//! sector, and reads as zero; without, the first such byte is an error.

use crate::error::{Error, Result};
use crate::io::{Fd, ALIGN};
use crate::slots::push_range;

/// Where an image's bytes come from.
#[derive(Clone, Copy)]
pub enum Source<'a> {
    /// A file or device; `direct`: opened with O_DIRECT.
    File {
        /// The descriptor.
        fd: Fd,
        /// Whether lengths must be aligned.
        direct: bool,
    },
    /// Bytes of the image from `offset` on.
    Buffer {
        /// The bytes.
        bytes: &'a [u8],
        /// Where in the image they begin.
        offset: u64,
    },
}

/// What to do about sectors that cannot be read.
#[derive(Clone, Copy)]
pub struct OnError {
    /// Record and go on, instead of failing.
    pub skip: bool,
    /// Size of a sector: the finest grain of a retry.
    pub sector: usize,
}

/// Whether an error speaks of the medium at that place, rather than of the device as a whole.
fn is_medium_error(error: &std::io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EIO | libc::ENODATA | libc::EILSEQ | libc::EREMOTEIO | libc::ETIMEDOUT))
}

impl Source<'_> {
    /// Read `length` bytes at `offset` of the image into the start of `buffer`.
    ///
    /// `buffer` is at least `length` rounded up to `ALIGN`. Unreadable extents
    /// are appended to `lost` as (start, end).
    pub fn read(
        &self, offset: u64, length: usize, buffer: &mut [u8], on_error: OnError, lost: &mut Vec<(u64, u64)>,
    ) -> Result<()> {
        match *self {
            Self::Buffer { bytes, offset: base } => {
                let found = offset.checked_sub(base).and_then(|start| {
                    let start = usize::try_from(start).ok()?;
                    bytes.get(start..start.checked_add(length)?)
                });
                match found {
                    Some(found) => {
                        buffer[..length].copy_from_slice(found);
                        Ok(())
                    }
                    None => crate::error::invalid("the buffer does not hold the blocks asked for"),
                }
            }
            Self::File { fd, direct } => match read_file(fd, direct, offset, length, buffer) {
                Err(Error::Read { error, .. }) if on_error.skip && is_medium_error(&error) => {
                    salvage(fd, direct, offset, length, buffer, on_error.sector, lost)
                }
                other => other,
            },
        }
    }
}

fn read_file(fd: Fd, direct: bool, offset: u64, length: usize, buffer: &mut [u8]) -> Result<()> {
    if !direct {
        return fd.read_exact_at(&mut buffer[..length], offset);
    }
    // O_DIRECT wants aligned lengths; at the end of a file it gives what there is.
    let got = fd.read_at_least(&mut buffer[..length.next_multiple_of(ALIGN)], offset, length)?;
    if got < length {
        let error = std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "it ends here, earlier than it should");
        return Err(Error::Read { offset: offset + got as u64, error });
    }
    Ok(())
}

/// Read what can be read: halve the range down to the sector.
fn salvage(
    fd: Fd, direct: bool, offset: u64, length: usize, buffer: &mut [u8], sector: usize, lost: &mut Vec<(u64, u64)>,
) -> Result<()> {
    let half = (length / 2).next_multiple_of(sector.max(512));
    if length <= sector || half >= length {
        return match read_part(fd, direct, offset, length, buffer, sector) {
            Err(Error::Read { error, .. }) if is_medium_error(&error) => {
                buffer[..length].fill(0);
                push_range(lost, offset, offset + length as u64);
                Ok(())
            }
            other => other,
        };
    }
    let mut part = crate::io::Aligned::new(half.next_multiple_of(ALIGN));
    for (start, end) in [(0, half), (half, length)] {
        let size = end - start;
        let at = offset + start as u64;
        match read_part(fd, direct, at, size, &mut part, sector) {
            Err(Error::Read { error, .. }) if is_medium_error(&error) => {
                salvage(fd, direct, at, size, &mut part, sector, lost)?
            }
            other => other?,
        }
        buffer[start..end].copy_from_slice(&part[..size]);
    }
    Ok(())
}

/// A read of whole sectors only: rounding up to `ALIGN` could touch a bad neighbour.
fn read_part(fd: Fd, direct: bool, offset: u64, size: usize, part: &mut [u8], sector: usize) -> Result<()> {
    if direct && size.is_multiple_of(sector) {
        return fd.read_exact_at(&mut part[..size], offset);
    }
    read_file(fd, direct, offset, size, part)
}
