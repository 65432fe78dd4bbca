//! File records of NTFS: fixups, attributes, runs of clusters.
//!
//! Invariant: a record is handed out only with its fixups undone; a run that was decoded lies
//! within the volume; every attribute ends within its record. What does not fit is a doubt.

use super::disk::View;
use super::{doubt, Sure};

/// Kinds of attributes.
pub const ATTRIBUTE_LIST: u32 = 0x20;
/// Flags and version of the volume.
pub const VOLUME_INFORMATION: u32 = 0x70;
/// What a file holds.
pub const DATA: u32 = 0x80;
/// The part of a folder's index that stands in its record.
pub const INDEX_ROOT: u32 = 0x90;
/// The rest of a folder's index.
pub const INDEX_ALLOCATION: u32 = 0xA0;
const END: u32 = 0xFFFF_FFFF;
/// Sectors that a fixup guards have this size, whatever the device's.
const GUARDED: usize = 512;
/// An attribute of more runs is not believed.
const MOST_RUNS: usize = 1 << 16;

/// A run of clusters; `place` is none where it is a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first cluster.
    pub place: Option<u64>,
    /// How many.
    pub length: u64,
}

/// Where an attribute's bytes are.
pub enum Content {
    /// In the record itself.
    Here(Vec<u8>),
    /// In clusters. `size` and `initialized` in bytes.
    Runs {
        /// In order of the file.
        runs: Vec<Run>,
        /// Of the file.
        size: u64,
        /// How much of it was ever written.
        initialized: u64,
    },
}

/// An attribute.
pub struct Attribute {
    /// Its bytes, or where they are.
    pub content: Content,
}

/// A file record, fixups undone.
pub struct Record {
    bytes: Vec<u8>,
    first: usize,
}

/// Undo the fixups: the last two bytes of each sector were kept in a list, to notice torn writes.
pub fn fixed(mut bytes: Vec<u8>) -> Sure<Vec<u8>> {
    let view = View(&bytes);
    let (list, count) = (usize::from(view.le16(4)?), usize::from(view.le16(6)?));
    if count != bytes.len() / GUARDED + 1 || list + count * 2 > GUARDED - 2 || !list.is_multiple_of(2) {
        return doubt("a record of it has fixups that cannot be");
    }
    let number = [bytes[list], bytes[list + 1]];
    for sector in 1..count {
        let end = sector * GUARDED;
        if bytes[end - 2..end] != number {
            return doubt("a record of it was not written whole");
        }
        bytes[end - 2] = bytes[list + sector * 2];
        bytes[end - 1] = bytes[list + sector * 2 + 1];
    }
    Ok(bytes)
}

impl Record {
    /// The record `number` (or an unused one, where `in_use` is false).
    pub fn parse(raw: &[u8], number: u64) -> Sure<Self> {
        if raw.get(..4) != Some(b"FILE") {
            return doubt(format!("its file record {number} is damaged"));
        }
        let bytes = fixed(raw.to_vec())?;
        let first = usize::from(View(&bytes).le16(20)?);
        if first < 42 || !first.is_multiple_of(8) || first >= bytes.len() {
            return doubt(format!("its file record {number} is damaged"));
        }
        Ok(Self { bytes, first })
    }

    /// Whether the record belongs to a file.
    pub fn in_use(&self) -> bool {
        View(&self.bytes).le16(22).is_ok_and(|flags| flags & 1 != 0)
    }

    /// Whether there is an attribute of that kind.
    pub fn has(&self, kind: u32) -> bool {
        self.find(kind, None).is_ok_and(|found| found.is_some())
    }

    /// Where the attribute begins and how long it is. `name` in UTF-16; none for any.
    fn find(&self, kind: u32, name: Option<&[u8]>) -> Sure<Option<&[u8]>> {
        let view = View(&self.bytes);
        let mut at = self.first;
        loop {
            let found = view.le32(at)?;
            if found == END {
                return Ok(None);
            }
            let length = view.le32(at + 4)? as usize;
            if length < 24 || !length.is_multiple_of(8) {
                return doubt("a file record of it has an attribute that cannot be");
            }
            let whole = view.part(at, length)?;
            let own = View(whole);
            let named = own.part(usize::from(own.le16(10)?), usize::from(own.u8(9)?) * 2)?;
            if found == kind && name.is_none_or(|name| name == named) {
                return Ok(Some(whole));
            }
            at += length;
        }
    }
}

/// The attribute of that kind and name (UTF-16; empty for none). `clusters`: of the volume.
pub fn attribute(record: &Record, kind: u32, name: &[u8], clusters: u64) -> Sure<Attribute> {
    if record.has(ATTRIBUTE_LIST) && kind != DATA {
        return doubt("a system file of it has a record that goes on elsewhere");
    }
    let Some(raw) = record.find(kind, Some(name))? else {
        return doubt("a system file of it lacks an attribute");
    };
    let view = View(raw);
    // Compressed, encrypted: never a system file.
    if view.le16(12)? & 0x40FF != 0 {
        return doubt("a system file of it is compressed or encrypted");
    }
    if view.u8(8)? == 0 {
        let bytes = view.part(usize::from(view.le16(20)?), view.le32(16)? as usize)?;
        return Ok(Attribute { content: Content::Here(bytes.to_vec()) });
    }
    if view.le64(16)? != 0 {
        return doubt("a system file of it has a record that goes on elsewhere");
    }
    let (size, initialized) = (view.le64(48)?, view.le64(56)?);
    let start = usize::from(view.le16(32)?);
    if start < 64 || start > raw.len() {
        return doubt("a file record of it has an attribute that cannot be");
    }
    let runs = decode(&raw[start..], clusters)?;
    Ok(Attribute { content: Content::Runs { runs, size, initialized } })
}

/// Runs: each has a byte of lengths, how many clusters, and how far from the one before.
pub fn decode(raw: &[u8], clusters: u64) -> Sure<Vec<Run>> {
    let mut out = vec![];
    let (mut at, mut place, mut total) = (0usize, 0i64, 0u64);
    while let Some(&head) = raw.get(at) {
        if head == 0 {
            return Ok(out);
        }
        let (long, far) = (usize::from(head & 15), usize::from(head >> 4));
        let (Some(length), Some(step)) = (
            raw.get(at + 1..at + 1 + long).and_then(signed),
            raw.get(at + 1 + long..at + 1 + long + far).and_then(signed),
        ) else {
            return doubt("a file record of it has runs that cannot be");
        };
        let length = u64::try_from(length).unwrap_or(0);
        total = total.saturating_add(length);
        let next = if far == 0 { Some(place) } else { place.checked_add(step) };
        let inside = next.filter(|&next| next >= 0 && (next as u64).saturating_add(length) <= clusters);
        if length == 0 || total > clusters || out.len() >= MOST_RUNS || (far > 0 && inside.is_none()) {
            return doubt("a file record of it has runs that cannot be");
        }
        if far > 0 {
            place = inside.unwrap_or(0);
        }
        out.push(Run { place: (far > 0).then_some(place as u64), length });
        at += 1 + long + far;
    }
    doubt("a file record of it has runs without an end")
}

/// A little-endian number of up to eight bytes with a sign.
fn signed(bytes: &[u8]) -> Option<i64> {
    if bytes.len() > 8 {
        return None;
    }
    let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
    let mut out = [if negative { 0xFF } else { 0 }; 8];
    out[..bytes.len()].copy_from_slice(bytes);
    Some(i64::from_le_bytes(out))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn runs() {
        let raw = [0x21, 0x18, 0x34, 0x56, 0x11, 0x10, 0xF0, 0x01, 0x05, 0];
        let found = decode(&raw, 0x10000).expect("runs");
        assert_eq!(
            found,
            [
                Run { place: Some(0x5634), length: 0x18 },
                Run { place: Some(0x5624), length: 0x10 },
                Run { place: None, length: 5 },
            ]
        );
        assert!(decode(&raw, 0x5000).is_err());
        assert!(decode(&raw[..4], 0x10000).is_err());
    }

    #[test]
    fn torn_records_are_noticed() {
        let mut raw = vec![0u8; 1024];
        raw[..4].copy_from_slice(b"FILE");
        raw[4] = 48;
        raw[6] = 3;
        raw[20] = 56;
        for at in [48, 510, 1022] {
            raw[at] = 7;
        }
        raw[50] = 9;
        assert_eq!(fixed(raw.clone()).expect("whole")[510], 9);
        raw[1022] = 8;
        assert!(Record::parse(&raw, 4).is_err());
    }

    proptest! {
        #[test]
        fn any_runs_lie_inside(raw in prop::collection::vec(any::<u8>(), 0..64), clusters in 0u64..1 << 40) {
            if let Ok(found) = decode(&raw, clusters) {
                prop_assert!(found.iter().all(|run| run.place.is_none_or(|p| p + run.length <= clusters)));
            }
        }

        #[test]
        fn no_record_makes_it_fail(mut raw in prop::collection::vec(any::<u8>(), 1024..=1024), guard in any::<bool>()) {
            raw[..4].copy_from_slice(b"FILE");
            if guard {
                raw[4..8].copy_from_slice(&[48, 0, 3, 0]);
                raw[20..22].copy_from_slice(&[56, 0]);
                for end in [510, 1022] {
                    raw.copy_within(48..50, end);
                }
            }
            if let Ok(record) = Record::parse(&raw, 0) {
                for kind in [0x10, DATA, INDEX_ROOT] {
                    let _ = attribute(&record, kind, &[], 1 << 20);
                }
            }
        }
    }
}
