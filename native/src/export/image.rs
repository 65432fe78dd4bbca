//! One image, read at any place.
//!
//! Invariant: a byte that is given out belongs to a block whose id was checked, or to a run that the
//! block map says reads as zeroes. What cannot be had intact is an error for its own range alone.

use std::cell::RefCell;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::{Arc, Mutex, PoisonError};

use crate::crypto::SessionKey;
use crate::error::{invalid, Error, Result};
use crate::fetch::{block_length, read_one};
use crate::io::Fd;
use crate::record::{Ids, MAX_BLOCK};
use crate::slots::{Slot, DATA, UNREADABLE};

use super::cache::Cache;

/// Blocks of one page of the map.
pub const LEAF: u64 = 256;
/// Bytes of slots that are kept, of all leaves together.
const LEAVES: usize = 24 << 20;

thread_local! {
    /// Room for a record, kept: clearing it for each read would take a tenth of the time.
    static RECORD: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// A pack that can be read; closed when nobody reads it any longer.
pub struct Pack {
    /// Its descriptor.
    pub fd: OwnedFd,
    /// Its session keys, by envelope number.
    pub keys: Vec<Option<SessionKey>>,
}

/// What the core has to ask for. May be asked by several threads at once.
pub trait Supply: Send + Sync {
    /// The slots of the blocks from `LEAF * index` on.
    fn leaf(&self, index: u64) -> Result<Vec<Slot>>;
    /// A pack by its number.
    fn pack(&self, number: u32) -> Result<Pack>;
    /// The content of a block whose record is not whole where its slot says, and why it was not.
    fn elsewhere(&self, block: u64, slot: &Slot, reason: &str) -> Result<Vec<u8>>;
    /// What changed since the base set: byte ranges, sorted and apart. Asked once, if there is a base.
    fn changed(&self) -> Result<Ranges>;
}

/// An image with its caches.
pub struct Image {
    ids: Arc<Ids>,
    supply: Box<dyn Supply>,
    /// Bytes of the image.
    pub size: u64,
    /// Bytes of a block.
    pub block_size: usize,
    /// Whether there is a base set, so that it can be told what changed.
    pub based: bool,
    changed: Mutex<Option<Arc<Ranges>>>,
    leaves: Cache<u64, Vec<Slot>>,
    packs: Cache<u32, Pack>,
    blocks: Cache<u64, Vec<u8>>,
}

/// Byte ranges [start, end), sorted and apart.
pub type Ranges = Vec<(u64, u64)>;

/// How a range of bytes is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Content is stored, or could not be read.
    Data,
    /// Reads as zeroes; nothing is stored.
    Zero,
}

impl Image {
    /// An image of `size` bytes; `room`: bytes of contents that are kept; `packs`: how many are open at a time.
    pub fn new(
        ids: Arc<Ids>, supply: Box<dyn Supply>, size: u64, block_size: usize, room: usize, packs: usize, based: bool,
    ) -> Result<Self> {
        if !block_size.is_power_of_two() || !(512..=MAX_BLOCK).contains(&block_size) {
            return invalid(format!("a block size of {block_size} bytes"));
        }
        Ok(Self {
            ids,
            supply,
            size,
            block_size,
            based,
            changed: Mutex::new(None),
            leaves: Cache::new(LEAVES),
            packs: Cache::new(packs),
            blocks: Cache::new(room),
        })
    }

    fn slot(&self, block: u64) -> Result<Slot> {
        let leaf = self.leaf(block / LEAF)?;
        match leaf.get((block % LEAF) as usize) {
            Some(slot) => Ok(*slot),
            None => invalid(format!("block {block} lies beyond the image")),
        }
    }

    fn leaf(&self, index: u64) -> Result<Arc<Vec<Slot>>> {
        if let Some(kept) = self.leaves.get(index) {
            return Ok(kept);
        }
        let slots = self.supply.leaf(index)?;
        let cost = slots.len() * size_of::<Slot>();
        Ok(self.leaves.put(index, slots, cost))
    }

    fn pack(&self, number: u32) -> Result<Arc<Pack>> {
        match self.packs.get(number) {
            Some(kept) => Ok(kept),
            None => Ok(self.packs.put(number, self.supply.pack(number)?, 1)),
        }
    }

    /// The bytes `[offset, offset + out.len())`, which lie within one block.
    fn read_within(&self, offset: u64, out: &mut [u8]) -> Result<()> {
        let block = offset / self.block_size as u64;
        let skip = (offset % self.block_size as u64) as usize;
        let slot = self.slot(block)?;
        match slot.kind {
            DATA => {
                let content = self.block(block, &slot)?;
                match content.get(skip..skip + out.len()) {
                    Some(part) => out.copy_from_slice(part),
                    None => return invalid("a read beyond a block"),
                }
            }
            UNREADABLE => {
                let error = std::io::Error::other("the backup could not read it");
                return Err(Error::Read { offset, error });
            }
            _ => out.fill(0),
        }
        Ok(())
    }

    fn block(&self, block: u64, slot: &Slot) -> Result<Arc<Vec<u8>>> {
        if let Some(kept) = self.blocks.get(block) {
            return Ok(kept);
        }
        let content = match self.content(block, slot) {
            Ok(content) => content,
            Err(error) => {
                // The pack may have been replaced under its name, or gone.
                self.packs.remove(slot.place.pack);
                let found = self.supply.elsewhere(block, slot, &error.to_string())?;
                if self.ids.block(&found) != slot.id {
                    return Err(Error::Damaged(format!("block {block} is not the one that its map names")));
                }
                found
            }
        };
        let cost = content.len();
        Ok(self.blocks.put(block, content, cost))
    }

    fn content(&self, block: u64, slot: &Slot) -> Result<Vec<u8>> {
        let pack = self.pack(slot.place.pack)?;
        let fd = Fd::new(pack.fd.as_raw_fd())?;
        let mut content = vec![0; block_length(block, self.size, self.block_size)?];
        RECORD.with_borrow_mut(|room| read_one(&self.ids, fd, &pack.keys, &slot.id, slot.place, room, &mut content))?;
        Ok(content)
    }

    /// Read `[offset, offset + out.len())`: the ranges `(start, end, why)` of `out` that cannot be had.
    pub fn read(&self, offset: u64, out: &mut [u8]) -> Vec<(usize, usize, String)> {
        let mut lost: Vec<(usize, usize, String)> = Vec::new();
        let mut at = 0;
        while at < out.len() {
            let position = offset + at as u64;
            let left = self.block_size - (position % self.block_size as u64) as usize;
            let end = out.len().min(at + left);
            if let Err(error) = self.read_within(position, &mut out[at..end]) {
                out[at..end].fill(0);
                lost.push((at, end, error.to_string()));
            }
            at = end;
        }
        lost
    }

    /// Have the block at `offset` ready, if it is not.
    pub fn prepare(&self, offset: u64) {
        let block = offset / self.block_size as u64;
        if let Ok(slot) = self.slot(block) {
            if slot.kind == DATA {
                // What is wrong with it is told to whoever reads it.
                let _ = self.block(block, &slot);
            }
        }
    }

    /// How `[start, end)` is allocated: (length, kind), at most `most` runs, neighbours different.
    pub fn allocation(&self, start: u64, end: u64, most: usize) -> Result<Vec<(u64, Kind)>> {
        let mut runs: Vec<(u64, Kind)> = Vec::new();
        let mut at = start;
        while at < end {
            let block = at / self.block_size as u64;
            let kind = match self.slot(block)?.kind {
                DATA | UNREADABLE => Kind::Data,
                _ => Kind::Zero,
            };
            let next = end.min((block + 1) * self.block_size as u64);
            match runs.last_mut() {
                Some(last) if last.1 == kind => last.0 += next - at,
                _ => {
                    if runs.len() == most {
                        break;
                    }
                    runs.push((next - at, kind));
                }
            }
            at = next;
        }
        Ok(runs)
    }

    /// What of `[start, end)` changed since the base set: (length, changed), at most `most` runs.
    pub fn changes(&self, start: u64, end: u64, most: usize) -> Result<Vec<(u64, bool)>> {
        let ranges = {
            let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
            match &*changed {
                Some(known) => known.clone(),
                None => changed.insert(Arc::new(self.supply.changed()?)).clone(),
            }
        };
        let mut runs = Vec::new();
        let mut at = start;
        let mut index = ranges.partition_point(|range| range.1 <= start);
        while at < end && runs.len() < most {
            let next = match ranges.get(index) {
                Some(&(from, to)) if from <= at => {
                    index += 1;
                    (to.min(end), true)
                }
                Some(&(from, _)) => (from.min(end), false),
                None => (end, false),
            };
            runs.push((next.0 - at, next.1));
            at = next.0;
        }
        Ok(runs)
    }
}
