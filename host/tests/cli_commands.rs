//! The binary's commands that need no host: help, exit codes, configuration, plug-in files, devices, doctor.

#[allow(dead_code)]
mod cli_support;

use std::fs;

use cli_support::{plugin, run};

/// spec: CONTROL-50
#[test]
fn help_lists_the_commands_and_every_exit_code() {
    let said = run(&["--help"]);
    assert_eq!(said.code, 0);
    let commands: Vec<&str> = said
        .out
        .lines()
        .skip_while(|line| *line != "Commands:")
        .skip(1)
        .take_while(|line| !line.is_empty())
        .map(|line| line.split_whitespace().next().unwrap())
        .collect();
    assert_eq!(
        commands,
        ["run", "plugin", "device", "migrate", "status", "cancel", "resolve", "power", "stop", "doctor", "help"]
    );
    for code in 0..=8 {
        assert!(said.out.contains(&format!("\n  {code}  ")), "{}", said.out);
    }
}

/// spec: CONTROL-50
#[test]
fn help_has_examples_wherever_there_are_arguments() {
    for command in [
        &["run"][..],
        &["plugin", "info"],
        &["plugin", "check"],
        &["device", "inspect"],
        &["migrate"],
        &["resolve"],
        &["power"],
        &["doctor"],
    ] {
        let said = run(&[command, &["--help"]].concat());
        assert_eq!(said.code, 0);
        assert!(said.out.contains("Example"), "{command:?}: {}", said.out);
        assert!(
            said.out.lines().any(|line| line.trim_start().starts_with(&format!("vfio-mediate {}", command.join(" "))))
        );
    }
}

#[test]
fn a_wrong_command_line_is_two() {
    for arguments in [
        &[][..],
        &["fly"],
        &["run", "--memory", "256 M"],
        &["run", "--device", "edu"],
        &["run", "--downtime-ms-max", "0"],
        &["migrate"],
        &["resolve", "--id", "0"],
        &["resolve", "--id", "0", "--run-here", "--run-there"],
        &["resolve", "--id", "0", "--run-here"],
        &["plugin", "check"],
    ] {
        let said = run(arguments);
        assert_eq!(said.code, 2, "{arguments:?}: {said:?}");
        assert!(!said.err.is_empty());
    }
}

#[test]
fn a_wrong_configuration_is_three_and_names_its_line() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("vm.toml");
    let path = file.display().to_string();
    for (text, place) in [
        ("memory = \"256M\"\n\nmemroy = \"1G\"\n", ":3: memroy: "),
        ("[migration]\nrounds_max = 0\n", ":2: migration.rounds_max: "),
        ("[[devices]]\ndevice = \"sim\"\n", ":2: devices.device: "),
    ] {
        fs::write(&file, text).unwrap();
        let said = run(&["run", "--config", &path]);
        assert_eq!(said.code, 3, "{said:?}");
        assert!(said.err.starts_with(&format!("vfio-mediate: {path}{place}")), "{said:?}");
        assert_eq!(said.err.lines().count(), 1, "{said:?}");
        let said = run(&["--json", "doctor", "--config", &path]);
        assert_eq!((said.code, said.json()["error"]["exit"].as_u64()), (3, Some(3)), "{said:?}");
    }
    let said = run(&["run", "--config", "/nonexistent/vm.toml"]);
    assert_eq!(said.code, 3, "{said:?}");
    // Nothing in the file and no flag said it.
    fs::write(&file, "[[devices]]\ndevice = \"sim:edu\"\n").unwrap();
    let said = run(&["run", "--config", &path]);
    assert!(said.code == 3 && said.err.contains("--memory 256M"), "{said:?}");
    let said = run(&["run", "--config", &path, "--memory", "1M", "--listen", "0.0.0.0:0"]);
    assert!(said.code == 3 && said.err.contains("--insecure"), "{said:?}");
}

/// spec: CONTROL-51
#[test]
fn files_that_are_no_plugins_are_four_each_with_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let (text, empty, cut) =
        (folder.path().join("text.so"), folder.path().join("empty.so"), folder.path().join("cut.so"));
    let good = plugin();
    let bytes = fs::read(&good).unwrap();
    fs::write(&text, "no plug-in").unwrap();
    fs::write(&empty, "").unwrap();
    fs::write(&cut, &bytes[..bytes.len() / 2]).unwrap();
    let missing = folder.path().join("missing.so");
    for file in [&text, &empty, &cut, &missing] {
        for command in ["check", "info"] {
            let said = run(&["plugin", command, file.to_str().unwrap()]);
            assert_eq!(said.code, 4, "{file:?}: {said:?}");
            let told = format!("{}{}", said.out, said.err);
            assert_eq!(told.lines().count(), 1, "{told}");
            assert!(told.contains(file.to_str().unwrap()), "{told}");
        }
    }
    let good = good.to_str().unwrap();
    let said = run(&["plugin", "check", good]);
    assert!(said.code == 0 && said.out.starts_with("ok "), "{said:?}");
    // One bad file among good ones is enough.
    assert_eq!(run(&["plugin", "check", good, text.to_str().unwrap(), good]).code, 4);
    let said = run(&["plugin", "info", good, "--json"]);
    assert_eq!(said.json()["name"], "edu");
    assert_eq!(said.json()["devices"][0], "1234:11e8");
}

#[test]
fn a_device_is_shown_and_one_that_does_not_open_is_four() {
    let plugin = plugin();
    let said = run(&["device", "inspect", "sim:edu", "--plugin", plugin.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
    for word in ["1234:11e8", "BAR 0: 0x100000 bytes", "plug-in   edu", "migration possible"] {
        assert!(said.out.contains(word), "{word}: {}", said.out);
    }
    let said = run(&["device", "inspect", "sim:edu", "--json"]);
    assert_eq!((said.code, said.json()["migration"]["possible"].as_bool()), (0, Some(false)), "{said:?}");
    for absent in ["sim:nothing", "sim:edu?colour=red", "vfio:ffff:ff:1f.7"] {
        let said = run(&["device", "inspect", absent]);
        assert_eq!(said.code, 4, "{absent}: {said:?}");
    }
}

#[test]
fn doctor_says_what_to_do_and_fails_for_what_was_asked() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("state").display().to_string();
    let said = run(&["doctor", "--device", "vfio:ffff:ff:1f.7", "--state-dir", &state]);
    assert_eq!(said.code, 4, "{said:?}");
    assert!(said.out.contains("FAIL"), "{said:?}");
    let said = run(&["doctor", "--device", "vfio:ffff:ff:1f.7", "--state-dir", &state, "--json"]);
    assert_eq!((said.code, said.json()["worst"].as_str()), (4, Some("fail")), "{said:?}");
    let said = run(&["doctor", "--device", "sim:edu", "--memory", "3", "--state-dir", &state]);
    assert_eq!(said.code, 3, "{said:?}");
}

#[test]
fn without_a_host_every_command_is_five_and_says_how_to_start_one() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("control.sock").display().to_string();
    let id = "0".repeat(32);
    for arguments in [
        &["status"][..],
        &["cancel"],
        &["stop"],
        &["migrate", "--to", "127.0.0.1:7000"],
        &["resolve", "--id", &id, "--run-here"],
    ] {
        let said = run(&[arguments, &["--control", &socket]].concat());
        assert_eq!(said.code, 5, "{arguments:?}: {said:?}");
        assert!(said.err.contains("vfio-mediate run"), "{said:?}");
        let said = run(&[arguments, &["--control", &socket, "--json"]].concat());
        assert_eq!((said.code, said.json()["error"]["exit"].as_u64()), (5, Some(5)), "{said:?}");
        assert!(said.err.is_empty(), "{said:?}");
    }
    // A host that was killed leaves its socket.
    drop(std::os::unix::net::UnixListener::bind(&socket).unwrap());
    assert_eq!(run(&["status", "--control", &socket]).code, 5);
}

#[test]
fn a_reader_that_leaves_early_is_no_failure() {
    let mut child = cli_support::command(&["doctor"]).stdout(std::process::Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    assert!(matches!(child.wait().unwrap().code(), Some(0 | 4)));
}
