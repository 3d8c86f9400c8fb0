//! Whoever else connects to a host that awaits a guest: nothing of it is believed, and the right source comes through.

use std::io::Write;
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::support::{Setup, Side, move_guest, until};
use vfio_mediate::control::config::Limits;
use vfio_mediate::control::protocol::Ownership;
use vfio_mediate::migration::wire::{Encoder, MigrationId, Record, SourceClaim};

fn short() -> Setup {
    let usual = Setup::new("sim:stateful").listening();
    Setup { limits: Limits { answer_ms_max: Some(300), record_ms_max: Some(300), ..usual.limits }, ..usual }
}

fn send(to: SocketAddr, bytes: &[u8]) -> TcpStream {
    let mut stream = TcpStream::connect(to).unwrap();
    // A host that has closed already needs no more.
    let _sent = stream.write_all(bytes);
    stream
}

fn records(records: &[Record<'_>]) -> Vec<u8> {
    let mut encoder = Encoder::new(MigrationId::random().unwrap());
    let mut bytes = Vec::new();
    for record in records {
        let mut head = Vec::new();
        encoder.encode(record, &mut head).unwrap();
        bytes.extend_from_slice(&head);
        bytes.extend_from_slice(record.body());
    }
    bytes
}

/// spec: HOST-11
#[test]
fn garbage_silence_and_records_out_of_order_do_not_keep_the_right_source_away() {
    let there = Side::start(short());
    let hello = records(&[Record::RoundEnd { round: 1, pages: 0 }]);
    let query = records(&[Record::Query { claim: SourceClaim::Committing }]);
    let mut damaged = query.clone();
    damaged[40] ^= 1;
    let streams: Vec<Vec<u8>> = vec![
        Vec::new(),
        vec![0],
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 4096],
        hello[..hello.len() / 2].to_vec(),
        hello,
        records(&[Record::Stop { rounds: 1 }, Record::RoundEnd { round: 1, pages: 0 }]),
        records(&[Record::Abort { reason: "no".into() }]),
        query[..query.len() - 1].to_vec(),
        damaged,
        // A migration that nobody here knows.
        query,
    ];
    for bytes in &streams {
        for stays in [true, false] {
            let stream = send(there.address(), bytes);
            if !stays {
                drop(stream);
                continue;
            }
            until("an end of it", || ended(&stream));
        }
    }
    assert_eq!(there.ownership(), Ownership::Elsewhere);
    let here = Side::start(Setup::new("sim:stateful"));
    move_guest(&here, &there);
    here.stop();
    there.stop();
}

/// Whether the host has closed its end.
fn ended(mut stream: &TcpStream) -> bool {
    use std::io::Read;
    stream.set_read_timeout(Some(Duration::from_millis(10))).unwrap();
    match stream.read(&mut [0; 4096]) {
        Ok(0) => true,
        Ok(_) => false,
        Err(error) => !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
    }
}

/// spec: HOST-11
#[test]
fn a_connection_that_says_nothing_holds_up_nobody_for_long() {
    // With the limits of a host that nobody configured.
    let there = Side::start(Setup { limits: Limits::default(), ..Setup::new("sim:stateful").listening() });
    let _silent = TcpStream::connect(there.address()).unwrap();
    let here = Side::start(Setup { limits: Limits::default(), ..Setup::new("sim:stateful") });
    let begun = Instant::now();
    move_guest(&here, &there);
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());
    here.stop();
    there.stop();
}
