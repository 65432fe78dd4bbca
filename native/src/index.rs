//! Index segments: sorted block ids and where they lie (repository-format.md, section 7).
//!
//! Invariant: an index page is believed only after its checksum; a segment is read page by page
//! where it lies, so memory does not grow with it.

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::bytes::Reader;
use crate::digest::{xxh3, Id};
use crate::error::{damaged, invalid, Result};
use crate::io::Fd;
use crate::slots::Place;

/// Bytes of an id that an index keeps.
pub const KEY: usize = 20;
/// Those bytes.
pub type Key = [u8; KEY];

const MAGIC: &[u8; 8] = b"IMGRINDX";
const PAGE: usize = 4096;
const PAGE_HEAD: usize = 32;
const ENTRY: usize = 32;
const PER_PAGE: usize = (PAGE - PAGE_HEAD) / ENTRY;

/// The part of an id that an index keeps.
pub fn key_of(id: &Id) -> Key {
    let mut key = [0; KEY];
    key.copy_from_slice(&id[..KEY]);
    key
}

/// Write a segment. `entries` are (key, number within `packs`, offset, length), sorted by key.
pub fn build(repository: &[u8; 16], packs: &[Id], entries: &[(Key, u32, u32, u32)]) -> Vec<u8> {
    let names = (packs.len() * 32 + 8).next_multiple_of(PAGE);
    let pages_at = PAGE + names;
    let mut out = Vec::with_capacity(pages_at + entries.len().div_ceil(PER_PAGE) * PAGE);
    out.extend_from_slice(MAGIC);
    out.extend_from_slice(&1u16.to_le_bytes());
    out.extend_from_slice(&[0; 2]);
    out.extend_from_slice(&(packs.len() as u32).to_le_bytes());
    out.extend_from_slice(&(entries.len() as u64).to_le_bytes());
    out.extend_from_slice(&(pages_at as u64).to_le_bytes());
    out.extend_from_slice(repository);
    out.extend_from_slice(&[0; 16]);
    let check = xxh3(&out);
    out.extend_from_slice(&check.to_le_bytes());
    out.resize(PAGE, 0);
    for name in packs {
        out.extend_from_slice(name);
    }
    let check = xxh3(&out[PAGE..]);
    out.extend_from_slice(&check.to_le_bytes());
    out.resize(pages_at, 0);
    for page in entries.chunks(PER_PAGE) {
        let at = out.len();
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&(page.len() as u16).to_le_bytes());
        out.extend_from_slice(&[0; PAGE_HEAD - 10]);
        for (key, pack, offset, length) in page {
            out.extend_from_slice(key);
            out.extend_from_slice(&pack.to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            out.extend_from_slice(&length.to_le_bytes());
        }
        out.resize(at + PAGE, 0);
        let check = xxh3(&out[at + 8..]);
        out[at..at + 8].copy_from_slice(&check.to_le_bytes());
    }
    out
}

/// A segment to search in.
#[derive(Debug)]
pub struct Segment {
    file: OwnedFd,
    /// Names of its packs.
    pub packs: Vec<Id>,
    /// How many entries it has.
    pub entries: u64,
    pages_at: u64,
    pages: u64,
    /// How many of its pages turned out to be damaged on the way.
    pub damaged: AtomicUsize,
}

impl Segment {
    /// Open a segment and check its header and its list of packs.
    pub fn open(file: OwnedFd, repository: &[u8; 16]) -> Result<Self> {
        let fd = Fd::new(file.as_raw_fd())?;
        let mut header = [0; 72];
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
        r.take(16)?;
        if r.u64()? != xxh3(&header[..64]) {
            return damaged("index segment's header is damaged");
        }
        let pages = entries.div_ceil(PER_PAGE as u64);
        let names = (count * 32 + 8).next_multiple_of(PAGE);
        let size = fd.size()?;
        if size > u64::from(u32::MAX)
            || pages_at != (PAGE + names) as u64
            || pages.checked_mul(PAGE as u64).and_then(|n| n.checked_add(pages_at)) != Some(size)
        {
            return damaged("index segment is cut off, or longer than it says");
        }
        let mut list = vec![0; count * 32 + 8];
        fd.read_exact_at(&mut list, PAGE as u64)?;
        let (list, check) = list.split_at(count * 32);
        if check != xxh3(list).to_le_bytes() {
            return damaged("index segment's list of packs is damaged");
        }
        let packs = list.as_chunks::<32>().0.to_vec();
        Ok(Self { file, packs, entries, pages_at, pages, damaged: AtomicUsize::new(0) })
    }

    fn page<'a>(&self, number: u64, buffer: &'a mut [u8; PAGE]) -> Result<&'a [[u8; ENTRY]]> {
        let fd = Fd::new(self.file.as_raw_fd())?;
        fd.read_exact_at(buffer, self.pages_at + number * PAGE as u64)?;
        let mut r = Reader::new(buffer, "index page");
        let (check, count) = (r.u64()?, usize::from(r.u16()?));
        if check != xxh3(&buffer[8..]) || count == 0 || count > PER_PAGE {
            return damaged("index page is damaged");
        }
        Ok(&buffer[PAGE_HEAD..].as_chunks::<ENTRY>().0[..count])
    }

    /// Where `key` lies: (number within `packs`, offset, length). Ids are evenly
    /// distributed, so the page is guessed by interpolation and met within a step or two.
    pub fn find(&self, key: &Key) -> Option<(u32, u32, u32)> {
        let (mut low, mut high) = (0, self.pages);
        let mut buffer = [0; PAGE];
        let position = u64::from_be_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]]);
        let mut guess = ((u128::from(position) * u128::from(self.pages)) >> 64) as u64;
        let mut steps = 0u32;
        while low < high {
            let at = guess.clamp(low, high - 1);
            let entries = match self.page(at, &mut buffer) {
                Ok(entries) => entries,
                Err(_) => {
                    self.damaged.fetch_add(1, Ordering::Relaxed);
                    return None;
                }
            };
            let (first, last) = (&entries[0][..KEY], &entries[entries.len() - 1][..KEY]);
            if &key[..] < first {
                high = at;
            } else if &key[..] > last {
                low = at + 1;
            } else {
                let found = entries.binary_search_by(|entry| entry[..KEY].cmp(&key[..])).ok()?;
                let mut r = Reader::new(&entries[found][KEY..], "index entry");
                let (pack, offset, length) = (r.u32().ok()?, r.u32().ok()?, r.u32().ok()?);
                return ((pack as usize) < self.packs.len()).then_some((pack, offset, length));
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
    let lines: Vec<(Key, u32, u32, u32)> = entries
        .iter()
        .map(|(key, place)| {
            (*key, numbers.binary_search(&place.pack).unwrap_or_default() as u32, place.offset, place.length)
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
        Segment::open(file.into(), &[7; 16])
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
