//! Any sequence of messages, cut anywhere, against a model that is too simple to be wrong: which calls the device sees, in which
//! order, and which reply each request gets.

use std::collections::VecDeque;

use super::*;

/// What the client does, in pages of 4096 bytes where it is about maps.
#[derive(Debug, Clone)]
enum Step {
    Map {
        page: u64,
        count: u64,
        fd: bool,
    },
    Unmap {
        page: u64,
        count: u64,
    },
    UnmapAll,
    Read {
        at: u64,
        count: u32,
    },
    Write {
        at: u64,
        count: u8,
    },
    Multi {
        writes: u8,
        bad: Option<u8>,
    },
    Irqs {
        start: u32,
        count: u32,
        fds: bool,
    },
    Disable,
    Reset {
        extra: u8,
    },
    State(u32),
    Save {
        size: u32,
    },
    Unknown {
        command: u16,
        length: u16,
    },
    /// To the server's question of this number; `errno` 0: its data
    Answer {
        which: usize,
        errno: u32,
        id_off: u16,
    },
}

/// A step, and whether it wants no reply.
type Steps = Vec<(Step, bool)>;

const ASKED: usize = 6;
const MAPS_MAX: usize = 5;
const CONFIGURED: &[u8] = br#"{"capabilities":{"max_dma_maps":5,"write_multiple":true}}"#;

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (0_u64..12, 0_u64..4, any::<bool>()).prop_map(|(page, count, fd)| Step::Map { page, count, fd }),
        3 => (0_u64..12, 0_u64..4).prop_map(|(page, count)| Step::Unmap { page, count }),
        1 => Just(Step::UnmapAll),
        2 => (prop_oneof![0_u64..64, Just(u64::MAX), Just(u64::MAX - 3)], 0_u32..9).prop_map(|(at, count)| Step::Read { at, count }),
        2 => (prop_oneof![0_u64..64, Just(u64::MAX - 3)], 0_u8..9).prop_map(|(at, count)| Step::Write { at, count }),
        1 => (1_u8..6, prop::option::of(0_u8..6)).prop_map(|(writes, bad)| Step::Multi { writes, bad }),
        2 => (0_u32..4, 0_u32..4, any::<bool>()).prop_map(|(start, count, fds)| Step::Irqs { start, count, fds }),
        1 => Just(Step::Disable),
        1 => (0_u8..3).prop_map(|extra| Step::Reset { extra }),
        1 => (0_u32..9).prop_map(Step::State),
        1 => prop_oneof![0_u32..40, Just(DATA_XFER_MAX), Just(DATA_XFER_MAX + 1)].prop_map(|size| Step::Save { size }),
        1 => (prop_oneof![Just(0_u16), Just(14), 19_u16..40, Just(11), Just(12)], 0_u16..300)
            .prop_map(|(command, length)| Step::Unknown { command, length }),
        2 => (0..ASKED, prop_oneof![3 => Just(0_u32), 1 => 1_u32..40], prop_oneof![3 => Just(0_u16), 1 => Just(0x4000)])
            .prop_map(|(which, errno, id_off)| Step::Answer { which, errno, id_off }),
    ]
}

/// What the model expects of one request: a payload, or an errno.
type Outcome = Result<Vec<u8>, Errno>;

#[derive(Debug, Default)]
struct Model {
    maps: Vec<(u64, u64)>,
    calls: Vec<String>,
    /// The call of this number fails
    fails: usize,
    /// Descriptors that the device keeps
    kept: usize,
    /// What was answered to the server's questions
    answers: Vec<Option<Result<Vec<u8>, Errno>>>,
}

impl Model {
    fn call(&mut self, call: String) -> Result<(), Errno> {
        self.calls.push(call);
        if self.calls.len() == self.fails { Err(Errno::IO) } else { Ok(()) }
    }

    fn unmap(&mut self, which: (u64, u64)) -> Result<(), Errno> {
        self.call(format!("unmap {:#x}+{:#x}", which.0 << 12, which.1 << 12))?;
        self.maps.retain(|map| *map != which);
        Ok(())
    }

    /// `payload` and `fds` are what was sent.
    fn serve(&mut self, step: &Step, payload: &[u8], fds: usize) -> Outcome {
        let head = |length: usize| payload[..length].to_vec();
        match *step {
            Step::Map { page, count, fd } => {
                let pages: Vec<u64> = (page..page + count).collect();
                if pages.is_empty() {
                    return Err(Errno::INVAL);
                }
                if pages.iter().any(|page| self.maps.iter().any(|(first, n)| (*first..first + n).contains(page))) {
                    return Err(Errno::EXIST);
                }
                if self.maps.len() == MAPS_MAX {
                    return Err(Errno::NOSPC);
                }
                self.call(format!("map {:#x}+{:#x} {fd}", page << 12, count << 12))?;
                self.maps.push((page, count));
                Ok(vec![])
            }
            Step::Unmap { count: 0, .. } => Err(Errno::INVAL),
            Step::Unmap { page, count } if !self.maps.contains(&(page, count)) => Err(Errno::NOENT),
            Step::Unmap { page, count } => self.unmap((page, count)).map(|()| head(24)),
            Step::UnmapAll => {
                self.maps.sort_unstable();
                self.maps.clone().into_iter().try_for_each(|map| self.unmap(map))?;
                Ok(head(24))
            }
            Step::Read { at, count } => {
                if count == 0 || at.checked_add(u64::from(count) - 1).is_none() {
                    return Err(Errno::INVAL);
                }
                self.call(format!("read 0 {at:#x}+{count}"))?;
                Ok(head(16).into_iter().chain((0..u64::from(count)).map(|i| at.wrapping_add(i) as u8)).collect())
            }
            Step::Write { at, count } => {
                if count == 0 || at.checked_add(u64::from(count) - 1).is_none() {
                    return Err(Errno::INVAL);
                }
                self.call(format!("write 0 {at:#x} {count}")).map(|()| head(16))
            }
            Step::Multi { writes, bad } => {
                if bad.is_some_and(|bad| bad < writes) {
                    return Err(Errno::INVAL);
                }
                let mut done = 0_u64;
                for n in 0..writes {
                    match self.call(format!("write 0 {:#x} {}", u64::from(n) * 8, n % 8 + 1)) {
                        Ok(()) => done += 1,
                        Err(errno) if done == 0 => return Err(errno),
                        Err(_) => break,
                    }
                }
                Ok(done.to_le_bytes().to_vec())
            }
            Step::Irqs { count: 0, .. } => Err(Errno::INVAL),
            Step::Irqs { start, count, .. } => {
                self.call(format!("irqs 2 {start}+{count} Trigger, {fds} fds"))?;
                self.kept += fds;
                Ok(vec![])
            }
            Step::Disable => self.call("irqs 2 0+0 Trigger, 0 fds".into()).map(|()| vec![]),
            Step::Reset { extra: 0 } => self.call("reset".into()).map(|()| vec![]),
            Step::Reset { .. } => Err(Errno::INVAL),
            Step::State(number) => {
                let name = match number {
                    1 => "Stop",
                    2 => "Running",
                    3 => "StopCopy",
                    4 => "Resuming",
                    6 => "PreCopy",
                    _ => return Err(Errno::INVAL),
                };
                self.call(format!("to {name}")).map(|()| payload.to_vec())
            }
            Step::Save { size: 0 } => Err(Errno::INVAL),
            Step::Save { size } if size > DATA_XFER_MAX => Err(Errno::TOOBIG),
            // Nothing is left to be saved.
            Step::Save { size } => self.call(format!("save {size}")).map(|()| words(&[8, 0])),
            Step::Unknown { .. } => Err(Errno::NOSYS),
            Step::Answer { .. } => unreachable!("no request"),
        }
    }
}

/// Command, payload and descriptors of a request.
fn encoded(step: &Step) -> (u16, Vec<u8>, usize) {
    let longs = |numbers: &[u64]| -> Vec<u8> { numbers.iter().flat_map(|number| number.to_le_bytes()).collect() };
    let region = |at: u64, count: u32, data: &[u8]| [&longs(&[at])[..], &words(&[0, count]), data].concat();
    match *step {
        Step::Map { page, count, fd } => {
            (2, [words(&[32, 3]), longs(&[0, page << 12, count << 12])].concat(), usize::from(fd))
        }
        Step::Unmap { page, count } => (3, [words(&[24, 0]), longs(&[page << 12, count << 12])].concat(), 0),
        Step::UnmapAll => (3, words(&[24, 2, 0, 0, 0, 0]), 0),
        Step::Read { at, count } => (9, region(at, count, &[]), 0),
        Step::Write { at, count } => (10, region(at, count.into(), &vec![1; count.into()]), 0),
        Step::Multi { writes, bad } => {
            let mut payload = longs(&[writes.into()]);
            for n in 0..writes {
                let count = if bad == Some(n) { 9 } else { u32::from(n) % 8 + 1 };
                payload.extend(region(u64::from(n) * 8, count, &[n; 8]));
            }
            (15, payload, 0)
        }
        Step::Irqs { start, count, fds } => {
            (8, words(&[20, 0x24, 2, start, count]), if fds { count as usize } else { 0 })
        }
        Step::Disable => (8, words(&[20, 0x21, 2, 0, 0]), 0),
        Step::Reset { extra } => (13, vec![0; extra.into()], 0),
        Step::State(number) => (16, words(&[16, 2 | 1 << 17, number, 0]), 0),
        Step::Save { size } => (17, words(&[size.saturating_add(8), size]), 0),
        Step::Unknown { command, length } => (command, vec![0x5a; length.into()], 0),
        Step::Answer { .. } => unreachable!("no request"),
    }
}

/// The bytes of a stream, and where in it descriptors come: begin and end of their message, and how many.
type Stream = (Vec<u8>, VecDeque<(usize, usize, usize)>);

/// What is sent of it all, and what must come back: id, command and outcome of each reply.
fn played(model: &mut Model, steps: &Steps, asked: &[(Ticket, Vec<u8>)]) -> (Stream, Vec<(u16, u16, Outcome)>) {
    let (mut bytes, mut fds, mut expected) = (Vec::new(), VecDeque::new(), Vec::new());
    for (number, (step, no_reply)) in steps.iter().enumerate() {
        if let Step::Answer { which, errno, id_off } = *step {
            let question = &asked[which].1;
            let id = u16::from_le_bytes([question[0], question[1]]) ^ id_off;
            let count = question[24];
            let data = if errno == 0 { [&question[16..32], &vec![which as u8; count.into()]].concat() } else { vec![] };
            let flags = if errno == 0 { 1 } else { 0x21 };
            bytes.extend(words(&[11 << 16 | u32::from(id), 16 + data.len() as u32, flags, errno]));
            bytes.extend(&data);
            if id_off == 0 {
                let outcome =
                    if errno == 0 { Ok(data[16..].to_vec()) } else { Err(Errno::from_raw_os_error(errno as i32)) };
                // The second one answers nothing.
                model.answers[which].get_or_insert(outcome);
            }
            continue;
        }
        let (command, payload, count) = encoded(step);
        let begin = bytes.len();
        bytes.extend(request(number as u16, command, *no_reply, &payload));
        if count > 0 {
            fds.push_back((begin, bytes.len(), count));
        }
        let outcome = model.serve(step, &payload, count);
        if !no_reply {
            expected.push((number as u16, command, outcome));
        }
    }
    ((bytes, fds), expected)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    /// spec: VFU-5
    /// spec: VFU-13
    /// spec: VFU-41
    #[test]
    fn any_requests_cut_anywhere_are_what_a_naive_model_says(
        steps in prop::collection::vec((step(), prop::bool::weighted(0.2)), 1..60),
        cuts in prop::collection::vec(prop_oneof![3 => 1_usize..40, 1 => 1_usize..5000], 1..40),
        fails in 0_usize..30,
    ) {
        let open = AtomicUsize::new(0);
        let mut bench = Bench::fresh(&open);
        prop_assert_eq!(bench.ask(&version(0, 1, CONFIGURED), 0).errno(), None);
        bench.device.fails = (fails > 0).then_some((fails, Errno::IO));
        let mut asked = Vec::new();
        for number in 0..ASKED as u32 {
            let mut out = Vec::new();
            let ticket = bench.session.dma_read(u64::from(number) << 12, number * 9 + 1, &mut out).unwrap();
            asked.push((ticket, out));
        }
        let mut model = Model { fails, answers: vec![None; ASKED], ..Model::default() };
        let ((bytes, mut fds), expected) = played(&mut model, &steps, &asked);

        let (mut at, mut answers) = (0, Vec::new());
        for cut in cuts.iter().cycle() {
            // The kernel ends a receive behind the message that carries descriptors.
            let most = fds.front().map_or(bytes.len(), |(_, end, _)| *end);
            let to = (at + cut).min(most);
            let brought = match fds.front() {
                Some((begin, _, count)) if to > *begin => *count,
                _ => 0,
            };
            bench.receive(&bytes[at..to], brought).unwrap();
            if brought > 0 {
                fds.pop_front();
            }
            at = to;
            if cut % 2 == 0 || at == bytes.len() {
                let (more, closed) = bench.serve();
                prop_assert_eq!(closed, None);
                answers.extend(more);
            }
            if at == bytes.len() {
                break;
            }
        }

        let outcome = |answer: &Answer| answer.errno().map_or_else(|| Ok(answer.payload.clone()), Err);
        let got: Vec<_> = answers.iter().map(|answer| (answer.header.id, answer.header.command, outcome(answer))).collect();
        prop_assert_eq!(got, expected);
        prop_assert_eq!(bench.calls(), model.calls);
        prop_assert_eq!(bench.maps.lock().unwrap().len(), model.maps.len());
        for ((ticket, _), answer) in asked.iter().zip(&model.answers) {
            prop_assert_eq!(&bench.session.take_reply(*ticket), answer);
        }
        prop_assert_eq!(bench.device.irq_fds.len(), model.kept);
        prop_assert_eq!(open.load(Ordering::SeqCst), model.kept, "the others are closed");
    }
}
