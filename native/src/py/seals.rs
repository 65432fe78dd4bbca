//! Wrapping, agreement and signatures.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use crate::error::Error;
use crate::seal;

use super::vault::id;

fn nonce(bytes: &[u8]) -> PyResult<[u8; 12]> {
    bytes.try_into().map_err(|_| PyValueError::new_err("a nonce has 12 bytes"))
}

#[pyfunction]
fn wrap<'py>(py: Python<'py>, key: &[u8], nonce_: &[u8], plain: &[u8], data: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &seal::wrap(&id(key)?, nonce(nonce_)?, plain, data)?))
}

#[pyfunction]
fn unwrap<'py>(
    py: Python<'py>, key: &[u8], nonce_: &[u8], sealed: &[u8], data: &[u8],
) -> PyResult<Option<Bound<'py, PyBytes>>> {
    match seal::unwrap(&id(key)?, nonce(nonce_)?, sealed, data) {
        Ok(plain) => Ok(Some(PyBytes::new(py, &plain))),
        Err(Error::Damaged(_)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

#[pyfunction]
fn x25519_public<'py>(py: Python<'py>, private: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &seal::agreement_public(&id(private)?)?))
}

#[pyfunction]
fn x25519<'py>(py: Python<'py>, private: &[u8], public: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &seal::agreement(&id(private)?, public)?))
}

#[pyfunction]
fn ed25519_public<'py>(py: Python<'py>, seed: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &seal::signing_public(&id(seed)?)?))
}

#[pyfunction]
fn ed25519_sign<'py>(py: Python<'py>, seed: &[u8], message: &[u8]) -> PyResult<Bound<'py, PyBytes>> {
    Ok(PyBytes::new(py, &seal::sign(&id(seed)?, message)?))
}

#[pyfunction]
fn ed25519_verify(public: &[u8], signature: &[u8], message: &[u8]) -> bool {
    seal::is_signed(public, signature, message)
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add_function(wrap_pyfunction!(wrap, m)?)?;
    m.add_function(wrap_pyfunction!(unwrap, m)?)?;
    m.add_function(wrap_pyfunction!(x25519_public, m)?)?;
    m.add_function(wrap_pyfunction!(x25519, m)?)?;
    m.add_function(wrap_pyfunction!(ed25519_public, m)?)?;
    m.add_function(wrap_pyfunction!(ed25519_sign, m)?)?;
    m.add_function(wrap_pyfunction!(ed25519_verify, m)?)
}
