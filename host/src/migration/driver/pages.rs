//! Pages and the bitmaps that name them: zero or not, which are next, how many are left. Pure.

/// One page's part in the comparison of all of memory.
pub(super) fn page_hash(page: &[u8]) -> u64 {
    xxhash_rust::xxh3::xxh3_64(page)
}

pub(super) fn is_zero(page: &[u8]) -> bool {
    // Most pages that are not zero show it at once.
    let (head, rest) = page.split_at(page.len().min(64));
    head.iter().all(|byte| *byte == 0) && rest.chunks_exact(64).all(|chunk| chunk == [0; 64])
}

/// Pages that a bitmap names.
pub(super) fn count(words: &[u64]) -> u64 {
    words.iter().map(|word| u64::from(word.count_ones())).sum()
}

/// The first run of set bits from `next` on, cut at `most`: its first bit and its length.
pub(super) fn next_run(words: &[u64], next: u64, most: u64) -> Option<(u64, u64)> {
    let total = words.len() as u64 * 64;
    let set = |at: u64| words[(at / 64) as usize] >> (at % 64) & 1 == 1;
    let mut first = next;
    while first < total && !set(first) {
        // A whole word, or the rest of one, without dirt is skipped at once.
        let rest = words[(first / 64) as usize] >> (first % 64);
        first = if rest == 0 { (first / 64 + 1) * 64 } else { first + u64::from(rest.trailing_zeros()) };
    }
    if first >= total {
        return None;
    }
    let mut end = first + 1;
    while end < total && end - first < most && set(end) {
        end += 1;
    }
    Some((first, end - first))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: usize = 4096;

    fn runs(words: &[u64], most: u64) -> Vec<(u64, u64)> {
        let mut next = 0;
        std::iter::from_fn(|| {
            let run = next_run(words, next, most)?;
            next = run.0 + run.1;
            Some(run)
        })
        .collect()
    }

    #[test]
    fn runs_are_found_at_word_edges_and_cut_at_the_batch() {
        assert_eq!(runs(&[], 4), []);
        assert_eq!(runs(&[0, 0], 4), []);
        assert_eq!(runs(&[1 << 63, 1], 64), [(63, 2)]);
        assert_eq!(runs(&[0b1011, 0, 1 << 63], 64), [(0, 2), (3, 1), (191, 1)]);
        assert_eq!(runs(&[u64::MAX, u64::MAX], 50), [(0, 50), (50, 50), (100, 28)]);
    }

    #[test]
    fn the_runs_are_all_of_the_pages() {
        let words = [0xf0f0, 0, u64::MAX, 1 << 63];
        for most in 1..70 {
            assert_eq!(runs(&words, most).iter().map(|run| run.1).sum::<u64>(), count(&words), "{most}");
        }
    }

    #[test]
    fn a_page_is_zero_if_every_byte_is() {
        let mut page = vec![0; PAGE];
        assert!(is_zero(&page));
        for at in [0, 1, 63, 64, 65, 4094, 4095] {
            page[at] = 1;
            assert!(!is_zero(&page), "{at}");
            page[at] = 0;
        }
    }
}
