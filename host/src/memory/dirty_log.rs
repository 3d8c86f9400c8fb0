//! The live dirty bitmap.
//!
//! States: *stopped* (marks do nothing) and *tracking*. There is no lock; every call may overlap every other.
//!
//! Ordering. A writer stores its bytes, *then* marks; a reader drains, *then* reads the bytes. No write may be lost in
//! between. A mark that sets its bit is safe by the release of that store. Two shortcuts are not: to skip a bit that is set
//! already (a drain takes it, and reads the page before the writer's bytes have left its store buffer), and to skip a log
//! that is stopped (which starts meanwhile). Each is therefore taken only when a full fence, and a second look after it,
//! agree; drain and start have the other fence. `loom_` tests explore exactly this.

use super::atomic::{AtomicBool, AtomicU64, Ordering, fence};
use super::drain::Drain;
use super::{MemoryError, PAGE_SIZE};

const BITS: u64 = u64::BITS as u64;

/// Live dirty bitmap over RAM pages (RAM offset space, not IOVA): bit `page % 64` of word `page / 64`.
#[derive(Debug)]
pub struct DirtyLog {
    pages: u64,
    tracking: AtomicBool,
    words: Box<[AtomicU64]>,
}

impl DirtyLog {
    /// A stopped log of `pages` pages.
    pub fn new(pages: u64) -> Self {
        let words = (0..pages.div_ceil(BITS)).map(|_| AtomicU64::new(0)).collect();
        Self { pages, tracking: AtomicBool::new(false), words }
    }

    pub fn pages(&self) -> u64 {
        self.pages
    }

    /// Begins tracking with every page dirty: what was written before is not known.
    pub fn start(&self) {
        self.tracking.store(true, Ordering::Relaxed);
        for (index, word) in self.words.iter().enumerate() {
            // Not a store: it would cover a mark that just came, without having seen that mark's bytes.
            word.swap(self.valid(index), Ordering::AcqRel);
        }
        fence(Ordering::SeqCst);
    }

    /// Begins tracking with every page clean, for who takes all that was written before as dirty in any case. As if it had been
    /// started and then drained, and the drain committed: a write whose mark is lost here came before this returns.
    pub fn start_clean(&self) {
        self.tracking.store(true, Ordering::Relaxed);
        for word in &self.words {
            take(word);
        }
        fence(Ordering::SeqCst);
    }

    /// Ends tracking and forgets every mark.
    pub fn stop(&self) {
        self.tracking.store(false, Ordering::Relaxed);
        for word in &self.words {
            word.store(0, Ordering::Relaxed);
        }
    }

    pub fn is_tracking(&self) -> bool {
        self.tracking.load(Ordering::Relaxed)
    }

    /// Marks `count` pages from `first`. Call it *after* the bytes are written. Pages outside the log are an error,
    /// returned after those inside have been marked; while stopped, only the range is checked.
    #[inline]
    pub fn mark_pages(&self, first: u64, count: u64) -> Result<(), MemoryError> {
        match first.checked_add(count) {
            Some(end) if end <= self.pages => {
                self.mark_span(first, end);
                Ok(())
            }
            _ => {
                self.mark_span(first, self.pages);
                Err(MemoryError::OutOfRange { first, count, pages: self.pages })
            }
        }
    }

    /// Marks the pages that `length` bytes at `ram_offset` touch; 0 bytes touch none. Errors as [`Self::mark_pages`].
    pub fn mark_bytes(&self, ram_offset: u64, length: u64) -> Result<(), MemoryError> {
        if length == 0 {
            return Ok(());
        }
        let first = ram_offset / PAGE_SIZE;
        let last = ram_offset.saturating_add(length - 1) / PAGE_SIZE;
        self.mark_pages(first, last - first + 1)?;
        match ram_offset.checked_add(length) {
            Some(_) => Ok(()),
            None => Err(MemoryError::Overflow { iova: ram_offset, length }),
        }
    }

    /// ORs a bitmap in; bit 0 of `words[0]` is `first_page`. Set bits outside the log are an error, returned after those
    /// inside have been marked.
    pub fn merge(&self, first_page: u64, words: &[u64]) -> Result<(), MemoryError> {
        self.merge_bits(first_page, words, 0, words.len() as u64 * BITS)
    }

    /// ORs `count` bits of `words`, from bit `from`, to the pages from `first_page`. Bits beyond `words` are 0.
    pub(super) fn merge_bits(&self, first_page: u64, words: &[u64], from: u64, count: u64) -> Result<(), MemoryError> {
        let keeps_marks = self.keeps_marks();
        let mut fenced = false;
        let mut inside = true;
        let mut done = 0;
        while done < count {
            let page = first_page.checked_add(done);
            let shift = page.map_or(0, |page| page % BITS);
            let take = (BITS - shift).min(count - done);
            let bits = extract(words, from + done) & low_mask(take);
            done += take;
            if bits == 0 {
                continue;
            }
            let index = page.and_then(|page| usize::try_from(page / BITS).ok());
            let Some((index, word)) = index.and_then(|index| Some((index, self.words.get(index)?))) else {
                inside = false;
                continue;
            };
            let valid = self.valid(index);
            inside &= (bits << shift) & !valid == 0;
            if keeps_marks {
                or(word, (bits << shift) & valid, &mut fenced);
            }
        }
        if inside { Ok(()) } else { Err(MemoryError::OutOfRange { first: first_page, count, pages: self.pages }) }
    }

    /// Dirty pages now.
    pub fn count(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.load(Ordering::Relaxed).count_ones())).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| word.load(Ordering::Relaxed) == 0)
    }

    /// Takes everything out into a guard, which puts back what is not committed. Read the pages' bytes *after* this.
    pub fn drain(&self) -> Drain<'_> {
        let words = self.words.iter().map(take).collect();
        fence(Ordering::SeqCst);
        Drain::new(self, words)
    }

    /// Takes `count` pages from `first` out, as a drain does of all; bit 0 of the answer is `first`. Pages outside the log are
    /// clean. Read the pages' bytes *after* this.
    pub(super) fn take_pages(&self, first: u64, count: u64) -> Vec<u64> {
        let end = first.saturating_add(count).min(self.pages);
        let count = end.saturating_sub(first);
        let mut taken = vec![0; count.div_ceil(BITS) as usize];
        let mut page = first;
        while page < end {
            let shift = page % BITS;
            let among = (BITS - shift).min(end - page);
            let bits = take_bits(&self.words[(page / BITS) as usize], low_mask(among) << shift) >> shift;
            let at = page - first;
            let (index, offset) = ((at / BITS) as usize, at % BITS);
            taken[index] |= bits << offset;
            if offset != 0
                && let Some(next) = taken.get_mut(index + 1)
            {
                *next |= bits >> (BITS - offset);
            }
            page += among;
        }
        fence(Ordering::SeqCst);
        taken
    }

    /// Forgets the marks of pages that are nobody's any more.
    pub(super) fn clear_pages(&self, first: u64, count: u64) {
        let end = first.saturating_add(count).min(self.pages);
        let mut page = first;
        while page < end {
            let among = (BITS - page % BITS).min(end - page);
            take_bits(&self.words[(page / BITS) as usize], low_mask(among) << (page % BITS));
            page += among;
        }
    }

    /// Puts bits back, tracking or not: a stopped log ignores them, and starting sets every bit anyway.
    pub(super) fn restore(&self, words: &[u64]) {
        for (word, bits) in self.words.iter().zip(words) {
            if *bits != 0 {
                word.fetch_or(*bits, Ordering::Release);
            }
        }
    }

    /// Marks `first .. end`, which ends inside the log and may be empty.
    fn mark_span(&self, first: u64, end: u64) {
        if first >= end || !self.keeps_marks() {
            return;
        }
        let (first_word, last_word) = ((first / BITS) as usize, ((end - 1) / BITS) as usize);
        let head = u64::MAX << (first % BITS);
        let tail = u64::MAX >> (BITS - 1 - (end - 1) % BITS);
        let mut fenced = false;
        if first_word == last_word {
            return or(&self.words[first_word], head & tail, &mut fenced);
        }
        or(&self.words[first_word], head, &mut fenced);
        for word in &self.words[first_word + 1..last_word] {
            or(word, u64::MAX, &mut fenced);
        }
        or(&self.words[last_word], tail, &mut fenced);
    }

    /// Whether marks count. *No* is said only after a fence: the caller's bytes are then seen by whoever starts later.
    fn keeps_marks(&self) -> bool {
        self.is_tracking() || {
            fence(Ordering::SeqCst);
            self.is_tracking()
        }
    }

    /// The bits of a word that are pages.
    fn valid(&self, index: usize) -> u64 {
        low_mask((self.pages - index as u64 * BITS).min(BITS))
    }
}

/// Sets bits. Where all of them are set, also after a fence, the word is only read: a line that several writers share then
/// stays shared. `fenced` says that this call has fenced already, and so whether the first look is the second one too.
fn or(word: &AtomicU64, bits: u64, fenced: &mut bool) {
    let is_set = || word.load(Ordering::Relaxed) & bits == bits;
    if is_set() {
        if std::mem::replace(fenced, true) {
            return;
        }
        fence(Ordering::SeqCst);
        if is_set() {
            return;
        }
    }
    word.fetch_or(bits, Ordering::Release);
}

/// Takes a word. A zero is left alone: a mark that comes later belongs to the next drain.
fn take(word: &AtomicU64) -> u64 {
    if looks_first() && word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) }
}

/// As [`take`], of a part of a word.
fn take_bits(word: &AtomicU64, mask: u64) -> u64 {
    if mask == u64::MAX {
        return take(word);
    }
    if word.load(Ordering::Relaxed) & mask == 0 { 0 } else { word.fetch_and(!mask, Ordering::AcqRel) & mask }
}

/// Whether zeros are left alone. Always, but for models that say otherwise.
#[cfg(not(loom))]
const fn looks_first() -> bool {
    true
}
#[cfg(loom)]
fn looks_first() -> bool {
    LOOKS_FIRST.get()
}
#[cfg(loom)]
thread_local! {
    // All threads of a model are one of the machine's.
    static LOOKS_FIRST: std::cell::Cell<bool> = const { std::cell::Cell::new(true) };
}

/// The lowest `count` bits, up to 64.
fn low_mask(count: u64) -> u64 {
    if count >= BITS { u64::MAX } else { (1 << count) - 1 }
}

/// 64 bits from bit `from`; zeros beyond the end.
fn extract(words: &[u64], from: u64) -> u64 {
    let word = |index: u64| usize::try_from(index).ok().and_then(|index| words.get(index)).copied().unwrap_or(0);
    let (index, shift) = (from / BITS, from % BITS);
    if shift == 0 { word(index) } else { word(index) >> shift | word(index + 1) << (BITS - shift) }
}

#[cfg(all(test, not(loom)))]
#[path = "dirty_log_tests.rs"]
mod tests;

#[cfg(all(test, loom))]
#[path = "dirty_log_loom.rs"]
mod loom_tests;
