//! The configuration's promises.

use super::*;

const WHOLE: &str = r#"
memory = "256M"
plugins = ["a.so", { file = "/opt/b.so", devices_max = 4 }]
control_socket = "control.sock"
state_dir = "/var/lib/x"

[[devices]]
device = "vfio:0000:00:10.0"
open = "cdev"
vf_token = "83d8f4f2-509f-382f-3c1e-e6bfe0fa1001"

[[devices]]
device = "sim:edu?dma_mask=0xffffffff"

[migration]
listen = "127.0.0.1:7000"
downtime_ms_max = 100
rounds_max = 5
on_stall = "force"
"#;

fn parse(text: &str) -> Result<Draft, ConfigError> {
    Draft::parse(Path::new("/etc/vm.toml"), text)
}

fn complaint(text: &str) -> String {
    parse(text).and_then(Draft::finish).expect_err(text).to_string()
}

#[test]
fn a_whole_file_becomes_a_whole_configuration() {
    let config = parse(WHOLE).unwrap().finish().unwrap();
    assert_eq!(config.memory.unwrap().bytes(), 256 << 20);
    let plugins: Vec<_> =
        config.plugins.iter().map(|plugin| (plugin.path.to_str().unwrap(), plugin.devices_max)).collect();
    assert_eq!(plugins, [("/etc/a.so", PLUGIN_DEVICES_MAX), ("/opt/b.so", 4)]);
    assert_eq!(config.control_socket, Path::new("/etc/control.sock"));
    assert_eq!(config.devices[0].open, OpenBy::Cdev);
    assert!(config.devices[0].vf_token.is_some());
    assert_eq!(config.devices[1].name, DeviceName::Sim("sim:edu?dma_mask=0xffffffff".to_owned()));
    assert_eq!(config.listen, Some("127.0.0.1:7000".parse().unwrap()));
    assert_eq!(config.limits.rounds_max, Some(5));
    assert_eq!(config.limits.on_stall, Some(OnStall::Force));
    assert_eq!(config.limits.pause_ms_max, None);
}

#[test]
fn the_operators_page_has_a_file_that_works_once_its_comments_are_switched_on() {
    let page = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/operator.md");
    let page = std::fs::read_to_string(page).unwrap();
    let example = page.split("```toml").nth(1).unwrap().split("```").next().unwrap();
    let config = parse(example).unwrap().finish().unwrap();
    assert_eq!(config.limits.downtime_ms_max, Some(300));
    // The key list in the last comment is no line of a file.
    let all: Vec<&str> = example.lines().filter(|line| !line.contains(": deadlines")).collect();
    let all = all.join("\n").replace("\n# ", "\n");
    let config = parse(&all).unwrap().finish().unwrap();
    assert!(config.insecure && config.listen.is_some() && config.devices[0].vf_token.is_some());
}

/// spec: CONTROL-4
#[test]
fn every_error_names_file_line_and_key() {
    for (text, place, word) in [
        ("memory = \"256M\"\nmemroy = \"1G\"", "/etc/vm.toml:2: memroy: ", "unknown field"),
        ("memory = \"256 M\"", "/etc/vm.toml:1: memory: ", "256M"),
        ("memory = 256", "/etc/vm.toml:1: memory: ", "string"),
        ("memory = \"4097\"", "/etc/vm.toml:1: memory: ", "4096"),
        ("\n[migration]\nrounds_max = 0", "/etc/vm.toml:3: migration.rounds_max: ", "1 to 10000"),
        ("[migration]\ndowntime_ms_max = \"1\"", "/etc/vm.toml:2: migration.downtime_ms_max: ", "whole number"),
        ("[migration]\ndowntime_ms_max = -1", "/etc/vm.toml:2: migration.downtime_ms_max: ", "whole number"),
        ("[migration]\non_stall = \"wait\"", "/etc/vm.toml:2: migration.on_stall: ", "cancel"),
        ("[migration]\nlisten = \"7000\"", "/etc/vm.toml:2: migration.listen: ", "HOST:PORT"),
        ("[[devices]]\ndevice = \"edu\"", "/etc/vm.toml:2: devices.device: ", "vfio:0000:00:10.0"),
        ("[[devices]]\ndevice = \"sim:edu\"\nopne = \"group\"", "/etc/vm.toml:3: devices.opne: ", "unknown field"),
        ("[[devices]]\nopen = \"group\"", "/etc/vm.toml:1: devices: ", "missing field `device`"),
        ("[[devices]]\ndevice = \"sim:edu\"\nopen = \"group\"", "/etc/vm.toml:1: devices: ", "simulated"),
        ("plugins = [\n  \"a.so\",\n  7,\n]", "/etc/vm.toml:3: plugins: ", "string"),
        ("plugins = [{ file = \"a.so\", devices = 1 }]", "/etc/vm.toml:1: plugins", "unknown field"),
        ("plugins = [{ devices_max = 1 }]", "/etc/vm.toml:1: plugins", "missing field `file`"),
        ("plugins = [{ file = \"a.so\", devices_max = 257 }]", "/etc/vm.toml:1: plugins", "1 to 256"),
        ("memory = ", "/etc/vm.toml:1: memory: ", ""),
        ("=", "/etc/vm.toml:1: the file: ", ""),
    ] {
        let complaint = complaint(text);
        assert!(complaint.starts_with(place), "{text:?}: {complaint}");
        assert!(complaint.contains(word), "{text:?}: {complaint}");
        assert!(!complaint.contains('\n'), "{text:?}: {complaint}");
    }
}

/// spec: REG-21
#[test]
fn limits_end_where_they_say() {
    for (key, max) in [("downtime_ms_max", MS_MAX), ("record_ms_max", MS_MAX), ("rounds_max", u64::from(ROUNDS_MAX))] {
        for (value, fits) in [(0, false), (1, true), (max - 1, true), (max, true), (max + 1, false)] {
            let text = format!("[migration]\n{key} = {value}");
            assert_eq!(parse(&text).is_ok(), fits, "{text}");
        }
    }
    let max = PLUGIN_DEVICES_MAX;
    for (value, fits) in [(0, false), (1, true), (max - 1, true), (max, true), (max + 1, false)] {
        let text = format!("plugins = [{{ file = \"a.so\", devices_max = {value} }}]");
        assert_eq!(parse(&text).is_ok(), fits, "{text}");
    }
}

#[test]
fn a_bandwidth_is_a_size_a_second_with_a_least_one() {
    for (text, fits) in
        [("65535", false), ("65536", true), ("65537", true), ("64K", true), ("63K", false), ("1G", true), ("0", false)]
    {
        let file = format!("[migration]\nbandwidth_max = \"{text}\"");
        assert_eq!(parse(&file).is_ok(), fits, "{file}");
    }
    assert_eq!(
        complaint("[migration]\nbandwidth_max = \"1K\""),
        "/etc/vm.toml:2: migration.bandwidth_max: 1K a second is less than 64K"
    );
}

/// spec: CONTROL-5
#[test]
fn memory_is_a_positive_multiple_of_the_page_size_within_the_hosts_limit() {
    for (bytes, fits) in [
        (0, false),
        (PAGE_SIZE - 1, false),
        (PAGE_SIZE, true),
        (PAGE_SIZE + 1, false),
        (RAM_SIZE_MAX - PAGE_SIZE, true),
        (RAM_SIZE_MAX, true),
        (RAM_SIZE_MAX + PAGE_SIZE, false),
    ] {
        assert_eq!(MemorySize::new(ByteSize(bytes)).is_ok(), fits, "{bytes}");
    }
}

/// spec: CONTROL-6
#[test]
fn nothing_that_matters_has_a_default() {
    let device = "[[devices]]\ndevice = \"sim:edu\"\n";
    assert!(complaint("memory = \"1M\"").starts_with("devices: no device"));
    assert!(complaint(device).starts_with("memory: no size"));
    let config = parse(&format!("memory = \"1M\"\n{device}")).unwrap().finish().unwrap();
    assert_eq!((config.listen, config.insecure), (None, false));
}

#[test]
fn listening_beyond_loopback_is_refused_unless_allowed() {
    let text = "memory = \"1M\"\n[[devices]]\ndevice = \"sim:edu\"\n[migration]\nlisten = \"0.0.0.0:7000\"\n";
    assert!(complaint(text).contains("--insecure"));
    let config = parse(&format!("{text}insecure = true")).unwrap().finish().unwrap();
    assert!(config.insecure && config.listen.is_some());
}

#[test]
fn a_real_device_is_listed_once_and_simulated_ones_as_often_as_wanted() {
    let twice =
        |name: &str| format!("memory = \"1M\"\n[[devices]]\ndevice = \"{name}\"\n[[devices]]\ndevice = \"{name}\"");
    let complaint = complaint(&twice("vfio:0000:00:10.0"));
    assert_eq!(complaint, "/etc/vm.toml:4: devices: vfio:0000:00:10.0 is listed twice");
    assert!(parse(&twice("sim:edu")).unwrap().finish().is_ok());
}

#[test]
fn device_names_are_addresses_uuids_and_models() {
    for good in [
        "vfio:0000:00:10.0",
        "vfio:0000:FF:1f.7",
        "vfio:10000:00:00.0",
        "vfio:83d8f4f2-509f-382f-3c1e-e6bfe0fa1001",
        "sim:edu",
    ] {
        assert!(good.parse::<DeviceName>().is_ok(), "{good}");
    }
    for bad in [
        "",
        "vfio:",
        "sim:",
        "edu",
        "0000:00:10.0",
        "vfio:00:10.0",
        "vfio:0000:00:20.0",
        "vfio:0000:00:10.8",
        "vfio:0000:00:10",
        "vfio:0000:00:10.0 ",
        "vfio:../x",
        "vfio:0000:0:10.0",
        "vfio:0000:000:10.0",
        "vfio:000:00:10.0",
        "sim:a b",
        "vfio:83d8f4f2-509f-382f-3c1e-e6bfe0fa100",
        "vfio:83d8f4f2-509f-382f-3c1e-e6bfe0fa10011",
    ] {
        assert!(bad.parse::<DeviceName>().is_err(), "{bad}");
    }
    assert_eq!("vfio:0000:FF:1F.7".parse::<DeviceName>().unwrap().to_string(), "vfio:0000:ff:1f.7");
}

#[test]
fn a_socket_path_is_as_long_as_the_kernel_takes() {
    for (length, fits) in [(106, true), (107, true), (108, false)] {
        let path = PathBuf::from(format!("/{}", "s".repeat(length - 1)));
        assert_eq!(check_socket_path(&path).is_ok(), fits, "{length}");
    }
    assert!(check_socket_path(Path::new("/")).is_err());
}

#[test]
fn a_missing_and_an_endless_file_are_named() {
    let missing = Draft::read(Path::new("/nonexistent/vm.toml")).unwrap_err().to_string();
    assert!(missing.starts_with("/nonexistent/vm.toml: "), "{missing}");
    let endless = Draft::read(Path::new("/dev/zero")).unwrap_err();
    assert!(matches!(endless, ConfigError::TooLarge { .. }), "{endless}");
}

/// spec: VFU-93
#[test]
fn served_devices_have_a_socket_each_and_bring_no_memory() {
    let config = parse("[[devices]]\ndevice = \"sim:edu\"\nsocket = \"edu.sock\"\nshare_device_fd = true").unwrap();
    let config = config.finish().unwrap();
    assert_eq!(config.memory, None);
    let serve = config.devices[0].serve.as_ref().unwrap();
    assert_eq!(serve.at, ServeAt::Path("/etc/edu.sock".into()));
    assert!(serve.share_device_fd);
    let inherited = parse("[[devices]]\ndevice = \"sim:edu\"\nsocket = \"fd:3\"").unwrap().finish().unwrap();
    assert_eq!(inherited.devices[0].serve.as_ref().unwrap().at, ServeAt::Inherited(3));

    let device = |more: &str| format!("[[devices]]\ndevice = \"sim:edu\"\n{more}\n");
    let served = device("socket = \"a.sock\"");
    for (text, word) in [
        (format!("memory = \"4M\"\n{served}"), "memory: "),
        (format!("{served}{}", device("")), "socket: sim:edu has none"),
        (format!("{served}{served}"), "given twice"),
        (format!("{served}[migration]\nlisten = \"127.0.0.1:7000\""), "listen: "),
        (device("socket = \"fd:1\""), "fd:3"),
        (device("socket = \"\""), "a path, or fd:N"),
        (device(&format!("socket = \"{}\"", "x".repeat(200))), "at most 107"),
        (device("share_device_fd = true"), "has no socket"),
        (device("posted_writes = true"), "has no socket"),
        (device("socket = \"a.sock\"\nposted_writes = false"), "share_device_fd"),
        (device("socket = \"a.sock\"\nposted_writes = true\nshare_device_fd = true"), "choose one"),
    ] {
        assert!(complaint(&text).contains(word), "{text}: {}", complaint(&text));
    }
}
