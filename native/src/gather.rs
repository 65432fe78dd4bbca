//! Which records to fetch, in the order of the packs.
//!
//! Invariant: after `sort` each record is there once, with all the blocks that it fills.

use std::ops::Range;

use crate::digest::Id;
use crate::error::{invalid, Result};
use crate::slots::{Place, Slot, DATA};

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

    /// Packs of the records in `range`, each once.
    pub fn packs(&self, range: Range<usize>) -> Vec<u32> {
        let mut out: Vec<u32> = range.filter_map(|at| self.wants(at).first()).map(|want| want.place.pack).collect();
        out.dedup();
        out
    }
}
