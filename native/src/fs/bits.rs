//! Bitmaps of clusters, the lowest bit first.
//!
//! Invariant: every run of set bits within the count is told exactly once, in order.

use super::disk::{Disk, ReadAt};
use super::Sure;

/// Bytes that are looked at in one go.
const STEP: u64 = 4 << 20;

/// Tells `run(start, end)` of every run of set bits of the `count` bits that stand at byte `place`.
pub fn runs<R: ReadAt>(disk: &Disk<R>, place: u64, count: u64, mut run: impl FnMut(u64, u64)) -> Sure<()> {
    let mut finder = Finder::new(count);
    let mut at = 0;
    while at < count.div_ceil(8) {
        let length = STEP.min(count.div_ceil(8) - at);
        finder.feed(disk.read(place + at, length as usize)?.bytes(), &mut run);
        at += length;
    }
    finder.end(&mut run);
    Ok(())
}

/// Finds runs in bytes that come piece by piece.
pub struct Finder {
    at: u64,
    count: u64,
    open: Option<u64>,
}

impl Finder {
    /// For a bitmap of `count` bits.
    pub fn new(count: u64) -> Self {
        Self { at: 0, count, open: None }
    }

    /// The next bytes of the bitmap.
    pub fn feed(&mut self, bytes: &[u8], run: &mut impl FnMut(u64, u64)) {
        for &byte in bytes {
            if self.at >= self.count {
                return;
            }
            match (byte, self.open) {
                (0, None) | (0xFF, Some(_)) => {}
                (0xFF, None) => self.open = Some(self.at),
                (0, Some(start)) => {
                    run(start, self.at);
                    self.open = None;
                }
                _ => self.mixed(byte, run),
            }
            self.at += 8;
        }
    }

    fn mixed(&mut self, byte: u8, run: &mut impl FnMut(u64, u64)) {
        for bit in 0..8 {
            let point = self.at + bit;
            match (byte >> bit & 1 == 1, self.open) {
                (true, None) if point < self.count => self.open = Some(point),
                (false, Some(start)) => {
                    run(start, point.min(self.count));
                    self.open = None;
                }
                _ => {}
            }
        }
    }

    /// No more bytes come.
    pub fn end(self, run: &mut impl FnMut(u64, u64)) {
        if let Some(start) = self.open {
            run(start, self.at.min(self.count));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn runs_are_the_set_bits(bytes in prop::collection::vec(prop_oneof![Just(0u8), Just(0xFF), any::<u8>()], 0..64), less in 0u64..8) {
            let count = (bytes.len() as u64 * 8).saturating_sub(less);
            let mut found = vec![];
            let mut finder = Finder::new(count);
            for part in bytes.chunks(5) {
                finder.feed(part, &mut |start, end| found.push((start, end)));
            }
            finder.end(&mut |start, end| found.push((start, end)));
            prop_assert!(found.windows(2).all(|w| w[0].1 < w[1].0));
            for bit in 0..count {
                let set = bytes[bit as usize / 8] >> (bit % 8) & 1 == 1;
                prop_assert_eq!(set, found.iter().any(|r| r.0 <= bit && bit < r.1));
            }
            prop_assert!(found.iter().all(|r| r.0 < r.1 && r.1 <= count));
        }
    }
}
