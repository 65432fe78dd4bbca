//! XFS, versions 4 and 5: all but what the free-space b-trees list is in use.
//!
//! Sources: the kernel's fs/xfs/libxfs/xfs_format.h (superblock, AGF, b-tree blocks),
//! xfs_sb.c (`xfs_validate_sb_common`), xfs_alloc.c (`xfs_agf_verify`), xfs_btree.c, and
//! "XFS Algorithms & Data Structures".
//!
//! Invariant: a group's by-block free-space tree is believed where every block of it is whole
//! (checksum on version 5, level, owner, siblings, order) and its records add up to the count
//! in the group's header. Blocks of the free list (AGFL) and of the trees are not in it, and so
//! count as used. Block numbers are 64 bits wide: group times blocks of a group plus block.

use super::collect::Collector;
use super::disk::{Disk, Piece, ReadAt, View};
use super::sums::crc32c;
use super::{doubt, xfs_log, Sure, Used};

const MAGIC: u32 = 0x5846_5342; // XFSB
const AGF_MAGIC: u32 = 0x5841_4746; // XAGF
const BNO_MAGIC: u32 = 0x4142_5442; // ABTB
const BNO_CRC_MAGIC: u32 = 0x4142_3342; // AB3B
const NULL_BLOCK: u32 = u32::MAX;
const MOST_LEVELS: u32 = 9; // XFS_BTREE_MAXLEVELS

/// finobt, rmapbt, reflink, inobtcount.
const RO_COMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8;
/// ftype, sparse inodes, meta_uuid, bigtime, nrext64, exchange-range, parent pointers.
const INCOMPAT_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x20 | 0x40 | 0x80;
const INCOMPAT_META_UUID: u32 = 0x4;
const INCOMPAT_NEEDS_REPAIR: u32 = 0x10;

/// What the superblock says.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Bytes of a block.
    pub block_size: u64,
    /// Blocks in all.
    pub blocks: u64,
    /// Blocks of an allocation group; the last may have fewer.
    pub per_group: u64,
    /// Allocation groups.
    pub groups: u64,
    /// Bytes of a sector, the unit of group headers.
    pub sector: u64,
    /// Version 5: checksums.
    pub sums: bool,
    /// The UUID that metadata carries.
    pub meta_uuid: [u8; 16],
    /// The UUID that the log carries.
    pub uuid: [u8; 16],
    /// First byte of the log.
    pub log_start: u64,
    /// Bytes of the log.
    pub log_size: u64,
    /// Whether records of the log may have more than one header block.
    pub log_v2: bool,
}

/// `xfs`, where its magic stands.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    (disk.read(0, 512).ok()?.view().be32(0).ok()? == MAGIC).then_some("xfs")
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let layout = Layout::read(disk)?;
    let log = xfs_log::state(disk, &layout)?;
    let mut found = Collector::default();
    for number in 0..layout.groups {
        group(disk, &layout, number, &mut found)?;
    }
    found.add(layout.blocks * layout.block_size, disk.size());
    if xfs_log::state(disk, &layout)? != log {
        return doubt("its log went on while its maps were read");
    }
    Ok(Used { ranges: found.finish(disk.size()), note: log.note().into() })
}

impl Layout {
    fn read<R: ReadAt>(disk: &Disk<R>) -> Sure<Self> {
        let first = disk.read(0, 512)?;
        let raw = first.view();
        if raw.be32(0)? != MAGIC {
            return doubt("there is no superblock of XFS");
        }
        let version = raw.be16(100)?;
        if !matches!(version & 0xF, 4 | 5) {
            return doubt(format!("XFS of version {}", version & 0xF));
        }
        let sums = version & 0xF == 5;
        let sector = u64::from(raw.be16(102)?);
        let block_size = u64::from(raw.be32(4)?);
        if !(512..=32768).contains(&sector) || !sector.is_power_of_two() {
            return doubt(format!("sectors of {sector} bytes"));
        }
        if !(512..=65536).contains(&block_size) || !block_size.is_power_of_two() || block_size < sector {
            return doubt(format!("blocks of {block_size} bytes"));
        }
        if u64::from(raw.u8(120)?) != u64::from(block_size.trailing_zeros()) {
            return doubt("its block sizes contradict each other");
        }
        let mut uuid = [0; 16];
        uuid.copy_from_slice(raw.part(32, 16)?);
        let mut meta_uuid = uuid;
        if sums {
            check_sum(&disk.read(0, sector as usize)?, 224, "its superblock")?;
            Self::features(&raw)?;
            if raw.be32(216)? & INCOMPAT_META_UUID != 0 {
                meta_uuid.copy_from_slice(raw.part(248, 16)?);
            }
        }
        if raw.u8(126)? != 0 {
            return doubt("mkfs or growfs was interrupted on it");
        }
        if raw.be64(16)? != 0 || raw.be64(24)? != 0 {
            return doubt("it has a realtime section");
        }
        let (blocks, per_group, groups) = (raw.be64(8)?, u64::from(raw.be32(84)?), u64::from(raw.be32(88)?));
        if per_group < 64 || groups == 0 || blocks > groups * per_group || blocks <= (groups - 1) * per_group {
            return doubt("its numbers of blocks and groups contradict each other");
        }
        if blocks.checked_mul(block_size).is_none_or(|end| end > disk.size()) {
            return doubt("it is larger than the partition that it stands on");
        }
        let mut layout = Self {
            block_size,
            blocks,
            per_group,
            groups,
            sector,
            sums,
            meta_uuid,
            uuid,
            log_start: 0,
            log_size: 0,
            log_v2: version & 0x0400 != 0,
        };
        layout.place_log(&raw)?;
        Ok(layout)
    }

    fn features(raw: &View<'_>) -> Sure<()> {
        let (ro, incompat, log) = (raw.be32(212)?, raw.be32(216)?, raw.be32(220)?);
        if incompat & INCOMPAT_NEEDS_REPAIR != 0 {
            return doubt("it is marked as needing repair");
        }
        if ro & !RO_COMPAT_KNOWN != 0 || incompat & !INCOMPAT_KNOWN != 0 || log != 0 {
            let (ro, incompat) = (ro & !RO_COMPAT_KNOWN, incompat & !INCOMPAT_KNOWN);
            return doubt(format!(
                "it has features that are not known: ro_compat {ro:#x}, incompat {incompat:#x}, log {log:#x}"
            ));
        }
        Ok(())
    }

    fn place_log(&mut self, raw: &View<'_>) -> Sure<()> {
        let start = raw.be64(48)?;
        if start == 0 {
            return doubt("its log is on another device");
        }
        // A file-system block number: the group in the high bits, the block in the low ones.
        let bits = u32::from(raw.u8(124)?);
        if !(1..=32).contains(&bits) || self.per_group > 1 << bits {
            return doubt("its numbers of blocks and groups contradict each other");
        }
        let (group, block) = (start >> bits, start & ((1 << bits) - 1));
        let length = u64::from(raw.be32(96)?);
        if group >= self.groups || length == 0 || block + length > self.length_of(group) {
            return doubt("its log lies outside of it");
        }
        self.log_start = (group * self.per_group + block) * self.block_size;
        self.log_size = length * self.block_size;
        Ok(())
    }

    /// Blocks of a group.
    pub fn length_of(&self, group: u64) -> u64 {
        self.per_group.min(self.blocks - group * self.per_group)
    }
}

/// Version 5 keeps a little-endian CRC-32C at `at`, made with zeroes in its own place.
fn check_sum(piece: &Piece, at: usize, what: &str) -> Sure<()> {
    let view = piece.view();
    let rest = piece.bytes().len().saturating_sub(at + 4);
    let sum = crc32c(crc32c(crc32c(!0, view.part(0, at)?), &[0; 4]), view.part(at + 4, rest)?);
    if view.le32(at)? == !sum {
        return Ok(());
    }
    doubt(format!("the checksum of {what} is wrong"))
}

/// Add what is used of one group.
fn group<R: ReadAt>(disk: &Disk<R>, layout: &Layout, number: u64, found: &mut Collector) -> Sure<()> {
    let start = number * layout.per_group * layout.block_size;
    let header = disk.read(start + layout.sector, layout.sector as usize)?;
    let raw = header.view();
    let name = || format!("the header of allocation group {number}");
    if raw.be32(0)? != AGF_MAGIC || raw.be32(4)? != 1 || u64::from(raw.be32(8)?) != number {
        return doubt(format!("{} is not there", name()));
    }
    if layout.sums {
        check_sum(&header, 216, &name())?;
        if raw.part(64, 16)? != layout.meta_uuid {
            return doubt(format!("{} is that of another filesystem", name()));
        }
    }
    let (length, root, levels) = (u64::from(raw.be32(12)?), raw.be32(16)?, raw.be32(28)?);
    if length != layout.length_of(number) || levels == 0 || levels > MOST_LEVELS {
        return doubt(format!("{} contradicts the superblock", name()));
    }
    let mut walk = Walk { disk, layout, number, length, found, position: 0, free: 0, last_leaf: None };
    walk.block(root, levels - 1, None)?;
    if walk.last_leaf.is_some_and(|(_, right)| right != NULL_BLOCK) {
        return doubt(format!("the free-space tree of allocation group {number} ends too early"));
    }
    let (free, position) = (walk.free, walk.position);
    if free != u64::from(raw.be32(52)?) {
        let said = raw.be32(52)?;
        return doubt(format!(
            "allocation group {number} has {free} blocks in its free-space tree, {said} by its header"
        ));
    }
    found.add(start + position * layout.block_size, start + length * layout.block_size);
    Ok(())
}

/// A walk through one group's tree, in order.
struct Walk<'a, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
    number: u64,
    length: u64,
    found: &'a mut Collector,
    /// All before it has been told of; the next free extent begins behind it.
    position: u64,
    free: u64,
    /// The leaf before, and the one that it says comes next.
    last_leaf: Option<(u32, u32)>,
}

impl<R: ReadAt> Walk<'_, R> {
    /// Walk a block of `level`. `key`: where its first extent has to begin. Every extent begins
    /// behind the one before, so that a block that comes twice ends the walk.
    fn block(&mut self, block: u32, level: u32, key: Option<u32>) -> Sure<()> {
        let number = self.number;
        let bad = |what: &str| doubt(format!("the free-space tree of allocation group {number} {what}"));
        if u64::from(block) >= self.length {
            return bad("leads out of the group");
        }
        let size = self.layout.block_size;
        let place = (self.number * self.layout.per_group + u64::from(block)) * size;
        let piece = self.disk.read(place, size as usize)?;
        let raw = piece.view();
        let (magic, header) = if self.layout.sums { (BNO_CRC_MAGIC, 56) } else { (BNO_MAGIC, 16) };
        if raw.be32(0)? != magic || u32::from(raw.be16(4)?) != level {
            return bad("has a block that is none of it");
        }
        if self.layout.sums {
            check_sum(&piece, 52, "a block of a free-space tree")?;
            let own = raw.be64(16)? == place / 512 && u64::from(raw.be32(48)?) == self.number;
            if !own || raw.part(32, 16)? != self.layout.meta_uuid {
                return bad("has a block of another place");
            }
        }
        let count = usize::from(raw.be16(6)?);
        let room = (size as usize - header) / if level == 0 { 8 } else { 12 };
        // Only an empty tree, a root that is a leaf, has no records.
        if count > room || (count == 0 && (level > 0 || key.is_some())) {
            return bad("has a block with an impossible number of records");
        }
        if level == 0 {
            return self.leaf(block, &raw, header, count, key);
        }
        for at in 0..count {
            let first = raw.be32(header + 8 * at)?;
            let child = raw.be32(header + 8 * room + 4 * at)?;
            if at == 0 && key.is_some_and(|key| key != first) {
                return bad("is out of order");
            }
            self.block(child, level - 1, Some(first))?;
        }
        Ok(())
    }

    fn leaf(&mut self, block: u32, raw: &View<'_>, header: usize, count: usize, key: Option<u32>) -> Sure<()> {
        let number = self.number;
        let bad = |what: &str| doubt(format!("the free-space tree of allocation group {number} {what}"));
        let (left, right) = (raw.be32(8)?, raw.be32(12)?);
        let expected = self.last_leaf.map_or((NULL_BLOCK, block), |(last, next)| (last, next));
        if (left, block) != expected {
            return bad("has leaves that do not follow each other");
        }
        self.last_leaf = Some((block, right));
        let start = self.number * self.layout.per_group;
        let size = self.layout.block_size;
        for at in 0..count {
            let (first, length) = (raw.be32(header + 8 * at)?, u64::from(raw.be32(header + 8 * at + 4)?));
            if at == 0 && key.is_some_and(|key| key != first) {
                return bad("is out of order");
            }
            let first = u64::from(first);
            // Block 0 is never free, and extents that touch would be one.
            if first <= self.position || length == 0 || first + length > self.length {
                return bad("is out of order");
            }
            self.found.add((start + self.position) * size, (start + first) * size);
            self.position = first + length;
            self.free += length;
        }
        Ok(())
    }
}
