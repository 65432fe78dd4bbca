//! The superblock of ext2/3/4 and where it puts things.
//!
//! Sources: the kernel's Documentation/filesystems/ext4/ (super, group_descr, blockgroup),
//! fs/ext4/ext4.h (feature bits), fs/ext4/super.c (`ext4_fill_super`, `descriptor_loc`),
//! fs/ext4/balloc.c (`ext4_bg_has_super`, `ext4_num_base_meta_clusters`).
//!
//! Invariant: a `Layout` holds sizes that are consistent with each other and with the
//! partition, so that arithmetic on them does not overflow.

use super::disk::{Disk, ReadAt, View};
use super::sums::{crc16, crc32c};
use super::{doubt, Sure};

/// Where the superblock is, and how long it is.
pub const SUPER: (u64, usize) = (1024, 1024);
const MAGIC: u16 = 0xEF53;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;

const INCOMPAT_RECOVER: u32 = 0x4;
const INCOMPAT_JOURNAL_DEV: u32 = 0x8;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_EXTENTS: u32 = 0x40;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_FLEX_BG: u32 = 0x200;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
/// Filetype, recover, meta_bg, extents, 64bit, mmp, flex_bg, ea_inode, csum_seed, largedir,
/// inline_data, encrypt, casefold. Recover has an answer of its own.
const INCOMPAT_KNOWN: u32 =
    0x2 | 0x4 | 0x10 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;

const RO_SPARSE_SUPER: u32 = 0x1;
const RO_HUGE_FILE: u32 = 0x8;
const RO_GDT_CSUM: u32 = 0x10;
const RO_DIR_NLINK: u32 = 0x20;
const RO_EXTRA_ISIZE: u32 = 0x40;
const RO_BIGALLOC: u32 = 0x200;
const RO_METADATA_CSUM: u32 = 0x400;
const RO_ORPHAN_PRESENT: u32 = 0x1_0000;
/// All that the kernel knows but has_snapshot (0x80) and replica (0x800).
const RO_KNOWN: u32 =
    0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000;

const STATE_VALID: u16 = 1;
const STATE_ERROR: u16 = 2;

/// More groups than a petabyte in groups of 128 MiB.
const MOST_GROUPS: u64 = 1 << 23;

/// How structures are checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sums {
    /// Not at all.
    None,
    /// Descriptors by CRC-16 over the volume's UUID.
    Crc16([u8; 16]),
    /// Everything by CRC-32C with this seed.
    Crc32c(u32),
}

/// What the superblock says.
#[derive(Clone, Debug)]
pub struct Layout {
    /// Bytes of a block.
    pub block_size: u64,
    /// Number of the first block that groups count from.
    pub first_block: u64,
    /// Number of blocks, from block 0.
    pub blocks: u64,
    /// Blocks of a cluster, the unit of the bitmaps.
    pub cluster: u64,
    /// Blocks of a group.
    pub per_group: u64,
    /// Number of groups.
    pub groups: u64,
    /// Blocks of a group's inode table.
    pub table_blocks: u64,
    /// Bytes of a group's descriptor.
    pub desc_size: usize,
    /// Descriptors of a block.
    pub desc_per_block: u64,
    /// Checksums.
    pub sums: Sums,
    /// Whether numbers of blocks have more than 32 bits.
    pub wide: bool,
    /// Bytes of an inode.
    pub inode_size: usize,
    /// Inodes of a group.
    pub inodes_per_group: u64,
    /// Inode of the journal; `None` where it has none, or it is on another device.
    pub journal: Option<u32>,
    /// The journal is not replayed: what is in place may be old.
    pub unreplayed: bool,
    first_meta_bg: u64,
    meta_bg: bool,
    reserved_gdt: u64,
    sparse: Sparse,
}

#[derive(Clone, Copy, Debug)]
enum Sparse {
    Everywhere,
    Powers,
    Two([u32; 2]),
}

/// `ext2`, `ext3` or `ext4` by magic and features, or `None`.
pub fn name<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    let piece = disk.read(SUPER.0, SUPER.1).ok()?;
    let raw = piece.view();
    if raw.le16(0x38).ok()? != MAGIC {
        return None;
    }
    let (compat, incompat, ro) = (raw.le32(0x5C).ok()?, raw.le32(0x60).ok()?, raw.le32(0x64).ok()?);
    let incompat4 = INCOMPAT_EXTENTS | INCOMPAT_64BIT | INCOMPAT_FLEX_BG;
    let ro4 = RO_HUGE_FILE | RO_GDT_CSUM | RO_DIR_NLINK | RO_EXTRA_ISIZE | RO_BIGALLOC | RO_METADATA_CSUM;
    if raw.le32(0x4C).ok()? > 0 && (incompat & incompat4 != 0 || ro & ro4 != 0) {
        return Some("ext4");
    }
    Some(if compat & COMPAT_HAS_JOURNAL != 0 { "ext3" } else { "ext2" })
}

impl Layout {
    /// Parse a superblock. Every condition of a filesystem left cleanly is checked here, but for the
    /// journal: `unreplayed` says whether it was left with one that has to be replayed.
    pub fn parse(raw: &View<'_>, size: u64) -> Sure<Self> {
        if raw.le16(0x38)? != MAGIC {
            return doubt("there is no superblock of ext2/3/4");
        }
        let old = raw.le32(0x4C)? == 0;
        let (compat, incompat, ro) = if old { (0, 0, 0) } else { (raw.le32(0x5C)?, raw.le32(0x60)?, raw.le32(0x64)?) };
        let sums = Self::sums(raw, incompat, ro)?;
        Self::is_at_rest(raw, incompat, ro)?;
        let log_block = raw.le32(0x18)?;
        if log_block > 6 {
            return doubt(format!("a block size of 2^{} bytes", u64::from(log_block) + 10));
        }
        let block_size = 1024u64 << log_block;
        let wide = incompat & INCOMPAT_64BIT != 0;
        let blocks = u64::from(raw.le32(0x4)?) | if wide { u64::from(raw.le32(0x150)?) << 32 } else { 0 };
        let first_block = u64::from(raw.le32(0x14)?);
        // Blocks of 1 KiB: the superblock is block 1, which is the first one but with bigalloc.
        if first_block > u64::from(block_size == 1024) || blocks <= first_block {
            return doubt("its numbers of blocks contradict each other");
        }
        if blocks.checked_mul(block_size).is_none_or(|end| end > size) {
            return doubt("it is larger than the partition that it stands on");
        }
        let cluster = Self::cluster(raw, ro, log_block)?;
        let per_group = u64::from(raw.le32(0x20)?);
        let clusters = if cluster > 1 { u64::from(raw.le32(0x24)?) } else { per_group };
        if clusters == 0 || clusters > 8 * block_size || clusters % 8 != 0 || clusters * cluster != per_group {
            return doubt(format!("{per_group} blocks in a group of {block_size} byte blocks"));
        }
        let groups = (blocks - first_block).div_ceil(per_group);
        if groups > MOST_GROUPS {
            return doubt(format!("it has {groups} groups, more than are believed"));
        }
        let desc_size = if wide { usize::from(raw.le16(0xFE)?) } else { 32 };
        if desc_size < if wide { 64 } else { 32 } || desc_size > 1024 || !desc_size.is_power_of_two() {
            return doubt(format!("group descriptors of {desc_size} bytes"));
        }
        let inode_size = if old { 128 } else { u64::from(raw.le16(0x58)?) };
        let inodes = u64::from(raw.le32(0x28)?);
        if inodes == 0 || !(128..=block_size).contains(&inode_size) || !inode_size.is_power_of_two() {
            return doubt(format!("{inodes} inodes of {inode_size} bytes in a group"));
        }
        let table_blocks = (inodes * inode_size).div_ceil(block_size);
        let desc_per_block = block_size / desc_size as u64;
        let gdt = groups.div_ceil(desc_per_block);
        let meta_bg = incompat & INCOMPAT_META_BG != 0;
        let first_meta_bg = if meta_bg { u64::from(raw.le32(0x104)?) } else { gdt };
        if first_meta_bg > gdt || table_blocks > blocks {
            return doubt("its group descriptors or inode tables do not fit in");
        }
        let sparse = if compat & COMPAT_SPARSE_SUPER2 != 0 {
            Sparse::Two([raw.le32(0x24C)?, raw.le32(0x250)?])
        } else if ro & RO_SPARSE_SUPER != 0 {
            Sparse::Powers
        } else {
            Sparse::Everywhere
        };
        let reserved_gdt = u64::from(raw.le16(0xCE)?);
        let journal = Some(raw.le32(0xE0)?).filter(|&inode| compat & COMPAT_HAS_JOURNAL != 0 && inode != 0);
        Ok(Self {
            block_size,
            first_block,
            blocks,
            cluster,
            per_group,
            groups,
            table_blocks,
            desc_size,
            desc_per_block,
            sums,
            wide,
            inode_size: inode_size as usize,
            inodes_per_group: inodes,
            journal,
            unreplayed: incompat & INCOMPAT_RECOVER != 0,
            first_meta_bg,
            meta_bg,
            reserved_gdt,
            sparse,
        })
    }

    fn sums(raw: &View<'_>, incompat: u32, ro: u32) -> Sure<Sums> {
        let mut uuid = [0; 16];
        uuid.copy_from_slice(raw.part(0x68, 16)?);
        if ro & RO_METADATA_CSUM == 0 {
            return Ok(if ro & RO_GDT_CSUM != 0 { Sums::Crc16(uuid) } else { Sums::None });
        }
        if ro & RO_GDT_CSUM != 0 || raw.u8(0x175)? != 1 {
            return doubt("its kind of checksums is not known");
        }
        if crc32c(!0, raw.part(0, 0x3FC)?) != raw.le32(0x3FC)? {
            return doubt("its superblock's checksum is wrong");
        }
        let seed = if incompat & INCOMPAT_CSUM_SEED != 0 { raw.le32(0x270)? } else { crc32c(!0, &uuid) };
        Ok(Sums::Crc32c(seed))
    }

    fn is_at_rest(raw: &View<'_>, incompat: u32, ro: u32) -> Sure<()> {
        if incompat & INCOMPAT_JOURNAL_DEV != 0 {
            return doubt("it is the journal of another filesystem");
        }
        if incompat & !INCOMPAT_KNOWN != 0 || ro & !RO_KNOWN != 0 {
            let (incompat, ro) = (incompat & !INCOMPAT_KNOWN, ro & !RO_KNOWN);
            return doubt(format!("it has features that are not known: incompat {incompat:#x}, ro_compat {ro:#x}"));
        }
        let state = raw.le16(0x3A)?;
        if state & STATE_VALID == 0 {
            return doubt("it was not unmounted cleanly, or is mounted");
        }
        if state & STATE_ERROR != 0 {
            return doubt("it is marked as having errors");
        }
        // While it is mounted there are some; a mount after a crash cleans them up.
        let orphans = raw.le32(0xE8)? != 0 || ro & RO_ORPHAN_PRESENT != 0;
        if orphans && incompat & INCOMPAT_RECOVER == 0 {
            return doubt("it has orphaned inodes that are not cleaned up");
        }
        Ok(())
    }

    fn cluster(raw: &View<'_>, ro: u32, log_block: u32) -> Sure<u64> {
        if ro & RO_BIGALLOC == 0 {
            return Ok(1);
        }
        let log_cluster = raw.le32(0x1C)?;
        if log_cluster < log_block || log_cluster > 20 {
            return doubt(format!("a cluster size of 2^{} bytes", u64::from(log_cluster) + 10));
        }
        Ok(1 << (log_cluster - log_block))
    }

    /// Number of a group's first block.
    pub fn first_of(&self, group: u64) -> u64 {
        self.first_block + group * self.per_group
    }

    /// How many blocks a group has: the last one may be shorter.
    pub fn length_of(&self, group: u64) -> u64 {
        self.per_group.min(self.blocks - self.first_of(group))
    }

    /// Whether a group begins with a copy of the superblock.
    pub fn has_super(&self, group: u64) -> bool {
        match self.sparse {
            _ if group == 0 => true,
            Sparse::Everywhere => true,
            Sparse::Powers => group == 1 || [3, 5, 7].iter().any(|&base| is_power(group, base)),
            Sparse::Two(groups) => groups.iter().any(|&g| u64::from(g) == group),
        }
    }

    /// Number of blocks of descriptors.
    pub fn desc_blocks(&self) -> u64 {
        self.groups.div_ceil(self.desc_per_block)
    }

    /// The block that holds the `number`th block of descriptors.
    pub fn desc_block(&self, number: u64) -> u64 {
        let super_block = 1024 / self.block_size;
        if number < self.first_meta_bg {
            return super_block + 1 + number;
        }
        let group = number * self.desc_per_block;
        // Group 0 of a filesystem whose first block is 0 has its superblock in block 1 with blocks of 1 KiB.
        let shift = u64::from(group == 0 && self.block_size == 1024 && self.first_block == 0);
        self.first_of(group) + u64::from(self.has_super(group)) + shift
    }

    /// The descriptor of one group.
    pub fn group<R: ReadAt>(&self, disk: &Disk<R>, group: u64) -> Sure<Group> {
        let place = self.desc_block(group / self.desc_per_block) * self.block_size;
        let at = place + group % self.desc_per_block * self.desc_size as u64;
        Group::parse(self, disk.read(at, self.desc_size)?.bytes(), group)
    }

    /// How many blocks at the start of a group hold copies of superblock and descriptors, at most.
    pub fn base_blocks(&self, group: u64) -> u64 {
        let mut count = 0;
        if self.has_super(group) {
            count += 1 + u64::from(group == 0 && self.first_block == 0 && self.block_size == 1024);
            count += self.first_meta_bg + self.reserved_gdt;
        }
        if self.meta_bg && group / self.desc_per_block >= self.first_meta_bg {
            let place = group % self.desc_per_block;
            count += u64::from(place <= 1 || place == self.desc_per_block - 1);
        }
        count
    }
}

fn is_power(mut number: u64, base: u64) -> bool {
    while number > 1 && number.is_multiple_of(base) {
        number /= base;
    }
    number == 1
}

/// One group.
#[derive(Clone, Copy, Debug)]
pub struct Group {
    /// Block of the block bitmap.
    pub bitmap: u64,
    /// Block of the inode bitmap.
    pub inodes: u64,
    /// First block of the inode table.
    pub table: u64,
    /// Free clusters.
    pub free: u64,
    /// The block bitmap was never written: only metadata is in use.
    pub uninit: bool,
    /// How many inodes at the end of the table were never used.
    pub unused_inodes: u64,
    /// Checksum of the block bitmap; `None` where there is none.
    pub sum: Option<u32>,
    /// Which bits of it are kept.
    pub sum_mask: u32,
}

impl Group {
    /// Parse the descriptor of group `number`.
    pub fn parse(layout: &Layout, raw: &[u8], number: u64) -> Sure<Self> {
        let flags_count = match layout.sums {
            Sums::None => false,
            Sums::Crc16(uuid) => {
                check_sum(number, View(raw).le16(0x1E)?, sum16(&uuid, number, raw)?)?;
                true
            }
            Sums::Crc32c(seed) => {
                check_sum(number, View(raw).le16(0x1E)?, sum32(seed, number, raw)?)?;
                true
            }
        };
        let raw = View(raw);
        let wide = layout.desc_size >= 64;
        let long = |low: usize, high: usize| -> Sure<u64> {
            Ok(u64::from(raw.le32(low)?) | if wide { u64::from(raw.le32(high)?) << 32 } else { 0 })
        };
        let group = Self {
            bitmap: long(0x0, 0x20)?,
            inodes: long(0x4, 0x24)?,
            table: long(0x8, 0x28)?,
            free: u64::from(raw.le16(0xC)?) | if wide { u64::from(raw.le16(0x2C)?) << 16 } else { 0 },
            uninit: flags_count && raw.le16(0x12)? & 2 != 0,
            unused_inodes: match (flags_count, raw.le16(0x12)? & 1 != 0) {
                (false, _) => 0,
                (true, true) => layout.inodes_per_group,
                (true, false) => u64::from(raw.le16(0x1C)?) | if wide { u64::from(raw.le16(0x32)?) << 16 } else { 0 },
            },
            sum: match layout.sums {
                Sums::Crc32c(_) => {
                    Some(u32::from(raw.le16(0x18)?) | if wide { u32::from(raw.le16(0x38)?) << 16 } else { 0 })
                }
                _ => None,
            },
            sum_mask: if wide { !0 } else { 0xFFFF },
        };
        let fits = |block: u64, count: u64| {
            block >= layout.first_block.max(1) && block.checked_add(count).is_some_and(|end| end <= layout.blocks)
        };
        if !fits(group.bitmap, 1) || !fits(group.inodes, 1) || !fits(group.table, layout.table_blocks) {
            return doubt(format!("group {number} has its metadata outside of the filesystem"));
        }
        Ok(group)
    }
}

fn check_sum(number: u64, said: u16, found: u16) -> Sure<()> {
    if said == found {
        return Ok(());
    }
    doubt(format!("the checksum of group {number}'s descriptor is wrong"))
}

/// `ext4_group_desc_csum` with `gdt_csum`.
pub fn sum16(uuid: &[u8; 16], number: u64, raw: &[u8]) -> Sure<u16> {
    let crc = crc16(crc16(!0, uuid), &(number as u32).to_le_bytes());
    Ok(crc16(crc16(crc, View(raw).part(0, 0x1E)?), &raw[0x20..]))
}

/// `ext4_group_desc_csum` with `metadata_csum`.
pub fn sum32(seed: u32, number: u64, raw: &[u8]) -> Sure<u16> {
    let crc = crc32c(crc32c(seed, &(number as u32).to_le_bytes()), View(raw).part(0, 0x1E)?);
    Ok(crc32c(crc32c(crc, &[0, 0]), &raw[0x20..]) as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn powers() {
        let powers: Vec<u64> = (1..130).filter(|&n| [3, 5, 7].iter().any(|&base| is_power(n, base))).collect();
        assert_eq!(powers, [1, 3, 5, 7, 9, 25, 27, 49, 81, 125]);
    }
}
