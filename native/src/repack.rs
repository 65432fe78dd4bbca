//! Packs put together out of others' records, without any key (repository-format.md, section 5).
//!
//! Invariant: a record is copied only if its payload has the digest that its pack's trailer gives it, so
//! damage does not spread.

use std::collections::HashMap;
use std::ops::Range;

use crate::digest::{b3, Id};
use crate::error::{damaged, invalid, Error, Result};
use crate::io::Fd;
use crate::pack::{self, Entry, Frame, Parts, ENVELOPE, MAX_ENVELOPES};
use crate::record::{Head, Kind, HEAD, NO_KEY};

/// Records read at once at most; gaps up to this are read along.
const RUN: u64 = 1 << 20;
const GAP: u64 = 16 << 10;

/// A pack to copy records from: its descriptor and name, and the offsets of the records.
pub struct From<'a> {
    /// The pack.
    pub fd: Fd,
    /// Its name.
    pub name: &'a Id,
    /// Where the wanted records begin, in order.
    pub offsets: &'a [u32],
}

/// A pack that was put together out of others.
#[derive(Debug, Default)]
pub struct Merged {
    /// Name and size; None where no record could be copied.
    pub pack: Option<(Id, u64)>,
    /// (kind, id, offset, length) of each record in it.
    pub records: Vec<(u8, Id, u32, u32)>,
    /// Damaged records, left out: number of the pack they are in, offset.
    pub damaged: Vec<(usize, u32)>,
    /// Bytes read.
    pub read: u64,
}

/// Writes a pack from its begin to its end.
struct Writer {
    fd: Fd,
    header: Vec<u8>,
    buffer: Vec<u8>,
    written: u64,
    trailer: Vec<u8>,
    records: u32,
}

impl Writer {
    fn new(fd: Fd, header: Vec<u8>) -> Self {
        Self { fd, buffer: header.clone(), header, written: 0, trailer: Vec::new(), records: 0 }
    }

    fn size(&self) -> u64 {
        self.written + self.buffer.len() as u64
    }

    fn flush(&mut self) -> Result<()> {
        self.fd.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    /// Append a record; where it begins.
    fn append(&mut self, head: &Head, payload: &[u8], digest: &Id) -> Result<u32> {
        let offset = self.size();
        let more = (HEAD + payload.len() + self.trailer.len()) as u64;
        if offset + more + pack::TAIL_ROOM > u64::from(u32::MAX) || self.records as usize >= pack::MAX_RECORDS {
            return invalid("more records than a pack can hold");
        }
        let encoded = head.encode();
        self.trailer.extend_from_slice(&encoded);
        self.trailer.extend_from_slice(digest);
        self.records += 1;
        self.buffer.extend_from_slice(&encoded);
        self.buffer.extend_from_slice(payload);
        if self.buffer.len() as u64 >= RUN {
            self.flush()?;
        }
        Ok(offset as u32)
    }

    /// Write what is left: name and size; None, and nothing more, where there is no record.
    fn finish(mut self) -> Result<Option<(Id, u64)>> {
        if self.records == 0 {
            return Ok(None);
        }
        let footer = pack::encode_footer(self.records, self.size());
        let name = pack::name_of(&self.header, &self.trailer, &footer);
        let trailer = std::mem::take(&mut self.trailer);
        self.buffer.extend_from_slice(&trailer);
        self.buffer.extend_from_slice(&footer);
        self.flush()?;
        Ok(Some((name, self.written)))
    }
}

/// Put a new pack together out of records of others, as they are: no key takes part.
pub fn merge(out: Fd, origin: Parts, sources: &[From]) -> Result<Merged> {
    let mut merged = Merged::default();
    let mut frames: Vec<(Frame, Vec<usize>, HashMap<u16, u16>)> = Vec::with_capacity(sources.len());
    let mut envelopes: Vec<[u8; ENVELOPE]> = Vec::new();
    for source in sources {
        let frame = pack::read_frame(source.fd, Some(source.name), &origin.repository)?;
        if frame.header.kind != origin.kind {
            return damaged("it is a pack of another kind");
        }
        merged.read += frame.bytes();
        let mut wanted = Vec::with_capacity(source.offsets.len());
        let mut keys: HashMap<u16, u16> = HashMap::new();
        for &offset in source.offsets {
            let Ok(at) = frame.entries.binary_search_by_key(&u64::from(offset), |entry| entry.offset) else {
                return damaged(format!("no record begins at {offset}"));
            };
            wanted.push(at);
            let key = frame.entries[at].head.key;
            if key == NO_KEY || keys.contains_key(&key) {
                continue;
            }
            let Some(envelope) = frame.header.envelopes.get(usize::from(key)) else {
                return damaged("a record names a session key that its pack does not have");
            };
            let number = envelopes.iter().position(|known| known == envelope).unwrap_or_else(|| {
                envelopes.push(*envelope);
                envelopes.len() - 1
            });
            keys.insert(key, number as u16);
        }
        frames.push((frame, wanted, keys));
    }
    if envelopes.len() > MAX_ENVELOPES {
        return invalid("records of too many sessions for one pack");
    }
    let mut writer = Writer::new(out, pack::encode_header(&origin, &envelopes));
    let mut buffer = Vec::new();
    for (number, (source, (frame, wanted, keys))) in sources.iter().zip(&frames).enumerate() {
        let mut at = 0;
        while at < wanted.len() {
            let run = run_of(&frame.entries, &wanted[at..]);
            at += copy_run(source.fd, frame, &wanted[at..], run, &mut buffer, keys, &mut writer, number, &mut merged)?;
        }
    }
    merged.pack = writer.finish()?;
    Ok(merged)
}

/// Bytes of the records that are read at once: neighbours, and what lies in small gaps between.
fn run_of(entries: &[Entry], wanted: &[usize]) -> Range<u64> {
    let end_of = |entry: &Entry| entry.offset + u64::from(entry.head.record_len());
    let start = entries[wanted[0]].offset;
    let mut end = end_of(&entries[wanted[0]]);
    for &next in &wanted[1..] {
        let next = &entries[next];
        if next.offset > end + GAP.min((end - start) / 16) || end_of(next) - start > RUN {
            break;
        }
        end = end_of(next);
    }
    start..end
}

#[allow(clippy::too_many_arguments)]
fn copy_run(
    fd: Fd, frame: &Frame, wanted: &[usize], run: Range<u64>, buffer: &mut Vec<u8>, keys: &HashMap<u16, u16>,
    writer: &mut Writer, number: usize, merged: &mut Merged,
) -> Result<usize> {
    buffer.resize((run.end - run.start) as usize, 0);
    let readable = match fd.read_exact_at(buffer, run.start) {
        Ok(()) => true,
        Err(Error::Read { .. }) => false, // A bad spot: each record of the run is tried alone.
        Err(error) => return Err(error),
    };
    merged.read += buffer.len() as u64;
    let inside = wanted.iter().take_while(|&&at| frame.entries[at].offset < run.end).count();
    let mut alone = Vec::new();
    for entry in wanted[..inside].iter().map(|&at| &frame.entries[at]) {
        let length = entry.head.record_len() as usize;
        let from = (entry.offset - run.start) as usize;
        let payload = if readable {
            &buffer[from + HEAD..from + length]
        } else {
            alone.resize(length, 0);
            if fd.read_exact_at(&mut alone, entry.offset).is_err() {
                merged.damaged.push((number, entry.offset as u32));
                continue;
            }
            &alone[HEAD..]
        };
        if b3(&[payload]) != entry.digest {
            merged.damaged.push((number, entry.offset as u32));
            continue;
        }
        let mut head = entry.head;
        head.key = keys.get(&head.key).copied().unwrap_or(NO_KEY);
        let kind = if head.kind == Kind::Page { 2 } else { 1 };
        let offset = writer.append(&head, payload, &entry.digest)?;
        merged.records.push((kind, head.id, offset, head.record_len()));
    }
    Ok(inside)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::codec::Codec;
    use crate::pack::{Origin, Writer as PackWriter};
    use crate::record::{Ids, Records};
    use proptest::prelude::*;
    use std::fs::File;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::FileExt;

    const REPOSITORY: [u8; 16] = [7; 16];

    fn fd(file: &File) -> Fd {
        Fd::new(file.as_raw_fd()).expect("fd")
    }

    /// A pack of these blocks; its name, and where each record begins.
    fn pack_of(blocks: &[Vec<u8>], sequence: u64) -> (File, Id, Vec<u32>) {
        let file = tempfile::tempfile().expect("file");
        let origin = Origin { kind: 1, repository: REPOSITORY, session: [8; 16], sequence, envelope: None };
        let writer = PackWriter::new(fd(&file), origin, None, 0).expect("begins");
        let ids = Ids::new(REPOSITORY, [9; 32]);
        let mut offsets = Vec::new();
        for block in blocks {
            let mut records = Records::default();
            records.block(&ids, None, Codec::Lz4, 1, &ids.block(block), block).expect("seals");
            offsets.push(writer.append(&mut records).expect("appends")[0].offset);
        }
        let name = writer.finish().expect("finishes").0;
        (file, name, offsets)
    }

    fn parts() -> Parts {
        Parts { kind: 1, repository: REPOSITORY, session: [3; 16], sequence: 0 }
    }

    fn blocks() -> impl Strategy<Value = Vec<Vec<u8>>> {
        proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..3000), 1..12)
    }

    proptest! {
        #[test]
        fn records_come_out_as_they_went_in(a in blocks(), b in blocks(), keep in proptest::collection::vec(any::<bool>(), 24)) {
            let packs = [pack_of(&a, 0), pack_of(&b, 1)];
            let mut keep = keep.into_iter();
            let wanted: Vec<Vec<u32>> = packs.iter().map(|(_, _, offsets)| {
                offsets.iter().copied().filter(|_| keep.next().unwrap_or(true)).collect()
            }).collect();
            let sources: Vec<From> = packs.iter().zip(&wanted)
                .map(|((file, name, _), offsets)| From { fd: fd(file), name, offsets }).collect();
            let out = tempfile::tempfile().expect("file");
            let merged = merge(fd(&out), parts(), &sources).expect("merges");
            prop_assert_eq!(merged.records.len(), wanted.iter().map(Vec::len).sum::<usize>());
            prop_assert!(merged.damaged.is_empty());
            let Some((name, size)) = merged.pack else {
                prop_assert!(merged.records.is_empty() && out.metadata().expect("size").len() == 0);
                return Ok(());
            };
            prop_assert_eq!(size, out.metadata().expect("size").len());
            let report = pack::check(fd(&out), &name, &REPOSITORY, 1).expect("checks");
            prop_assert!(report.problem.is_none() && report.damaged.is_empty());
            let frame = pack::read_frame(fd(&out), Some(&name), &REPOSITORY).expect("reads");
            let mut at = 0;
            for ((file, name, _), offsets) in packs.iter().zip(&wanted) {
                let before = pack::read_frame(fd(file), Some(name), &REPOSITORY).expect("reads");
                for entry in before.entries.iter().filter(|entry| offsets.contains(&(entry.offset as u32))) {
                    let after = &frame.entries[at];
                    prop_assert_eq!(after.head, entry.head);
                    prop_assert_eq!(after.digest, entry.digest);
                    prop_assert_eq!(merged.records[at].2, after.offset as u32);
                    at += 1;
                }
            }
        }

        #[test]
        fn damage_is_left_out_and_told(a in blocks(), at: prop::sample::Index, bit in 0u8..8) {
            let (file, name, offsets) = pack_of(&a, 0);
            let frame = pack::read_frame(fd(&file), Some(&name), &REPOSITORY).expect("reads");
            let end = frame.entries.last().map_or(0, |e| e.offset + u64::from(e.head.record_len()));
            let start = u64::from(offsets[0]);
            let position = start + at.index((end - start) as usize) as u64;
            let mut byte = [0];
            file.read_exact_at(&mut byte, position).expect("read");
            file.write_all_at(&[byte[0] ^ 1 << bit], position).expect("write");
            let hit = frame.entries.iter().rposition(|e| e.offset <= position).expect("inside");
            let in_head = position < frame.entries[hit].offset + HEAD as u64;
            let out = tempfile::tempfile().expect("file");
            let sources = [From { fd: fd(&file), name: &name, offsets: &offsets }];
            let merged = merge(fd(&out), parts(), &sources).expect("merges");
            // A head is taken from the trailer, which the name vouches for: damage to it heals.
            let hurt: Vec<(usize, u32)> = if in_head { vec![] } else { vec![(0, offsets[hit])] };
            prop_assert_eq!(&merged.damaged, &hurt);
            prop_assert_eq!(merged.records.len() + hurt.len(), offsets.len());
        }
    }

    #[test]
    fn reading_stays_near_what_is_wanted() {
        let blocks: Vec<Vec<u8>> =
            (0..200u32).map(|n| blake3::Hasher::new().update(&n.to_le_bytes()).finalize_xof().bytes(32_000)).collect();
        let (file, name, offsets) = pack_of(&blocks, 0);
        let wanted: Vec<u32> = offsets.iter().copied().step_by(2).collect();
        let out = tempfile::tempfile().expect("file");
        let merged =
            merge(fd(&out), parts(), &[From { fd: fd(&file), name: &name, offsets: &wanted }]).expect("merges");
        let live: u64 = merged.records.iter().map(|record| u64::from(record.3)).sum();
        assert!(merged.read < live + live / 50, "{} read for {live}", merged.read);
    }

    trait Bytes {
        fn bytes(self, count: usize) -> Vec<u8>;
    }

    impl Bytes for blake3::OutputReader {
        fn bytes(mut self, count: usize) -> Vec<u8> {
            let mut out = vec![0; count];
            self.fill(&mut out);
            out
        }
    }

    #[test]
    fn a_source_that_is_no_such_pack_is_refused() {
        let (file, name, offsets) = pack_of(&[vec![1; 100]], 0);
        let out = tempfile::tempfile().expect("file");
        let wrong = [0; 32];
        for (name, offsets, repository) in
            [(&wrong, &offsets[..], REPOSITORY), (&name, &[5][..], REPOSITORY), (&name, &offsets[..], [1; 16])]
        {
            let parts = Parts { repository, ..parts() };
            assert!(merge(fd(&out), parts, &[From { fd: fd(&file), name, offsets }]).is_err());
        }
        let parts = Parts { kind: 2, ..parts() };
        assert!(merge(fd(&out), parts, &[From { fd: fd(&file), name: &name, offsets: &offsets }]).is_err());
    }
}
