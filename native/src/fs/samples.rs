//! Damaged filesystems: whatever stands there, a reader answers after few reads, in little memory.
//!
//! The samples are those of `fixtures/filesystems/make.py`.

use std::cell::Cell;
use std::collections::BTreeMap;

use proptest::prelude::*;

use super::collect::MOST;
use super::disk::{Disk, ReadAt};
use super::{probe, sums, used, Kind, Used};

const PAGE: usize = 4096;

/// A sparse filesystem in memory, and what was changed of it.
#[derive(Clone)]
struct Memory {
    size: u64,
    pages: BTreeMap<u64, Vec<u8>>,
    reads: Cell<u64>,
}

impl ReadAt for &Memory {
    fn read_at_least(&self, buffer: &mut [u8], offset: u64, _: usize) -> crate::error::Result<usize> {
        self.reads.set(self.reads.get() + 1);
        assert!(self.reads.get() < 100_000, "there is no end to it");
        let length = buffer.len().min(self.size.saturating_sub(offset) as usize);
        buffer[..length].fill(0);
        let first = offset / PAGE as u64;
        for (number, page) in self.pages.range(first..(offset + length as u64).div_ceil(PAGE as u64)) {
            let at = ((number - first) as usize) * PAGE;
            let part = PAGE.min(length - at);
            buffer[at..at + part].copy_from_slice(&page[..part]);
        }
        Ok(length)
    }
}

impl Memory {
    fn load(name: &str) -> Self {
        let path = format!("{}/../fixtures/filesystems/{name}.pages.zst", env!("CARGO_MANIFEST_DIR"));
        let packed = std::fs::read(path).expect("a sample");
        let mut raw = vec![0; 4 << 20];
        let length = zstd_safe::decompress(&mut raw[..], &packed).expect("a whole sample");
        raw.truncate(length);
        let number = |at: usize| u64::from_le_bytes(raw[at..at + 8].try_into().expect("8 bytes"));
        let entries = (8..raw.len()).step_by(8 + PAGE);
        let pages = entries.map(|at| (number(at), raw[at + 8..at + 8 + PAGE].to_vec())).collect();
        Self { size: number(0), pages, reads: Cell::new(0) }
    }

    fn used(&self, kind: Kind) -> super::Sure<Used> {
        let disk = Disk::new(self, 0, self.size).expect("a range");
        probe(kind, &disk);
        used(kind, &disk)
    }

    /// Change bytes of the `page`th page that is not zero.
    fn damage(&mut self, page: usize, at: usize, bytes: &[u8]) -> u64 {
        let count = self.pages.len();
        let (number, content) = self.pages.iter_mut().nth(page % count).expect("a page");
        for (offset, byte) in bytes.iter().enumerate() {
            content[(at + offset) % PAGE] = *byte;
        }
        *number
    }

    /// Make the checksum of the btrfs node or superblock on a page true again.
    fn resum_btrfs(&mut self, number: u64) {
        let page = self.pages.get_mut(&number).expect("a page");
        let sum = crc32c::crc32c(&page[32..]).to_le_bytes();
        page[..4].copy_from_slice(&sum);
    }

    /// The same for the group headers and b-tree blocks of XFS with blocks of 1 KiB.
    fn resum_xfs(&mut self, number: u64) {
        let page = self.pages.get_mut(&number).expect("a page");
        for (magic, size, at) in [(b"XFSB", 512, 224), (b"XAGF", 512, 216), (b"AB3B", 1024, 52)] {
            for block in page.chunks_mut(size).filter(|block| block.starts_with(magic)) {
                block[at..at + 4].fill(0);
                let sum = !sums::crc32c(!0, block);
                block[at..at + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    /// The superblock of ext4 in blocks of 1 KiB.
    fn resum_ext(&mut self) {
        let page = self.pages.get_mut(&0).expect("a page");
        let sum = sums::crc32c(!0, &page[1024..1024 + 0x3FC]);
        page[1024 + 0x3FC..2048].copy_from_slice(&sum.to_le_bytes());
    }
}

const SAMPLES: [(&str, Kind); 8] = [
    ("ext2", Kind::Ext),
    ("ext4", Kind::Ext),
    ("bigalloc", Kind::Ext),
    ("xfs4", Kind::Xfs),
    ("xfs5", Kind::Xfs),
    ("btrfs", Kind::Btrfs),
    ("unreplayed3", Kind::Ext),
    ("unreplayed4", Kind::Ext),
];

#[test]
fn samples_have_maps() {
    for (name, kind) in SAMPLES {
        let memory = Memory::load(name);
        let found = memory.used(kind).expect(name);
        let total: u64 = found.ranges.iter().map(|range| range.1 - range.0).sum();
        assert!(total > 100_000 && total < memory.size / 2, "{name}: {total}");
        for kind in [Kind::Ext, Kind::Xfs, Kind::Btrfs].into_iter().filter(|other| *other != kind) {
            assert!(memory.used(kind).is_err());
        }
    }
}

/// Making checksums true again changes nothing of a whole sample: it is what is meant.
#[test]
fn sums_are_made_as_they_are_checked() {
    for (name, kind) in SAMPLES {
        let mut memory = Memory::load(name);
        let before = memory.pages.clone();
        resum(&mut memory, name, kind, 0);
        for number in before.keys() {
            if name == "xfs5" {
                memory.resum_xfs(*number);
            }
        }
        assert_eq!(memory.pages, before, "{name}");
    }
}

fn resum(memory: &mut Memory, name: &str, kind: Kind, number: u64) {
    match (name, kind) {
        ("xfs5", _) => memory.resum_xfs(number),
        ("ext4" | "unreplayed4", _) => memory.resum_ext(),
        (_, Kind::Btrfs) if number >= 16 && memory.pages[&number][32..48] == memory.pages[&16][32..48] => {
            memory.resum_btrfs(number)
        }
        _ => {}
    }
}

/// Numbers that go wrong at edges.
fn value() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        any::<[u8; 1]>().prop_map(|bytes| bytes.to_vec()),
        any::<[u8; 4]>().prop_map(|bytes| bytes.to_vec()),
        prop_oneof![Just(0u32), Just(1), Just(u32::MAX), Just(0x7FFF_FFFF), 0u32..70_000].prop_flat_map(|number| {
            prop_oneof![Just(number.to_le_bytes().to_vec()), Just(number.to_be_bytes().to_vec())]
        }),
        prop_oneof![Just(u64::MAX), Just(1 << 63), Just(1 << 40), 0u64..(1 << 34)].prop_flat_map(|number| {
            prop_oneof![Just(number.to_le_bytes().to_vec()), Just(number.to_be_bytes().to_vec())]
        }),
    ]
}

/// Most damage goes where structures are: superblocks, headers.
fn place() -> impl Strategy<Value = (usize, usize)> {
    prop_oneof![
        (0usize..3, 0usize..PAGE),
        (0usize..3, prop_oneof![Just(1024usize), Just(0), Just(512)].prop_flat_map(|at| at..at + 300)),
        (any::<usize>(), 0usize..PAGE),
        (any::<usize>(), 0usize..160),
    ]
}

fn survives(name: &str, kind: Kind, damages: &[((usize, usize), Vec<u8>)], pages: &[(usize, usize)]) {
    let mut memory = Memory::load(name);
    let numbers: Vec<u64> = memory.pages.keys().copied().collect();
    for (to, from) in pages {
        // A block where another one should be.
        let content = memory.pages[&numbers[from % numbers.len()]].clone();
        memory.pages.insert(numbers[to % numbers.len()], content);
    }
    for ((page, at), bytes) in damages {
        let number = memory.damage(*page, *at, bytes);
        resum(&mut memory, name, kind, number);
    }
    if let Ok(found) = memory.used(kind) {
        assert!(found.ranges.len() <= MOST);
        assert!(found.ranges.iter().all(|range| range.0 < range.1 && range.1 <= memory.size));
        assert!(found.ranges.windows(2).all(|pair| pair[0].1 < pair[1].0));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(1500) })]
    #[test]
    fn damage_is_survived(
        sample in 0usize..SAMPLES.len(),
        damages in prop::collection::vec((place(), value()), 1..5),
        pages in prop::collection::vec((any::<usize>(), any::<usize>()), 0..2),
    ) {
        let (name, kind) = SAMPLES[sample];
        survives(name, kind, &damages, &pages);
    }
}
