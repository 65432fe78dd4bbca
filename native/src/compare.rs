//! Comparing two files or devices, and finding what is not zero.
//!
//! Invariant: every grain of the range is looked at; what cannot be read is an error.

use crate::error::{invalid, Result};
use crate::io::{is_zero, Aligned, Fd, ALIGN};
use crate::slots::push_range;
use crate::source::{OnError, Source};
use crate::workers;

const TASK: u64 = 1 << 20;
const FAIL: OnError = OnError { skip: false, sector: 512 };

/// A byte range.
pub type Extent = (u64, u64);

fn over(
    start: u64, end: u64, grain: usize, threads: usize,
    look: impl Fn(&mut [Aligned; 2], u64, usize, &mut Vec<Extent>) -> Result<()> + Sync,
) -> Result<Vec<Extent>> {
    if !grain.is_power_of_two() || grain as u64 > TASK || start > end {
        return invalid("an impossible range or grain");
    }
    let items = (end - start).div_ceil(TASK) as usize;
    let init = || Ok(([Aligned::new(TASK as usize), Aligned::new(TASK as usize)], Vec::new()));
    let workers = workers::run(threads, items, init, |(buffers, found), item| {
        let from = start + item as u64 * TASK;
        look(buffers, from, (end - from).min(TASK) as usize, found)
    })?;
    let mut all: Vec<Extent> = workers.into_iter().flat_map(|(_, found)| found).collect();
    all.sort_unstable();
    let mut out = Vec::new();
    for (from, to) in all {
        push_range(&mut out, from, to);
    }
    Ok(out)
}

/// Extents of `[start, end)` where two files differ, in units of `grain` from `start` on.
pub fn compare_files(
    a: Fd, b: Fd, start: u64, end: u64, grain: usize, threads: usize, direct: bool,
) -> Result<Vec<Extent>> {
    let (a, b) = (Source::File { fd: a, direct }, Source::File { fd: b, direct });
    over(start, end, grain, threads, |[left, right], from, length, found| {
        a.read(from, length, left, FAIL, &mut Vec::new())?;
        b.read(from, length, right, FAIL, &mut Vec::new())?;
        if left[..length] != right[..length] {
            let pairs = left[..length].chunks(grain).zip(right[..length].chunks(grain));
            for (at, (x, y)) in pairs.enumerate() {
                if x != y {
                    let at = from + (at * grain) as u64;
                    push_range(found, at, at + x.len() as u64);
                }
            }
        }
        Ok(())
    })
}

/// Extents of `[start, end)`, in pages, that are not all zero.
pub fn non_zero(fd: Fd, start: u64, end: u64, threads: usize, direct: bool) -> Result<Vec<Extent>> {
    let source = Source::File { fd, direct };
    over(start, end, ALIGN, threads, |[buffer, _], from, length, found| {
        source.read(from, length, buffer, FAIL, &mut Vec::new())?;
        for (at, page) in buffer[..length].chunks(ALIGN).enumerate() {
            if !is_zero(page) {
                let at = from + (at * ALIGN) as u64;
                push_range(found, at, at + page.len() as u64);
            }
        }
        Ok(())
    })
}
