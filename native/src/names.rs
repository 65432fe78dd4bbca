//! Pack names as small numbers.
//!
//! Invariant: a number means one pack for the life of the process. A pack that is
//! being written has a number before it has a name.

use std::collections::{HashMap, HashSet};
use std::sync::{PoisonError, RwLock};

use crate::digest::Id;
use crate::error::{invalid, Result};

#[derive(Default)]
struct Table {
    numbers: HashMap<Id, u32>,
    names: Vec<Option<Id>>,
    /// What the storage lists; None until it has been listed.
    present: Option<HashSet<Id>>,
}

/// The table of names; shared by everything that refers to packs.
#[derive(Default)]
pub struct Names(RwLock<Table>);

impl Names {
    /// The number of `name`, a new one if it has none yet.
    pub fn intern(&self, name: &Id) -> u32 {
        if let Some(&number) = self.0.read().unwrap_or_else(PoisonError::into_inner).numbers.get(name) {
            return number;
        }
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(&number) = table.numbers.get(name) {
            return number;
        }
        let number = table.names.len() as u32;
        table.names.push(Some(*name));
        table.numbers.insert(*name, number);
        number
    }

    /// A number for a pack that is being written.
    pub fn reserve(&self) -> u32 {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        table.names.push(None);
        (table.names.len() - 1) as u32
    }

    /// The pack `number` is finished and has this name; it counts as present.
    pub fn resolve(&self, number: u32, name: &Id) -> Result<()> {
        let mut table = self.0.write().unwrap_or_else(PoisonError::into_inner);
        match table.names.get_mut(number as usize) {
            Some(slot @ None) => *slot = Some(*name),
            _ => return invalid(format!("pack number {number} was not reserved")),
        }
        table.numbers.insert(*name, number);
        if let Some(present) = &mut table.present {
            present.insert(*name);
        }
        Ok(())
    }

    /// The name of `number`, if it has one already.
    pub fn name(&self, number: u32) -> Option<Id> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).names.get(number as usize).copied().flatten()
    }

    /// What the storage's listing shows.
    pub fn set_present(&self, names: HashSet<Id>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).present = Some(names);
    }

    /// Whether the pack is there. Packs being written are; without a listing all are.
    pub fn is_present(&self, number: u32) -> bool {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match (table.names.get(number as usize), &table.present) {
            (Some(Some(name)), Some(present)) => present.contains(name),
            (Some(_), _) => true,
            (None, _) => false,
        }
    }

    /// The packs that have a name and are not there, sorted. None without a listing.
    pub fn absent(&self) -> Vec<Id> {
        let table = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let Some(present) = &table.present else {
            return Vec::new();
        };
        let mut absent: Vec<Id> =
            table.names.iter().flatten().filter(|name| !present.contains(*name)).copied().collect();
        absent.sort_unstable();
        absent.dedup();
        absent
    }

    /// How many numbers there are.
    pub fn len(&self) -> usize {
        self.0.read().unwrap_or_else(PoisonError::into_inner).names.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}
