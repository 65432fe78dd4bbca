//! What is stored already.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::known;
use crate::merge::Merger;
use crate::slots::Place;

use super::packs::Record;
use super::vault::{id, id16, Names};

#[pyclass(frozen, module = "imager._native")]
pub struct Known(pub known::Known);

#[pymethods]
impl Known {
    #[new]
    fn new(names: &Names) -> Self {
        Self(known::Known::new(names.0.clone()))
    }

    #[pyo3(signature = (fd, repository, name=[0; 32]))]
    fn load(&self, fd: i32, repository: &[u8], name: [u8; 32]) -> PyResult<u64> {
        Ok(self.0.load(owned(fd)?, &id16(repository)?, &name)?)
    }

    fn unload(&self, names: Vec<[u8; 32]>) {
        self.0.unload(&names.into_iter().collect());
    }

    #[getter]
    fn loaded(&self) -> Vec<([u8; 32], u64, u64)> {
        self.0.loaded()
    }

    fn naming(&self, packs: Vec<[u8; 32]>) -> Vec<[u8; 32]> {
        self.0.naming(&packs.into_iter().collect())
    }

    fn merge(&self, names: Vec<[u8; 32]>, out: i32, repository: &[u8], forget: Vec<[u8; 32]>) -> PyResult<Merge> {
        let merger = self.0.merge(&names, owned(out)?, &id16(repository)?, &forget.into_iter().collect())?;
        Ok(Merge(Mutex::new(merger)))
    }

    fn add_pack(&self, number: u32, records: Vec<Record>) {
        for (_, id, offset, length) in records {
            self.0.add(&id, Place { pack: number, offset, length });
        }
    }

    fn count(&self, py: Python<'_>, ids: &[u8]) -> PyResult<usize> {
        let (ids, rest) = ids.as_chunks::<32>();
        if !rest.is_empty() {
            return Err(PyValueError::new_err("ids have 32 bytes each"));
        }
        Ok(py.detach(|| ids.iter().filter(|id| self.0.find(id).is_some()).count()))
    }

    fn find(&self, id_: &[u8]) -> PyResult<Option<(u32, u32, u32)>> {
        Ok(self.0.find(&id(id_)?).map(|place| (place.pack, place.offset, place.length)))
    }

    fn places(&self, id_: &[u8]) -> PyResult<Vec<(u32, u32, u32)>> {
        let places = self.0.places(&id(id_)?);
        Ok(places.into_iter().map(|place| (place.pack, place.offset, place.length)).collect())
    }

    fn forget(&self) {
        self.0.forget();
    }

    #[getter]
    fn pending(&self) -> usize {
        self.0.pending()
    }

    #[getter]
    fn damaged_pages(&self) -> usize {
        self.0.damaged_pages()
    }

    fn segment<'py>(&self, py: Python<'py>, repository: &[u8]) -> PyResult<Option<Bound<'py, PyBytes>>> {
        let repository = id16(repository)?;
        let bytes = py.detach(|| self.0.segment(&repository))?;
        Ok(bytes.map(|bytes| PyBytes::new(py, &bytes)))
    }
}

/// A duplicate of a descriptor that the caller keeps open during the call.
fn owned(fd: i32) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err("not a file descriptor"));
    }
    // SAFETY: the caller keeps the descriptor open during the call, and it is not -1.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    Ok(borrowed.try_clone_to_owned()?)
}

/// A merge of index segments under way.
#[pyclass(frozen, module = "imager._native")]
pub struct Merge(Mutex<Merger>);

#[pymethods]
impl Merge {
    fn step(&self, py: Python<'_>) -> PyResult<u64> {
        Ok(py.detach(|| self.0.lock().unwrap_or_else(PoisonError::into_inner).step())?)
    }

    /// (name, entries, packs, bytes, entries dropped, damaged pages).
    fn outcome(&self) -> PyResult<([u8; 32], u64, u64, u64, u64, u64)> {
        let one = self.0.lock().unwrap_or_else(PoisonError::into_inner).outcome()?;
        Ok((one.name, one.entries, one.packs, one.size, one.dropped, one.damaged))
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Merge>()?;
    m.add_class::<Known>()
}
