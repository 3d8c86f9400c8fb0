//! The mutations: which line is broken, how, and which model has to notice.
//!
//! To add one, add an entry. The key is the text of a statement (it ends in `;` or `}`) or of an expression, once within the
//! function named, on one line or several (blanks are alike); what replaces it must compile in its place, and cannot stand
//! in a `const fn`. `says` is a part of the panic by which the model fails: one that fails otherwise is not proven.

/// One broken line.
#[derive(Debug, Clone, Copy)]
pub struct Mutation {
    pub name: &'static str,
    /// Path in the workspace
    pub file: &'static str,
    /// Begins the function in which the key stands; once in the file
    pub within: &'static str,
    pub key: &'static str,
    pub broken: &'static str,
    /// The model that must fail, without its module
    pub model: &'static str,
    pub says: &'static str,
}

const GATE: &str = "host/src/mediation/gate/mod.rs";
const DIRTY_LOG: &str = "host/src/memory/dirty_log.rs";
const ROSTER: &str = "host/src/plugin/roster.rs";
const REFERENCES: &str = "host/src/kvm/references.rs";

/// What loom says when nobody is left who could go on.
const DEADLOCK: &str = "deadlock";
/// What the gate's models say when an access and an exclusive turn are there at once.
const MEETING: &str = "met an";
/// What the dirty log's models say when the peer lacks a write.
const LOST_WRITE: &str = "assertion `left == right` failed";

pub const MUTATIONS: &[Mutation] = &[
    // The gate: either the closer sees the slot, or the entering thread sees the closed state.
    Mutation {
        name: "gate-enter-without-fence",
        file: GATE,
        within: "fn count(",
        key: "way.light();",
        broken: "",
        model: "loom_gate_no_access_meets_an_exclusive_turn",
        says: MEETING,
    },
    Mutation {
        name: "gate-close-without-fence",
        file: GATE,
        within: "fn close_as(",
        key: "self.heavy();",
        broken: "",
        model: "loom_gate_disabled_memory_is_never_reached",
        says: MEETING,
    },
    Mutation {
        name: "gate-state-before-slot",
        file: GATE,
        within: "fn count(",
        key: "match way { Way::Shared => _ = slot.fetch_add(1, Ordering::Relaxed), // Only this thread writes its slot. \
              Way::Quick | Way::Fenced => slot.store(slot.load(Ordering::Relaxed) + 1, Ordering::Relaxed), }",
        broken: "let state = self.state.load(Ordering::Acquire) & class.mask(); \
                 slot.store(slot.load(Ordering::Relaxed) + 1, Ordering::Relaxed); way.light(); return state;",
        model: "loom_gate_no_access_meets_an_exclusive_turn",
        says: MEETING,
    },
    Mutation {
        name: "gate-leave-relaxed",
        file: GATE,
        within: "fn is_drained(",
        key: "slot.0.load(Ordering::Acquire) == 0",
        broken: "slot.0.load(Ordering::Relaxed) == 0",
        model: "loom_gate_no_access_meets_an_exclusive_turn",
        says: MEETING,
    },
    Mutation {
        name: "gate-quick-ignores-state",
        file: GATE,
        within: "fn enter_quickly_at(",
        key: "closed != 0",
        broken: "false",
        model: "loom_gate_the_quick_way_in_meets_no_exclusive_turn",
        says: MEETING,
    },
    Mutation {
        name: "gate-quick-keeps-its-count",
        file: GATE,
        within: "fn enter_quickly_at(",
        key: "self.refuse(slot, Way::Quick);",
        broken: "",
        model: "loom_gate_the_quick_way_in_meets_no_exclusive_turn",
        says: DEADLOCK,
    },
    Mutation {
        name: "gate-overflow-not-atomic",
        file: GATE,
        within: "fn leave(&self, slot",
        key: "_ = slot.fetch_sub(1, Ordering::Release)",
        broken: "slot.store(slot.load(Ordering::Relaxed) - 1, Ordering::Release)",
        model: "loom_gate_overflow_slot_keeps_the_promise",
        says: "",
    },
    Mutation {
        name: "gate-leave-without-fence",
        file: GATE,
        within: "fn leave(&self, slot",
        key: "way.light();",
        broken: "",
        model: "loom_gate_the_last_leaver_wakes_the_closer",
        says: DEADLOCK,
    },
    Mutation {
        name: "gate-wakes-outside-its-lock",
        file: GATE,
        within: "fn wake_closer(",
        key: "let _turn = lock(&self.turn); self.changed.notify_all();",
        broken: "self.changed.notify_all();",
        model: "loom_gate_the_last_leaver_wakes_the_closer",
        says: DEADLOCK,
    },
    Mutation {
        name: "gate-turn-not-taken",
        file: GATE,
        within: "fn close_as(",
        key: "turn.taken = true;",
        broken: "",
        model: "loom_gate_two_closers_take_turns",
        says: "two exclusive turns at once",
    },
    Mutation {
        name: "gate-turn-ends-in-silence",
        file: GATE,
        within: "fn end_turn(",
        key: "self.changed.notify_all();",
        broken: "",
        model: "loom_gate_a_waiting_access_gets_in_when_the_turn_ends",
        says: DEADLOCK,
    },
    Mutation {
        name: "gate-standing-forgotten",
        file: GATE,
        within: "pub fn release(self",
        key: "(state & !(EVERYTHING | MEMORY)) | standing.raw()",
        broken: "state & !(EVERYTHING | MEMORY)",
        model: "loom_gate_disabled_memory_is_never_reached",
        says: "",
    },
    // The dirty log: what was written before a mark is sent by the drain that takes the mark, or by the next.
    Mutation {
        name: "dirty-second-look-without-fence",
        file: DIRTY_LOG,
        within: "fn or(word",
        key: "fence(Ordering::SeqCst);",
        broken: "",
        model: "loom_marks_against_a_drain_that_never_looks_first_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-drain-without-fence",
        file: DIRTY_LOG,
        within: "pub fn drain(",
        key: "fence(Ordering::SeqCst);",
        broken: "",
        model: "loom_marks_against_a_drain_that_never_looks_first_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-drain-skips-one-bit",
        file: DIRTY_LOG,
        within: "fn take(word",
        key: "word.load(Ordering::Relaxed) == 0",
        broken: "word.load(Ordering::Relaxed) <= 1",
        model: "loom_marks_against_a_drain_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-mark-relaxed",
        file: DIRTY_LOG,
        within: "fn or(word",
        key: "word.fetch_or(bits, Ordering::Release);",
        broken: "word.fetch_or(bits, Ordering::Relaxed);",
        model: "loom_two_markers_of_one_word_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-drain-clears-what-it-did-not-see",
        file: DIRTY_LOG,
        within: "fn take(word",
        key: "word.swap(0, Ordering::AcqRel)",
        broken: "let taken = word.load(Ordering::Acquire); word.store(0, Ordering::Relaxed); taken",
        model: "loom_two_markers_of_one_word_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-restore-covers-marks",
        file: DIRTY_LOG,
        within: "fn restore(",
        key: "word.fetch_or(*bits, Ordering::Release);",
        broken: "word.store(*bits, Ordering::Release);",
        model: "loom_marks_against_a_restore_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-mark-not-atomic",
        file: DIRTY_LOG,
        within: "fn or(word",
        key: "word.fetch_or(bits, Ordering::Release);",
        broken: "word.store(word.load(Ordering::Relaxed) | bits, Ordering::Release);",
        model: "loom_two_markers_of_one_word_lose_no_write",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-start-stores",
        file: DIRTY_LOG,
        within: "pub fn start(",
        key: "word.swap(self.valid(index), Ordering::AcqRel);",
        broken: "word.store(self.valid(index), Ordering::Release);",
        model: "loom_a_write_while_tracking_starts_is_not_lost",
        says: LOST_WRITE,
    },
    Mutation {
        name: "dirty-stopped-without-fence",
        file: DIRTY_LOG,
        within: "fn keeps_marks(",
        key: "fence(Ordering::SeqCst);",
        broken: "",
        model: "loom_a_write_while_tracking_starts_is_not_lost",
        says: LOST_WRITE,
    },
    // The roster: published in one step, counted in one step, retired once and last.
    Mutation {
        name: "roster-published-in-two-steps",
        file: ROSTER,
        within: "pub fn publish(",
        key: "seat.member = Some(member.clone()); seat.life = if closed { Life::Retiring } else { Life::Published };",
        broken: "seat.life = if closed { Life::Retiring } else { Life::Published }; drop(inner); inner = self.lock(); \
                 inner.seat(id).into_iter().for_each(|seat| seat.member = Some(member.clone()));",
        model: "loom_an_open_during_registration_sees_all_or_nothing",
        says: "visible and not there",
    },
    Mutation {
        name: "roster-retires-while-held",
        file: ROSTER,
        within: "fn retire_if_last(",
        key: "self.life != Life::Draining || !self.held.is_empty()",
        broken: "self.life != Life::Draining",
        model: "loom_the_last_of_closers_and_unregistration_retires_once_and_nothing_runs_afterwards",
        says: "",
    },
    Mutation {
        name: "roster-nobody-retires-last",
        file: ROSTER,
        within: "fn give_back(",
        key: "self.retire(id, last);",
        broken: "",
        model: "loom_the_last_of_closers_and_unregistration_retires_once_and_nothing_runs_afterwards",
        says: DEADLOCK,
    },
    Mutation {
        name: "roster-gives-away-what-is-withdrawn",
        file: ROSTER,
        within: "pub fn seat(&self",
        key: "seat.life == Life::Published",
        broken: "true",
        model: "loom_the_last_of_closers_and_unregistration_retires_once_and_nothing_runs_afterwards",
        says: "given away after its withdrawal",
    },
    Mutation {
        name: "roster-looks-then-takes",
        file: ROSTER,
        within: "pub fn seat(&self",
        key: "let number = self.number; seat.held.iter_mut().filter(|held| held.number == number)\
              .for_each(|held| held.seated = true);",
        broken: "drop(inner); let mut inner = self.roster.lock(); let seats = inner.seat(self.id).into_iter(); \
                 seats.flat_map(|seat| &mut seat.held).filter(|held| held.number == self.number)\
                 .for_each(|held| held.seated = true);",
        model: "loom_the_limit_holds_however_opens_race",
        says: "two devices under a limit of one",
    },
    Mutation {
        name: "roster-never-refunds",
        file: ROSTER,
        within: "fn give_back(",
        key: "held.number != number",
        broken: "held.number != number || held.seated",
        model: "loom_the_limit_holds_however_opens_race",
        says: "",
    },
    Mutation {
        name: "roster-forgets-who-registers",
        file: ROSTER,
        within: "pub fn wait_empty(",
        key: "inner.seats.is_empty()",
        broken: "inner.seats.iter().all(|seat| seat.life == Life::Registering)",
        model: "loom_shutting_down_waits_for_a_registration_that_had_begun",
        says: "roster.list().is_empty()",
    },
    // KVM references: a VM that has ended is never held again, a file is added once and deleted once, and before its file is closed.
    Mutation {
        name: "kvm-holds-what-has-ended",
        file: REFERENCES,
        within: "pub fn try_hold(",
        key: "holders == 0",
        broken: "false",
        model: "loom_kvm_vm_exit_against_open_takes_all_or_nothing",
        says: "a held VM has not ended",
    },
    Mutation {
        name: "kvm-close-does-not-wait-for-the-end",
        file: REFERENCES,
        within: "fn leave(&self",
        key: "return self.wait_ended(table);",
        broken: "return;",
        model: "loom_kvm_vm_exit_against_open_takes_all_or_nothing",
        says: "closed, and KVM still has the file",
    },
    Mutation {
        name: "kvm-end-in-silence",
        file: REFERENCES,
        within: "fn end(&self",
        key: "self.changed.notify_all();",
        broken: "",
        model: "loom_kvm_closes_against_vm_exit_leave_nothing",
        says: DEADLOCK,
    },
    Mutation {
        name: "kvm-open-does-not-hold",
        file: REFERENCES,
        within: "pub fn take(self",
        key: "pins.then_some(holder)",
        broken: "{ drop(holder); None }",
        model: "loom_kvm_a_pinned_vm_ends_with_its_last_device",
        says: "an open device's file is not there",
    },
    Mutation {
        name: "kvm-deletes-with-every-close",
        file: REFERENCES,
        within: "fn leave(&self",
        key: "entry.users == 0",
        broken: "true",
        model: "loom_kvm_devices_of_one_file_add_it_once_and_delete_it_last",
        says: "the other device took the file with it",
    },
    Mutation {
        name: "kvm-opens-before-it-is-added",
        file: REFERENCES,
        within: "fn enter(&self",
        key: "entry.life == Life::Added",
        broken: "true",
        model: "loom_kvm_a_second_open_of_a_file_waits_until_the_first_has_added_it",
        says: "opened before KVM knew the file",
    },
    Mutation {
        name: "gate-admits-before-it-has-seen",
        file: GATE,
        within: "fn count(",
        key: "self.state.load(Ordering::Acquire) & class.mask()",
        broken: "self.state.load(Ordering::Relaxed) & class.mask()",
        model: "loom_gate_no_access_before_the_bind_completes",
        says: "an access before the bind",
    },
];
