//! The table against the rules, re-derived by search.

use std::collections::VecDeque;

use super::*;

const COMBINATIONS: [MigrationFlags; 4] = [
    MigrationFlags { p2p: false, pre_copy: false },
    MigrationFlags { p2p: false, pre_copy: true },
    MigrationFlags { p2p: true, pre_copy: false },
    MigrationFlags { p2p: true, pre_copy: true },
];

/// The arcs that `linux/vfio.h` describes one by one, for a device with these options.
fn arcs(flags: MigrationFlags) -> Vec<(DeviceState, DeviceState)> {
    let mut arcs = vec![(Stop, StopCopy), (StopCopy, Stop), (Stop, Resuming), (Resuming, Stop)];
    if flags.p2p {
        arcs.extend([(Running, RunningP2p), (RunningP2p, Running), (RunningP2p, Stop), (Stop, RunningP2p)]);
    } else {
        arcs.extend([(Running, Stop), (Stop, Running)]);
    }
    if flags.pre_copy {
        arcs.extend([(Running, PreCopy), (PreCopy, Running)]);
    }
    match (flags.pre_copy, flags.p2p) {
        (true, true) => arcs.extend([
            (PreCopy, PreCopyP2p),
            (PreCopyP2p, PreCopy),
            (RunningP2p, PreCopyP2p),
            (PreCopyP2p, RunningP2p),
            (PreCopyP2p, StopCopy),
        ]),
        (true, false) => arcs.push((PreCopy, StopCopy)),
        (false, _) => {}
    }
    arcs
}

/// Every shortest path by the rules: no state of the saving group inside, but for PRE_COPY -> PRE_COPY_P2P -> STOP_COPY,
/// which stays in one stream; and nothing from STOP_COPY to PRE_COPY*, which would need a stream of its own.
fn search(from: DeviceState, to: DeviceState, flags: MigrationFlags) -> Vec<Vec<DeviceState>> {
    if from == StopCopy && matches!(to, PreCopy | PreCopyP2p) {
        return Vec::new();
    }
    let mut found: Vec<Vec<DeviceState>> = Vec::new();
    let mut pending = VecDeque::from([vec![from]]);
    while let Some(path) = pending.pop_front() {
        let at = path[path.len() - 1];
        if at == to {
            if found.first().is_none_or(|shortest| shortest.len() == path.len()) {
                found.push(path);
            }
            continue;
        }
        if path.len() > DeviceState::ALL.len() || found.first().is_some_and(|shortest| shortest.len() <= path.len()) {
            continue;
        }
        let one_stream = from == PreCopy && at == PreCopyP2p && to == StopCopy;
        if at != from && at.is_saving() && !one_stream {
            continue;
        }
        for (_, next) in arcs(flags).into_iter().filter(|(start, _)| *start == at) {
            pending.push_back([&path[..], &[next]].concat());
        }
    }
    found.into_iter().map(|path| path[1..].to_vec()).collect()
}

/// spec: STATE-PATH
#[test]
fn every_path_is_the_only_shortest_one_that_the_rules_allow() {
    for flags in COMBINATIONS {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let expected =
                    if flags.supports(from) && flags.supports(to) { search(from, to, flags) } else { Vec::new() };
                let expected = match &expected[..] {
                    // ERROR has no arcs, and no path to itself either.
                    _ if from == Error || to == Error => Err(NoPath { from, to }),
                    [] => Err(NoPath { from, to }),
                    [one] => Ok(one.clone()),
                    several => panic!("{from} -> {to} with {flags:?} is ambiguous: {several:?}"),
                };
                assert_eq!(path(from, to, flags), expected, "{from} -> {to} with {flags:?}");
            }
        }
    }
}

/// spec: STATE-ARC
#[test]
fn every_step_is_an_arc() {
    for flags in COMBINATIONS {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Ok(states) = path(from, to, flags) else { continue };
                let mut at = from;
                for next in states {
                    assert!(arcs(flags).contains(&(at, next)), "{at} -> {next} on {from} -> {to} with {flags:?}");
                    assert_eq!(next_step(at, next, flags), Ok(next), "a step is its own path");
                    at = next;
                }
            }
        }
    }
}

/// The published table, in the order STOP, RUNNING, PRE_COPY, PRE_COPY_P2P, STOP_COPY, RESUMING, RUNNING_P2P.
#[test]
fn the_next_steps_are_the_published_ones() {
    let columns = [Stop, Running, PreCopy, PreCopyP2p, StopCopy, Resuming, RunningP2p];
    let rows = [
        [Stop, RunningP2p, RunningP2p, RunningP2p, StopCopy, Resuming, RunningP2p],
        [RunningP2p, Running, PreCopy, RunningP2p, RunningP2p, RunningP2p, RunningP2p],
        [Running, Running, PreCopy, PreCopyP2p, PreCopyP2p, Running, Running],
        [RunningP2p, RunningP2p, PreCopy, PreCopyP2p, StopCopy, RunningP2p, RunningP2p],
        [Stop, Stop, Error, Error, StopCopy, Stop, Stop],
        [Stop, Stop, Stop, Stop, Stop, Resuming, Stop],
        [Stop, Running, Running, PreCopyP2p, Stop, Stop, RunningP2p],
    ];
    for (from, row) in columns.into_iter().zip(rows) {
        for (to, next) in columns.into_iter().zip(row) {
            assert_eq!(full_step(from, to), next, "{from} -> {to}");
        }
    }
}

#[test]
fn numbers_that_name_nothing_are_no_states_and_no_flags() {
    for state in DeviceState::ALL {
        assert_eq!(DeviceState::from_raw(state.raw()), Some(state));
    }
    assert_eq!(DeviceState::from_raw(8), None);
    assert_eq!(DeviceState::from_raw(u32::MAX), None);
    for flags in COMBINATIONS {
        assert_eq!(MigrationFlags::from_raw(flags.raw()), Some(flags));
    }
    assert_eq!(MigrationFlags::from_raw(0), None);
    assert_eq!(MigrationFlags::from_raw(abi::MIGRATION_P2P), None);
    assert_eq!(MigrationFlags::from_raw(abi::MIGRATION_STOP_COPY | 1 << 3), None);
}
