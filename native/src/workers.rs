//! Running one piece of work on several threads.
//!
//! Invariant: `run` returns when every worker has; the first error wins and the
//! others stop at their next item.

use std::panic::resume_unwind;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use crate::error::Result;

/// How many threads to use: what was asked for, or one for each processor.
pub fn threads(asked: usize) -> usize {
    if asked > 0 {
        asked.min(256)
    } else {
        thread::available_parallelism().map_or(1, |n| n.get())
    }
}

/// Hand the numbers `0..items` to workers. Each worker makes its state with `init`,
/// treats items with `work`, and gives its state back through the result.
pub fn run<S: Send>(
    asked: usize, items: usize, init: impl Fn() -> Result<S> + Sync, work: impl Fn(&mut S, usize) -> Result<()> + Sync,
) -> Result<Vec<S>> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let worker = || -> Result<S> {
        let mut state = init()?;
        loop {
            let item = next.fetch_add(1, Ordering::Relaxed);
            if item >= items || stop.load(Ordering::Relaxed) {
                return Ok(state);
            }
            if let Err(error) = work(&mut state, item) {
                stop.store(true, Ordering::Relaxed);
                return Err(error);
            }
        }
    };
    let count = threads(asked).min(items).max(1);
    if count == 1 {
        return Ok(vec![worker()?]);
    }
    thread::scope(|scope| {
        let handles: Vec<_> = (0..count).map(|_| scope.spawn(worker)).collect();
        handles.into_iter().map(|h| h.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    })
}
