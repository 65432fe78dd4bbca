//! btrfs: the superblock, the chunk map, and walks through trees.
//!
//! Sources: the kernel's include/uapi/linux/btrfs_tree.h, fs/btrfs/fs.h (feature bits),
//! fs/btrfs/disk-io.c (`btrfs_validate_super`, `btrfs_validate_extent_buffer`),
//! fs/btrfs/volumes.c (`read_one_chunk`, `btrfs_check_chunk_valid`), and the on-disk format page
//! of the btrfs documentation.
//!
//! Invariant: a node is handed out only with its checksum, address, generation, level, owner's
//! filesystem and order of keys verified; a second copy is asked where the first fails. Keys
//! ascend strictly through a walk, so that no node is visited twice.

use aws_lc_rs::digest;

use super::disk::{Disk, Piece, ReadAt, View};
use super::{doubt, Sure};

/// Where the superblock and its copies are.
pub const MIRRORS: [u64; 3] = [64 << 10, 64 << 20, 256 << 30];
/// Bytes of a superblock.
pub const SUPER_SIZE: usize = 4096;
const MAGIC: &[u8] = b"_BHRfS_M";
const HEADER: usize = 101;
const ITEM: usize = 25;
const POINTER: usize = 33;
const MOST_LEVELS: u8 = 8;
const MOST_CHUNKS: usize = 1 << 20;

/// mixed_backref, default_subvol, mixed_groups, compress_lzo, compress_zstd, big_metadata,
/// extended_iref, raid56, skinny_metadata, no_holes, metadata_uuid, raid1c34, simple_quota.
const INCOMPAT_KNOWN: u64 = 0xFFF | 1 << 16;
const INCOMPAT_METADATA_UUID: u64 = 1 << 10;
/// free_space_tree, free_space_tree_valid, verity, block_group_tree.
const RO_COMPAT_KNOWN: u64 = 0xF;
/// written, relocated.
const FLAGS_KNOWN: u64 = 0x3;

const CHUNK_TREE: u64 = 3;
const CHUNK_ITEM: u8 = 228;
const ROOT_ITEM: u8 = 132;
const RAID0: u64 = 1 << 3;
/// raid10, raid5, raid6: profiles whose stripes are not all copies of the whole chunk.
const STRIPED: u64 = 1 << 6 | 1 << 7 | 1 << 8;

/// The magic of a superblock.
pub fn has_magic<R: ReadAt>(disk: &Disk<R>) -> bool {
    disk.read(MIRRORS[0], SUPER_SIZE).is_ok_and(|piece| piece.bytes()[64..72] == *MAGIC)
}

/// How structures are checked.
#[derive(Clone, Copy, Debug)]
enum Sum {
    Crc32c,
    Xxhash64,
    Sha256,
    Blake2b,
}

impl Sum {
    fn holds(self, bytes: &[u8]) -> bool {
        let (Some(said), Some(rest)) = (bytes.get(..32), bytes.get(32..)) else { return false };
        match self {
            Self::Crc32c => said[..4] == crc32c::crc32c(rest).to_le_bytes(),
            Self::Xxhash64 => said[..8] == xxhash_rust::xxh64::xxh64(rest, 0).to_le_bytes(),
            Self::Sha256 => *said == *digest::digest(&digest::SHA256, rest).as_ref(),
            Self::Blake2b => *said == *blake2b_simd::Params::new().hash_length(32).hash(rest).as_bytes(),
        }
    }
}

/// What the superblock says.
pub struct Super {
    /// Bytes of a tree node.
    pub node_size: u64,
    /// Bytes of all extents.
    pub bytes_used: u64,
    /// Bytes of the device that btrfs takes.
    pub device_size: u64,
    /// The number of the transaction.
    pub generation: u64,
    /// Root of the tree of roots.
    pub root: Root,
    /// Root of the tree of log trees; logical address 0 where there is none.
    pub log: Root,
    chunk_root: Root,
    device: u64,
    device_uuid: [u8; 16],
    metadata_uuid: [u8; 16],
    sum: Sum,
    bootstrap: Vec<u8>,
}

/// Where a tree begins.
#[derive(Clone, Copy, Debug)]
pub struct Root {
    /// Logical address of its top node.
    pub at: u64,
    /// Level of its top node.
    pub level: u8,
    /// Generation of its top node.
    pub generation: u64,
}

impl Super {
    fn read<R: ReadAt>(disk: &Disk<R>) -> Sure<Self> {
        let piece = disk.read(MIRRORS[0], SUPER_SIZE)?;
        let raw = piece.view();
        if raw.part(64, 8)? != MAGIC {
            return doubt("there is no superblock of btrfs");
        }
        let sum = match raw.le16(196)? {
            0 => Sum::Crc32c,
            1 => Sum::Xxhash64,
            2 => Sum::Sha256,
            3 => Sum::Blake2b,
            other => return doubt(format!("its kind of checksum, number {other}, is not known")),
        };
        if !sum.holds(piece.bytes()) || raw.le64(48)? != MIRRORS[0] {
            return doubt("its superblock's checksum is wrong");
        }
        let (flags, ro, incompat) = (raw.le64(56)?, raw.le64(180)?, raw.le64(188)?);
        if flags & !FLAGS_KNOWN != 0 {
            return doubt(format!("it is a seed, a dump, or being changed (flags {flags:#x})"));
        }
        if ro & !RO_COMPAT_KNOWN != 0 || incompat & !INCOMPAT_KNOWN != 0 {
            let (ro, incompat) = (ro & !RO_COMPAT_KNOWN, incompat & !INCOMPAT_KNOWN);
            return doubt(format!("it has features that are not known: compat_ro {ro:#x}, incompat {incompat:#x}"));
        }
        if raw.le64(136)? != 1 {
            return doubt("it stands on several devices");
        }
        let (sector, node_size) = (raw.le32(144)?, raw.le32(148)?);
        let sizes = [sector, node_size].iter().all(|size| size.is_power_of_two() && (4096..=65536).contains(size));
        if !sizes || node_size < sector {
            return doubt(format!("sectors of {sector} bytes and nodes of {node_size}"));
        }
        let device_size = raw.le64(209)?;
        if device_size > disk.size() || raw.le64(112)? != device_size {
            return doubt("it is larger than the partition that it stands on, or its sizes contradict each other");
        }
        let uuid = |at: usize| -> Sure<[u8; 16]> {
            let mut out = [0; 16];
            out.copy_from_slice(raw.part(at, 16)?);
            Ok(out)
        };
        let generation = raw.le64(72)?;
        let bootstrap = raw.part(811, (raw.le32(160)? as usize).min(2049))?.to_vec();
        if bootstrap.len() > 2048 {
            return doubt("its first chunks do not fit in");
        }
        Ok(Self {
            node_size: u64::from(node_size),
            bytes_used: raw.le64(120)?,
            device_size,
            generation,
            root: Root { at: raw.le64(80)?, level: raw.u8(198)?, generation },
            log: Root { at: raw.le64(96)?, level: raw.u8(200)?, generation: generation.saturating_add(1) },
            chunk_root: Root { at: raw.le64(88)?, level: raw.u8(199)?, generation: raw.le64(164)? },
            device: raw.le64(201)?,
            device_uuid: uuid(267)?,
            metadata_uuid: uuid(if incompat & INCOMPAT_METADATA_UUID != 0 { 571 } else { 32 })?,
            sum,
            bootstrap,
        })
    }
}

/// A key of an item: object, type, offset.
pub type Key = (u64, u8, u64);

/// The least and the greatest key.
pub const ALL: (Key, Key) = ((0, 0, 0), (u64::MAX, u8::MAX, u64::MAX));

/// A piece of logical address space, and where its copies are.
struct Chunk {
    logical: u64,
    length: u64,
    stripes: Vec<u64>,
}

/// A filesystem whose trees can be walked.
pub struct Trees<'a, R> {
    disk: &'a Disk<R>,
    /// Its superblock.
    pub top: Super,
    /// Sorted by logical address; they do not overlap.
    chunks: Vec<Chunk>,
}

impl<'a, R: ReadAt> Trees<'a, R> {
    /// Read superblock and chunk map.
    pub fn open(disk: &'a Disk<R>) -> Sure<Self> {
        let top = Super::read(disk)?;
        let mut trees = Self { disk, top, chunks: Vec::new() };
        trees.bootstrap()?;
        let mut chunks = Vec::new();
        let root = trees.top.chunk_root;
        trees.walk(root, CHUNK_TREE, ALL, &mut |key, item| {
            if key.1 == CHUNK_ITEM {
                if chunks.len() >= MOST_CHUNKS {
                    return doubt("it has more chunks than are believed");
                }
                chunks.push(trees.chunk(key.2, &item)?);
            }
            Ok(())
        })?;
        trees.chunks = chunks;
        trees.in_order()?;
        Ok(trees)
    }

    /// The chunks that the chunk tree itself lies in stand in the superblock.
    fn bootstrap(&mut self) -> Sure<()> {
        let bytes = std::mem::take(&mut self.top.bootstrap);
        let raw = View(&bytes);
        let mut at = 0;
        while at < bytes.len() {
            if raw.u8(at + 8)? != CHUNK_ITEM {
                return doubt("its first chunks are not listed as they should be");
            }
            let length = 48 + 32 * usize::from(raw.le16(at + 17 + 44)?);
            let item = View(raw.part(at + 17, length)?);
            self.chunks.push(self.chunk(raw.le64(at + 9)?, &item)?);
            at += 17 + length;
        }
        self.chunks.sort_unstable_by_key(|chunk| chunk.logical);
        self.in_order()
    }

    fn in_order(&self) -> Sure<()> {
        if self.chunks.windows(2).all(|pair| pair[0].logical + pair[0].length <= pair[1].logical) {
            return Ok(());
        }
        doubt("its chunks overlap")
    }

    fn chunk(&self, logical: u64, item: &View<'_>) -> Sure<Chunk> {
        let (length, kind, count) = (item.le64(0)?, item.le64(24)?, usize::from(item.le16(44)?));
        if item.0.len() != 48 + 32 * count || !(1..=4).contains(&count) {
            return doubt(format!("a chunk of it has {count} stripes"));
        }
        if length == 0 || logical.checked_add(length).is_none_or(|end| end > 1 << 62) {
            return doubt("a chunk of it has an impossible size");
        }
        if kind & STRIPED != 0 || (kind & RAID0 != 0 && count > 1) {
            return doubt("a chunk of it is striped");
        }
        let mut stripes = Vec::with_capacity(count);
        for number in 0..count {
            let at = 48 + 32 * number;
            if item.le64(at)? != self.top.device || item.part(at + 16, 16)? != self.top.device_uuid {
                return doubt("a chunk of it lies on another device");
            }
            let physical = item.le64(at + 8)?;
            if physical.checked_add(length).is_none_or(|end| end > self.top.device_size) {
                return doubt("a chunk of it lies outside of its device");
            }
            stripes.push(physical);
        }
        Ok(Chunk { logical, length, stripes })
    }

    /// Where the copies of `[logical, logical + length)` are on the device.
    pub fn places(&self, logical: u64, length: u64) -> Sure<impl Iterator<Item = u64> + '_> {
        let after = self.chunks.partition_point(|chunk| chunk.logical <= logical);
        let chunk = after.checked_sub(1).and_then(|at| self.chunks.get(at));
        let Some(chunk) = chunk.filter(|c| length <= c.length && logical - c.logical <= c.length - length) else {
            return doubt(format!("{length} bytes at logical address {logical} belong to no chunk"));
        };
        Ok(chunk.stripes.iter().map(move |physical| physical + (logical - chunk.logical)))
    }

    /// The top node of a tree, by its item in the tree of roots; `None` where there is none.
    pub fn root(&self, tree: u64) -> Sure<Option<Root>> {
        let mut found = None;
        let range = ((tree, ROOT_ITEM, 0), (tree, ROOT_ITEM, u64::MAX));
        self.walk(self.top.root, 1, range, &mut |_, item| {
            found = Some(Root { at: item.le64(176)?, level: item.u8(238)?, generation: item.le64(160)? });
            Ok(())
        })?;
        Ok(found)
    }

    /// Call `each` with every item of a tree whose key lies in `range`, in order.
    pub fn walk(
        &self, root: Root, owner: u64, range: (Key, Key), each: &mut dyn FnMut(Key, View<'_>) -> Sure<()>,
    ) -> Sure<()> {
        self.walk_nodes(root, owner, range, &mut |_| Ok(()), each)
    }

    /// As `walk`; `node` is called with the logical address of every node on the way.
    pub fn walk_nodes(
        &self, root: Root, owner: u64, range: (Key, Key), node: &mut dyn FnMut(u64) -> Sure<()>,
        each: &mut dyn FnMut(Key, View<'_>) -> Sure<()>,
    ) -> Sure<()> {
        if root.level >= MOST_LEVELS {
            return doubt(format!("a tree of it has {} levels", root.level));
        }
        let mut walk = Walk { trees: self, owner, range, last: None, node, each };
        walk.visit(root, None)
    }

    /// A node of a tree, verified.
    fn node(&self, wanted: Root, owner: u64) -> Sure<Piece> {
        let size = self.top.node_size;
        if !wanted.at.is_multiple_of(4096) {
            return doubt("a node of it lies at an odd address");
        }
        let mut problem = None;
        for place in self.places(wanted.at, size)? {
            match self.disk.read(place, size as usize) {
                Ok(piece) => match self.why_not(&piece, wanted, owner)? {
                    None => return Ok(piece),
                    Some(why) => problem = Some(format!("a node of tree {owner} at {place} {why}")),
                },
                Err(error) => problem = Some(error.0),
            }
        }
        doubt(problem.unwrap_or_default())
    }

    fn why_not(&self, piece: &Piece, wanted: Root, owner: u64) -> Sure<Option<&'static str>> {
        let raw = piece.view();
        Ok(if !self.top.sum.holds(piece.bytes()) {
            Some("has a wrong checksum")
        } else if raw.part(32, 16)? != self.top.metadata_uuid {
            Some("is that of another filesystem")
        } else if raw.le64(48)? != wanted.at || raw.u8(100)? != wanted.level {
            Some("is another node")
        } else if raw.le64(80)? != wanted.generation {
            Some("is of another generation")
        } else if raw.le64(88)? != owner {
            Some("belongs to another tree")
        } else {
            None
        })
    }
}

struct Walk<'a, 'b, R> {
    trees: &'a Trees<'a, R>,
    owner: u64,
    range: (Key, Key),
    last: Option<Key>,
    node: &'b mut dyn FnMut(u64) -> Sure<()>,
    each: &'b mut dyn FnMut(Key, View<'_>) -> Sure<()>,
}

impl<R: ReadAt> Walk<'_, '_, R> {
    /// Visit a node; `first`: the key that it has to begin with.
    fn visit(&mut self, wanted: Root, first: Option<Key>) -> Sure<()> {
        let piece = self.trees.node(wanted, self.owner)?;
        (self.node)(wanted.at)?;
        let raw = piece.view();
        let count = raw.le32(96)? as usize;
        let size = if wanted.level == 0 { ITEM } else { POINTER };
        if count > (piece.bytes().len() - HEADER) / size || (count == 0 && (first.is_some() || wanted.level > 0)) {
            return doubt("a node of it has an impossible number of items");
        }
        if first.is_some_and(|first| key_at(&raw, HEADER).is_ok_and(|key| key != first)) {
            return doubt("a tree of it is out of order");
        }
        for number in 0..count {
            let at = HEADER + number * size;
            let key = key_at(&raw, at)?;
            if wanted.level == 0 {
                if self.last.is_some_and(|last| last >= key) {
                    return doubt("a tree of it is out of order");
                }
                self.last = Some(key);
                if self.range.0 <= key && key <= self.range.1 {
                    let (start, length) = (raw.le32(at + 17)? as usize, raw.le32(at + 21)? as usize);
                    (self.each)(key, View(raw.part(HEADER.saturating_add(start), length)?))?;
                }
                continue;
            }
            // A child holds keys from its own up to the next one's.
            let next = if number + 1 < count { Some(key_at(&raw, at + POINTER)?) } else { None };
            if next.is_some_and(|next| next <= key) || self.last.is_some_and(|last| last >= key) {
                return doubt("a tree of it is out of order");
            }
            if key > self.range.1 || next.is_some_and(|next| next <= self.range.0) {
                continue;
            }
            let child = Root { at: raw.le64(at + 17)?, level: wanted.level - 1, generation: raw.le64(at + 25)? };
            self.visit(child, Some(key))?;
        }
        Ok(())
    }
}

fn key_at(raw: &View<'_>, at: usize) -> Sure<Key> {
    Ok((raw.le64(at)?, raw.u8(at + 8)?, raw.le64(at + 9)?))
}
