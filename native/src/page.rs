//! Pages of the block map (repository-format.md, section 6).
//!
//! Invariant: encoding is canonical: equal slots at equal level and position,
//! lying in the same places, give equal bytes and so equal ids.

use std::collections::hash_map::Entry;
use std::collections::HashMap;

use crate::bytes::Reader;
use crate::digest::Id;
use crate::error::{damaged, invalid, Result};
use crate::names::Names;
use crate::slots::{runs, Place, Slot, DATA, UNREADABLE};

/// Slots of a full page.
pub const FANOUT: usize = 256;
const MAX_TABLE: usize = 512;
/// The name that stands for the pack that holds the page itself.
const SELF: Id = [0; 32];

/// A page, parsed.
#[derive(Debug)]
pub struct Page {
    /// 0 for leaves.
    pub level: u8,
    /// First block that the page covers.
    pub first: u64,
    /// Its slots.
    pub slots: Vec<Slot>,
}

/// Encode a page: (public part, sealed part). `holder` is the pack that it is being written to.
pub fn encode(level: u8, first: u64, slots: &[Slot], names: &Names, holder: u32) -> Result<(Vec<u8>, Vec<u8>)> {
    if slots.is_empty() || slots.len() > FANOUT {
        return invalid(format!("a page of {} slots", slots.len()));
    }
    let mut named: HashMap<u32, Id> = HashMap::new();
    for slot in slots.iter().filter(|s| s.kind == DATA) {
        if let Entry::Vacant(entry) = named.entry(slot.place.pack) {
            match names.name(slot.place.pack) {
                _ if slot.place.pack == holder => entry.insert(SELF),
                Some(name) => entry.insert(name),
                None => return invalid(format!("pack number {} has no name yet", slot.place.pack)),
            };
        }
    }
    let mut packs: Vec<Id> = named.values().copied().collect();
    packs.sort_unstable();
    packs.dedup();
    let pack_index = |number: u32| packs.binary_search(&named[&number]).unwrap_or_default() as u16;
    let mut targets: Vec<(u16, u32, u32, Id)> = slots
        .iter()
        .filter(|s| s.kind == DATA)
        .map(|s| (pack_index(s.place.pack), s.place.offset, s.place.length, s.id))
        .collect();
    targets.sort_unstable();
    targets.dedup();

    let mut public = Vec::with_capacity(8 + packs.len() * 32 + targets.len() * 42);
    public.push(level);
    public.push(1);
    public.extend_from_slice(&(packs.len() as u16).to_le_bytes());
    public.extend_from_slice(&(targets.len() as u16).to_le_bytes());
    public.extend_from_slice(&[0; 2]);
    for name in &packs {
        public.extend_from_slice(name);
    }
    for (pack, offset, length, id) in &targets {
        public.extend_from_slice(&pack.to_le_bytes());
        public.extend_from_slice(&offset.to_le_bytes());
        public.extend_from_slice(&length.to_le_bytes());
        public.extend_from_slice(id);
    }

    let mut sealed = Vec::with_capacity(16 + slots.len() * 2);
    sealed.extend_from_slice(&first.to_le_bytes());
    sealed.extend_from_slice(&(slots.len() as u16).to_le_bytes());
    for (kind, start, end) in runs(slots) {
        if kind > DATA {
            return invalid("a slot of unknown content cannot be written");
        }
        sealed.push(kind);
        sealed.push((end - start - 1) as u8);
        if kind == DATA {
            for slot in &slots[start..end] {
                let target = (pack_index(slot.place.pack), slot.place.offset, slot.place.length, slot.id);
                let number = targets.binary_search(&target).unwrap_or_default() as u16;
                sealed.extend_from_slice(&number.to_le_bytes());
            }
        }
    }
    Ok((public, sealed))
}

/// Parse the public part of a page: its level, and what it refers to. `holder`: the pack that it was read from.
pub fn decode_public(public: &[u8], names: &Names, holder: u32) -> Result<(u8, Vec<Slot>)> {
    let mut r = Reader::new(public, "map page");
    let level = r.u8()?;
    let version = r.u8()?;
    if version != 1 || level > 7 {
        return damaged(format!("map page of level {level}, version {version}"));
    }
    let (packs, targets) = (usize::from(r.u16()?), usize::from(r.u16()?));
    r.u16()?;
    if packs > MAX_TABLE || targets > MAX_TABLE {
        return damaged("map page claims too many entries");
    }
    let mut numbers = Vec::with_capacity(packs);
    for _ in 0..packs {
        let name: Id = r.array()?;
        numbers.push(if name == SELF { holder } else { names.intern(&name) });
    }
    let mut table = Vec::with_capacity(targets);
    for _ in 0..targets {
        let pack = match numbers.get(usize::from(r.u16()?)) {
            Some(&pack) => pack,
            None => return damaged("map page names a pack outside its list"),
        };
        let place = Place { pack, offset: r.u32()?, length: r.u32()? };
        table.push(Slot::data(r.array()?, place));
    }
    r.done()?;
    Ok((level, table))
}

/// Parse a page. `holder` is the pack that it was read from.
pub fn decode(public: &[u8], sealed: &[u8], names: &Names, holder: u32) -> Result<Page> {
    let (level, table) = decode_public(public, names, holder)?;
    let mut r = Reader::new(sealed, "sealed part of a map page");
    let first = r.u64()?;
    let count = usize::from(r.u16()?);
    if count == 0 || count > FANOUT {
        return damaged(format!("map page of {count} slots"));
    }
    let mut slots = Vec::with_capacity(count);
    while slots.len() < count {
        let kind = r.u8()?;
        let run = usize::from(r.u8()?) + 1;
        if slots.len() + run > count {
            return damaged("runs of a map page exceed its slots");
        }
        match kind {
            DATA => {
                for _ in 0..run {
                    match table.get(usize::from(r.u16()?)) {
                        Some(&slot) => slots.push(slot),
                        None => return damaged("map page names a target outside its list"),
                    }
                }
            }
            0..=UNREADABLE => slots.extend(std::iter::repeat_n(Slot::plain(kind), run)),
            _ => return damaged(format!("unknown run type {kind} in a map page")),
        }
    }
    r.done()?;
    Ok(Page { level, first, slots })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn slot() -> impl Strategy<Value = (u8, u8, u32)> {
        (0u8..4, 0u8..5, 0u32..9)
    }

    proptest! {
        #[test]
        fn pages_come_back(picks in proptest::collection::vec(slot(), 1..=256), first: u64, level in 0u8..4) {
            let names = Names::default();
            let numbers: Vec<u32> = (0..4u8).map(|n| names.intern(&[n + 1; 32])).collect();
            let holder = names.reserve();
            let slots: Vec<Slot> = picks.iter().map(|&(kind, pack, n)| if kind == DATA {
                let pack = numbers.get(usize::from(pack)).copied().unwrap_or(holder);
                Slot::data([n as u8; 32], Place { pack, offset: n * 1000, length: 64 + n })
            } else { Slot::plain(kind) }).collect();
            let (public, sealed) = encode(level, first, &slots, &names, holder).expect("encodes");
            let page = decode(&public, &sealed, &names, holder).expect("decodes");
            prop_assert_eq!((page.level, page.first), (level, first));
            prop_assert_eq!(page.slots.len(), slots.len());
            for (a, b) in page.slots.iter().zip(&slots) {
                prop_assert!(a.same(b) && a.place == b.place);
            }
        }

        #[test]
        fn garbage_is_refused(public in proptest::collection::vec(any::<u8>(), 0..300), sealed in proptest::collection::vec(any::<u8>(), 0..100), tame: bool) {
            let mut public = public;
            if tame && public.len() > 8 {
                let (packs, targets) = (public[2] % 3, public[4] % 4);
                public[..8].copy_from_slice(&[0, 1, packs, 0, targets, 0, 0, 0]);
            }
            if let Ok(page) = decode(&public, &sealed, &Names::default(), 0) {
                prop_assert!(page.slots.len() <= FANOUT);
            }
        }
    }
}
