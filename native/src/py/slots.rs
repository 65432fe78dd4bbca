//! Pieces of a block map.

use pyo3::exceptions::{PyIndexError, PyMemoryError, PyValueError};
use pyo3::prelude::*;

use crate::slots::{self, Place, Slot, DATA};

use super::known::Known;
use super::vault::{id, Names};

#[pyclass(module = "imager._native")]
#[derive(Clone, Default)]
pub struct Slots(pub Vec<Slot>);

fn out_of_range() -> PyErr {
    PyIndexError::new_err("slots out of range")
}

/// Room for `more` slots, or an exception: the allocator's own way of failing ends the process.
fn reserve(slots: &mut Vec<Slot>, more: usize) -> PyResult<()> {
    slots.try_reserve_exact(more).map_err(|_| PyMemoryError::new_err("too many slots"))
}

/// A slot of a type that needs no id.
fn plain(kind: u8) -> PyResult<Slot> {
    if kind == DATA {
        return Err(PyValueError::new_err("data slots need an id"));
    }
    Ok(Slot::plain(kind))
}

#[pymethods]
impl Slots {
    #[new]
    #[pyo3(signature = (count=0, kind=0))]
    fn new(count: usize, kind: u8) -> PyResult<Self> {
        let mut slots = Vec::new();
        reserve(&mut slots, count)?;
        slots.resize(count, plain(kind)?);
        Ok(Self(slots))
    }

    fn __len__(&self) -> usize {
        self.0.len()
    }

    fn __eq__(&self, other: &Self) -> bool {
        self.0.len() == other.0.len() && self.0.iter().zip(&other.0).all(|(a, b)| a.same(b))
    }

    fn same_places(&self, other: &Self) -> bool {
        self.__eq__(other) && self.0.iter().zip(&other.0).all(|(a, b)| a.kind != DATA || a.place == b.place)
    }

    fn uniform(&self) -> Option<u8> {
        slots::uniform(&self.0)
    }

    fn slice(&self, start: usize, end: usize) -> PyResult<Self> {
        self.0.get(start..end).map(|found| Self(found.to_vec())).ok_or_else(out_of_range)
    }

    fn copy(&self) -> Self {
        self.clone()
    }

    fn put(&mut self, at: usize, other: &Self) -> PyResult<()> {
        let target = at.checked_add(other.0.len()).and_then(|end| self.0.get_mut(at..end)).ok_or_else(out_of_range)?;
        target.copy_from_slice(&other.0);
        Ok(())
    }

    fn fill(&mut self, start: usize, end: usize, kind: u8) -> PyResult<()> {
        self.0.get_mut(start..end).ok_or_else(out_of_range)?.fill(plain(kind)?);
        Ok(())
    }

    fn extend(&mut self, other: &Self) {
        self.0.extend_from_slice(&other.0);
    }

    fn resize(&mut self, count: usize, kind: u8) -> PyResult<()> {
        let more = count.saturating_sub(self.0.len());
        reserve(&mut self.0, more)?;
        self.0.resize(count, plain(kind)?);
        Ok(())
    }

    fn set_data(&mut self, at: usize, id_: &[u8], pack: u32, offset: u32, length: u32) -> PyResult<()> {
        *self.0.get_mut(at).ok_or_else(out_of_range)? = Slot::data(id(id_)?, Place { pack, offset, length });
        Ok(())
    }

    fn get(&self, at: usize) -> PyResult<(u8, [u8; 32], u32, u32, u32)> {
        let slot = self.0.get(at).ok_or_else(out_of_range)?;
        Ok((slot.kind, slot.id, slot.place.pack, slot.place.offset, slot.place.length))
    }

    fn runs(&self) -> Vec<(u8, usize, usize)> {
        slots::runs(&self.0)
    }

    fn counts(&self) -> (usize, usize, usize, usize) {
        let of = |kind| self.0.iter().filter(|slot| slot.kind == kind).count();
        (of(slots::ZERO), of(slots::UNUSED), of(slots::UNREADABLE), of(DATA))
    }

    fn drop_absent(&mut self, names: &Names) -> usize {
        slots::drop_absent(&mut self.0, &names.0)
    }

    fn relocate(&mut self, names: &Names, known: &Known) -> usize {
        slots::relocate(&mut self.0, &names.0, |id| known.0.find(id))
    }

    fn packs(&self) -> Vec<u32> {
        let mut out: Vec<u32> = self.0.iter().filter(|slot| slot.kind == DATA).map(|slot| slot.place.pack).collect();
        out.sort_unstable();
        out.dedup();
        out
    }
}

#[pyfunction]
fn diff_slots(a: &Slots, b: &Slots) -> PyResult<Vec<(usize, usize)>> {
    if a.0.len() != b.0.len() {
        return Err(PyValueError::new_err("pieces of different lengths"));
    }
    Ok(slots::differing(&a.0, &b.0))
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("ZERO", slots::ZERO)?;
    m.add("UNUSED", slots::UNUSED)?;
    m.add("UNREADABLE", slots::UNREADABLE)?;
    m.add("DATA", DATA)?;
    m.add("UNKNOWN", slots::UNKNOWN)?;
    m.add_class::<Slots>()?;
    m.add_function(wrap_pyfunction!(diff_slots, m)?)
}
