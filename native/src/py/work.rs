//! The long jobs: scan, fetch, compare.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::codec::Codec;
use crate::io::Fd;
use crate::source::{OnError, Source};
use crate::{compare, fetch, gather, scan};

use super::known::Known;
use super::packs::PackWriter;
use super::slots::Slots;
use super::vault::Vault;

#[pyclass(frozen, module = "imager._native")]
struct Scan {
    #[pyo3(get)]
    slots: Py<Slots>,
    counts: scan::Counts,
    #[pyo3(get)]
    unreadable: Vec<(u64, u64)>,
    #[pyo3(get)]
    differing: Vec<(u64, u64)>,
}

#[pymethods]
impl Scan {
    #[getter]
    fn read(&self) -> u64 {
        self.counts.read
    }
    #[getter]
    fn zero(&self) -> u64 {
        self.counts.zero
    }
    #[getter]
    fn changed(&self) -> u64 {
        self.counts.changed
    }
    #[getter(new)]
    fn new_blocks(&self) -> u64 {
        self.counts.new
    }
    #[getter]
    fn shared(&self) -> u64 {
        self.counts.shared
    }
    #[getter]
    fn stored(&self) -> u64 {
        self.counts.stored
    }
}

#[pyfunction(name = "scan")]
#[pyo3(signature = (vault, source, ranges, *, image_size, block_size, base, pack=None, known=None, codec=1, level=1,
    threads=0, direct=false, source_offset=0, skip_errors=false, sector=512))]
#[allow(clippy::too_many_arguments)]
fn scan_(
    py: Python<'_>, vault: &Vault, source: &Bound<'_, PyAny>, ranges: Vec<(u64, u64)>, image_size: u64,
    block_size: usize, base: Option<&Slots>, pack: Option<&PackWriter>, known: Option<&Known>, codec: u8, level: i32,
    threads: usize, direct: bool, source_offset: u64, skip_errors: bool, sector: usize,
) -> PyResult<Scan> {
    let source = if let Ok(bytes) = source.cast::<PyBytes>() {
        Source::Buffer { bytes: bytes.as_bytes(), offset: source_offset }
    } else if let Ok(fd) = source.extract::<i32>() {
        Source::File { fd: Fd::new(fd)?, direct }
    } else {
        return Err(PyTypeError::new_err("a source is a descriptor or bytes"));
    };
    let codec = Codec::from_u8(codec)?;
    let store = match (pack, known) {
        (Some(pack), Some(known)) => Some(scan::Store { pack: &pack.inner, known: &known.0, codec, level }),
        (None, None) => None,
        _ => return Err(PyTypeError::new_err("pack and known go together")),
    };
    let base = base.map(|base| base.0.as_slice());
    let ids = vault.ids.as_ref();
    let found = py.detach(|| {
        scan::scan(&scan::Job {
            ids,
            source,
            ranges: &ranges,
            image_size,
            block_size,
            base,
            store,
            threads,
            on_error: OnError { skip: skip_errors, sector },
        })
    })?;
    Ok(Scan {
        slots: Py::new(py, Slots(found.slots))?,
        counts: found.counts,
        unreadable: found.unreadable,
        differing: found.differing,
    })
}

#[pyclass(frozen, module = "imager._native")]
#[derive(Default)]
struct Gather(RwLock<gather::Gather>);

impl Gather {
    fn read(&self) -> std::sync::RwLockReadGuard<'_, gather::Gather> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Gather {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn add(&self, first: u64, slots: &Slots) -> PyResult<()> {
        Ok(self.0.write().unwrap_or_else(PoisonError::into_inner).add(first, &slots.0)?)
    }

    fn add_ranges(&self, first: u64, slots: &Slots, ranges: Vec<(u64, u64)>) -> PyResult<()> {
        Ok(self.0.write().unwrap_or_else(PoisonError::into_inner).add_ranges(first, &slots.0, &ranges)?)
    }

    fn sort(&self, py: Python<'_>) {
        py.detach(|| self.0.write().unwrap_or_else(PoisonError::into_inner).sort());
    }

    fn __len__(&self) -> usize {
        self.read().len()
    }

    #[getter]
    fn blocks(&self) -> usize {
        self.read().blocks()
    }

    #[getter]
    fn stored(&self) -> u64 {
        self.read().stored()
    }

    fn slice_end(&self, start: usize, max_blocks: usize) -> usize {
        self.read().slice_end(start, max_blocks)
    }

    fn spans(&self, start: usize, end: usize, gap: u64) -> Vec<(u32, u64, u64)> {
        self.read().spans(start..end, gap)
    }

    fn packs(&self, start: usize, end: usize) -> Vec<u32> {
        self.read().packs(start..end)
    }
}

#[pyclass(frozen, get_all, module = "imager._native")]
struct Failure {
    pack: u32,
    offset: u32,
    id: [u8; 32],
    blocks: Vec<u64>,
    reason: String,
}

type Handles = HashMap<u32, (i32, Vec<Option<u32>>)>;

fn packs(vault: &Vault, packs: Handles) -> PyResult<fetch::Packs> {
    packs
        .into_iter()
        .map(|(number, (fd, handles))| Ok((number, fetch::Pack { fd: Fd::new(fd)?, keys: vault.keys(&handles)? })))
        .collect()
}

#[pyfunction(name = "fetch")]
#[pyo3(signature = (vault, packs, gather, start, end, *, image_size, block_size, target=None, threads=0))]
#[allow(clippy::too_many_arguments)]
fn fetch_(
    py: Python<'_>, vault: &Vault, packs: Handles, gather: &Gather, start: usize, end: usize, image_size: u64,
    block_size: usize, target: Option<i32>, threads: usize,
) -> PyResult<(u64, Vec<Failure>)> {
    let packs = self::packs(vault, packs)?;
    let target = target.map(Fd::new).transpose()?;
    let ids = vault.ids.as_ref();
    let (bytes, failures) = py.detach(|| {
        let gather = &gather.read();
        fetch::fetch(&fetch::Job {
            ids,
            packs: &packs,
            gather,
            range: start..end.min(gather.len()),
            image_size,
            block_size,
            target,
            threads,
        })
    })?;
    let failure = |f: fetch::Failure| Failure {
        pack: f.place.pack,
        offset: f.place.offset,
        id: f.id,
        blocks: f.blocks,
        reason: f.reason,
    };
    Ok((bytes, failures.into_iter().map(failure).collect()))
}

#[pyfunction]
#[pyo3(signature = (vault, packs, gather, *, image_size, block_size))]
fn read_blocks<'py>(
    py: Python<'py>, vault: &Vault, packs: Handles, gather: &Gather, image_size: u64, block_size: usize,
) -> PyResult<Vec<(u64, Bound<'py, PyBytes>)>> {
    let packs = self::packs(vault, packs)?;
    let gather = &gather.read();
    let range = 0..gather.len();
    let job =
        fetch::Job { ids: &vault.ids, packs: &packs, gather, range, image_size, block_size, target: None, threads: 1 };
    let blocks = fetch::read_blocks(&job)?;
    Ok(blocks.into_iter().map(|(block, bytes)| (block, PyBytes::new(py, &bytes))).collect())
}

#[pyfunction]
#[pyo3(signature = (a, b, start, end, *, grain=4096, threads=0, direct=false))]
#[allow(clippy::too_many_arguments)]
fn compare_files(
    py: Python<'_>, a: i32, b: i32, start: u64, end: u64, grain: usize, threads: usize, direct: bool,
) -> PyResult<Vec<(u64, u64)>> {
    let (a, b) = (Fd::new(a)?, Fd::new(b)?);
    Ok(py.detach(|| compare::compare_files(a, b, start, end, grain, threads, direct))?)
}

#[pyfunction]
#[pyo3(signature = (fd, start, end, *, direct=false, threads=0))]
fn non_zero(py: Python<'_>, fd: i32, start: u64, end: u64, direct: bool, threads: usize) -> PyResult<Vec<(u64, u64)>> {
    let fd = Fd::new(fd)?;
    Ok(py.detach(|| compare::non_zero(fd, start, end, threads, direct))?)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Scan>()?;
    m.add_class::<Gather>()?;
    m.add_class::<Failure>()?;
    m.add_function(wrap_pyfunction!(scan_, m)?)?;
    m.add_function(wrap_pyfunction!(fetch_, m)?)?;
    m.add_function(wrap_pyfunction!(read_blocks, m)?)?;
    m.add_function(wrap_pyfunction!(compare_files, m)?)?;
    m.add_function(wrap_pyfunction!(non_zero, m)?)
}
