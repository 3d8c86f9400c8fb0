//! The other end of the control socket: for the commands, and for programs that embed or drive a host.

use std::io;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::line::{LineError, Lines};
use super::protocol::{
    Failure, Power, PowerAction, Progress, RESPONSE_MAX, Report, Request, RequestLine, Response, ResponseLine, Run,
    Status, VERSION,
};

/// A host that is busy answers within moments; one that follows a job gives a sign of life every second.
const PATIENCE: Duration = Duration::from_secs(30);

/// Why a request got no answer, or not the one hoped for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no host answers at {}: {source}; start one with `vfio-mediate run`, or name its socket with --control", .path.display())]
    NoHost { path: PathBuf, source: io::Error },
    /// The host said no.
    #[error(transparent)]
    Failure(#[from] Failure),
    /// The connection ended or what came was no answer.
    #[error("the host at {}: {what}", .path.display())]
    Broken { path: PathBuf, what: String },
}

/// A connection to a host.
#[derive(Debug)]
pub struct Client {
    lines: Lines,
    path: PathBuf,
}

impl Client {
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream =
            UnixStream::connect(path).map_err(|source| ClientError::NoHost { path: path.to_owned(), source })?;
        Ok(Self { lines: Lines::new(stream, RESPONSE_MAX), path: path.to_owned() })
    }

    pub fn status(&mut self) -> Result<Status, ClientError> {
        self.send(Request::Status {})?;
        match self.receive()? {
            Response::Status(status) => Ok(*status),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Migrates the guest to another host. Returns when it runs there, or when the migration has failed.
    pub fn migrate(
        &mut self,
        to: &str,
        insecure: bool,
        progress: impl FnMut(&Progress),
    ) -> Result<Report, ClientError> {
        self.migrate_with(Request::Migrate { to: to.to_owned(), insecure, verify: false }, progress)
    }

    /// As [`Self::migrate`], with a request of the caller's making.
    pub fn migrate_with(
        &mut self,
        request: Request,
        mut progress: impl FnMut(&Progress),
    ) -> Result<Report, ClientError> {
        self.send(request)?;
        loop {
            match self.receive()? {
                Response::Progress(news) => progress(&news),
                Response::Migrated { report } => return Ok(*report),
                other => return Err(self.unexpected(&other)),
            }
        }
    }

    /// Asks for the migration under way to be given up.
    pub fn cancel(&mut self) -> Result<String, ClientError> {
        self.done(Request::Cancel {})
    }

    pub fn resolve(&mut self, id: &str, run: Run) -> Result<String, ClientError> {
        self.done(Request::Resolve { id: id.to_owned(), run })
    }

    /// Low power of one device.
    pub fn power(&mut self, device: &str, action: PowerAction) -> Result<Power, ClientError> {
        self.send(Request::Power { device: device.to_owned(), action })?;
        match self.receive()? {
            Response::Power(power) => Ok(power),
            other => Err(self.unexpected(&other)),
        }
    }

    /// Ends the host in good order.
    pub fn stop(&mut self, force: bool) -> Result<String, ClientError> {
        self.done(Request::Stop { force })
    }

    fn done(&mut self, request: Request) -> Result<String, ClientError> {
        self.send(request)?;
        match self.receive()? {
            Response::Done { note } => Ok(note),
            other => Err(self.unexpected(&other)),
        }
    }

    fn send(&mut self, request: Request) -> Result<(), ClientError> {
        let line = RequestLine { version: VERSION, request };
        let mut text = serde_json::to_vec(&line).map_err(|error| self.broken(error.to_string()))?;
        text.push(b'\n');
        self.lines.send(&text, PATIENCE).map_err(|error| self.broken(error.to_string()))
    }

    /// The next response; an error that the host tells is an error.
    fn receive(&mut self) -> Result<Response, ClientError> {
        let line = self.lines.next(Some(Instant::now() + PATIENCE)).map_err(|error| match error {
            LineError::TimedOut => self.broken(format!("no answer within {} s", PATIENCE.as_secs())),
            error => self.broken(error.to_string()),
        })?;
        let line = line.ok_or_else(|| self.broken("the connection ended before an answer".to_owned()))?;
        let line: ResponseLine = serde_json::from_slice(&line).map_err(|error| self.broken(error.to_string()))?;
        match line.response {
            Response::Error(failure) => Err(failure.into()),
            response => Ok(response),
        }
    }

    fn broken(&self, what: String) -> ClientError {
        ClientError::Broken { path: self.path.clone(), what }
    }

    fn unexpected(&self, response: &Response) -> ClientError {
        let kind = match response {
            Response::Status(_) => "a status",
            Response::Power(_) => "a power state",
            Response::Progress(_) => "progress",
            Response::Migrated { .. } => "a report",
            Response::Done { .. } => "a confirmation",
            Response::Error(_) => "an error",
        };
        self.broken(format!("answered with {kind}, which is no answer to this request"))
    }
}
