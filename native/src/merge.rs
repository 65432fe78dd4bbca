//! Merging index segments into one: a streamed k-way merge.
//!
//! Invariant: the result has every entry of every segment whose page was whole and whose pack is
//! there, each key once; and it names every pack that any of them named, unless told to forget it,
//! so that a pack that was lost stays known of. Memory does not grow with the number of entries.

use std::cmp::Reverse;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Arc;

use crate::digest::Id;
use crate::error::{damaged, invalid, Result};
use crate::filter;
use crate::index::{decode_line, decode_page, encode_page, Key, Layout, Line, Segment, MAX_PACKS, PAGE, PER_PAGE};
use crate::io::Fd;
use crate::names::Names;

/// Pages that are read of a segment at a time.
const READ: usize = 64;
/// Pages that are written, or read back, at a time.
const WRITE: usize = 256;
/// Entries that a step merges, so long an interruption waits.
const STEP: usize = 1 << 20;
/// Pages that a step reads back.
const STEP_PAGES: u64 = (STEP / PER_PAGE) as u64;
/// Most segments that are merged at once: each takes 256 KiB.
pub const MAX_INPUTS: usize = 128;
/// Not in the result: its pack is gone.
const GONE: u32 = u32::MAX;

/// A segment that is being merged.
struct Cursor {
    segment: Arc<Segment>,
    /// Number in the result of each of its packs.
    numbers: Vec<u32>,
    buffer: Vec<u8>,
    /// The page that is read next, the page within the buffer, and the entry within that.
    next: u64,
    page: usize,
    entry: usize,
    last: Option<Key>,
    damaged: u64,
}

impl Cursor {
    /// The next entry; None at the end. Pages with a wrong checksum and entries that are out of
    /// order, or of no pack, are passed over and counted.
    fn next(&mut self) -> Result<Option<Line>> {
        loop {
            if self.page * PAGE >= self.buffer.len() {
                let left = self.segment.layout().pages - self.next;
                if left == 0 {
                    return Ok(None);
                }
                self.buffer.resize(left.min(READ as u64) as usize * PAGE, 0);
                self.segment.read_pages(self.next, &mut self.buffer)?;
                self.next += (self.buffer.len() / PAGE) as u64;
                (self.page, self.entry) = (0, 0);
            }
            let page = &self.buffer.as_chunks::<PAGE>().0[self.page];
            // The checksum once; the entries are taken as they are after that.
            let count = match self.entry {
                0 => match decode_page(page) {
                    Ok(entries) => entries.len(),
                    Err(_) => {
                        self.damaged += 1;
                        self.page += 1;
                        continue;
                    }
                },
                _ => usize::from(u16::from_le_bytes([page[8], page[9]])),
            };
            let at = 32 + self.entry * 32;
            let mut entry = [0; 32];
            entry.copy_from_slice(&page[at..at + 32]);
            self.entry += 1;
            if self.entry >= count {
                (self.page, self.entry) = (self.page + 1, 0);
            }
            let line = decode_line(&entry);
            let Some(&number) = self.numbers.get(line.1 as usize) else {
                self.damaged += 1;
                continue;
            };
            if self.last.is_some_and(|last| line.0 <= last) {
                self.damaged += 1;
                continue;
            }
            self.last = Some(line.0);
            return Ok(Some((line.0, number, line.2, line.3)));
        }
    }
}

/// What stands first in a segment. By key, then by segment; the rest goes along.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct First {
    key: (u128, u32),
    input: u32,
    line: Line,
}

fn first(line: Line, input: u32) -> First {
    let key = line.0;
    let mut high = [0; 16];
    high.copy_from_slice(&key[..16]);
    let low = u32::from_be_bytes([key[16], key[17], key[18], key[19]]);
    First { key: (u128::from_be_bytes(high), low), input, line }
}

enum Stage {
    Merging,
    /// The result is read back: for its filter and its name.
    Sealing {
        layout: Layout,
        next: u64,
        filter: Option<filter::Builder>,
        filter_end: u64,
        hasher: Box<blake3::Hasher>,
    },
    Done,
}

/// What a merge came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// B3("imager index v1" ‖ file).
    pub name: Id,
    /// Entries of the result.
    pub entries: u64,
    /// Packs that it names.
    pub packs: u64,
    /// Bytes of the result.
    pub size: u64,
    /// Entries left out because their pack is gone.
    pub dropped: u64,
    /// Pages, or entries, that made no sense.
    pub damaged: u64,
}

/// A merge under way. `step` it until it says that it is done.
pub struct Merger {
    out: OwnedFd,
    repository: [u8; 16],
    names: Vec<Id>,
    inputs: Vec<Cursor>,
    heap: BinaryHeap<Reverse<First>>,
    last: Option<Key>,
    page: Vec<Line>,
    buffer: Vec<u8>,
    written: u64,
    stage: Stage,
    outcome: Outcome,
}

impl Merger {
    /// Merge `segments`, each with the numbers of its packs in `names`, into the empty file `out`.
    /// Packs of `forget` are neither named in the result, nor their entries kept.
    pub fn new(
        segments: Vec<(Arc<Segment>, Vec<u32>)>, out: OwnedFd, repository: &[u8; 16], names: &Names,
        forget: &HashSet<Id>,
    ) -> Result<Self> {
        if segments.len() > MAX_INPUTS {
            return invalid(format!("{} segments are too many for one merge", segments.len()));
        }
        let mut list: Vec<Id> = Vec::new();
        let mut numbers: HashMap<u32, u32> = HashMap::new();
        let mut inputs = Vec::with_capacity(segments.len());
        for (segment, packs) in segments {
            let mut mine = Vec::with_capacity(packs.len());
            for pack in packs {
                let number = *numbers.entry(pack).or_insert_with(|| match names.name(pack) {
                    Some(name) if !forget.contains(&name) => {
                        list.push(name);
                        if names.is_present(pack) {
                            (list.len() - 1) as u32
                        } else {
                            GONE
                        }
                    }
                    _ => GONE,
                });
                mine.push(number);
            }
            let (buffer, last) = (Vec::new(), None);
            inputs.push(Cursor { segment, numbers: mine, buffer, next: 0, page: 0, entry: 0, last, damaged: 0 });
        }
        let most: u64 = inputs.iter().map(|input| input.segment.layout().entries).sum();
        if list.len() > MAX_PACKS || Layout::new(list.len(), most).size() > u64::from(u32::MAX) {
            return invalid("the merged segment would be larger than a segment can be");
        }
        let mut heap = BinaryHeap::with_capacity(inputs.len());
        for (number, input) in inputs.iter_mut().enumerate() {
            if let Some(line) = input.next()? {
                heap.push(Reverse(first(line, number as u32)));
            }
        }
        let written = Layout::new(list.len(), 0).pages_at;
        Ok(Self {
            out,
            repository: *repository,
            names: list,
            inputs,
            heap,
            last: None,
            page: Vec::with_capacity(PER_PAGE),
            buffer: Vec::with_capacity(WRITE * PAGE),
            written,
            stage: Stage::Merging,
            outcome: Outcome::default(),
        })
    }

    /// Go on for a while; how many bytes were read or written, 0 once all is done.
    pub fn step(&mut self) -> Result<u64> {
        match self.stage {
            Stage::Merging => self.merge(),
            Stage::Sealing { .. } => self.seal(),
            Stage::Done => Ok(0),
        }
    }

    /// What it came to, once `step` said 0.
    pub fn outcome(&self) -> Result<Outcome> {
        match self.stage {
            Stage::Done => Ok(self.outcome),
            _ => invalid("the merge is not done yet"),
        }
    }

    fn out(&self) -> Result<Fd> {
        Fd::new(self.out.as_raw_fd())
    }

    fn merge(&mut self) -> Result<u64> {
        for _ in 0..STEP {
            let Some(line) = self.take()? else {
                return self.end_merging();
            };
            if line.1 == GONE {
                self.outcome.dropped += 1;
            } else if self.last != Some(line.0) {
                self.last = Some(line.0);
                self.put(line)?;
            }
        }
        Ok((STEP * 32) as u64)
    }

    /// The smallest entry that is left.
    fn take(&mut self) -> Result<Option<Line>> {
        let Some(mut top) = self.heap.peek_mut() else {
            return Ok(None);
        };
        let (line, input) = (top.0.line, top.0.input);
        match self.inputs[input as usize].next()? {
            Some(next) => top.0 = first(next, input),
            None => {
                PeekMut::pop(top);
            }
        }
        Ok(Some(line))
    }

    fn put(&mut self, line: Line) -> Result<()> {
        self.page.push(line);
        self.outcome.entries += 1;
        if self.page.len() == PER_PAGE {
            self.flush_page()?;
        }
        Ok(())
    }

    fn flush_page(&mut self) -> Result<()> {
        encode_page(&self.page, &mut self.buffer);
        self.page.clear();
        if self.buffer.len() >= WRITE * PAGE {
            self.flush()?;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<()> {
        self.out()?.write_all_at(&self.buffer, self.written)?;
        self.written += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }

    fn end_merging(&mut self) -> Result<u64> {
        if !self.page.is_empty() {
            self.flush_page()?;
        }
        self.flush()?;
        self.outcome.damaged = self.inputs.iter().map(|input| input.damaged).sum();
        self.inputs.clear();
        let layout = Layout::new(self.names.len(), self.outcome.entries);
        if self.written != layout.filter_at {
            return invalid("a merge wrote another number of pages than it has entries for");
        }
        let head = layout.head(&self.repository, &self.names);
        self.out()?.write_all_at(&head, 0)?;
        let mut hasher = Box::new(blake3::Hasher::new());
        hasher.update(b"imager index v1").update(&head);
        (self.outcome.size, self.outcome.packs) = (layout.size(), layout.packs as u64);
        let filter = (layout.filter_size > 0).then(|| filter::Builder::new(layout.entries));
        self.stage = Stage::Sealing { layout, next: 0, filter, filter_end: layout.filter_at, hasher };
        Ok(head.len() as u64)
    }

    /// Read pages back; what is missing of the filter is appended to the file.
    fn seal(&mut self) -> Result<u64> {
        let out = self.out()?;
        let Stage::Sealing { layout, next, filter, filter_end, hasher } = &mut self.stage else {
            return invalid("the merge is not that far yet");
        };
        let end = layout.pages.min(*next + STEP_PAGES);
        let begun = *next;
        let mut pages = vec![0; WRITE * PAGE];
        while *next < end {
            let count = ((end - *next) as usize).min(WRITE);
            let pages = &mut pages[..count * PAGE];
            out.read_exact_at(pages, layout.pages_at + *next * PAGE as u64)?;
            hasher.update(pages);
            for page in pages.as_chunks::<PAGE>().0 {
                let Ok(entries) = decode_page(page) else {
                    return damaged("what was written just now reads back damaged");
                };
                if let Some(filter) = filter {
                    for entry in entries {
                        filter.push(&decode_line(entry).0, &mut self.buffer);
                    }
                }
            }
            *next += count as u64;
            out.write_all_at(&self.buffer, *filter_end)?;
            *filter_end += self.buffer.len() as u64;
            self.buffer.clear();
        }
        if *next < layout.pages {
            return Ok((end - begun) * PAGE as u64);
        }
        if let Some(filter) = filter.take() {
            filter.finish(&mut self.buffer);
            out.write_all_at(&self.buffer, *filter_end)?;
            self.buffer.clear();
        }
        let mut at = layout.filter_at;
        while at < layout.size() {
            let count = ((layout.size() - at) as usize).min(pages.len());
            out.read_exact_at(&mut pages[..count], at)?;
            hasher.update(&pages[..count]);
            at += count as u64;
        }
        self.outcome.name = hasher.finalize().into();
        self.stage = Stage::Done;
        Ok((end - begun).max(1) * PAGE as u64)
    }
}

#[cfg(test)]
mod tests;
