"""Starts real hosts, one for each kind of device, and looks after each test at what it has left behind.

VFIO_MEDIATE names the program (default: target/debug/vfio-mediate of this tree). Nothing is built here.
"""

import json
import os
import select
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from raw import RESET, Client, Closed

ROOT = Path(__file__).resolve().parents[2]
START_PATIENCE = 20.0
STOP_PATIENCE = 10.0
SETTLE_PATIENCE = 5.0


def program():
    path = Path(os.environ.get("VFIO_MEDIATE", ROOT / "target/debug/vfio-mediate"))
    if not path.exists():
        pytest.exit(f"{path} is not there: build it (cargo build -p vfio-mediate), or name it in VFIO_MEDIATE", 2)
    return str(path)


class Host:
    """One `vfio-mediate run`, and what is counted of it."""

    def __init__(self, devices, sockets=None, paths=None, pass_fds=(), config=None):
        self.ended = False
        self.folder = tempfile.TemporaryDirectory(prefix="vfu")
        folder = Path(self.folder.name)
        self.paths = paths or [str(folder / f"{n}.sock") for n in range(len(devices))]
        command = [program(), "run", "--json", "--control", str(folder / "control"), "--state-dir", str(folder / "state")]
        if config is None:
            for device, socket in zip(devices, sockets or self.paths):
                command += ["--device", device, "--socket", socket]
        else:
            # Lines of TOML that each device has besides its name and its socket.
            file = folder / "vm.toml"
            entries = zip(devices, self.paths)
            file.write_text("".join(f'[[devices]]\ndevice = "{device}"\nsocket = "{path}"\n{config}\n' for device, path in entries))
            command += ["--config", str(file)]
        self.log = open(folder / "stderr", "w+b")
        self.process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=self.log, pass_fds=pass_fds
        )
        self.ready = self._ready()
        self.settled = None

    @property
    def path(self):
        return self.paths[0]

    def _ready(self):
        deadline = time.monotonic() + START_PATIENCE
        line = b""
        while not line.endswith(b"\n"):
            left = max(0, deadline - time.monotonic())
            if not select.select([self.process.stdout], [], [], left)[0]:
                self.stop()
                pytest.fail(f"the host is not ready after {START_PATIENCE} s: {self.stderr()}")
            more = os.read(self.process.stdout.fileno(), 65536)
            if not more:
                self.process.wait()
                pytest.fail(f"the host ended before it was ready: {self.stderr()}")
            line += more
        return json.loads(line)["ready"]

    def stderr(self):
        self.log.flush()
        return Path(self.log.name).read_text(errors="replace")[-4000:]

    def proc(self, name):
        return Path(f"/proc/{self.process.pid}/{name}")

    def fds(self):
        names = {}
        for entry in os.listdir(self.proc("fd")):
            try:
                names[int(entry)] = os.readlink(self.proc("fd") / entry)
            except FileNotFoundError:
                pass
        return names

    def threads(self):
        return len(os.listdir(self.proc("task")))

    def maps(self):
        """Mappings of clients' memory."""
        return sum("test-ram" in line for line in self.proc("maps").read_text().splitlines())

    def memory_kib(self):
        for line in self.proc("status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")

    def counts(self):
        return {"fds": len(self.fds()), "threads": self.threads(), "maps": self.maps()}

    def warm_up(self):
        """What a host without a client has, once each device has had one."""
        for path in self.paths:
            client = Client(path)
            client.hello()
            client.alive()
            client.close()
        # The next client is answered when the last one's end has been dealt with.
        last = None
        deadline = time.monotonic() + SETTLE_PATIENCE
        same = 0
        while same < 20 and time.monotonic() < deadline:
            now = self.counts()
            same = same + 1 if now == last else 0
            last = now
            time.sleep(0.01)
        self.settled = last

    def check(self):
        """The host lives, and has no more than before the first client."""
        assert self.process.poll() is None, f"the host ended with {self.process.returncode}: {self.stderr()}"
        deadline = time.monotonic() + SETTLE_PATIENCE
        while True:
            now = self.counts()
            worse = {what: count for what, count in now.items() if count > self.settled[what]}
            if not worse:
                break
            assert time.monotonic() < deadline, f"left behind: {worse}, was {self.settled}; {self.fds()}"
            time.sleep(0.005)
        assert "panicked" not in self.stderr(), self.stderr()

    def stop(self):
        """Ends it by its own pid; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
                pytest.fail(f"the host does not end: {self.stderr()}")
        return self.process.returncode

    def close(self):
        code = self.stop()
        log = self.stderr()
        self.process.stdout.close()
        self.log.close()
        self.folder.cleanup()
        assert code == 0, f"exit code {code}: {log}"
        assert "panicked" not in log, log


def _host(*devices, **more):
    host = Host(list(devices), **more)
    host.warm_up()
    return host


@pytest.fixture(scope="session")
def edu_host():
    host = _host("sim:edu?dma_mask=0xffffffffffffffff")
    yield host
    host.check()
    host.close()


@pytest.fixture(scope="session")
def stateful_host():
    host = _host("sim:stateful")
    yield host
    host.check()
    host.close()


@pytest.fixture(scope="session")
def shared_host():
    """Its clients are trusted with the device's own file."""
    host = _host("sim:stateful", config="share_device_fd = true")
    yield host
    host.check()
    host.close()


@pytest.fixture
def start_host():
    """Starts a host of this test's own."""
    hosts = []

    def start(*devices, **more):
        hosts.append(_host(*devices, **more))
        return hosts[-1]

    yield start
    for host in hosts:
        if not host.ended:
            host.check()
        host.close()


class Connections:
    """Connects to hosts; closes what it made."""

    def __init__(self):
        self.clients = []
        self.hosts = []

    def __call__(self, host, hello=True, path=None, minor=1, capabilities=None, **more):
        client = Client(path or host.path, **more)
        self.clients.append(client)
        if host not in self.hosts:
            self.hosts.append(host)
        if hello:
            client.hello(minor, capabilities)
        return client

    def end(self):
        """Closes all, and looks at what the hosts keep."""
        for client in self.clients:
            client.close()
        for host in self.hosts:
            host.check()
        self.clients, self.hosts = [], []


@pytest.fixture
def connect():
    """Connects to a host; everything is closed when the test ends, and the hosts are looked at."""
    connections = Connections()
    yield connections
    connections.end()


@pytest.fixture
def fresh(edu_host, connect):
    """A connection to edu that has not said anything."""
    return connect(edu_host, hello=False)


@pytest.fixture(params=[0, 1], ids=["v0.0", "v0.1"])
def edu(request, edu_host, connect):
    """A client of edu, in either minor version."""
    return connect(edu_host, minor=request.param)


@pytest.fixture
def edu1(edu_host, connect):
    """A client of edu, version 0.1."""
    return connect(edu_host)


@pytest.fixture
def clean(stateful_host, connect):
    """After the test, and after its clients have gone, stateful is as after a reset."""
    yield
    connect.end()
    client = Client(stateful_host.path)
    try:
        client.hello()
        client.ok(RESET)
    except Closed as error:
        raise AssertionError("the next client is not served") from error
    finally:
        client.close()


@pytest.fixture(params=[0, 1], ids=["v0.0", "v0.1"])
def stateful(request, stateful_host, clean, connect):
    """A client of stateful, in either minor version; the device is as after a reset."""
    return connect(stateful_host, minor=request.param)


@pytest.fixture
def stateful1(stateful_host, clean, connect):
    return connect(stateful_host)
