//! A wire between two hosts that breaks where the test wants: at a record, before it, inside it, after it.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use crate::support::lock;
use vfio_mediate::migration::wire::{HEADER_LENGTH, Kind};

/// Which record the wire breaks at, by the kind in its header, and how much of it still gets through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    pub kind: Kind,
    pub bytes: Bytes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bytes {
    None,
    Header,
    AllButOne,
    All,
}

pub struct Proxy {
    pub address: SocketAddr,
    /// Fires once
    cut: Mutex<Option<Cut>>,
    /// After the cut nobody gets through
    stays_cut: AtomicBool,
    is_cut: AtomicBool,
}

impl Proxy {
    pub fn start(to: SocketAddr, cut: Option<Cut>, stays_cut: bool) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            cut: Mutex::new(cut),
            stays_cut: AtomicBool::new(stays_cut),
            is_cut: AtomicBool::new(false),
        });
        let weak = Arc::downgrade(&proxy);
        std::thread::spawn(move || {
            while let (Ok((from, _)), Some(proxy)) = (listener.accept(), weak.upgrade()) {
                if proxy.is_cut() && proxy.stays_cut.load(Ordering::SeqCst) {
                    continue;
                }
                let Ok(to) = TcpStream::connect(to) else { continue };
                for (from, to) in [(&from, &to), (&to, &from)] {
                    let (from, to, proxy) = (from.try_clone().unwrap(), to.try_clone().unwrap(), Arc::clone(&proxy));
                    std::thread::spawn(move || {
                        // Whatever ends one direction ends the connection.
                        let _end = proxy.carry(&from, &to);
                        let _from = from.shutdown(Shutdown::Both);
                        let _to = to.shutdown(Shutdown::Both);
                    });
                }
            }
        });
        proxy
    }

    pub fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::SeqCst)
    }

    pub fn mend(&self) {
        self.stays_cut.store(false, Ordering::SeqCst);
    }

    fn carry(&self, mut from: &TcpStream, mut to: &TcpStream) -> std::io::Result<()> {
        from.set_nodelay(true)?;
        to.set_nodelay(true)?;
        to.set_write_timeout(Some(Duration::from_secs(30)))?;
        loop {
            let mut record = vec![0; HEADER_LENGTH];
            from.read_exact(&mut record)?;
            let kind = u16::from_le_bytes([record[6], record[7]]);
            let length = u32::from_le_bytes([record[8], record[9], record[10], record[11]]) as usize;
            record.resize(HEADER_LENGTH + length, 0);
            from.read_exact(&mut record[HEADER_LENGTH..])?;
            let cut = lock(&self.cut).take_if(|cut| cut.kind.raw() == kind);
            if let Some(cut) = cut {
                self.is_cut.store(true, Ordering::SeqCst);
                let through = match cut.bytes {
                    Bytes::None => 0,
                    Bytes::Header => HEADER_LENGTH,
                    Bytes::AllButOne => record.len() - 1,
                    Bytes::All => record.len(),
                };
                return to.write_all(&record[..through]);
            }
            to.write_all(&record)?;
        }
    }
}
