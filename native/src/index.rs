//! Index segments: sorted block ids and where they lie (repository-format.md, section 7).
//!
//! Invariant: an index page is believed only after its checksum; a segment is read page by page
//! where it lies, so memory does not grow with it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::Arc;

use crate::bytes::Reader;
use crate::digest::{xxh3, Id};
use crate::error::{damaged, invalid, Result};
use crate::filter::{self, Answer, Filter, Room};
use crate::io::Fd;
use crate::slots::Place;

/// Bytes of an id that an index keeps.
pub const KEY: usize = 20;
/// Those bytes.
pub type Key = [u8; KEY];
/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Most packs that a segment names.
pub const MAX_PACKS: usize = 1 << 20;

const MAGIC: &[u8; 8] = b"IMGRINDX";
const HEADER: usize = 72;
const PAGE_HEAD: usize = 32;
const ENTRY: usize = 32;
/// Entries of a full page.
pub const PER_PAGE: usize = (PAGE - PAGE_HEAD) / ENTRY;
/// Segments of one page have no filter: reading it costs as much as reading the page.
const UNFILTERED: u64 = PER_PAGE as u64;

/// The part of an id that an index keeps.
pub fn key_of(id: &Id) -> Key {
    let mut key = [0; KEY];
    key.copy_from_slice(&id[..KEY]);
    key
}

/// An entry: key, number of the pack within the segment, offset and length of the record.
pub type Line = (Key, u32, u32, u32);

/// Where the parts of a segment lie, in bytes from its begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Number of packs.
    pub packs: usize,
    /// Number of entries.
    pub entries: u64,
    /// The first page.
    pub pages_at: u64,
    /// Number of pages.
    pub pages: u64,
    /// The filter, behind the pages.
    pub filter_at: u64,
    /// Its length; 0: there is none.
    pub filter_size: u64,
}

impl Layout {
    /// That of a segment of so many packs and entries, as it is written.
    pub fn new(packs: usize, entries: u64) -> Self {
        let pages_at = (PAGE + (packs * 32 + 8).next_multiple_of(PAGE)) as u64;
        let pages = entries.div_ceil(PER_PAGE as u64);
        let filter_size = if entries > UNFILTERED { filter::size(entries) } else { 0 };
        Self { packs, entries, pages_at, pages, filter_at: pages_at + pages * PAGE as u64, filter_size }
    }

    /// Bytes of the whole segment.
    pub fn size(&self) -> u64 {
        self.filter_at + self.filter_size
    }

    /// The header page and the list of names that follows it.
    pub fn head(&self, repository: &[u8; 16], names: &[Id]) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.pages_at as usize);
        out.extend_from_slice(MAGIC);
        out.extend_from_slice(&1u16.to_le_bytes());
        out.extend_from_slice(&[0; 2]);
        out.extend_from_slice(&(names.len() as u32).to_le_bytes());
        out.extend_from_slice(&self.entries.to_le_bytes());
        out.extend_from_slice(&self.pages_at.to_le_bytes());
        out.extend_from_slice(repository);
        let filter_at = if self.filter_size > 0 { self.filter_at } else { 0 };
        out.extend_from_slice(&filter_at.to_le_bytes());
        out.extend_from_slice(&self.filter_size.to_le_bytes());
        let check = xxh3(&out);
        out.extend_from_slice(&check.to_le_bytes());
        out.resize(PAGE, 0);
        for name in names {
            out.extend_from_slice(name);
        }
        let check = xxh3(&out[PAGE..]);
        out.extend_from_slice(&check.to_le_bytes());
        out.resize(self.pages_at as usize, 0);
        out
    }
}

/// Append a page of at most `PER_PAGE` entries.
pub fn encode_page(lines: &[Line], out: &mut Vec<u8>) {
    let at = out.len();
    out.extend_from_slice(&[0; 8]);
    out.extend_from_slice(&(lines.len() as u16).to_le_bytes());
    out.extend_from_slice(&[0; PAGE_HEAD - 10]);
    for (key, pack, offset, length) in lines {
        out.extend_from_slice(key);
        out.extend_from_slice(&pack.to_le_bytes());
        out.extend_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(&length.to_le_bytes());
    }
    out.resize(at + PAGE, 0);
    let check = xxh3(&out[at + 8..]);
    out[at..at + 8].copy_from_slice(&check.to_le_bytes());
}

/// The entries of a page, if its checksum is right.
pub fn decode_page(page: &[u8; PAGE]) -> Result<&[[u8; ENTRY]]> {
    let mut r = Reader::new(page, "index page");
    let (check, count) = (r.u64()?, usize::from(r.u16()?));
    if check != xxh3(&page[8..]) || count == 0 || count > PER_PAGE {
        return damaged("index page is damaged");
    }
    Ok(&page[PAGE_HEAD..].as_chunks::<ENTRY>().0[..count])
}

/// An entry out of its bytes.
pub fn decode_line(entry: &[u8; ENTRY]) -> Line {
    let word = |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
    let mut key = [0; KEY];
    key.copy_from_slice(&entry[..KEY]);
    (key, word(KEY), word(KEY + 4), word(KEY + 8))
}

/// A segment to search in.
#[derive(Debug)]
pub struct Segment {
    file: OwnedFd,
    layout: Layout,
    filter: Option<Filter>,
    /// How many of its pages turned out to be damaged on the way.
    damaged: AtomicUsize,
}

impl Segment {
    /// Open a segment, check its header and its list of packs; the names of its packs. `room`: for its filter.
    pub fn open(file: OwnedFd, repository: &[u8; 16], room: &Arc<Room>) -> Result<(Self, Vec<Id>)> {
        let fd = Fd::new(file.as_raw_fd())?;
        let mut header = [0; HEADER];
        fd.read_exact_at(&mut header, 0)?;
        let mut r = Reader::new(&header, "index segment");
        if r.take(8)? != MAGIC {
            return damaged("not an index segment");
        }
        let (version, _, count) = (r.u16()?, r.u16()?, r.u32()? as usize);
        let (entries, pages_at) = (r.u64()?, r.u64()?);
        if version != 1 {
            return damaged(format!("index segment of version {version}"));
        }
        if r.array::<16>()? != *repository {
            return damaged("index segment belongs to another repository");
        }
        let (filter_at, filter_size) = (r.u64()?, r.u64()?);
        if r.u64()? != xxh3(&header[..HEADER - 8]) {
            return damaged("index segment's header is damaged");
        }
        let size = fd.size()?;
        if size > u64::from(u32::MAX) || count > MAX_PACKS || entries > size / ENTRY as u64 {
            return damaged("index segment is cut off, or longer than any");
        }
        let mut layout = Layout::new(count, entries);
        let filtered = filter_size > 0 && filter_at == layout.filter_at && filter_size == filter::size(entries);
        if !filtered {
            layout.filter_size = 0;
        }
        if pages_at != layout.pages_at || layout.size() != size || (!filtered && (filter_at, filter_size) != (0, 0)) {
            return damaged("index segment is cut off, or longer than it says");
        }
        let mut list = vec![0; count * 32 + 8];
        fd.read_exact_at(&mut list, PAGE as u64)?;
        let (list, check) = list.split_at(count * 32);
        if check != xxh3(list).to_le_bytes() {
            return damaged("index segment's list of packs is damaged");
        }
        let packs = list.as_chunks::<32>().0.to_vec();
        let filter = filtered.then(|| Filter::new(layout.filter_at, entries, room));
        Ok((Self { file, layout, filter, damaged: AtomicUsize::new(0) }, packs))
    }

    /// Number of its entries and packs, and where they lie.
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// How many pages turned out to be damaged on the way.
    pub fn damaged(&self) -> usize {
        self.damaged.load(Ordering::Relaxed) + self.filter.as_ref().map_or(0, Filter::damaged)
    }

    /// Read pages from `first` on until `buffer` is full.
    pub fn read_pages(&self, first: u64, buffer: &mut [u8]) -> Result<()> {
        Fd::new(self.file.as_raw_fd())?.read_exact_at(buffer, self.layout.pages_at + first * PAGE as u64)
    }

    /// Where `key` lies: (number of the pack, offset, length). The filter denies it, or tells the
    /// page, by and large. Without one the page is guessed by interpolation, as keys are evenly
    /// distributed.
    pub fn find(&self, key: &Key) -> Option<(u32, u32, u32)> {
        let pages = self.layout.pages;
        let guess = || ((u128::from(filter::position(key)) * u128::from(pages)) >> 64) as u64;
        let Some(filter) = &self.filter else {
            return self.search(key, guess());
        };
        match filter.look(Fd::new(self.file.as_raw_fd()).ok()?, key) {
            Answer::Absent => None,
            Answer::Near(entry) => self.search(key, entry / PER_PAGE as u64),
            Answer::Unusable => self.search(key, guess()),
        }
    }

    /// Search from page `guess` on.
    fn search(&self, key: &Key, mut guess: u64) -> Option<(u32, u32, u32)> {
        let (mut low, mut high) = (0, self.layout.pages);
        let mut buffer = [0; PAGE];
        let mut steps = 0u32;
        while low < high {
            let at = guess.clamp(low, high - 1);
            let read = self.read_pages(at, &mut buffer);
            let Ok(entries) = read.and_then(|()| decode_page(&buffer)) else {
                self.damaged.fetch_add(1, Ordering::Relaxed);
                return None;
            };
            let (first, last) = (&entries[0][..KEY], &entries[entries.len() - 1][..KEY]);
            if &key[..] < first {
                high = at;
            } else if &key[..] > last {
                low = at + 1;
            } else {
                let found = entries.binary_search_by(|entry| entry[..KEY].cmp(&key[..])).ok()?;
                let (_, pack, offset, length) = decode_line(&entries[found]);
                return ((pack as usize) < self.layout.packs).then_some((pack, offset, length));
            }
            steps += 1;
            // Neighbours first, as the guess is close; then halve, which bounds the work.
            guess = if steps < 4 {
                if high == at {
                    at.saturating_sub(1)
                } else {
                    at + 1
                }
            } else {
                low + (high.max(low) - low) / 2
            };
        }
        None
    }
}

/// Build a segment in memory; `entries` are sorted, each key once.
pub fn build(repository: &[u8; 16], packs: &[Id], entries: &[Line]) -> Vec<u8> {
    let layout = Layout::new(packs.len(), entries.len() as u64);
    let mut out = layout.head(repository, packs);
    out.reserve_exact((layout.size() - layout.pages_at) as usize);
    for page in entries.chunks(PER_PAGE) {
        encode_page(page, &mut out);
    }
    if layout.filter_size > 0 {
        let mut builder = filter::Builder::new(layout.entries);
        for (key, ..) in entries {
            builder.push(key, &mut out);
        }
        builder.finish(&mut out);
    }
    out
}

/// Sort entries and build a segment; places name packs by their number in `names`.
pub fn build_from(
    repository: &[u8; 16], mut entries: Vec<(Key, Place)>, name: impl Fn(u32) -> Option<Id>,
) -> Result<Vec<u8>> {
    entries.sort_unstable();
    entries.dedup_by_key(|(key, _)| *key);
    let mut numbers: Vec<u32> = entries.iter().map(|(_, place)| place.pack).collect();
    numbers.sort_unstable();
    numbers.dedup();
    let mut packs = Vec::with_capacity(numbers.len());
    for &number in &numbers {
        match name(number) {
            Some(name) => packs.push(name),
            None => return invalid("a pack of the index has no name yet"),
        }
    }
    let lines: Vec<Line> = entries
        .into_iter()
        .map(|(key, place)| {
            (key, numbers.binary_search(&place.pack).unwrap_or_default() as u32, place.offset, place.length)
        })
        .collect();
    Ok(build(repository, &packs, &lines))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write as _;

    fn open(bytes: &[u8]) -> Result<Segment> {
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(bytes).expect("write");
        Ok(Segment::open(file.into(), &[7; 16], &Room::new(1 << 20))?.0)
    }

    fn sample(count: u32) -> Vec<(Key, Place)> {
        (0..count)
            .map(|n| {
                (key_of(blake3::hash(&n.to_le_bytes()).as_bytes()), Place { pack: n % 3, offset: n, length: n + 1 })
            })
            .collect()
    }

    #[test]
    fn everything_is_found_and_nothing_else() {
        for count in [0, 1, 126, 127, 128, 254, 255, 10_000] {
            let entries = sample(count);
            let bytes = build_from(&[7; 16], entries.clone(), |n| Some([n as u8; 32])).expect("builds");
            let segment = open(&bytes).expect("opens");
            for (key, place) in &entries {
                assert_eq!(segment.find(key), Some((place.pack, place.offset, place.length)), "of {count}");
            }
            for n in 0..1000u32 {
                assert_eq!(segment.find(&key_of(blake3::hash(format!("no {n}").as_bytes()).as_bytes())), None);
            }
        }
    }

    #[test]
    fn clustered_keys_are_found_too() {
        let entries: Vec<(Key, Place)> = (0..5000u32)
            .map(|n| {
                let mut key = [0xFE; KEY];
                key[16..].copy_from_slice(&n.to_be_bytes());
                (key, Place { pack: 0, offset: n, length: 1 })
            })
            .collect();
        let bytes = build_from(&[7; 16], entries.clone(), |_| Some([1; 32])).expect("builds");
        let segment = open(&bytes).expect("opens");
        assert!(entries.iter().all(|(key, place)| segment.find(key) == Some((0, place.offset, 1))));
    }

    #[test]
    fn a_hit_costs_one_page_and_a_miss_none() {
        let entries = sample(200_000);
        let bytes = build_from(&[7; 16], entries.clone(), |n| Some([n as u8; 32])).expect("builds");
        let segment = open(&bytes).expect("opens");
        let filter = segment.filter.as_ref().expect("has a filter");
        let fd = Fd::new(segment.file.as_raw_fd()).expect("fd");
        let mut sorted: Vec<Key> = entries.iter().map(|(key, _)| *key).collect();
        sorted.sort_unstable();
        let other_page = |(at, key): &(usize, &Key)| match filter.look(fd, key) {
            Answer::Near(entry) => entry / PER_PAGE as u64 != (at / PER_PAGE) as u64,
            answer => panic!("{answer:?}"),
        };
        let missed = sorted.iter().enumerate().filter(other_page).count();
        assert!(missed < sorted.len() / 12, "{missed} of {} guesses name another page", sorted.len());
    }

    #[test]
    fn without_its_filter_a_segment_is_searched_all_the_same() {
        let entries = sample(20_000);
        let bytes = build_from(&[7; 16], entries.clone(), |n| Some([n as u8; 32])).expect("builds");
        let layout = Layout::new(3, entries.len() as u64);
        let mut bare = bytes[..layout.filter_at as usize].to_vec();
        bare[48..64].fill(0);
        let check = xxh3(&bare[..64]);
        bare[64..72].copy_from_slice(&check.to_le_bytes());
        let mut harmed = bytes;
        for page in harmed[layout.filter_at as usize..].chunks_mut(PAGE) {
            page[100] ^= 4;
        }
        for bytes in [bare, harmed] {
            let segment = open(&bytes).expect("opens");
            for (key, place) in &entries {
                assert_eq!(segment.find(key), Some((place.pack, place.offset, place.length)));
            }
            assert_eq!(segment.find(&[9; KEY]), None);
            assert_eq!(segment.damaged() as u64, if segment.filter.is_some() { layout.filter_size / 4096 } else { 0 });
        }
    }

    #[test]
    fn hostile_lengths_are_refused() {
        let bytes = build_from(&[7; 16], sample(500), |n| Some([n as u8; 32])).expect("builds");
        let (count, entries, filter_at, filter_size) = (12..16, 16..24, 48..56, 56..64);
        let huge = [u64::MAX, u64::MAX / 2, 1 << 40, u64::from(u32::MAX), 1 << 20, 1];
        for field in [count, entries, filter_at, filter_size] {
            for value in huge {
                let mut bytes = bytes.clone();
                bytes[field.clone()].copy_from_slice(&value.to_le_bytes()[..field.len()]);
                let check = xxh3(&bytes[..64]);
                bytes[64..72].copy_from_slice(&check.to_le_bytes());
                assert!(open(&bytes).is_err(), "{value} at {field:?}");
            }
        }
    }

    proptest! {
        #[test]
        fn damage_is_a_miss_or_an_error(at: prop::sample::Index, bit in 0u8..8) {
            let entries = sample(600);
            let mut bytes = build_from(&[7; 16], entries.clone(), |n| Some([n as u8; 32])).expect("builds");
            let position = at.index(bytes.len());
            bytes[position] ^= 1 << bit;
            if let Ok(segment) = open(&bytes) {
                for (key, place) in &entries {
                    if let Some(found) = segment.find(key) {
                        prop_assert_eq!(found, (place.pack, place.offset, place.length));
                    }
                }
            }
        }

        #[test]
        fn garbage_is_refused(garbage in proptest::collection::vec(any::<u8>(), 0..9000)) {
            prop_assert!(open(&garbage).is_err());
        }
    }
}
