//! A cache of values that are shared, bounded by what they cost.
//!
//! Invariant: what is kept costs no more than the limit, or is a single value. What was used longest
//! ago goes first.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

struct Kept<V> {
    value: Arc<V>,
    cost: usize,
    used: u64,
}

struct State<K, V> {
    kept: HashMap<K, Kept<V>>,
    /// Uses in their order; only a key's latest one counts.
    uses: VecDeque<(K, u64)>,
    clock: u64,
    cost: usize,
}

/// Values by key.
pub struct Cache<K, V> {
    limit: usize,
    state: Mutex<State<K, V>>,
}

impl<K: Hash + Eq + Copy, V> Cache<K, V> {
    /// A cache of values that cost `limit` in all.
    pub fn new(limit: usize) -> Self {
        let state = State { kept: HashMap::new(), uses: VecDeque::new(), clock: 0, cost: 0 };
        Self { limit, state: Mutex::new(state) }
    }

    fn lock(&self) -> MutexGuard<'_, State<K, V>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The value of a key, if it is kept.
    pub fn get(&self, key: K) -> Option<Arc<V>> {
        let state = &mut *self.lock();
        let kept = state.kept.get_mut(&key)?;
        state.clock += 1;
        kept.used = state.clock;
        let value = kept.value.clone();
        state.uses.push_back((key, state.clock));
        if state.uses.len() > 8 * state.kept.len() + 64 {
            let kept = &state.kept;
            state.uses.retain(|(key, used)| kept.get(key).is_some_and(|one| one.used == *used));
        }
        Some(value)
    }

    /// Keep a value; gives it back, shared.
    pub fn put(&self, key: K, value: V, cost: usize) -> Arc<V> {
        let value = Arc::new(value);
        let state = &mut *self.lock();
        state.clock += 1;
        let used = state.clock;
        state.uses.push_back((key, used));
        state.cost += cost;
        if let Some(old) = state.kept.insert(key, Kept { value: value.clone(), cost, used }) {
            state.cost -= old.cost;
        }
        while state.cost > self.limit && state.kept.len() > 1 {
            let Some((oldest, used)) = state.uses.pop_front() else { break };
            if state.kept.get(&oldest).is_some_and(|one| one.used == used) {
                state.cost -= state.kept.remove(&oldest).map_or(0, |one| one.cost);
            }
        }
        value
    }

    /// Keep a key's value no longer.
    pub fn remove(&self, key: K) {
        let state = &mut *self.lock();
        if let Some(old) = state.kept.remove(&key) {
            state.cost -= old.cost;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_least_used_goes_first() {
        let cache = Cache::new(3);
        for key in 0..3 {
            cache.put(key, key * 10, 1);
        }
        assert_eq!(cache.get(0).as_deref(), Some(&0));
        cache.put(3, 30, 1);
        assert!(cache.get(1).is_none());
        assert_eq!(cache.get(0).as_deref(), Some(&0));
        cache.remove(0);
        assert!(cache.get(0).is_none());
    }

    proptest! {
        #[test]
        fn it_keeps_to_its_limit(steps in prop::collection::vec((0u8..12, 0usize..5, any::<bool>()), 0..300)) {
            let cache = Cache::new(10);
            for (key, cost, put) in steps {
                if put {
                    cache.put(key, cost, cost);
                    prop_assert_eq!(cache.get(key).map(|value| *value), Some(cost));
                } else {
                    let _ = cache.get(key);
                }
                let state = cache.lock();
                prop_assert_eq!(state.cost, state.kept.values().map(|one| one.cost).sum::<usize>());
                prop_assert!(state.cost <= 10 || state.kept.len() == 1);
                prop_assert!(state.uses.len() <= 8 * state.kept.len() + 65 + 300);
            }
        }
    }
}
