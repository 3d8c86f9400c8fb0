use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::memory::PageRun;

/// The naive oracle: a set of pages.
type Oracle = BTreeSet<u64>;

/// Sizes around word edges, and a few words.
const SIZES: [u64; 9] = [1, 63, 64, 65, 127, 128, 129, 640, 700];

fn clean(pages: u64) -> DirtyLog {
    let log = DirtyLog::new(pages);
    log.start();
    log.drain().commit();
    log
}

fn pages(log: &DirtyLog) -> Oracle {
    let drain = log.drain();
    let from_runs: Oracle = drain.runs().flat_map(|run| run.first..run.first + run.count).collect();
    let from_bits: Oracle = drain.bitmap().iter_ones().map(|bit| bit as u64).collect();
    assert_eq!(from_runs, from_bits);
    assert_eq!(drain.count(), from_runs.len() as u64);
    assert_eq!(drain.is_empty(), from_runs.is_empty());
    assert_eq!(drain.bitmap().len() as u64, log.pages());
    from_runs
}

/// spec: MEM-10
#[test]
fn starting_makes_every_page_dirty_and_no_bit_beyond() {
    for size in SIZES {
        let log = DirtyLog::new(size);
        assert!(log.is_empty() && !log.is_tracking());
        log.start();
        assert_eq!(log.count(), size);
        let drain = log.drain();
        assert_eq!(drain.words().iter().map(|word| u64::from(word.count_ones())).sum::<u64>(), size);
        assert_eq!(drain.runs().collect::<Vec<_>>(), [PageRun { first: 0, count: size }]);
        drain.commit();
        assert!(log.is_empty() && log.is_tracking());
    }
}

/// spec: MEM-11
#[test]
fn marks_while_stopped_do_nothing_and_are_still_checked() {
    let log = DirtyLog::new(65);
    log.mark_pages(0, 65).unwrap();
    log.merge(0, &[u64::MAX, 1]).unwrap();
    assert!(log.is_empty());
    assert!(log.mark_pages(65, 1).is_err());
    assert!(log.merge(0, &[0, 2]).is_err());
    log.start();
    log.stop();
    assert!(log.is_empty() && !log.is_tracking());
}

/// spec: MEM-12
#[test]
fn marks_outside_the_log_are_an_error_after_those_inside() {
    for size in SIZES {
        for (first, count) in [(size - 1, 1), (0, size), (size, 0)] {
            clean(size).mark_pages(first, count).unwrap();
        }
        for (first, count) in [(size - 1, 2), (0, size + 1), (size, 1), (size + 1, 1), (0, u64::MAX), (u64::MAX, 1)] {
            let log = clean(size);
            let error = log.mark_pages(first, count).unwrap_err();
            assert!(matches!(error, MemoryError::OutOfRange { pages, .. } if pages == size));
            assert_eq!(error.errno(), rustix::io::Errno::INVAL);
            assert_eq!(pages(&log), (first.min(size)..size).collect());
        }
    }
}

/// spec: MEM-13
#[test]
fn bytes_mark_exactly_the_pages_that_they_touch() {
    let cases: [(u64, u64, &[u64]); 9] = [
        (0, 0, &[]),
        (0, 1, &[0]),
        (0, 4096, &[0]),
        (0, 4097, &[0, 1]),
        (4095, 1, &[0]),
        (4095, 2, &[0, 1]),
        (4096, 1, &[1]),
        (63 * 4096 + 4095, 2, &[63, 64]),
        (129 * 4096 - 1, 1, &[128]),
    ];
    for (offset, length, expected) in cases {
        let log = clean(129);
        log.mark_bytes(offset, length).unwrap();
        assert_eq!(pages(&log), expected.iter().copied().collect(), "{length} at {offset}");
    }
    assert!(clean(129).mark_bytes(129 * 4096 - 1, 2).is_err());
    assert!(clean(129).mark_bytes(129 * 4096, 1).is_err());
    assert!(clean(129).mark_bytes(u64::MAX, 2).is_err());
    assert!(clean(129).mark_bytes(u64::MAX, 1).is_err());
}

/// spec: MEM-14
#[test]
fn a_dropped_drain_puts_every_page_back() {
    let log = clean(129);
    log.mark_pages(62, 3).unwrap();
    log.mark_pages(128, 1).unwrap();
    let drain = log.drain();
    assert!(log.is_empty());
    log.mark_pages(0, 1).unwrap();
    drop(drain);
    assert_eq!(pages(&log), [0, 62, 63, 64, 128].into());
}

/// spec: MEM-15
#[test]
fn a_committed_run_stays_out_and_the_rest_comes_back() {
    let log = DirtyLog::new(129);
    log.start();
    let mut drain = log.drain();
    drain.commit_page_run(PageRun { first: 1, count: 63 });
    drain.commit_page_run(PageRun { first: 127, count: u64::MAX });
    drain.commit_page_run(PageRun { first: 64, count: 0 });
    drain.commit_page_run(PageRun { first: u64::MAX, count: u64::MAX });
    assert_eq!(drain.count(), 1 + 63);
    let mut at = 0;
    let mut runs = Vec::new();
    while let Some(run) = drain.run_from(at) {
        at = run.first + run.count;
        drain.commit_page_run(PageRun { first: run.first, count: 1 });
        runs.push(run);
    }
    assert_eq!(runs, [PageRun { first: 0, count: 1 }, PageRun { first: 64, count: 63 }]);
    drop(drain);
    assert_eq!(pages(&log), (65..127).collect());
}

#[test]
fn a_mark_during_a_drain_belongs_to_the_next_one() {
    let log = clean(64);
    log.mark_pages(7, 1).unwrap();
    let drain = log.drain();
    log.mark_pages(7, 1).unwrap();
    drain.commit();
    assert_eq!(pages(&log), [7].into());
}

#[test]
fn a_log_of_no_pages_is_always_empty() {
    let log = DirtyLog::new(0);
    log.start();
    assert!(log.is_empty() && log.drain().runs().next().is_none());
    log.mark_pages(0, 0).unwrap();
    log.merge(0, &[0]).unwrap();
    assert!(log.mark_pages(0, 1).is_err() && log.merge(0, &[1]).is_err());
}

#[derive(Debug, Clone)]
enum Step {
    Mark(u64, u64),
    Merge(u64, Vec<u64>),
    MergeBits(u64, Vec<u64>, u64, u64),
    Restart,
    Drop,
    Commit,
    CommitPart(u64, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let word = prop_oneof![Just(0), Just(u64::MAX), any::<u64>(), (0..64u32).prop_map(|bit| 1 << bit)];
    let words = prop::collection::vec(word, 0..4);
    let step = prop_oneof![
        4 => (0..720u64, 0..300u64).prop_map(|(first, count)| Step::Mark(first, count)),
        3 => (0..720u64, words.clone()).prop_map(|(first, words)| Step::Merge(first, words)),
        3 => (0..720u64, words, 0..200u64, 0..200u64).prop_map(|(a, words, b, c)| Step::MergeBits(a, words, b, c)),
        1 => Just(Step::Restart),
        2 => Just(Step::Drop),
        2 => Just(Step::Commit),
        3 => (0..720u64, 0..300u64).prop_map(|(first, count)| Step::CommitPart(first, count)),
    ];
    prop::collection::vec(step, 0..24)
}

proptest! {
    /// spec: MEM-16
    #[test]
    fn every_sequence_leaves_what_a_set_of_pages_would_hold(size in prop::sample::select(SIZES.to_vec()), steps in steps()) {
        let log = clean(size);
        let mut oracle = Oracle::new();
        for step in steps {
            match step {
                Step::Mark(first, count) => {
                    let marked = log.mark_pages(first, count);
                    prop_assert_eq!(marked.is_ok(), first + count <= size);
                    oracle.extend((first..first + count).filter(|page| *page < size));
                }
                Step::Merge(first, words) => {
                    let set = set_bits(&words, 0, words.len() as u64 * 64);
                    let merged = log.merge(first, &words);
                    prop_assert_eq!(merged.is_ok(), set.iter().all(|bit| first + bit < size));
                    oracle.extend(set.iter().map(|bit| first + bit).filter(|page| *page < size));
                }
                Step::MergeBits(first, words, from, count) => {
                    let set = set_bits(&words, from, count);
                    let merged = log.merge_bits(first, &words, from, count);
                    prop_assert_eq!(merged.is_ok(), set.iter().all(|bit| first + bit < size));
                    oracle.extend(set.iter().map(|bit| first + bit).filter(|page| *page < size));
                }
                Step::Restart => {
                    log.start();
                    oracle = (0..size).collect();
                }
                Step::Drop => drop(log.drain()),
                Step::Commit => {
                    let drain = log.drain();
                    let drained: Oracle = drain.runs().flat_map(|run| run.first..run.first + run.count).collect();
                    prop_assert_eq!(&drained, &oracle);
                    drain.commit();
                    oracle.clear();
                }
                Step::CommitPart(first, count) => {
                    log.drain().commit_page_run(PageRun { first, count });
                    oracle.retain(|page| *page < first || *page >= first + count);
                }
            }
            prop_assert_eq!(log.count(), oracle.len() as u64);
            prop_assert_eq!(log.is_empty(), oracle.is_empty());
        }
        prop_assert_eq!(pages(&log), oracle);
    }

    #[test]
    fn runs_are_ascending_apart_and_longest(words in prop::collection::vec(
        prop_oneof![3 => Just(0), 3 => Just(u64::MAX), 1 => any::<u64>()], 1..40)) {
        let log = clean(words.len() as u64 * 64);
        log.merge(0, &words).unwrap();
        let drain = log.drain();
        let mut end = None;
        let mut seen = Oracle::new();
        for run in drain.runs() {
            prop_assert!(run.count > 0 && end.is_none_or(|end| run.first > end));
            end = Some(run.first + run.count);
            seen.extend(run.first..run.first + run.count);
        }
        prop_assert_eq!(seen, set_bits(&words, 0, words.len() as u64 * 64));
        prop_assert_eq!(drain.words(), &words);
    }
}

/// Bits that are set among `count` from `from`, counted from `from`.
fn set_bits(words: &[u64], from: u64, count: u64) -> Oracle {
    let end = (from + count).min(words.len() as u64 * 64);
    (from..end).filter(|bit| words[(bit / 64) as usize] >> (bit % 64) & 1 != 0).map(|bit| bit - from).collect()
}

/// spec: MEM-17
/// Real threads: each page that a thread ever marked is drained at least once after its last mark.
#[test]
fn concurrent_marks_and_drains_lose_no_page() {
    const PAGES: u64 = 200;
    let log = clean(PAGES);
    let bytes: Vec<std::sync::atomic::AtomicU64> = (0..PAGES).map(|_| 0.into()).collect();
    let done = std::sync::atomic::AtomicUsize::new(0);
    let mut copy = vec![0; PAGES as usize];
    let relaxed = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        for writer in 0..2 {
            let (log, bytes, done) = (&log, &bytes, &done);
            scope.spawn(move || {
                for round in 1..20_000_u64 {
                    let page = round * 7 % (PAGES / 2) * 2 + writer;
                    bytes[page as usize].store(round, relaxed);
                    log.mark_pages(page, 1).unwrap();
                }
                done.fetch_add(1, std::sync::atomic::Ordering::Release);
            });
        }
        loop {
            let last = done.load(std::sync::atomic::Ordering::Acquire) == 2;
            let drain = log.drain();
            for page in drain.runs().flat_map(|run| run.first..run.first + run.count) {
                copy[page as usize] = bytes[page as usize].load(relaxed);
            }
            // Every other drain fails: what it took comes back.
            if last || drain.count().is_multiple_of(2) {
                drain.commit();
            }
            if last {
                break;
            }
        }
    });
    let truth: Vec<u64> = bytes.iter().map(|value| value.load(relaxed)).collect();
    assert_eq!(copy, truth);
}
