//! `device inspect`.

use std::sync::Arc;

use serde_json::{Value, json};

use super::args::{DeviceCommand, InspectArgs};
use super::{CliError, print_json, print_line};
use crate::control::chain;
use crate::control::config::{DeviceConfig, DeviceName, OpenBy};
use crate::control::doctor::{Machine as Here, Wanted, examine};
use crate::control::exit::Exit;
use crate::control::machine;
use crate::control::service::backend_name;
use crate::device::{Device, Feature, FeatureAccess, RegionCapability};
use crate::mediation::MediatedDevice;
use crate::memory::{AddressSpace, GuestRam, PAGE_SIZE};
use crate::plugin::{Library, Limits, Registry};

pub(super) fn run(command: DeviceCommand, json: bool) -> Result<Exit, CliError> {
    let DeviceCommand::Inspect(args) = command;
    let shown = inspect(&args)?;
    if json {
        print_json(&shown)?;
    } else {
        for line in told(&shown) {
            print_line(&line)?;
        }
    }
    Ok(Exit::Done)
}

/// Opens the device, asks everything, closes it.
fn inspect(args: &InspectArgs) -> Result<Value, CliError> {
    let vf_token = args.vf_token;
    let open = match args.device {
        DeviceName::Vfio(_) => args.open,
        DeviceName::Sim(_) => OpenBy::Auto,
    };
    let wanted = DeviceConfig { name: args.device.clone(), open, vf_token, serve: None };
    let registry = Registry::new();
    for path in &args.plugins {
        let check = |error: &dyn std::error::Error| CliError::new(Exit::Check, chain(error));
        let library = Library::open(path).map_err(|error| check(&error))?;
        registry.register(library, Limits { devices_max: 1 }).map_err(|error| check(&error))?;
    }
    let device = machine::open(&wanted).map_err(|error| explain(&wanted, CliError::from(error)))?;
    let plain = describe(&*device);
    let mediated = mediate(device, &registry);
    let mut shown = plain;
    if let Value::Object(fields) = &mut shown {
        match mediated {
            Ok(mediated) => {
                let plugin = mediated.plugin().map(|p| json!({ "name": p.name, "version": p.version, "path": p.path }));
                fields.insert("plugin".to_owned(), plugin.unwrap_or(Value::Null));
                let verdict = match mediated.migratable() {
                    Ok(flags) => json!({ "possible": true, "p2p": flags.p2p, "pre_copy": flags.pre_copy }),
                    Err(error) => json!({ "possible": false, "reason": chain(&error) }),
                };
                fields.insert("migration".to_owned(), verdict);
            }
            Err(error) => {
                fields.insert("plugin_error".to_owned(), Value::String(error));
            }
        }
    }
    Ok(shown)
}

fn mediate(device: Arc<dyn Device>, registry: &Registry) -> Result<Arc<MediatedDevice>, String> {
    let ram = GuestRam::new(PAGE_SIZE).map_err(|error| chain(&error))?;
    MediatedDevice::open(device, registry, AddressSpace::new(ram)).map_err(|error| chain(&error))
}

/// Adds to an open that failed what stands against the device.
fn explain(wanted: &DeviceConfig, error: CliError) -> CliError {
    let asked = Wanted { devices: vec![wanted.clone()], ..Wanted::default() };
    let mut text = error.message;
    for finding in examine(&Here::this(), &asked).iter().filter(|finding| finding.check == "device") {
        for remedy in &finding.remedies {
            text.push_str("\n  ");
            text.push_str(remedy);
        }
    }
    CliError::new(error.exit, text)
}

const FEATURES: [(&str, Feature, FeatureAccess); 13] = [
    ("vf_token", Feature::PciVfToken, FeatureAccess::Set),
    ("migration", Feature::Migration, FeatureAccess::Get),
    ("mig_device_state", Feature::MigDeviceState, FeatureAccess::Set),
    ("low_power_entry", Feature::LowPowerEntry, FeatureAccess::Set),
    ("low_power_entry_with_wakeup", Feature::LowPowerEntryWithWakeup, FeatureAccess::Set),
    ("low_power_exit", Feature::LowPowerExit, FeatureAccess::Set),
    ("dma_logging_start", Feature::DmaLoggingStart, FeatureAccess::Set),
    ("dma_logging_stop", Feature::DmaLoggingStop, FeatureAccess::Set),
    ("dma_logging_report", Feature::DmaLoggingReport, FeatureAccess::Get),
    ("mig_data_size", Feature::MigDataSize, FeatureAccess::Get),
    ("bus_master", Feature::BusMaster, FeatureAccess::Set),
    ("dma_buf", Feature::DmaBuf, FeatureAccess::Get),
    ("mig_precopy_info_v2", Feature::MigPrecopyInfoV2, FeatureAccess::Set),
];

fn describe(device: &dyn Device) -> Value {
    let (identity, info) = (device.identity(), device.info());
    let regions: Vec<Value> = (0..info.num_regions)
        .filter_map(|index| device.region_info(index).ok())
        .filter(|region| region.size > 0)
        .map(|region| {
            let capabilities: Vec<String> = region.capabilities.iter().map(capability).collect();
            json!({ "index": region.index, "size": region.size, "flags": region.flags, "capabilities": capabilities })
        })
        .collect();
    let irqs: Vec<Value> = (0..info.num_irqs)
        .filter_map(|index| device.irq_info(index).ok())
        .filter(|irq| irq.count > 0)
        .map(|irq| json!({ "index": irq.index, "count": irq.count, "flags": irq.flags }))
        .collect();
    let features = FEATURES.iter().filter(|(_, feature, access)| device.probe_feature(*feature, *access));
    let ranges: Vec<String> =
        device.iova_ranges().iter().map(|range| format!("{:#x}-{:#x}", range.iova, range.last)).collect();
    json!({
        "name": identity.name,
        "opened": backend_name(identity.backend),
        "id": format!("{:04x}:{:04x}", identity.vendor_id, identity.device_id),
        "subsystem": format!("{:04x}:{:04x}", identity.subsystem_vendor_id, identity.subsystem_device_id),
        "class": format!("{:06x}", identity.class_code),
        "revision": identity.revision,
        "regions": regions,
        "irqs": irqs,
        "features": features.map(|(name, _, _)| *name).collect::<Vec<_>>(),
        "own_migration": device.migration().is_some(),
        "own_dma_logging": device.dma_logging().is_some(),
        "iova": ranges,
    })
}

fn capability(capability: &RegionCapability) -> String {
    match capability {
        RegionCapability::SparseMmap(areas) => {
            let areas: Vec<String> =
                areas.iter().map(|area| format!("{:#x}+{:#x}", area.offset, area.length)).collect();
            format!("sparse mmap {}", areas.join(" "))
        }
        RegionCapability::Type { type_, subtype } => format!("type {type_:#x}/{subtype:#x}"),
        RegionCapability::MsixMappable => "msix mappable".to_owned(),
        RegionCapability::Other { id, version, .. } => format!("capability {id} version {version}"),
    }
}

const REGION_NAMES: [&str; 9] = ["BAR 0", "BAR 1", "BAR 2", "BAR 3", "BAR 4", "BAR 5", "ROM", "config", "VGA"];
const IRQ_NAMES: [&str; 5] = ["INTx", "MSI", "MSI-X", "error", "request"];

fn region_flags(flags: u64) -> String {
    // VFIO_REGION_INFO_FLAG_READ, _WRITE, _MMAP
    [(1, "read"), (2, "write"), (4, "mmap")]
        .iter()
        .filter(|(bit, _)| flags & bit != 0)
        .map(|(_, name)| *name)
        .collect::<Vec<_>>()
        .join(" ")
}

fn told(shown: &Value) -> Vec<String> {
    let text = |name: &str| shown.get(name).and_then(Value::as_str).unwrap_or("?").to_owned();
    let list = |name: &str| shown.get(name).and_then(Value::as_array).cloned().unwrap_or_default();
    let number = |value: &Value, name: &str| value.get(name).and_then(Value::as_u64).unwrap_or(0);
    let named = |names: &[&str], index: u64| {
        usize::try_from(index)
            .ok()
            .and_then(|index| names.get(index))
            .map_or(format!("index {index}"), |name| (*name).to_owned())
    };
    let mut lines = vec![
        format!("{} ({})", text("name"), text("opened")),
        format!("  id        {} subsystem {} class {}", text("id"), text("subsystem"), text("class")),
    ];
    for region in list("regions") {
        let name = named(&REGION_NAMES, number(&region, "index"));
        lines.push(format!(
            "  region    {name}: {:#x} bytes, {}",
            number(&region, "size"),
            region_flags(number(&region, "flags"))
        ));
        for capability in region.get("capabilities").and_then(Value::as_array).into_iter().flatten() {
            lines.push(format!("            {}", capability.as_str().unwrap_or("?")));
        }
    }
    for irq in list("irqs") {
        lines.push(format!("  irq       {}: {}", named(&IRQ_NAMES, number(&irq, "index")), number(&irq, "count")));
    }
    let joined =
        |name: &str| list(name).iter().filter_map(|v| v.as_str().map(str::to_owned)).collect::<Vec<_>>().join(" ");
    if !list("features").is_empty() {
        lines.push(format!("  features  {}", joined("features")));
    }
    lines.push(format!("  iova      {}", joined("iova")));
    if let Some(error) = shown.get("plugin_error").and_then(Value::as_str) {
        lines.push(format!("  plug-in   {error}"));
        return lines;
    }
    let plugin = shown.get("plugin").filter(|plugin| !plugin.is_null());
    lines.push(plugin.map_or("  plug-in   none".to_owned(), |plugin| {
        let part = |name: &str| plugin.get(name).and_then(Value::as_str).unwrap_or("?");
        format!("  plug-in   {} {} ({})", part("name"), part("version"), part("path"))
    }));
    let verdict = shown.get("migration").cloned().unwrap_or_default();
    let flag = |name: &str| verdict.get(name).and_then(Value::as_bool).unwrap_or(false);
    lines.push(if flag("possible") {
        let options =
            [("pre_copy", "pre-copy"), ("p2p", "P2P")].iter().filter(|(key, _)| flag(key)).map(|(_, name)| *name);
        let options = options.collect::<Vec<_>>();
        let options = if options.is_empty() { String::new() } else { format!(" ({})", options.join(", ")) };
        format!("  migration possible{options}")
    } else {
        format!("  migration impossible: {}", verdict.get("reason").and_then(Value::as_str).unwrap_or("?"))
    });
    lines
}
