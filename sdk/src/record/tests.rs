//! Whatever is cut comes together again; whatever is wrong is refused.

use proptest::prelude::*;

use super::*;

fn stream(records: &[Record], piece: usize) -> Vec<u8> {
    let mut writer = StreamWriter::default();
    let mut left = records.iter();
    let mut all = Vec::new();
    let mut buffer = vec![0; piece];
    loop {
        let saved =
            writer.fill(&mut buffer, || Ok(left.next().map_or(Next::End, |r| Next::Record(r.clone())))).unwrap();
        all.extend(&buffer[..saved.bytes]);
        if saved.end {
            return all;
        }
        assert_eq!(saved.bytes, piece, "a piece that is not the last is full");
    }
}

fn read(stream: &[u8], piece: usize, max: usize) -> Result<Vec<Record>> {
    let mut reader = StreamReader::new(max);
    let mut records = Vec::new();
    for data in stream.chunks(piece) {
        reader.feed(data, |record| {
            records.push(record.clone());
            Ok(Taken::Known)
        })?;
    }
    reader.finish().map(|()| records)
}

fn records() -> Vec<Record> {
    vec![Record::mandatory(1).u32(7).u64(8), Record::optional(2), Record::mandatory(3).bytes(&[5; 100])]
}

proptest! {
    /// spec: RECORD-CUT
    #[test]
    fn records_survive_any_cut(
        kinds in prop::collection::vec((0..0xffff_u16, any::<bool>(), prop::collection::vec(any::<u8>(), 0..64)), 0..8),
        out in 1..80_usize,
        into in 1..80_usize,
    ) {
        let records: Vec<_> =
            kinds.into_iter().map(|(kind, mandatory, payload)| Record { kind, mandatory, payload }).collect();
        prop_assert_eq!(read(&stream(&records, out), into, 64), Ok(records));
    }
}

/// spec: RECORD-CORRUPT
#[test]
fn every_flipped_bit_and_every_missing_byte_is_noticed() {
    let good = stream(&records(), 64);
    assert_eq!(read(&good, 7, 100).unwrap(), records());
    for bit in 0..good.len() * 8 {
        let mut bad = good.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(read(&bad, 7, 100).is_err(), "bit {bit}");
    }
    for length in 0..good.len() {
        assert_eq!(read(&good[..length], 7, 100), Err(Errno::EBADMSG), "{length} bytes");
    }
    let mut longer = good;
    longer.push(0);
    assert_eq!(read(&longer, 7, 100), Err(Errno::EBADMSG));
}

#[test]
fn a_lost_record_is_noticed() {
    let first = records()[0].encoded_length();
    assert_eq!(read(&stream(&records(), 64)[first..], 7, 100), Err(Errno::EBADMSG));
}

/// spec: RECORD-CAP
#[test]
fn a_length_is_capped_before_anything_is_stored() {
    let record = [Record::mandatory(1).bytes(&[0; 16])];
    assert!(read(&stream(&record, 64), 64, 16).is_ok());
    assert_eq!(read(&stream(&record, 64), 64, 15), Err(Errno::EBADMSG));
    let mut reader = StreamReader::new(4096);
    let mut header = vec![1, 0, 1, 1];
    header.extend(u32::MAX.to_le_bytes());
    header.extend([0; 4]);
    assert_eq!(reader.feed(&header, |_| Ok(Taken::Known)), Err(Errno::EBADMSG));
    assert_eq!(reader.pending.capacity(), 0);
}

/// spec: RECORD-UNKNOWN
#[test]
fn unknown_records_are_skipped_when_optional_and_refused_when_mandatory() {
    let read = |record: Record| {
        let mut reader = StreamReader::new(64);
        reader.feed(&stream(&[record], 64), |_| Ok(Taken::Unknown))?;
        reader.finish()
    };
    assert_eq!(read(Record::optional(9)), Ok(()));
    assert_eq!(read(Record::mandatory(9)), Err(Errno::EOPNOTSUPP));
}

#[test]
fn a_dead_stream_stays_dead() {
    let mut reader = StreamReader::new(64);
    let good = stream(&records()[..1], 64);
    assert_eq!(reader.feed(&good, |_| Err(Errno::EPERM)), Err(Errno::EPERM));
    assert_eq!(reader.feed(&good, |_| Ok(Taken::Known)), Err(Errno::EPERM));
    assert_eq!(reader.finish(), Err(Errno::EPERM));
}

#[test]
fn a_pause_is_an_end_for_now_and_the_stream_goes_on() {
    let mut writer = StreamWriter::default();
    let mut buffer = [0; 256];
    let mut next = vec![Next::End, Next::Record(records()[1].clone()), Next::Pause, Next::Record(records()[0].clone())];
    let first = writer.fill(&mut buffer, || Ok(next.pop().unwrap())).unwrap();
    assert!(first.end);
    let mut all = buffer[..first.bytes].to_vec();
    let second = writer.fill(&mut buffer, || Ok(next.pop().unwrap())).unwrap();
    assert!(second.end);
    all.extend(&buffer[..second.bytes]);
    assert_eq!(read(&all, 5, 64).unwrap(), records()[..2]);
    assert_eq!(writer.fill(&mut buffer, || unreachable!()).unwrap(), Saved { bytes: 0, end: true });
}
