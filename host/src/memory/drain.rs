//! What a drain took out of the dirty log, until it is known to have arrived.

use bitvec::prelude::{BitSlice, BitVec, Lsb0};

use super::DirtyLog;

const BITS: u64 = u64::BITS as u64;

/// Pages `first .. first + count`; `count` is not 0 in what [`Drain::runs`] gives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PageRun {
    pub first: u64,
    pub count: u64,
}

/// A snapshot of dirty pages that are no longer in the log. Dropped, it puts back every page that was not committed;
/// a page is committed once it is safe at the peer.
#[must_use = "dropping a drain puts its pages back"]
#[derive(Debug)]
pub struct Drain<'a> {
    log: &'a DirtyLog,
    bits: BitVec<u64, Lsb0>,
}

impl<'a> Drain<'a> {
    /// `words` cover the log and have no bit beyond its pages.
    pub(super) fn new(log: &'a DirtyLog, words: Vec<u64>) -> Self {
        let mut bits = BitVec::from_vec(words);
        bits.truncate(log.pages() as usize);
        Self { log, bits }
    }

    /// Pages that are not committed yet: bit `page % 64` of word `page / 64`.
    pub fn words(&self) -> &[u64] {
        self.bits.as_raw_slice()
    }

    /// The same, one bit per page of the log.
    pub fn bitmap(&self) -> &BitSlice<u64, Lsb0> {
        &self.bits
    }

    /// Pages that are not committed yet.
    pub fn count(&self) -> u64 {
        self.bits.count_ones() as u64
    }

    pub fn is_empty(&self) -> bool {
        self.words().iter().all(|word| *word == 0)
    }

    /// Runs of pages that are not committed yet, ascending, never adjacent.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        Runs::new(self.words(), 0)
    }

    /// The first run at or after `page`, where a run that began earlier begins at `page`. With this the caller can commit
    /// between one run and the next.
    pub fn run_from(&self, page: u64) -> Option<PageRun> {
        Runs::new(self.words(), page).next()
    }

    /// Everything is safe at the peer.
    pub fn commit(mut self) {
        self.bits.clear();
    }

    /// These pages are safe at the peer; the rest still comes back. Pages outside the log are not in the drain, so that
    /// there is nothing to commit.
    pub fn commit_page_run(&mut self, run: PageRun) {
        let size = self.bits.len();
        let bound = |page: u64| usize::try_from(page).unwrap_or(usize::MAX).min(size);
        let (first, end) = (bound(run.first), bound(run.first.saturating_add(run.count)));
        self.bits[first..end].fill(false);
    }
}

impl Drop for Drain<'_> {
    fn drop(&mut self) {
        self.log.restore(self.bits.as_raw_slice());
    }
}

/// Runs of set bits, ascending, never adjacent.
#[derive(Debug)]
pub(super) struct Runs<'a> {
    words: &'a [u64],
    index: usize,
    /// Bits of `words[index]` that have not been visited
    word: u64,
}

impl<'a> Runs<'a> {
    /// From bit `at` on.
    pub(super) fn new(words: &'a [u64], at: u64) -> Self {
        let index = usize::try_from(at / BITS).unwrap_or(usize::MAX);
        let word = words.get(index).map_or(0, |word| word & u64::MAX << (at % BITS));
        Self { words, index, word }
    }

    /// Moves on to the next word that is not `skipped`, eight of those at a time. `None` at the end.
    fn advance(&mut self, skipped: u64) -> Option<()> {
        let mut index = self.index.checked_add(1)?;
        loop {
            let word = *self.words.get(index)?;
            if word != skipped {
                (self.index, self.word) = (index, word);
                return Some(());
            }
            index += 1;
            while let Some(eight) = self.words.get(index..index + 8)
                && eight.iter().fold(0, |all, word| all | (word ^ skipped)) == 0
            {
                index += 8;
            }
        }
    }

    /// The run has ended at `end`, with what is left of its last word still to visit.
    fn run(first: u64, end: u64) -> Option<PageRun> {
        Some(PageRun { first, count: end - first })
    }
}

impl Iterator for Runs<'_> {
    type Item = PageRun;

    fn next(&mut self) -> Option<PageRun> {
        if self.word == 0 {
            self.advance(0)?;
        }
        let base = self.index as u64 * BITS;
        let lowest = self.word & self.word.wrapping_neg();
        let first = base + u64::from(lowest.trailing_zeros());
        // Adding the lowest bit carries through the run; a carry out of the word is a run that goes on.
        let (carried, goes_on) = self.word.overflowing_add(lowest);
        if !goes_on {
            let end = base + u64::from((self.word ^ carried | lowest).ilog2());
            self.word &= carried;
            return Self::run(first, end);
        }
        self.word = 0;
        if self.advance(u64::MAX).is_none() {
            self.index = self.words.len();
            return Self::run(first, self.words.len() as u64 * BITS);
        }
        let ones = self.word.trailing_ones();
        // Not all ones, so that the shift is in range.
        self.word &= u64::MAX << ones;
        Self::run(first, self.index as u64 * BITS + u64::from(ones))
    }
}
