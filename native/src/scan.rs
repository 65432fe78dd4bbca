//! Reading blocks, comparing them with a base, and storing what is new.
//!
//! Invariant: each worker carries a task of up to a MiB from the read to the write
//! while it is in cache; a slot points to a record only after its bytes are written.

use crate::codec::Codec;
use crate::digest::Id;
use crate::error::{invalid, Result};
use crate::io::{is_zero, Aligned, ALIGN};
use crate::known::{Claim, Known};
use crate::pack::Writer;
use crate::record::{Ids, Records, MAX_BLOCK};
use crate::slots::{push_range, Place, Slot, DATA, UNREADABLE, ZERO};
use crate::source::{OnError, Source};
use crate::workers;

/// Most blocks of one scan; a caller takes a segment at a time, far fewer.
const MAX_BLOCKS: usize = 1 << 26;
/// Bytes that a worker takes at a time.
const TASK: usize = 512 << 10;

/// Where new blocks go.
#[derive(Clone, Copy)]
pub struct Store<'a> {
    /// The open pack.
    pub pack: &'a Writer,
    /// What is stored already.
    pub known: &'a Known,
    /// How to compress.
    pub codec: Codec,
    /// Level of zstd.
    pub level: i32,
}

/// What to scan.
pub struct Job<'a> {
    /// For ids.
    pub ids: &'a Ids,
    /// What is read.
    pub source: Source<'a>,
    /// Block numbers, `[start, end)`, ascending.
    pub ranges: &'a [(u64, u64)],
    /// Size of the image in bytes.
    pub image_size: u64,
    /// Size of a block in bytes.
    pub block_size: usize,
    /// Slots of the same blocks in the base, in order.
    pub base: Option<&'a [Slot]>,
    /// None: compare only.
    pub store: Option<Store<'a>>,
    /// Worker threads; 0: one for each processor.
    pub threads: usize,
    /// What to do about unreadable sectors.
    pub on_error: OnError,
}

/// What was found, as numbers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counts {
    /// Bytes read.
    pub read: u64,
    /// Blocks that are zero.
    pub zero: u64,
    /// Blocks that differ from the base.
    pub changed: u64,
    /// Blocks stored.
    pub new: u64,
    /// Changed blocks whose content was there already.
    pub shared: u64,
    /// Bytes appended to the pack.
    pub stored: u64,
}

/// What a scan found.
#[derive(Default)]
pub struct Found {
    /// Slots of the blocks asked for, in order.
    pub slots: Vec<Slot>,
    /// As numbers.
    pub counts: Counts,
    /// Unreadable extents, (start, end) in bytes.
    pub unreadable: Vec<(u64, u64)>,
    /// Block numbers that differ from the base.
    pub differing: Vec<(u64, u64)>,
}

/// Consecutive blocks, and where their slots go in the result.
#[derive(Clone, Copy)]
struct Piece {
    first: u64,
    count: usize,
    at: usize,
}

struct Worker {
    buffer: Aligned,
    records: Records,
    claimed: Vec<(usize, Id)>,
    busy: Vec<(usize, Id)>,
    done: Vec<(usize, Slot)>,
    lost: Vec<(u64, u64)>,
    counts: Counts,
}

/// Cut the ranges into tasks of at most `TASK` bytes.
fn tasks(job: &Job) -> Vec<Vec<Piece>> {
    let most = (TASK / job.block_size).max(1);
    let mut out: Vec<Vec<Piece>> = Vec::new();
    let (mut room, mut at) = (0, 0);
    for &(start, end) in job.ranges {
        let mut first = start;
        while first < end {
            if room == 0 {
                out.push(Vec::new());
                room = most;
            }
            let count = room.min((end - first) as usize);
            if let Some(task) = out.last_mut() {
                task.push(Piece { first, count, at });
            }
            first += count as u64;
            at += count;
            room -= count;
        }
    }
    out
}

fn check(job: &Job) -> Result<usize> {
    if !job.block_size.is_power_of_two() || !(512..=MAX_BLOCK).contains(&job.block_size) {
        return invalid(format!("a block size of {} bytes", job.block_size));
    }
    let blocks = job.image_size.div_ceil(job.block_size as u64);
    let mut total = 0;
    let mut last = 0;
    for &(start, end) in job.ranges {
        if start < last || start > end || end > blocks {
            return invalid("block ranges are not ascending, or leave the image");
        }
        last = end;
        total += (end - start) as usize;
    }
    if total > MAX_BLOCKS {
        return invalid(format!("{total} blocks are too many for one scan"));
    }
    if job.base.is_some_and(|base| base.len() != total) {
        return invalid("the base has another number of slots than there are blocks to scan");
    }
    Ok(total)
}

/// Scan.
pub fn scan(job: &Job) -> Result<Found> {
    let total = check(job)?;
    let tasks = tasks(job);
    let room = TASK.max(job.block_size).next_multiple_of(ALIGN);
    let init = || {
        Ok(Worker {
            buffer: Aligned::new(room),
            records: Records::default(),
            claimed: Vec::new(),
            busy: Vec::new(),
            done: Vec::new(),
            lost: Vec::new(),
            counts: Counts::default(),
        })
    };
    let work = |worker: &mut Worker, item: usize| {
        let result = tasks[item].iter().try_for_each(|piece| worker.take(job, piece)).and_then(|()| worker.flush(job));
        if let (Err(_), Some(store)) = (&result, job.store) {
            store.known.fail();
        }
        result
    };
    let workers = workers::run(job.threads, tasks.len(), init, work)?;
    Ok(collect(job, total, workers))
}

fn collect(job: &Job, total: usize, workers: Vec<Worker>) -> Found {
    let mut found = Found { slots: vec![Slot::plain(ZERO); total], ..Found::default() };
    for worker in workers {
        for (at, slot) in worker.done {
            found.slots[at] = slot;
        }
        found.unreadable.extend(worker.lost);
        let counts = worker.counts;
        found.counts.read += counts.read;
        found.counts.zero += counts.zero;
        found.counts.new += counts.new;
        found.counts.shared += counts.shared;
        found.counts.stored += counts.stored;
    }
    found.unreadable.sort_unstable();
    let mut merged: Vec<(u64, u64)> = Vec::with_capacity(found.unreadable.len());
    for (start, end) in found.unreadable.drain(..) {
        push_range(&mut merged, start, end);
    }
    found.unreadable = merged;
    let numbers = job.ranges.iter().flat_map(|&(start, end)| start..end);
    for (at, number) in numbers.enumerate() {
        if !job.base.is_some_and(|base| base[at].same(&found.slots[at])) {
            push_range(&mut found.differing, number, number + 1);
            found.counts.changed += 1;
        }
    }
    found
}

impl Worker {
    /// Read a piece and decide about each of its blocks; new content is sealed into `out`.
    fn take(&mut self, job: &Job, piece: &Piece) -> Result<()> {
        let offset = piece.first * job.block_size as u64;
        let length = (job.image_size - offset).min((piece.count * job.block_size) as u64) as usize;
        let known_lost = self.lost.len();
        job.source.read(offset, length, &mut self.buffer, job.on_error, &mut self.lost)?;
        self.counts.read += length as u64;
        for index in 0..piece.count {
            let from = index * job.block_size;
            let to = (from + job.block_size).min(length);
            let range = (offset + from as u64, offset + to as u64);
            let gone = self.lost[known_lost..].iter().any(|&(start, end)| start <= range.0 && range.1 <= end);
            self.block(job, piece.at + index, from, to, gone)?;
        }
        Ok(())
    }

    fn block(&mut self, job: &Job, at: usize, from: usize, to: usize, gone: bool) -> Result<()> {
        let content = &self.buffer[from..to];
        if gone {
            self.done.push((at, Slot::plain(UNREADABLE)));
            return Ok(());
        }
        if is_zero(content) {
            self.counts.zero += 1;
            self.done.push((at, Slot::plain(ZERO)));
            return Ok(());
        }
        let id = job.ids.block(content);
        if let Some(base) = job.base.map(|base| &base[at]) {
            if base.kind == DATA && base.id == id {
                self.done.push((at, *base));
                return Ok(());
            }
        }
        let Some(store) = job.store else {
            self.done.push((at, Slot::data(id, Place::default())));
            return Ok(());
        };
        match store.known.claim(&id) {
            Claim::Found(place) => {
                self.counts.shared += 1;
                self.done.push((at, Slot::data(id, place)));
            }
            Claim::Busy => {
                self.counts.shared += 1;
                self.busy.push((at, id));
            }
            Claim::Yours => {
                self.claimed.push((at, id));
                self.records.block(job.ids, store.pack.sealer(), store.codec, store.level, &id, content)?;
            }
        }
        Ok(())
    }

    /// Write what `take` sealed, publish it, and only then wait for what others are storing.
    fn flush(&mut self, job: &Job) -> Result<()> {
        let Some(store) = job.store else { return Ok(()) };
        if !self.claimed.is_empty() {
            self.counts.new += self.claimed.len() as u64;
            self.counts.stored += self.records.bytes().len() as u64;
            let places = store.pack.append(&mut self.records)?;
            for ((at, id), place) in self.claimed.drain(..).zip(places) {
                store.known.publish(&id, place);
                self.done.push((at, Slot::data(id, place)));
            }
        }
        for (at, id) in self.busy.drain(..) {
            let place = store.known.wait(&id)?;
            self.done.push((at, Slot::data(id, place)));
        }
        Ok(())
    }
}
