//! XFS's log: whether anything in it is waiting to be replayed.
//!
//! Sources: the kernel's fs/xfs/xfs_log_recover.c (`xlog_find_head`, `xlog_find_zeroed`,
//! `xlog_check_unmount_rec`, `xlog_recover_process`), libxfs/xfs_log_format.h (records, operations,
//! buffer items), and xfs_log.c (`xfs_log_quiesce`, `xfs_log_cover`: why a frozen filesystem has a
//! log of superblocks).
//!
//! Invariant: the log passes only where its last record is that of an unmount and ends exactly
//! at the head, or where every item from tail to head is a write of the superblock, which
//! allocates nothing. A log that looks torn around its head, by crash or by a copy that was made
//! while it was written, does not pass, though the kernel might make something of it.

use super::disk::{Disk, Piece, ReadAt, View};
use super::sums::crc32c;
use super::xfs::Layout;
use super::{doubt, Sure};

const BASIC: u64 = 512;
const RECORD_MAGIC: u32 = 0xFEED_BABE;
/// Basic blocks that may be written out of order: 8 buffers of 256 KiB.
const IN_FLIGHT: u64 = 4096;
/// Basic blocks of the longest record: 256 KiB, its headers, and padding to a stripe.
const LONGEST: u64 = 1100;
/// Basic blocks of a log of superblocks that are looked through.
const LOOKED_THROUGH: u64 = 16384;

const UNMOUNT_OP: u8 = 0x20;
const START_OP: u8 = 0x1;
const COMMIT_OP: u8 = 0x2;
const TRANSACTION: u8 = 0x69;
const TRANSACTION_MAGIC: u32 = 0x5452_414E; // TRAN
const BUFFER_ITEM: u16 = 0x123C;
const CANCEL: u16 = 0x2;

const DIRTY: &str = "its log is not replayed: it is mounted, or was not unmounted cleanly";

/// A log that passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Unmounted; the head's cycle and basic block.
    Clean(u32, u64),
    /// Frozen, or idle: nothing but superblocks.
    Covered(u32, u64),
}

impl State {
    /// For `Used::note`.
    pub fn note(&self) -> &'static str {
        match self {
            Self::Clean(..) => "",
            Self::Covered(..) => "its log holds nothing but its superblock",
        }
    }
}

/// What state the log is in; a `Doubt` where it has to be replayed.
pub fn state<R: ReadAt>(disk: &Disk<R>, layout: &Layout) -> Sure<State> {
    let log = Log { disk, layout, count: layout.log_size / BASIC };
    let head = log.head()?;
    log.looks_whole(&head)?;
    let (at, last) = log.last_record(&head)?;
    if last.operations == 1 && log.wrap(at + last.headers + last.blocks()) == log.wrap(head.block) {
        let data = log.read(log.wrap(at + last.headers), 1)?;
        if data.view().u8(9)? & UNMOUNT_OP != 0 {
            return Ok(State::Clean(head.cycle, head.block));
        }
    }
    log.is_covered(&head, &last)?;
    Ok(State::Covered(head.cycle, head.block))
}

struct Log<'a, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
    /// Basic blocks in it.
    count: u64,
}

/// The end of what was written: blocks before it have `cycle`, those from it on `before`.
struct Head {
    block: u64,
    cycle: u32,
    before: u32,
}

/// A record's header.
struct Record {
    cycle: u32,
    length: u64,
    headers: u64,
    operations: u32,
    tail: u64,
}

impl Record {
    /// Basic blocks of data.
    fn blocks(&self) -> u64 {
        self.length.div_ceil(BASIC)
    }
}

impl<R: ReadAt> Log<'_, R> {
    fn wrap(&self, block: u64) -> u64 {
        block % self.count
    }

    fn read(&self, block: u64, count: u64) -> Sure<Piece> {
        self.disk.read(self.layout.log_start + block * BASIC, (count * BASIC) as usize)
    }

    fn cycle(&self, block: u64) -> Sure<u32> {
        cycle_of(&self.read(block, 1)?.view(), 0)
    }

    fn head(&self) -> Sure<Head> {
        let (first, last) = (self.cycle(0)?, self.cycle(self.count - 1)?);
        if first == last && first != 0 {
            return Ok(Head { block: self.count, cycle: first, before: first.wrapping_sub(1) });
        }
        // A log that never went around has zeroes behind its head.
        if first == 0 || last != first - 1 {
            return doubt("its log is not in order");
        }
        let (mut low, mut high) = (0, self.count - 1);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if self.cycle(middle)? == last {
                high = middle;
            } else {
                low = middle;
            }
        }
        Ok(Head { block: high, cycle: first, before: last })
    }

    /// Around the head, nothing was written out of order.
    fn looks_whole(&self, head: &Head) -> Sure<()> {
        let reach = IN_FLIGHT.min(self.count / 2);
        for start in [self.wrap(head.block + self.count - reach), self.wrap(head.block)] {
            let mut block = start;
            let mut left = reach;
            while left > 0 {
                let count = left.min(self.count - block);
                let piece = self.read(block, count)?;
                for at in 0..count {
                    let expected = if block + at < head.block { head.cycle } else { head.before };
                    if cycle_of(&piece.view(), (at * BASIC) as usize)? != expected {
                        return doubt(DIRTY);
                    }
                }
                left -= count;
                block = self.wrap(block + count);
            }
        }
        Ok(())
    }

    fn last_record(&self, head: &Head) -> Sure<(u64, Record)> {
        for back in 1..=LONGEST.min(self.count) {
            let block = self.wrap(head.block + self.count - back);
            if self.read(block, 1)?.view().be32(0)? == RECORD_MAGIC {
                return Ok((block, self.record(block)?));
            }
        }
        doubt("its log has no record before its head")
    }

    fn record(&self, block: u64) -> Sure<Record> {
        let piece = self.read(block, 1)?;
        let raw = piece.view();
        let (version, length, size) = (raw.be32(8)?, u64::from(raw.be32(12)?), u64::from(raw.be32(320)?));
        let whole = raw.be32(0)? == RECORD_MAGIC
            && matches!(version, 1 | 2)
            && raw.part(304, 16)? == self.layout.uuid
            && raw.be64(16)? == u64::from(raw.be32(4)?) << 32 | block
            && length <= 256 << 10
            && size <= 256 << 10;
        if !whole {
            return doubt("a record of its log makes no sense");
        }
        let many = self.layout.log_v2 && version == 2 && size > 32 << 10;
        let headers = if many { size.div_ceil(32 << 10) } else { 1 };
        Ok(Record { cycle: raw.be32(4)?, length, headers, operations: raw.be32(40)?, tail: raw.be64(24)? })
    }

    /// From the tail that the last record names up to the head, only the superblock is written.
    fn is_covered(&self, head: &Head, last: &Record) -> Sure<()> {
        let (tail_cycle, tail) = ((last.tail >> 32) as u32, last.tail & 0xFFFF_FFFF);
        let expected = if tail < head.block { head.cycle } else { head.before };
        if tail >= self.count || tail_cycle != expected {
            return doubt(DIRTY);
        }
        let end = if tail < head.block { head.block } else { head.block + self.count };
        let mut at = tail;
        if end - at > LOOKED_THROUGH {
            return doubt(DIRTY);
        }
        while at < end {
            let record = self.record(self.wrap(at))?;
            let next = at + record.headers + record.blocks();
            let cycle = if self.wrap(at) < head.block { head.cycle } else { head.before };
            if next > end || record.cycle != cycle {
                return doubt(DIRTY);
            }
            only_superblocks(&self.unpacked(at, &record)?, record.operations)?;
            at = next;
        }
        Ok(())
    }

    /// A record's data, with the first word of each basic block back in its place.
    fn unpacked(&self, at: u64, record: &Record) -> Sure<Vec<u8>> {
        let mut raw = Vec::new();
        let blocks = record.headers + record.blocks();
        for block in 0..blocks {
            raw.extend_from_slice(self.read(self.wrap(at + block), 1)?.bytes());
        }
        let data = (record.headers * BASIC) as usize;
        if self.layout.sums && !sum_holds(&raw, data, record.length as usize)? {
            return doubt("the checksum of a record of its log is wrong");
        }
        let mut out = raw[data..].to_vec();
        for block in 0..record.blocks() as usize {
            // 64 words a header block; the first header has more fields before them.
            let from = (block / 64) * 512 + if block < 64 { 44 } else { 4 } + 4 * (block % 64);
            if block / 64 >= record.headers as usize {
                return doubt("a record of its log makes no sense");
            }
            let word = View(&raw).part(from, 4)?;
            out[block * 512..block * 512 + 4].copy_from_slice(word);
        }
        out.truncate(record.length as usize);
        Ok(out)
    }
}

fn cycle_of(raw: &View<'_>, at: usize) -> Sure<u32> {
    let word = raw.be32(at)?;
    if word == RECORD_MAGIC {
        raw.be32(at + 4)
    } else {
        Ok(word)
    }
}

/// `xlog_cksum`: over the first 328 bytes of the header (its own place zeroes), the other
/// headers, and the data as it lies on disk.
fn sum_holds(raw: &[u8], data: usize, length: usize) -> Sure<bool> {
    let view = View(raw);
    let mut sum = crc32c(crc32c(crc32c(!0, view.part(0, 32)?), &[0; 4]), view.part(36, 328 - 36)?);
    // Only as many of the other headers as the data needs.
    for header in 1..length.div_ceil(32 << 10).min(data / 512) {
        // sizeof(struct xlog_rec_ext_header): a cycle and 64 words.
        sum = crc32c(sum, view.part(header * 512, 260)?);
    }
    Ok(!crc32c(sum, view.part(data, length)?) == view.le32(32)?)
}

/// A record's operations: transactions that write buffers at block 0, and nothing else.
/// What follows them is padding.
fn only_superblocks(data: &[u8], operations: u32) -> Sure<()> {
    let raw = View(data);
    let mut at = 0;
    let mut regions = 0;
    let mut begun = false;
    for _ in 0..operations {
        let (length, client, flags) = (raw.be32(at + 4)? as usize, raw.u8(at + 8)?, raw.u8(at + 9)?);
        let body = View(raw.part(at + 12, length)?);
        at += 12 + length;
        match (client, flags, length) {
            (TRANSACTION, START_OP, 0) => begun = false,
            (TRANSACTION, COMMIT_OP, 0) if regions == 0 => {}
            // Regions of the item whose format came before.
            (TRANSACTION, 0, _) if regions > 0 => regions -= 1,
            // Structures of the log are in the byte order of the machine that wrote them.
            (TRANSACTION, 0, 16) if !begun && body.le32(0)? == TRANSACTION_MAGIC => begun = true,
            (TRANSACTION, 0, _) if begun => {
                let superblock = body.le16(0)? == BUFFER_ITEM
                    && body.le16(4)? & CANCEL == 0
                    && body.le64(8)? == 0
                    && (1..=16).contains(&body.le16(2)?);
                if !superblock {
                    return doubt(DIRTY);
                }
                regions = body.le16(2)? - 1;
            }
            _ => return doubt(DIRTY),
        }
    }
    if regions > 0 {
        return doubt(DIRTY);
    }
    Ok(())
}
