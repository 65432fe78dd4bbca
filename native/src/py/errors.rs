//! Errors of the core as Python exceptions.

use pyo3::create_exception;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;

use crate::error::Error;

create_exception!(_native, ReadError, PyOSError, "A source or a pack could not be read.");
create_exception!(_native, WriteError, PyOSError, "A pack or a target could not be written.");
create_exception!(_native, DamagedError, PyValueError, "Repository bytes are not what was stored.");

impl From<Error> for PyErr {
    fn from(error: Error) -> Self {
        match error {
            Error::Read { offset, error } => {
                ReadError::new_err((error.raw_os_error().unwrap_or(0), said(&error), offset))
            }
            Error::Write { offset, error } => {
                WriteError::new_err((error.raw_os_error().unwrap_or(0), said(&error), offset))
            }
            Error::Damaged(message) => DamagedError::new_err(message),
            Error::Invalid(message) => PyValueError::new_err(message),
        }
    }
}

/// What the system said, without Rust's "(os error N)".
fn said(error: &std::io::Error) -> String {
    let text = error.to_string();
    match text.find(" (os error") {
        Some(at) => text[..at].to_owned(),
        None => text,
    }
}

pub fn register(m: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = m.py();
    m.add("ReadError", py.get_type::<ReadError>())?;
    m.add("WriteError", py.get_type::<WriteError>())?;
    m.add("DamagedError", py.get_type::<DamagedError>())
}
