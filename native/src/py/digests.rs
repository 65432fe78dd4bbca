//! Digests of small things.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::{crypto, digest};

#[pyfunction]
#[pyo3(signature = (data, key=None))]
fn blake3(data: &[u8], key: Option<&[u8]>) -> PyResult<[u8; 32]> {
    match key.map(<[u8; 32]>::try_from) {
        None => Ok(digest::b3(&[data])),
        Some(Ok(key)) => Ok(digest::b3k(&key, &[data])),
        Some(Err(_)) => Err(PyValueError::new_err("a key has 32 bytes")),
    }
}

#[pyfunction]
fn blake3_derive(context: &str, data: &[u8]) -> [u8; 32] {
    digest::b3d(context, data)
}

#[pyfunction]
fn xxh3(data: &[u8]) -> u64 {
    digest::xxh3(data)
}

#[pyfunction]
fn aes_is_fast() -> bool {
    crypto::aes_is_fast()
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(self::blake3, m)?)?;
    m.add_function(wrap_pyfunction!(blake3_derive, m)?)?;
    m.add_function(wrap_pyfunction!(xxh3, m)?)?;
    m.add_function(wrap_pyfunction!(aes_is_fast, m)?)
}
