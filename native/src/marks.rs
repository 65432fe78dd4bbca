//! What lives, told without any key (repository-format.md, sections 6 and 9).
//!
//! Invariant: a page is believed only if its record is the one that its pack's name binds, so that nothing that
//! lives is missed.

use std::collections::{HashMap, HashSet};

use crate::bytes::Reader;
use crate::digest::{b3, Id};
use crate::error::{damaged, Result};
use crate::io::Fd;
use crate::known::Known;
use crate::names::Names;
use crate::pack::{self, Entry};
use crate::page;
use crate::record::HEAD;
use crate::slots::Place;

/// Marks a record that one of the newest sets needs. Record lengths are far below it.
const NEWEST: u32 = 1 << 31;
/// The live records of one pack: (offset, length), sorted up to `sorted`.
#[derive(Default)]
struct Live {
    records: Vec<(u32, u32)>,
    sorted: usize,
}

impl Live {
    fn add(&mut self, offset: u32, length: u32) {
        self.records.push((offset, length));
        if self.records.len() >= 64 + 2 * self.sorted {
            self.tidy();
        }
    }

    fn tidy(&mut self) {
        if self.sorted < self.records.len() {
            // Where one record was marked twice, the mark of the newest sets wins.
            self.records.sort_unstable_by_key(|&(offset, length)| (offset, u32::MAX - length));
            self.records.dedup_by_key(|&mut (offset, _)| offset);
            self.sorted = self.records.len();
        }
    }
}

/// Which records live, by pack; 8 bytes for each.
#[derive(Default)]
pub struct Marks {
    packs: HashMap<u32, Live>,
    /// Pages that were found whole, and of this level: (pack, offset, level).
    pages: HashSet<(u32, u32, u8)>,
    /// Records that are not where a map says, and that several places are known for.
    doubtful: HashMap<Id, (Vec<Place>, bool)>,
    /// Block references whose record could not be found anywhere.
    pub lost: u64,
    /// Bytes of the pages that were read.
    pub read: u64,
}

/// How much of a pack lives: records, their bytes, and the bytes that the newest sets need.
pub type Extent = (u64, u64, u64);

impl Marks {
    /// A record lives.
    pub fn add(&mut self, place: Place, newest: bool) -> Result<()> {
        if place.length >= NEWEST {
            return damaged("a record claims an impossible length");
        }
        self.packs.entry(place.pack).or_default().add(place.offset, place.length | if newest { NEWEST } else { 0 });
        Ok(())
    }

    /// Records of which several places are known, for whoever can tell them apart to `add`: (id, places,
    /// whether one of the newest sets needs it). They are handed out once.
    pub fn take_doubtful(&mut self) -> Vec<(Id, Vec<Place>, bool)> {
        self.doubtful.drain().map(|(id, (places, newest))| (id, places, newest)).collect()
    }

    /// How many pages were read.
    pub fn pages(&self) -> usize {
        self.pages.len()
    }

    /// Packs that hold live records.
    pub fn packs(&self) -> Vec<u32> {
        self.packs.keys().copied().collect()
    }

    /// How much of a pack lives.
    pub fn extent(&mut self, pack: u32) -> Extent {
        let Some(live) = self.packs.get_mut(&pack) else { return (0, 0, 0) };
        live.tidy();
        let bytes = |records: &[(u32, u32)], newest: bool| {
            let wanted = records.iter().filter(|(_, length)| !newest || length & NEWEST != 0);
            wanted.map(|(_, length)| u64::from(length & !NEWEST)).sum()
        };
        (live.records.len() as u64, bytes(&live.records, false), bytes(&live.records, true))
    }

    /// Offsets of a pack's live records, in order: those that the newest sets need, or the others.
    pub fn offsets(&mut self, pack: u32, newest: bool) -> Vec<u32> {
        let Some(live) = self.packs.get_mut(&pack) else { return Vec::new() };
        live.tidy();
        let wanted = live.records.iter().filter(|(_, length)| (length & NEWEST != 0) == newest);
        wanted.map(|&(offset, _)| offset).collect()
    }
}

/// Where to look for a record that is not where a map says.
pub struct Search<'a> {
    /// Names; those present are the packs that can be relied upon.
    pub names: &'a Names,
    /// Records in packs that can be relied upon.
    pub known: &'a Known,
    /// Records in packs that are condemned and still there.
    pub stranded: &'a Known,
}

impl Search<'_> {
    /// Where the record lies: the place given if it is safe, else the safe ones, else one that is condemned.
    pub fn resolve(&self, id: &Id, place: Place) -> Vec<Place> {
        if self.names.is_present(place.pack) {
            return vec![place];
        }
        let safe = self.known.places(id);
        if safe.is_empty() {
            return self.stranded.find(id).into_iter().collect();
        }
        safe
    }
}

/// A map pack whose frame is read, to take pages from.
pub struct MapPack {
    lines: Vec<Line>,
}

struct Line {
    offset: u32,
    length: u32,
    id: Id,
    digest: Id,
}

/// A page: id and place.
pub type Child = (Id, Place);

impl MapPack {
    /// Read the frame of a map pack.
    pub fn open(fd: Fd, name: &Id, repository: &[u8; 16]) -> Result<Self> {
        let frame = pack::read_frame(fd, Some(name), repository)?;
        if frame.header.kind != 2 {
            return damaged("it is no map pack");
        }
        let line =
            |e: &Entry| Line { offset: e.offset as u32, length: e.head.record_len(), id: e.head.id, digest: e.digest };
        Ok(Self { lines: frame.entries.iter().map(line).collect() })
    }

    /// The digest of the payload of the record that begins at `offset`.
    pub fn digest(&self, offset: u32) -> Option<Id> {
        self.lines.binary_search_by_key(&offset, |line| line.offset).ok().map(|at| self.lines[at].digest)
    }

    /// Read a page, which must be of this level; mark it, and the blocks that it refers to. The
    /// pages that it refers to; None where this record was read before.
    pub fn mark(
        &self, fd: Fd, page: Child, level: u8, search: &Search, marks: &mut Marks, newest: bool,
    ) -> Result<Option<Vec<Child>>> {
        let (id, place) = page;
        let at = self.lines.binary_search_by_key(&place.offset, |line| line.offset);
        let Some(line) = at.ok().map(|at| &self.lines[at]).filter(|line| line.id == id) else {
            return damaged("another record lies in its place");
        };
        // A stale reference may name the place of another page, which is no sign of this one.
        let visit = (place.pack, place.offset, level);
        if marks.pages.contains(&visit) {
            return Ok(None);
        }
        let mut record = vec![0; line.length as usize];
        fd.read_exact_at(&mut record, u64::from(line.offset))?;
        marks.read += u64::from(line.length);
        if record.len() < HEAD + 4 || b3(&[&record[HEAD..]]) != line.digest {
            return damaged("its record is damaged");
        }
        let mut r = Reader::new(&record[HEAD..], "map page");
        let length = r.u32()? as usize;
        let public = page::decode_public(r.take(length)?, search.names, place.pack)?;
        if public.0 != level {
            return damaged("it is a page of another level");
        }
        // Only now: whoever refers to it wrongly must not keep others' references from being followed.
        marks.pages.insert(visit);
        marks.add(Place { length: line.length, ..place }, newest)?;
        let targets = public.1.into_iter().map(|slot| (slot.id, slot.place));
        if level > 0 {
            return Ok(Some(targets.collect()));
        }
        for (id, place) in targets {
            match search.resolve(&id, place)[..] {
                [] => marks.lost += 1,
                [found] => marks.add(found, newest)?,
                ref several => marks.doubtful.entry(id).or_insert_with(|| (several.to_vec(), false)).1 |= newest,
            }
        }
        Ok(Some(Vec::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn marks_keep_each_record_once(marked in proptest::collection::vec((0u32..3, 0u32..40, any::<bool>()), 0..400)) {
            let mut marks = Marks::default();
            let mut all = std::collections::BTreeMap::new();
            for &(pack, n, newest) in &marked {
                marks.add(Place { pack, offset: n * 100, length: 65 + n }, newest).expect("marks");
                *all.entry((pack, n)).or_insert(false) |= newest;
            }
            for pack in 0..3 {
                let of = |wanted: bool| -> Vec<u32> {
                    all.iter().filter(|((p, _), &newest)| *p == pack && newest == wanted).map(|((_, n), _)| n * 100).collect()
                };
                prop_assert_eq!(marks.offsets(pack, true), of(true));
                prop_assert_eq!(marks.offsets(pack, false), of(false));
                let bytes = |offsets: &[u32]| offsets.iter().map(|offset| u64::from(65 + offset / 100)).sum::<u64>();
                let (records, live, newest) = marks.extent(pack);
                prop_assert_eq!(records as usize, of(true).len() + of(false).len());
                prop_assert_eq!((live, newest), (bytes(&of(true)) + bytes(&of(false)), bytes(&of(true))));
            }
        }
    }
}
