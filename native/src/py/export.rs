//! Images that are served at random access.

use std::os::fd::{FromRawFd, OwnedFd};
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::{Error, Result};
use crate::export::image::{Image, Pack, Supply};
use crate::export::{server, session};
use crate::slots::Slot;

use super::slots::Slots;
use super::vault::Vault;

/// Asks a Python object. What it raises is an error of the block or page that was asked for.
struct Asked {
    object: Py<PyAny>,
    vault: Py<Vault>,
}

fn said(error: PyErr) -> Error {
    Python::attach(|py| Error::Damaged(error.value(py).to_string()))
}

impl Supply for Asked {
    fn leaf(&self, index: u64) -> Result<Vec<Slot>> {
        Python::attach(|py| {
            let found = self.object.call_method1(py, "leaf", (index,))?;
            Ok(found.bind(py).cast::<Slots>().map_err(PyErr::from)?.borrow().0.clone())
        })
        .map_err(said)
    }

    fn pack(&self, number: u32) -> Result<Pack> {
        Python::attach(|py| {
            let found = self.object.call_method1(py, "pack", (number,))?;
            let (fd, handles): (i32, Vec<Option<u32>>) = found.extract(py)?;
            if fd < 0 {
                return Err(pyo3::exceptions::PyValueError::new_err("not a file descriptor"));
            }
            // SAFETY: `pack` gives a descriptor that is the caller's own from now on.
            let fd = unsafe { OwnedFd::from_raw_fd(fd) };
            Ok(Pack { fd, keys: self.vault.bind(py).get().keys(&handles)? })
        })
        .map_err(said)
    }

    fn elsewhere(&self, block: u64, slot: &Slot, reason: &str) -> Result<Vec<u8>> {
        Python::attach(|py| {
            let place = (slot.place.pack, slot.place.offset);
            let id = PyBytes::new(py, &slot.id);
            self.object.call_method1(py, "elsewhere", (block, id, place, reason))?.extract(py)
        })
        .map_err(said)
    }

    fn changed(&self) -> Result<Vec<(u64, u64)>> {
        Python::attach(|py| self.object.call_method0(py, "changed")?.extract(py)).map_err(said)
    }
}

#[pyclass(frozen, module = "imager._native")]
pub struct ServedImage(Arc<Image>);

#[pymethods]
impl ServedImage {
    #[new]
    #[pyo3(signature = (vault, supply, *, image_size, block_size, room, packs, based))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        py: Python<'_>, vault: Py<Vault>, supply: Py<PyAny>, image_size: u64, block_size: usize, room: usize,
        packs: usize, based: bool,
    ) -> PyResult<Self> {
        let ids = vault.bind(py).get().ids.clone();
        let supply = Box::new(Asked { object: supply, vault });
        Ok(Self(Arc::new(Image::new(ids, supply, image_size, block_size, room, packs, based)?)))
    }
}

#[pyfunction]
fn serve_images(
    py: Python<'_>, exports: Vec<(String, String, Py<ServedImage>, u64, u64)>, listener: i32, stop: i32,
) -> PyResult<()> {
    let exports = exports
        .into_iter()
        .map(|(name, description, image, start, size)| {
            let image = image.get().0.clone();
            if start.checked_add(size).is_none_or(|end| end > image.size) {
                return Err(Error::Invalid("an export reaches beyond its image".into()).into());
            }
            Ok(session::Export { name, description, image, start, size })
        })
        .collect::<PyResult<Vec<_>>>()?;
    if listener < 0 || stop < 0 {
        return Err(Error::Invalid("not a file descriptor".into()).into());
    }
    Ok(py.detach(|| server::serve(&exports, listener, stop))?)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<ServedImage>()?;
    m.add_function(wrap_pyfunction!(serve_images, m)?)
}
