//! NTFS: what is in use, by `$Bitmap`.
//!
//! Invariant: a map comes only from a volume that is not marked dirty, whose log holds nothing to
//! replay, that no Windows hibernated on, whose first file records are whole and equal to their
//! mirror, and whose bitmap names the system files' own clusters as used. What stands behind the
//! volume (the backup boot sector) counts as used.
//!
//! Sources: Linux, `fs/ntfs3/ntfs.h`, `super.c` (`ntfs_init_from_boot`), `fs/ntfs/layout.h` (up to
//! 6.8); ntfs-3g, `libntfs-3g/logfile.c` (`ntfs_is_logfile_clean`), `volume.c`
//! (`ntfs_volume_check_hiberfile`), `mst.c` (fixups), `runlist.c` (`ntfs_mapping_pairs_decompress`).

use super::bits::Finder;
use super::collect::Collector;
use super::disk::{Disk, Piece, ReadAt, View, LONGEST};
use super::ntfs_record::{attribute, Content, Record, Run, DATA, INDEX_ALLOCATION, INDEX_ROOT, VOLUME_INFORMATION};
use super::{doubt, slack, Sure, Used};

/// Numbers of the file records that are looked at.
const MFT: u64 = 0;
const MIRROR: u64 = 1;
const LOG: u64 = 2;
const VOLUME: u64 = 3;
const ROOT: u64 = 5;
const BITMAP: u64 = 6;
const BOOT: u64 = 7;
/// A root folder whose index is larger is not looked through.
const MOST_INDEX: u64 = 64 << 20;

/// What the boot sector says, checked. In bytes where not said otherwise.
struct Volume {
    cluster: u64,
    clusters: u64,
    sectors_end: u64,
    mft: u64,
    mirror: u64,
    record: usize,
}

/// `ntfs`, where the boot sector says so.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    let piece = disk.read(0, 512).ok()?;
    let boot = piece.bytes();
    (&boot[3..11] == b"NTFS    " && boot[510..512] == [0x55, 0xAA]).then_some("ntfs")
}

fn parse(boot: View<'_>, size: u64) -> Sure<Volume> {
    let sector = u64::from(boot.le16(11)?);
    let per = boot.u8(13)?;
    // More than 128 sectors a cluster are written as a negative power of two.
    let per = if per <= 0x80 { u64::from(per) } else { 1u64 << (256 - u64::from(per)).min(32) };
    let total = boot.le64(40)?;
    let cluster = sector * per;
    let record = match boot.u8(64)? {
        shift @ 0x80.. => 1u64 << (256 - u64::from(shift)).min(32),
        count => u64::from(count) * cluster,
    };
    let sane = (512..=4096).contains(&sector)
        && sector.is_power_of_two()
        && per.is_power_of_two()
        && cluster <= 2 << 20
        && (512..=4096).contains(&record)
        && record.is_power_of_two();
    if !sane {
        return doubt("its boot sector has numbers that cannot be");
    }
    let Some(end) = total.checked_mul(sector).filter(|&end| end <= size && end >= cluster) else {
        return doubt("its boot sector names a size that is not its partition's");
    };
    let (mft, mirror) = (boot.le64(48)?, boot.le64(56)?);
    let clusters = total / per;
    if mft >= clusters || mirror >= clusters {
        return doubt("its boot sector places the file table outside");
    }
    Ok(Volume { cluster, clusters, sectors_end: end, mft, mirror, record: record as usize })
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let piece = disk.read(0, 512)?;
    let volume = parse(piece.view(), disk.size())?;
    let walk = Walk::open(disk, volume)?;
    walk.check_mirror()?;
    walk.check_flags()?;
    walk.check_log()?;
    walk.check_hibernation()?;
    walk.map()
}

struct Walk<'a, R> {
    disk: &'a Disk<R>,
    volume: Volume,
    mft: Vec<Run>,
}

impl<'a, R: ReadAt> Walk<'a, R> {
    fn open(disk: &'a Disk<R>, volume: Volume) -> Sure<Self> {
        let raw = disk.read(volume.mft * volume.cluster, volume.record)?;
        let record = Record::parse(raw.bytes(), MFT)?;
        let Content::Runs { runs, .. } = attribute(&record, DATA, &[], volume.clusters)?.content else {
            return doubt("its file table is not kept in clusters");
        };
        if runs.first().map(|run| run.place) != Some(Some(volume.mft)) {
            return doubt("its file table is not where the boot sector says");
        }
        Ok(Self { disk, volume, mft: runs })
    }

    /// Bytes of a file that is kept in clusters. What is sparse or outside is a doubt.
    fn read(&self, runs: &[Run], at: u64, length: usize) -> Sure<Piece> {
        let cluster = self.volume.cluster;
        let mut first = 0;
        for run in runs {
            let size = run.length * cluster;
            if at >= first && at - first < size {
                let Some(place) = run.place else {
                    return doubt("a system file of it has holes");
                };
                if at - first + length as u64 > size {
                    return doubt("a system file of it is in pieces that are too small");
                }
                return self.disk.read(place * cluster + (at - first), length);
            }
            first += size;
        }
        doubt("a system file of it is shorter than it should be, or its record goes on elsewhere")
    }

    fn record(&self, number: u64) -> Sure<Record> {
        let Some(at) = number.checked_mul(self.volume.record as u64) else {
            return doubt("it refers to a file record that cannot be");
        };
        Record::parse(self.read(&self.mft, at, self.volume.record)?.bytes(), number)
    }

    fn content(&self, number: u64) -> Sure<Content> {
        Ok(attribute(&self.record(number)?, DATA, &[], self.volume.clusters)?.content)
    }

    /// The first four records have a copy, which ntfs-3g and Windows compare before they mount.
    fn check_mirror(&self) -> Sure<()> {
        for number in 0..4u64 {
            let at = number * self.volume.record as u64;
            let one = self.read(&self.mft, at, self.volume.record)?;
            let other = self.disk.read(self.volume.mirror * self.volume.cluster + at, self.volume.record)?;
            if one.bytes() != other.bytes() {
                return doubt("its file table and the copy of its begin differ");
            }
        }
        Ok(())
    }

    fn check_flags(&self) -> Sure<()> {
        let record = self.record(VOLUME)?;
        let Content::Here(bytes) = attribute(&record, VOLUME_INFORMATION, &[], 0)?.content else {
            return doubt("its volume flags are not where they belong");
        };
        if View(&bytes).le16(10)? & 1 != 0 {
            return doubt("it was not unmounted cleanly: its dirty flag is set");
        }
        Ok(())
    }

    /// The log is clean where it was wiped (all ones), or where its newest restart page says so.
    fn check_log(&self) -> Sure<()> {
        let Content::Runs { runs, .. } = self.content(LOG)? else {
            return doubt("its log is not kept in clusters");
        };
        let first = self.read(&runs, 0, 512)?;
        if first.bytes()[..4] == [0xFF; 4] {
            return Ok(());
        }
        if &first.bytes()[..4] != b"RSTR" {
            return doubt("its log is not one that is known");
        }
        let page = u64::from(first.view().le32(16)?);
        if !(512..=65536).contains(&page) || !page.is_power_of_two() {
            return doubt("its log has numbers that cannot be");
        }
        let mut newest: Option<(u64, bool)> = None;
        for at in [0, page] {
            let piece = self.read(&runs, at, 512)?;
            let view = piece.view();
            if view.part(0, 4)? != b"RSTR" {
                continue;
            }
            let area = usize::from(view.le16(24)?);
            // The words that a fixup stands for are the last two of a sector.
            if !(area >= 30 && area + 16 <= 510 && area.is_multiple_of(8)) {
                return doubt("its log has a restart page that cannot be");
            }
            let (lsn, clients, flags) = (view.le64(area)?, view.le16(area + 12)?, view.le16(area + 14)?);
            if newest.is_none_or(|found| lsn >= found.0) {
                newest = Some((lsn, clients == 0xFFFF || flags & 2 != 0));
            }
        }
        match newest {
            Some((_, true)) => Ok(()),
            _ => doubt("its log has changes that are not replayed"),
        }
    }

    /// Windows that hibernated, or was shut down with fast startup, goes on from what it keeps in memory.
    fn check_hibernation(&self) -> Sure<()> {
        let root = self.record(ROOT)?;
        let name = index_name();
        let Content::Here(bytes) = attribute(&root, INDEX_ROOT, &name, 0)?.content else {
            return doubt("its root folder is not where it belongs");
        };
        let view = View(&bytes);
        let first = 16 + view.le32(16)? as usize;
        let mut found = vec![];
        entries(view.part(first.min(bytes.len()), bytes.len().saturating_sub(first))?, &mut found)?;
        if root.has(INDEX_ALLOCATION) {
            let block = view.le32(8)? as usize;
            let inside = (512..=65536).contains(&block) && block.is_power_of_two();
            let Content::Runs { runs, size, .. } =
                attribute(&root, INDEX_ALLOCATION, &name, self.volume.clusters)?.content
            else {
                return doubt("its root folder's index is not kept in clusters");
            };
            if !inside || size > MOST_INDEX {
                return doubt("its root folder is larger than can be looked through");
            }
            for number in 0..size / block as u64 {
                self.index_block(&runs, number * block as u64, block, &mut found)?;
            }
        }
        for number in found {
            let record = self.record(number)?;
            if record.in_use() && self.hibernated(&record)? {
                return doubt("Windows hibernated, or was shut down by fast startup: its memory is kept on it");
            }
        }
        Ok(())
    }

    fn index_block(&self, runs: &[Run], at: u64, block: usize, found: &mut Vec<u64>) -> Sure<()> {
        let mut bytes = vec![];
        let step = block.min(self.volume.cluster as usize);
        for part in 0..block / step {
            bytes.extend_from_slice(self.read(runs, at + (part * step) as u64, step)?.bytes());
        }
        if &bytes[..4] != b"INDX" {
            return Ok(()); // A block that was never in use.
        }
        let bytes = super::ntfs_record::fixed(bytes)?;
        let first = 24 + View(&bytes).le32(24)? as usize;
        let last = 24 + View(&bytes).le32(28)? as usize;
        if first > last || last > bytes.len() {
            return doubt("its root folder has an index block that cannot be");
        }
        entries(&bytes[first..last], found)
    }

    fn hibernated(&self, record: &Record) -> Sure<bool> {
        match attribute(record, DATA, &[], self.volume.clusters)?.content {
            Content::Here(bytes) => Ok(bytes.len() >= 4 && is_hibernation(&bytes)),
            Content::Runs { size, .. } if size < 4096 => Ok(false),
            Content::Runs { runs, .. } if runs.first().is_some_and(|run| run.place.is_none()) => Ok(false),
            Content::Runs { runs, .. } => Ok(is_hibernation(self.read(&runs, 0, 512)?.bytes())),
        }
    }

    fn map(&self) -> Sure<Used> {
        let cluster = self.volume.cluster;
        let mut out = Collector::default();
        let mut own = vec![];
        for number in [MFT, MIRROR, LOG, BITMAP, BOOT] {
            if let Content::Runs { runs, .. } = self.content(number)? {
                own.extend(runs.iter().filter_map(|run| run.place.map(|place| (place, place + run.length))));
            }
        }
        let mut runs_of_own = Collector::default();
        own.iter().for_each(|&(start, end)| runs_of_own.add(start, end));
        let own = runs_of_own.finish(self.volume.clusters);
        let wanted: u64 = own.iter().map(|range| range.1 - range.0).sum();
        let mut seen = 0;
        let mut next = 0;
        let mut run = |start: u64, end: u64| {
            out.add(start * cluster, end * cluster);
            while next < own.len() && own[next].0 < end {
                seen += own[next].1.min(end).saturating_sub(own[next].0.max(start));
                if own[next].1 > end {
                    break;
                }
                next += 1;
            }
        };
        let mut finder = Finder::new(self.volume.clusters);
        let needed = self.volume.clusters.div_ceil(8);
        match self.content(BITMAP)? {
            Content::Here(bytes) if bytes.len() as u64 >= needed => finder.feed(&bytes, &mut run),
            Content::Runs { runs, initialized, .. } if initialized >= needed => {
                self.feed(&runs, needed, &mut finder, &mut run)?;
            }
            _ => return doubt("its cluster bitmap is too short"),
        }
        finder.end(&mut run);
        if seen != wanted {
            return doubt("its cluster bitmap calls clusters of its own system files free");
        }
        slack(&mut out, self.volume.clusters * cluster, self.disk.size());
        // Sectors that make no whole cluster, and the copy of the boot sector behind them.
        out.add(self.volume.clusters * cluster, (self.volume.sectors_end + 4096).min(self.disk.size()));
        Ok(Used { ranges: out.finish(self.disk.size()), note: String::new() })
    }

    fn feed(&self, runs: &[Run], needed: u64, finder: &mut Finder, run: &mut impl FnMut(u64, u64)) -> Sure<()> {
        let mut left = needed;
        for part in runs {
            let Some(place) = part.place else {
                return doubt("its cluster bitmap has holes");
            };
            let (mut at, size) = (0, part.length * self.volume.cluster);
            while at < size && left > 0 {
                let length = (size - at).min(left).min(LONGEST as u64);
                finder.feed(self.disk.read(place * self.volume.cluster + at, length as usize)?.bytes(), run);
                at += length;
                left -= length;
            }
        }
        if left > 0 {
            return doubt("its cluster bitmap is too short, or its record goes on elsewhere");
        }
        Ok(())
    }
}

fn index_name() -> Vec<u8> {
    "$I30".encode_utf16().flat_map(u16::to_le_bytes).collect()
}

fn is_hibernation(bytes: &[u8]) -> bool {
    bytes[..4].eq_ignore_ascii_case(b"hibr")
}

/// The records of those entries of an index that are called hiberfil.sys.
fn entries(bytes: &[u8], found: &mut Vec<u64>) -> Sure<()> {
    let view = View(bytes);
    let mut at = 0;
    while at + 16 <= bytes.len() {
        let (length, flags) = (usize::from(view.le16(at + 8)?), view.le16(at + 12)?);
        if flags & 2 != 0 {
            return Ok(());
        }
        if length < 16 || !length.is_multiple_of(8) {
            return doubt("its root folder has an index entry that cannot be");
        }
        // A file's name: 64 bytes of times and sizes, how many characters, their kind, the characters.
        if usize::from(view.le16(at + 10)?) >= 66 {
            let count = usize::from(view.u8(at + 16 + 64)?);
            let name = view.part(at + 16 + 66, count * 2)?;
            let same = name
                .chunks_exact(2)
                .map(|pair| u16::from_le_bytes([pair[0], pair[1]]))
                .map(|unit| u8::try_from(unit).unwrap_or(0).to_ascii_lowercase())
                .eq(b"hiberfil.sys".iter().copied());
            if same {
                found.push(view.le64(at)? & 0xFFFF_FFFF_FFFF);
            }
        }
        at += length;
    }
    Ok(())
}
