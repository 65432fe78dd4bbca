//! Packs: writing, checking, listing.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::io::Fd;
use crate::pack;

use super::slots::Slots;
use super::vault::{id, id16, Names, Vault};

#[pyclass(frozen, module = "imager._native")]
pub struct PackWriter {
    pub inner: pack::Writer,
    ids: std::sync::Arc<crate::record::Ids>,
}

#[pymethods]
impl PackWriter {
    #[new]
    #[pyo3(signature = (vault, fd, *, kind, session, sequence, envelope, key, number))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        vault: &Vault, fd: i32, kind: u8, session: &[u8], sequence: u64, envelope: Option<&[u8]>, key: Option<u32>,
        number: u32,
    ) -> PyResult<Self> {
        let envelope = match envelope.map(<&[u8; pack::ENVELOPE]>::try_from) {
            None => None,
            Some(Ok(envelope)) => Some(envelope),
            Some(Err(_)) => return Err(PyValueError::new_err("an envelope has 104 bytes")),
        };
        let origin =
            pack::Origin { kind, repository: vault.ids.repository, session: id16(session)?, sequence, envelope };
        let key = key.map(|key| vault.key(key)).transpose()?;
        let inner = pack::Writer::new(Fd::new(fd)?, origin, key, number)?;
        Ok(Self { inner, ids: vault.ids.clone() })
    }

    #[getter]
    fn number(&self) -> u32 {
        self.inner.number
    }

    #[getter]
    fn size(&self) -> u64 {
        self.inner.extent().0
    }

    #[getter]
    fn records(&self) -> u32 {
        self.inner.extent().1
    }

    fn add_page(&self, py: Python<'_>, level: u8, first: u64, slots: &Slots, names: &Names) -> PyResult<Slots> {
        let slots = &slots.0;
        let slot = py.detach(|| self.inner.add_page(&self.ids, level, first, slots, &names.0))?;
        Ok(Slots(vec![slot]))
    }

    fn finish(&self, py: Python<'_>) -> PyResult<([u8; 32], u64)> {
        Ok(py.detach(|| self.inner.finish())?)
    }
}

#[pyclass(frozen, get_all, module = "imager._native")]
struct PackReport {
    ok: bool,
    problem: Option<String>,
    records: usize,
    damaged: Vec<([u8; 32], u32, u32)>,
}

#[pyfunction]
#[pyo3(signature = (fd, name, repository, threads=0))]
fn check_pack(py: Python<'_>, fd: i32, name: &[u8], repository: &[u8], threads: usize) -> PyResult<PackReport> {
    let (fd, name, repository) = (Fd::new(fd)?, id(name)?, id16(repository)?);
    let report = py.detach(|| pack::check(fd, &name, &repository, threads))?;
    let ok = report.problem.is_none() && report.damaged.is_empty();
    Ok(PackReport { ok, problem: report.problem, records: report.records, damaged: report.damaged })
}

/// (kind, id, offset, length).
pub type Record = (u8, [u8; 32], u32, u32);

#[pyfunction]
fn pack_records(py: Python<'_>, fd: i32, name: Option<&[u8]>, repository: &[u8]) -> PyResult<Vec<Record>> {
    let (fd, name, repository) = (Fd::new(fd)?, name.map(id).transpose()?, id16(repository)?);
    let frame = py.detach(|| pack::read_frame(fd, name.as_ref(), &repository))?;
    let line = |e: pack::Entry| (e.head.kind as u8, e.head.id, e.offset as u32, e.head.record_len());
    Ok(frame.entries.into_iter().map(line).collect())
}

#[pyfunction]
fn pack_envelopes(py: Python<'_>, header: &[u8], repository: &[u8]) -> PyResult<Vec<Py<pyo3::types::PyBytes>>> {
    let header = pack::decode_header(header, &id16(repository)?)?;
    Ok(header.envelopes.iter().map(|e| pyo3::types::PyBytes::new(py, e).unbind()).collect())
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<PackWriter>()?;
    m.add_class::<PackReport>()?;
    m.add_function(wrap_pyfunction!(check_pack, m)?)?;
    m.add_function(wrap_pyfunction!(pack_records, m)?)?;
    m.add_function(wrap_pyfunction!(pack_envelopes, m)?)
}
