//! Mutations of inputs: seeded, so that a run can be had again.

/// Numbers at which lengths and counts go wrong.
const INTERESTING: [u64; 20] = [
    0,
    1,
    2,
    7,
    8,
    15,
    16,
    17,
    0xfff,
    0x1000,
    0x1001,
    0xffff,
    0x10_0000,
    0x10_0001,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    0xffff_ffff_ffff_f000,
    u64::MAX,
];

/// Most bytes that an input grows to.
const LENGTH_MAX: usize = 8192;

/// xorshift64*: nothing here needs a better one.
#[derive(Debug, Clone)]
pub struct Mutator {
    state: u64,
}

impl Mutator {
    pub fn new(seed: u64) -> Self {
        Self { state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1 }
    }

    pub fn number(&mut self) -> u64 {
        self.state ^= self.state >> 12;
        self.state ^= self.state << 25;
        self.state ^= self.state >> 27;
        self.state.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `end`, which is not 0.
    pub fn below(&mut self, end: usize) -> usize {
        (self.number() >> 16) as usize % end
    }

    /// One to five changes; `other` is there to be spliced in.
    pub fn mutate(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        for _ in 0..=self.below(5) {
            self.change(input, other);
        }
        input.truncate(LENGTH_MAX);
    }

    fn change(&mut self, input: &mut Vec<u8>, other: &[u8]) {
        let at = self.below(input.len() + 1);
        match self.below(7) {
            0 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte ^= 1 << self.below(8);
                }
            }
            1 => {
                if let Some(byte) = input.get_mut(at) {
                    *byte = self.number() as u8;
                }
            }
            2 => input.insert(at, self.number() as u8),
            3 => {
                let end = (at + 1 + self.below(16)).min(input.len());
                input.drain(at.min(end)..end);
            }
            4 => {
                let value = INTERESTING[self.below(INTERESTING.len())].to_le_bytes();
                let width = [1, 2, 4, 8][self.below(4)];
                for (byte, new) in input.iter_mut().skip(at).zip(&value[..width]) {
                    *byte = *new;
                }
            }
            5 => input.truncate(at),
            _ => {
                let from = self.below(other.len() + 1);
                let to = (from + self.below(200)).min(other.len());
                let tail = input.split_off(at);
                input.extend_from_slice(&other[from..to]);
                input.extend_from_slice(&tail);
            }
        }
    }
}
