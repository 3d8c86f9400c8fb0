//! A guest that does nothing but DMA by edu, in a loop, from half a second after QEMU's start on.
//!
//! A multiboot image of about 200 bytes: 32-bit code, no paging, no interrupts, no memory but the two pages below. Linux takes too
//! long to boot when QEMU is started a hundred times.

/// The processor fills this page with the number of the round, as 32-bit words ...
pub(super) const FROM: u32 = 0x20_0000;
/// ... the device reads it, and writes this one.
pub(super) const TO: u32 = 0x20_1000;
pub(super) const PAGE: u32 = 4096;

const LOAD: u32 = 0x10_0000;
const HEADER: u32 = 32;
const BUFFER: u32 = 0x4_0000;
const EDU: u32 = 0x11e8_1234;

/// Code as it is written down, bytes first.
struct Code(Vec<u8>);

impl Code {
    fn op(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// Bytes, and a number of 32 bits.
    fn with(&mut self, bytes: &[u8], value: u32) {
        self.op(bytes);
        self.op(&value.to_le_bytes());
    }

    fn here(&self) -> usize {
        self.0.len()
    }

    /// A jump of two bytes to what is already there.
    fn jump(&mut self, op: u8, target: usize) {
        let distance = target as i64 - (self.here() as i64 + 2);
        self.op(&[op, distance as i8 as u8]);
    }

    /// eax: of the device in ebx, the configuration register at `offset`; edx is the data port afterwards.
    fn select(&mut self, offset: u32) {
        self.with(&[0x8d, 0x83], 0x8000_0000 | offset); // lea eax, [ebx + enable + offset]
        self.with(&[0xba], 0xcf8); //                      mov edx, 0xcf8
        self.op(&[0xef]); //                               out dx, eax
        self.with(&[0xba], 0xcfc); //                      mov edx, 0xcfc
    }

    /// One DMA, and the wait for its end; BAR 0 is in ebp.
    fn dma(&mut self, source: u32, target: u32, command: u32) {
        for (register, value) in [(0x80, source), (0x88, target), (0x90, PAGE), (0x98, command)] {
            self.with(&[0xc7, 0x85], register); //         mov dword [ebp + register], value
            self.op(&value.to_le_bytes());
        }
        let wait = self.here();
        self.with(&[0xf7, 0x85], 0x98); //                 test dword [ebp + 0x98], 1
        self.op(&1u32.to_le_bytes());
        self.jump(0x75, wait); //                          jnz wait
    }
}

/// The whole file.
pub(super) fn image() -> Vec<u8> {
    let mut code = Code(Vec::new());
    code.op(&[0xfa, 0xfc, 0x31, 0xdb]); //                 cli; cld; xor ebx, ebx
    let scan = code.here();
    code.select(0);
    code.op(&[0xed]); //                                   in eax, dx
    code.with(&[0x81, 0xc3], 0x100); //                    add ebx, 0x100: the next function
    code.with(&[0x81, 0xe3], 0xff00); //                   and ebx, 0xff00: of bus 0
    code.with(&[0x3d], EDU); //                            cmp eax, EDU
    code.jump(0x75, scan); //                              jne scan
    code.with(&[0x81, 0xeb], 0x100); //                    sub ebx, 0x100
    code.select(0x04);
    code.with(&[0xb8], 0b110); //                          mov eax, memory and bus master
    code.op(&[0xef]); //                                   out dx, eax
    code.select(0x10);
    code.op(&[0xed]); //                                   in eax, dx
    code.with(&[0x25], !0xf); //                           and eax, ~0xf
    code.op(&[0x89, 0xc5, 0x31, 0xf6]); //                 mov ebp, eax; xor esi, esi
    let round = code.here();
    code.op(&[0x46, 0x89, 0xf0]); //                       inc esi; mov eax, esi
    code.with(&[0xbf], FROM); //                           mov edi, FROM
    code.with(&[0xb9], PAGE / 4); //                       mov ecx, words of a page
    code.op(&[0xf3, 0xab]); //                             rep stosd
    code.dma(FROM, BUFFER, 1);
    code.dma(BUFFER, TO, 3);
    let back = round as i64 - (code.here() as i64 + 5);
    code.with(&[0xe9], back as i32 as u32); //             jmp round

    const MAGIC: u32 = 0x1bad_b002;
    /// The addresses are in the header.
    const FLAGS: u32 = 1 << 16;
    let end = LOAD + HEADER + code.0.len() as u32;
    let header = [MAGIC, FLAGS, 0u32.wrapping_sub(MAGIC).wrapping_sub(FLAGS), LOAD, LOAD, end, end, LOAD + HEADER];
    header.iter().flat_map(|word| word.to_le_bytes()).chain(code.0).collect()
}

#[cfg(test)]
mod tests {
    use super::image;

    #[test]
    fn the_header_adds_up_to_zero_and_names_the_whole_file() {
        let image = image();
        let word = |n: usize| u32::from_le_bytes(image[4 * n..4 * n + 4].try_into().unwrap());
        assert_eq!(word(0).wrapping_add(word(1)).wrapping_add(word(2)), 0);
        assert_eq!((word(5) - word(4)) as usize, image.len());
    }
}
