//! Slots: pieces of a block map, as they are worked on in memory.
//!
//! Invariant: a data slot has an id; its place is a hint that may have gone stale.

use crate::digest::Id;
use crate::names::Names;

/// A block or subtree that reads as zeroes.
pub const ZERO: u8 = 0;
/// Not in use by the filesystem.
pub const UNUSED: u8 = 1;
/// The source could not be read there.
pub const UNREADABLE: u8 = 2;
/// Content is stored.
pub const DATA: u8 = 3;
/// Only in memory: nothing is known, compares unequal to everything.
pub const UNKNOWN: u8 = 255;

/// Where a record lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Place {
    /// Number of the pack, see `Names`.
    pub pack: u32,
    /// Offset of the record within the pack.
    pub offset: u32,
    /// Length of head and payload.
    pub length: u32,
}

/// One block, or one child page.
#[derive(Clone, Copy, Debug, Default)]
pub struct Slot {
    /// What is there: `ZERO`, `UNUSED`, `UNREADABLE`, `DATA`.
    pub kind: u8,
    /// Where its record lies (data only).
    pub place: Place,
    /// Its id (data only).
    pub id: Id,
}

impl Slot {
    /// A slot that is not data.
    pub fn plain(kind: u8) -> Self {
        Self { kind, ..Self::default() }
    }

    /// A data slot.
    pub fn data(id: Id, place: Place) -> Self {
        Self { kind: DATA, place, id }
    }

    /// Same content; the place may differ.
    pub fn same(&self, other: &Self) -> bool {
        self.kind == other.kind && self.kind != UNKNOWN && (self.kind != DATA || self.id == other.id)
    }
}

/// The type that all slots have, unless they differ or hold data.
pub fn uniform(slots: &[Slot]) -> Option<u8> {
    let first = slots.first()?.kind;
    (first != DATA && slots.iter().all(|s| s.kind == first)).then_some(first)
}

/// Maximal runs of one type: (type, start, end).
pub fn runs(slots: &[Slot]) -> Vec<(u8, usize, usize)> {
    let mut out = Vec::new();
    let mut start = 0;
    for end in 1..=slots.len() {
        if end == slots.len() || slots[end].kind != slots[start].kind {
            out.push((slots[start].kind, start, end));
            start = end;
        }
    }
    out
}

/// Ranges `[start, end)` in which two equally long pieces differ.
pub fn differing(a: &[Slot], b: &[Slot]) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::new();
    for (i, (x, y)) in a.iter().zip(b).enumerate() {
        if !x.same(y) {
            push_range(&mut out, i, i + 1);
        }
    }
    out
}

/// Append `[start, end)`, joined to the last range where they touch.
pub fn push_range<T: PartialEq + Copy>(ranges: &mut Vec<(T, T)>, start: T, end: T) {
    match ranges.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => ranges.push((start, end)),
    }
}

/// Give data slots whose pack the storage lacks the place where `find` has their record; how many it has.
pub fn relocate(slots: &mut [Slot], names: &Names, find: impl Fn(&Id) -> Option<Place>) -> usize {
    let mut moved = 0;
    for slot in slots.iter_mut().filter(|s| s.kind == DATA && !names.is_present(s.place.pack)) {
        if let Some(place) = find(&slot.id) {
            slot.place = place;
            moved += 1;
        }
    }
    moved
}

/// Turn data slots whose pack the storage lacks into `UNKNOWN`; how many there were.
pub fn drop_absent(slots: &mut [Slot], names: &Names) -> usize {
    let mut dropped = 0;
    let mut last: Option<(u32, bool)> = None;
    for slot in slots.iter_mut().filter(|s| s.kind == DATA) {
        let present = match last {
            Some((pack, present)) if pack == slot.place.pack => present,
            _ => names.is_present(slot.place.pack),
        };
        last = Some((slot.place.pack, present));
        if !present {
            *slot = Slot::plain(UNKNOWN);
            dropped += 1;
        }
    }
    dropped
}
