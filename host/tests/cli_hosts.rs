//! Host processes, and the commands that talk to them.

#[allow(dead_code)]
mod cli_support;

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;

use cli_support::{Host, command, plugin, run};
use rustix::process::{Pid, Signal, kill_process};
use vfio_mediate::migration::cause::Role;
use vfio_mediate::migration::journal::{FileStore, Journal, Mark};
use vfio_mediate::migration::wire::{Digest, MigrationId};

const SLOW_MACHINE: [&str; 2] = ["--downtime-ms-max", "60000"];

fn edu(plugin: &Path) -> Vec<String> {
    let words = ["--device", "sim:edu", "--plugin", plugin.to_str().unwrap()];
    words.iter().chain(&SLOW_MACHINE).map(|word| (*word).to_owned()).collect()
}

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// spec: CONTROL-52
#[test]
fn two_processes_move_a_device_and_its_memory() {
    let plugin = plugin();
    let machine = edu(&plugin);
    let source = Host::start(&words(&machine));
    let destination = Host::start(&[words(&machine), vec!["--listen", "127.0.0.1:0"]].concat());
    let status = source.ask(&["status", "--json"]);
    assert_eq!((status.code, status.json()["guest"].as_str()), (0, Some("here")), "{status:?}");
    assert_eq!(status.json()["devices"][0]["plugin"]["name"], "edu");

    let moved = source.ask(&["migrate", "--to", &destination.listen(), "--verify"]);
    assert_eq!(moved.code, 0, "{moved:?}");
    assert!(moved.out.contains("downtime") && moved.out.contains("plug-in edu"), "{moved:?}");
    // Which phases are seen depends on how fast they pass.
    let is_progress = |line: &str| line.contains("round ") && line.contains("pages sent");
    assert!(moved.err.lines().any(is_progress), "plain lines where there is no terminal: {moved:?}");
    assert!(!moved.err.contains('\u{1b}'), "{moved:?}");

    let status = source.ask(&["status", "--json"]).json();
    assert_eq!((status["guest"].as_str(), status["last"]["outcome"].as_str()), (Some("elsewhere"), Some("moved")));
    // The destination tells the source before it closes its own books.
    let arrived = || destination.ask(&["status", "--json"]).json();
    let deadline = std::time::Instant::now() + cli_support::PATIENCE;
    while arrived()["last"]["outcome"] != "arrived" {
        assert!(std::time::Instant::now() < deadline, "{}", arrived());
    }
    assert_eq!(arrived()["guest"], "here");
    assert!(destination.ask(&["status"]).out.contains("guest     here"));

    let again = source.ask(&["migrate", "--to", &destination.listen()]);
    assert_eq!(again.code, 6, "{again:?}");

    // Stopped in good order: the socket is gone, the journal says whose guest it is.
    assert_eq!(source.ask(&["stop"]).code, 0);
    let (code, folder) = source.ended();
    assert_eq!(code, 0);
    assert!(!folder.path().join("control.sock").exists());
    let (control, state) = (folder.path().join("c"), folder.path().join("state"));
    let restart = ["run", "--device", "sim:edu", "--memory", "4M", "--control", control.to_str().unwrap()];
    let restart = run(&[&restart[..], &["--state-dir", state.to_str().unwrap()]].concat());
    assert_eq!(restart.code, 6, "{restart:?}");
    assert!(restart.err.contains("elsewhere"), "{restart:?}");
}

/// spec: CONTROL-53
#[test]
fn json_is_one_object_a_line_on_standard_output() {
    let plugin = plugin();
    let machine = edu(&plugin);
    let source = Host::start(&words(&machine));
    let destination = Host::start(&[words(&machine), vec!["--listen", "127.0.0.1:0"]].concat());
    let moved = source.ask(&["migrate", "--to", &destination.listen(), "--json"]);
    assert_eq!((moved.code, moved.err.as_str()), (0, ""), "{moved:?}");
    let lines: Vec<serde_json::Value> = moved.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let (report, progress) = lines.split_last().unwrap();
    assert!(report["report"]["downtime_ms"].is_number(), "{report}");
    assert!(!progress.is_empty() && progress.iter().all(|line| line["progress"].is_object()));
}

#[test]
fn what_the_host_refuses_is_six_and_a_failed_migration_seven() {
    let plugin = plugin();
    let machine = edu(&plugin);
    let source = Host::start(&words(&machine));
    let beyond = source.ask(&["migrate", "--to", "192.0.2.1:7000"]);
    assert!(beyond.code == 6 && beyond.err.contains("--insecure"), "{beyond:?}");
    assert_eq!(source.ask(&["cancel"]).code, 6);
    assert_eq!(source.ask(&["resolve", "--id", &"0".repeat(32), "--run-here"]).code, 6);
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let failed = source.ask(&["migrate", "--to", &nobody.to_string()]);
    assert_eq!(failed.code, 7, "{failed:?}");
    // Another memory size there: refused before anything moves, with the reason.
    let small = Host::start(&[words(&machine), vec!["--listen", "127.0.0.1:0", "--memory", "8M"]].concat());
    let unlike = source.ask(&["migrate", "--to", &small.listen()]);
    assert!(unlike.code == 7 && unlike.err.contains("pages"), "{unlike:?}");
    assert_eq!(source.ask(&["status", "--json"]).json()["guest"], "here");
}

#[test]
fn a_device_that_nobody_can_save_is_refused_with_the_reason() {
    let source = Host::start(&["--device", "sim:edu"]);
    let status = source.ask(&["status"]);
    assert!(status.out.contains("cannot be migrated: "), "{status:?}");
    let destination = Host::start(&["--device", "sim:edu", "--listen", "127.0.0.1:0"]);
    let refused = source.ask(&["migrate", "--to", &destination.listen()]);
    assert!(refused.code == 7 && refused.err.contains("cannot be migrated"), "{refused:?}");
}

/// spec: CONTROL-54
#[test]
fn signals_end_a_host_in_good_order() {
    for signal in [Signal::TERM, Signal::INT] {
        let host = Host::start(&["--device", "sim:edu"]);
        let pid = Pid::from_child(&host.child);
        kill_process(pid, signal).unwrap();
        let (code, folder) = host.ended();
        assert_eq!(code, 0, "{signal:?}");
        assert!(!folder.path().join("control.sock").exists());
    }
}

#[test]
fn a_second_host_on_the_same_socket_or_journal_is_refused() {
    let host = Host::start(&["--device", "sim:edu"]);
    let (socket, state) = (host.socket(), host.folder.path().join("state").display().to_string());
    let other = host.folder.path().join("other").display().to_string();
    let base = ["run", "--device", "sim:edu", "--memory", "4M"];
    for (arguments, word) in [
        ([&base[..], &["--control", &socket, "--state-dir", &other]].concat(), "another host serves"),
        ([&base[..], &["--control", &other, "--state-dir", &state]].concat(), "another host uses it"),
    ] {
        let said = run(&arguments);
        assert!(said.code == 6 && said.err.contains(word), "{said:?}");
    }
    assert_eq!(host.ask(&["status"]).code, 0);
}

#[test]
fn a_killed_host_is_started_again_in_its_place() {
    let mut host = Host::start(&["--device", "sim:edu"]);
    host.child.kill().unwrap();
    assert_eq!(host.child.wait().unwrap().signal(), Some(9));
    let folder = std::mem::replace(&mut host.folder, tempfile::tempdir().unwrap());
    assert!(folder.path().join("control.sock").exists());
    let host = Host::start_in(folder, &["--device", "sim:edu"]);
    assert_eq!(host.ask(&["status"]).code, 0);
}

/// spec: CONTROL-55
#[test]
fn a_doubt_in_the_journal_is_eight_until_an_operator_resolves_it() {
    for (word, code) in [("--run-here", 0), ("--run-there", 6)] {
        let folder = tempfile::tempdir().unwrap();
        let state = folder.path().join("state");
        let id = MigrationId::random().unwrap();
        {
            let store = FileStore::new(&state).unwrap();
            let mut journal = Journal::begin(&store, id, Role::Source, "127.0.0.1:1").unwrap();
            journal.append(Mark::Committing { digest: Digest([1; 16]) }).unwrap();
        }
        let (state, control) = (state.display().to_string(), folder.path().join("c").display().to_string());
        let base = ["run", "--device", "sim:edu", "--memory", "4M", "--control", &control, "--state-dir", &state];
        let said = run(&base);
        assert!(said.code == 8 && said.err.contains(&id.to_string()), "{said:?}");
        let said = run(&["doctor", "--state-dir", &state]);
        assert!(said.code == 4 && said.out.contains("in doubt"), "{said:?}");
        let resolve = |id: &str| run(&["resolve", "--state-dir", &state, "--id", id, word]);
        assert_eq!(resolve(&"0".repeat(32)).code, 6);
        assert_eq!(resolve(&id.to_string()).code, 0);
        assert_eq!(resolve(&id.to_string()).code, 6, "what is decided is not decided again");
        if code == 0 {
            let mut child = command(&base).stdout(std::process::Stdio::piped()).spawn().unwrap();
            let mut line = String::new();
            std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.take().unwrap()), &mut line).unwrap();
            assert!(line.starts_with("ready: "), "{line}");
            assert_eq!(run(&["stop", "--control", &control]).code, 0);
            assert!(child.wait().unwrap().success());
        } else {
            assert_eq!(run(&base).code, code);
        }
    }
}

#[test]
fn resolving_needs_a_folder_that_is_there() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("nothing").display().to_string();
    let said = run(&["resolve", "--state-dir", &state, "--id", &"0".repeat(32), "--run-here"]);
    assert_eq!(said.code, 6, "{said:?}");
    assert!(!fs::exists(&state).unwrap());
}

/// spec: POWER-40
#[test]
fn an_operator_lets_a_device_sleep_and_wakes_it() {
    let host = Host::start(&["--device", "sim:stateful", "--device", "sim:edu?sleep=none", "--device", "sim:edu"]);
    let json = |arguments: &[&str]| host.ask(&[arguments, &["--json"]].concat()).json();
    assert_eq!(json(&["power", "sim:stateful", "status"])["state"], "D0");
    let slept = host.ask(&["power", "sim:stateful", "enter"]);
    assert_eq!((slept.code, slept.out.as_str()), (0, "sim:stateful: low power, until it is left; D3hot, suspended\n"));
    assert!(host.ask(&["status"]).out.contains("low power, until it is left; D3hot, suspended"));
    assert_eq!(json(&["status"])["devices"][0]["power"]["low_power"], true);
    assert_eq!(json(&["status"])["devices"][0]["closed"], "suspended");
    assert_eq!(host.ask(&["power", "0", "enter", "--wakeup"]).code, 6, "a second entry");
    assert_eq!(json(&["power", "sim:stateful", "exit"])["low_power"], false);
    assert_eq!(json(&["power", "2", "enter", "--wakeup"])["wakeup"], true);
    let old = host.ask(&["power", "sim:edu?sleep=none", "enter"]);
    assert_eq!(old.code, 6, "{old:?}");
    assert_eq!(host.ask(&["power", "nothing", "status"]).code, 6);
    assert_eq!(host.ask(&["power", "0", "exit", "--wakeup"]).code, 2);
    assert_eq!(host.ask(&["stop"]).code, 0);
    assert_eq!(host.ended().0, 0);
}
