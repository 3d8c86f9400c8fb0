//! Where the guest keeps what: its whole state lives in RAM, so that migrating RAM migrates the guest.
//!
//! | page | holds |
//! |---|---|
//! | 0 | [`State`]: the program's variables |
//! | 1 | the page that the device reads |
//! | 2 .. | versions of the CPU pages, 4 bytes each |
//! | then | payload pages: written by the device alone, never by the CPU |
//! | then | CPU pages: written by the guest through plain pointers |

use std::sync::atomic::Ordering;

use anyhow::{Context, ensure};
use vfio_mediate::memory::PAGE_SIZE;
use vfio_mediate::sys::Mapping;

pub const SOURCE_PAGE: u64 = 1;
const VERSIONS_PAGE: u64 = 2;
const MAGIC: u64 = u64::from_le_bytes(*b"vfm-demo");

/// Words of page 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u64)]
pub enum Word {
    Magic = 0,
    Seed,
    /// [`crate::guest::Phase`] as a number
    Phase,
    /// DMA round trips completed
    Round,
    /// Steps made, over all hosts: the heartbeat's number
    Step,
    Random,
    CpuWrites,
    Interrupts,
    Factorial,
    Liveness,
    /// 1 once the device holds a page of ours
    Filled,
    PayloadPages,
}

/// The guest's memory, with names for its parts.
#[derive(Debug)]
pub struct State<'a> {
    pub ram: &'a Mapping,
}

impl State<'_> {
    pub fn get(&self, word: Word) -> anyhow::Result<u64> {
        Ok(self.ram.load_u64(word as u64 * 8, Ordering::Acquire)?)
    }

    pub fn set(&self, word: Word, value: u64) -> anyhow::Result<()> {
        Ok(self.ram.store_u64(word as u64 * 8, value, Ordering::Release)?)
    }

    pub fn add(&self, word: Word, more: u64) -> anyhow::Result<u64> {
        let sum = self.get(word)?.wrapping_add(more);
        self.set(word, sum)?;
        Ok(sum)
    }

    /// Whether a guest lives here already.
    pub fn is_alive(&self) -> anyhow::Result<bool> {
        Ok(self.get(Word::Magic)? == MAGIC)
    }

    /// Makes a new guest. Its memory must be large enough for at least one page of each kind.
    pub fn create(&self, seed: u64, payload_pages: u64) -> anyhow::Result<()> {
        self.set(Word::Seed, seed)?;
        self.set(Word::Random, seed | 1)?;
        self.set(Word::PayloadPages, payload_pages)?;
        let places = self.places()?;
        ensure!(places.cpu_pages >= 8, "guest memory of {} bytes is too small", self.ram.len());
        self.set(Word::Magic, MAGIC)
    }

    pub fn places(&self) -> anyhow::Result<Places> {
        let payload_pages = self.get(Word::PayloadPages)?;
        let pages = self.ram.len() / PAGE_SIZE;
        let per_page = PAGE_SIZE / 4;
        // One version entry for every page of RAM is a little more than needed, and simple.
        let payload_first = VERSIONS_PAGE + pages.div_ceil(per_page);
        let cpu_first = payload_first.checked_add(payload_pages).context("payload pages overflow")?;
        ensure!(cpu_first < pages, "guest memory of {} bytes is too small", self.ram.len());
        Ok(Places { payload_first, payload_pages, cpu_first, cpu_pages: pages - cpu_first })
    }

    pub fn version(&self, cpu_page: u64) -> anyhow::Result<u32> {
        Ok(self.ram.load_u32(VERSIONS_PAGE * PAGE_SIZE + cpu_page * 4, Ordering::Acquire)?)
    }

    pub fn set_version(&self, cpu_page: u64, version: u32) -> anyhow::Result<()> {
        Ok(self.ram.store_u32(VERSIONS_PAGE * PAGE_SIZE + cpu_page * 4, version, Ordering::Release)?)
    }

    /// xorshift64*: the guest's own randomness, part of its state.
    pub fn random(&self) -> anyhow::Result<u64> {
        let mut x = self.get(Word::Random)?;
        x ^= x >> 12;
        x ^= x << 25;
        x ^= x >> 27;
        self.set(Word::Random, x)?;
        Ok(x.wrapping_mul(0x2545_f491_4f6c_dd1d))
    }
}

/// Page numbers of the parts whose size depends on the memory.
#[derive(Debug, Clone, Copy)]
pub struct Places {
    pub payload_first: u64,
    pub payload_pages: u64,
    pub cpu_first: u64,
    pub cpu_pages: u64,
}

/// What a page must hold: 512 words that depend on the guest's seed, on what kind of page it is, and on its version.
pub fn pattern(seed: u64, kind: u64, number: u64, version: u64, page: &mut [u8; PAGE_SIZE as usize]) {
    let mut word = seed ^ kind.rotate_left(56) ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ version.rotate_left(32);
    for chunk in page.chunks_exact_mut(8) {
        word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = word;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed ^= mixed >> 27;
        chunk.copy_from_slice(&mixed.to_le_bytes());
    }
}

/// [`pattern`]'s kinds.
pub const KIND_CPU: u64 = 1;
pub const KIND_DMA: u64 = 2;
