//! One client of the NBD server: what it negotiates, and the answers to its requests.
//!
//! Invariant: whatever a client sends, it gets an error or is cut off, and costs no more memory than
//! its budget; what a client reads is what `Image` gave, or an error.

use std::io::{self, Read, Write};
use std::sync::Arc;

use super::image::{Image, Kind};
use super::wire::{self, chunk, command, errno, flag, info, option, reply, Request};

/// Most runs of a reply to BLOCK_STATUS.
const MOST_RUNS: usize = 4096;
/// Options that one client may send.
const MOST_OPTIONS: usize = 1024;
const ALLOCATION: (&str, u32) = ("base:allocation", 1);
const CHANGED: (&str, u32) = ("imager:changed", 2);
/// Flags of `base:allocation`: a hole, and it reads as zeroes.
const HOLE: u32 = 1 | 2;

/// A part of an image under a name.
pub struct Export {
    /// What clients call it. The first export also goes by the empty name.
    pub name: String,
    /// For people.
    pub description: String,
    /// Where its bytes are.
    pub image: Arc<Image>,
    /// First byte within the image.
    pub start: u64,
    /// How many bytes.
    pub size: u64,
}

/// What was negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Terms {
    /// Number of the export.
    pub export: usize,
    /// Structured replies.
    pub structured: bool,
    /// Meta contexts: allocation, changes.
    pub contexts: [bool; 2],
}

fn find(exports: &[Export], name: &str) -> Option<usize> {
    exports.iter().position(|one| one.name == name).or((name.is_empty() && !exports.is_empty()).then_some(0))
}

fn flags(structured: bool) -> u16 {
    let base = flag::HAS_FLAGS | flag::READ_ONLY | flag::SEND_FLUSH | flag::CAN_MULTI_CONN | flag::SEND_CACHE;
    base | if structured { flag::SEND_DF } else { 0 }
}

/// Negotiate. None: the client left.
pub fn handshake(stream: &mut (impl Read + Write), exports: &[Export]) -> io::Result<Option<Terms>> {
    let mut hello = wire::MAGIC.to_be_bytes().to_vec();
    hello.extend_from_slice(&wire::OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&wire::HANDSHAKE.to_be_bytes());
    stream.write_all(&hello)?;
    let (fixed, no_zeroes) = wire::read_client_flags(stream)?;
    let mut structured = false;
    let mut chosen: Option<(usize, [bool; 2])> = None;
    for _ in 0..MOST_OPTIONS {
        let opt = wire::read_option(stream)?;
        let say = |kind: u32, data: &[u8]| wire::option_reply(opt.option, kind, data);
        let contexts = |export| match chosen {
            Some((of, contexts)) if of == export => contexts,
            _ => [false; 2],
        };
        let answer = match (&opt.data, opt.option) {
            (Some(name), option::EXPORT_NAME) => {
                let Some(export) = std::str::from_utf8(name).ok().and_then(|name| find(exports, name)) else {
                    return Ok(None); // The protocol has no other way to refuse.
                };
                let mut out = exports[export].size.to_be_bytes().to_vec();
                out.extend_from_slice(&flags(structured).to_be_bytes());
                out.resize(out.len() + if no_zeroes { 0 } else { 124 }, 0);
                stream.write_all(&out)?;
                return Ok(Some(Terms { export, structured, contexts: contexts(export) }));
            }
            _ if !fixed => return Ok(None),
            (None, _) => say(reply::ERR_TOO_BIG, b"it carries too much"),
            (Some(_), option::ABORT) => {
                // A client that is gone already need not hear it.
                let _ = stream.write_all(&say(reply::ACK, b""));
                return Ok(None);
            }
            (Some(data), option::LIST) if data.is_empty() => {
                let mut out = Vec::new();
                for export in exports {
                    let mut entry = (export.name.len() as u32).to_be_bytes().to_vec();
                    entry.extend_from_slice(export.name.as_bytes());
                    entry.extend_from_slice(export.description.as_bytes());
                    out.extend(say(reply::SERVER, &entry));
                }
                out.extend(say(reply::ACK, b""));
                out
            }
            (Some(data), option::INFO | option::GO) => match wire::parse_info(data) {
                None => say(reply::ERR_INVALID, b"not a name and a list of what to tell"),
                Some((name, wanted)) => match find(exports, name) {
                    None => say(reply::ERR_UNKNOWN, b"there is no such export"),
                    Some(export) => {
                        let mut out = Vec::new();
                        for piece in informed(&exports[export], &wanted, structured) {
                            out.extend(say(reply::INFO, &piece));
                        }
                        out.extend(say(reply::ACK, b""));
                        if opt.option == option::GO {
                            stream.write_all(&out)?;
                            return Ok(Some(Terms { export, structured, contexts: contexts(export) }));
                        }
                        out
                    }
                },
            },
            (Some(data), option::STRUCTURED_REPLY) if data.is_empty() => {
                structured = true;
                say(reply::ACK, b"")
            }
            (Some(data), option::LIST_META_CONTEXT | option::SET_META_CONTEXT) => {
                let set = opt.option == option::SET_META_CONTEXT;
                match wire::parse_contexts(data).map(|(name, queries)| (find(exports, name), queries)) {
                    None => say(reply::ERR_INVALID, b"not a name and a list of queries"),
                    Some(_) if set && !structured => say(reply::ERR_INVALID, b"structured replies come first"),
                    Some((None, _)) => say(reply::ERR_UNKNOWN, b"there is no such export"),
                    Some((Some(export), queries)) => {
                        let found = matching(&exports[export], &queries, set);
                        if set {
                            chosen = Some((export, found));
                        }
                        let mut out = Vec::new();
                        for (has, (name, id)) in found.into_iter().zip([ALLOCATION, CHANGED]) {
                            if has {
                                // In a list the id means nothing.
                                let mut entry = if set { id } else { 0 }.to_be_bytes().to_vec();
                                entry.extend_from_slice(name.as_bytes());
                                out.extend(say(reply::META_CONTEXT, &entry));
                            }
                        }
                        out.extend(say(reply::ACK, b""));
                        out
                    }
                }
            }
            (Some(_), option::LIST | option::STRUCTURED_REPLY) => say(reply::ERR_INVALID, b"it carries nothing"),
            (Some(_), _) => say(reply::ERR_UNSUP, b"not known here"),
        };
        stream.write_all(&answer)?;
    }
    Ok(None)
}

/// The pieces of information about an export: always its size and the sizes of blocks.
fn informed(export: &Export, wanted: &[u16], structured: bool) -> Vec<Vec<u8>> {
    let mut first = info::EXPORT.to_be_bytes().to_vec();
    first.extend_from_slice(&export.size.to_be_bytes());
    first.extend_from_slice(&flags(structured).to_be_bytes());
    let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
    let preferred = (export.image.block_size as u32).clamp(4096, 1 << 20);
    for size in [1, preferred, wire::MAX_REQUEST] {
        sizes.extend_from_slice(&size.to_be_bytes());
    }
    let mut out = vec![first, sizes];
    for (kind, text) in [(info::NAME, &export.name), (info::DESCRIPTION, &export.description)] {
        if wanted.contains(&kind) {
            let mut piece = kind.to_be_bytes().to_vec();
            piece.extend_from_slice(text.as_bytes());
            out.push(piece);
        }
    }
    out
}

/// Which contexts queries mean. In a list, none means all, and a namespace all that is in it.
fn matching(export: &Export, queries: &[&str], set: bool) -> [bool; 2] {
    let means = |name: &str| {
        let of_namespace = |query: &str| !set && query.ends_with(':') && name.starts_with(query);
        (queries.is_empty() && !set) || queries.iter().any(|query| *query == name || of_namespace(query))
    };
    [means(ALLOCATION.0), export.image.based && means(CHANGED.0)]
}

/// What a request costs in memory while it is answered, in bytes.
pub fn cost(request: &Request) -> usize {
    match request.command {
        command::READ => request.length.min(wire::MAX_REQUEST) as usize,
        _ => 0,
    }
}

/// The answer to a request, ready to be sent. Not for DISC.
pub fn answer(export: &Export, terms: &Terms, request: &Request) -> Vec<u8> {
    let fail = |error: u32, why: &str| refusal(terms, request, error, why);
    let end = request.offset.checked_add(u64::from(request.length));
    let inside = end.is_some_and(|end| end <= export.size);
    let known = match request.command {
        command::READ if terms.structured => command::FLAG_DF,
        command::BLOCK_STATUS => command::FLAG_REQ_ONE,
        _ => 0,
    };
    match request.command {
        command::WRITE | command::TRIM | command::WRITE_ZEROES => {
            fail(errno::EPERM, "an image set is never written to")
        }
        _ if request.flags & !known != 0 => fail(errno::EINVAL, "a flag that is not known here"),
        command::FLUSH => done(terms, request),
        command::READ | command::CACHE | command::BLOCK_STATUS if !inside => {
            fail(errno::EINVAL, "it reaches beyond the export")
        }
        command::READ if request.length > wire::MAX_REQUEST => fail(errno::EOVERFLOW, "too much at once"),
        command::READ if terms.structured => structured_read(export, request),
        command::READ => simple_read(export, request),
        command::CACHE => {
            for at in (0..request.length.min(wire::MAX_REQUEST)).step_by(export.image.block_size) {
                export.image.prepare(export.start + request.offset + u64::from(at));
            }
            done(terms, request)
        }
        command::BLOCK_STATUS if request.length == 0 || terms.contexts == [false; 2] => {
            fail(errno::EINVAL, "no context was negotiated, or nothing is asked about")
        }
        command::BLOCK_STATUS => match status(export, terms, request) {
            Ok(out) => out,
            Err(error) => fail(errno::EIO, &error.to_string()),
        },
        _ => fail(errno::EINVAL, "a command that is not known here"),
    }
}

fn refusal(terms: &Terms, request: &Request, error: u32, why: &str) -> Vec<u8> {
    if !terms.structured {
        return wire::simple(error, request.cookie);
    }
    let mut out = Vec::new();
    wire::error_chunk(&mut out, chunk::DONE, request.cookie, error, why, None);
    out
}

fn done(terms: &Terms, request: &Request) -> Vec<u8> {
    if !terms.structured {
        return wire::simple(0, request.cookie);
    }
    let mut out = Vec::new();
    wire::chunk_head(&mut out, chunk::DONE, chunk::NONE, request.cookie, 0);
    out
}

fn simple_read(export: &Export, request: &Request) -> Vec<u8> {
    let mut out = wire::simple(0, request.cookie);
    let head = out.len();
    out.resize(head + request.length as usize, 0);
    if export.image.read(export.start + request.offset, &mut out[head..]).is_empty() {
        return out;
    }
    wire::simple(errno::EIO, request.cookie)
}

fn structured_read(export: &Export, request: &Request) -> Vec<u8> {
    let (cookie, offset) = (request.cookie, request.offset);
    let length = request.length as usize;
    let whole = request.flags & command::FLAG_DF != 0;
    let mut out = Vec::with_capacity(length + 256);
    let start = export.start + offset;
    // Where the map cannot be read, the read itself tells.
    let runs = match export.image.allocation(start, start + length as u64, MOST_RUNS) {
        Ok(runs) if !whole && runs.iter().map(|run| run.0).sum::<u64>() == length as u64 => runs,
        _ => vec![(length as u64, Kind::Data)],
    };
    let mut at = 0;
    for (run, kind) in runs {
        let (from, to) = (at, at + run as usize);
        at = to;
        if kind == Kind::Zero {
            wire::chunk_head(&mut out, 0, chunk::OFFSET_HOLE, cookie, 12);
            out.extend_from_slice(&(offset + from as u64).to_be_bytes());
            out.extend_from_slice(&(run as u32).to_be_bytes());
        } else if from < to {
            data_chunk(export, cookie, offset + from as u64, to - from, whole, &mut out);
        }
    }
    wire::chunk_head(&mut out, chunk::DONE, chunk::NONE, cookie, 0);
    out
}

/// `length` bytes from `offset` of the export: as one chunk, or in the pieces that can be had.
fn data_chunk(export: &Export, cookie: u64, offset: u64, length: usize, whole: bool, out: &mut Vec<u8>) {
    let begin = out.len();
    wire::chunk_head(out, 0, chunk::OFFSET_DATA, cookie, (8 + length) as u32);
    out.extend_from_slice(&offset.to_be_bytes());
    let head = out.len();
    out.resize(head + length, 0);
    let lost = export.image.read(export.start + offset, &mut out[head..]);
    if lost.is_empty() {
        return;
    }
    let content = out.split_off(head);
    out.truncate(begin);
    let mut at = 0;
    for (from, to, why) in &lost {
        if at < *from && !whole {
            wire::chunk_head(out, 0, chunk::OFFSET_DATA, cookie, (8 + from - at) as u32);
            out.extend_from_slice(&(offset + at as u64).to_be_bytes());
            out.extend_from_slice(&content[at..*from]);
        }
        wire::error_chunk(out, 0, cookie, errno::EIO, why, Some(offset + *from as u64));
        at = *to;
    }
    if at < length && !whole {
        wire::chunk_head(out, 0, chunk::OFFSET_DATA, cookie, (8 + length - at) as u32);
        out.extend_from_slice(&(offset + at as u64).to_be_bytes());
        out.extend_from_slice(&content[at..]);
    }
}

fn status(export: &Export, terms: &Terms, request: &Request) -> crate::error::Result<Vec<u8>> {
    let most = if request.flags & command::FLAG_REQ_ONE != 0 { 1 } else { MOST_RUNS };
    let start = export.start + request.offset;
    let end = start + u64::from(request.length);
    let mut out = Vec::new();
    let mut tell = |id: u32, runs: Vec<(u64, u32)>| {
        wire::chunk_head(&mut out, 0, chunk::BLOCK_STATUS, request.cookie, (4 + 8 * runs.len()) as u32);
        out.extend_from_slice(&id.to_be_bytes());
        for (length, flags) in runs {
            out.extend_from_slice(&(length as u32).to_be_bytes());
            out.extend_from_slice(&flags.to_be_bytes());
        }
    };
    if terms.contexts[0] {
        let runs = export.image.allocation(start, end, most)?;
        tell(ALLOCATION.1, runs.into_iter().map(|(n, kind)| (n, if kind == Kind::Zero { HOLE } else { 0 })).collect());
    }
    if terms.contexts[1] {
        let runs = export.image.changes(start, end, most)?;
        tell(CHANGED.1, runs.into_iter().map(|(length, changed)| (length, u32::from(changed))).collect());
    }
    wire::chunk_head(&mut out, chunk::DONE, chunk::NONE, request.cookie, 0);
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Result;
    use crate::export::image::{Pack, Supply, LEAF};
    use crate::record::Ids;
    use crate::slots::{Slot, UNREADABLE, ZERO};
    use proptest::prelude::*;

    /// Zeroes, and a stretch that was unreadable.
    struct Plain;

    impl Supply for Plain {
        fn leaf(&self, index: u64) -> Result<Vec<Slot>> {
            let kind = |block: u64| if (3..5).contains(&block) { UNREADABLE } else { ZERO };
            Ok((index * LEAF..(index + 1) * LEAF).map(|block| Slot::plain(kind(block))).collect())
        }
        fn pack(&self, _: u32) -> Result<Pack> {
            crate::error::damaged("there are no packs")
        }
        fn elsewhere(&self, _: u64, _: &Slot, reason: &str) -> Result<Vec<u8>> {
            crate::error::damaged(reason)
        }
        fn changed(&self) -> Result<Vec<(u64, u64)>> {
            Ok(vec![(4096, 8192), (20_000, 21_000)])
        }
    }

    fn exports() -> Vec<Export> {
        let ids = Arc::new(Ids::new([0; 16], [0; 32]));
        let image = Image::new(ids, Box::new(Plain), 1 << 20, 4096, 1 << 16, 4, true).expect("is sane");
        vec![Export {
            name: "disk".into(),
            description: String::new(),
            image: Arc::new(image),
            start: 0,
            size: 1 << 20,
        }]
    }

    /// A client that has said all that it will say.
    struct Said<'a>(&'a [u8], Vec<u8>);

    impl Read for Said<'_> {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.0.read(buffer)
        }
    }

    impl Write for Said<'_> {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.extend_from_slice(bytes);
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn opt(option: u32, data: &[u8]) -> Vec<u8> {
        let mut out = wire::OPTION_MAGIC.to_be_bytes().to_vec();
        out.extend(option.to_be_bytes());
        out.extend((data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        out
    }

    proptest! {
        #[test]
        fn a_handshake_ends(flags in 0u32..5, options in prop::collection::vec((0u32..12, prop::collection::vec(0u8..8, 0..40)), 0..8), rest in prop::collection::vec(any::<u8>(), 0..40)) {
            let mut bytes = flags.to_be_bytes().to_vec();
            for (option, data) in &options {
                bytes.extend(opt(*option, data));
            }
            bytes.extend(rest);
            let _ = handshake(&mut Said(&bytes, Vec::new()), &exports());
        }

        #[test]
        fn an_answer_is_no_longer_than_what_was_asked_for(
            flags in 0u16..16, command in 0u16..9, offset in 0u64..(1 << 20) + 9, length in 0u32..(1 << 20) + 9, structured: bool,
        ) {
            prop_assume!(command != command::DISC);
            let terms = Terms { export: 0, structured, contexts: [structured; 2] };
            let request = Request { flags, command, cookie: 5, offset, length };
            let out = answer(&exports()[0], &terms, &request);
            prop_assert!(out.len() >= 16 && out.len() <= length as usize + 16384);
        }
    }

    #[test]
    fn what_could_not_be_backed_up_is_an_error_for_its_range() {
        let export = &exports()[0];
        let terms = Terms { export: 0, structured: true, contexts: [false; 2] };
        let out = answer(
            export,
            &terms,
            &Request { flags: 0, command: command::READ, cookie: 1, offset: 8192, length: 16384 },
        );
        let errors = out.windows(6).filter(|part| part[..4] == wire::CHUNK_MAGIC.to_be_bytes() && part[5] == 0).count();
        assert_eq!(errors, 4, "a hole, two errors, a hole; then the end");
        assert_eq!(
            export.image.changes(0, 30_000, 9).expect("is known"),
            [(4096, false), (4096, true), (11_808, false), (1000, true), (9000, false)]
        );
    }

    #[test]
    fn it_is_negotiated_as_people_do() {
        let mut bytes = 3u32.to_be_bytes().to_vec();
        bytes.extend(opt(option::STRUCTURED_REPLY, b""));
        bytes.extend(opt(option::SET_META_CONTEXT, b"\0\0\0\x04disk\0\0\0\x01\0\0\0\x0fbase:allocation"));
        bytes.extend(opt(option::GO, b"\0\0\0\0\0\0"));
        let mut said = Said(&bytes, Vec::new());
        let terms = handshake(&mut said, &exports()).expect("goes well");
        assert_eq!(terms, Some(Terms { export: 0, structured: true, contexts: [true, false] }));
    }
}
