//! exFAT: what is in use, by its allocation bitmap.
//!
//! Invariant: a map comes only from a volume that was unmounted cleanly, whose boot region has
//! the right checksum, and whose bitmap names its own clusters and the root folder's as used. All
//! before the first cluster counts as used.
//!
//! Sources: Microsoft, "exFAT file system specification" (revision 1.00, August 2019), sections
//! 3, 4, 6.2, 7.1; Linux, `fs/exfat/exfat_raw.h`, `super.c` (`exfat_read_boot_sector`), `balloc.c`
//! (`exfat_load_bitmap`, which takes the bitmap for one run of clusters, as here).

use super::bits;
use super::collect::Collector;
use super::disk::{Disk, ReadAt, View};
use super::{doubt, slack, Sure, Used};

/// A root folder of more clusters than this is not looked through.
const MOST_ROOT: u64 = 64 << 20;
const BITMAP: u8 = 0x81;
const END: u32 = 0xFFFF_FFFF;

/// What the boot sector says, checked. In bytes where not said otherwise.
struct Volume {
    sector: u64,
    cluster: u64,
    fat_at: u64,
    heap_at: u64,
    clusters: u64,
    root: u32,
    end: u64,
    flags: u16,
}

/// `exfat`, where the boot sector says so.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    let piece = disk.read(0, 512).ok()?;
    let boot = piece.bytes();
    (&boot[3..11] == b"EXFAT   " && boot[510..512] == [0x55, 0xAA]).then_some("exfat")
}

fn parse(boot: View<'_>, size: u64) -> Sure<Volume> {
    if boot.part(3, 8)? != b"EXFAT   " || boot.le16(510)? != 0xAA55 {
        return doubt("its boot sector is none of an exFAT");
    }
    let (sector_shift, cluster_shift, fats) = (boot.u8(108)?, boot.u8(109)?, boot.u8(110)?);
    if !(9..=12).contains(&sector_shift) || cluster_shift > 25 - sector_shift {
        return doubt("its boot sector has numbers that cannot be");
    }
    if fats != 1 {
        return doubt("it keeps two tables (TexFAT)");
    }
    let sector = 1u64 << sector_shift;
    let cluster = sector << cluster_shift;
    let length = boot.le64(72)?;
    let end = length.checked_mul(sector).filter(|&end| end <= size);
    let (fat, fat_length) = (u64::from(boot.le32(80)?), u64::from(boot.le32(84)?));
    let (heap, clusters) = (u64::from(boot.le32(88)?), u64::from(boot.le32(92)?));
    let root = boot.le32(96)?;
    let Some(end) = end else {
        return doubt("its boot sector names a size that is not its partition's");
    };
    let fits = fat >= 24
        && fat + fat_length <= heap
        && (clusters + 2) * 4 <= fat_length * sector
        && clusters > 0
        && clusters <= 0xFFFF_FFF5
        && heap * sector + clusters * cluster <= end
        && root >= 2
        && u64::from(root) < clusters + 2;
    if !fits {
        return doubt("its boot sector places things that do not fit");
    }
    Ok(Volume {
        sector,
        cluster,
        fat_at: fat * sector,
        heap_at: heap * sector,
        clusters,
        root,
        end,
        flags: boot.le16(106)?,
    })
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let piece = disk.read(0, 512)?;
    let volume = parse(piece.view(), disk.size())?;
    check_region(disk, &volume)?;
    if volume.flags & 2 != 0 {
        return doubt("it was not unmounted cleanly: its dirty flag is set");
    }
    if volume.flags & 4 != 0 {
        return doubt("it says that errors were met");
    }
    if volume.flags & 1 != 0 {
        return doubt("its second table is the active one (TexFAT)");
    }
    let (first, length) = find_bitmap(disk, &volume)?;
    let needed = volume.clusters.div_ceil(8);
    if length < needed {
        return doubt("its allocation bitmap is too short");
    }
    let count = needed.div_ceil(volume.cluster);
    check_run(disk, &volume, first, count)?;
    let mut out = Collector::default();
    out.add(0, volume.heap_at);
    let place = volume.heap_at + u64::from(first - 2) * volume.cluster;
    let own = u64::from(first - 2)..u64::from(first - 2) + count;
    let root = u64::from(volume.root - 2);
    let (mut seen, mut root_seen) = (0, false);
    bits::runs(disk, place, volume.clusters, |start, end| {
        out.add(volume.heap_at + start * volume.cluster, volume.heap_at + end * volume.cluster);
        seen += end.min(own.end).saturating_sub(start.max(own.start));
        root_seen |= (start..end).contains(&root);
    })?;
    if seen != count || !root_seen {
        return doubt("its allocation bitmap calls its own clusters, or the root folder's, free");
    }
    out.add(volume.heap_at + volume.clusters * volume.cluster, volume.end);
    slack(&mut out, volume.end, disk.size());
    Ok(Used { ranges: out.finish(disk.size()), note: String::new() })
}

/// The checksum over the first eleven sectors, which the twelfth repeats (3.4).
fn check_region<R: ReadAt>(disk: &Disk<R>, volume: &Volume) -> Sure<()> {
    let region = disk.read(0, 12 * volume.sector as usize)?;
    let (covered, told) = region.bytes().split_at(11 * volume.sector as usize);
    let mut sum = 0u32;
    for (at, &byte) in covered.iter().enumerate() {
        if !matches!(at, 106 | 107 | 112) {
            sum = sum.rotate_right(1).wrapping_add(u32::from(byte));
        }
    }
    if told.chunks_exact(4).any(|word| word != sum.to_le_bytes()) {
        return doubt("its boot region has a wrong checksum");
    }
    Ok(())
}

fn next<R: ReadAt>(disk: &Disk<R>, volume: &Volume, cluster: u32) -> Sure<u32> {
    disk.read(volume.fat_at + u64::from(cluster) * 4, 4)?.view().le32(0)
}

fn inside(volume: &Volume, cluster: u32) -> bool {
    cluster >= 2 && u64::from(cluster) < volume.clusters + 2
}

/// First cluster and length of the allocation bitmap: an entry of the root folder.
fn find_bitmap<R: ReadAt>(disk: &Disk<R>, volume: &Volume) -> Sure<(u32, u64)> {
    let mut cluster = volume.root;
    // A chain that leads back to itself ends here as well.
    let most = (MOST_ROOT / volume.cluster).max(1).min(volume.clusters);
    for _ in 0..most {
        let place = volume.heap_at + u64::from(cluster - 2) * volume.cluster;
        let step = volume.cluster.min(1 << 20);
        for part in 0..volume.cluster / step {
            let piece = disk.read(place + part * step, step as usize)?;
            for entry in piece.bytes().chunks_exact(32) {
                if entry[0] == 0 {
                    return doubt("its root folder names no allocation bitmap");
                }
                if entry[0] == BITMAP {
                    let view = View(entry);
                    let (first, length) = (view.le32(20)?, view.le64(24)?);
                    if entry[1] & 1 != 0 || !inside(volume, first) {
                        return doubt("its root folder names an allocation bitmap that cannot be");
                    }
                    return Ok((first, length));
                }
            }
        }
        cluster = next(disk, volume, cluster)?;
        if !inside(volume, cluster) {
            return doubt("its root folder names no allocation bitmap");
        }
    }
    doubt("its root folder is larger than can be looked through")
}

/// Doubt unless `count` clusters from `first` are one chain, in order, that ends there.
fn check_run<R: ReadAt>(disk: &Disk<R>, volume: &Volume, first: u32, count: u64) -> Sure<()> {
    if u64::from(first) + count > volume.clusters + 2 {
        return doubt("its allocation bitmap reaches beyond its end");
    }
    let mut at = 0;
    while at < count {
        let some = (count - at).min(1 << 18);
        let table = disk.read(volume.fat_at + (u64::from(first) + at) * 4, some as usize * 4)?;
        for index in 0..some {
            let value = table.view().le32(index as usize * 4)?;
            let wanted = if at + index + 1 == count { None } else { Some(u64::from(first) + at + index + 1) };
            // A bitmap may have clusters to spare, behind those that are needed.
            let fits = wanted.map_or(value == END || inside(volume, value), |next| u64::from(value) == next);
            if !fits {
                return doubt("its allocation bitmap is not one run of clusters");
            }
        }
        at += some;
    }
    Ok(())
}
