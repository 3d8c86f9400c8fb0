//! Where migrations come from and go to, and the rule that the stream stays on this machine until it can be protected.
//!
//! The stream is neither encrypted nor authenticated yet: whoever reaches it reads guest memory, and may write it. Hence
//! addresses beyond loopback need the operator's explicit word.

use std::net::{SocketAddr, ToSocketAddrs};

/// An address that will not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error("{0:?} is not HOST:PORT, such as 127.0.0.1:7000 or [::1]:7000")]
    Malformed(String),
    #[error(
        "{0} is beyond loopback and the migration stream is neither encrypted nor authenticated; tunnel it (ssh -L, wireguard), \
         or allow it with --insecure (insecure = true) on a network that you trust"
    )]
    BeyondLoopback(String),
    #[error("{address} does not resolve: {reason}")]
    Unresolved { address: String, reason: String },
}

fn is_loopback(address: &SocketAddr) -> bool {
    // 127.0.0.1 written as ::ffff:127.0.0.1 is loopback too.
    address.ip().to_canonical().is_loopback()
}

/// An address to listen on: numbers only, so that it means the same whatever a name server says.
pub fn listen(text: &str, insecure: bool) -> Result<SocketAddr, AddressError> {
    let address: SocketAddr = text.parse().map_err(|_| AddressError::Malformed(text.to_owned()))?;
    permit(&address, text, insecure)?;
    Ok(address)
}

/// Refuses what is beyond loopback unless `insecure`.
pub fn permit(address: &SocketAddr, text: &str, insecure: bool) -> Result<(), AddressError> {
    if insecure || is_loopback(address) { Ok(()) } else { Err(AddressError::BeyondLoopback(text.to_owned())) }
}

/// Addresses to connect to. A name that resolves to anything beyond loopback is refused as a whole unless `insecure`.
pub fn connect(text: &str, insecure: bool) -> Result<Vec<SocketAddr>, AddressError> {
    let malformed = || AddressError::Malformed(text.to_owned());
    let (host, port) = text.rsplit_once(':').ok_or_else(malformed)?;
    let port: u16 = port.parse().map_err(|_| malformed())?;
    if host.is_empty() || port == 0 || (host.contains(':') && !host.starts_with('[')) {
        return Err(malformed());
    }
    let unresolved = |reason: String| AddressError::Unresolved { address: text.to_owned(), reason };
    let addresses: Vec<SocketAddr> = text.to_socket_addrs().map_err(|error| unresolved(error.to_string()))?.collect();
    for address in &addresses {
        permit(address, text, insecure)?;
    }
    if addresses.is_empty() { Err(unresolved("no address".to_owned())) } else { Ok(addresses) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// spec: CONTROL-3
    #[test]
    fn addresses_beyond_loopback_need_the_operators_word() {
        for inside in ["127.0.0.1:7000", "127.255.255.254:1", "[::1]:7000", "[::ffff:127.0.0.1]:7000"] {
            assert!(listen(inside, false).is_ok(), "{inside}");
            assert!(connect(inside, false).is_ok(), "{inside}");
        }
        for beyond in ["0.0.0.0:7000", "128.0.0.1:7000", "[::]:7000", "192.0.2.1:7000", "[::ffff:192.0.2.1]:1"] {
            let refusal = AddressError::BeyondLoopback(beyond.to_owned());
            assert_eq!(listen(beyond, false), Err(refusal.clone()));
            assert_eq!(connect(beyond, false), Err(refusal));
            assert!(listen(beyond, true).is_ok() && connect(beyond, true).is_ok(), "{beyond}");
        }
    }

    #[test]
    fn what_is_no_address_is_named() {
        for text in
            ["", ":", "7000", "host", "127.0.0.1", "127.0.0.1:", "127.0.0.1:65536", ":7000", "::1:7000", "a:b:1"]
        {
            assert_eq!(connect(text, true), Err(AddressError::Malformed(text.to_owned())), "{text}");
            assert!(listen(text, true).is_err(), "{text}");
        }
        assert_eq!(connect("127.0.0.1:0", true), Err(AddressError::Malformed("127.0.0.1:0".to_owned())));
        assert!(listen("127.0.0.1:0", false).is_ok(), "the kernel chooses a port");
    }
}
