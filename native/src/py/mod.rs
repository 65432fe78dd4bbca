//! The border: arguments in, errors out, the GIL released around work.

mod digests;
mod errors;
mod export;
mod fs;
mod known;
mod packs;
mod seals;
mod slots;
mod upkeep;
mod vault;
mod work;

use pyo3::prelude::*;

#[pymodule]
fn _native(m: &Bound<'_, PyModule>) -> PyResult<()> {
    m.add("__version__", env!("CARGO_PKG_VERSION"))?;
    m.add("DEBUG_BUILD", cfg!(debug_assertions))?;
    errors::register(m)?;
    digests::register(m)?;
    vault::register(m)?;
    seals::register(m)?;
    slots::register(m)?;
    packs::register(m)?;
    known::register(m)?;
    upkeep::register(m)?;
    work::register(m)?;
    fs::register(m)?;
    export::register(m)
}
