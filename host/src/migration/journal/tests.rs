use super::*;

const ID: MigrationId = MigrationId([3; 16]);
const DIGEST: Digest = Digest([5; 16]);

fn id(number: u8) -> MigrationId {
    MigrationId([number; 16])
}

/// Both kinds of store; the directory lives as long as the test needs it.
fn stores() -> (tempfile::TempDir, Vec<Box<dyn Store>>) {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let files = FileStore::new(directory.path().join("state")).expect("a state directory");
    (directory, vec![Box::new(MemoryStore::default()), Box::new(files)])
}

/// A journal with these marks, closed again.
fn write(store: &dyn Store, id: MigrationId, role: Role, marks: &[Mark]) {
    let mut journal = Journal::begin(store, id, role, "there").expect("a fresh id");
    for mark in marks {
        journal.append(*mark).expect("marks in order");
    }
}

/// spec: JOURNAL-1
#[test]
fn marks_are_there_after_reopening() {
    let (_directory, stores) = stores();
    for store in &stores {
        write(store.as_ref(), ID, Role::Source, &[Mark::Committing { digest: DIGEST }]);
        let journal = Journal::open(store.as_ref(), ID).expect("it opens").expect("it is there");
        let due = Story {
            id: ID,
            role: Role::Source,
            ordinal: 1,
            peer: "there".into(),
            last: Mark::Committing { digest: DIGEST },
            by_operator: false,
        };
        assert_eq!(*journal.story(), due);
        assert!(Journal::open(store.as_ref(), id(9)).expect("no such journal is no error").is_none());
    }
}

/// spec: JOURNAL-2
#[test]
fn an_id_is_used_once_and_an_open_journal_is_locked() {
    let (_directory, stores) = stores();
    for store in &stores {
        let journal = Journal::begin(store.as_ref(), ID, Role::Destination, "").expect("a fresh id");
        let held = Journal::open(store.as_ref(), ID);
        assert!(matches!(held, Err(JournalError::InUse { .. })), "{held:?}");
        let again = Journal::begin(store.as_ref(), ID, Role::Destination, "");
        assert!(matches!(again, Err(JournalError::InUse { .. })), "{again:?}");
        drop(journal);
        assert!(Journal::open(store.as_ref(), ID).expect("it opens").is_some());
    }
}

/// spec: JOURNAL-3
#[test]
fn a_torn_tail_is_dropped_and_other_damage_is_a_doubt() {
    let store = MemoryStore::default();
    write(&store, ID, Role::Source, &[Mark::Committing { digest: DIGEST }]);
    let whole = store.peek(&ID.to_string()).expect("it is there");
    let began = whole.len() - (8 + 2 + 16);
    for length in 0..whole.len() {
        store.overwrite(&ID.to_string(), whole[..length].to_vec());
        let standing = recover(&store).expect("memory is read");
        let due = if length < began { Standing::Idle } else { Standing::MayRun };
        assert_eq!(standing, due, "{length} of {} bytes", whole.len());
    }
    for bit in 0..whole.len() * 8 {
        let mut damaged = whole.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        store.overwrite(&ID.to_string(), damaged);
        let standing = recover(&store).expect("memory is read");
        assert!(matches!(standing, Standing::InDoubt { .. }), "bit {bit}: {standing:?}");
    }
}

/// spec: JOURNAL-4
#[test]
fn a_failed_append_is_made_good_by_the_next() {
    for fault in [StorageFault::Nothing, StorageFault::Torn, StorageFault::Whole] {
        let store = MemoryStore::default();
        let mut journal = Journal::begin(&store, ID, Role::Source, "").expect("a fresh id");
        store.plan(vec![Some(fault)]);
        journal.append(Mark::Committing { digest: DIGEST }).expect_err("the injected fault");
        journal.append(Mark::Kept).expect("the disk works again");
        drop(journal);
        assert_eq!(recover(&store).expect("memory is read"), Standing::MayRun, "{fault:?}");
        let journal = Journal::open(&store, ID).expect("it opens").expect("it is there");
        assert_eq!(journal.story().last, Mark::Kept);
    }
}

/// spec: JOURNAL-5
#[test]
fn marks_come_in_order_only() {
    let all = [
        Mark::Committing { digest: DIGEST },
        Mark::Kept,
        Mark::Moved,
        Mark::Prepared { digest: DIGEST },
        Mark::Owned,
        Mark::Discarded,
    ];
    for role in [Role::Source, Role::Destination] {
        let first = if role == Role::Source { &all[..2] } else { &[all[3], all[5]][..] };
        for mark in all {
            let store = MemoryStore::default();
            let mut journal = Journal::begin(&store, ID, role, "").expect("a fresh id");
            assert_eq!(journal.append(mark).is_ok(), first.contains(&mark), "{role}: {mark:?}");
        }
    }
    let store = MemoryStore::default();
    write(&store, ID, Role::Source, &[Mark::Committing { digest: DIGEST }, Mark::Moved]);
    let mut journal = Journal::open(&store, ID).expect("it opens").expect("it is there");
    journal.append(Mark::Kept).expect_err("a guest that moved does not come back");
}

/// spec: JOURNAL-6
#[test]
fn a_restarted_host_knows_what_it_may_do() {
    use Role::{Destination, Source};
    let digest = DIGEST;
    type Past = Vec<(Role, Vec<Mark>)>;
    let cases: Vec<(Past, Standing)> = vec![
        (vec![], Standing::Idle),
        (vec![(Source, vec![])], Standing::MayRun),
        (vec![(Source, vec![Mark::Kept])], Standing::MayRun),
        (vec![(Source, vec![Mark::Committing { digest }, Mark::Moved])], Standing::MustNotRun),
        (vec![(Source, vec![Mark::Committing { digest }, Mark::Kept])], Standing::MayRun),
        (vec![(Destination, vec![])], Standing::MustNotRun),
        (vec![(Destination, vec![Mark::Prepared { digest }])], Standing::MustNotRun),
        (vec![(Destination, vec![Mark::Discarded])], Standing::MustNotRun),
        (vec![(Destination, vec![Mark::Prepared { digest }, Mark::Owned])], Standing::MayRun),
        // There and back again: the later migration knows more.
        (
            vec![
                (Source, vec![Mark::Committing { digest }, Mark::Moved]),
                (Destination, vec![Mark::Prepared { digest }, Mark::Owned]),
            ],
            Standing::MayRun,
        ),
        (
            vec![
                (Destination, vec![Mark::Prepared { digest }, Mark::Owned]),
                (Source, vec![Mark::Committing { digest }, Mark::Moved]),
                (Destination, vec![Mark::Discarded]),
            ],
            Standing::MustNotRun,
        ),
    ];
    for (past, due) in cases {
        let store = MemoryStore::default();
        for (number, (role, marks)) in past.iter().enumerate() {
            // Names sort against time, so that only ordinals can tell.
            write(&store, id(100 - number as u8), *role, marks);
        }
        assert_eq!(recover(&store).expect("memory is read"), due, "{past:?}");
    }
    let store = MemoryStore::default();
    write(&store, ID, Source, &[Mark::Committing { digest }]);
    match recover(&store).expect("memory is read") {
        Standing::InDoubt { id, peer, .. } => assert_eq!((id, peer.as_str()), (ID, "there")),
        other => panic!("{other:?}"),
    }
}

/// spec: JOURNAL-7
#[test]
fn only_a_doubt_can_be_resolved() {
    let digest = DIGEST;
    let committing = Mark::Committing { digest };
    let prepared = Mark::Prepared { digest };
    let cases = [
        (Role::Source, vec![committing], Resolution::RunHere, Some(Mark::Kept)),
        (Role::Source, vec![committing], Resolution::RunThere, Some(Mark::Moved)),
        (Role::Destination, vec![prepared], Resolution::RunHere, Some(Mark::Owned)),
        (Role::Destination, vec![prepared], Resolution::RunThere, Some(Mark::Discarded)),
        (Role::Source, vec![], Resolution::RunHere, None),
        (Role::Source, vec![committing, Mark::Moved], Resolution::RunHere, None),
        (Role::Destination, vec![prepared, Mark::Owned], Resolution::RunThere, None),
        (Role::Destination, vec![Mark::Discarded], Resolution::RunHere, None),
    ];
    for (role, marks, resolution, due) in cases {
        let store = MemoryStore::default();
        write(&store, ID, role, &marks);
        let mut journal = Journal::open(&store, ID).expect("it opens").expect("it is there");
        assert_eq!(journal.resolve(resolution).ok(), due, "{role} {marks:?} {resolution:?}");
        assert_eq!(journal.story().by_operator, due.is_some());
        drop(journal);
        let standing = recover(&store).expect("memory is read");
        assert!(!matches!(standing, Standing::InDoubt { .. }), "{standing:?}");
    }
}

#[test]
fn files_that_are_no_journals_are_left_alone() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    std::fs::write(directory.path().join("notes.txt"), "mine").expect("a file");
    let store = FileStore::new(directory.path()).expect("a state directory");
    assert_eq!(recover(&store).expect("it is read"), Standing::Idle);
}
