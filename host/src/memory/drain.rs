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
        let words = self.words();
        let mut at = 0;
        std::iter::from_fn(move || {
            let run = next_run(words, at)?;
            at = run.first + run.count;
            Some(run)
        })
    }

    /// The first run at or after `page`, where a run that began earlier begins at `page`. With this the caller can commit
    /// between one run and the next.
    pub fn run_from(&self, page: u64) -> Option<PageRun> {
        next_run(self.words(), page)
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

/// The first run of set bits at or after bit `at`.
pub(super) fn next_run(words: &[u64], at: u64) -> Option<PageRun> {
    let first = find(words, at, 0)?;
    let end = find(words, first, u64::MAX).unwrap_or(words.len() as u64 * BITS);
    Some(PageRun { first, count: end - first })
}

/// The first bit at or after `at` that is set in `word ^ flip`. Eight words that are all `flip` are skipped at once.
fn find(words: &[u64], at: u64, flip: u64) -> Option<u64> {
    let mut index = usize::try_from(at / BITS).ok()?;
    let word = (words.get(index)? ^ flip) & (u64::MAX << (at % BITS));
    if word != 0 {
        return Some(index as u64 * BITS + u64::from(word.trailing_zeros()));
    }
    index += 1;
    while words.get(index..index + 8).is_some_and(|eight| eight.iter().fold(0, |all, word| all | (word ^ flip)) == 0) {
        index += 8;
    }
    let offset = words.get(index..)?.iter().position(|word| *word != flip)?;
    index += offset;
    Some(index as u64 * BITS + u64::from((words[index] ^ flip).trailing_zeros()))
}
