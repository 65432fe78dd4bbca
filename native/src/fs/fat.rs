//! FAT12, FAT16 and FAT32: what is in use, by the first File Allocation Table.
//!
//! Invariant: a map comes only from a volume that was unmounted cleanly, whose tables are alike
//! and point nowhere outside. All before the first cluster counts as used; a cluster that is
//! marked bad does not, for nothing is kept there.
//!
//! Sources: Microsoft, "FAT: General Overview of On-Disk Format" 1.03; Linux,
//! `include/uapi/linux/msdos_fs.h`, `fs/fat/inode.c` (`fat_read_bpb`, `fat_fill_super`, which
//! decides between the three by the rules used here), `fs/fat/fatent.c`.

use super::collect::Collector;
use super::disk::{Disk, ReadAt, View};
use super::{doubt, slack, Sure, Used};

/// FAT12 has at most so many clusters (`MAX_FAT12`).
const MAX_FAT12: u64 = 0xFF4;
/// FAT16 has at most so many.
const MAX_FAT16: u64 = 0xFFF4;
/// FAT32 has at most so many (`MAX_FAT32`).
const MAX_FAT32: u64 = 0x0FFF_FFF6;
/// Bytes of a table that are looked at in one go: whole entries of 12, 16 and 32 bits.
const STEP: u64 = 3 << 20;

/// What the boot sector says, checked. In bytes where not said otherwise.
#[derive(Debug, Clone, Copy)]
struct Volume {
    bits: u32,
    fats: u64,
    fat_at: u64,
    fat_size: u64,
    data_at: u64,
    cluster: u64,
    clusters: u64,
    end: u64,
    root: u64,
    dirty: bool,
    one_fat_active: bool,
}

/// `fat12`, `fat16` or `fat32`, where a boot sector stands that makes sense.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    let piece = disk.read(0, 512).ok()?;
    let volume = parse(piece.view(), u64::MAX).ok()?;
    Some(match volume.bits {
        12 => "fat12",
        16 => "fat16",
        _ => "fat32",
    })
}

fn parse(boot: View<'_>, size: u64) -> Sure<Volume> {
    let start = boot.part(0, 3)?;
    if boot.le16(510)? != 0xAA55 || !(start[0] == 0xE9 || start[0] == 0xEB) {
        return doubt("its boot sector is none of a FAT");
    }
    if matches!(boot.part(3, 8)?, b"NTFS    " | b"EXFAT   ") {
        return doubt("its boot sector is none of a FAT");
    }
    let sector = u64::from(boot.le16(11)?);
    let per_cluster = u64::from(boot.u8(13)?);
    let reserved = u64::from(boot.le16(14)?);
    let fats = u64::from(boot.u8(16)?);
    let root_entries = u64::from(boot.le16(17)?);
    let media = boot.u8(21)?;
    let small = u64::from(boot.le16(19)?);
    let total = if small != 0 { small } else { u64::from(boot.le32(32)?) };
    let size16 = u64::from(boot.le16(22)?);
    let wide = size16 == 0;
    let fat_sectors = if wide { u64::from(boot.le32(36)?) } else { size16 };
    let sane = sector.is_power_of_two()
        && (512..=4096).contains(&sector)
        && per_cluster.is_power_of_two()
        && reserved > 0
        && (1..=4).contains(&fats)
        && (media == 0xF0 || media >= 0xF8)
        && fat_sectors > 0
        && (root_entries * 32).is_multiple_of(sector)
        && (wide == (root_entries == 0));
    if !sane {
        return doubt("its boot sector has numbers that cannot be");
    }
    let data = reserved + fats * fat_sectors + root_entries * 32 / sector;
    if data >= total || total * sector > size {
        return doubt("its boot sector names a size that cannot be");
    }
    let clusters = (total - data) / per_cluster;
    let bits = match (wide, clusters) {
        (true, _) => 32,
        (false, count) if count > MAX_FAT12 => 16,
        _ => 12,
    };
    let most = [(12, MAX_FAT12), (16, MAX_FAT16), (32, MAX_FAT32)].iter().find(|m| m.0 == bits).map_or(0, |m| m.1);
    let needed = ((clusters + 2) * u64::from(bits)).div_ceil(8);
    if clusters == 0 || clusters > most || fat_sectors * sector < needed {
        return doubt("its table is too small for its clusters");
    }
    if wide && boot.le16(42)? != 0 {
        return doubt("it has a version of FAT32 that is not known");
    }
    let state = boot.u8(if wide { 65 } else { 37 })?;
    let flags = if wide { boot.le16(40)? } else { 0 };
    Ok(Volume {
        bits,
        fats,
        fat_at: reserved * sector,
        fat_size: fat_sectors * sector,
        data_at: data * sector,
        cluster: per_cluster * sector,
        clusters,
        end: total * sector,
        root: if wide { u64::from(boot.le32(44)?) } else { 0 },
        dirty: state & 1 != 0,
        one_fat_active: flags & 0x80 != 0,
    })
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let piece = disk.read(0, 512)?;
    let volume = parse(piece.view(), disk.size())?;
    if volume.dirty {
        return doubt("it was not unmounted cleanly: the dirty flag in its boot sector is set");
    }
    if volume.one_fat_active {
        return doubt("its tables are not kept alike");
    }
    let mut out = Collector::default();
    out.add(0, volume.data_at);
    let needed = ((volume.clusters + 2) * u64::from(volume.bits)).div_ceil(8);
    let mut root_used = volume.bits != 32;
    let mut at = 0;
    while at < needed {
        let length = STEP.min(needed - at);
        let table = disk.read(volume.fat_at + at, length as usize)?;
        for copy in 1..volume.fats {
            let other = disk.read(volume.fat_at + copy * volume.fat_size + at, length as usize)?;
            if other.bytes() != table.bytes() {
                return doubt("its two tables differ");
            }
        }
        let first = at * 8 / u64::from(volume.bits);
        let last = (first + length * 8 / u64::from(volume.bits)).min(volume.clusters + 2);
        for number in first..last {
            let entry = entry(table.view(), volume.bits, number - first)?;
            if number < 2 {
                if number == 1 {
                    clean(entry, volume.bits)?;
                }
                continue;
            }
            match judge(entry, volume.bits, volume.clusters) {
                Judged::Free => {}
                Judged::Used => {
                    let start = volume.data_at + (number - 2) * volume.cluster;
                    out.add(start, start + volume.cluster);
                    root_used |= number == volume.root;
                }
                Judged::Wrong => return doubt(format!("the entry of cluster {number} in its table points outside")),
            }
        }
        at += length;
    }
    if !root_used {
        return doubt("its table calls the root folder free");
    }
    // Sectors at the end that make no whole cluster.
    out.add(volume.data_at + volume.clusters * volume.cluster, volume.end);
    slack(&mut out, volume.end, disk.size());
    Ok(Used { ranges: out.finish(disk.size()), note: String::new() })
}

fn entry(table: View<'_>, bits: u32, index: u64) -> Sure<u32> {
    let index = index as usize;
    Ok(match bits {
        12 => {
            let at = index + index / 2;
            let pair = u32::from(table.u8(at)?) | u32::from(table.u8(at + 1)?) << 8;
            if index.is_multiple_of(2) {
                pair & 0xFFF
            } else {
                pair >> 4
            }
        }
        16 => u32::from(table.le16(index * 2)?),
        _ => table.le32(index * 4)? & 0x0FFF_FFFF,
    })
}

/// The second entry says whether the volume was left cleanly, and without hardware errors.
fn clean(entry: u32, bits: u32) -> Sure<()> {
    let (unmounted, whole) = match bits {
        12 => return Ok(()),
        16 => (0x8000, 0x4000),
        _ => (0x0800_0000, 0x0400_0000),
    };
    if entry & unmounted == 0 {
        return doubt("it was not unmounted cleanly: the dirty flag in its table is set");
    }
    if entry & whole == 0 {
        return doubt("its table says that errors were met");
    }
    Ok(())
}

enum Judged {
    Free,
    Used,
    Wrong,
}

fn judge(entry: u32, bits: u32, clusters: u64) -> Judged {
    let bad = match bits {
        12 => 0xFF7,
        16 => 0xFFF7,
        _ => 0x0FFF_FFF7,
    };
    if entry == 0 || entry == bad {
        Judged::Free
    } else if entry > bad || (entry >= 2 && u64::from(entry) < clusters + 2) {
        Judged::Used
    } else {
        Judged::Wrong
    }
}

#[cfg(test)]
mod tests {
    use super::super::memory::{mutations, Memory};
    use super::*;
    use proptest::prelude::*;

    /// A volume of FAT16 with a chain, a bad cluster, and free ones.
    fn sample() -> Vec<u8> {
        let mut disk = vec![0u8; 4096 * 512 * 4];
        disk[0] = 0xEB;
        disk[11..13].copy_from_slice(&512u16.to_le_bytes());
        disk[13] = 1;
        disk[14..16].copy_from_slice(&1u16.to_le_bytes());
        disk[16] = 2;
        disk[17..19].copy_from_slice(&512u16.to_le_bytes());
        disk[19..21].copy_from_slice(&16000u16.to_le_bytes());
        disk[21] = 0xF8;
        disk[22..24].copy_from_slice(&64u16.to_le_bytes());
        disk[510..512].copy_from_slice(&0xAA55u16.to_le_bytes());
        for fat in [512, 512 + 64 * 512] {
            for (index, value) in [(0, 0xFFF8u16), (1, 0xFFFF), (2, 3), (3, 0xFFFF), (5, 0xFFF7), (9, 0xFFF8)] {
                disk[fat + index * 2..fat + index * 2 + 2].copy_from_slice(&value.to_le_bytes());
            }
        }
        disk
    }

    fn answer(disk: Vec<u8>) -> Sure<Used> {
        let size = disk.len() as u64;
        used(&Disk::new(Memory(disk), 0, size).expect("a range"))
    }

    #[test]
    fn a_chain_is_used_and_a_bad_cluster_is_not() {
        let size = sample().len() as u64;
        let found = answer(sample()).expect("a map").ranges;
        let data = (1 + 128 + 32) * 512;
        let end = 16000 * 512;
        assert_eq!(found, [(0, data + 1024), (data + 7 * 512, data + 8 * 512), (end, size)]);
    }

    #[test]
    fn doubts() {
        let change = |at: usize, byte: u8| {
            let mut disk = sample();
            disk[at] = byte;
            answer(disk).expect_err("a doubt").0
        };
        assert!(change(37, 1).contains("dirty flag in its boot sector"));
        assert!(change(512 + 4, 9).contains("differ"));
        let both = |at: usize, byte: u8| {
            let mut disk = sample();
            disk[512 + at] = byte;
            disk[512 + 64 * 512 + at] = byte;
            answer(disk).expect_err("a doubt").0
        };
        assert!(both(3, 0x7F).contains("dirty flag in its table"));
        assert!(both(3, 0xBF).contains("errors"));
        assert!(both(9, 0xF0).contains("points outside"));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]
        #[test]
        fn no_bytes_make_it_fail(changes in mutations(2048)) {
            let mut disk = sample();
            for (at, byte) in changes {
                disk[at] = byte;
            }
            let size = disk.len() as u64;
            let disk = Disk::new(Memory(disk), 0, size).expect("a range");
            let _ = probe(&disk);
            if let Ok(found) = used(&disk) {
                prop_assert!(found.ranges.iter().all(|r| r.0 < r.1 && r.1 <= size));
            }
        }
    }
}
