//! Filters of index segments: which keys are surely not there, and about where the others
//! stand (repository-format.md, section 7).
//!
//! Invariant: a filter never denies a key that it was built of. A page of it counts only once
//! its checksum was right; a damaged one says nothing, and the segment is searched without it.
//!
//! A filter is a row of lines of one cache line each, and a key's line follows from its first
//! bytes. So a builder that meets keys in order fills one line after the other, in no memory;
//! and a look-up reads 64 bytes where they lie, or in memory once there were many look-ups and
//! as long as there is room.

use std::sync::atomic::{AtomicU64, AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

use crate::digest::xxh3;
use crate::error::Result;
use crate::index::{Key, PAGE};
use crate::io::Fd;

/// Entries for each line: ten bits for each.
const PER_LINE: u64 = 48;
const LINE: usize = 64;
const RANK: usize = 4;
const BITS: u64 = ((LINE - RANK) * 8) as u64;
const PROBES: u32 = 6;
/// A page has this many lines, after a head of the size of one.
const LINES: u64 = (PAGE / LINE - 1) as u64;

fn lines(entries: u64) -> u64 {
    entries.div_ceil(PER_LINE)
}

/// Bytes of the filter of a segment that has `entries` entries.
pub fn size(entries: u64) -> u64 {
    lines(entries).div_ceil(LINES) * PAGE as u64
}

/// The first bytes of a key as a number. Keys are hashes, so these are evenly distributed.
pub fn position(key: &Key) -> u64 {
    u64::from_be_bytes([key[0], key[1], key[2], key[3], key[4], key[5], key[6], key[7]])
}

/// A key's line, and how far into the line's share of all keys it stands (in 2^-64).
fn line_of(key: &Key, lines: u64) -> (u64, u64) {
    let product = u128::from(position(key)) * u128::from(lines);
    ((product >> 64) as u64, product as u64)
}

/// The bits of a line that stand for a key.
fn bits_of(key: &Key) -> impl Iterator<Item = usize> {
    let first = u32::from_le_bytes([key[8], key[9], key[10], key[11]]);
    let step = u32::from_le_bytes([key[12], key[13], key[14], key[15]]) | 1;
    (0..PROBES).map(move |n| ((u64::from(first.wrapping_add(step.wrapping_mul(n))) * BITS) >> 32) as usize)
}

fn bits_set(line: &[u8; LINE], key: &Key) -> bool {
    bits_of(key).all(|bit| line[RANK + bit / 8] & (1 << (bit % 8)) != 0)
}

/// Makes a filter out of keys that come in order.
pub struct Builder {
    lines: u64,
    begun: u64,
    entries: u32,
    page: Box<[u8; PAGE]>,
}

impl Builder {
    /// A filter for exactly `entries` keys.
    pub fn new(entries: u64) -> Self {
        Self { lines: lines(entries), begun: 0, entries: 0, page: Box::new([0; PAGE]) }
    }

    fn line(&mut self, number: u64) -> &mut [u8] {
        let at = (number % LINES + 1) as usize * LINE;
        &mut self.page[at..at + LINE]
    }

    fn emit(&mut self, out: &mut Vec<u8>) {
        let check = xxh3(&self.page[8..]);
        self.page[..8].copy_from_slice(&check.to_le_bytes());
        out.extend_from_slice(&self.page[..]);
        self.page.fill(0);
    }

    /// Begin every line before `end` that was not begun yet.
    fn begin(&mut self, end: u64, out: &mut Vec<u8>) {
        while self.begun < end {
            if self.begun > 0 && self.begun.is_multiple_of(LINES) {
                self.emit(out);
            }
            let (number, rank) = (self.begun, self.entries);
            self.line(number)[..RANK].copy_from_slice(&rank.to_le_bytes());
            self.begun += 1;
        }
    }

    /// Add a key, not smaller than the one before. Pages that are finished are appended to `out`.
    pub fn push(&mut self, key: &Key, out: &mut Vec<u8>) {
        let (number, _) = line_of(key, self.lines);
        self.begin(number + 1, out);
        let line = self.line(number);
        for bit in bits_of(key) {
            line[RANK + bit / 8] |= 1 << (bit % 8);
        }
        self.entries += 1;
    }

    /// Append what is left to `out`.
    pub fn finish(mut self, out: &mut Vec<u8>) {
        self.begin(self.lines, out);
        if self.begun > 0 {
            self.emit(out);
        }
    }
}

/// What a filter says about a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// It is not in the segment.
    Absent,
    /// It may be, at about this entry.
    Near(u64),
    /// The page of the filter that tells is damaged.
    Unusable,
}

const UNSEEN: u8 = 0;
const WHOLE: u8 = 1;
const DAMAGED: u8 = 2;

/// How much memory filters may still take, for all segments that are searched together.
#[derive(Debug)]
pub struct Room(AtomicUsize);

impl Room {
    /// Room for so many bytes.
    pub fn new(bytes: usize) -> Arc<Self> {
        Arc::new(Self(AtomicUsize::new(bytes)))
    }

    fn take(self: &Arc<Self>, bytes: usize) -> Option<Taken> {
        let less = |left: usize| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less).ok()?;
        Some(Taken { room: self.clone(), bytes })
    }
}

/// Room that was taken; it is given back on drop.
#[derive(Debug)]
struct Taken {
    room: Arc<Room>,
    bytes: usize,
}

impl Drop for Taken {
    fn drop(&mut self) {
        self.room.0.fetch_add(self.bytes, Ordering::Relaxed);
    }
}

/// A segment's filter.
#[derive(Debug)]
pub struct Filter {
    at: u64,
    lines: u64,
    /// Of each page, whether its checksum was right: it is computed once.
    pages: Box<[AtomicU8]>,
    room: Arc<Room>,
    looks: AtomicU64,
    /// All of it, once it was worth it; None if there was no room.
    held: OnceLock<Option<(Vec<u8>, Taken)>>,
}

impl Filter {
    /// The filter at byte `at` of a segment with `entries` entries; its bytes are `size(entries)`.
    pub fn new(at: u64, entries: u64, room: &Arc<Room>) -> Self {
        let pages = (size(entries) / PAGE as u64) as usize;
        Self {
            at,
            lines: lines(entries),
            pages: (0..pages).map(|_| AtomicU8::new(UNSEEN)).collect(),
            room: room.clone(),
            looks: AtomicU64::new(0),
            held: OnceLock::new(),
        }
    }

    /// How many of its pages turned out to be damaged.
    pub fn damaged(&self) -> usize {
        self.pages.iter().filter(|state| state.load(Ordering::Relaxed) == DAMAGED).count()
    }

    /// What is known of `key`. `fd` is the segment.
    pub fn look(&self, fd: Fd, key: &Key) -> Answer {
        let (number, within) = line_of(key, self.lines);
        let page = (number / LINES) as usize;
        let in_page = (number % LINES + 1) as usize * LINE;
        let mut line = [0; LINE];
        // Reading all of it pays after a look-up for each page; so small filters take the room first.
        if self.looks.fetch_add(1, Ordering::Relaxed) == self.pages.len() as u64 {
            self.held.get_or_init(|| self.hold(fd));
        }
        let known = match self.held.get() {
            Some(Some((bytes, _))) if self.is_whole(page) => {
                line.copy_from_slice(&bytes[page * PAGE + in_page..][..LINE]);
                true
            }
            Some(Some(_)) => false,
            _ => self.read(fd, page, in_page, &mut line),
        };
        if !known {
            Answer::Unusable
        } else if bits_set(&line, key) {
            let rank = u64::from(u32::from_le_bytes([line[0], line[1], line[2], line[3]]));
            Answer::Near(rank + (((within >> 32) * PER_LINE) >> 32))
        } else {
            Answer::Absent
        }
    }

    fn is_whole(&self, page: usize) -> bool {
        self.pages.get(page).is_some_and(|state| state.load(Ordering::Relaxed) == WHOLE)
    }

    /// Read a line where it lies; false where it cannot be had.
    fn read(&self, fd: Fd, page: usize, in_page: usize, line: &mut [u8; LINE]) -> bool {
        let Some(state) = self.pages.get(page) else {
            return false;
        };
        let page_at = self.at + (page * PAGE) as u64;
        match state.load(Ordering::Relaxed) {
            WHOLE => fd.read_exact_at(line, page_at + in_page as u64).is_ok(),
            DAMAGED => false,
            _ => match whole_page(fd, page_at) {
                Ok(Some(page)) => {
                    state.store(WHOLE, Ordering::Relaxed);
                    line.copy_from_slice(&page[in_page..in_page + LINE]);
                    true
                }
                _ => {
                    state.store(DAMAGED, Ordering::Relaxed);
                    false
                }
            },
        }
    }

    /// Read all of it into memory, if there is room.
    fn hold(&self, fd: Fd) -> Option<(Vec<u8>, Taken)> {
        let taken = self.room.take(self.pages.len() * PAGE)?;
        let mut bytes = vec![0; self.pages.len() * PAGE];
        fd.read_exact_at(&mut bytes, self.at).ok()?;
        for (page, state) in bytes.as_chunks::<PAGE>().0.iter().zip(&self.pages) {
            let whole = page[..8] == xxh3(&page[8..]).to_le_bytes();
            state.store(if whole { WHOLE } else { DAMAGED }, Ordering::Relaxed);
        }
        Some((bytes, taken))
    }
}

/// A page of a filter; None where its checksum is wrong.
fn whole_page(fd: Fd, at: u64) -> Result<Option<[u8; PAGE]>> {
    let mut page = [0; PAGE];
    fd.read_exact_at(&mut page, at)?;
    let whole = page[..8] == xxh3(&page[8..]).to_le_bytes();
    Ok(whole.then_some(page))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::key_of;
    use std::io::Write as _;
    use std::os::fd::AsRawFd as _;

    fn keys(count: u32) -> Vec<Key> {
        let mut keys: Vec<Key> = (0..count).map(|n| key_of(blake3::hash(&n.to_le_bytes()).as_bytes())).collect();
        keys.sort_unstable();
        keys
    }

    fn built(keys: &[Key]) -> Vec<u8> {
        let mut out = Vec::new();
        let mut builder = Builder::new(keys.len() as u64);
        for key in keys {
            builder.push(key, &mut out);
        }
        builder.finish(&mut out);
        assert_eq!(out.len() as u64, size(keys.len() as u64));
        out
    }

    #[test]
    fn no_key_is_denied_and_the_guess_is_close() {
        for count in [1, 2, 48, 49, 3024, 3025, 100_000] {
            let keys = keys(count);
            let mut file = tempfile::tempfile().expect("file");
            file.write_all(&built(&keys)).expect("write");
            let (fd, filter) =
                (Fd::new(file.as_raw_fd()).expect("fd"), Filter::new(0, u64::from(count), &Room::new(0)));
            let mut far = 0;
            for (at, key) in keys.iter().enumerate() {
                match filter.look(fd, key) {
                    Answer::Near(entry) => far += usize::from(entry.abs_diff(at as u64) > 24),
                    other => panic!("{other:?} for entry {at} of {count}"),
                }
            }
            // A single line does not tell where in it a key stands unless it is full.
            assert!(count < 48 || far * 100 <= keys.len(), "{far} guesses of {count} were not close");
        }
    }

    #[test]
    fn most_others_are_denied() {
        let keys = keys(100_000);
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&built(&keys)).expect("write");
        let (fd, filter) = (Fd::new(file.as_raw_fd()).expect("fd"), Filter::new(0, keys.len() as u64, &Room::new(0)));
        let strangers = 100_000u32;
        let passed = (0..strangers)
            .filter(|n| {
                let key = key_of(blake3::hash(format!("no {n}").as_bytes()).as_bytes());
                filter.look(fd, &key) != Answer::Absent
            })
            .count();
        assert!(passed < strangers as usize * 15 / 1000, "{passed} of {strangers} passed");
        assert_eq!(filter.damaged(), 0);
    }

    #[test]
    fn many_look_ups_bring_it_into_memory_while_there_is_room() {
        let keys = keys(10_000);
        let mut bytes = built(&keys);
        let pages = bytes.len() / PAGE;
        bytes[PAGE + 70] ^= 1;
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&bytes).expect("write");
        let fd = Fd::new(file.as_raw_fd()).expect("fd");
        let room = Room::new(bytes.len() + 100);
        let filters = [(); 2].map(|()| Filter::new(0, keys.len() as u64, &room));
        let expected: Vec<Answer> = keys.iter().map(|key| filters[0].look(fd, key)).collect();
        for filter in &filters {
            assert!(keys.iter().map(|key| filter.look(fd, key)).eq(expected.iter().copied()));
            assert_eq!((filter.damaged(), filter.pages.len()), (1, pages));
        }
        assert!(matches!(filters[0].held.get(), Some(Some(_))) && matches!(filters[1].held.get(), Some(None)));
        assert_eq!(room.0.load(Ordering::Relaxed), 100);
        drop(filters);
        assert_eq!(room.0.load(Ordering::Relaxed), bytes.len() + 100);
    }

    #[test]
    fn a_damaged_page_says_nothing() {
        let keys = keys(10_000);
        let mut bytes = built(&keys);
        bytes[PAGE + 70] ^= 1;
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&bytes[..2 * PAGE]).expect("write");
        let (fd, filter) = (Fd::new(file.as_raw_fd()).expect("fd"), Filter::new(0, keys.len() as u64, &Room::new(0)));
        assert!(matches!(filter.look(fd, &keys[0]), Answer::Near(_)));
        assert_eq!(filter.look(fd, &keys[5000]), Answer::Unusable, "its page is damaged");
        assert_eq!(filter.look(fd, &keys[9999]), Answer::Unusable, "its page is cut off");
        assert_eq!(filter.damaged(), 2);
    }
}
