//! The dirty log against hand-written loops over raw words, in one run: 16M pages (64 GiB of guest memory).
//!
//! * `set`: marking single random pages. Raw: `fetch_or(Release)` on the word.
//! * `set_again`: marking pages that are dirty already. Raw: full fence, load, test, as the log does; without the fence a
//!   mark could be lost (see `memory::dirty_log`).
//! * `set_512`: marking aligned-off runs of 512 pages. Raw: edge masks and `fetch_or`.
//! * `scan`: visiting every run of a drained snapshot. Raw: `trailing_zeros` over plain words, eight zero words at once.
//! * `drain`: taking everything into a snapshot. Raw: load, and `swap(AcqRel)` where it is not zero.
//!
//! Repeat with `cargo bench -p vfio-mediate --bench dirty_log`.

use std::hint::black_box;
use std::sync::atomic::{AtomicU64, Ordering, fence};

use criterion::{BatchSize, BenchmarkId, Criterion, criterion_group, criterion_main};
use vfio_mediate::memory::DirtyLog;

const PAGES: u64 = 16 << 20;
const WORDS: usize = (PAGES / 64) as usize;
/// Of 10,000 pages.
const DENSITIES: [(&str, u64); 3] = [("0.01%", 1), ("1%", 100), ("50%", 5000)];

/// A fixed sequence, so that both sides of a comparison and every run see the same pages.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn bitmap(per_10_000: u64) -> Vec<u64> {
    let mut random = Random(0x9E37_79B9_7F4A_7C15);
    let mut words = vec![0; WORDS];
    for page in 0..PAGES {
        if random.next() % 10_000 < per_10_000 {
            words[(page / 64) as usize] |= 1 << (page % 64);
        }
    }
    words
}

fn clean_log() -> DirtyLog {
    let log = DirtyLog::new(PAGES);
    log.start();
    log.drain().commit();
    log
}

fn raw(words: &[u64]) -> Vec<AtomicU64> {
    words.iter().copied().map(AtomicU64::new).collect()
}

fn raw_drain(live: &[AtomicU64]) -> Vec<u64> {
    let take = |word: &AtomicU64| if word.load(Ordering::Relaxed) == 0 { 0 } else { word.swap(0, Ordering::AcqRel) };
    live.iter().map(take).collect()
}

/// Calls `visit(first, count)` for each run.
fn raw_scan(words: &[u64], mut visit: impl FnMut(u64, u64)) {
    let mut run: Option<u64> = None;
    let mut index = 0;
    while index < words.len() {
        if run.is_none() && words.get(index..index + 8).is_some_and(|eight| eight.iter().all(|word| *word == 0)) {
            index += 8;
            continue;
        }
        let (base, mut word, mut at) = (index as u64 * 64, words[index], 0);
        while at < 64 {
            match run {
                None if word == 0 => break,
                None => {
                    let skip = word.trailing_zeros();
                    (at, word) = (at + skip, word >> skip);
                    run = Some(base + u64::from(at));
                }
                Some(first) => {
                    let ones = word.trailing_ones().min(64 - at);
                    (at, word) = (at + ones, word.checked_shr(ones).unwrap_or(0));
                    if at < 64 {
                        visit(first, base + u64::from(at) - first);
                        run = None;
                    }
                }
            }
        }
        index += 1;
    }
    if let Some(first) = run {
        visit(first, words.len() as u64 * 64 - first);
    }
}

fn set(criterion: &mut Criterion) {
    let pages: Vec<u64> = {
        let mut random = Random(42);
        (0..4096).map(|_| random.next() % (PAGES - 512)).collect()
    };
    let mut group = criterion.benchmark_group("set");
    let live = raw(&vec![0; WORDS]);
    // Before each batch both sides are drained, so that each mark is a first one and the caches are alike.
    let clear = |live: &[AtomicU64]| drop(raw_drain(live));
    let mark = |live: &[AtomicU64], page: u64| live[(page / 64) as usize].fetch_or(1 << (page % 64), Ordering::Release);
    group.bench_function("raw", |bench| {
        bench.iter_batched(
            || clear(&live),
            |()| pages.iter().for_each(|page| _ = mark(&live, *page)),
            BatchSize::PerIteration,
        );
    });
    let log = clean_log();
    group.bench_function("log", |bench| {
        bench.iter_batched(
            || log.drain().commit(),
            |()| pages.iter().for_each(|page| log.mark_pages(*page, 1).unwrap()),
            BatchSize::PerIteration,
        );
    });
    group.finish();

    let mut group = criterion.benchmark_group("set_again");
    pages.iter().for_each(|page| _ = mark(&live, *page));
    group.bench_function("raw", |bench| {
        bench.iter(|| {
            for page in &pages {
                fence(Ordering::SeqCst);
                let (word, bit) = (&live[(page / 64) as usize], 1 << (page % 64));
                if word.load(Ordering::Relaxed) & bit == 0 {
                    word.fetch_or(bit, Ordering::Release);
                }
            }
        });
    });
    pages.iter().for_each(|page| log.mark_pages(*page, 1).unwrap());
    group.bench_function("log", |bench| {
        bench.iter(|| pages.iter().for_each(|page| log.mark_pages(*page, 1).unwrap()));
    });
    group.finish();

    let mut group = criterion.benchmark_group("set_512");
    let starts: Vec<u64> = pages[..64].iter().map(|page| page | 3).collect();
    group.bench_function("raw", |bench| {
        let run = |first: u64| {
            let (start, end) = (first / 64, (first + 511) / 64);
            let (head, tail) = (u64::MAX << (first % 64), u64::MAX >> (63 - (first + 511) % 64));
            live[start as usize].fetch_or(head, Ordering::Release);
            (start + 1..end).for_each(|word| _ = live[word as usize].fetch_or(u64::MAX, Ordering::Release));
            live[end as usize].fetch_or(tail, Ordering::Release);
        };
        bench.iter_batched(|| clear(&live), |()| starts.iter().copied().for_each(run), BatchSize::PerIteration);
    });
    group.bench_function("log", |bench| {
        bench.iter_batched(
            || log.drain().commit(),
            |()| starts.iter().for_each(|first| log.mark_pages(*first, 512).unwrap()),
            BatchSize::PerIteration,
        );
    });
    group.finish();
}

fn scan(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("scan");
    group.sample_size(20);
    for (name, density) in DENSITIES {
        let words = bitmap(density);
        group.bench_function(BenchmarkId::new("raw", name), |bench| {
            bench.iter(|| {
                let mut total = 0;
                raw_scan(black_box(&words), |first, count| total += first ^ count);
                total
            });
        });
        let log = clean_log();
        log.merge(0, &words).unwrap();
        let drain = log.drain();
        group.bench_function(BenchmarkId::new("log", name), |bench| {
            bench.iter(|| black_box(&drain).runs().fold(0, |total, run| total + (run.first ^ run.count)));
        });
        drain.commit();
    }
    group.finish();
}

fn drain(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("drain");
    group.sample_size(20);
    for (name, density) in DENSITIES {
        let words = bitmap(density);
        let live = raw(&words);
        let refill = || live.iter().zip(&words).for_each(|(word, bits)| word.store(*bits, Ordering::Relaxed));
        group.bench_function(BenchmarkId::new("raw", name), |bench| {
            bench.iter_batched(refill, |()| raw_drain(&live), BatchSize::PerIteration);
        });
        let log = clean_log();
        let refill = || log.merge(0, &words).unwrap();
        group.bench_function(BenchmarkId::new("log", name), |bench| {
            bench.iter_batched(refill, |()| log.drain().commit(), BatchSize::PerIteration);
        });
    }
    group.finish();
}

criterion_group!(benches, set, scan, drain);
criterion_main!(benches);
