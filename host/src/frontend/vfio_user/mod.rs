//! vfio-user: the protocol by which a VMM sees a mediated device over a socket (`spec/vfio-user.md`).
//!
//! **Owns** the protocol: its bytes (`wire`), one connection's rules (`session`), the device as the protocol calls it (`backend`),
//! sockets and threads (`server`), and a VMM's side of it (`client`). **Must never** trust a client: what
//! it sends is parsed once, into types that cannot be wrong, and is capped before anything is allocated or done.
//!
//! ```text
//!  socket --bytes, fds--> session --requests--> serve --calls--> Backend (a device)
//!  socket <--bytes, fds-- session <--replies--- serve <--answers-
//!                            ^ DMA_READ, DMA_WRITE of the device, told apart from requests by type and id
//! ```

pub mod backend;
pub mod client;
pub mod server;
pub mod session;
pub mod wire;
