//! The configuration file's grammar.
//!
//! Every value is parsed by its own type; a value's error comes out with the place where it stands. Unknown keys are errors,
//! so that a misspelt limit is not an unlimited migration.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::de::{self, Deserialize, Deserializer, Visitor};

use super::{
    Bandwidth, ConfigError, DeviceConfig, DeviceName, Draft, FILE_MAX, Limits, MS_MAX, MemorySize, OnStall, OpenBy,
    PLUGIN_DEVICES_MAX, PluginConfig, ROUNDS_MAX, ServeAt, ServeConfig,
};
use crate::control::address;
use crate::control::units::ByteSize;
use crate::device::vfio::VfToken;

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    memory: Option<Memory>,
    #[serde(default)]
    plugins: Vec<Plugin>,
    control_socket: Option<PathBuf>,
    state_dir: Option<PathBuf>,
    #[serde(default)]
    devices: Vec<toml::Spanned<DeviceTable>>,
    #[serde(default)]
    migration: MigrationTable,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct DeviceTable {
    device: Text<DeviceName>,
    open: Option<OpenBy>,
    vf_token: Option<Text<VfToken>>,
    socket: Option<Text<ServeAt>>,
    #[serde(default)]
    share_device_fd: bool,
    posted_writes: Option<bool>,
}

#[derive(Debug, Default, serde::Deserialize)]
#[serde(deny_unknown_fields, default)]
struct MigrationTable {
    listen: Option<toml::Spanned<String>>,
    insecure: bool,
    downtime_ms_max: Option<Milliseconds>,
    bandwidth_max: Option<Text<Bandwidth>>,
    rounds_max: Option<Rounds>,
    stalled_rounds_max: Option<Rounds>,
    on_stall: Option<OnStall>,
    answer_ms_max: Option<Milliseconds>,
    switchover_answer_ms_max: Option<Milliseconds>,
    pause_ms_max: Option<Milliseconds>,
    device_ms_max: Option<Milliseconds>,
    record_ms_max: Option<Milliseconds>,
}

/// `"FILE"`, or `{ file = "FILE", devices_max = 4 }`.
#[derive(Debug)]
struct Plugin {
    file: PathBuf,
    devices_max: Option<Devices>,
}

#[derive(Debug, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PluginTable {
    file: PathBuf,
    devices_max: Option<Devices>,
}

impl<'de> Deserialize<'de> for Plugin {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FileOrTable;
        impl<'de> Visitor<'de> for FileOrTable {
            type Value = Plugin;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string with a file's path, or a table { file, devices_max }")
            }

            fn visit_str<E: de::Error>(self, file: &str) -> Result<Plugin, E> {
                Ok(Plugin { file: file.into(), devices_max: None })
            }

            fn visit_map<A: de::MapAccess<'de>>(self, table: A) -> Result<Plugin, A::Error> {
                let table = PluginTable::deserialize(de::value::MapAccessDeserializer::new(table))?;
                Ok(Plugin { file: table.file, devices_max: table.devices_max })
            }
        }
        deserializer.deserialize_any(FileOrTable)
    }
}

impl Plugin {
    fn below(self, folder: &Path) -> PluginConfig {
        // Bounded by PLUGIN_DEVICES_MAX, a u32.
        let limit = |limit: Devices| u32::try_from(limit.0).unwrap_or(PLUGIN_DEVICES_MAX);
        let devices_max = self.devices_max.map_or(PLUGIN_DEVICES_MAX, limit);
        PluginConfig { path: folder.join(self.file), devices_max }
    }
}

/// A string that `T` parses.
#[derive(Debug)]
struct Text<T>(T);

impl<'de, T: FromStr<Err: fmt::Display>> Deserialize<'de> for Text<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map(Self).map_err(de::Error::custom)
    }
}

#[derive(Debug)]
struct Memory(ByteSize);

impl<'de> Deserialize<'de> for Memory {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let Text(size) = Text::<ByteSize>::deserialize(deserializer)?;
        MemorySize::new(size).map_err(de::Error::custom)?;
        Ok(Self(size))
    }
}

/// An integer with bounds.
#[derive(Debug, Clone, Copy)]
struct Bounded<const MAX: u64>(u64);

type Milliseconds = Bounded<MS_MAX>;
type Devices = Bounded<{ PLUGIN_DEVICES_MAX as u64 }>;
type Rounds = Bounded<{ ROUNDS_MAX as u64 }>;

impl<'de, const MAX: u64> Deserialize<'de> for Bounded<MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Integer<const MAX: u64>;
        impl<const MAX: u64> Visitor<'_> for Integer<MAX> {
            type Value = u64;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "a whole number from 1 to {MAX}")
            }

            fn visit_u64<E: de::Error>(self, value: u64) -> Result<u64, E> {
                let outside = || E::custom(format!("{value} is not a whole number from 1 to {MAX}"));
                if (1..=MAX).contains(&value) { Ok(value) } else { Err(outside()) }
            }

            fn visit_i64<E: de::Error>(self, value: i64) -> Result<u64, E> {
                let outside = || E::custom(format!("{value} is not a whole number from 1 to {MAX}"));
                self.visit_u64(u64::try_from(value).map_err(|_| outside())?)
            }
        }
        deserializer.deserialize_u64(Integer::<MAX>).map(Self)
    }
}

pub(super) fn read(path: &Path) -> Result<Draft, ConfigError> {
    let fail = |source| ConfigError::Read { path: path.to_owned(), source };
    let file = std::fs::File::open(path).map_err(fail)?;
    let mut text = String::new();
    file.take(FILE_MAX + 1).read_to_string(&mut text).map_err(fail)?;
    if text.len() as u64 > FILE_MAX {
        return Err(ConfigError::TooLarge { path: path.to_owned() });
    }
    parse(path, &text)
}

pub(super) fn parse(path: &Path, text: &str) -> Result<Draft, ConfigError> {
    let wrong = |at: usize, what: String| {
        let (line, key) = place(text, at);
        ConfigError::Wrong { path: path.to_owned(), line, key, what }
    };
    let file: File = toml::from_str(text).map_err(|error| {
        let at = error.span().map_or(0, |span| span.start);
        wrong(at, error.message().replace('\n', " "))
    })?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut draft = Draft {
        plugins: file.plugins.into_iter().map(|plugin| plugin.below(folder)).collect(),
        memory: file.memory.map(|memory| memory.0),
        control_socket: file.control_socket.map(|socket| folder.join(socket)),
        state_dir: file.state_dir.map(|state| folder.join(state)),
        insecure: file.migration.insecure,
        limits: file.migration.limits(),
        ..Draft::default()
    };
    for table in file.devices {
        let at = table.span().start;
        let device = device(folder, table.into_inner()).map_err(|what| wrong(at, what))?;
        draft.devices.push(device);
        if let Some(twice) = super::first_duplicate(&draft.devices) {
            return Err(wrong(at, format!("{twice} is listed twice")));
        }
    }
    if let Some(listen) = file.migration.listen {
        // A flag may still allow it: only the form is looked at here.
        address::listen(listen.get_ref(), true).map_err(|error| wrong(listen.span().start, error.to_string()))?;
        draft.listen = Some(listen.into_inner());
    }
    Ok(draft)
}

fn device(folder: &Path, table: DeviceTable) -> Result<DeviceConfig, String> {
    let name = table.device.0;
    if let DeviceName::Sim(spec) = &name {
        if table.vf_token.is_some() {
            return Err(format!("{spec} is simulated and takes no vf_token: remove it"));
        }
        if table.open.is_some() {
            return Err(format!("{spec} is simulated and takes no open: remove it"));
        }
    }
    let serve = match table.socket {
        Some(Text(at)) => {
            let at = super::serve::below(folder, at);
            Some(ServeConfig { at, share_device_fd: table.share_device_fd, posted_writes: table.posted_writes })
        }
        None if table.share_device_fd || table.posted_writes.is_some() => {
            return Err(format!("{name} has no socket: share_device_fd and posted_writes are for served devices"));
        }
        None => None,
    };
    let vf_token = table.vf_token.map(|token| token.0);
    Ok(DeviceConfig { name, open: table.open.unwrap_or_default(), vf_token, serve })
}

impl MigrationTable {
    fn limits(&self) -> Limits {
        let ms = |value: Option<Milliseconds>| value.map(|value| value.0);
        // Bounded by ROUNDS_MAX, a u32.
        let rounds = |value: Option<Rounds>| value.map(|value| u32::try_from(value.0).unwrap_or(ROUNDS_MAX));
        Limits {
            downtime_ms_max: ms(self.downtime_ms_max),
            bandwidth_max: self.bandwidth_max.as_ref().map(|limit| limit.0),
            rounds_max: rounds(self.rounds_max),
            stalled_rounds_max: rounds(self.stalled_rounds_max),
            on_stall: self.on_stall,
            answer_ms_max: ms(self.answer_ms_max),
            switchover_answer_ms_max: ms(self.switchover_answer_ms_max),
            pause_ms_max: ms(self.pause_ms_max),
            device_ms_max: ms(self.device_ms_max),
            record_ms_max: ms(self.record_ms_max),
        }
    }
}

/// The line of a byte, from 1, and the key there with its table: `migration.rounds_max`.
fn place(text: &str, at: usize) -> (usize, String) {
    let at = (0..=at.min(text.len())).rev().find(|at| text.is_char_boundary(*at)).unwrap_or(0);
    let line = 1 + text[..at].matches('\n').count();
    let lines: Vec<&str> = text.lines().take(line).collect();
    let header = |line: &&str| {
        let line = line.trim();
        line.strip_prefix('[')
            .and_then(|rest| rest.split_once(']'))
            .map(|(name, _)| name.trim_matches('[').trim().to_owned())
    };
    let table_at = lines.iter().rposition(|line| header(line).is_some_and(|name| is_key(&name)));
    let table = table_at.and_then(|at| header(&lines[at]));
    // A value may stand some lines below its key, never above its table's header.
    let key = lines[table_at.map_or(0, |at| at + 1)..].iter().rev().find_map(|line| {
        let (key, _) = line.split_once('=')?;
        let key = key.trim().trim_matches('"');
        is_key(key).then(|| key.to_owned())
    });
    let name = [table, key].into_iter().flatten().collect::<Vec<_>>().join(".");
    (line, if name.is_empty() { "the file".to_owned() } else { name })
}

fn is_key(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.'))
}
