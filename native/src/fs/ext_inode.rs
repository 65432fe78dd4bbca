//! Inodes of ext2, ext3 and ext4: which blocks they refer to.
//!
//! Sources: the kernel's fs/ext4/ext4.h (`struct ext4_inode`), fs/ext4/ext4_extents.h,
//! fs/ext4/extents.c (`__ext4_ext_check`), fs/ext4/inode.c (`ext4_inode_csum`), fs/ext4/indirect.c.
//!
//! Invariant: every block that an inode refers to is told of, or there is a `Doubt`: wrong checksums, depths
//! and orders are. Blocks of references are read at most as often as the budget allows, however many
//! inodes share them.

use super::disk::{Disk, Piece, ReadAt, View};
use super::ext_layout::{Layout, Sums};
use super::sums::crc32c;
use super::{doubt, Sure};

const EXTENTS: u32 = 0x8_0000;
const INLINE: u32 = 0x1000_0000;
const EXTENT_MAGIC: u16 = 0xF30A;
const MOST_DEPTH: u16 = 5;

/// Called with the first logical block (`None`: a block that the inode is made of), the first block and how many.
pub type Each<'a> = &'a mut dyn FnMut(Option<u64>, u64, u64) -> Sure<()>;

/// Blocks of references that are read at most: those of 8 TiB of ext3, or of 700 million extents.
const MOST_READ: u64 = 1 << 21;

/// How many blocks of references may be read: each has a block of its own to refer to.
pub fn budget(layout: &Layout) -> u64 {
    MOST_READ.min(layout.blocks / 2)
}

/// One inode in use.
pub struct Inode {
    flags: u32,
    /// 60 bytes: the extent tree's root, or numbers of blocks.
    root: Vec<u8>,
    /// Block of extended attributes; 0 for none.
    attributes: u64,
    /// Whether `root` refers to blocks.
    has_blocks: bool,
    /// Seed of the checksums of its extent blocks.
    seed: Option<u32>,
}

impl Inode {
    /// Read an inode by its number, which counts from 1.
    pub fn read<R: ReadAt>(disk: &Disk<R>, layout: &Layout, number: u64) -> Sure<Self> {
        let missing = || doubt(format!("inode {number} of it is not in use"));
        let Some(index) = number.checked_sub(1) else { return missing() };
        let group = index / layout.inodes_per_group;
        if group >= layout.groups {
            return missing();
        }
        let table = layout.group(disk, group)?.table;
        let at = table * layout.block_size + index % layout.inodes_per_group * layout.inode_size as u64;
        let piece = disk.read(at, layout.inode_size)?;
        match Self::parse(layout, number, piece.bytes())? {
            Some(inode) => Ok(inode),
            None => missing(),
        }
    }

    /// Parse an inode; `None` where nothing links to it.
    pub fn parse(layout: &Layout, number: u64, bytes: &[u8]) -> Sure<Option<Self>> {
        let raw = View(bytes);
        if raw.le16(0x1A)? == 0 {
            return Ok(None);
        }
        let seed = match layout.sums {
            Sums::Crc32c(seed) => {
                let own = crc32c(crc32c(seed, &(number as u32).to_le_bytes()), raw.part(0x64, 4)?);
                check_sum(&raw, number, own)?;
                Some(own)
            }
            _ => None,
        };
        let (mode, flags) = (raw.le16(0)?, raw.le32(0x20)?);
        let attributes = u64::from(raw.le32(0x68)?) | if layout.wide { u64::from(raw.le16(0x76)?) << 32 } else { 0 };
        let size = u64::from(raw.le32(0x4)?) | u64::from(raw.le32(0x6C)?) << 32;
        let has_blocks = match mode & 0xF000 {
            0x8000 | 0x4000 => true,
            // A short link's target stands where the blocks would be told.
            0xA000 => flags & EXTENTS != 0 || size >= 60,
            // Reserved ones, the resize inode for one, have no type, or that of a file.
            0 => true,
            _ => false,
        };
        let root = raw.part(0x28, 60)?.to_vec();
        Ok(Some(Self { flags, root, attributes, has_blocks: has_blocks && flags & INLINE == 0, seed }))
    }

    /// Tell of every block, in order of the file.
    pub fn walk<R: ReadAt>(&self, disk: &Disk<R>, layout: &Layout, budget: &mut u64, each: Each<'_>) -> Sure<()> {
        if self.attributes != 0 {
            each(None, self.attributes, 1)?;
        }
        if !self.has_blocks {
            return Ok(());
        }
        let mut walk = Walk { disk, layout, budget, each, seed: self.seed, next: 0 };
        if self.flags & EXTENTS != 0 {
            let depth = View(&self.root).le16(6)?;
            return if depth > MOST_DEPTH { bad() } else { walk.extents(&View(&self.root), depth) };
        }
        for slot in 0..15 {
            let block = u64::from(View(&self.root).le32(4 * slot)?);
            walk.indirect(block, slot.saturating_sub(11) as u32)?;
        }
        Ok(())
    }
}

fn bad<T>() -> Sure<T> {
    doubt("the blocks of a file of it are told of in a way that makes no sense")
}

/// `ext4_inode_csum`: 16 bits in the first 128 bytes, and 16 behind them where the inode has room.
fn check_sum(raw: &View<'_>, number: u64, own: u32) -> Sure<()> {
    let bytes = raw.0;
    let mut sum = crc32c(crc32c(own, raw.part(0, 0x7C)?), &[0; 2]);
    let mut said = u32::from(raw.le16(0x7C)?);
    let mut kept = 0xFFFF;
    if bytes.len() == 128 {
        sum = crc32c(sum, &bytes[0x7E..]);
    } else {
        sum = crc32c(sum, raw.part(0x7E, 0x82 - 0x7E)?);
        let extra = usize::from(raw.le16(0x80)?);
        if extra >= 4 {
            sum = crc32c(sum, &[0; 2]);
            said |= u32::from(raw.le16(0x82)?) << 16;
            kept = !0;
        } else {
            sum = crc32c(sum, raw.part(0x82, 2)?);
        }
        sum = crc32c(sum, &bytes[0x84..]);
    }
    if sum & kept == said {
        return Ok(());
    }
    doubt(format!("the checksum of inode {number} is wrong"))
}

struct Walk<'a, 'b, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
    budget: &'a mut u64,
    each: Each<'b>,
    seed: Option<u32>,
    /// The logical block that comes next at the earliest.
    next: u64,
}

impl<R: ReadAt> Walk<'_, '_, R> {
    fn read(&mut self, block: u64) -> Sure<Piece> {
        let Some(left) = self.budget.checked_sub(1) else { return bad() };
        *self.budget = left;
        (self.each)(None, block, 1)?;
        self.disk.read(block.saturating_mul(self.layout.block_size), self.layout.block_size as usize)
    }

    fn extents(&mut self, raw: &View<'_>, depth: u16) -> Sure<()> {
        let (count, most) = (usize::from(raw.le16(2)?), usize::from(raw.le16(4)?));
        if raw.le16(0)? != EXTENT_MAGIC || raw.le16(6)? != depth || count > most || 12 + 12 * most > raw.0.len() {
            return bad();
        }
        for at in (12..).step_by(12).take(count) {
            let logical = u64::from(raw.le32(at)?);
            if logical < self.next {
                return bad();
            }
            if depth > 0 {
                let child = u64::from(raw.le32(at + 4)?) | u64::from(raw.le16(at + 8)?) << 32;
                let piece = self.read(child)?;
                self.check_sum(&piece)?;
                self.extents(&piece.view(), depth - 1)?;
                continue;
            }
            // Above 32768: room that was never written to.
            let length = match u64::from(raw.le16(at + 4)?) {
                length @ ..=32768 => length,
                more => more - 32768,
            };
            let block = u64::from(raw.le32(at + 8)?) | u64::from(raw.le16(at + 6)?) << 32;
            if length == 0 {
                return bad();
            }
            (self.each)(Some(logical), block, length)?;
            self.next = logical + length;
        }
        Ok(())
    }

    /// `ext4_extent_block_csum`: what follows the last place for an extent.
    fn check_sum(&self, piece: &Piece) -> Sure<()> {
        let Some(seed) = self.seed else { return Ok(()) };
        let raw = piece.view();
        let tail = 12 + 12 * usize::from(raw.le16(4)?);
        if crc32c(seed, raw.part(0, tail)?) == raw.le32(tail)? {
            return Ok(());
        }
        doubt("the checksum of a file's extents is wrong")
    }

    /// A block that the file refers to directly (`level` 0), or by blocks of references.
    fn indirect(&mut self, block: u64, level: u32) -> Sure<()> {
        let per_block = self.layout.block_size / 4;
        if block == 0 {
            self.next += per_block.pow(level);
            return Ok(());
        }
        if level == 0 {
            (self.each)(Some(self.next), block, 1)?;
            self.next += 1;
            return Ok(());
        }
        let piece = self.read(block)?;
        for at in 0..per_block as usize {
            self.indirect(u64::from(piece.view().le32(4 * at)?), level - 1)?;
        }
        Ok(())
    }
}
