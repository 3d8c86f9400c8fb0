use proptest::prelude::*;

use super::*;

#[derive(Debug, Default, PartialEq)]
struct Collected {
    hosts: Vec<HostState>,
    plugin: Vec<u8>,
    device: Vec<u8>,
}

impl Sink for Collected {
    fn host(&mut self, state: HostState) -> Result<()> {
        self.hosts.push(state);
        Ok(())
    }

    fn opaque(&mut self, part: Part, data: &[u8]) -> Result<()> {
        match part {
            Part::Plugin => self.plugin.extend_from_slice(data),
            Part::Device => self.device.extend_from_slice(data),
        }
        Ok(())
    }
}

fn host() -> HostState {
    vec![(0x10, vec![1; 24]), (0x04, vec![6, 0])]
}

fn saved() -> Vec<u8> {
    let mut saver = Saver::default();
    let mut buffer = vec![0; BUFFER_MIN];
    let mut all = Vec::new();
    let take = |all: &mut Vec<u8>, buffer: &[u8], length: usize| all.extend_from_slice(&buffer[..length]);
    let length = saver.host(&mut buffer, &host()).unwrap();
    take(&mut all, &buffer, length);
    for (part, bytes) in [(Part::Plugin, &b"plug-in"[..]), (Part::Device, b"device"), (Part::Plugin, b"")] {
        saver.opaque(&mut buffer)[..bytes.len()].copy_from_slice(bytes);
        let length = saver.seal(&mut buffer, part, bytes.len());
        take(&mut all, &buffer, length);
    }
    let length = saver.end(&mut buffer).unwrap();
    take(&mut all, &buffer, length);
    all
}

fn load(pieces: &[&[u8]]) -> (Result<()>, Collected) {
    let mut loader = Loader::default();
    let mut collected = Collected::default();
    for piece in pieces {
        if let Err(error) = loader.feed(piece, &mut collected) {
            return (Err(error), collected);
        }
    }
    (loader.finish(), collected)
}

/// spec: SAVED-1
#[test]
fn what_was_saved_is_loaded_however_it_is_cut() {
    let all = saved();
    let whole = Collected { hosts: vec![host()], plugin: b"plug-in".to_vec(), device: b"device".to_vec() };
    let bytes: Vec<&[u8]> = all.chunks(1).collect();
    for pieces in [vec![&all[..]], bytes] {
        let (result, collected) = load(&pieces);
        result.unwrap();
        assert_eq!(collected, whole);
    }
    for cut in 0..all.len() {
        let (result, collected) = load(&[&all[..cut], &all[cut..]]);
        result.unwrap();
        assert_eq!(collected, whole);
    }
}

/// spec: SAVED-2
#[test]
fn a_stream_cut_short_anywhere_is_not_whole() {
    let all = saved();
    for cut in 0..all.len() {
        let (result, _) = load(&[&all[..cut]]);
        assert!(matches!(result, Err(MediationError::Stream { .. })), "cut at {cut}");
    }
    let mut longer = all.clone();
    longer.push(0);
    assert!(load(&[&longer]).0.is_err());
}

/// spec: SAVED-2
#[test]
fn one_changed_byte_anywhere_is_refused() {
    let all = saved();
    for at in 0..all.len() {
        let mut changed = all.clone();
        changed[at] ^= 0x10;
        assert!(load(&[&changed]).0.is_err(), "byte {at}");
    }
}

#[test]
fn a_refused_stream_takes_nothing_more() {
    let mut loader = Loader::default();
    let mut collected = Collected::default();
    loader.feed(&header(PLUGIN, 4), &mut collected).unwrap_err();
    loader.feed(&saved(), &mut collected).unwrap_err();
    loader.finish().unwrap_err();
    assert_eq!(collected, Collected::default());
}

#[test]
fn lengths_are_capped_before_anything_is_kept() {
    for (kind, length) in [(HOST, HOST_MAX + 1), (HOST, 3), (END, END_LENGTH + 1), (9, 0)] {
        let mut loader = Loader::default();
        assert!(loader.feed(&header(kind, length), &mut Collected::default()).is_err(), "{kind} {length}");
    }
}

proptest! {
    #[test]
    fn any_bytes_are_survived(data in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut loader = Loader::default();
        let _result = loader.feed(&data, &mut Collected::default());
        prop_assert!(loader.finish().is_err());
    }
}
