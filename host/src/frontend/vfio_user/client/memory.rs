//! The guest's memory, for a device that reaches it by messages.
//!
//! **Owns** what is answered to DMA_READ and DMA_WRITE. **Must never** let the server reach an address that it was not given, or for
//! what it was not given.

use std::fmt::Debug;
use std::sync::Mutex;

use rustix::io::Errno;

use super::lock;
use crate::frontend::vfio_user::session::Maps;
use crate::frontend::vfio_user::wire::{Command, DmaAccess, HEADER_LENGTH, Header, MessageType};

/// The embedder's guest. Called on any thread that waits for the server, never with an address that is not mapped for it. Must not
/// call the client.
pub trait GuestMemory: Send + Sync + Debug {
    fn read(&self, address: u64, data: &mut [u8]) -> Result<(), Errno>;
    fn write(&self, address: u64, data: &[u8]) -> Result<(), Errno>;
}

/// One request of the server. The answer's bytes, unless none is wanted.
pub(super) fn answer(
    memory: Option<&dyn GuestMemory>,
    maps: &Mutex<Maps>,
    count_max: u32,
    header: &Header,
    payload: &[u8],
) -> Option<Vec<u8>> {
    let mut out = Vec::new();
    let done = serve(memory, maps, count_max, header, payload, &mut out);
    if header.kind == (MessageType::Command { no_reply: true }) {
        return None;
    }
    if let Err(errno) = done {
        out.clear();
        Header::error(header.id, header.command, errno).write(&mut out);
    }
    Some(out)
}

fn serve(
    memory: Option<&dyn GuestMemory>,
    maps: &Mutex<Maps>,
    count_max: u32,
    header: &Header,
    payload: &[u8],
    out: &mut Vec<u8>,
) -> Result<(), Errno> {
    let reply = |access: DmaAccess, data: usize, out: &mut Vec<u8>| {
        out.reserve(HEADER_LENGTH + DmaAccess::LENGTH + data);
        Header::reply(header.id, header.command, DmaAccess::LENGTH + data).write(out);
        access.write(out);
    };
    match Command::from_raw(header.command) {
        Some(Command::DmaRead) => {
            let access = DmaAccess::parse(payload, count_max).map_err(|error| error.errno())?;
            let memory = memory.filter(|_| lock(maps).is_readable(access.address, access.count)).ok_or(Errno::FAULT)?;
            let count = access.count as usize;
            reply(access, count, out);
            out.resize(HEADER_LENGTH + DmaAccess::LENGTH + count, 0);
            let data = out.get_mut(HEADER_LENGTH + DmaAccess::LENGTH..).unwrap_or(&mut []);
            memory.read(access.address, data)
        }
        Some(Command::DmaWrite) => {
            let (access, data) = DmaAccess::parse_with_data(payload, count_max).map_err(|error| error.errno())?;
            let memory = memory.filter(|_| lock(maps).is_writable(access.address, access.count)).ok_or(Errno::FAULT)?;
            memory.write(access.address, data)?;
            if header.kind == (MessageType::Command { no_reply: false }) {
                reply(access, 0, out);
            }
            Ok(())
        }
        _ => Err(Errno::NOSYS),
    }
}
