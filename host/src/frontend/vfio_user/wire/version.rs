//! VERSION: what each side can do, as JSON.

use serde_json::{Map, Value};

use super::at_most;
use super::{
    DATA_XFER_MAX, DMA_MAPS_MAX, MSG_FDS_DEFAULT, PAGE_SIZE, Put, Reader, Result, VERSION_DATA_MAX, WireError,
};

/// `twin_socket`: a socket of its own for what the server asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TwinSocket {
    pub supported: bool,
    /// In the reply only: which of the message's file descriptors it is
    pub fd_index: Option<u32>,
}

/// `migration`, of version 0.0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MigrationCapability {
    /// In bytes
    pub pgsize: u64,
    /// In bytes
    pub max_bitmap_size: Option<u64>,
}

/// The capabilities that a side has named. What it did not name has the protocol's default.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Capabilities {
    pub max_msg_fds: Option<u32>,
    /// In bytes
    pub max_data_xfer_size: Option<u32>,
    pub max_dma_maps: Option<u32>,
    /// Page sizes in bytes, ORed
    pub pgsizes: Option<u64>,
    pub twin_socket: Option<TwinSocket>,
    pub write_multiple: Option<bool>,
    pub migration: Option<MigrationCapability>,
}

impl Capabilities {
    pub fn max_msg_fds(&self) -> u32 {
        self.max_msg_fds.unwrap_or(MSG_FDS_DEFAULT)
    }

    pub fn max_data_xfer_size(&self) -> u32 {
        self.max_data_xfer_size.unwrap_or(DATA_XFER_MAX)
    }

    pub fn max_dma_maps(&self) -> u32 {
        self.max_dma_maps.unwrap_or(DMA_MAPS_MAX)
    }

    pub fn pgsizes(&self) -> u64 {
        self.pgsizes.unwrap_or(PAGE_SIZE)
    }

    fn from_json(text: &[u8]) -> Result<Self> {
        let data: Value =
            serde_json::from_slice(text).map_err(|_| WireError::Invalid("version data that is no JSON"))?;
        let data = object(&data)?;
        let Some(capabilities) = data.get("capabilities") else { return Ok(Self::default()) };
        let capabilities = object(capabilities)?;
        let twin_socket = capabilities.get("twin_socket").map(|value| {
            let twin = object(value)?;
            Ok(TwinSocket {
                supported: boolean(twin, "supported")?.unwrap_or(false),
                fd_index: number(twin, "fd_index")?,
            })
        });
        let migration = capabilities.get("migration").map(|value| {
            let migration = object(value)?;
            let pgsize = number(migration, "pgsize")?.unwrap_or(PAGE_SIZE);
            Ok(MigrationCapability { pgsize, max_bitmap_size: number(migration, "max_bitmap_size")? })
        });
        Ok(Self {
            max_msg_fds: number(capabilities, "max_msg_fds")?,
            max_data_xfer_size: number(capabilities, "max_data_xfer_size")?,
            max_dma_maps: number(capabilities, "max_dma_maps")?,
            pgsizes: number(capabilities, "pgsizes")?,
            twin_socket: twin_socket.transpose()?,
            write_multiple: boolean(capabilities, "write_multiple")?,
            migration: migration.transpose()?,
        })
    }

    /// Named capabilities only, in the order of the protocol's text.
    fn to_json(self) -> String {
        let mut out = Vec::new();
        let mut named = |name: &str, value: Option<String>| {
            out.extend(value.map(|value| format!("\"{name}\":{value}")));
        };
        named("max_msg_fds", self.max_msg_fds.map(|n| n.to_string()));
        named("max_data_xfer_size", self.max_data_xfer_size.map(|n| n.to_string()));
        named("max_dma_maps", self.max_dma_maps.map(|n| n.to_string()));
        named("pgsizes", self.pgsizes.map(|n| n.to_string()));
        named("twin_socket", self.twin_socket.map(twin_socket_json));
        named("write_multiple", self.write_multiple.map(|b| b.to_string()));
        named("migration", self.migration.map(migration_json));
        format!("{{\"capabilities\":{{{}}}}}", out.join(","))
    }
}

fn twin_socket_json(twin: TwinSocket) -> String {
    let index = twin.fd_index.map(|index| format!(",\"fd_index\":{index}")).unwrap_or_default();
    format!("{{\"supported\":{}{index}}}", twin.supported)
}

fn migration_json(migration: MigrationCapability) -> String {
    let size = migration.max_bitmap_size.map(|size| format!(",\"max_bitmap_size\":{size}")).unwrap_or_default();
    format!("{{\"pgsize\":{}{size}}}", migration.pgsize)
}

fn object(value: &Value) -> Result<&Map<String, Value>> {
    value.as_object().ok_or(WireError::Invalid("version data: an object is due"))
}

fn number<T: TryFrom<u64>>(object: &Map<String, Value>, name: &str) -> Result<Option<T>> {
    let Some(value) = object.get(name) else { return Ok(None) };
    let number = value.as_u64().and_then(|number| T::try_from(number).ok());
    number.map(Some).ok_or(WireError::Invalid("version data: a whole number that fits is due"))
}

fn boolean(object: &Map<String, Value>, name: &str) -> Result<Option<bool>> {
    let Some(value) = object.get(name) else { return Ok(None) };
    value.as_bool().map(Some).ok_or(WireError::Invalid("version data: true or false is due"))
}

/// VERSION, both ways.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    pub major: u16,
    pub minor: u16,
    pub capabilities: Capabilities,
}

impl Version {
    /// The data may be missing, and may lack its NUL.
    pub fn parse(payload: &[u8]) -> Result<Self> {
        let mut reader = Reader::new(payload);
        let (major, minor) = (reader.u16()?, reader.u16()?);
        let data = reader.rest();
        at_most("version data", data.len() as u64, VERSION_DATA_MAX as u64)?;
        let end = data.iter().position(|byte| *byte == 0).unwrap_or(data.len());
        let (text, padding) = data.split_at(end);
        if padding.iter().any(|byte| *byte != 0) {
            return Err(WireError::Invalid("version data go on behind their NUL"));
        }
        let capabilities = if text.is_empty() { Capabilities::default() } else { Capabilities::from_json(text)? };
        Ok(Self { major, minor, capabilities })
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        out.u16(self.major);
        out.u16(self.minor);
        out.extend_from_slice(self.capabilities.to_json().as_bytes());
        out.push(0);
    }
}
