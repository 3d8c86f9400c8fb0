//! The real binary, run as an operator runs it.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// How long a process may take that has to do something.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// What one run said.
#[derive(Debug)]
pub struct Said {
    pub code: i32,
    pub out: String,
    pub err: String,
}

impl Said {
    pub fn of(output: Output) -> Self {
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
        Self { code: output.status.code().unwrap_or(-1), out: text(output.stdout), err: text(output.stderr) }
    }

    pub fn json(&self) -> Value {
        let last = self.out.lines().last().unwrap_or_default();
        serde_json::from_str(last).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vfio-mediate"));
    command.args(arguments).stdin(Stdio::null()).env_remove("VFIO_MEDIATE_LOG");
    // The machine's own width and folders must not matter.
    command.env("COLUMNS", "110").env_remove("XDG_RUNTIME_DIR").env_remove("XDG_STATE_HOME");
    command
}

pub fn run(arguments: &[&str]) -> Said {
    Said::of(command(arguments).output().unwrap())
}

/// The edu plug-in, built into this build's own target directory.
pub fn plugin() -> PathBuf {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap();
    let built = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "-p", "vfio-mediate-plugin-edu", "--target-dir"])
        .arg(target)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .status()
        .unwrap();
    assert!(built.success());
    target.join("debug/libvfio_mediate_plugin_edu.so")
}

/// A host process. Killed when dropped.
pub struct Host {
    pub child: Child,
    pub folder: tempfile::TempDir,
    /// The line that said that it is ready
    pub ready: Value,
}

impl Host {
    /// Starts `run` with a control socket and a state folder of its own.
    pub fn start(arguments: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        Self::start_in(folder, arguments)
    }

    pub fn start_in(folder: tempfile::TempDir, arguments: &[&str]) -> Self {
        let (socket, state) = (folder.path().join("control.sock"), folder.path().join("state"));
        let given = arguments.contains(&"--memory") || arguments.contains(&"--socket");
        let memory = if given { &[][..] } else { &["--memory", "4M"] };
        let mut child = command(&["run", "--json"])
            .args(memory)
            .args(["--control".as_ref(), socket.as_os_str(), "--state-dir".as_ref(), state.as_os_str()])
            .args(arguments)
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        Self { child, folder, ready: ready["ready"].clone() }
    }

    pub fn socket(&self) -> String {
        self.folder.path().join("control.sock").display().to_string()
    }

    pub fn listen(&self) -> String {
        self.ready["listen"].as_str().unwrap().to_owned()
    }

    /// A command to this host.
    pub fn ask(&self, arguments: &[&str]) -> Said {
        let socket = self.socket();
        run(&[arguments, &["--control", &socket]].concat())
    }

    /// Waits for the process to end, and says with which code.
    pub fn ended(mut self) -> (i32, tempfile::TempDir) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                let folder = std::mem::replace(&mut self.folder, tempfile::tempdir().unwrap());
                return (status.code().unwrap_or(-1), folder);
            }
            assert!(Instant::now() < deadline, "the host did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // Ended already, or nobody needs it any more.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
