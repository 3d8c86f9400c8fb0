//! Who is registered, who holds whom, and who retires whom: the registry's protocol, apart from what it protects.
//!
//! **Owns** every count. **Must never** call a member: it says who has to, and holds no lock by then.
//!
//! ```text
//!   reserve --> REGISTERING -- publish --> PUBLISHED -- withdraw --> DRAINING -- last hold given back --+
//!                   | abandon                  | withdraw, nobody holds it                              |
//!                   v                          v                                                        v
//!                 (gone)  <---- gone -----  RETIRING: one caller was told to retire it  <---------------+
//! ```
//! A *hold* keeps its member from retiring. It begins as a call in flight (a probe), and becomes a device's by [`Hold::seat`],
//! which is where the limit counts. Locks: `inner`, a leaf.

#[cfg(loom)]
use loom::sync::{Condvar, Mutex, MutexGuard};
use std::sync::{Arc, PoisonError};
#[cfg(not(loom))]
use std::sync::{Condvar, Mutex, MutexGuard};
use std::time::Instant;

/// What is registered. Cloned out of the lock to be called.
pub trait Member: Clone {
    /// The last call. Made once, by whoever gave the last hold back, or withdrew a member that nobody held.
    fn retire(&self);
}

/// One registration, by number; later ones are greater.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PluginId(u64);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Registering,
    Published,
    Draining,
    Retiring,
}

/// Whether a registered member may be asked for something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    /// Its `init` has not returned
    Registering,
    Published,
    /// Unregistered, and still held
    Withdrawn,
}

#[derive(Debug)]
struct Held {
    number: u64,
    device: String,
    seated: bool,
}

#[derive(Debug)]
struct Seat<C, M> {
    id: PluginId,
    card: Arc<C>,
    life: Life,
    /// There once it is published
    member: Option<M>,
    held: Vec<Held>,
}

#[derive(Debug)]
struct Inner<C, M> {
    next_id: u64,
    next_hold: u64,
    closed: bool,
    /// In the order of registration
    seats: Vec<Seat<C, M>>,
}

/// Members of type `M`, each with a card `C` that says who it is.
#[derive(Debug)]
pub struct Roster<C, M> {
    inner: Mutex<Inner<C, M>>,
    changed: Condvar,
}

/// Why there is no place for another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    Duplicate,
    Closed,
}

/// Why a hold did not become a device's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unseated {
    Withdrawn,
    Full,
}

/// Who holds a member that did not go in time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Busy(pub Vec<String>);

/// One registered member as it was at one moment.
#[derive(Debug)]
pub struct Entry<C> {
    pub id: PluginId,
    pub card: Arc<C>,
    pub standing: Standing,
    /// Names of its devices
    pub devices: Vec<String>,
}

impl<C, M> Seat<C, M> {
    fn standing(&self) -> Standing {
        match self.life {
            Life::Registering => Standing::Registering,
            Life::Published => Standing::Published,
            Life::Draining | Life::Retiring => Standing::Withdrawn,
        }
    }

    fn devices(&self) -> Vec<String> {
        self.held.iter().filter(|held| held.seated).map(|held| held.device.clone()).collect()
    }

    fn holders(&self) -> Vec<String> {
        match self.life {
            Life::Registering => vec!["its own init".to_owned()],
            Life::Retiring => vec!["its own retire".to_owned()],
            _ => self.held.iter().map(Held::describe).collect(),
        }
    }

    /// Who has to retire it, if nobody holds it any more.
    fn retire_if_last(&mut self) -> Option<M>
    where
        M: Clone,
    {
        if self.life != Life::Draining || !self.held.is_empty() {
            return None;
        }
        self.life = Life::Retiring;
        self.member.clone()
    }
}

impl Held {
    fn describe(&self) -> String {
        if self.seated { self.device.clone() } else { format!("a probe of {}", self.device) }
    }
}

impl<C, M> Inner<C, M> {
    fn seat(&mut self, id: PluginId) -> Option<&mut Seat<C, M>> {
        self.seats.iter_mut().find(|seat| seat.id == id)
    }
}

impl<C, M: Member> Roster<C, M> {
    pub fn new() -> Arc<Self> {
        let inner = Inner { next_id: 0, next_hold: 0, closed: false, seats: Vec::new() };
        Arc::new(Self { inner: Mutex::new(inner), changed: Condvar::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Inner<C, M>> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a place, so that order and name are settled before `init` runs. `is_same`: two cards that exclude each other.
    pub fn reserve(&self, card: Arc<C>, is_same: impl Fn(&C, &C) -> bool) -> Result<PluginId, Refused> {
        let mut inner = self.lock();
        if inner.closed {
            return Err(Refused::Closed);
        }
        if inner.seats.iter().any(|seat| is_same(&seat.card, &card)) {
            return Err(Refused::Duplicate);
        }
        let id = PluginId(inner.next_id);
        inner.next_id += 1;
        inner.seats.push(Seat { id, card, life: Life::Registering, member: None, held: Vec::new() });
        Ok(id)
    }

    /// Makes a member visible, in one step. When the roster was closed meanwhile it is retired instead.
    pub fn publish(&self, id: PluginId, member: M) -> Result<(), Refused> {
        let mut inner = self.lock();
        let closed = inner.closed;
        if let Some(seat) = inner.seat(id) {
            assert_eq!(seat.life, Life::Registering, "a plug-in was published twice");
            seat.member = Some(member.clone());
            seat.life = if closed { Life::Retiring } else { Life::Published };
        }
        drop(inner);
        if closed {
            member.retire();
            self.gone(id);
            return Err(Refused::Closed);
        }
        Ok(())
    }

    /// Its `init` failed: the place is free again.
    pub fn abandon(&self, id: PluginId) {
        self.gone(id);
    }

    fn gone(&self, id: PluginId) {
        let mut inner = self.lock();
        inner.seats.retain(|seat| seat.id != id || !matches!(seat.life, Life::Registering | Life::Retiring));
        drop(inner);
        self.changed.notify_all();
    }

    /// Everybody, in order, as of one moment. Fails once the roster is closed.
    pub fn survey(&self) -> Result<Vec<Entry<C>>, Refused> {
        let inner = self.lock();
        if inner.closed { Err(Refused::Closed) } else { Ok(entries(&inner)) }
    }

    /// Everybody, closed or not.
    pub fn list(&self) -> Vec<Entry<C>> {
        entries(&self.lock())
    }

    /// Keeps a published member from retiring while it is called. `None`: it was withdrawn.
    pub fn hold(self: &Arc<Self>, id: PluginId, device: &str) -> Option<Hold<C, M>> {
        let mut inner = self.lock();
        let number = inner.next_hold;
        inner.next_hold += 1;
        let seat = inner.seat(id).filter(|seat| seat.life == Life::Published)?;
        let member = seat.member.clone()?;
        let card = Arc::clone(&seat.card);
        seat.held.push(Held { number, device: device.to_owned(), seated: false });
        Some(Hold { roster: Arc::clone(self), id, number, member, card })
    }

    /// The member is given to nobody from now on. False: there never was such a member.
    pub fn withdraw(&self, id: PluginId) -> bool {
        let mut inner = self.lock();
        let existed = id.0 < inner.next_id;
        let Some(seat) = inner.seat(id) else { return existed };
        if seat.life == Life::Published {
            seat.life = Life::Draining;
        }
        let last = seat.retire_if_last();
        drop(inner);
        self.retire(id, last);
        true
    }

    fn give_back(&self, id: PluginId, number: u64) {
        let mut inner = self.lock();
        let seat = inner.seat(id).expect("a held member stays");
        let before = seat.held.len();
        seat.held.retain(|held| held.number != number);
        assert_eq!(seat.held.len() + 1, before, "a hold was given back twice");
        let last = seat.retire_if_last();
        drop(inner);
        self.retire(id, last);
    }

    /// With no lock held: a member may take its time, and may come back here.
    fn retire(&self, id: PluginId, last: Option<M>) {
        if let Some(member) = last {
            member.retire();
            self.gone(id);
        }
    }

    /// Registers nobody and gives nobody away from now on. Who is there still has to be withdrawn.
    pub fn close(&self) -> Vec<PluginId> {
        let mut inner = self.lock();
        inner.closed = true;
        inner.seats.iter().filter(|seat| seat.life != Life::Registering).map(|seat| seat.id).collect()
    }

    /// Waits until a withdrawn member has retired.
    pub fn wait_gone(&self, id: PluginId, deadline: Instant) -> Result<(), (Arc<C>, Busy)> {
        self.wait(deadline, |inner| inner.seats.iter().position(|seat| seat.id == id))
    }

    /// Waits until there is nobody, not even somebody who was being registered when the roster was closed.
    pub fn wait_empty(&self, deadline: Instant) -> Result<(), (Arc<C>, Busy)> {
        self.wait(deadline, |inner| if inner.seats.is_empty() { None } else { Some(0) })
    }

    fn wait(
        &self,
        deadline: Instant,
        still_there: impl Fn(&Inner<C, M>) -> Option<usize>,
    ) -> Result<(), (Arc<C>, Busy)> {
        let mut inner = self.lock();
        while let Some(at) = still_there(&inner) {
            let left = deadline.saturating_duration_since(Instant::now());
            // loom has no time: a wait ends only when somebody wakes it.
            if left.is_zero() && !cfg!(loom) {
                let seat = &inner.seats[at];
                return Err((Arc::clone(&seat.card), Busy(seat.holders())));
            }
            inner = match self.changed.wait_timeout(inner, left) {
                Ok((inner, _)) => inner,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
        Ok(())
    }
}

fn entries<C, M>(inner: &Inner<C, M>) -> Vec<Entry<C>> {
    let entry = |seat: &Seat<C, M>| Entry {
        id: seat.id,
        card: Arc::clone(&seat.card),
        standing: seat.standing(),
        devices: seat.devices(),
    };
    inner.seats.iter().map(entry).collect()
}

/// Keeps a member from retiring. Given back when dropped, by whichever thread drops it; the last one retires a withdrawn
/// member there and then.
#[derive(Debug)]
pub struct Hold<C, M: Member> {
    roster: Arc<Roster<C, M>>,
    id: PluginId,
    number: u64,
    member: M,
    card: Arc<C>,
}

impl<C, M: Member> Hold<C, M> {
    pub fn member(&self) -> &M {
        &self.member
    }

    pub fn card(&self) -> &C {
        &self.card
    }

    /// The hold is a device's from now on, if the member is still given away and has fewer than `limit` of them. Looking
    /// and taking are one step.
    pub fn seat(&self, limit: u32) -> Result<(), Unseated> {
        let mut inner = self.roster.lock();
        let seat = inner.seat(self.id).filter(|seat| seat.life == Life::Published).ok_or(Unseated::Withdrawn)?;
        if seat.held.iter().filter(|held| held.seated).count() >= limit as usize {
            return Err(Unseated::Full);
        }
        let number = self.number;
        seat.held.iter_mut().filter(|held| held.number == number).for_each(|held| held.seated = true);
        Ok(())
    }
}

impl<C, M: Member> Drop for Hold<C, M> {
    fn drop(&mut self) {
        self.roster.give_back(self.id, self.number);
    }
}

#[cfg(all(test, loom))]
#[path = "roster_loom.rs"]
mod loom_tests;
#[cfg(all(test, not(loom)))]
#[path = "roster_tests.rs"]
mod tests;
