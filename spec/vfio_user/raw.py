"""A vfio-user client of bare bytes: what a test sends is what goes out.

Written from the protocol's text and from spec/vfio-user.md, and on purpose without a look at the host's own wire code: what both
get wrong in the same way would be seen by nobody. Every wait is bounded; a server that does not answer is a failure, not a hang.
"""

import array
import errno
import json
import mmap
import os
import socket
import struct
import time

# Commands.
VERSION, DMA_MAP, DMA_UNMAP, GET_INFO, REGION_INFO, REGION_IO_FDS, IRQ_INFO, SET_IRQS = range(1, 9)
REGION_READ, REGION_WRITE, DMA_READ, DMA_WRITE, RESET = range(9, 14)
WRITE_MULTI, DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE = range(15, 19)

# Header flags.
COMMAND, REPLY, NO_REPLY, ERROR = 0, 1, 1 << 4, 1 << 5

# DMA_MAP and DMA_UNMAP.
READ, WRITE = 1, 2
GET_DIRTY, ALL = 1, 2

# Limits of spec/vfio-user.md.
HEADER = 16
MESSAGE_MAX = 1048608
FIRST_MESSAGE_MAX = 8212
VERSION_DATA_MAX = 8192
DATA_MAX = 1 << 20
FDS_MAX = 64
WAITING_MAX = 4096
MAPS_MAX = 65535
VECTORS_MAX = 2048
WRITES_MAX = 1024
RANGES_MAX = 1024
BITMAP_MAX = 1 << 20

PAGE = 4096
# Facts: QEMU gives up on a reply after five seconds.
PATIENCE = 5.0
CONFIG = 7


class Closed(Exception):
    """The server ended the connection."""


class Message:
    """One message as it came: header fields, payload, descriptors (closed by `close` or by the client's end)."""

    def __init__(self, header, payload, fds):
        self.id, self.cmd, self.size, self.flags, self.errno = struct.unpack("<HHIII", header)
        self.payload = payload
        self.fds = fds

    @property
    def is_reply(self):
        return self.flags & 0xF == REPLY

    @property
    def is_error(self):
        return bool(self.flags & ERROR)

    def __repr__(self):
        name = errno.errorcode.get(self.errno, self.errno) if self.errno else "ok"
        return f"<cmd {self.cmd} id {self.id} size {self.size} flags {self.flags:#x} {name} fds {len(self.fds)}>"


def message(cmd, payload=b"", flags=COMMAND, id=1, size=None, err=0):
    """A message's bytes; `size` lies about its length."""
    size = HEADER + len(payload) if size is None else size
    return struct.pack("<HHIII", id, cmd, size, flags, err) + payload


def version(minor=1, capabilities=None, major=0, data=None):
    """The payload of a VERSION; `data` replaces the JSON."""
    if data is None:
        data = json.dumps({"capabilities": capabilities or {}}).encode() + b"\0"
    return struct.pack("<HH", major, minor) + data


def dma_map(iova, size, flags=READ | WRITE, offset=0, argsz=32):
    return struct.pack("<IIQQQ", argsz, flags, offset, iova, size)


def dma_unmap(iova, size, flags=0, argsz=24):
    return struct.pack("<IIQQ", argsz, flags, iova, size)


def region_read(region, offset, count):
    return struct.pack("<QII", offset, region, count)


def region_write(region, offset, data, count=None):
    return struct.pack("<QII", offset, region, len(data) if count is None else count) + data


def set_irqs(flags, index, start, count, data=b"", argsz=None):
    return struct.pack("<IIIII", 20 + len(data) if argsz is None else argsz, flags, index, start, count) + data


def feature(flags, data=b"", argsz=None):
    return struct.pack("<II", 8 + len(data) if argsz is None else argsz, flags) + data


class Client:
    """One connection. Requests of the server are kept aside, or given to `serve` where one is set."""

    def __init__(self, path, patience=PATIENCE):
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(patience)
        deadline = time.monotonic() + patience
        while True:
            try:
                self.sock.connect(path)
                break
            except BlockingIOError:
                # The backlog is full for a moment.
                if time.monotonic() >= deadline:
                    raise
                time.sleep(0.001)
        self.patience = patience
        self.buffer = b""
        self.fds = []
        self.next_id = 1
        self.requests = []
        self.serve = None
        self.negotiated = None

    # -- bytes --

    def send_raw(self, data, fds=()):
        """All of `data`; descriptors go with its first byte."""
        sent = 0
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = self.sock.sendmsg([data], rights)
        if sent < len(data):
            self.sock.sendall(memoryview(data)[sent:])

    def _more(self, deadline):
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError(f"no message within {self.patience} s; {len(self.buffer)} bytes of one")
        self.sock.settimeout(left)
        try:
            data, ancillary, _flags, _address = self.sock.recvmsg(1 << 20, socket.CMSG_SPACE(253 * 4))
        except socket.timeout:
            raise TimeoutError(f"no message within {self.patience} s; {len(self.buffer)} bytes of one") from None
        except (ConnectionResetError, BrokenPipeError):
            raise Closed() from None
        finally:
            self.sock.settimeout(self.patience)
        for level, kind, content in ancillary:
            assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
            fds = array.array("i")
            fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
            self.fds.extend(fds)
        if not data:
            raise Closed()
        self.buffer += data

    def recv_any(self, patience=None):
        """The next message, whichever it is."""
        deadline = time.monotonic() + (self.patience if patience is None else patience)
        while len(self.buffer) < HEADER:
            self._more(deadline)
        size = struct.unpack_from("<I", self.buffer, 4)[0]
        # A reply with the longest bitmap has more fields before it than the longest data.
        assert HEADER <= size <= MESSAGE_MAX + 24, f"the server says that its message has {size} bytes"
        while len(self.buffer) < size:
            self._more(deadline)
        got = Message(self.buffer[:HEADER], self.buffer[HEADER:size], self.fds)
        self.buffer, self.fds = self.buffer[size:], []
        return got

    def recv(self):
        """The next reply. Requests on the way are served, or kept in `requests`."""
        while True:
            got = self.recv_any()
            if got.is_reply:
                return got
            assert got.flags & 0xF == COMMAND and got.cmd in (DMA_READ, DMA_WRITE), got
            if self.serve is None:
                self.requests.append(got)
            else:
                self.serve(self, got)

    def recv_request(self, patience=None):
        """The next request of the server; no reply may come before it."""
        if self.requests:
            return self.requests.pop(0)
        got = self.recv_any(patience)
        assert not got.is_reply, f"a reply where a request was expected: {got}"
        return got

    # -- requests --

    def send(self, cmd, payload=b"", fds=(), flags=COMMAND, id=None, size=None):
        if id is None:
            id, self.next_id = self.next_id, self.next_id % 0xFFFF + 1
        self.send_raw(message(cmd, payload, flags, id, size), fds)
        return id

    def call(self, cmd, payload=b"", fds=(), flags=COMMAND):
        """A request and its reply, of which everything that is in every reply has been looked at."""
        id = self.send(cmd, payload, fds, flags)
        return self.reply(cmd, id)

    def reply(self, cmd, id):
        got = self.recv()
        assert (got.id, got.cmd) == (id, cmd), got
        if got.is_error:
            # spec: VFU-12
            assert got.flags == REPLY | ERROR and got.errno != 0 and got.size == HEADER and not got.fds, got
        else:
            assert got.flags == REPLY and got.errno == 0, got
        return got

    def ok(self, cmd, payload=b"", fds=(), flags=COMMAND):
        """The payload of a reply that is no error."""
        got = self.call(cmd, payload, fds, flags)
        assert not got.is_error, f"{got} to {cmd} {payload[:64].hex()}"
        assert not got.fds, got
        return got.payload

    def fails(self, err, cmd, payload=b"", fds=(), flags=COMMAND):
        """The request is refused with this errno, or one of these; the connection lives."""
        got = self.call(cmd, payload, fds, flags)
        wanted = err if isinstance(err, (tuple, set, list)) else (err,)
        names = [errno.errorcode[e] for e in wanted]
        assert got.is_error and got.errno in wanted, f"{got}, not {names}, to {cmd} {payload[:64].hex()}"
        return got

    def alive(self):
        """The stream is in step, and the server serves."""
        id = self.send(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0))
        got = self.reply(GET_INFO, id)
        assert not got.is_error and len(got.payload) == 16, got

    def closed(self):
        """The server ends the connection, and says nothing more."""
        try:
            extra = self.recv_any()
        except Closed:
            return
        raise AssertionError(f"{extra} where the connection should have ended")

    def hello(self, minor=1, capabilities=None):
        """VERSION as it should be; the capabilities of the reply."""
        offered = {"max_msg_fds": 16, "write_multiple": True} if capabilities is None else capabilities
        payload = self.ok(VERSION, version(minor, offered))
        major, got_minor = struct.unpack_from("<HH", payload)
        assert (major, got_minor) == (0, minor)
        self.negotiated = json.loads(payload[4:].rstrip(b"\0") or b"{}").get("capabilities", {})
        return self.negotiated

    # -- what many tests do --

    def read(self, region, offset, count):
        payload = self.ok(REGION_READ, region_read(region, offset, count))
        assert struct.unpack_from("<QII", payload) == (offset, region, count) and len(payload) == 16 + count
        return payload[16:]

    def write(self, region, offset, data, flags=COMMAND):
        if flags & NO_REPLY:
            self.send(REGION_WRITE, region_write(region, offset, data), flags=flags)
            return
        payload = self.ok(REGION_WRITE, region_write(region, offset, data))
        assert payload == struct.pack("<QII", offset, region, len(data))

    def read32(self, region, offset):
        return struct.unpack("<I", self.read(region, offset, 4))[0]

    def write32(self, region, offset, value, flags=COMMAND):
        self.write(region, offset, struct.pack("<I", value), flags)

    def write64(self, region, offset, value):
        self.write(region, offset, struct.pack("<Q", value))

    def bus_master(self, on=True):
        command = self.read(CONFIG, 4, 1)[0]
        self.write(CONFIG, 4, bytes([command | 4 if on else command & ~4]))

    def map(self, iova, size, fd=None, flags=READ | WRITE, offset=0):
        self.ok(DMA_MAP, dma_map(iova, size, flags, offset), () if fd is None else (fd,))

    def unmap(self, iova, size):
        payload = self.ok(DMA_UNMAP, dma_unmap(iova, size))
        assert payload == dma_unmap(iova, size)

    def region(self, index, argsz=4096):
        """A region's info and whatever descriptors came with it."""
        got = self.call(REGION_INFO, struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0))
        assert not got.is_error, got
        return Region(got.payload), got.fds

    def close(self):
        for fd in self.fds:
            os.close(fd)
        self.fds = []
        self.sock.close()


class Region:
    """A region info's fixed part, and its capabilities by id."""

    READ, WRITE, MMAP, CAPS = 1, 2, 4, 8
    SPARSE, TYPE, MSIX_MAPPABLE = 1, 2, 3

    def __init__(self, payload):
        self.payload = payload
        self.argsz, self.flags, self.index, self.cap_offset, self.size, self.offset = struct.unpack_from("<IIIIQQ", payload)
        self.capabilities = {}
        # A head without its chain says where that would be.
        at, seen = self.cap_offset if len(payload) >= self.argsz else 0, set()
        while at:
            assert at % 8 == 0 and 32 <= at <= len(payload) - 8 and at not in seen, "a chain that cannot be walked"
            seen.add(at)
            id, _version, following = struct.unpack_from("<HHI", payload, at)
            self.capabilities[id] = at
            at = following

    def areas(self):
        """The sparse areas, or None without that capability."""
        at = self.capabilities.get(self.SPARSE)
        if at is None:
            return None
        count = struct.unpack_from("<I", self.payload, at + 8)[0]
        return [struct.unpack_from("<QQ", self.payload, at + 16 + 16 * i) for i in range(count)]


class Memory:
    """A memfd and its mapping, as a client's RAM. `sealed` against shrinking, as a careful VMM's would be."""

    def __init__(self, size, sealed=True):
        self.fd = os.memfd_create("test-ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size)
        if sealed:
            import fcntl
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
        self.view = mmap.mmap(self.fd, size)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.view.close()
        os.close(self.fd)


class EventFd:
    """An eventfd that does not block."""

    def __init__(self):
        self.fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def count(self, patience=0.0):
        """What it was signalled since the last look, waiting for the first as long as `patience`."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return os.eventfd_read(self.fd)
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    return 0
                time.sleep(0.002)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.close(self.fd)


class Edu:
    """Registers of the edu device (BAR0); its DMA takes 100 ms."""

    BAR, BUFFER = 0, 0x40000
    RUN, TO_RAM, IRQ = 1, 2, 4
    DONE_IRQ = 0x100

    @staticmethod
    def start(client, source, destination, count, command, flags=COMMAND):
        for offset, value in ((0x80, source), (0x88, destination), (0x90, count), (0x98, Edu.RUN | command)):
            client.write(0, offset, struct.pack("<Q", value), flags)

    @staticmethod
    def wait(client, patience=PATIENCE):
        deadline = time.monotonic() + patience
        while client.read32(0, 0x98) & Edu.RUN:
            assert time.monotonic() < deadline, "the DMA does not end"
            time.sleep(0.005)

    @staticmethod
    def from_ram(client, iova, count, at=0):
        Edu.start(client, iova, Edu.BUFFER + at, count, 0)
        Edu.wait(client)

    @staticmethod
    def to_ram(client, iova, count, at=0):
        Edu.start(client, Edu.BUFFER + at, iova, count, Edu.TO_RAM)
        Edu.wait(client)


class Stateful:
    """Registers of sim:stateful (BAR0), and its memory (BAR2)."""

    BAR, MEMORY_BAR, MEMORY_SIZE = 0, 2, 64 << 10
    ID, DOORBELLS, TARGET, LENGTH, PATTERN, DOORBELL, IRQ_ENABLE = 0x00, 0x04, 0x08, 0x10, 0x14, 0x18, 0x1C
    ID_VALUE = 0x010057A7

    @staticmethod
    def ring(client, target, length, pattern, flags=COMMAND):
        client.write64(0, Stateful.TARGET, target)
        client.write32(0, Stateful.LENGTH, length)
        client.write32(0, Stateful.PATTERN, pattern)
        client.write32(0, Stateful.DOORBELL, 1, flags)

    @staticmethod
    def filled(pattern, number, length):
        """What doorbell `number` writes."""
        return struct.pack("<I", (pattern + number) & 0xFFFFFFFF) * (length // 4)


class Guest:
    """Answers the server's DMA requests from a bytearray that begins at `base`, and remembers them."""

    def __init__(self, base, size):
        self.base, self.memory, self.seen = base, bytearray(size), []

    def __call__(self, client, request):
        address, count = struct.unpack_from("<QQ", request.payload)
        self.seen.append((request.cmd, address, count))
        at = address - self.base
        assert 0 <= at and at + count <= len(self.memory), f"DMA outside the memory: {address:#x}+{count:#x}"
        head = struct.pack("<QQ", address, count)
        if request.cmd == DMA_READ:
            assert len(request.payload) == 16
            answer = head + bytes(self.memory[at : at + count])
        else:
            assert len(request.payload) == 16 + count
            self.memory[at : at + count] = request.payload[16:]
            answer = head
        if not request.flags & NO_REPLY:
            client.send_raw(message(request.cmd, answer, REPLY, request.id))
