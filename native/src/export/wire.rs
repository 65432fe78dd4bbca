//! The bytes of the NBD protocol: fixed newstyle handshake, structured replies, block status.
//!
//! Source: doc/proto.md of the NBD project. All numbers are big-endian.

use std::io::{self, Read};

/// "NBDMAGIC".
pub const MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT".
pub const OPTION_MAGIC: u64 = 0x4948_4156_454F_5054;
/// Begins a reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Begins a request.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Begins a simple reply.
pub const SIMPLE_MAGIC: u32 = 0x6744_6698;
/// Begins a chunk of a structured reply.
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// Handshake flags: fixed newstyle, and no 124 zeroes after an export's data.
pub const HANDSHAKE: u16 = 1 | 2;

/// Options.
pub mod option {
    #![allow(missing_docs)]
    pub const EXPORT_NAME: u32 = 1;
    pub const ABORT: u32 = 2;
    pub const LIST: u32 = 3;
    pub const STARTTLS: u32 = 5;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const LIST_META_CONTEXT: u32 = 9;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
pub mod reply {
    #![allow(missing_docs)]
    pub const ACK: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Pieces of information about an export.
pub mod info {
    #![allow(missing_docs)]
    pub const EXPORT: u16 = 0;
    pub const NAME: u16 = 1;
    pub const DESCRIPTION: u16 = 2;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags.
pub mod flag {
    #![allow(missing_docs)]
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 2;
    pub const SEND_FLUSH: u16 = 4;
    pub const SEND_DF: u16 = 128;
    pub const CAN_MULTI_CONN: u16 = 256;
    pub const SEND_CACHE: u16 = 1024;
}

/// Commands, and the flags that they may carry.
pub mod command {
    #![allow(missing_docs)]
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISC: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
    pub const FLAG_DF: u16 = 4;
    pub const FLAG_REQ_ONE: u16 = 8;
}

/// Types of chunks of structured replies.
pub mod chunk {
    #![allow(missing_docs)]
    pub const DONE: u16 = 1;
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15 | 1;
    pub const ERROR_OFFSET: u16 = 1 << 15 | 2;
}

/// Errors, as the protocol numbers them.
pub mod errno {
    #![allow(missing_docs)]
    pub const EPERM: u32 = 1;
    pub const EIO: u32 = 5;
    pub const EINVAL: u32 = 22;
    pub const EOVERFLOW: u32 = 75;
}

/// Longest name that is taken, and longest query of a meta context.
pub const MAX_NAME: usize = 4096;
/// Most data that an option may carry.
pub const MAX_OPTION: u32 = 64 << 10;
/// Most bytes of a read or of a write's payload.
pub const MAX_REQUEST: u32 = 32 << 20;

/// An option as a client sends it.
#[derive(Debug, PartialEq, Eq)]
pub struct Opt {
    /// Which one.
    pub option: u32,
    /// What it carries; None where that is longer than `MAX_OPTION`, and was passed over.
    pub data: Option<Vec<u8>>,
}

/// A request of the transmission phase, without the payload of a write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// Flags of the command.
    pub flags: u16,
    /// Which command.
    pub command: u16,
    /// Names the request in its replies.
    pub cookie: u64,
    /// First byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u32,
}

fn protocol<T>(what: &str) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::InvalidData, what))
}

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_be_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Pass over `length` bytes.
pub fn skip(from: &mut impl Read, length: u64) -> io::Result<()> {
    match io::copy(&mut from.take(length), &mut io::sink())? == length {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Read the client's flags: whether it knows fixed newstyle, and wants no zeroes.
pub fn read_client_flags(from: &mut impl Read) -> io::Result<(bool, bool)> {
    let flags = u32::from_be_bytes(array(from)?);
    if flags & !3 != 0 {
        return protocol("the client asks for what no server has");
    }
    Ok((flags & 1 != 0, flags & 2 != 0))
}

/// Read an option.
pub fn read_option(from: &mut impl Read) -> io::Result<Opt> {
    if u64::from_be_bytes(array(from)?) != OPTION_MAGIC {
        return protocol("no option where one is due");
    }
    let option = u32::from_be_bytes(array(from)?);
    let length = u32::from_be_bytes(array(from)?);
    if length > MAX_OPTION {
        skip(from, u64::from(length))?;
        return Ok(Opt { option, data: None });
    }
    let mut data = vec![0; length as usize];
    from.read_exact(&mut data)?;
    Ok(Opt { option, data: Some(data) })
}

/// Read a request; None at the end of the stream.
pub fn read_request(from: &mut impl Read) -> io::Result<Option<Request>> {
    let mut bytes = [0; 28];
    let mut done = 0;
    while done < bytes.len() {
        match from.read(&mut bytes[done..]) {
            Ok(0) if done == 0 => return Ok(None),
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    parse_request(&bytes).map(Some)
}

/// The 28 bytes of a request.
pub fn parse_request(bytes: &[u8; 28]) -> io::Result<Request> {
    let (Some(magic), Some(flags), Some(command)) = (u32_at(bytes, 0), u16_at(bytes, 4), u16_at(bytes, 6)) else {
        return protocol("a short request");
    };
    if magic != REQUEST_MAGIC {
        return protocol("no request where one is due");
    }
    let wide = |at: usize| -> u64 { bytes[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte)) };
    Ok(Request { flags, command, cookie: wide(8), offset: wide(16), length: u32_at(bytes, 24).unwrap_or(0) })
}

/// A name with its length before it: (name, where it ends).
fn name_at(data: &[u8], at: usize) -> Option<(&str, usize)> {
    let length = u32_at(data, at)? as usize;
    if length > MAX_NAME {
        return None;
    }
    let end = at + 4 + length;
    Some((std::str::from_utf8(data.get(at + 4..end)?).ok()?, end))
}

/// What INFO and GO carry: the export's name, and the pieces of information that are asked for.
pub fn parse_info(data: &[u8]) -> Option<(&str, Vec<u16>)> {
    let (name, at) = name_at(data, 0)?;
    let count = u16_at(data, at)? as usize;
    if data.len() != at + 2 + 2 * count {
        return None;
    }
    let wanted = (0..count).map(|index| u16_at(data, at + 2 + 2 * index)).collect::<Option<_>>()?;
    Some((name, wanted))
}

/// What LIST_META_CONTEXT and SET_META_CONTEXT carry: the export's name, and queries.
pub fn parse_contexts(data: &[u8]) -> Option<(&str, Vec<&str>)> {
    let (name, mut at) = name_at(data, 0)?;
    let count = u32_at(data, at)? as usize;
    at += 4;
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, end) = name_at(data, at)?;
        queries.push(query);
        at = end;
    }
    (at == data.len()).then_some((name, queries))
}

/// A reply to an option.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(20 + data.len());
    out.extend_from_slice(&OPTION_REPLY_MAGIC.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&(data.len() as u32).to_be_bytes());
    out.extend_from_slice(data);
    out
}

/// The head of a simple reply.
pub fn simple(error: u32, cookie: u64) -> Vec<u8> {
    let mut out = Vec::with_capacity(16);
    out.extend_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out
}

/// The head of a chunk whose payload has `length` bytes.
pub fn chunk_head(out: &mut Vec<u8>, flags: u16, kind: u16, cookie: u64, length: u32) {
    out.extend_from_slice(&CHUNK_MAGIC.to_be_bytes());
    out.extend_from_slice(&flags.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&cookie.to_be_bytes());
    out.extend_from_slice(&length.to_be_bytes());
}

/// A chunk that says what went wrong, at `offset` where that is known.
pub fn error_chunk(out: &mut Vec<u8>, flags: u16, cookie: u64, error: u32, message: &str, offset: Option<u64>) {
    let mut cut = message.len().min(MAX_NAME);
    while !message.is_char_boundary(cut) {
        cut -= 1;
    }
    let text = &message.as_bytes()[..cut];
    let kind = if offset.is_some() { chunk::ERROR_OFFSET } else { chunk::ERROR };
    chunk_head(out, flags, kind, cookie, (6 + text.len() + 8 * usize::from(offset.is_some())) as u32);
    out.extend_from_slice(&error.to_be_bytes());
    out.extend_from_slice(&(text.len() as u16).to_be_bytes());
    out.extend_from_slice(text);
    if let Some(offset) = offset {
        out.extend_from_slice(&offset.to_be_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn whatever_comes_is_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some((name, wanted)) = parse_info(&bytes) {
                prop_assert_eq!(bytes.len(), 6 + name.len() + 2 * wanted.len());
            }
            if let Some((name, queries)) = parse_contexts(&bytes) {
                prop_assert_eq!(bytes.len(), 8 + name.len() + queries.iter().map(|one| 4 + one.len()).sum::<usize>());
            }
            let mut from = &bytes[..];
            while let Ok(Some(_)) = read_request(&mut from) {}
            let mut from = &bytes[..];
            while read_option(&mut from).is_ok() {}
        }

        #[test]
        fn requests_come_back(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) {
            let mut bytes = REQUEST_MAGIC.to_be_bytes().to_vec();
            bytes.extend(flags.to_be_bytes());
            bytes.extend(command.to_be_bytes());
            bytes.extend(cookie.to_be_bytes());
            bytes.extend(offset.to_be_bytes());
            bytes.extend(length.to_be_bytes());
            let read = read_request(&mut &bytes[..]).expect("is whole");
            prop_assert_eq!(read, Some(Request { flags, command, cookie, offset, length }));
        }

        #[test]
        fn a_message_is_cut_between_characters(text in ".{0,3000}", offset: Option<u64>) {
            let mut out = Vec::new();
            error_chunk(&mut out, 1, 7, errno::EIO, &text, offset);
            let said = u16::from_be_bytes([out[24], out[25]]) as usize;
            prop_assert!(said <= MAX_NAME && std::str::from_utf8(&out[26..26 + said]).is_ok());
            prop_assert_eq!(out.len(), 26 + said + 8 * usize::from(offset.is_some()));
        }
    }
}
