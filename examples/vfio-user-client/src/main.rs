//! How a VMM drives a device over vfio-user: it looks at one, or moves it from one server to another.
//!
//! **Owns** a guest's memory of 1 MiB in a file, once for each side. **Must never** do what a VMM could not copy.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use vfio_mediate::frontend::vfio_user::client::{Client, Guest, Policy, migrate};
use vfio_mediate::frontend::vfio_user::wire::DmaMap;

const MEMORY: u64 = 1 << 20;
const CONFIG: u32 = 7;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["show", socket] => show(Path::new(socket)),
        ["migrate", from, to] => moved(Path::new(from), Path::new(to)),
        _ => bail!("usage: show SOCKET | migrate FROM TO"),
    }
}

fn show(socket: &Path) -> Result<()> {
    let client = Client::connect(socket)?;
    let info = client.device_info()?;
    let mut ids = [0; 4];
    client.region_read(CONFIG, 0, &mut ids)?;
    println!("device {:02x}{:02x}:{:02x}{:02x}", ids[1], ids[0], ids[3], ids[2]);
    for index in 0..info.num_regions {
        // Indices have fixed meanings, and the VGA region is one that most devices do not have.
        let region = match client.region_info(index) {
            Err(error) if error.refusal() == Some(Errno::INVAL) => continue,
            region => region?,
        };
        if region.size > 0 {
            println!("region {index}: {} bytes, flags {:#x}, {:?}", region.size, region.flags, region.capabilities);
        }
    }
    for index in 0..info.num_irqs {
        match client.irq_info(index) {
            Err(error) if error.refusal() == Some(Errno::INVAL) => {}
            irq => println!("irq {index}: {} vectors", irq?.count),
        }
    }
    Ok(())
}

/// A client, and the memory that its device reaches.
fn attach(socket: &Path) -> Result<(Client, File)> {
    let memory = File::from(memfd_create("guest", MemfdFlags::CLOEXEC)?);
    ftruncate(&memory, MEMORY)?;
    let client = Client::connect(socket)?;
    let map = DmaMap { readable: true, writable: true, offset: 0, address: 0, size: MEMORY };
    client.dma_map(&map, Some(memory.as_fd()))?;
    Ok((client, memory))
}

/// A guest without vCPUs: only its device works.
struct Memory<'a> {
    from: &'a File,
    to: &'a File,
}

impl Guest for Memory<'_> {
    fn memory(&self) -> Vec<(u64, u64)> {
        vec![(0, MEMORY)]
    }

    fn copy(&mut self, address: u64, length: u64) -> std::io::Result<()> {
        let mut bytes = vec![0; length as usize];
        self.from.read_exact_at(&mut bytes, address)?;
        self.to.write_all_at(&bytes, address)
    }

    fn pause(&mut self) -> std::io::Result<()> {
        println!("the guest is paused");
        Ok(())
    }

    fn resume(&mut self) {
        println!("the guest goes on at the source");
    }
}

fn moved(from: &Path, to: &Path) -> Result<()> {
    let (source, here) = attach(from)?;
    let (destination, there) = attach(to)?;
    let policy = Policy { rounds_max: 8, dirty_bytes_max: 64 * 1024 };
    let done = migrate(&source, &destination, &mut Memory { from: &here, to: &there }, &policy)?;
    println!("moved: {} rounds, {} bytes of state, {} of memory", done.rounds, done.data_bytes, done.memory_bytes);
    Ok(())
}
