//! Upkeep: marks, pages read for them, records moved.

use std::sync::{Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

use crate::io::Fd;
use crate::marks::{self, Search};
use crate::pack::Parts;
use crate::repack;
use crate::slots::Place;

use super::known::Known;
use super::packs::Record;
use super::vault::{id, id16, Names};

#[pyclass(frozen, module = "imager._native")]
#[derive(Default)]
struct Marks(Mutex<marks::Marks>);

impl Marks {
    fn lock(&self) -> MutexGuard<'_, marks::Marks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Marks {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    fn packs(&self) -> Vec<u32> {
        self.lock().packs()
    }

    fn extent(&self, pack: u32) -> marks::Extent {
        self.lock().extent(pack)
    }

    fn offsets(&self, pack: u32, newest: bool) -> Vec<u32> {
        self.lock().offsets(pack, newest)
    }

    fn add(&self, pack: u32, offset: u32, length: u32, newest: bool) -> PyResult<()> {
        Ok(self.lock().add(Place { pack, offset, length }, newest)?)
    }

    fn take_doubtful(&self) -> Vec<Doubtful> {
        let place = |place: Place| (place.pack, place.offset, place.length);
        let found = self.lock().take_doubtful();
        found.into_iter().map(|(id, places, newest)| (id, places.into_iter().map(place).collect(), newest)).collect()
    }

    #[getter]
    fn lost(&self) -> u64 {
        self.lock().lost
    }

    #[getter]
    fn read(&self) -> u64 {
        self.lock().read
    }

    #[getter]
    fn pages(&self) -> usize {
        self.lock().pages()
    }
}

/// (id, places: pack number, offset, length; whether a newest set needs it).
type Doubtful = ([u8; 32], Vec<(u32, u32, u32)>, bool);
/// (id, pack number, offset, length).
type Child = ([u8; 32], u32, u32, u32);

#[pyclass(frozen, module = "imager._native")]
struct MapPack(marks::MapPack);

#[pymethods]
impl MapPack {
    #[new]
    fn new(py: Python<'_>, fd: i32, name: &[u8], repository: &[u8]) -> PyResult<Self> {
        let (fd, name, repository) = (Fd::new(fd)?, id(name)?, id16(repository)?);
        Ok(Self(py.detach(|| marks::MapPack::open(fd, &name, &repository))?))
    }

    fn digest(&self, offset: u32) -> Option<[u8; 32]> {
        self.0.digest(offset)
    }

    #[pyo3(signature = (fd, id_, pack, offset, level, *, names, known, stranded, marks, newest))]
    #[allow(clippy::too_many_arguments)]
    fn mark(
        &self, py: Python<'_>, fd: i32, id_: &[u8], pack: u32, offset: u32, level: u8, names: &Names, known: &Known,
        stranded: &Known, marks: &Marks, newest: bool,
    ) -> PyResult<Option<Vec<Child>>> {
        let (fd, id) = (Fd::new(fd)?, id(id_)?);
        let search = Search { names: &names.0, known: &known.0, stranded: &stranded.0 };
        let place = Place { pack, offset, length: 0 };
        let found = py.detach(|| self.0.mark(fd, (id, place), level, &search, &mut marks.lock(), newest))?;
        let child = |(id, place): marks::Child| (id, place.pack, place.offset, place.length);
        Ok(found.map(|found| found.into_iter().map(child).collect()))
    }
}

#[pyclass(frozen, get_all, module = "imager._native")]
struct Merged {
    name: Option<[u8; 32]>,
    size: u64,
    records: Vec<Record>,
    damaged: Vec<(usize, u32)>,
    read: u64,
}

/// (descriptor, name, offsets of the wanted records).
type Source = (i32, [u8; 32], Vec<u32>);

#[pyfunction]
#[pyo3(signature = (fd, sources, *, kind, repository, session, sequence))]
fn merge_packs(
    py: Python<'_>, fd: i32, sources: Vec<Source>, kind: u8, repository: &[u8], session: &[u8], sequence: u64,
) -> PyResult<Merged> {
    let parts = Parts { kind, repository: id16(repository)?, session: id16(session)?, sequence };
    let out = Fd::new(fd)?;
    let sources = sources
        .iter()
        .map(|(fd, name, offsets)| Ok(repack::From { fd: Fd::new(*fd)?, name, offsets }))
        .collect::<PyResult<Vec<_>>>()?;
    let merged = py.detach(|| repack::merge(out, parts, &sources))?;
    let (name, size) = merged.pack.map_or((None, 0), |(name, size)| (Some(name), size));
    Ok(Merged { name, size, records: merged.records, damaged: merged.damaged, read: merged.read })
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_class::<Marks>()?;
    m.add_class::<MapPack>()?;
    m.add_class::<Merged>()?;
    m.add_function(wrap_pyfunction!(merge_packs, m)?)
}
