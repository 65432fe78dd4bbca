//! Allocation maps of filesystems: which bytes of a partition are in use.
//!
//! Invariant: an answer names too much rather than too little. Whatever a reader does not
//! understand, cannot read or finds contradictory is a `Doubt`, never a panic and never a
//! guess. Work and memory are bounded by the size of the partition and by constants, whatever
//! its bytes say: what is walked is ordered, so nothing is walked twice.

use std::fmt;

pub mod bits;
pub mod btrfs;
pub mod btrfs_tree;
pub mod collect;
pub mod disk;
pub mod exfat;
pub mod ext;
pub mod ext_inode;
pub mod ext_layout;
pub mod fat;
pub mod jbd2;
#[cfg(test)]
mod memory;
pub mod ntfs;
pub mod ntfs_record;
#[cfg(test)]
mod samples;
pub mod sums;
pub mod xfs;
pub mod xfs_log;

use disk::{Disk, ReadAt};

/// Why there is no map. It completes the sentence "every block is imaged: ...".
#[derive(Debug)]
pub struct Doubt(pub String);

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Result of a reader.
pub type Sure<T> = std::result::Result<T, Doubt>;

/// Shorthand for a `Doubt`.
pub fn doubt<T>(reason: impl Into<String>) -> Sure<T> {
    Err(Doubt(reason.into()))
}

/// A map: sorted, merged byte ranges `[start, end)`, counted from the partition's first byte.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Used {
    /// What is in use.
    pub ranges: Vec<(u64, u64)>,
    /// What was taken into account beyond the maps of a clean filesystem; may be empty.
    pub note: String,
}

/// The kinds of filesystem that have a reader here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// ext2, ext3, ext4.
    Ext,
    /// XFS.
    Xfs,
    /// btrfs.
    Btrfs,
    /// FAT12, FAT16, FAT32.
    Fat,
    /// exFAT.
    Exfat,
    /// NTFS.
    Ntfs,
}

impl Kind {
    /// By the name that Python uses.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "ext" => Some(Self::Ext),
            "xfs" => Some(Self::Xfs),
            "btrfs" => Some(Self::Btrfs),
            "fat" => Some(Self::Fat),
            "exfat" => Some(Self::Exfat),
            "ntfs" => Some(Self::Ntfs),
            _ => None,
        }
    }
}

/// The common name of the filesystem, where its magic stands.
pub fn probe<R: ReadAt>(kind: Kind, disk: &Disk<R>) -> Option<&'static str> {
    match kind {
        Kind::Ext => ext::probe(disk),
        Kind::Xfs => xfs::probe(disk),
        Kind::Btrfs => btrfs::probe(disk),
        Kind::Fat => fat::probe(disk),
        Kind::Exfat => exfat::probe(disk),
        Kind::Ntfs => ntfs::probe(disk),
    }
}

/// The map of the filesystem.
///
/// The superblock is read again when the walk is over: one that was mounted, or went on being
/// written to, meanwhile has no map.
pub fn used<R: ReadAt>(kind: Kind, disk: &Disk<R>) -> Sure<Used> {
    let (offset, length) = match kind {
        Kind::Ext => (1024, 1024),
        Kind::Xfs | Kind::Fat | Kind::Exfat | Kind::Ntfs => (0, 512),
        Kind::Btrfs => (0x10000, 4096),
    };
    let before = disk.read(offset, length)?;
    let used = match kind {
        Kind::Ext => ext::used(disk),
        Kind::Xfs => xfs::used(disk),
        Kind::Btrfs => btrfs::used(disk),
        Kind::Fat => fat::used(disk),
        Kind::Exfat => exfat::used(disk),
        Kind::Ntfs => ntfs::used(disk),
    }?;
    if disk.read(offset, length)?.bytes() != before.bytes() {
        return doubt("its superblock changed while its maps were read");
    }
    Ok(used)
}

/// What stands behind a filesystem that is smaller than its partition may be somebody else's: the
/// superblock of a RAID, say, which is at its end. The first and the last bytes of it count as used.
fn slack(out: &mut collect::Collector, end: u64, size: u64) {
    const KEPT: u64 = 1 << 20;
    if end < size {
        out.add(end, size.min(end + KEPT));
        out.add(size.saturating_sub(KEPT).max(end), size);
    }
}
