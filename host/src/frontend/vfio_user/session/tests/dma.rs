//! What the server asks the client.

use super::*;

fn access(address: u64, count: u32) -> Vec<u8> {
    let mut out = Vec::new();
    DmaAccess { address, count }.write(&mut out);
    out
}

fn header_of(bytes: &[u8]) -> Header {
    Header::parse(bytes.first_chunk().unwrap())
}

fn read(bench: &mut Bench<'_>, address: u64, count: u32) -> (Ticket, Header) {
    let mut out = Vec::new();
    let ticket = bench.session.dma_read(address, count, &mut out).unwrap();
    assert_eq!(&out[16..], access(address, count));
    (ticket, header_of(&out))
}

/// spec: VFU-41
#[test]
fn a_devices_read_is_answered_past_requests_with_the_same_id() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let (ticket, asked) = read(&mut bench, 0x1000, 3);
    let requests: Vec<u8> = (0..100).flat_map(|_| request(asked.id, 13, false, &[])).collect();
    bench.receive(&requests, 0).unwrap();
    assert_eq!(bench.session.take_reply(ticket), None);
    let answer = reply(asked.id, Command::DmaRead, &[access(0x1000, 3), b"abc".to_vec()].concat());
    let (first, second) = answer.split_at(20);
    bench.receive(first, 0).unwrap();
    assert_eq!(bench.session.take_reply(ticket), None, "not whole yet");
    bench.receive(second, 0).unwrap();
    assert_eq!(bench.session.take_reply(ticket), Some(Ok(b"abc".to_vec())));
    assert_eq!(bench.serve().0.len(), 100, "and the requests are served");
}

/// spec: VFU-42
#[test]
fn a_clients_errno_reaches_the_device() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let (ticket, asked) = read(&mut bench, 0, 8);
    let mut bytes = Vec::new();
    Header::error(asked.id, asked.command, Errno::NODEV).write(&mut bytes);
    bench.receive(&bytes, 0).unwrap();
    assert_eq!(bench.session.take_reply(ticket), Some(Err(Errno::NODEV)));
    assert_eq!(bench.session.take_reply(ticket), Some(Err(Errno::INVAL)), "taken once");
}

/// spec: VFU-43
#[test]
fn a_reply_that_does_not_answer_its_request_ends_the_session() {
    for payload in [
        vec![],
        access(0x1000, 3),
        [access(0x1000, 3), b"ab".to_vec()].concat(),
        [access(0x1000, 3), b"abcd".to_vec()].concat(),
        [access(0x2000, 3), b"abc".to_vec()].concat(),
        [access(0x1000, 4), b"abcd".to_vec()].concat(),
    ] {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::ready(&open);
        let (ticket, asked) = read(&mut bench, 0x1000, 3);
        let wrong = Err(Violation::WrongReply { command: Command::DmaRead });
        assert_eq!(bench.receive(&reply(asked.id, Command::DmaRead, &payload), 0), wrong);
        assert_eq!(bench.session.take_reply(ticket), Some(Err(Errno::NOTCONN)), "whoever waits is told");
        assert_eq!(bench.session.dma_read(0, 1, &mut Vec::new()), Err(Errno::NOTCONN));
    }
}

/// spec: VFU-44
#[test]
fn a_reply_to_nothing_is_dropped() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let (ticket, asked) = read(&mut bench, 0x1000, 3);
    let other_id = reply(asked.id.wrapping_add(1), Command::DmaRead, &[]);
    let other_command = reply(asked.id, Command::DmaWrite, &access(0x1000, 3));
    let of_a_request = reply(asked.id, Command::DeviceReset, &[]);
    bench.receive(&[other_id, other_command, of_a_request].concat(), 2).unwrap();
    assert_eq!((bench.session.unsolicited_replies(), open.load(Ordering::SeqCst)), (3, 0));
    assert_eq!(bench.session.take_reply(ticket), None);
    assert!(bench.serve().0.is_empty(), "and never answered");
}

/// spec: VFU-45
#[test]
fn an_abandoned_request_keeps_its_id_until_its_reply_has_come() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let (ticket, asked) = read(&mut bench, 0x1000, 3);
    bench.session.abandon(ticket);
    let mut write = Vec::new();
    for _ in 0..=u16::MAX {
        let one = [(0_u64, &b"x"[..]), (1, b"y")];
        let batch = bench.session.dma_write_batch(&mut one.into_iter().peekable()).unwrap();
        assert_ne!(header_of(&batch.bytes).id, asked.id);
        let barrier = header_of(&batch.bytes[33..]);
        assert_ne!(barrier.id, asked.id);
        write.clear();
        write.extend(reply(barrier.id, Command::DmaWrite, &access(1, 1)));
        bench.receive(&write, 0).unwrap();
        assert_eq!(bench.session.take_reply(batch.barrier), Some(Ok(vec![])));
    }
    let late = reply(asked.id, Command::DmaRead, &[access(0x1000, 3), b"abc".to_vec()].concat());
    bench.receive(&late, 0).unwrap();
    assert_eq!(bench.session.unsolicited_replies(), 0);
    assert_eq!(bench.session.take_reply(ticket), Some(Err(Errno::INVAL)), "gone");
}

/// spec: VFU-46
#[test]
fn a_batch_is_whole_messages_without_replies_and_a_barrier_at_the_end() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let byte = [7];
    let big = vec![1; 20_000];
    let writes = (0..3000_u64).map(|page| (page << 12, if page == 1500 { &big[..] } else { &byte[..] }));
    let mut writes = writes.peekable();
    let batch = bench.session.dma_write_batch(&mut writes).unwrap();
    assert!(writes.peek().is_none());
    let (mut begin, mut seen) = (0, 0_u64);
    for end in &batch.ends {
        let send = &batch.bytes[begin..*end];
        let (mut at, mut messages) = (0, 0);
        while at < send.len() {
            let header = header_of(&send[at..]);
            let no_reply = seen != 2999;
            assert_eq!(header.kind, MessageType::Command { no_reply });
            let message = &send[at + 16..at + header.size as usize];
            let (write, _) = DmaAccess::parse_with_data(message, DATA_XFER_MAX).unwrap();
            assert_eq!(write.address, seen << 12);
            (seen, messages, at) = (seen + 1, messages + 1, at + header.size as usize);
        }
        assert!(send.len() <= BATCH_SEND_MAX || messages == 1, "{} bytes, {messages} messages", send.len());
        begin = *end;
    }
    assert_eq!((seen, begin), (3000, batch.bytes.len()));
    let nothing: [(u64, &[u8]); 0] = [];
    assert_eq!(bench.session.dma_write_batch(&mut nothing.into_iter().peekable()).unwrap_err(), Errno::INVAL);
}

#[test]
fn a_long_row_of_writes_makes_batches_of_bounded_length() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let data = vec![0; 4096];
    let mut writes = (0..1000_u64).map(|page| (page << 12, &data[..])).peekable();
    let mut batches = 0;
    while writes.peek().is_some() {
        let batch = bench.session.dma_write_batch(&mut writes).unwrap();
        assert!(batch.bytes.len() <= BATCH_MAX);
        batches += 1;
    }
    assert_eq!(batches, 1000_usize.div_ceil(BATCH_MAX / (4096 + 32)));
}

/// spec: VFU-47
#[test]
fn what_is_waited_for_is_bounded() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let mut out = Vec::new();
    for _ in 0..OUTSTANDING_MAX {
        bench.session.dma_write(0, b"x", &mut out).unwrap();
    }
    assert_eq!(bench.session.dma_write(0, b"x", &mut out), Err(Errno::AGAIN));
    let mut one = [(0_u64, &b"x"[..])].into_iter().peekable();
    assert_eq!(bench.session.dma_write_batch(&mut one).unwrap_err(), Errno::AGAIN);
    assert!(one.peek().is_some(), "not taken");
    let mut bench = Bench::ready(&open);
    let most = OUTSTANDING_BYTES_MAX / u64::from(DATA_XFER_MAX);
    for _ in 0..most {
        bench.session.dma_read(0, DATA_XFER_MAX, &mut out).unwrap();
    }
    assert_eq!(bench.session.dma_read(0, 1, &mut out), Err(Errno::AGAIN));
    assert_eq!(bench.session.dma_read(0, DATA_XFER_MAX + 1, &mut out), Err(Errno::INVAL));
    assert_eq!(
        [bench.session.dma_read(0, 0, &mut out), bench.session.dma_read(u64::MAX, 2, &mut out)],
        [Err(Errno::INVAL); 2]
    );
    assert_eq!(Bench::fresh(&open).session.dma_read(0, 1, &mut out), Err(Errno::NOTCONN), "before VERSION");
}

/// spec: VFU-48
#[test]
fn a_client_that_floods_instead_of_replying_is_closed() {
    let open = AtomicUsize::new(0);
    let mut bench = Bench::ready(&open);
    let (ticket, _) = read(&mut bench, 0x1000, 3);
    let one = request(1, 13, false, &[]);
    for _ in 1..REQUESTS_WAITING_MAX {
        bench.receive(&one, 0).unwrap();
    }
    assert_eq!(bench.receive(&one, 0), Err(Violation::Flood));
    assert_eq!(bench.session.take_reply(ticket), Some(Err(Errno::NOTCONN)));
}
