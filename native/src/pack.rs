//! Packs: many records in one object (repository-format.md, section 5).
//!
//! Invariant: whatever the trailer lists has been written whole; a pack's name
//! binds its header and trailer, and the trailer binds every payload.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::bytes::Reader;
use crate::crypto::SessionKey;
use crate::digest::{b3, xxh3, Id};
use crate::error::{damaged, invalid, Result};
use crate::io::Fd;
use crate::names::Names;
use crate::page;
use crate::record::{Head, Ids, Records, Sealer, HEAD};
use crate::slots::{Place, Slot};
use crate::workers;

/// Length of an envelope.
pub const ENVELOPE: usize = 104;
/// Most envelopes a pack can have.
pub const MAX_ENVELOPES: usize = 1024;
/// Records of a pack at most: what is read of a frame stays within some hundred MiB of memory.
pub const MAX_RECORDS: usize = 1 << 21;
const FIXED: usize = 64;
const TRAILER_ENTRY: usize = HEAD + 32;
const FOOTER: usize = 32;
/// What follows the records beside their own trailer entries: one entry's worth, and the footer.
pub const TAIL_ROOM: u64 = (TRAILER_ENTRY + FOOTER) as u64;
const PACK_MAGIC: &[u8; 8] = b"IMGRPACK";
const TAIL_MAGIC: &[u8; 8] = b"IMGRTAIL";

/// A pack's header, parsed.
#[derive(Debug)]
pub struct Header {
    /// 1 data, 2 map.
    pub kind: u8,
    /// Length of the header.
    pub length: usize,
    /// Sealed session keys, by envelope number.
    pub envelopes: Vec<[u8; ENVELOPE]>,
}

/// What a pack's header says beside its envelopes.
pub struct Parts {
    /// 1 data, 2 map.
    pub kind: u8,
    /// The repository.
    pub repository: [u8; 16],
    /// The session.
    pub session: [u8; 16],
    /// Number of the pack within the session.
    pub sequence: u64,
}

/// The bytes of a header.
pub fn encode_header(parts: &Parts, envelopes: &[[u8; ENVELOPE]]) -> Vec<u8> {
    let length = FIXED + ENVELOPE * envelopes.len() + 8;
    let mut out = Vec::with_capacity(length);
    out.extend_from_slice(PACK_MAGIC);
    out.extend_from_slice(&1u16.to_le_bytes());
    out.push(parts.kind);
    out.push(0);
    out.extend_from_slice(&(length as u32).to_le_bytes());
    out.extend_from_slice(&parts.repository);
    out.extend_from_slice(&parts.session);
    out.extend_from_slice(&parts.sequence.to_le_bytes());
    out.extend_from_slice(&(envelopes.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; 6]);
    for envelope in envelopes {
        out.extend_from_slice(envelope);
    }
    let check = xxh3(&out);
    out.extend_from_slice(&check.to_le_bytes());
    out
}

/// The footer of a pack whose trailer begins at `trailer_at`.
pub fn encode_footer(records: u32, trailer_at: u64) -> Vec<u8> {
    let mut footer = Vec::with_capacity(FOOTER);
    footer.extend_from_slice(TAIL_MAGIC);
    footer.extend_from_slice(&records.to_le_bytes());
    footer.extend_from_slice(&(TRAILER_ENTRY as u32).to_le_bytes());
    footer.extend_from_slice(&trailer_at.to_le_bytes());
    let check = xxh3(&footer);
    footer.extend_from_slice(&check.to_le_bytes());
    footer
}

/// The name of the pack that these are the frame of.
pub fn name_of(header: &[u8], trailer: &[u8], footer: &[u8]) -> Id {
    b3(&[b"imager pack v1", header, trailer, footer])
}

/// Parse a pack's first bytes; more than the header may be given.
pub fn decode_header(bytes: &[u8], repository: &[u8; 16]) -> Result<Header> {
    let mut r = Reader::new(bytes, "pack header");
    if r.take(8)? != PACK_MAGIC {
        return damaged("not a pack");
    }
    let (version, kind, _, length) = (r.u16()?, r.u8()?, r.u8()?, r.u32()? as usize);
    if version != 1 || !(1..=2).contains(&kind) {
        return damaged(format!("pack of version {version}, kind {kind}"));
    }
    if r.array::<16>()? != *repository {
        return damaged("pack belongs to another repository");
    }
    r.take(24)?;
    let count = usize::from(r.u16()?);
    r.take(6)?;
    if count > MAX_ENVELOPES || length != FIXED + ENVELOPE * count + 8 {
        return damaged("pack header has an impossible length");
    }
    let mut envelopes = Vec::with_capacity(count);
    for _ in 0..count {
        envelopes.push(r.array()?);
    }
    if r.u64()? != xxh3(&bytes[..length - 8]) {
        return damaged("pack header is damaged");
    }
    Ok(Header { kind, length, envelopes })
}

/// One line of a trailer.
#[derive(Clone, Debug)]
pub struct Entry {
    /// Head of the record.
    pub head: Head,
    /// Where the record begins.
    pub offset: u64,
    /// BLAKE3 of the payload.
    pub digest: Id,
}

/// A pack's frame: everything but the payloads.
#[derive(Debug)]
pub struct Frame {
    /// The header.
    pub header: Header,
    /// The trailer.
    pub entries: Vec<Entry>,
    /// The name that header and trailer have.
    pub name: Id,
}

impl Frame {
    /// Its length in bytes.
    pub fn bytes(&self) -> u64 {
        (self.header.length + self.entries.len() * TRAILER_ENTRY + FOOTER) as u64
    }
}

/// Read and check header and trailer of a pack. `name`: what it must be called, if known.
pub fn read_frame(fd: Fd, name: Option<&Id>, repository: &[u8; 16]) -> Result<Frame> {
    let size = fd.size()?;
    if size < (FIXED + 8 + FOOTER) as u64 || size > u64::from(u32::MAX) {
        return damaged(format!("a pack of {size} bytes cannot be"));
    }
    let mut start = vec![0; (FIXED + MAX_ENVELOPES * ENVELOPE + 8).min(size as usize)];
    fd.read_exact_at(&mut start[..FIXED], 0)?;
    let claimed = u32::from_le_bytes([start[12], start[13], start[14], start[15]]) as usize;
    if claimed < FIXED || claimed > start.len() {
        return damaged("pack header has an impossible length");
    }
    start.truncate(claimed);
    fd.read_exact_at(&mut start, 0)?;
    let header = decode_header(&start, repository)?;

    let mut footer = [0; FOOTER];
    fd.read_exact_at(&mut footer, size - FOOTER as u64)?;
    let mut r = Reader::new(&footer, "pack footer");
    if r.take(8)? != TAIL_MAGIC {
        return damaged("pack has no end: it was cut off");
    }
    let (count, entry, at) = (r.u32()? as usize, r.u32()? as usize, r.u64()?);
    if r.u64()? != xxh3(&footer[..24]) {
        return damaged("pack footer is damaged");
    }
    if count > MAX_RECORDS {
        return damaged(format!("pack claims {count} records, which is more than one can have"));
    }
    let length = (count as u64).saturating_mul(TRAILER_ENTRY as u64);
    if entry != TRAILER_ENTRY || at.checked_add(length) != Some(size - FOOTER as u64) || at < header.length as u64 {
        return damaged("pack trailer does not fit");
    }
    let mut trailer = vec![0; length as usize];
    fd.read_exact_at(&mut trailer, at)?;
    let is = name_of(&start, &trailer, &footer);
    if name.is_some_and(|name| *name != is) {
        return damaged("pack is not the one its name says: swapped, or its frame is damaged");
    }
    let mut entries = Vec::with_capacity(count);
    let mut offset = header.length as u64;
    for line in trailer.chunks_exact(TRAILER_ENTRY) {
        let head = Head::decode(line)?;
        let mut digest = [0; 32];
        digest.copy_from_slice(&line[HEAD..]);
        entries.push(Entry { head, offset, digest });
        offset += u64::from(head.record_len());
    }
    if offset != at {
        return damaged("pack trailer does not match its records");
    }
    Ok(Frame { header, entries, name: is })
}

/// What a check of a pack found.
#[derive(Debug, Default)]
pub struct Report {
    /// What is wrong with the pack as a whole.
    pub problem: Option<String>,
    /// How many records it lists.
    pub records: usize,
    /// Damaged records: id, offset, length.
    pub damaged: Vec<(Id, u32, u32)>,
}

/// Check everything that can be checked without a key.
pub fn check(fd: Fd, name: &Id, repository: &[u8; 16], threads: usize) -> Result<Report> {
    let frame = match read_frame(fd, Some(name), repository) {
        Ok(frame) => frame,
        Err(error) => return Ok(Report { problem: Some(error.to_string()), ..Report::default() }),
    };
    let hurt = Mutex::new(Vec::new());
    workers::run(
        threads,
        frame.entries.len(),
        || Ok(Vec::new()),
        |buffer: &mut Vec<u8>, at| {
            let entry = &frame.entries[at];
            let length = entry.head.record_len();
            buffer.resize(length as usize, 0);
            let whole = fd.read_exact_at(buffer, entry.offset).is_ok()
                && buffer[..HEAD] == entry.head.encode()
                && b3(&[&buffer[HEAD..]]) == entry.digest;
            if !whole {
                let line = (entry.head.id, entry.offset as u32, length);
                hurt.lock().unwrap_or_else(PoisonError::into_inner).push(line);
            }
            Ok(())
        },
    )?;
    let mut damaged = hurt.into_inner().unwrap_or_else(PoisonError::into_inner);
    damaged.sort_by_key(|&(_, offset, _)| offset);
    Ok(Report { problem: None, records: frame.entries.len(), damaged })
}

/// Appended records that wait to be written: so many at most, beyond them a worker writes its own.
const MAX_WAITING: usize = 8;

#[derive(Default)]
struct State {
    size: u64,
    trailer: Vec<u8>,
    records: u32,
    finished: bool,
    waiting: VecDeque<(u64, Records)>,
    spare: Vec<Records>,
    writing: bool,
}

/// A pack being written. Workers append to it side by side: a place is reserved
/// under a lock, and one of them writes what all have handed in, as a file
/// takes only one write at a time. `finish` comes after the workers have ended.
pub struct Writer {
    fd: Fd,
    header: Vec<u8>,
    /// Its number in `Names`.
    pub number: u32,
    key: Option<SessionKey>,
    state: Mutex<State>,
}

/// Who writes a pack, and as what.
pub struct Origin<'a> {
    /// 1 data, 2 map.
    pub kind: u8,
    /// The repository.
    pub repository: [u8; 16],
    /// The session.
    pub session: [u8; 16],
    /// Number of the pack within the session.
    pub sequence: u64,
    /// The session key, sealed; None where nothing is encrypted.
    pub envelope: Option<&'a [u8; ENVELOPE]>,
}

impl Writer {
    /// Begin a pack at the start of `fd`.
    pub fn new(fd: Fd, origin: Origin, key: Option<SessionKey>, number: u32) -> Result<Self> {
        if key.is_some() != origin.envelope.is_some() {
            return invalid("a session key needs an envelope, and an envelope a key");
        }
        let envelopes: Vec<[u8; ENVELOPE]> = origin.envelope.into_iter().copied().collect();
        let Origin { kind, repository, session, sequence, .. } = origin;
        let header = encode_header(&Parts { kind, repository, session, sequence }, &envelopes);
        fd.write_all_at(&header, 0)?;
        let state = State { size: header.len() as u64, ..State::default() };
        Ok(Self { fd, header, number, key, state: Mutex::new(state) })
    }

    /// What records are encrypted with.
    pub fn sealer(&self) -> Sealer<'_> {
        self.key.as_ref().map(|key| (key, 0))
    }

    /// Size so far, and number of records.
    pub fn extent(&self) -> (u64, u32) {
        let state = self.lock();
        (state.size, state.records)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Append finished records, which are taken out; where each one will lie.
    pub fn append(&self, records: &mut Records) -> Result<Vec<Place>> {
        let (bytes, heads) = (records.bytes(), records.heads());
        let mut lines = Vec::with_capacity(heads.len() * TRAILER_ENTRY);
        let mut at = 0;
        for head in heads {
            let end = at + head.record_len() as usize;
            lines.extend_from_slice(&bytes[at..at + HEAD]);
            lines.extend_from_slice(&b3(&[&bytes[at + HEAD..end]]));
            at = end;
        }
        let (start, wait) = {
            let mut state = self.lock();
            let start = state.size;
            if state.finished
                || start + (bytes.len() + state.trailer.len() + lines.len() + FOOTER) as u64 > u64::from(u32::MAX)
            {
                return invalid("the pack is full or finished");
            }
            state.size += bytes.len() as u64;
            state.records += heads.len() as u32;
            state.trailer.extend_from_slice(&lines);
            (start, state.writing && state.waiting.len() < MAX_WAITING)
        };
        let mut offset = start as u32;
        let place = |head: &Head| {
            let place = Place { pack: self.number, offset, length: head.record_len() };
            offset += place.length;
            place
        };
        let places = heads.iter().map(place).collect();
        self.write(start, records, wait)?;
        records.clear();
        Ok(places)
    }

    /// Leave the records to the worker that is writing, or write them and all that is left to us meanwhile.
    fn write(&self, start: u64, records: &mut Records, wait: bool) -> Result<()> {
        if wait {
            let mut state = self.lock();
            if state.writing {
                let spare = state.spare.pop().unwrap_or_default();
                state.waiting.push_back((start, std::mem::replace(records, spare)));
                return Ok(());
            }
        }
        let first = !std::mem::replace(&mut self.lock().writing, true);
        let mut result = self.fd.write_all_at(records.bytes(), start);
        while first && result.is_ok() {
            let mut state = self.lock();
            let Some((start, mut next)) = state.waiting.pop_front() else {
                state.writing = false;
                break;
            };
            drop(state);
            result = self.fd.write_all_at(next.bytes(), start);
            next.clear();
            self.lock().spare.push(next);
        }
        result
    }

    /// Append a map page; the slot that refers to it.
    pub fn add_page(&self, ids: &Ids, level: u8, first: u64, slots: &[Slot], names: &Names) -> Result<Slot> {
        let (public, sealed) = page::encode(level, first, slots, names, self.number)?;
        let mut records = Records::default();
        let head = records.page(ids, self.sealer(), &public, &sealed)?;
        let places = self.append(&mut records)?;
        Ok(Slot::data(head.id, places[0]))
    }

    /// Write trailer and footer: (name, size).
    pub fn finish(&self) -> Result<(Id, u64)> {
        let mut state = self.lock();
        if std::mem::replace(&mut state.finished, true) || state.writing || !state.waiting.is_empty() {
            return invalid("the pack is finished already, or a write of it has failed");
        }
        state.spare = Vec::new();
        let footer = encode_footer(state.records, state.size);
        let name = name_of(&self.header, &state.trailer, &footer);
        let mut tail = std::mem::take(&mut state.trailer);
        tail.extend_from_slice(&footer);
        self.fd.write_all_at(&tail, state.size)?;
        state.size += tail.len() as u64;
        Ok((name, state.size))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;
    use proptest::prelude::*;
    use std::io::{Read, Seek, SeekFrom, Write as _};
    use std::os::fd::AsRawFd;

    fn write_pack(file: &std::fs::File, blocks: &[Vec<u8>]) -> Id {
        let origin = Origin { kind: 1, repository: [7; 16], session: [8; 16], sequence: 3, envelope: None };
        let writer = Writer::new(Fd::new(file.as_raw_fd()).expect("fd"), origin, None, 0).expect("begins");
        let ids = Ids::new([7; 16], [9; 32]);
        for block in blocks {
            let mut records = Records::default();
            records.block(&ids, None, Codec::Lz4, 1, &ids.block(block), block).expect("seals");
            writer.append(&mut records).expect("appends");
        }
        writer.finish().expect("finishes").0
    }

    proptest! {
        #[test]
        fn any_damage_is_found(blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..900), 1..8), at: prop::sample::Index, bit in 0u8..8, cut: bool) {
            let mut file = tempfile::tempfile().expect("file");
            let name = write_pack(&file, &blocks);
            let fd = Fd::new(file.as_raw_fd()).expect("fd");
            let report = check(fd, &name, &[7; 16], 1).expect("checks");
            prop_assert!(report.problem.is_none() && report.damaged.is_empty());
            prop_assert_eq!(report.records, blocks.len());

            let mut bytes = Vec::new();
            file.seek(SeekFrom::Start(0)).expect("seek");
            file.read_to_end(&mut bytes).expect("read");
            let position = at.index(bytes.len());
            if cut {
                file.set_len(position as u64).expect("cut");
            } else {
                file.seek(SeekFrom::Start(position as u64)).expect("seek");
                file.write_all(&[bytes[position] ^ (1 << bit)]).expect("write");
            }
            let report = check(fd, &name, &[7; 16], 1).expect("checks");
            prop_assert!(report.problem.is_some() || report.damaged.len() == 1);
        }

        #[test]
        fn garbage_is_refused(garbage in proptest::collection::vec(any::<u8>(), 0..2000)) {
            let mut file = tempfile::tempfile().expect("file");
            file.write_all(&garbage).expect("write");
            prop_assert!(read_frame(Fd::new(file.as_raw_fd()).expect("fd"), None, &[7; 16]).is_err());
            prop_assert!(decode_header(&garbage, &[7; 16]).is_err());
        }
    }
}
