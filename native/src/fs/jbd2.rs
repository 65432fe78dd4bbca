//! The journal of ext3 and ext4, replayed in memory.
//!
//! Sources: the kernel's fs/jbd2/recovery.c (`do_one_pass`, `scan_revoke_records`), fs/jbd2/journal.c
//! (`journal_tag_bytes`, `jbd2_journal_get_max_txn_bufs`), include/linux/jbd2.h, and fs/ext4/super.c
//! (`ext4_load_journal`, `ext4_get_journal_inode`).
//!
//! Invariant: what is read through `Replayed` is what the device holds once the kernel has mounted it:
//! the last committed copy of every block that is not revoked, for all others the block in place. Whatever
//! the kernel would stumble over, or decides by more than the blocks themselves (checksums of version 1,
//! asynchronous and fast commits, journals elsewhere), is a `Doubt`.

use std::collections::{BTreeMap, HashMap};

use super::disk::{Disk, ReadAt, View};
use super::ext_inode::{self, Inode};
use super::ext_layout::Layout;
use super::sums::crc32c;
use super::{doubt, Sure};

const MAGIC: u32 = 0xC03B_3998;
const DESCRIPTOR: u32 = 1;
const COMMIT: u32 = 2;
const SUPER_V2: u32 = 4;
const REVOKE: u32 = 5;

const INCOMPAT_REVOKE: u32 = 0x1;
const INCOMPAT_64BIT: u32 = 0x2;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
const INCOMPAT_FAST_COMMIT: u32 = 0x20;

const ESCAPED: u16 = 1;
const SAME_UUID: u16 = 2;
const LAST_TAG: u16 = 8;

/// Blocks of a log that is looked at: four times what mkfs makes at most.
const MOST: u64 = 1 << 20;
/// Revocations in it.
const MOST_REVOKED: usize = 1 << 20;

/// Where the committed copy of a block stands.
#[derive(Clone, Copy)]
struct Copied {
    sequence: u32,
    place: u64,
    escaped: bool,
    /// The checksum, and which bits of it are kept; none where there are no checksums.
    sum: Option<(u32, u32)>,
}

/// Blocks of the filesystem, by number, that a replay writes.
pub struct Replay {
    blocks: BTreeMap<u64, Copied>,
}

impl Replay {
    /// How many blocks.
    pub fn count(&self) -> usize {
        self.blocks.len()
    }
}

/// What the device holds after a replay.
pub struct Replayed<'a, R> {
    disk: &'a Disk<R>,
    block_size: u64,
    replay: Replay,
}

impl<'a, R: ReadAt> Replayed<'a, R> {
    /// The same partition, with its journal replayed.
    pub fn over(disk: &'a Disk<R>, layout: &Layout, replay: Replay) -> Disk<Self> {
        disk.with(Self { disk, block_size: layout.block_size, replay })
    }
}

impl<R: ReadAt> ReadAt for Replayed<'_, R> {
    fn read_at_least(&self, buffer: &mut [u8], offset: u64, enough: usize) -> crate::error::Result<usize> {
        let got = self.disk.source().read_at_least(buffer, offset, enough)?;
        let (base, size) = (self.disk.start(), self.block_size);
        let end = (offset + got as u64).saturating_sub(base);
        let first = offset.saturating_sub(base) / size;
        for (&block, copy) in self.replay.blocks.range(first..end.div_ceil(size)) {
            let content = match content(self.disk, copy, size) {
                Ok(content) => content,
                Err(doubt) => return crate::error::invalid(doubt.0),
            };
            // Both counted from the device's first byte.
            let (start, stop) = (base + block * size, base + (block + 1) * size);
            let (low, high) = (start.max(offset), stop.min(offset + got as u64));
            if low < high {
                let part = &content[(low - start) as usize..(high - start) as usize];
                buffer[(low - offset) as usize..(high - offset) as usize].copy_from_slice(part);
            }
        }
        Ok(got)
    }
}

fn content<R: ReadAt>(disk: &Disk<R>, copy: &Copied, size: u64) -> Sure<Vec<u8>> {
    let mut content = disk.read(copy.place, size as usize)?.bytes().to_vec();
    if copy.escaped {
        content[..4].copy_from_slice(&MAGIC.to_be_bytes());
    }
    Ok(content)
}

/// How the log's own structures are checked, and how wide its records are.
struct Format {
    /// Seed of checksums, where there are any.
    seed: Option<u32>,
    third: bool,
    wide: bool,
}

impl Format {
    /// Bytes of the tag of one block.
    fn tag(&self) -> usize {
        match (self.third, self.wide) {
            (true, _) => 16,
            (false, wide) => 8 + if self.seed.is_some() { 2 } else { 0 } + if wide { 4 } else { 0 },
        }
    }

    /// Bytes at the end of descriptors and revocations.
    fn tail(&self) -> usize {
        if self.seed.is_some() {
            4
        } else {
            0
        }
    }

    /// Whether the checksum at `at`, made with zeroes in its place, holds.
    fn holds(&self, raw: &[u8], at: usize) -> Sure<bool> {
        let Some(seed) = self.seed else { return Ok(true) };
        let rest = raw.len().saturating_sub(at + 4);
        let view = View(raw);
        let sum = crc32c(crc32c(crc32c(seed, view.part(0, at)?), &[0; 4]), view.part(at + 4, rest)?);
        Ok(sum == view.be32(at)?)
    }
}

/// The log as a ring of blocks.
struct Log<'a, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
    format: Format,
    /// Where its blocks are: first block of the log, byte of the partition, blocks.
    places: Vec<(u64, u64, u64)>,
    first: u64,
    length: u64,
}

/// Read the journal of an ext3 or ext4.
pub fn read<R: ReadAt>(disk: &Disk<R>, layout: &Layout) -> Sure<Replay> {
    let Some(number) = layout.journal else { return doubt("its journal is on another device, or missing") };
    let mut log = Log::find(disk, layout, number)?;
    match log.open()? {
        None => Ok(Replay { blocks: BTreeMap::new() }),
        Some((sequence, start)) => log.scan(sequence, start),
    }
}

/// That the journal of a filesystem that needs no recovery holds nothing: e2fsck would replay it all the same.
pub fn is_empty<R: ReadAt>(disk: &Disk<R>, layout: &Layout) -> Sure<()> {
    let Some(number) = layout.journal else { return Ok(()) };
    let piece = Log::find(disk, layout, number)?.block(0)?;
    if piece.view().be32(0)? == MAGIC && piece.view().be32(0x1C)? == 0 {
        return Ok(());
    }
    doubt("its journal is not empty, though it says that it needs no recovery")
}

impl<'a, R: ReadAt> Log<'a, R> {
    fn find(disk: &'a Disk<R>, layout: &'a Layout, number: u32) -> Sure<Self> {
        let inode = Inode::read(disk, layout, u64::from(number))?;
        let mut places = Vec::new();
        let mut budget = ext_inode::budget(layout);
        inode.walk(disk, layout, &mut budget, &mut |logical, block, count| {
            if block.checked_add(count).is_none_or(|end| end > layout.blocks) {
                return doubt("its journal lies outside of it");
            }
            if let Some(logical) = logical {
                places.push((logical, block * layout.block_size, count));
            }
            Ok(())
        })?;
        let format = Format { seed: None, third: false, wide: false };
        Ok(Self { disk, layout, format, places, first: 0, length: 1 })
    }

    /// Where a block of the log stands, in bytes of the partition.
    fn place(&self, block: u64) -> Sure<u64> {
        let after = self.places.partition_point(|run| run.0 <= block);
        let run = after.checked_sub(1).and_then(|at| self.places.get(at));
        match run.filter(|(logical, _, count)| block - logical < *count) {
            Some((logical, place, _)) => Ok(place + (block - logical) * self.layout.block_size),
            None => doubt("its journal has holes"),
        }
    }

    fn block(&self, block: u64) -> Sure<super::disk::Piece> {
        self.disk.read(self.place(block)?, self.layout.block_size as usize)
    }

    fn wrap(&self, block: u64) -> u64 {
        if block >= self.length {
            block - (self.length - self.first)
        } else {
            block
        }
    }

    /// Parse the superblock: the first transaction to replay, and where it begins; `None` for nothing.
    fn open(&mut self) -> Sure<Option<(u32, u64)>> {
        let piece = self.block(0)?;
        let raw = piece.view();
        if raw.be32(0)? != MAGIC || raw.be32(4)? != SUPER_V2 {
            return doubt("its journal has no superblock that is known");
        }
        let (compat, incompat, ro) = (raw.be32(0x24)?, raw.be32(0x28)?, raw.be32(0x2C)?);
        if incompat & INCOMPAT_FAST_COMMIT != 0 {
            return doubt("its journal is not replayed, and may hold fast commits");
        }
        let known = INCOMPAT_REVOKE | INCOMPAT_64BIT | INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3;
        if compat != 0 || ro != 0 || incompat & !known != 0 {
            return doubt(format!("its journal is not replayed, and has features {compat:#x}, {incompat:#x}, {ro:#x}"));
        }
        let (second, third) = (incompat & INCOMPAT_CSUM_V2 != 0, incompat & INCOMPAT_CSUM_V3 != 0);
        if second && third {
            return doubt("its journal has two kinds of checksums");
        }
        if second || third {
            let whole = Format { seed: Some(!0), third, wide: false }.holds(raw.part(0, 1024)?, 0xFC)?;
            if raw.u8(0x50)? != 4 || !whole {
                return doubt("the checksum of its journal's superblock is wrong");
            }
        }
        let seed = if second || third { Some(crc32c(!0, raw.part(0x30, 16)?)) } else { None };
        self.format = Format { seed, third, wide: incompat & INCOMPAT_64BIT != 0 };
        let (size, length, first) = (raw.be32(0xC)?, u64::from(raw.be32(0x10)?), u64::from(raw.be32(0x14)?));
        let (sequence, start) = (raw.be32(0x18)?, u64::from(raw.be32(0x1C)?));
        let held = self.places.last().map_or(0, |run| run.0 + run.2);
        if u64::from(size) != self.layout.block_size || first == 0 || first >= length || length > held.min(MOST) {
            return doubt("its journal's superblock makes no sense");
        }
        if raw.be32(0x20)? != 0 {
            return doubt("its journal was aborted by an error");
        }
        (self.first, self.length) = (first, length);
        if start == 0 {
            return Ok(None);
        }
        if !(first..length).contains(&start) {
            return doubt("its journal's superblock makes no sense");
        }
        Ok(Some((sequence, start)))
    }

    /// Go through the transactions that are complete.
    fn scan(&self, mut sequence: u32, start: u64) -> Sure<Replay> {
        let mut blocks: BTreeMap<u64, Copied> = BTreeMap::new();
        let mut revoked: HashMap<u64, u32> = HashMap::new();
        let (mut copies, mut revocations) = (Vec::new(), Vec::new());
        let mut at = start;
        let mut seen = 0;
        // A log that goes round is full at most once.
        while seen < self.length - self.first {
            let piece = self.block(at)?;
            let raw = piece.view();
            if raw.be32(0)? != MAGIC || raw.be32(8)? != sequence {
                break;
            }
            (at, seen) = (self.wrap(at + 1), seen + 1);
            let end = piece.bytes().len() - self.format.tail();
            let (kind, sum) = match raw.be32(4)? {
                COMMIT => (COMMIT, 16),
                kind @ (DESCRIPTOR | REVOKE) => (kind, end),
                _ => break,
            };
            if !self.format.holds(piece.bytes(), sum)? {
                return doubt("the checksum of a block of its journal is wrong");
            }
            match kind {
                DESCRIPTOR => {
                    let count = self.descriptor(&View(raw.part(0, end)?), sequence, at, &mut copies)?;
                    (at, seen) = (self.wrap(at + count), seen + count);
                }
                REVOKE => self.revocations(&raw, &mut revocations)?,
                _ => {
                    for (_, copy) in &copies {
                        self.verify(copy)?;
                    }
                    blocks.extend(copies.drain(..));
                    revoked.extend(revocations.drain(..).map(|block| (block, sequence)));
                    if revoked.len() > MOST_REVOKED {
                        return doubt("its journal revokes more than is believed");
                    }
                    sequence = sequence.wrapping_add(1);
                }
            }
        }
        // A copy counts where it is newer than the revocation; sequence numbers may wrap.
        let newer = |copy: &Copied, revoked: u32| copy.sequence.wrapping_sub(revoked) as i32 > 0;
        blocks.retain(|block, copy| revoked.get(block).is_none_or(|&last| newer(copy, last)));
        Ok(Replay { blocks })
    }

    /// The tags of a descriptor, whose blocks follow from `at` on; how many they are.
    fn descriptor(&self, raw: &View<'_>, sequence: u32, at: u64, copies: &mut Vec<(u64, Copied)>) -> Sure<u64> {
        let width = self.format.tag();
        let (mut tag, mut count) = (12, 0);
        while tag + width <= raw.0.len() {
            let low = u64::from(raw.be32(tag)?);
            let flags = raw.be16(tag + 6)?;
            let block = low | if self.format.wide { u64::from(raw.be32(tag + 8)?) << 32 } else { 0 };
            if block >= self.layout.blocks || count >= self.length - self.first {
                return doubt("its journal writes outside of it");
            }
            let copy = Copied {
                sequence,
                place: self.place(self.wrap(at + count))?,
                escaped: flags & ESCAPED != 0,
                sum: match (self.format.seed, self.format.third) {
                    (None, _) => None,
                    (_, true) => Some((raw.be32(tag + 12)?, !0)),
                    (_, false) => Some((u32::from(raw.be16(tag + 4)?), 0xFFFF)),
                },
            };
            copies.push((block, copy));
            count += 1;
            tag += width + if flags & SAME_UUID != 0 { 0 } else { 16 };
            if flags & LAST_TAG != 0 {
                break;
            }
        }
        Ok(count)
    }

    /// The checksum of a copy, over its transaction's number and itself.
    fn verify(&self, copy: &Copied) -> Sure<()> {
        let (Some(seed), Some((said, kept))) = (self.format.seed, copy.sum) else { return Ok(()) };
        let piece = self.disk.read(copy.place, self.layout.block_size as usize)?;
        let sum = crc32c(crc32c(seed, &copy.sequence.to_be_bytes()), piece.bytes());
        if sum & kept == said {
            return Ok(());
        }
        doubt("the checksum of a block in its journal is wrong")
    }

    fn revocations(&self, raw: &View<'_>, revoked: &mut Vec<u64>) -> Sure<()> {
        let width = if self.format.wide { 8 } else { 4 };
        let used = raw.be32(12)? as usize;
        if used > raw.0.len() - self.format.tail() || revoked.len() > MOST_REVOKED {
            return doubt("its journal revokes more than is believed");
        }
        let mut at = 16;
        while at + width <= used {
            revoked.push(if self.format.wide { raw.be64(at)? } else { u64::from(raw.be32(at)?) });
            at += width;
        }
        Ok(())
    }
}
