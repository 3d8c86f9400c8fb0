//! Which parts of a log's pages are free.
//!
//! **Owns** nothing but numbers. **Must never** give a page twice.

use std::collections::BTreeMap;

/// Free runs of pages: first to count. They are disjoint and never adjacent.
#[derive(Debug)]
pub(super) struct Extents {
    free: BTreeMap<u64, u64>,
}

impl Extents {
    /// Pages `0 .. pages` are free.
    pub(super) fn new(pages: u64) -> Self {
        let mut free = BTreeMap::new();
        if pages != 0 {
            free.insert(0, pages);
        }
        Self { free }
    }

    /// Takes `count` pages in a row, from the smallest run that has them, the lowest of those.
    pub(super) fn take(&mut self, count: u64) -> Option<u64> {
        let fits = self.free.iter().filter(|(_, length)| **length >= count);
        let (first, length) = fits.min_by_key(|(_, length)| **length).map(|(first, length)| (*first, *length))?;
        self.free.remove(&first);
        if length > count {
            self.free.insert(first + count, length - count);
        }
        Some(first)
    }

    /// Gives pages back that were taken.
    pub(super) fn give(&mut self, first: u64, count: u64) {
        let (mut first, mut count) = (first, count);
        if let Some(length) = self.free.remove(&(first + count)) {
            count += length;
        }
        if let Some((before, length)) = self.free.range(..first).next_back().map(|(at, length)| (*at, *length))
            && before + length == first
        {
            (first, count) = (before, count + length);
        }
        self.free.insert(first, count);
    }

    /// Free pages.
    #[cfg(test)]
    pub(super) fn count(&self) -> u64 {
        self.free.values().sum()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PAGES: u64 = 64;

    proptest! {
        /// spec: MEM-44
        #[test]
        fn what_is_taken_is_never_free_and_what_comes_back_is_joined(
            steps in proptest::collection::vec((any::<bool>(), 1..20u64, any::<prop::sample::Index>()), 1..200)
        ) {
            let mut extents = Extents::new(PAGES);
            let mut owner = [None; PAGES as usize];
            let mut taken: Vec<(u64, u64)> = Vec::new();
            for (number, (takes, count, which)) in steps.into_iter().enumerate() {
                if takes || taken.is_empty() {
                    let longest = owner.chunk_by(|a, b| a.is_none() == b.is_none());
                    let longest = longest.filter(|run| run[0].is_none()).map(<[_]>::len).max().unwrap_or(0);
                    let got = extents.take(count);
                    prop_assert_eq!(got.is_some(), longest as u64 >= count);
                    let Some(first) = got else { continue };
                    for page in first..first + count {
                        prop_assert_eq!(owner[page as usize].replace(number), None);
                    }
                    taken.push((first, count));
                } else {
                    let (first, count) = taken.swap_remove(which.index(taken.len()));
                    (first..first + count).for_each(|page| owner[page as usize] = None);
                    extents.give(first, count);
                }
                prop_assert_eq!(extents.count(), owner.iter().filter(|page| page.is_none()).count() as u64);
            }
            for (first, count) in taken {
                extents.give(first, count);
            }
            prop_assert_eq!(extents.take(PAGES), Some(0), "all of it is one run again");
            prop_assert_eq!(extents.take(1), None);
        }
    }
}
