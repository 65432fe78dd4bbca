//! Names of packs, and keys.

use std::sync::{Arc, PoisonError, RwLock};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::crypto::{Cipher, SessionKey};
use crate::digest::Id;
use crate::record::{self, Ids};
use crate::{names, page};

use super::slots::Slots;

/// An id or a key out of Python bytes.
pub fn id(bytes: &[u8]) -> PyResult<Id> {
    bytes.try_into().map_err(|_| PyValueError::new_err("an id, key or name has 32 bytes"))
}

/// A repository or session id out of Python bytes.
pub fn id16(bytes: &[u8]) -> PyResult<[u8; 16]> {
    bytes.try_into().map_err(|_| PyValueError::new_err("a repository or session id has 16 bytes"))
}

#[pyclass(frozen, module = "imager._native")]
#[derive(Default)]
pub struct Names(pub Arc<names::Names>);

#[pymethods]
impl Names {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn intern(&self, name: &[u8]) -> PyResult<u32> {
        Ok(self.0.intern(&id(name)?))
    }

    fn reserve(&self) -> u32 {
        self.0.reserve()
    }

    fn resolve(&self, number: u32, name: &[u8]) -> PyResult<()> {
        Ok(self.0.resolve(number, &id(name)?)?)
    }

    fn name(&self, number: u32) -> Option<[u8; 32]> {
        self.0.name(number)
    }

    fn set_present(&self, names: Vec<Bound<'_, pyo3::types::PyBytes>>) -> PyResult<()> {
        self.0.set_present(names.iter().map(|name| id(name.as_bytes())).collect::<PyResult<_>>()?);
        Ok(())
    }

    fn absent(&self) -> Vec<[u8; 32]> {
        self.0.absent()
    }

    fn is_present(&self, number: u32) -> bool {
        self.0.is_present(number)
    }
}

#[pyclass(frozen, module = "imager._native")]
pub struct Vault {
    pub ids: Arc<Ids>,
    keys: RwLock<Vec<SessionKey>>,
}

impl Vault {
    /// The session key with this handle.
    pub fn key(&self, handle: u32) -> PyResult<SessionKey> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(handle as usize).cloned().ok_or_else(|| PyValueError::new_err("no such key handle"))
    }

    /// Keys of a pack, by envelope number. None in the list: a key that is not held.
    pub fn keys(&self, handles: &[Option<u32>]) -> PyResult<Vec<Option<SessionKey>>> {
        handles.iter().map(|handle| handle.map(|handle| self.key(handle)).transpose()).collect()
    }
}

#[pymethods]
impl Vault {
    #[new]
    fn new(repository: &[u8], id_key: &[u8]) -> PyResult<Self> {
        Ok(Self { ids: Arc::new(Ids::new(id16(repository)?, id(id_key)?)), keys: RwLock::default() })
    }

    fn add_key(&self, cipher: u8, key: &[u8]) -> PyResult<u32> {
        let key = SessionKey { cipher: Cipher::from_u8(cipher)?, key: id(key)? };
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        keys.push(key);
        Ok((keys.len() - 1) as u32)
    }

    fn block_id(&self, content: &[u8]) -> [u8; 32] {
        self.ids.block(content)
    }

    #[pyo3(signature = (level, first, slots, names, holder=None))]
    fn page_id(&self, level: u8, first: u64, slots: &Slots, names: &Names, holder: Option<u32>) -> PyResult<[u8; 32]> {
        // No pack has the last number: then no slot refers to the page's own pack.
        let (public, sealed) = page::encode(level, first, &slots.0, &names.0, holder.unwrap_or(u32::MAX))?;
        Ok(self.ids.page(&public, &sealed))
    }

    fn open_page(
        &self, record: &[u8], keys: Vec<Option<u32>>, names: &Names, holder: u32,
    ) -> PyResult<([u8; 32], u8, u64, Slots)> {
        let keys = self.keys(&keys)?;
        let mut record = record.to_vec();
        let (id, public, sealed) = record::open_page(&self.ids, &keys, &mut record)?;
        let page = page::decode(public, sealed, &names.0, holder)?;
        Ok((id, page.level, page.first, Slots(page.slots)))
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Names>()?;
    m.add_class::<Vault>()
}
