//! Fetching records: read, decrypt, decode, check, write.
//!
//! Invariant: what fails its check is reported and never written; a worker writes runs of
//! neighbouring blocks as one.

use std::collections::HashMap;
use std::ops::Range;

use crate::crypto::SessionKey;
use crate::digest::Id;
use crate::error::{invalid, Error, Result};
use crate::gather::Gather;
use crate::io::{Aligned, Fd, ALIGN};
use crate::record::{open_block, Ids, HEAD, MAX_BLOCK, MAX_EXCESS};
use crate::slots::Place;
use crate::workers;

/// Bytes of records that a worker reads at a time.
const READ: u64 = 1 << 20;
/// Unwanted bytes that a worker rather reads than seeks over.
const GAP: u64 = 32 << 10;
/// Bytes of image that are written at a time.
const WRITE: usize = 1 << 20;

/// A pack that can be read.
pub struct Pack {
    /// Its descriptor.
    pub fd: Fd,
    /// Its session keys, by envelope number.
    pub keys: Vec<Option<SessionKey>>,
}

/// Packs by their number in `Names`.
pub type Packs = HashMap<u32, Pack>;

/// What to fetch, and where to.
pub struct Job<'a> {
    /// For ids.
    pub ids: &'a Ids,
    /// The packs that the records lie in.
    pub packs: &'a Packs,
    /// The records.
    pub gather: &'a Gather,
    /// Which of them.
    pub range: Range<usize>,
    /// Size of the image in bytes.
    pub image_size: u64,
    /// Size of a block in bytes.
    pub block_size: usize,
    /// Written to where given; else the records are only checked.
    pub target: Option<Fd>,
    /// Worker threads; 0: one for each processor.
    pub threads: usize,
}

/// A record that could not be fetched.
#[derive(Debug)]
pub struct Failure {
    /// Where it should be.
    pub place: Place,
    /// Its id.
    pub id: Id,
    /// The blocks that it fills.
    pub blocks: Vec<u64>,
    /// What is wrong.
    pub reason: String,
}

#[derive(Default)]
struct Outcome {
    bytes: u64,
    failures: Vec<Failure>,
}

struct Worker {
    input: Vec<u8>,
    output: Aligned,
    /// Blocks in `output` that wait to be written: first block, bytes.
    waiting: (u64, usize),
    outcome: Outcome,
}

/// Length of a block of the image.
pub fn block_length(block: u64, image_size: u64, block_size: usize) -> Result<usize> {
    match block.checked_mul(block_size as u64) {
        Some(start) if start < image_size => Ok((image_size - start).min(block_size as u64) as usize),
        _ => invalid(format!("block {block} lies beyond the image")),
    }
}

/// Records that are read together: neighbours in one pack.
fn tasks(job: &Job) -> Vec<Range<usize>> {
    let mut out: Vec<Range<usize>> = Vec::new();
    let mut from = 0;
    let mut end = (u32::MAX, 0u64);
    for index in job.range.clone() {
        let Some(want) = job.gather.wants(index).first() else { continue };
        let (start, stop) = (u64::from(want.place.offset), u64::from(want.place.offset) + u64::from(want.place.length));
        match out.last_mut() {
            Some(last) if want.place.pack == end.0 && start <= end.1 + GAP && stop - from <= READ => {
                last.end = index + 1
            }
            _ => {
                out.push(index..index + 1);
                from = start;
            }
        }
        // Places of a hostile map may overlap: the furthest end counts.
        let known = if end.0 == want.place.pack { end.1 } else { 0 };
        end = (want.place.pack, stop.max(known));
    }
    out
}

/// Fetch. Returns the bytes of image done and the failures.
pub fn fetch(job: &Job) -> Result<(u64, Vec<Failure>)> {
    if !job.block_size.is_power_of_two() || !(512..=MAX_BLOCK).contains(&job.block_size) {
        return invalid(format!("a block size of {} bytes", job.block_size));
    }
    let tasks = tasks(job);
    let room = WRITE.max(job.block_size).next_multiple_of(ALIGN);
    let init =
        || Ok(Worker { input: Vec::new(), output: Aligned::new(room), waiting: (0, 0), outcome: Outcome::default() });
    let work = |worker: &mut Worker, item: usize| {
        worker.task(job, tasks[item].clone())?;
        worker.flush(job)
    };
    let mut bytes = 0;
    let mut failures = Vec::new();
    for worker in workers::run(job.threads, tasks.len(), init, work)? {
        bytes += worker.outcome.bytes;
        failures.extend(worker.outcome.failures);
    }
    failures.sort_by_key(|failure| failure.blocks.first().copied());
    Ok((bytes, failures))
}

impl Worker {
    fn task(&mut self, job: &Job, records: Range<usize>) -> Result<()> {
        let Some(first) = job.gather.wants(records.start).first() else { return Ok(()) };
        let Some(pack) = job.packs.get(&first.place.pack) else {
            for index in records {
                self.fail(job, index, "its pack is not there");
            }
            return Ok(());
        };
        let start = u64::from(first.place.offset);
        let stop =
            |index| job.gather.wants(index).first().map(|w| u64::from(w.place.offset) + u64::from(w.place.length));
        let length = records.clone().filter_map(stop).max().unwrap_or(start) - start;
        if length > (MAX_BLOCK + MAX_EXCESS + HEAD) as u64 {
            if records.len() > 1 {
                // One impossible place must not take its neighbours with it.
                return records.into_iter().try_for_each(|index| self.task(job, index..index + 1));
            }
            self.fail(job, records.start, "its place has an impossible length");
            return Ok(());
        }
        self.input.resize(length as usize, 0);
        let mut input = std::mem::take(&mut self.input);
        let whole = pack.fd.read_exact_at(&mut input, start).is_ok();
        for index in records {
            let place = job.gather.wants(index)[0].place;
            let at = (u64::from(place.offset) - start) as usize;
            let record = &mut input[at..at + place.length as usize];
            if !whole {
                // One bad spot must not take its neighbours with it.
                if let Err(error) = pack.fd.read_exact_at(record, u64::from(place.offset)) {
                    self.fail(job, index, &error.to_string());
                    continue;
                }
            }
            self.record(job, index, pack, record)?;
        }
        self.input = input;
        Ok(())
    }

    fn fail(&mut self, job: &Job, index: usize, reason: &str) {
        let wants = job.gather.wants(index);
        if let Some(first) = wants.first() {
            let blocks = wants.iter().map(|want| want.block).collect();
            let failure = Failure { place: first.place, id: first.id, blocks, reason: reason.to_owned() };
            self.outcome.failures.push(failure);
        }
    }

    fn record(&mut self, job: &Job, index: usize, pack: &Pack, record: &mut [u8]) -> Result<()> {
        let wants = job.gather.wants(index);
        let first = wants[0];
        let length = block_length(first.block, job.image_size, job.block_size)?;
        let joins = self.waiting.1 > 0
            && self.waiting.0 * job.block_size as u64 + self.waiting.1 as u64 == first.block * job.block_size as u64
            && self.waiting.1 + length <= self.output.len();
        if !joins {
            self.flush(job)?;
            self.waiting = (first.block, 0);
        }
        let (from, to) = (self.waiting.1, self.waiting.1 + length);
        match open_block(job.ids, &pack.keys, &first.id, record, &mut self.output[from..to]) {
            Ok(()) => {}
            Err(error @ (Error::Damaged(_) | Error::Invalid(_))) => {
                self.fail(job, index, &error.to_string());
                return Ok(());
            }
            Err(error) => return Err(error),
        }
        self.outcome.bytes += length as u64;
        for want in &wants[1..] {
            if block_length(want.block, job.image_size, job.block_size)? != length {
                self.fail(job, index, "one record stands for blocks of different lengths");
                return Ok(());
            }
            if let Some(target) = job.target {
                target.write_all_at(&self.output[from..to], want.block * job.block_size as u64)?;
            }
            self.outcome.bytes += length as u64;
        }
        self.waiting.1 = if job.target.is_some() { to } else { 0 };
        Ok(())
    }

    fn flush(&mut self, job: &Job) -> Result<()> {
        let (first, length) = std::mem::take(&mut self.waiting);
        match job.target {
            Some(target) if length > 0 => target.write_all_at(&self.output[..length], first * job.block_size as u64),
            _ => Ok(()),
        }
    }
}

/// Read a record and open it: the block of this id, into `out`. `room` is for the record, and may be kept.
pub fn read_one(
    ids: &Ids, fd: Fd, keys: &[Option<SessionKey>], id: &Id, place: Place, room: &mut Vec<u8>, out: &mut [u8],
) -> Result<()> {
    let length = place.length as usize;
    if length > MAX_BLOCK + MAX_EXCESS + HEAD {
        return crate::error::damaged("its place has an impossible length");
    }
    room.resize(room.len().max(length), 0);
    let record = &mut room[..length];
    fd.read_exact_at(record, u64::from(place.offset))?;
    open_block(ids, keys, id, record, out)
}

/// The contents of a few records, in the order of the gather.
pub fn read_blocks(job: &Job) -> Result<Vec<(u64, Vec<u8>)>> {
    let (mut out, mut room) = (Vec::new(), Vec::new());
    for index in job.range.clone() {
        let wants = job.gather.wants(index);
        let Some(first) = wants.first() else { continue };
        let Some(pack) = job.packs.get(&first.place.pack) else {
            return crate::error::damaged("its pack is not there");
        };
        let mut content = vec![0; block_length(first.block, job.image_size, job.block_size)?];
        read_one(job.ids, pack.fd, &pack.keys, &first.id, first.place, &mut room, &mut content)?;
        out.extend(wants.iter().map(|want| (want.block, content.clone())));
    }
    Ok(out)
}
