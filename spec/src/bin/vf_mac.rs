//! Gives a VF its MAC as its PF's administrator: `vf-mac INTERFACE NUMBER MAC`. The lab's `ip` does not know VFs.

use std::process::ExitCode;

use anyhow::{Context, Result, ensure};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketType, netlink, recv, sendto, socket};

// linux/netlink.h, linux/rtnetlink.h, linux/if_link.h
const RTM_SETLINK: u16 = 19;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const IFLA_VFINFO_LIST: u16 = 22;
const IFLA_VF_INFO: u16 = 1;
const IFLA_VF_MAC: u16 = 1;
const NESTED: u16 = 1 << 15;
/// `ifla_vf_mac` has room for other networks' addresses.
const MAC_ROOM: usize = 32;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vf-mac: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn attribute(kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&(payload.len() as u16 + 4).to_ne_bytes());
    bytes.extend_from_slice(&kind.to_ne_bytes());
    bytes.extend_from_slice(payload);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

fn run() -> Result<()> {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let [interface, number, mac] = words.as_slice() else { anyhow::bail!("usage: vf-mac INTERFACE NUMBER MAC") };
    let index = std::fs::read_to_string(format!("/sys/class/net/{interface}/ifindex")).context("the interface")?;
    let index: i32 = index.trim().parse()?;
    let number: u32 = number.parse().context("the VF's number")?;
    let mac: Vec<u8> = mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<_, _>>()?;
    ensure!(mac.len() == 6, "a MAC has six bytes");

    let mut info = number.to_ne_bytes().to_vec();
    info.extend_from_slice(&mac);
    info.resize(4 + MAC_ROOM, 0);
    let info = attribute(IFLA_VF_INFO | NESTED, &attribute(IFLA_VF_MAC, &info));
    let list = attribute(IFLA_VFINFO_LIST | NESTED, &info);
    // ifinfomsg: family, padding, type, index, flags, change
    let mut body = vec![0; 4];
    body.extend_from_slice(&index.to_ne_bytes());
    body.extend_from_slice(&[0; 8]);
    body.extend_from_slice(&list);
    let mut message = Vec::new();
    message.extend_from_slice(&(body.len() as u32 + 16).to_ne_bytes());
    message.extend_from_slice(&RTM_SETLINK.to_ne_bytes());
    message.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend_from_slice(&[0; 8]);
    message.extend_from_slice(&body);

    // Protocol 0 is NETLINK_ROUTE.
    let socket = socket(AddressFamily::NETLINK, SocketType::RAW, None)?;
    sendto(&socket, &message, SendFlags::empty(), &netlink::SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0; 4096];
    let (length, _) = recv(&socket, &mut answer, RecvFlags::empty())?;
    ensure!(length >= 20 && answer[4..6] == NLMSG_ERROR.to_ne_bytes(), "no answer of the kernel");
    let error = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
    ensure!(error == 0, "{}", std::io::Error::from_raw_os_error(-error));
    Ok(())
}
