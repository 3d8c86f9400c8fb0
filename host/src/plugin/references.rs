//! The counts of one plug-in, as a pure machine: who holds it, whether it is withdrawn, whether it may retire.
//!
//! Its owner keeps it under a lock and does what it says: after `withdraw` or `give_back` has told somebody that the last
//! reference is gone, that one, and nobody else, retires the plug-in and then says so with `retired`.

/// What became of a request for a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Take {
    Taken(u64),
    /// The plug-in takes nobody any more
    Withdrawn,
    /// Its limit is reached
    Full,
}

/// What a returned reference was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Return {
    NotLast,
    /// The plug-in is withdrawn and nobody holds it: the caller retires it
    Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Life {
    #[default]
    Published,
    Draining,
    /// Somebody was told to retire it
    Retiring,
    Retired,
}

#[derive(Debug, Default)]
pub struct References {
    life: Life,
    next: u64,
    held: Vec<(u64, String)>,
}

impl References {
    pub fn take(&mut self, holder: &str, limit: u32) -> Take {
        if self.life != Life::Published {
            return Take::Withdrawn;
        }
        if self.held.len() >= limit as usize {
            return Take::Full;
        }
        let number = self.next;
        self.next += 1;
        self.held.push((number, holder.to_owned()));
        Take::Taken(number)
    }

    pub fn give_back(&mut self, number: u64) -> Return {
        let before = self.held.len();
        self.held.retain(|(held, _)| *held != number);
        assert_eq!(self.held.len() + 1, before, "a reference was given back that nobody had taken");
        if self.life == Life::Draining && self.held.is_empty() {
            self.life = Life::Retiring;
            return Return::Last;
        }
        Return::NotLast
    }

    /// Takes nobody any more. True when the caller must retire the plug-in.
    #[must_use]
    pub fn withdraw(&mut self) -> bool {
        if self.life != Life::Published {
            return false;
        }
        if self.held.is_empty() {
            self.life = Life::Retiring;
            return true;
        }
        self.life = Life::Draining;
        false
    }

    pub fn retired(&mut self) {
        assert_eq!(self.life, Life::Retiring, "a plug-in was retired without being told to");
        self.life = Life::Retired;
    }

    pub fn is_withdrawn(&self) -> bool {
        self.life != Life::Published
    }

    pub fn is_retired(&self) -> bool {
        self.life == Life::Retired
    }

    pub fn holders(&self) -> Vec<String> {
        self.held.iter().map(|(_, name)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::{References, Return, Take};

    fn take(references: &mut References) -> u64 {
        match references.take("device", 2) {
            Take::Taken(number) => number,
            other => panic!("{other:?}"),
        }
    }

    /// spec: REG-5
    #[test]
    fn the_limit_is_exact_and_refunded() {
        let mut references = References::default();
        let first = take(&mut references);
        take(&mut references);
        assert_eq!(references.take("third", 2), Take::Full);
        assert_eq!(references.give_back(first), Return::NotLast);
        take(&mut references);
    }

    /// spec: REG-6
    #[test]
    fn exactly_one_is_told_to_retire() {
        let mut references = References::default();
        let (first, second) = (take(&mut references), take(&mut references));
        assert!(!references.withdraw());
        assert!(!references.withdraw(), "a second withdrawal changes nothing");
        assert_eq!(references.take("late", 2), Take::Withdrawn);
        assert_eq!(references.give_back(first), Return::NotLast);
        assert_eq!(references.give_back(second), Return::Last);
        assert!(!references.withdraw(), "somebody else was told already");
        assert!(!references.is_retired());
        references.retired();
        assert!(references.is_retired());
    }

    #[test]
    fn a_plugin_without_references_retires_at_once() {
        let mut references = References::default();
        assert!(references.withdraw());
        references.retired();
    }

    #[test]
    #[should_panic(expected = "nobody had taken")]
    fn giving_back_twice_is_our_own_mistake() {
        let mut references = References::default();
        let number = take(&mut references);
        references.give_back(number);
        references.give_back(number);
    }
}
