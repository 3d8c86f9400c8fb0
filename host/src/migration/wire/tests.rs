use std::borrow::Cow;
use std::path::PathBuf;

use proptest::prelude::*;

use super::*;

const ID: MigrationId = MigrationId(*b"\x01\x23\x45\x67\x89\xab\xcd\xef\xfe\xdc\xba\x98\x76\x54\x32\x10");

fn text(text: &str) -> Cow<'_, str> {
    Cow::Borrowed(text)
}

fn digest() -> Digest {
    Digest(std::array::from_fn(|i| i as u8))
}

/// One record of each kind, fixed for ever: their bytes are in `spec/golden/stream`.
fn samples() -> Vec<(&'static str, Record<'static>)> {
    let page: Vec<u8> = (0..PAGE_SIZE).map(|i| (i % 251) as u8).collect();
    let device = |name: &'static str, flags, data: &'static [u8]| DeviceOffer {
        name: text(name),
        flags,
        match_data: Cow::Borrowed(data),
    };
    let hello = Hello {
        capabilities: Capabilities { required: 0, optional: 0x8000_0000_0000_0001 },
        copier: MemoryCopier::Host,
        verify: true,
        page_size: PAGE_SIZE,
        pages: 0x4_0000,
        devices: vec![device("0000:01:00.0", 1, b"edu/1"), device("sim-\u{e9}", 7, b"")],
    };
    vec![
        ("hello", Record::Hello(hello)),
        ("accept", Record::Accept { capabilities: 0x0102_0304_0506_0708 }),
        ("refuse", Record::Refuse { code: RefuseCode::Device, reason: text("another device") }),
        ("pages", Record::Pages { first: 0x1_0000_0001, data: Cow::Owned(page) }),
        ("zero_pages", Record::ZeroPages { first: 7, count: 0x1_0000 }),
        (
            "device_state",
            Record::DeviceState { device: 3, last: true, sequence: 9, data: Cow::Borrowed(b"opaque \x00\xff") },
        ),
        ("round_end", Record::RoundEnd { round: 2, pages: 513 }),
        ("round_ack", Record::RoundAck { round: 2, pages: 513 }),
        ("stop", Record::Stop { rounds: 4 }),
        ("digest", Record::Digest { digest: digest() }),
        ("ready", Record::Ready { digest: digest() }),
        ("commit", Record::Commit { digest: digest() }),
        ("committed", Record::Committed { resume_us: 1234 }),
        ("abort", Record::Abort { reason: text("cancelled") }),
        ("aborted", Record::Aborted { reason: text("") }),
        ("query", Record::Query { claim: SourceClaim::Committing }),
        ("outcome", Record::Outcome { outcome: Outcome::Prepared, explanation: text("waits for COMMIT") }),
        ("verify", Record::Verify { digest: digest() }),
        ("verified", Record::Verified { digest: digest() }),
        ("progress", Record::Progress { round: 1, pages_left: 99 }),
    ]
}

fn bytes_of(encoder: &mut Encoder, record: &Record<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    encoder.encode(record, &mut bytes).expect("sample records are well formed");
    bytes.extend_from_slice(record.body());
    bytes
}

/// Feeds `bytes` in pieces of at most `piece` bytes; what was accepted before the end or the error.
fn decode_all(
    from: Direction,
    id: Option<MigrationId>,
    mut bytes: &[u8],
    piece: usize,
) -> (Vec<Record<'static>>, Result<(), WireError>) {
    let mut decoder = Decoder::new(from, id);
    let mut records = Vec::new();
    while !bytes.is_empty() {
        let space = decoder.space();
        let count = space.len().min(bytes.len()).min(piece);
        space[..count].copy_from_slice(&bytes[..count]);
        bytes = &bytes[count..];
        match decoder.advance(count) {
            Ok(false) => {}
            Ok(true) => match decoder.record() {
                Ok(Some(record)) => records.push(record.into_owned()),
                Ok(None) => {}
                Err(error) => return (records, Err(error)),
            },
            Err(error) => return (records, Err(error)),
        }
    }
    let end = decoder.end();
    (records, end)
}

fn golden(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../spec/golden/stream").join(format!("{name}.bin"))
}

/// spec: STREAM-1, STREAM-12
#[test]
fn golden_bytes_of_every_record_kind_are_kept_both_ways() {
    let samples = samples();
    for kind in Kind::ALL {
        assert!(samples.iter().any(|(_, record)| record.kind() == *kind), "{kind:?} has no sample");
    }
    for (name, record) in &samples {
        let bytes = bytes_of(&mut Encoder::new(ID), record);
        let path = golden(name);
        // Golden files are written once, by hand: VFIO_MEDIATE_BLESS=1 adds missing ones and never changes one.
        if std::env::var_os("VFIO_MEDIATE_BLESS").is_some() && !path.exists() {
            std::fs::write(&path, &bytes).expect("golden directory is writable when blessing");
        }
        let kept = std::fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert_eq!(bytes, kept, "{name}: the bytes of a released record never change");
        let (records, end) = decode_all(record.kind().direction(), None, &kept, usize::MAX);
        assert_eq!((records.as_slice(), end), (std::slice::from_ref(record), Ok(())), "{name}");
    }
}

#[test]
fn kind_numbers_are_unique_and_fit_the_buffer() {
    for (i, a) in Kind::ALL.iter().enumerate() {
        assert!(a.cap() <= MAX_PAYLOAD, "{a:?}");
        assert_eq!(Kind::from_raw(a.raw()), Some(*a));
        assert!(Kind::ALL[i + 1..].iter().all(|b| a.raw() != b.raw()), "{a:?}");
    }
}

/// spec: STREAM-2
#[test]
fn a_stream_may_arrive_in_pieces_of_any_size() {
    let mut encoder = Encoder::new(ID);
    let sent: Vec<_> =
        samples().into_iter().map(|(_, r)| r).filter(|r| r.kind().direction() == Direction::FromSource).collect();
    let bytes: Vec<u8> = sent.iter().flat_map(|record| bytes_of(&mut encoder, record)).collect();
    for piece in [1, 2, HEADER_LENGTH - 1, HEADER_LENGTH, HEADER_LENGTH + 1, 4095, usize::MAX] {
        let (records, end) = decode_all(Direction::FromSource, Some(ID), &bytes, piece);
        assert_eq!(end, Ok(()));
        assert_eq!(records, sent, "pieces of {piece}");
    }
}

/// Feeds `bytes` in pieces, the data of pages elsewhere; the records, those data, and how it ended.
fn place_all(mut bytes: &[u8], piece: usize) -> (Vec<Record<'static>>, Vec<u8>, Result<(), WireError>) {
    let mut decoder = Decoder::new(Direction::FromSource, Some(ID));
    let (mut records, mut data) = (Vec::new(), Vec::new());
    while !bytes.is_empty() {
        if decoder.pages_ahead().is_some() {
            decoder.place();
        }
        let whole = if let Some(left) = decoder.left_to_place() {
            let (now, rest) = bytes.split_at(left.min(bytes.len()).min(piece));
            bytes = rest;
            data.extend_from_slice(now);
            decoder.placed(now)
        } else {
            let space = decoder.space();
            let count = space.len().min(bytes.len()).min(piece);
            space[..count].copy_from_slice(&bytes[..count]);
            bytes = &bytes[count..];
            decoder.advance(count)
        };
        match whole.and_then(|whole| if whole { decoder.record() } else { Ok(None) }) {
            Ok(Some(record)) => records.push(record.into_owned()),
            Ok(None) => {}
            Err(error) => return (records, data, Err(error)),
        }
    }
    let end = decoder.end();
    (records, data, end)
}

/// spec: STREAM-13
#[test]
fn placed_pages_are_checked_as_others_are_and_known_when_they_are_complete() {
    let page = |byte: u8| vec![byte; PAGE_SIZE as usize];
    let sent = [
        Record::Pages { first: 3, data: Cow::Owned([page(1), page(2)].concat()) },
        Record::ZeroPages { first: 9, count: 1 },
        Record::Pages { first: 7, data: Cow::Owned(page(3)) },
    ];
    let mut encoder = Encoder::new(ID);
    let bytes: Vec<u8> = sent.iter().flat_map(|record| bytes_of(&mut encoder, record)).collect();
    let placed = [
        Record::PlacedPages { first: 3, count: 2 },
        Record::ZeroPages { first: 9, count: 1 },
        Record::PlacedPages { first: 7, count: 1 },
    ];
    let all = [page(1), page(2), page(3)].concat();
    for piece in [1, 15, 16, 17, HEADER_LENGTH, 4095, 4096, 4097, usize::MAX] {
        assert_eq!(place_all(&bytes, piece), (placed.to_vec(), all.clone(), Ok(())), "pieces of {piece}");
    }
    // One flipped bit anywhere; every bit of what is not page data, and some of those.
    let record = &bytes[..HEADER_LENGTH + 16 + 2 * PAGE_SIZE as usize];
    for bit in (0..(HEADER_LENGTH + 16) * 8).chain((HEADER_LENGTH * 8 + 128..record.len() * 8).step_by(997)) {
        let mut damaged = record.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let (records, _, end) = place_all(&damaged, usize::MAX);
        assert!(records.is_empty() && end.is_err(), "bit {bit}: {end:?}");
    }
    // Any cut.
    for length in (1..record.len()).step_by(61).chain([record.len() - 1]) {
        let (records, _, end) = place_all(&record[..length], usize::MAX);
        assert!(records.is_empty() && matches!(end, Err(WireError::Short { .. })), "{length}: {end:?}");
    }
    // What is placed is never sent.
    assert!(Encoder::new(ID).encode(&placed[0], &mut Vec::new()).is_err());
}

/// spec: STREAM-13
#[test]
fn pages_whose_fields_and_length_disagree_are_not_placed() {
    let lie = |first: u64, count: u64, bytes: usize| {
        let payload = [&first.to_le_bytes()[..], &count.to_le_bytes(), &vec![1; bytes]].concat();
        Encoder::new(ID).encode_unknown(Kind::Pages.raw(), &payload)
    };
    let page = PAGE_SIZE as usize;
    for (first, count, bytes) in [(0, 2, page), (0, 1, 2 * page), (0, 0, 0), (0, 1, page - 1), (u64::MAX, 1, page)] {
        let (records, data, end) = place_all(&lie(first, count, bytes), usize::MAX);
        assert!(records.is_empty() && data.is_empty(), "{first} {count} {bytes}");
        assert!(matches!(end, Err(WireError::Malformed { .. })), "{first} {count} {bytes}: {end:?}");
    }
    let (records, _, _) = place_all(&lie(5, 1, page), usize::MAX);
    assert_eq!(records, [Record::PlacedPages { first: 5, count: 1 }]);
    // Shorter than the fields themselves.
    for short in 0..16 {
        let bytes = Encoder::new(ID).encode_unknown(Kind::Pages.raw(), &vec![0; short]);
        let (records, _, end) = place_all(&bytes, usize::MAX);
        assert!(records.is_empty() && matches!(end, Err(WireError::Malformed { .. })), "{short}: {end:?}");
    }
}

/// A few records whose every bit and every cut can be tried.
fn small_stream() -> (Vec<Record<'static>>, Vec<u8>) {
    let records = vec![
        Record::ZeroPages { first: 5, count: 6 },
        Record::DeviceState { device: 0, last: false, sequence: 0, data: Cow::Borrowed(b"abc") },
        Record::Abort { reason: text("") },
        Record::RoundEnd { round: 1, pages: 6 },
    ];
    let mut encoder = Encoder::new(ID);
    let bytes = records.iter().flat_map(|record| bytes_of(&mut encoder, record)).collect();
    (records, bytes)
}

/// spec: STREAM-3
#[test]
fn every_single_bit_flip_is_an_error_and_never_other_data() {
    let (sent, bytes) = small_stream();
    for bit in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[bit / 8] ^= 1 << (bit % 8);
        let (records, end) = decode_all(Direction::FromSource, Some(ID), &damaged, usize::MAX);
        assert!(end.is_err(), "bit {bit} passed");
        assert_eq!(records, sent[..records.len()], "bit {bit} changed a record");
    }
}

/// spec: STREAM-4
#[test]
fn every_truncation_is_noticed_or_lies_between_records() {
    let (sent, bytes) = small_stream();
    let mut edges = 0;
    for length in 0..bytes.len() {
        let (records, end) = decode_all(Direction::FromSource, Some(ID), &bytes[..length], usize::MAX);
        assert_eq!(records, sent[..records.len()]);
        match end {
            Ok(()) => edges += 1,
            Err(error) => assert!(matches!(error, WireError::Short { .. }), "{length}: {error}"),
        }
    }
    assert_eq!(edges, sent.len(), "the edges between records (and nothing at all) are the only clean ends");
}

/// spec: STREAM-5
#[test]
fn reordered_repeated_and_lost_records_are_refused() {
    let mut encoder = Encoder::new(ID);
    let parts: Vec<Vec<u8>> =
        (1..=3).map(|round| bytes_of(&mut encoder, &Record::RoundEnd { round, pages: 0 })).collect();
    for order in [vec![1, 0, 2], vec![0, 0], vec![0, 2], vec![0, 1, 0]] {
        let bytes: Vec<u8> = order.iter().flat_map(|i: &usize| parts[*i].clone()).collect();
        let (_, end) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
        assert!(matches!(end, Err(WireError::Sequence { .. })), "{order:?}: {end:?}");
    }
}

/// spec: STREAM-6
#[test]
fn a_record_of_another_migration_is_foreign() {
    let other = MigrationId([9; 16]);
    let record = Record::Stop { rounds: 1 };
    let bytes = bytes_of(&mut Encoder::new(other), &record);
    let foreign = Err(WireError::Foreign { found: other });
    assert_eq!(decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX).1, foreign);
    // A stream bound by its first record does not change over in the middle.
    let mut encoder = Encoder::new(ID);
    let mut mixed = bytes_of(&mut encoder, &record);
    let mut stranger = Encoder::new(other);
    bytes_of(&mut stranger, &record);
    mixed.extend(bytes_of(&mut stranger, &record));
    assert_eq!(decode_all(Direction::FromSource, None, &mixed, usize::MAX).1, foreign);
}

/// spec: STREAM-7
#[test]
fn a_reflected_record_is_refused() {
    let bytes = bytes_of(&mut Encoder::new(ID), &Record::Stop { rounds: 1 });
    let (_, end) = decode_all(Direction::FromDestination, Some(ID), &bytes, usize::MAX);
    assert_eq!(end, Err(WireError::WrongDirection { kind: Kind::Stop }));
}

/// spec: STREAM-8
#[test]
fn unknown_mandatory_records_fail_and_unknown_optional_ones_are_skipped() {
    let mut encoder = Encoder::new(ID);
    let mut bytes = encoder.encode_unknown(0x7ffe | Kind::OPTIONAL, &[1, 2, 3]);
    bytes.extend(encoder.encode_unknown(0x7ffd | Kind::OPTIONAL, &[]));
    bytes.extend(bytes_of(&mut encoder, &Record::Stop { rounds: 1 }));
    let (records, end) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
    assert_eq!((records, end), (vec![Record::Stop { rounds: 1 }], Ok(())));
    let bytes = Encoder::new(ID).encode_unknown(0x7ffe, &[]);
    let (_, end) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
    assert_eq!(end, Err(WireError::UnknownKind { kind: 0x7ffe }));
    let bytes = Encoder::new(ID).encode_unknown(0x7ffe | Kind::OPTIONAL, &vec![0; OPTIONAL_CAP as usize + 1]);
    let (_, end) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
    assert!(matches!(end, Err(WireError::TooLong { .. })), "{end:?}");
}

/// spec: STREAM-9
#[test]
fn a_length_over_its_kinds_cap_is_refused_before_its_bytes_are_taken() {
    for kind in Kind::ALL.iter().filter(|kind| kind.direction() == Direction::FromSource) {
        let over = Encoder::new(ID).encode_unknown(kind.raw(), &vec![0; kind.cap() as usize + 1]);
        let (_, end) = decode_all(Direction::FromSource, Some(ID), &over[..HEADER_LENGTH], usize::MAX);
        assert!(matches!(end, Err(WireError::TooLong { .. })), "{kind:?}: {end:?}");
    }
}

/// spec: STREAM-10
#[test]
fn the_builder_refuses_what_the_parser_would() {
    let mut head = Vec::new();
    let page = PAGE_SIZE as usize;
    let pages = |first, bytes| Record::Pages { first, data: Cow::Owned(vec![1; bytes]) };
    let state = |bytes| Record::DeviceState { device: 0, last: false, sequence: 0, data: Cow::Owned(vec![1; bytes]) };
    let max = PAGES_MAX as usize * page;
    let cases = [
        (pages(0, 0), false),
        (pages(0, page - 1), false),
        (pages(0, page), true),
        (pages(0, page + 1), false),
        (pages(u64::MAX - 1, page), true),
        (pages(u64::MAX, page), false),
        (pages(0, max), true),
        (pages(0, max + page), false),
        (Record::ZeroPages { first: 0, count: 0 }, false),
        (Record::ZeroPages { first: 1, count: u64::MAX - 1 }, true),
        (Record::ZeroPages { first: 1, count: u64::MAX }, false),
        (state(STATE_MAX as usize), true),
        (state(STATE_MAX as usize + 1), false),
        (Record::DeviceState { device: 63, last: false, sequence: 0, data: Cow::Borrowed(&[]) }, true),
        (Record::DeviceState { device: 64, last: false, sequence: 0, data: Cow::Borrowed(&[]) }, false),
    ];
    for (record, good) in cases {
        let built = Encoder::new(ID).encode(&record, &mut head);
        assert_eq!(built.is_ok(), good, "{:?} of {} bytes: {built:?}", record.kind(), record.body().len());
    }
}

/// spec: STREAM-12
#[test]
fn bytes_left_over_and_bytes_missing_are_errors() {
    for (name, record) in samples() {
        let bytes = bytes_of(&mut Encoder::new(ID), &record);
        let payload = &bytes[HEADER_LENGTH..];
        let longer = [payload, &[0]].concat();
        // A kind that ends in opaque bytes or text takes any number of them, as other contents.
        let open =
            matches!(record.kind(), Kind::Refuse | Kind::DeviceState | Kind::Abort | Kind::Aborted | Kind::Outcome);
        assert_eq!(Record::parse(record.kind(), &longer).is_err(), !open, "{name}");
        if !open {
            assert!(Record::parse(record.kind(), &payload[..payload.len() - 1]).is_err(), "{name}");
        }
    }
}

#[test]
fn reasons_are_cut_at_a_characters_edge() {
    let long = "\u{20ac}".repeat(REASON_CAP);
    let bytes = bytes_of(&mut Encoder::new(ID), &Record::Abort { reason: Cow::Owned(long) });
    let (records, end) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
    assert_eq!(end, Ok(()));
    assert_eq!(records, vec![Record::Abort { reason: Cow::Owned("\u{20ac}".repeat(REASON_CAP / 3)) }]);
}

/// spec: STREAM-11
#[test]
fn both_sides_compute_the_same_digest_and_a_changed_record_changes_it() {
    let run = |rounds| {
        let mut encoder = Encoder::new(ID);
        let mut bytes = bytes_of(&mut encoder, &Record::Stop { rounds });
        bytes.extend(encoder.encode_unknown(0x7ffe | Kind::OPTIONAL, &[1]));
        let sent = encoder.digest();
        bytes.extend(bytes_of(&mut encoder, &Record::Digest { digest: sent }));
        let mut decoder = Decoder::new(Direction::FromSource, None);
        for byte in bytes {
            decoder.space()[0] = byte;
            decoder.advance(1).expect("an undamaged stream");
        }
        assert_eq!(decoder.digest_before(), sent);
        sent
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn migration_ids_print_and_parse() {
    assert_eq!(MigrationId::parse(&ID.to_string()), Some(ID));
    for bad in ["", "0123", "+1234567890abcdef1234567890abcde", &"g".repeat(32), &"0".repeat(33)] {
        assert_eq!(MigrationId::parse(bad), None, "{bad}");
    }
}

fn any_record() -> impl Strategy<Value = Record<'static>> {
    let words = "[a-z\u{e9}\u{20ac} ]{0,40}".prop_map(Cow::<'static, str>::Owned);
    let data = proptest::collection::vec(any::<u8>(), 0..300);
    let device = (words.clone(), any::<u64>(), data.clone()).prop_map(|(name, flags, data)| DeviceOffer {
        name,
        flags,
        match_data: Cow::Owned(data),
    });
    let hello = (any::<u64>(), any::<u64>(), any::<bool>(), any::<bool>(), proptest::collection::vec(device, 0..5));
    prop_oneof![
        hello.prop_map(|(pages, required, verify, host, devices)| Record::Hello(Hello {
            capabilities: Capabilities { required, optional: !required },
            copier: if host { MemoryCopier::Host } else { MemoryCopier::Vmm },
            verify,
            page_size: PAGE_SIZE,
            pages,
            devices,
        })),
        (0..u64::MAX - 8, 1..4_usize, any::<u8>()).prop_map(|(first, count, byte)| Record::Pages {
            first,
            data: Cow::Owned(vec![byte; count * PAGE_SIZE as usize]),
        }),
        (0..u64::MAX / 2, 1..u64::MAX / 2).prop_map(|(first, count)| Record::ZeroPages { first, count }),
        (0..64_u32, any::<bool>(), any::<u64>(), data).prop_map(|(device, last, sequence, data)| {
            Record::DeviceState { device, last, sequence, data: Cow::Owned(data) }
        }),
        (any::<u32>(), any::<u64>()).prop_map(|(round, pages)| Record::RoundEnd { round, pages }),
        words.prop_map(|reason| Record::Abort { reason }),
    ]
}

proptest! {
    #[test]
    fn any_records_survive_the_wire(records in proptest::collection::vec(any_record(), 0..6), piece in 1..9000_usize) {
        let mut encoder = Encoder::new(ID);
        let bytes: Vec<u8> = records.iter().flat_map(|record| bytes_of(&mut encoder, record)).collect();
        let (decoded, end) = decode_all(Direction::FromSource, None, &bytes, piece);
        prop_assert_eq!(end, Ok(()));
        prop_assert_eq!(decoded, records);
    }

    /// Damage of any kind: what is accepted is a prefix of what was sent.
    #[test]
    fn mutated_streams_never_yield_other_records(
        records in proptest::collection::vec(any_record(), 1..4),
        damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let mut encoder = Encoder::new(ID);
        let mut bytes: Vec<u8> = records.iter().flat_map(|record| bytes_of(&mut encoder, record)).collect();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let (decoded, _) = decode_all(Direction::FromSource, Some(ID), &bytes, usize::MAX);
        prop_assert_eq!(&decoded[..], &records[..decoded.len()]);
    }

    /// Payloads that no builder made: a record or an error, never a panic.
    #[test]
    fn parsers_are_total(kind in 0..Kind::ALL.len(), payload in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = Record::parse(Kind::ALL[kind], &payload);
    }
}
