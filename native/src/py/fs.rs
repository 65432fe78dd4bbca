//! Allocation maps of filesystems.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::fs::{self, disk::Disk, Kind};
use crate::io::Fd;

fn open(kind: &str, fd: i32, start: u64, size: u64) -> PyResult<(Kind, Disk<Fd>)> {
    let kind = Kind::from_name(kind).ok_or_else(|| PyValueError::new_err("no such kind of filesystem"))?;
    let disk = Disk::new(Fd::new(fd)?, start, size).ok_or_else(|| PyValueError::new_err("no such range"))?;
    Ok((kind, disk))
}

#[pyfunction]
fn fs_probe(py: Python<'_>, kind: &str, fd: i32, start: u64, size: u64) -> PyResult<Option<&'static str>> {
    let (kind, disk) = open(kind, fd, start, size)?;
    Ok(py.detach(|| fs::probe(kind, &disk)))
}

type Answer = (Option<Vec<(u64, u64)>>, String);

#[pyfunction]
fn fs_used(py: Python<'_>, kind: &str, fd: i32, start: u64, size: u64) -> PyResult<Answer> {
    let (kind, disk) = open(kind, fd, start, size)?;
    Ok(match py.detach(|| fs::used(kind, &disk)) {
        Ok(used) => (Some(used.ranges), used.note),
        Err(doubt) => (None, doubt.0),
    })
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(fs_probe, m)?)?;
    m.add_function(wrap_pyfunction!(fs_used, m)?)
}
