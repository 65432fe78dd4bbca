//! Which records to fetch, in the order of the packs.
//!
//! Invariant: after `sort` each record is there once, with all the blocks that it fills.

use std::ops::Range;

use crate::digest::Id;
use crate::error::{invalid, Result};
use crate::record::{HEAD, MAX_BLOCK, MAX_EXCESS};
use crate::slots::{Place, Slot, DATA};

/// No block's record is longer.
const MAX_RECORD: u64 = (HEAD + MAX_BLOCK + MAX_EXCESS) as u64;

/// A record and a block that it fills.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Want {
    /// Where the record lies.
    pub place: Place,
    /// Its id.
    pub id: Id,
    /// Number of the block.
    pub block: u64,
}

/// Records to fetch.
#[derive(Default)]
pub struct Gather {
    wants: Vec<Want>,
    /// Start of each record's wants, after `sort`.
    starts: Option<Vec<u32>>,
    stored: u64,
}

impl Gather {
    /// Add the data slots of consecutive blocks from `first` on.
    pub fn add(&mut self, first: u64, slots: &[Slot]) -> Result<()> {
        self.add_ranges(first, slots, &[(first, first + slots.len() as u64)])
    }

    /// Add the data slots whose numbers lie in `ranges` (ascending).
    pub fn add_ranges(&mut self, first: u64, slots: &[Slot], ranges: &[(u64, u64)]) -> Result<()> {
        if self.starts.is_some() || self.wants.len() + slots.len() > u32::MAX as usize {
            return invalid("records cannot be added any more");
        }
        let end = first + slots.len() as u64;
        for &(from, to) in ranges {
            for block in from.max(first)..to.min(end) {
                let slot = &slots[(block - first) as usize];
                if slot.kind == DATA {
                    self.wants.push(Want { place: slot.place, id: slot.id, block });
                }
            }
        }
        Ok(())
    }

    /// Bring the records into pack order.
    pub fn sort(&mut self) {
        self.wants.sort_unstable();
        let mut starts = Vec::new();
        for (at, want) in self.wants.iter().enumerate() {
            if at == 0 || (self.wants[at - 1].place, self.wants[at - 1].id) != (want.place, want.id) {
                starts.push(at as u32);
                self.stored += u64::from(want.place.length);
            }
        }
        self.starts = Some(starts);
    }

    /// Number of records; 0 before `sort`.
    pub fn len(&self) -> usize {
        self.starts.as_ref().map_or(0, Vec::len)
    }

    /// Whether there is nothing to fetch.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Number of blocks.
    pub fn blocks(&self) -> usize {
        self.wants.len()
    }

    /// Bytes of all records.
    pub fn stored(&self) -> u64 {
        self.stored
    }

    /// The blocks that record `index` fills; all have its place and id.
    pub fn wants(&self, index: usize) -> &[Want] {
        let Some(starts) = &self.starts else { return &[] };
        let Some(&start) = starts.get(index) else { return &[] };
        let end = starts.get(index + 1).map_or(self.wants.len(), |&end| end as usize);
        &self.wants[start as usize..end]
    }

    /// End of a slice of records from `start` that fills at most `max` blocks (at least one record).
    pub fn slice_end(&self, start: usize, max: usize) -> usize {
        let mut end = start;
        let mut blocks = 0;
        while end < self.len() {
            blocks += self.wants(end).len();
            if blocks > max && end > start {
                break;
            }
            end += 1;
        }
        end
    }

    /// Where the records in `range` lie, neighbours joined over gaps of at most `gap` bytes:
    /// (pack, start, end). Where more than a quarter of what lies between a pack's first and last
    /// of them is wanted, it is all of that. Places of an impossible length are left out.
    pub fn spans(&self, range: Range<usize>, gap: u64) -> Vec<(u32, u64, u64)> {
        let mut out: Vec<(u32, u64, u64)> = Vec::new();
        let mut first = 0; // of the present pack, in `out`
        let mut wanted = 0;
        let settle = |out: &mut Vec<(u32, u64, u64)>, first: usize, wanted: u64| {
            let Some(&(pack, start, _)) = out.get(first) else { return };
            let end = out[first..].iter().map(|span| span.2).max().unwrap_or(start);
            if wanted.saturating_mul(4) > end - start {
                out.truncate(first);
                out.push((pack, start, end));
            }
        };
        for place in range.filter_map(|at| self.wants(at).first()).map(|want| want.place) {
            let (start, end) = (u64::from(place.offset), u64::from(place.offset) + u64::from(place.length));
            if end - start > MAX_RECORD {
                continue;
            }
            match out.last_mut() {
                Some(last) if last.0 == place.pack && start <= last.2.saturating_add(gap) => last.2 = last.2.max(end),
                last => {
                    if last.is_some_and(|last| last.0 != place.pack) {
                        settle(&mut out, first, wanted);
                        (first, wanted) = (out.len(), 0);
                    }
                    out.push((place.pack, start, end));
                }
            }
            wanted += end - start;
        }
        settle(&mut out, first, wanted);
        out
    }

    /// Packs of the records in `range`, each once.
    pub fn packs(&self, range: Range<usize>) -> Vec<u32> {
        let mut out: Vec<u32> = range.filter_map(|at| self.wants(at).first()).map(|want| want.place.pack).collect();
        out.dedup();
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gather(places: &[(u32, u32, u32)]) -> Gather {
        let mut gather = Gather::default();
        for (block, &(pack, offset, length)) in places.iter().enumerate() {
            let slot = Slot { kind: DATA, id: [block as u8; 32], place: Place { pack, offset, length } };
            gather.add(block as u64, &[slot]).expect("adds");
        }
        gather.sort();
        gather
    }

    #[test]
    fn spans_join_neighbours_and_take_what_is_mostly_wanted() {
        let far = 100 << 20;
        let found = gather(&[
            (0, 100, 50),
            (0, 150, 50),
            (0, 1000, 10), // near: one span
            (1, 0, 10),
            (1, far, 10), // far apart, and little of it: two
            (2, 0, 4 << 20),
            (2, 6 << 20, 4 << 20), // a gap of 2 MiB, but most of it wanted: one
            (3, 5, 4_000_000_000), // a hostile length: none
        ]);
        let spans = found.spans(0..found.len(), 1 << 20);
        let far = u64::from(far);
        assert_eq!(spans, [(0, 100, 1010), (1, 0, 10), (1, far, far + 10), (2, 0, 10 << 20)]);
    }
}
