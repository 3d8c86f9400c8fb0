//! Live migration: a guest's memory and its devices' state go from one host to another while the guest runs.
//!
//! **Owns** the stream ([`wire`]), the two sides as pure machines ([`source`], [`destination`]), the memory of who owns
//! the guest ([`journal`]) and the driver that performs what the machines ask for ([`driver`]) over a [`transport`].
//! **Must never** let two hosts run one guest: the rule is in `spec/migration.md`, the machines are where it is kept, and
//! the fault sweep is where it is shown. Must never know a front-end: a VMM is reached through the embedding's port.
//! Locks: none of its own. One thread drives one side of one migration.

pub mod cause;
pub mod destination;
pub mod driver;
pub mod journal;
pub mod policy;
pub mod report;
pub mod source;
pub mod transport;
pub mod wire;
