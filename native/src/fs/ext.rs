//! ext2, ext3, ext4: the block bitmaps.
//!
//! Sources: the kernel's fs/ext4/balloc.c (`ext4_init_block_bitmap`, `ext4_read_block_bitmap`),
//! fs/ext4/bitmap.c (`ext4_block_bitmap_csum_verify`), and e2fsprogs' lib/ext2fs/rw_bitmaps.c.
//!
//! Invariant: superblock and descriptor copies, bitmaps and inode tables count as used whatever
//! the bitmaps say; so do the boot block, and what follows the last whole block. A bitmap is
//! believed where its checksum holds and it has as many free clusters as its descriptor says. Where
//! the journal had to be replayed first, every block of every file has to be in use by the map, too.

use super::collect::Collector;
use super::disk::{Disk, Piece, ReadAt};
use super::ext_inode::{self, Inode};
use super::ext_layout::{self, Group, Layout, Sums, SUPER};
use super::sums::crc32c;
use super::{doubt, jbd2, Sure, Used};

/// Bytes of bitmaps that are read at once where they stand side by side.
const AHEAD: u64 = 2 << 20;

/// The filesystem's name, where its magic stands.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    ext_layout::name(disk)
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let layout = Layout::parse(&disk.read(SUPER.0, SUPER.1)?.view(), disk.size())?;
    if !layout.unreplayed {
        jbd2::is_empty(disk, &layout)?;
        return Ok(Used { ranges: ranges(disk, &layout)?, note: String::new() });
    }
    let replay = jbd2::read(disk, &layout)?;
    let note = format!("its journal, not replayed yet, is replayed into the map: {} blocks of it", replay.count());
    let after = jbd2::Replayed::over(disk, &layout, replay);
    let layout = Layout::parse(&after.read(SUPER.0, SUPER.1)?.view(), after.size())?;
    let ranges = ranges(&after, &layout)?;
    Files { disk: &after, layout: &layout, ranges: &ranges, budget: ext_inode::budget(&layout) }.check()?;
    Ok(Used { ranges, note })
}

/// What is in use by bitmaps that no replay will change.
fn ranges<R: ReadAt>(disk: &Disk<R>, layout: &Layout) -> Sure<Vec<(u64, u64)>> {
    let walk = Walk { disk, layout };
    let mut found = Collector::default();
    let block = layout.block_size;
    found.add(0, SUPER.0 + SUPER.1 as u64);
    found.add(0, layout.first_block * block);
    for number in 0..layout.desc_blocks() {
        let groups = walk.groups(number)?;
        walk.bitmaps(number * layout.desc_per_block, &groups, &mut found)?;
    }
    found.add(layout.blocks * block, disk.size());
    Ok(found.finish(disk.size()))
}

/// Files against the map, where a journal was replayed: a copy that was made while the device was written has
/// bitmaps, inodes and a journal of different moments, and no checksum tells.
struct Files<'a, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
    ranges: &'a [(u64, u64)],
    budget: u64,
}

impl<R: ReadAt> Files<'_, R> {
    /// Every block of every file is in use.
    fn check(mut self) -> Sure<()> {
        let (layout, walk) = (self.layout, Walk { disk: self.disk, layout: self.layout });
        for number in 0..layout.desc_blocks() {
            let first = number * layout.desc_per_block;
            for (group, at) in walk.groups(number)?.iter().zip(first..) {
                self.table(at * layout.inodes_per_group + 1, group)?;
            }
        }
        Ok(())
    }

    /// The inodes of a group; `first` is the number of its first.
    fn table(&mut self, first: u64, group: &Group) -> Sure<()> {
        let size = self.layout.inode_size as u64;
        let mut left = self.layout.inodes_per_group.saturating_sub(group.unused_inodes) * size;
        let (mut place, mut number) = (group.table * self.layout.block_size, first);
        while left > 0 {
            let length = left.min(AHEAD);
            let piece = self.disk.read(place, length as usize)?;
            for raw in piece.bytes().chunks_exact(size as usize) {
                if let Some(inode) = Inode::parse(self.layout, number, raw)? {
                    self.file(&inode)?;
                }
                number += 1;
            }
            (place, left) = (place + length, left - length);
        }
        Ok(())
    }

    fn file(&mut self, inode: &Inode) -> Sure<()> {
        let (ranges, size) = (self.ranges, self.layout.block_size);
        inode.walk(self.disk, self.layout, &mut self.budget, &mut |_, block, count| {
            let (start, end) = (block.saturating_mul(size), block.saturating_add(count).saturating_mul(size));
            let range = ranges.partition_point(|range| range.0 <= start).checked_sub(1).map(|at| ranges[at]);
            if range.is_some_and(|(_, stop)| end <= stop) {
                return Ok(());
            }
            doubt("files of it take blocks that its bitmaps call free: a copy made while it was written?")
        })
    }
}

struct Walk<'a, R> {
    disk: &'a Disk<R>,
    layout: &'a Layout,
}

impl<R: ReadAt> Walk<'_, R> {
    /// The groups of one block of descriptors.
    fn groups(&self, number: u64) -> Sure<Vec<Group>> {
        let layout = self.layout;
        let place = layout.desc_block(number);
        let first = number * layout.desc_per_block;
        let count = layout.desc_per_block.min(layout.groups - first);
        if place >= layout.blocks {
            return doubt("its group descriptors lie outside of it");
        }
        let block = self.disk.read(place * layout.block_size, layout.block_size as usize)?;
        let descriptors = block.bytes().chunks_exact(layout.desc_size).take(count as usize);
        descriptors.zip(first..).map(|(raw, group)| Group::parse(layout, raw, group)).collect()
    }

    /// Add what is used of some groups; the first of them is `first`.
    fn bitmaps(&self, first: u64, groups: &[Group], found: &mut Collector) -> Sure<()> {
        let size = self.layout.block_size;
        let mut ahead: Option<(u64, u64, Piece)> = None;
        for (at, group) in groups.iter().enumerate() {
            let number = first + at as u64;
            self.metadata(number, group, found);
            if group.uninit {
                continue;
            }
            let held = ahead.as_ref().is_some_and(|(start, end, _)| (*start..*end).contains(&group.bitmap));
            if !held {
                let run = self.run(&groups[at..]);
                let piece = self.disk.read(group.bitmap * size, (run * size) as usize)?;
                ahead = Some((group.bitmap, group.bitmap + run, piece));
            }
            let Some((start, _, piece)) = &ahead else { continue };
            let raw = piece.view().part(((group.bitmap - start) * size) as usize, size as usize)?;
            self.bitmap(number, group, raw, found)?;
        }
        Ok(())
    }

    /// How many of these groups' bitmaps stand side by side, as they do with `flex_bg`.
    fn run(&self, groups: &[Group]) -> u64 {
        let most = (AHEAD / self.layout.block_size).max(1) as usize;
        let start = groups[0].bitmap;
        let beside = groups.iter().take(most).zip(start..).take_while(|(group, block)| group.bitmap == *block);
        beside.count() as u64
    }

    /// What a group's metadata takes, wherever it stands.
    fn metadata(&self, number: u64, group: &Group, found: &mut Collector) {
        let size = self.layout.block_size;
        let base = self.layout.first_of(number);
        let mut add = |block: u64, count: u64| found.add(block * size, (block + count) * size);
        add(base, self.layout.base_blocks(number).min(self.layout.length_of(number)));
        add(group.bitmap, 1);
        add(group.inodes, 1);
        add(group.table, self.layout.table_blocks);
    }

    fn bitmap(&self, number: u64, group: &Group, raw: &[u8], found: &mut Collector) -> Sure<()> {
        let layout = self.layout;
        let clusters = layout.length_of(number).div_ceil(layout.cluster);
        if let (Sums::Crc32c(seed), Some(said)) = (layout.sums, group.sum) {
            let length = (layout.per_group / layout.cluster / 8) as usize;
            let sum = crc32c(seed, super::disk::View(raw).part(0, length)?);
            if sum & group.sum_mask != said {
                return doubt(format!("the checksum of group {number}'s block bitmap is wrong"));
            }
        }
        let base = layout.first_of(number);
        let end = base + layout.length_of(number);
        let mut used = 0;
        runs(raw, clusters as usize, |from, to| {
            used += (to - from) as u64;
            let start = (base + from as u64 * layout.cluster) * layout.block_size;
            let stop = (base + to as u64 * layout.cluster).min(end) * layout.block_size;
            found.add(start, stop);
        });
        if clusters - used != group.free {
            let (seen, said) = (clusters - used, group.free);
            return doubt(format!("the bitmap of group {number} has {seen} free clusters, its descriptor {said}"));
        }
        Ok(())
    }
}

/// Call `each` with every maximal run `[from, to)` of ones among the first `count` bits.
fn runs(bits: &[u8], count: usize, mut each: impl FnMut(usize, usize)) {
    let mut start = None;
    let (words, rest) = bits.as_chunks::<8>();
    let mut tail = [0; 8];
    tail[..rest.len()].copy_from_slice(rest);
    for (number, word) in words.iter().chain(std::iter::once(&tail)).enumerate() {
        let first = number * 64;
        if first >= count {
            break;
        }
        let mut word = u64::from_le_bytes(*word);
        let length = (count - first).min(64) as u32;
        if length < 64 {
            word &= (1 << length) - 1;
        }
        let mut at = 0;
        while at < length {
            let rest = word >> at;
            match start {
                None if rest == 0 => break,
                None => {
                    at += rest.trailing_zeros();
                    start = Some(first + at as usize);
                }
                Some(from) => {
                    at += rest.trailing_ones();
                    if at < length {
                        each(from, first + at as usize);
                        start = None;
                    }
                }
            }
        }
    }
    if let Some(from) = start {
        each(from, count);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_maximal_and_whole(
            bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(255), any::<u8>()], 0..40), cut in 0usize..16,
        ) {
            let count = (bytes.len() * 8).saturating_sub(cut);
            let mut bits = vec![false; count];
            let mut last = None;
            runs(&bytes, count, |from, to| {
                assert!(from < to && last.is_none_or(|end| end < from));
                bits[from..to].fill(true);
                last = Some(to);
            });
            for (at, &bit) in bits.iter().enumerate() {
                prop_assert_eq!(bit, bytes[at / 8] >> (at % 8) & 1 == 1);
            }
        }
    }
}
