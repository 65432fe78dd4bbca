//! Ranges in use, gathered in bounded memory.
//!
//! Invariant: what was added is covered by what comes out. Where there would be more than `MOST`
//! ranges, those with the smallest gaps between them are joined.

/// Ranges that come out at most.
pub const MOST: usize = 1 << 19;

/// Add ranges in any order; `finish` has them sorted and merged.
#[derive(Default)]
pub struct Collector {
    ranges: Vec<(u64, u64)>,
    /// So that ranges that come in order need no sorting.
    unsorted: bool,
}

impl Collector {
    /// Add `[start, end)`.
    pub fn add(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        if let Some(last) = self.ranges.last_mut() {
            if start >= last.0 && start <= last.1 {
                last.1 = last.1.max(end);
                return;
            }
            self.unsorted |= start < last.0;
        }
        self.ranges.push((start, end));
        if self.ranges.len() >= 2 * MOST {
            self.reduce(MOST);
        }
    }

    /// All that was added, cut to `[0, size)`.
    pub fn finish(mut self, size: u64) -> Vec<(u64, u64)> {
        self.reduce(MOST);
        self.ranges.retain_mut(|range| {
            range.1 = range.1.min(size);
            range.0 < range.1
        });
        self.ranges
    }

    fn reduce(&mut self, most: usize) {
        if self.unsorted {
            self.ranges.sort_unstable();
            self.unsorted = false;
        }
        self.join(0, 0);
        let excess = self.ranges.len().saturating_sub(most);
        if excess > 0 {
            let mut gaps: Vec<u64> = self.ranges.windows(2).map(|w| w[1].0 - w[0].1).collect();
            let (narrower, &mut widest, _) = gaps.select_nth_unstable(excess - 1);
            // Of the gaps that are exactly that wide, only so many are closed as have to be.
            let ties = excess - narrower.iter().filter(|&&gap| gap < widest).count();
            self.join(widest, ties);
        }
    }

    /// Close the gaps narrower than `width`, and the first `ties` that are as wide.
    fn join(&mut self, width: u64, mut ties: usize) {
        self.ranges.dedup_by(|next, kept| {
            let gap = next.0.saturating_sub(kept.1);
            let tie = gap == width && gap > 0 && ties > 0;
            let close = next.0 <= kept.1 || gap < width || tie;
            if close {
                ties -= usize::from(tie);
                kept.1 = kept.1.max(next.1);
            }
            close
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reduced(ranges: &[(u64, u64)], most: usize) -> Vec<(u64, u64)> {
        let mut collector = Collector::default();
        for &(start, end) in ranges {
            collector.add(start, end);
        }
        collector.reduce(most);
        collector.ranges
    }

    #[test]
    fn the_smallest_gaps_close_first() {
        let ranges = [(0, 1), (2, 3), (10, 11), (12, 13), (14, 15), (90, 91)];
        assert_eq!(reduced(&ranges, 3), [(0, 3), (10, 15), (90, 91)]);
        assert_eq!(reduced(&ranges, 5), [(0, 3), (10, 11), (12, 13), (14, 15), (90, 91)]);
        assert_eq!(reduced(&ranges, 1), [(0, 91)]);
    }

    proptest! {
        #[test]
        fn all_is_covered(ranges in prop::collection::vec((0u64..300, 0u64..40), 0..60), most in 1usize..40) {
            let ranges: Vec<_> = ranges.into_iter().map(|(start, length)| (start, start + length)).collect();
            let out = reduced(&ranges, most);
            prop_assert!(out.len() <= most);
            prop_assert!(out.windows(2).all(|w| w[0].1 < w[1].0));
            let covers = |point: u64, by: &[(u64, u64)]| by.iter().any(|r| r.0 <= point && point < r.1);
            for point in 0..400 {
                prop_assert!(!covers(point, &ranges) || covers(point, &out));
                if most == 39 && out.len() < 39 {
                    prop_assert_eq!(covers(point, &ranges), covers(point, &out));
                }
            }
        }
    }

    #[test]
    fn memory_is_bounded() {
        let mut collector = Collector::default();
        for number in 0..(5 * MOST as u64) {
            collector.add(number * 2, number * 2 + 1);
            assert!(collector.ranges.len() < 2 * MOST);
        }
        assert_eq!(collector.finish(u64::MAX).len(), MOST);
    }
}
