//! The 16 bytes before every message.

use rustix::io::Errno;

use super::Put;

pub const HEADER_LENGTH: usize = 16;

const TYPE_MASK: u32 = 0xf;
const NO_REPLY: u32 = 1 << 4;
const ERROR: u32 = 1 << 5;

macro_rules! commands {
    ($($name:ident = $number:literal;)*) => {
        /// `VFIO_USER_*`, as our enum; [`Command::raw`] is the wire's number.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Command { $($name,)* }

        impl Command {
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            pub const fn raw(self) -> u16 {
                match self { $(Self::$name => $number,)* }
            }

            pub const fn from_raw(raw: u16) -> Option<Self> {
                match raw { $($number => Some(Self::$name),)* _ => None }
            }
        }
    };
}

commands! {
    Version = 1;
    DmaMap = 2;
    DmaUnmap = 3;
    DeviceGetInfo = 4;
    DeviceGetRegionInfo = 5;
    DeviceGetRegionIoFds = 6;
    DeviceGetIrqInfo = 7;
    DeviceSetIrqs = 8;
    RegionRead = 9;
    RegionWrite = 10;
    DmaRead = 11;
    DmaWrite = 12;
    DeviceReset = 13;
    RegionWriteMulti = 15;
    DeviceFeature = 16;
    MigDataRead = 17;
    MigDataWrite = 18;
}

impl Command {
    /// Sent by the server, answered by the client; all others the other way round.
    pub const fn is_servers(self) -> bool {
        matches!(self, Self::DmaRead | Self::DmaWrite)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MessageType {
    Command {
        no_reply: bool,
    },
    /// `error`: the errno that the peer gave, never 0
    Reply {
        error: Option<Errno>,
    },
    /// Kept, so that it can be refused
    Unknown(u8),
}

/// A message's header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    pub id: u16,
    /// As it was sent: an unknown command is answered, too
    pub command: u16,
    /// Of the whole message, in bytes
    pub size: u32,
    pub kind: MessageType,
}

impl Header {
    /// Total. `size` may be any number: whoever frames messages refuses what is below [`HEADER_LENGTH`] or too long.
    pub fn parse(bytes: &[u8; HEADER_LENGTH]) -> Self {
        let u16_at = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let u32_at = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let flags = u32_at(8);
        let kind = match flags & TYPE_MASK {
            0 => MessageType::Command { no_reply: flags & NO_REPLY != 0 },
            1 => MessageType::Reply { error: (flags & ERROR != 0).then(|| errno_of(u32_at(12))) },
            other => MessageType::Unknown(other as u8),
        };
        Self { id: u16_at(0), command: u16_at(2), size: u32_at(4), kind }
    }

    pub fn command(id: u16, command: Command, payload: usize, no_reply: bool) -> Self {
        Self { id, command: command.raw(), size: size_of(payload), kind: MessageType::Command { no_reply } }
    }

    pub fn reply(id: u16, command: u16, payload: usize) -> Self {
        Self { id, command, size: size_of(payload), kind: MessageType::Reply { error: None } }
    }

    pub fn error(id: u16, command: u16, errno: Errno) -> Self {
        Self { id, command, size: size_of(0), kind: MessageType::Reply { error: Some(errno) } }
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&self.to_bytes());
    }

    pub fn to_bytes(&self) -> [u8; HEADER_LENGTH] {
        let (flags, errno) = match self.kind {
            MessageType::Command { no_reply } => (if no_reply { NO_REPLY } else { 0 }, 0),
            MessageType::Reply { error: None } => (1, 0),
            // An errno of 0 would look like no error to some clients.
            MessageType::Reply { error: Some(errno) } => (1 | ERROR, errno.raw_os_error().max(1) as u32),
            MessageType::Unknown(kind) => (u32::from(kind) & TYPE_MASK, 0),
        };
        let mut out = Vec::with_capacity(HEADER_LENGTH);
        out.u16(self.id);
        out.u16(self.command);
        out.u32(self.size);
        out.u32(flags);
        out.u32(errno);
        let mut bytes = [0; HEADER_LENGTH];
        bytes.copy_from_slice(&out);
        bytes
    }
}

/// EIO where the peer gave no number of an error.
fn errno_of(raw: u32) -> Errno {
    match i32::try_from(raw) {
        Ok(raw @ 1..=4095) => Errno::from_raw_os_error(raw),
        _ => Errno::IO,
    }
}

fn size_of(payload: usize) -> u32 {
    u32::try_from(HEADER_LENGTH.saturating_add(payload)).unwrap_or(u32::MAX)
}
