//! The control socket against clients that mean well, and against those that do not.

use std::io::{Read, Write};
use std::sync::atomic::{AtomicU32, Ordering};

use super::super::client::{Client, ClientError};
use super::super::protocol::{Progress, Run};
use super::*;

/// Counts what reached it; follows a job for `migrate`.
#[derive(Debug, Default)]
struct Fake {
    answered: AtomicU32,
    stopped: Arc<AtomicU32>,
    job: Arc<Job>,
}

impl Service for Fake {
    fn answer(&self, request: Request) -> Answer {
        self.answered.fetch_add(1, Ordering::SeqCst);
        let done = |note: &str| Response::Done { note: note.to_owned() };
        match request {
            Request::Migrate { .. } => Answer::Follow(Arc::clone(&self.job)),
            Request::Stop { .. } => {
                let stopped = Arc::clone(&self.stopped);
                let then = move || {
                    stopped.fetch_add(1, Ordering::SeqCst);
                };
                Answer::Then(done("stopping"), Box::new(then))
            }
            Request::Resolve { run: Run::There, .. } => {
                Answer::Now(Response::Error(Failure::new(FailureCode::InDoubt, "still in doubt")))
            }
            Request::Status {}
            | Request::Cancel {}
            | Request::Power { .. }
            | Request::Resolve { run: Run::Here, .. } => Answer::Now(done("yes")),
        }
    }
}

struct Served {
    folder: tempfile::TempDir,
    fake: Arc<Fake>,
    server: Server,
}

const DONE: &str = "{\"version\":1,\"response\":{\"kind\":\"done\",\"note\":\"yes\"}}\n";

const QUICK: Patience = Patience {
    request: Duration::from_millis(100),
    response: Duration::from_millis(200),
    silence: Duration::from_millis(10),
};

fn serve_with(patience: Patience) -> Served {
    let folder = tempfile::tempdir().unwrap();
    let fake = Arc::new(Fake::default());
    let server = Server::start(&folder.path().join("s/control.sock"), fake.clone(), patience).unwrap();
    Served { folder, fake, server }
}

impl Served {
    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.server.path()).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream
    }

    /// Everything the server says to these bytes until it closes.
    fn told(&self, bytes: &[u8]) -> String {
        let mut stream = self.raw();
        // The server may close before it has read everything.
        let _ = stream.write_all(bytes);
        let _ = stream.shutdown(Shutdown::Write);
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer);
        String::from_utf8(answer).unwrap()
    }

    fn still_serves(&self) {
        assert_eq!(Client::connect(self.server.path()).unwrap().cancel().unwrap(), "yes");
    }
}

/// spec: CONTROL-10
#[test]
fn the_socket_is_for_its_owner_and_root_alone() {
    let served = serve_with(QUICK);
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(served.server.path()), 0o600);
    assert_eq!(mode(served.server.path().parent().unwrap()), 0o700);
    for (peer, own, may) in [(1000, 1000, true), (0, 1000, true), (1001, 1000, false), (1000, 0, false), (0, 0, true)] {
        assert_eq!(may_command(peer, own), may, "{peer} {own}");
    }
}

/// spec: CONTROL-11
#[test]
fn requests_are_answered_in_order_on_one_connection() {
    let served = serve_with(QUICK);
    let line = "{\"version\":1,\"request\":{\"kind\":\"cancel\"}}\n";
    let told = served.told(line.repeat(3).as_bytes());
    assert_eq!(told, DONE.repeat(3));
}

/// spec: CONTROL-12
#[test]
fn garbage_is_answered_and_the_next_line_is_served() {
    let served = serve_with(QUICK);
    let good = "{\"version\":1,\"request\":{\"kind\":\"cancel\"}}\n";
    for garbage in [
        &b"\n"[..],
        b"{}\n",
        b"null\n",
        b"\xff\xfe\n",
        b"{\"version\":1}\n",
        b"{\"version\":1,\"request\":{\"kind\":\"format_disk\"}}\n",
        b"{\"version\":1,\"request\":{\"kind\":\"cancel\",\"force\":true}}\n",
        b"{\"version\":1,\"request\":{\"kind\":\"cancel\"},\"more\":1}\n",
        b"{\"version\":-1,\"request\":{\"kind\":\"cancel\"}}\n",
    ] {
        let told = served.told(&[garbage, good.as_bytes()].concat());
        let mut lines = told.lines();
        assert!(lines.next().unwrap().contains("\"bad_request\""), "{told}");
        assert!(lines.next().unwrap().contains("\"done\""), "{told}");
    }
    let nested = format!("{}\n{good}", "[".repeat(30_000));
    assert!(served.told(nested.as_bytes()).contains("\"done\""), "deep nesting is garbage, not a crash");
}

/// spec: CONTROL-13
#[test]
fn another_version_is_told_which_one_is_spoken() {
    let served = serve_with(QUICK);
    for version in [0, 2, u32::MAX] {
        let told = served.told(format!("{{\"version\":{version},\"request\":{{\"kind\":\"new\"}}}}\n").as_bytes());
        assert!(told.contains("\"code\":\"version\"") && told.contains("speaks version 1"), "{told}");
    }
    assert_eq!(served.fake.answered.load(Ordering::SeqCst), 0);
}

/// spec: CONTROL-14
#[test]
fn an_oversized_line_is_refused_and_the_connection_closed() {
    let served = serve_with(QUICK);
    let told = served.told(&vec![b' '; REQUEST_MAX + 1]);
    assert!(told.contains("longer than") && told.lines().count() == 1, "{told}");
    let mut fits = vec![b' '; REQUEST_MAX];
    let request = b"{\"version\":1,\"request\":{\"kind\":\"cancel\"}}";
    fits[..request.len()].copy_from_slice(request);
    fits[REQUEST_MAX - 1] = b'\n';
    assert!(served.told(&fits).contains("\"done\""));
}

/// spec: CONTROL-15
#[test]
fn a_client_that_sends_slowly_or_nothing_is_let_go() {
    let served = serve_with(QUICK);
    let mut silent = served.raw();
    let mut slow = served.raw();
    slow.write_all(b"{\"ver").unwrap();
    for stream in [&mut silent, &mut slow] {
        let mut told = String::new();
        stream.read_to_string(&mut told).unwrap();
        assert!(told.contains("no whole line in time"), "{told}");
    }
    served.still_serves();
}

#[test]
fn a_half_closed_client_gets_its_answer_and_a_cut_line_none() {
    let served = serve_with(QUICK);
    assert!(served.told(b"{\"version\":1,\"request\":{\"kind\":\"cancel\"}}\n").contains("\"done\""));
    assert!(served.told(b"{\"version\":1,\"request\":{\"kind\":\"cancel\"}}").contains("ended inside a line"));
    assert_eq!(served.told(b""), "");
    assert_eq!(served.fake.answered.load(Ordering::SeqCst), 1);
}

/// spec: CONTROL-16
#[test]
fn one_client_too_many_is_told_so_and_a_freed_place_is_given_again() {
    let served = serve_with(Patience { request: Duration::from_secs(30), ..QUICK });
    let mut held: Vec<UnixStream> = (0..CLIENTS_MAX).map(|_| served.raw()).collect();
    // Answered, hence admitted.
    for stream in &mut held {
        stream.write_all(b"{\"version\":1,\"request\":{\"kind\":\"cancel\"}}\n").unwrap();
        assert_eq!(stream.read(&mut [0; 512]).unwrap(), DONE.len());
    }
    let mut told = String::new();
    served.raw().read_to_string(&mut told).unwrap();
    assert!(told.contains("too_many_clients"), "{told}");
    drop(held.pop());
    let deadline = Instant::now() + Duration::from_secs(10);
    while Client::connect(served.server.path()).unwrap().cancel().is_err() {
        assert!(Instant::now() < deadline, "the place was not given again");
    }
}

/// spec: CONTROL-17
#[test]
fn progress_is_followed_to_the_end_and_a_client_that_leaves_is_noticed() {
    let served = serve_with(QUICK);
    let deserter = {
        let mut stream = served.raw();
        stream.write_all(b"{\"version\":1,\"request\":{\"kind\":\"migrate\",\"to\":\"x\"}}\n").unwrap();
        stream
    };
    let follower = {
        let path = served.server.path().to_owned();
        std::thread::spawn(move || {
            let mut rounds = Vec::new();
            let report = Client::connect(&path).unwrap().migrate("x", false, |news| rounds.push(news.round));
            (report, rounds)
        })
    };
    drop(deserter);
    let deadline = Instant::now() + Duration::from_secs(10);
    let followers = || served.server.shared.clients().connected.len();
    while followers() != 1 || served.fake.answered.load(Ordering::SeqCst) < 2 {
        assert!(Instant::now() < deadline, "the deserter was not noticed");
        std::thread::yield_now();
    }
    served.fake.job.tell(Progress { round: 7, ..Progress::default() });
    served.fake.job.end(Response::Migrated { report: Box::default() });
    let (report, rounds) = follower.join().unwrap();
    assert!(report.is_ok(), "{report:?}");
    assert_eq!(rounds.last(), Some(&7));
}

#[test]
fn a_follower_that_does_not_read_holds_up_nobody() {
    let served = serve_with(QUICK);
    let mut sleeper = served.raw();
    sleeper.write_all(b"{\"version\":1,\"request\":{\"kind\":\"migrate\",\"to\":\"x\"}}\n").unwrap();
    let begin = Instant::now();
    for round in 0..100_000 {
        served.fake.job.tell(Progress { round, ..Progress::default() });
    }
    assert!(begin.elapsed() < Duration::from_secs(5));
    served.still_serves();
}

#[test]
fn failures_keep_their_code() {
    let served = serve_with(QUICK);
    let error = Client::connect(served.server.path()).unwrap().resolve("0", Run::There).unwrap_err();
    assert!(matches!(&error, ClientError::Failure(failure) if failure.code == FailureCode::InDoubt), "{error}");
}

/// spec: CONTROL-18
#[test]
fn stop_is_confirmed_before_it_takes_effect() {
    let served = serve_with(QUICK);
    assert_eq!(Client::connect(served.server.path()).unwrap().stop(false).unwrap(), "stopping");
    let deadline = Instant::now() + Duration::from_secs(10);
    while served.fake.stopped.load(Ordering::SeqCst) == 0 {
        assert!(Instant::now() < deadline);
        std::thread::yield_now();
    }
}

/// spec: CONTROL-19
#[test]
fn two_hosts_do_not_share_a_path_and_a_dead_ones_socket_is_replaced() {
    let served = serve_with(QUICK);
    let path = served.server.path().to_owned();
    let again = Server::start(&path, Arc::new(Fake::default()), QUICK);
    assert!(matches!(again, Err(BindError::InUse { .. })), "{again:?}");
    served.still_serves();
    let Served { folder, server, .. } = served;
    drop(server);
    assert!(!path.exists(), "removed in good order");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "left over by a host that was killed");
    let server = Server::start(&path, Arc::new(Fake::default()), QUICK).unwrap();
    drop(server);
    std::fs::write(&path, "precious").unwrap();
    let refused = Server::start(&path, Arc::new(Fake::default()), QUICK);
    assert!(matches!(refused, Err(BindError::Io { .. })));
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
    drop(folder);
}

#[test]
fn dropping_the_server_cuts_its_clients() {
    let served = serve_with(Patience { request: Duration::from_secs(60), ..QUICK });
    let mut stream = served.raw();
    stream.write_all(b"{\"version\":1,\"request\":{\"kind\":\"cancel\"}}\n").unwrap();
    assert_eq!(stream.read(&mut [0; 512]).unwrap(), DONE.len());
    drop(served.server);
    assert_eq!(stream.read(&mut [0; 512]).unwrap(), 0);
}
