//! btrfs on one device: the extent tree.
//!
//! Sources: those of `btrfs_tree`, and fs/btrfs/extent-tree.c (extent items), fs/btrfs/tree-log.c
//! (`btrfs_recover_log_trees`), fs/btrfs/file-item.c.
//!
//! Invariant: every extent that the extent tree lists counts as used on all its copies; so do
//! the first MiB, the superblock's mirrors, and what lies behind the device's own end. The
//! extents add up to what the superblock says. Where fsync left a tree log, its nodes and the
//! extents that it refers to count as used too: the log is replayed from these alone, and what
//! the last transaction holds is consistent by itself.

use std::cell::RefCell;
use std::collections::HashSet;

use super::btrfs_tree::{self, Root, Trees, ALL, MIRRORS, SUPER_SIZE};
use super::collect::Collector;
use super::disk::{Disk, ReadAt};
use super::{doubt, Sure, Used};

const RESERVED: u64 = 1 << 20;

const EXTENT_TREE: u64 = 2;
const LOG_TREE: u64 = u64::MAX - 5; // BTRFS_TREE_LOG_OBJECTID, -6
const EXTENT_ITEM: u8 = 168;
const METADATA_ITEM: u8 = 169;
const ROOT_ITEM: u8 = 132;
const EXTENT_DATA: u8 = 108;

/// `btrfs`, where its magic stands.
pub fn probe<R: ReadAt>(disk: &Disk<R>) -> Option<&'static str> {
    btrfs_tree::has_magic(disk).then_some("btrfs")
}

/// The map.
pub fn used<R: ReadAt>(disk: &Disk<R>) -> Sure<Used> {
    let trees = Trees::open(disk)?;
    let mut found = Collector::default();
    found.add(0, RESERVED);
    for mirror in MIRRORS {
        found.add(mirror, mirror + SUPER_SIZE as u64);
    }
    found.add(trees.top.device_size, disk.size());
    extents(&trees, &mut found)?;
    let mut note = String::new();
    if trees.top.log.at != 0 {
        log_trees(&trees, &mut found)?;
        note.push_str("its tree log, not replayed yet, is taken along");
    }
    Ok(Used { ranges: found.finish(disk.size()), note })
}

/// Add every extent of the extent tree.
fn extents<R: ReadAt>(trees: &Trees<'_, R>, found: &mut Collector) -> Sure<()> {
    let Some(root) = trees.root(EXTENT_TREE)? else { return doubt("it has no extent tree") };
    let mut total = 0u64;
    let mut position = 0;
    trees.walk(root, EXTENT_TREE, ALL, &mut |key, _| {
        let length = match key.1 {
            EXTENT_ITEM => key.2,
            METADATA_ITEM => trees.top.node_size,
            _ => return Ok(()),
        };
        if key.0 < position || length == 0 {
            return doubt("extents of it overlap");
        }
        add(trees, key.0, length, found)?;
        // `places` has seen that the sum is no number too large.
        position = key.0 + length;
        total += length;
        Ok(())
    })?;
    if total != trees.top.bytes_used {
        let said = trees.top.bytes_used;
        return doubt(format!("its extents come to {total} bytes, its superblock says {said}"));
    }
    Ok(())
}

fn add<R: ReadAt>(trees: &Trees<'_, R>, logical: u64, length: u64, found: &mut Collector) -> Sure<()> {
    for place in trees.places(logical, length)? {
        found.add(place, place + length);
    }
    Ok(())
}

/// Add the log trees: their nodes, which no extent item tells of, and the data that they refer to.
fn log_trees<R: ReadAt>(trees: &Trees<'_, R>, found: &mut Collector) -> Sure<()> {
    let size = trees.top.node_size;
    let found = RefCell::new(found);
    let mut seen = HashSet::new();
    let mut node = |at: u64| {
        // Trees that share nodes would let few bytes stand for much work.
        if !seen.insert(at) {
            return doubt("its log trees share a node");
        }
        add(trees, at, size, &mut found.borrow_mut())
    };
    let mut logs = Vec::new();
    trees.walk_nodes(trees.top.log, LOG_TREE, ALL, &mut node, &mut |key, item| {
        if key.1 == ROOT_ITEM {
            logs.push(Root { at: item.le64(176)?, level: item.u8(238)?, generation: item.le64(160)? });
        }
        Ok(())
    })?;
    for root in logs {
        trees.walk_nodes(root, LOG_TREE, ALL, &mut node, &mut |key, item| {
            // Type 0 is inline; a regular or preallocated extent at logical address 0 is a hole.
            if key.1 == EXTENT_DATA && item.u8(20)? != 0 && item.le64(21)? != 0 {
                add(trees, item.le64(21)?, item.le64(29)?, &mut found.borrow_mut())?;
            }
            Ok(())
        })?;
    }
    Ok(())
}
