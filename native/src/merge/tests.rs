//! What comes out of a merge.

use super::*;
use crate::index::{build, key_of};
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::io::{Read as _, Seek as _, Write as _};

const REPOSITORY: [u8; 16] = [7; 16];

fn segment(bytes: &[u8], names: &Names) -> (Arc<Segment>, Vec<u32>) {
    let mut file = tempfile::tempfile().expect("file");
    file.write_all(bytes).expect("write");
    let (segment, packs) = Segment::open(file.into(), &REPOSITORY, &filter::Room::new(0)).expect("opens");
    (Arc::new(segment), packs.iter().map(|name| names.intern(name)).collect())
}

/// The bytes of the result, and what it came to.
fn merged(inputs: Vec<(Arc<Segment>, Vec<u32>)>, names: &Names, forget: &HashSet<Id>) -> Result<(Vec<u8>, Outcome)> {
    let mut file = tempfile::tempfile().expect("file");
    let out: OwnedFd = file.try_clone().expect("clone").into();
    let mut merger = Merger::new(inputs, out, &REPOSITORY, names, forget)?;
    while merger.step()? > 0 {}
    let mut bytes = Vec::new();
    file.rewind().expect("rewind");
    file.read_to_end(&mut bytes).expect("read");
    Ok((bytes, merger.outcome()?))
}

fn lines(numbers: &[u32], packs: u32, salt: u32) -> Vec<Line> {
    let mut lines: Vec<Line> =
        numbers.iter().map(|n| (key_of(blake3::hash(&n.to_le_bytes()).as_bytes()), n % packs, n + salt, 100)).collect();
    lines.sort_unstable();
    lines.dedup_by_key(|line| line.0);
    lines
}

fn name(pack: u32) -> Id {
    blake3::hash(&[&b"pack"[..], &pack.to_le_bytes()].concat()).into()
}

#[test]
fn the_result_is_the_segment_that_building_makes() {
    let all: Vec<u32> = (0..30_000).collect();
    let packs: Vec<Id> = (0..3).map(name).collect();
    let names = Names::default();
    let parts: Vec<_> =
        all.chunks(7001).map(|part| segment(&build(&REPOSITORY, &packs, &lines(part, 3, 0)), &names)).collect();
    let (bytes, outcome) = merged(parts, &names, &HashSet::new()).expect("merges");
    assert_eq!(bytes, build(&REPOSITORY, &packs, &lines(&all, 3, 0)));
    assert_eq!((outcome.entries, outcome.size, outcome.dropped), (30_000, bytes.len() as u64, 0));
    let digest = blake3::Hasher::new().update(b"imager index v1").update(&bytes).finalize();
    assert_eq!(outcome.name, *digest.as_bytes());
}

#[test]
fn too_much_for_one_segment_is_refused() {
    let names = Names::default();
    let one = segment(&build(&REPOSITORY, &[name(0)], &lines(&[1, 2, 3], 1, 0)), &names);
    let many = (0..=MAX_INPUTS).map(|_| one.clone()).collect();
    assert!(merged(many, &names, &HashSet::new()).is_err());
}

#[test]
fn nothing_is_left_of_nothing() {
    let names = Names::default();
    names.set_present(HashSet::new());
    let one = segment(&build(&REPOSITORY, &[name(0)], &lines(&[1, 2, 3], 1, 0)), &names);
    let (_, outcome) = merged(vec![one.clone()], &names, &HashSet::new()).expect("merges");
    assert_eq!((outcome.entries, outcome.packs, outcome.dropped), (0, 1, 3), "what is lost stays known of");
    let (_, outcome) = merged(vec![one], &names, &HashSet::from([name(0)])).expect("merges");
    assert_eq!((outcome.entries, outcome.packs, outcome.dropped), (0, 0, 3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn merging_is_the_union(
        parts in prop::collection::vec(
            (prop::collection::vec(0u32..900, 0..700), 1u32..6, 0u32..3), 0..7),
        present in prop::collection::vec(any::<bool>(), 6),
        listed in any::<bool>(),
    ) {
        let names = Names::default();
        let there = |pack: u32| !listed || present[pack as usize];
        if listed {
            names.set_present((0..6).filter(|&n| present[n as usize]).map(name).collect());
        }
        let mut inputs = Vec::new();
        let mut union: BTreeMap<Key, Vec<(u32, u32)>> = BTreeMap::new();
        for (numbers, packs, salt) in &parts {
            let lines = lines(numbers, *packs, *salt);
            let list: Vec<Id> = (0..*packs).map(name).collect();
            for line in &lines {
                let places = union.entry(line.0).or_default();
                if there(line.1) {
                    places.push((line.1, line.2));
                }
            }
            inputs.push(segment(&build(&REPOSITORY, &list, &lines), &names));
        }
        let (bytes, outcome) = merged(inputs, &names, &HashSet::new()).expect("merges");
        let (result, packs) = segment(&bytes, &names);
        let mut found = 0;
        for (key, places) in &union {
            match result.find(key) {
                Some((pack, offset, _)) => {
                    let place = names.name(packs[pack as usize]).expect("named");
                    prop_assert!(places.iter().any(|&(pack, at)| name(pack) == place && at == offset));
                    found += 1;
                }
                None => prop_assert!(places.is_empty()),
            }
        }
        prop_assert_eq!(outcome.entries, found);
        prop_assert_eq!(outcome.damaged, 0);
    }

    #[test]
    fn damage_costs_its_page_alone(at: prop::sample::Index, bit in 0u8..8) {
        let (packs, names) = ([name(0), name(1)], Names::default());
        let all: Vec<u32> = (0..1500).collect();
        let mut harmed = build(&REPOSITORY, &packs, &lines(&all[..1000], 2, 0));
        let pages_at = Layout::new(2, 1000).pages_at as usize;
        let position = pages_at + at.index(harmed.len() - pages_at);
        harmed[position] ^= 1 << bit;
        let inputs = vec![
            segment(&harmed, &names),
            segment(&build(&REPOSITORY, &packs, &lines(&all[1000..], 2, 0)), &names),
        ];
        let (bytes, outcome) = merged(inputs, &names, &HashSet::new()).expect("merges");
        prop_assert!(outcome.entries + 127 * outcome.damaged >= 1500 && outcome.damaged <= 1);
        let (result, _) = segment(&bytes, &names);
        let known = lines(&all, 2, 0).iter().filter(|line| result.find(&line.0).is_some()).count();
        prop_assert_eq!(known as u64, outcome.entries);
    }

    #[test]
    fn what_is_out_of_order_is_passed_over(
        mut lines in prop::collection::vec((any::<[u8; 20]>(), 0u32..4, any::<u32>(), any::<u32>()), 0..400),
        sorted in any::<bool>(),
    ) {
        // A hostile segment: any entries at all, behind checksums that are right.
        let names = Names::default();
        if sorted {
            lines.sort_unstable();
        }
        let hostile = segment(&build(&REPOSITORY, &[name(0), name(1)], &lines), &names);
        let (bytes, outcome) = merged(vec![hostile], &names, &HashSet::new()).expect("merges");
        let (result, _) = segment(&bytes, &names);
        prop_assert!(outcome.entries <= lines.len() as u64);
        let mut cursor =
            Cursor { segment: result, numbers: vec![0, 1], buffer: Vec::new(), next: 0, page: 0, entry: 0, last: None, damaged: 0 };
        let mut count = 0;
        while cursor.next().expect("reads").is_some() {
            count += 1;
        }
        prop_assert_eq!((count, cursor.damaged), (outcome.entries, 0), "the result is in order");
    }
}
