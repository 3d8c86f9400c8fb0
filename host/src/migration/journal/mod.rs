//! Who owns the guest, on disk: one small append-only file for each migration and side.
//!
//! **Owns** the marks that the two machines stand on, and what a restarted host may do. **Must never** report a mark as
//! written before it is durable, nor take damage for an old state: a mark that cannot be read is a doubt.
//!
//! ```text
//!  source:      Began -> Committing -> Moved           destination:  Began -> Prepared -> Owned
//!                 \-> Kept   \-> Kept (retracted,                      \-> Discarded  \-> Discarded
//!                                discarded there, resolved)
//! ```
//!
//! An entry is `u16 length, u16 !length, u32 crc32(payload), payload`; a payload is `u8 mark, u8 by operator, fields`. An entry cut
//! short at the end was never reported as written, so nothing was done on its strength: it is dropped. An entry of full
//! length with a wrong checksum may have been: the journal is damaged and its migration in doubt.

mod files;
mod memory;
#[cfg(test)]
mod tests;

pub use files::FileStore;
pub use memory::{MemoryStore, StorageFault};

use super::cause::Role;
use super::wire::{Digest, MigrationId};

/// Longest journal, in bytes. A migration writes fewer than a dozen entries of at most [`ENTRY_MAX`].
pub const JOURNAL_MAX: usize = 64 * 1024;
/// Longest payload of an entry, in bytes.
pub const ENTRY_MAX: usize = 512;
const PEER_MAX: usize = 255;

/// What a machine wants remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mark {
    /// Either side has taken part; nothing is decided
    Began,
    /// Source: COMMIT may be on its way
    Committing { digest: Digest },
    /// Source: the guest stays here
    Kept,
    /// Source: the guest is at the destination
    Moved,
    /// Destination: everything is here and valid; READY may be on its way
    Prepared { digest: Digest },
    /// Destination: the guest is here
    Owned,
    /// Destination: it will never run here by this migration
    Discarded,
}

impl Mark {
    /// Whether `next` may follow in the journal of `role`.
    fn may_be_followed_by(self, next: Self, role: Role) -> bool {
        match (role, self, next) {
            (Role::Source, Self::Began, Self::Committing { .. } | Self::Kept) => true,
            (Role::Source, Self::Committing { .. }, Self::Kept | Self::Moved) => true,
            (Role::Source, Self::Kept, Self::Kept) => true,
            (Role::Destination, Self::Began, Self::Prepared { .. } | Self::Discarded) => true,
            (Role::Destination, Self::Prepared { .. }, Self::Owned | Self::Discarded) => true,
            (Role::Destination, Self::Discarded, Self::Discarded) => true,
            (Role::Source | Role::Destination, _, _) => false,
        }
    }
}

/// A journal could not be used.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// The id was used before, or another process holds the journal
    #[error("journal {id} {what}")]
    InUse { id: MigrationId, what: &'static str },
    /// Its bytes make no sense: the migration is in doubt
    #[error("journal {id} is damaged: {what}")]
    Damaged { id: MigrationId, what: String },
    /// [`Resolution`] of what is not in doubt, or a mark out of order
    #[error("journal {id}: {what}")]
    NotAllowed { id: MigrationId, what: String },
    #[error("journal storage")]
    Storage(#[from] std::io::Error),
}

/// Where journals are kept. The seam through which every storage fault is tried.
pub trait Store: Send + Sync + std::fmt::Debug {
    /// A new, empty, durable and locked log. `AlreadyExists` if the name was ever used.
    fn create(&self, name: &str) -> std::io::Result<Box<dyn Log>>;
    /// An existing log, locked. `WouldBlock` while somebody else holds it.
    fn open(&self, name: &str) -> std::io::Result<Box<dyn Log>>;
    /// Every name, in any order.
    fn list(&self) -> std::io::Result<Vec<String>>;
    /// The bytes of a log, whoever holds it.
    fn peek(&self, name: &str) -> std::io::Result<Vec<u8>>;
}

/// One append-only file.
pub trait Log: Send + std::fmt::Debug {
    /// All bytes, at most [`JOURNAL_MAX`].
    fn read(&mut self) -> std::io::Result<Vec<u8>>;
    /// Writes at `offset`, which is the end of what is good, and cuts off whatever lies beyond. Durable once `Ok`.
    fn append(&mut self, offset: u64, bytes: &[u8]) -> std::io::Result<()>;
}

/// What a journal tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Story {
    pub id: MigrationId,
    pub role: Role,
    /// Counts the migrations of this state directory: later ones know more
    pub ordinal: u64,
    /// Address or name of the other side, for people
    pub peer: String,
    pub last: Mark,
    pub by_operator: bool,
}

/// A journal open for writing; others are locked out.
#[derive(Debug)]
pub struct Journal {
    log: Box<dyn Log>,
    story: Story,
    good: u64,
}

fn entry(payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(payload.len() + 8);
    let length = payload.len() as u16;
    bytes.extend_from_slice(&length.to_le_bytes());
    bytes.extend_from_slice(&(!length).to_le_bytes());
    bytes.extend_from_slice(&crc32fast::hash(payload).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn mark_payload(mark: Mark, by_operator: bool) -> Vec<u8> {
    let (number, digest) = match mark {
        Mark::Began => (0, None),
        Mark::Committing { digest } => (1, Some(digest)),
        Mark::Kept => (2, None),
        Mark::Moved => (3, None),
        Mark::Prepared { digest } => (4, Some(digest)),
        Mark::Owned => (5, None),
        Mark::Discarded => (6, None),
    };
    let mut payload = vec![number, u8::from(by_operator)];
    payload.extend(digest.iter().flat_map(|digest| digest.0));
    payload
}

fn parse_mark(payload: &[u8]) -> Option<(Mark, bool)> {
    let (head, fields) = payload.split_at_checked(2)?;
    let digest = || <[u8; 16]>::try_from(fields).ok().map(Digest);
    let bare = fields.is_empty();
    let mark = match head[0] {
        1 => Mark::Committing { digest: digest()? },
        2 if bare => Mark::Kept,
        3 if bare => Mark::Moved,
        4 => Mark::Prepared { digest: digest()? },
        5 if bare => Mark::Owned,
        6 if bare => Mark::Discarded,
        _ => return None,
    };
    match head[1] {
        0 => Some((mark, false)),
        1 => Some((mark, true)),
        _ => None,
    }
}

/// First entry: `0, 0, role, id, ordinal, peer`.
fn began_payload(story: &Story) -> Vec<u8> {
    let mut payload = vec![0, 0, if story.role == Role::Source { 1 } else { 2 }];
    payload.extend_from_slice(&story.id.0);
    payload.extend_from_slice(&story.ordinal.to_le_bytes());
    payload.extend_from_slice(story.peer.as_bytes());
    payload
}

fn parse_began(payload: &[u8]) -> Option<Story> {
    let (head, rest) = payload.split_at_checked(3)?;
    let role = match head {
        [0, 0, 1] => Role::Source,
        [0, 0, 2] => Role::Destination,
        _ => return None,
    };
    let (id, rest) = rest.split_at_checked(16)?;
    let (ordinal, peer) = rest.split_at_checked(8)?;
    Some(Story {
        id: MigrationId(id.try_into().ok()?),
        role,
        ordinal: u64::from_le_bytes(ordinal.try_into().ok()?),
        peer: std::str::from_utf8(peer).ok()?.to_owned(),
        last: Mark::Began,
        by_operator: false,
    })
}

/// Reads a journal's bytes: the story and how many bytes are good. `None`: nothing was ever reported as written.
fn parse(id: MigrationId, bytes: &[u8]) -> Result<Option<(Story, u64)>, JournalError> {
    let damaged = |what: String| JournalError::Damaged { id, what };
    let mut story: Option<Story> = None;
    let mut rest = bytes;
    while let Some((head, tail)) = rest.split_at_checked(8) {
        let at = bytes.len() - rest.len();
        let length = u16::from_le_bytes([head[0], head[1]]);
        // A damaged length must not pass for an entry that was cut short.
        if u16::from_le_bytes([head[2], head[3]]) != !length {
            return Err(damaged(format!("a damaged length at {at}")));
        }
        let length = usize::from(length);
        let checksum = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
        if length > ENTRY_MAX || length == 0 {
            return Err(damaged(format!("an entry of {length} bytes at {at}")));
        }
        let Some((payload, tail)) = tail.split_at_checked(length) else { break };
        if crc32fast::hash(payload) != checksum {
            return Err(damaged(format!("a wrong checksum at {at}")));
        }
        story = Some(match story {
            None => parse_began(payload).filter(|story| story.id == id).ok_or(damaged("a strange beginning".into()))?,
            Some(before) => {
                let (last, by_operator) = parse_mark(payload).ok_or(damaged(format!("a strange mark at {at}")))?;
                if !before.last.may_be_followed_by(last, before.role) {
                    return Err(damaged(format!("{last:?} follows {:?}", before.last)));
                }
                Story { last, by_operator, ..before }
            }
        });
        rest = tail;
    }
    Ok(story.map(|story| (story, (bytes.len() - rest.len()) as u64)))
}

fn cut(peer: &str) -> &str {
    let mut end = peer.len().min(PEER_MAX);
    while !peer.is_char_boundary(end) {
        end -= 1;
    }
    &peer[..end]
}

impl Journal {
    /// Begins the journal of a new migration. Durable when it returns.
    pub fn begin(store: &dyn Store, id: MigrationId, role: Role, peer: &str) -> Result<Self, JournalError> {
        let last = stories(store)?.iter().map(|story| story.as_ref().map_or(0, |story| story.ordinal)).max();
        let ordinal = last.unwrap_or(0).saturating_add(1);
        let story = Story { id, role, ordinal, peer: cut(peer).to_owned(), last: Mark::Began, by_operator: false };
        let mut log = store.create(&id.to_string()).map_err(|error| in_use(id, error))?;
        let bytes = entry(&began_payload(&story));
        log.append(0, &bytes)?;
        Ok(Self { log, story, good: bytes.len() as u64 })
    }

    /// Opens a journal. `Ok(None)`: there is none, or nothing was ever reported as written to it.
    pub fn open(store: &dyn Store, id: MigrationId) -> Result<Option<Self>, JournalError> {
        let mut log = match store.open(&id.to_string()) {
            Ok(log) => log,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(in_use(id, error)),
        };
        let bytes = log.read()?;
        Ok(parse(id, &bytes)?.map(|(story, good)| Self { log, story, good }))
    }

    pub fn story(&self) -> &Story {
        &self.story
    }

    /// Appends a mark, durably. After an error the mark may or may not be there: append one that makes it not matter.
    pub fn append(&mut self, mark: Mark) -> Result<(), JournalError> {
        self.append_as(mark, false)
    }

    fn append_as(&mut self, mark: Mark, by_operator: bool) -> Result<(), JournalError> {
        if !self.story.last.may_be_followed_by(mark, self.story.role) {
            let what = format!("{mark:?} cannot follow {:?}", self.story.last);
            return Err(JournalError::NotAllowed { id: self.story.id, what });
        }
        let bytes = entry(&mark_payload(mark, by_operator));
        self.log.append(self.good, &bytes)?;
        self.good += bytes.len() as u64;
        self.story.last = mark;
        self.story.by_operator = by_operator;
        Ok(())
    }

    /// An operator's decision. Whoever calls this has made sure that the other side does the opposite.
    pub fn resolve(&mut self, resolution: Resolution) -> Result<Mark, JournalError> {
        let mark = match (self.story.last, resolution) {
            (Mark::Committing { .. }, Resolution::RunHere) => Mark::Kept,
            (Mark::Committing { .. }, Resolution::RunThere) => Mark::Moved,
            (Mark::Prepared { .. }, Resolution::RunHere) => Mark::Owned,
            (Mark::Prepared { .. }, Resolution::RunThere) => Mark::Discarded,
            (Mark::Began | Mark::Kept | Mark::Moved | Mark::Owned | Mark::Discarded, _) => {
                let what = format!("{:?} is not in doubt", self.story.last);
                return Err(JournalError::NotAllowed { id: self.story.id, what });
            }
        };
        self.append_as(mark, true)?;
        Ok(mark)
    }
}

fn in_use(id: MigrationId, error: std::io::Error) -> JournalError {
    match error.kind() {
        std::io::ErrorKind::AlreadyExists => JournalError::InUse { id, what: "was used before" },
        std::io::ErrorKind::WouldBlock => JournalError::InUse { id, what: "is held by another process" },
        _ => JournalError::Storage(error),
    }
}

/// Where the guest is to run, by an operator's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolution {
    RunHere,
    RunThere,
}

/// What a host that has just started may do with its guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// No migration ever
    Idle,
    /// The guest belongs to this host
    MayRun,
    /// It belongs elsewhere, or never arrived
    MustNotRun,
    /// Neither may be assumed
    InDoubt { id: MigrationId, peer: String, explanation: String },
}

/// Every journal of a state directory; a damaged one is an error in its place.
pub fn stories(store: &dyn Store) -> Result<Vec<Result<Story, JournalError>>, JournalError> {
    let mut stories = Vec::new();
    for name in store.list()? {
        // Files that are no journals are somebody else's.
        let Some(id) = MigrationId::parse(&name) else { continue };
        match parse(id, &store.peek(&name)?) {
            Ok(Some((story, _))) => stories.push(Ok(story)),
            Ok(None) => {}
            Err(error) => stories.push(Err(error)),
        }
    }
    Ok(stories)
}

/// Reads the journals of a host that has just started: the memory of every guest that it ran is gone.
pub fn recover(store: &dyn Store) -> Result<Standing, JournalError> {
    let mut known = Vec::new();
    for story in stories(store)? {
        match story {
            Ok(story) => known.push(story),
            Err(JournalError::Damaged { id, what }) => {
                let explanation = format!("its journal is damaged ({what}): an operator must say where the guest runs");
                return Ok(Standing::InDoubt { id, peer: String::new(), explanation });
            }
            Err(error) => return Err(error),
        }
    }
    known.sort_by_key(|story| story.ordinal);
    let doubt = known.iter().find(|story| matches!(story.last, Mark::Committing { .. }));
    if let Some(story) = doubt {
        let explanation = "COMMIT may have reached the destination: ask it (settle), or resolve".to_owned();
        return Ok(Standing::InDoubt { id: story.id, peer: story.peer.clone(), explanation });
    }
    let mut standing = Standing::Idle;
    for story in &known {
        standing = match (story.role, story.last) {
            (Role::Source, Mark::Began | Mark::Kept) => Standing::MayRun,
            (Role::Source, Mark::Moved) => Standing::MustNotRun,
            (Role::Destination, Mark::Owned) => Standing::MayRun,
            // What was received is gone with the process; it says nothing of what this host owned before.
            (Role::Destination, Mark::Began | Mark::Prepared { .. } | Mark::Discarded) => match standing {
                Standing::MayRun => Standing::MayRun,
                Standing::Idle | Standing::MustNotRun | Standing::InDoubt { .. } => Standing::MustNotRun,
            },
            // `parse` accepts no other mark in either role.
            (Role::Source, _) | (Role::Destination, _) => standing,
        };
    }
    Ok(standing)
}
