//! What is stored already: this session's own blocks, then index segments.
//!
//! Invariant: of all who meet a new content at the same time exactly one stores it;
//! nobody waits for another while holding a claim of its own, so nobody waits for ever.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::hash::{BuildHasherDefault, Hasher};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock};
use std::time::Duration;

use crate::digest::Id;
use crate::error::{invalid, Result};
use crate::filter::Room;
use crate::index::{build_from, key_of, Key, Segment};
use crate::merge::Merger;
use crate::names::Names;
use crate::slots::Place;

/// Keys are keyed hashes: their first bytes are as good as any hash of them.
#[derive(Default)]
struct Prefix(u64);

impl Hasher for Prefix {
    fn finish(&self) -> u64 {
        self.0
    }
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word[..chunk.len()].copy_from_slice(chunk);
            self.0 = self.0.rotate_left(5) ^ u64::from_le_bytes(word);
        }
    }
}

enum State {
    Claimed,
    /// `handed`: a segment that holds it was made, and is to be loaded.
    Stored {
        place: Place,
        handed: bool,
    },
}

#[derive(Default)]
struct Shard {
    map: Mutex<HashMap<Key, State, BuildHasherDefault<Prefix>>>,
    published: Condvar,
}

/// Answer to a claim.
#[derive(Debug, PartialEq, Eq)]
pub enum Claim {
    /// It is stored here.
    Found(Place),
    /// It is new, and yours to store and then to `publish`.
    Yours,
    /// Another worker is storing it: `wait` for it once you hold no claim.
    Busy,
}

const SHARDS: usize = 64;
/// Bytes of filters that are held in memory: those of a hundred million entries.
const FILTERS: usize = 144 << 20;

/// A segment that is searched.
struct Loaded {
    name: Id,
    segment: Arc<Segment>,
    /// Number of each of its packs.
    numbers: Vec<u32>,
}

/// The dedup lookup of one run.
pub struct Known {
    names: Arc<Names>,
    shards: Vec<Shard>,
    /// The largest first: that is where most of what is known stands.
    segments: RwLock<Vec<Loaded>>,
    /// Further places of contents that `add` was told of more than once.
    others: Mutex<HashMap<Key, Vec<Place>>>,
    /// For filters.
    room: Arc<Room>,
    /// Damaged pages of segments that are searched no longer.
    damaged: AtomicUsize,
    pending: AtomicUsize,
    failed: AtomicBool,
}

impl Known {
    /// Nothing known yet.
    pub fn new(names: Arc<Names>) -> Self {
        Self {
            names,
            shards: (0..SHARDS).map(|_| Shard::default()).collect(),
            segments: RwLock::default(),
            others: Mutex::default(),
            room: Room::new(FILTERS),
            damaged: AtomicUsize::new(0),
            pending: AtomicUsize::new(0),
            failed: AtomicBool::new(false),
        }
    }

    fn shard(&self, key: &Key) -> &Shard {
        &self.shards[usize::from(key[KEY_BYTE]) % SHARDS]
    }

    /// Search another segment too, called `name`; its number of entries.
    pub fn load(&self, file: OwnedFd, repository: &[u8; 16], name: &Id) -> Result<u64> {
        let (segment, packs) = Segment::open(file, repository, &self.room)?;
        let numbers = packs.iter().map(|name| self.names.intern(name)).collect();
        let entries = segment.layout().entries;
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        let at = segments.partition_point(|other| other.segment.layout().entries >= entries);
        segments.insert(at, Loaded { name: *name, segment: Arc::new(segment), numbers });
        Ok(entries)
    }

    /// Search these segments no longer: another holds what they hold.
    pub fn unload(&self, names: &HashSet<Id>) {
        let mut segments = self.segments.write().unwrap_or_else(PoisonError::into_inner);
        segments.retain(|loaded| {
            let stays = !names.contains(&loaded.name);
            if !stays {
                self.damaged.fetch_add(loaded.segment.damaged(), Ordering::Relaxed);
            }
            stays
        });
    }

    /// Name, entries and bytes of each segment.
    pub fn loaded(&self) -> Vec<(Id, u64, u64)> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let line = |loaded: &Loaded| (loaded.name, loaded.segment.layout().entries, loaded.segment.layout().size());
        segments.iter().map(line).collect()
    }

    /// Names of the segments that name one of `packs`.
    pub fn naming(&self, packs: &HashSet<Id>) -> Vec<Id> {
        let numbers: HashSet<u32> = packs.iter().map(|name| self.names.intern(name)).collect();
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let names_one = |loaded: &&Loaded| loaded.numbers.iter().any(|number| numbers.contains(number));
        segments.iter().filter(names_one).map(|loaded| loaded.name).collect()
    }

    /// Begin to merge the segments of these names, in this order, into the empty file `out`.
    /// Nothing is loaded or unloaded by that.
    pub fn merge(&self, names: &[Id], out: OwnedFd, repository: &[u8; 16], forget: &HashSet<Id>) -> Result<Merger> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let mut inputs = Vec::with_capacity(names.len());
        for name in names {
            let Some(loaded) = segments.iter().find(|loaded| loaded.name == *name) else {
                return invalid("a segment that is to be merged is not loaded");
            };
            inputs.push((loaded.segment.clone(), loaded.numbers.clone()));
        }
        drop(segments);
        Merger::new(inputs, out, repository, &self.names, forget)
    }

    /// Look `id` up without claiming it.
    pub fn find(&self, id: &Id) -> Option<Place> {
        let key = key_of(id);
        let shard = self.shard(&key);
        if let Some(State::Stored { place, .. }) = shard.map.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            return Some(*place);
        }
        self.in_segments(&key)
    }

    /// Every place that is known for `id`: it may be stored more than once, and one of them damaged.
    pub fn places(&self, id: &Id) -> Vec<Place> {
        let key = key_of(id);
        let mut found = Vec::new();
        if let Some(State::Stored { place, .. }) =
            self.shard(&key).map.lock().unwrap_or_else(PoisonError::into_inner).get(&key)
        {
            found.push(*place);
        }
        found.extend(self.others.lock().unwrap_or_else(PoisonError::into_inner).get(&key).into_iter().flatten());
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        found.extend(segments.iter().filter_map(|loaded| self.in_segment(loaded, &key)));
        found.sort_unstable();
        found.dedup();
        found
    }

    fn in_segments(&self, key: &Key) -> Option<Place> {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        segments.iter().find_map(|loaded| self.in_segment(loaded, key))
    }

    fn in_segment(&self, loaded: &Loaded, key: &Key) -> Option<Place> {
        let (pack, offset, length) = loaded.segment.find(key)?;
        let pack = *loaded.numbers.get(pack as usize)?;
        self.names.is_present(pack).then_some(Place { pack, offset, length })
    }

    /// Find `id`, or claim it.
    pub fn claim(&self, id: &Id) -> Claim {
        let key = key_of(id);
        let shard = self.shard(&key);
        match shard.map.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            Some(State::Stored { place, .. }) => return Claim::Found(*place),
            Some(State::Claimed) => return Claim::Busy,
            None => {}
        }
        if let Some(place) = self.in_segments(&key) {
            return Claim::Found(place);
        }
        match shard.map.lock().unwrap_or_else(PoisonError::into_inner).entry(key) {
            Entry::Occupied(entry) => match entry.get() {
                State::Stored { place, .. } => Claim::Found(*place),
                State::Claimed => Claim::Busy,
            },
            Entry::Vacant(entry) => {
                entry.insert(State::Claimed);
                Claim::Yours
            }
        }
    }

    /// Take in where a content lies that nobody claimed; an earlier place of it stays known to `places`.
    pub fn add(&self, id: &Id, place: Place) {
        let key = key_of(id);
        let before = match self.shard(&key).map.lock().unwrap_or_else(PoisonError::into_inner).get(&key) {
            Some(State::Stored { place, .. }) => Some(*place),
            _ => None,
        };
        if let Some(before) = before.filter(|before| *before != place) {
            self.others.lock().unwrap_or_else(PoisonError::into_inner).entry(key).or_default().push(before);
        }
        self.publish(id, place);
    }

    /// What was claimed lies here now.
    pub fn publish(&self, id: &Id, place: Place) {
        let key = key_of(id);
        let shard = self.shard(&key);
        shard.map.lock().unwrap_or_else(PoisonError::into_inner).insert(key, State::Stored { place, handed: false });
        self.pending.fetch_add(1, Ordering::Relaxed);
        shard.published.notify_all();
    }

    /// Wait until the worker that claimed `id` has published it.
    pub fn wait(&self, id: &Id) -> Result<Place> {
        let key = key_of(id);
        let shard = self.shard(&key);
        let mut map = shard.map.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match map.get(&key) {
                Some(State::Stored { place, .. }) => return Ok(*place),
                Some(State::Claimed) if !self.failed.load(Ordering::Relaxed) => {
                    // The timeout only bounds how late a failure elsewhere is noticed.
                    map = shard
                        .published
                        .wait_timeout(map, Duration::from_millis(50))
                        .unwrap_or_else(PoisonError::into_inner)
                        .0;
                }
                Some(State::Claimed) => return invalid("another worker failed while storing the same content"),
                None => {
                    // It went from the map to a segment meanwhile.
                    let found = self.in_segments(&key);
                    return found.map_or_else(|| invalid("a content that was claimed was never stored"), Ok);
                }
            }
        }
    }

    /// A worker failed: nobody waits any longer.
    pub fn fail(&self) {
        self.failed.store(true, Ordering::Relaxed);
    }

    /// How many entries no segment holds yet.
    pub fn pending(&self) -> usize {
        self.pending.load(Ordering::Relaxed)
    }

    /// How many index pages turned out to be damaged.
    pub fn damaged_pages(&self) -> usize {
        let segments = self.segments.read().unwrap_or_else(PoisonError::into_inner);
        let now: usize = segments.iter().map(|loaded| loaded.segment.damaged()).sum();
        now + self.damaged.load(Ordering::Relaxed)
    }

    /// The entries whose packs are finished, as a segment's bytes. None if there are none.
    /// They are still found until `forget`, which comes after the segment was loaded.
    pub fn segment(&self, repository: &[u8; 16]) -> Result<Option<Vec<u8>>> {
        let mut entries = Vec::with_capacity(self.pending());
        for shard in &self.shards {
            let mut map = shard.map.lock().unwrap_or_else(PoisonError::into_inner);
            for (key, state) in map.iter_mut() {
                if let State::Stored { place, handed: handed @ false } = state {
                    if self.names.name(place.pack).is_some() {
                        entries.push((*key, *place));
                        *handed = true;
                    }
                }
            }
        }
        if entries.is_empty() {
            return Ok(None);
        }
        self.pending.fetch_sub(entries.len(), Ordering::Relaxed);
        build_from(repository, entries, |number| self.names.name(number)).map(Some)
    }

    /// Free the memory of the entries that segments were made of.
    pub fn forget(&self) {
        for shard in &self.shards {
            let mut map = shard.map.lock().unwrap_or_else(PoisonError::into_inner);
            map.retain(|_, state| !matches!(state, State::Stored { handed: true, .. }));
            map.shrink_to_fit();
        }
        self.others.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// The byte of a key that picks the shard; not one that the map's hash begins with.
const KEY_BYTE: usize = 19;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_of_many_stores_a_content() {
        let known = Known::new(Arc::default());
        let stored = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    for n in 0..500u32 {
                        let id: Id = blake3::hash(&n.to_le_bytes()).into();
                        let place = Place { pack: 0, offset: n, length: 1 };
                        match known.claim(&id) {
                            Claim::Yours => {
                                stored.fetch_add(1, Ordering::Relaxed);
                                known.publish(&id, place);
                            }
                            Claim::Found(found) => assert_eq!(found, place),
                            Claim::Busy => assert_eq!(known.wait(&id).expect("published"), place),
                        }
                    }
                });
            }
        });
        assert_eq!(stored.into_inner(), 500);
        assert_eq!(known.pending(), 500);
    }

    #[test]
    fn what_was_handed_over_is_found_throughout() {
        use std::io::Write as _;
        let names: Arc<Names> = Arc::default();
        let pack = names.intern(&[9; 32]);
        let known = Known::new(names);
        let place = Place { pack, offset: 5, length: 70 };
        known.publish(&[1; 32], place);
        let bytes = known.segment(&[7; 16]).expect("builds").expect("has an entry");
        assert_eq!((known.pending(), known.find(&[1; 32])), (0, Some(place)));
        assert!(known.segment(&[7; 16]).expect("builds").is_none());
        let mut file = tempfile::tempfile().expect("file");
        file.write_all(&bytes).expect("write");
        known.load(file.into(), &[7; 16], &[3; 32]).expect("loads");
        known.forget();
        assert_eq!(known.find(&[1; 32]), Some(place));
        assert_eq!(known.wait(&[1; 32]).expect("stored"), place);
        assert_eq!(known.loaded(), [([3; 32], 1, bytes.len() as u64)]);
        assert_eq!(known.naming(&HashSet::from([[9; 32]])), [[3; 32]]);
        known.unload(&HashSet::from([[3; 32]]));
        assert_eq!(known.find(&[1; 32]), None);
    }

    #[test]
    fn every_place_of_a_content_is_told() {
        let known = Known::new(Arc::default());
        let place = |offset| Place { pack: 0, offset, length: 70 };
        for offset in [3, 1, 3, 2, 2] {
            known.add(&[1; 32], place(offset));
        }
        assert_eq!(known.places(&[1; 32]), [place(1), place(2), place(3)]);
        assert_eq!(known.find(&[1; 32]), Some(place(2)));
        assert!(known.places(&[2; 32]).is_empty());
    }

    #[test]
    fn a_failure_frees_those_who_wait() {
        let known = Known::new(Arc::default());
        assert_eq!(known.claim(&[1; 32]), Claim::Yours);
        assert_eq!(known.claim(&[1; 32]), Claim::Busy);
        known.fail();
        assert!(known.wait(&[1; 32]).is_err());
    }
}
