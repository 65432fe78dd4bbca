//! What is stored already.

use std::os::fd::{BorrowedFd, OwnedFd};

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::known;
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

    fn load(&self, fd: i32, repository: &[u8]) -> PyResult<u64> {
        if fd < 0 {
            return Err(PyValueError::new_err("not a file descriptor"));
        }
        // SAFETY: the caller keeps the descriptor open during the call, and it is not -1.
        let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
        let owned: OwnedFd = borrowed.try_clone_to_owned()?;
        Ok(self.0.load(owned, &id16(repository)?)?)
    }

    fn add_pack(&self, number: u32, records: Vec<Record>) {
        for (_, id, offset, length) in records {
            self.0.publish(&id, Place { pack: number, offset, length });
        }
    }

    fn find(&self, id_: &[u8]) -> PyResult<Option<(u32, u32, u32)>> {
        Ok(self.0.find(&id(id_)?).map(|place| (place.pack, place.offset, place.length)))
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

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Known>()
}
