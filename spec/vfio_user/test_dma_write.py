"""DMA_WRITE: the device's writes into memory that has no file."""

import errno
import struct

import pytest

from raw import (
    CONFIG, DMA_READ, DMA_WRITE, ERROR, GET_INFO, NO_REPLY, PAGE, REGION_READ, REGION_WRITE, REPLY, WAITING_MAX, Closed, Edu, Guest,
    Memory, Stateful, message, region_read, region_write,
)

BASE = 0x100000
GET = struct.pack("<IIII", 16, 0, 0, 0)


@pytest.fixture
def bell(stateful1):
    """A client of stateful whose memory has no file: a doorbell is DMA before its write is answered."""
    stateful1.map(BASE, 32 * PAGE)
    stateful1.bus_master()
    return stateful1


def rung(client, length=64, pattern=3):
    """Rings the doorbell; the id of that write, and the server's request."""
    client.write64(0, Stateful.TARGET, BASE)
    client.write32(0, Stateful.LENGTH, length)
    client.write32(0, Stateful.PATTERN, pattern)
    id = client.send(REGION_WRITE, region_write(0, Stateful.DOORBELL, b"\1\0\0\0"))
    request = client.recv_request()
    assert request.cmd == DMA_WRITE and not request.fds
    assert struct.unpack_from("<QQ", request.payload) == (BASE, length)
    assert request.payload[16:] == Stateful.filled(pattern, 1, length)
    return id, request


def taken(client, request, count_bytes=8):
    address, count = struct.unpack_from("<QQ", request.payload)
    head = struct.pack("<Q", address) + count.to_bytes(8, "little")[:count_bytes]
    client.send_raw(message(DMA_WRITE, head, REPLY, request.id))


@pytest.mark.parametrize("count_bytes", [8, 4])
def test_the_count_of_a_reply_has_eight_bytes_or_four(bell, count_bytes):
    """VFU-40"""
    id, request = rung(bell)
    taken(bell, request, count_bytes)
    assert not bell.reply(REGION_WRITE, id).is_error
    assert bell.read32(0, Stateful.DOORBELLS) == 1


@pytest.mark.parametrize("length", [4, 64, 4096, 65536])
def test_a_doorbell_of_any_length(stateful, length):
    """VFU-1: through messages, in both minor versions"""
    stateful.map(BASE, 32 * PAGE)
    stateful.bus_master()
    guest = stateful.serve = Guest(BASE, 32 * PAGE)
    Stateful.ring(stateful, BASE + 12, length, 0x1000)
    assert guest.memory[12 : 12 + length] == Stateful.filled(0x1000, 1, length)
    assert guest.memory[:12] == bytes(12) and not any(guest.memory[12 + length :])


def test_a_request_that_waits_for_dma_and_dma_that_waits_for_requests(bell):
    """VFU-41; facts: replies and requests told apart by type and id, or DMA deadlocks"""
    id, request = rung(bell)
    stream = b"".join(message(GET_INFO, GET, id=request.id) for _ in range(50))
    stream += message(REGION_WRITE, region_write(2, 0, b"with the same id and more data"), id=request.id)
    bell.send_raw(stream)
    taken(bell, request)
    assert not bell.reply(REGION_WRITE, id).is_error
    for _ in range(50):
        assert not bell.reply(GET_INFO, request.id).is_error
    assert not bell.reply(REGION_WRITE, request.id).is_error
    assert bell.read(2, 0, 4) == b"with"


def test_posted_doorbells(bell):
    """Without a reply to wait for, DMA comes all the same"""
    guest = bell.serve = Guest(BASE, 32 * PAGE)
    bell.write64(0, Stateful.TARGET, BASE)
    bell.write32(0, Stateful.LENGTH, 16)
    bell.write32(0, Stateful.PATTERN, 0)
    for _ in range(200):
        bell.write32(0, Stateful.DOORBELL, 1, NO_REPLY)
    assert bell.read32(0, Stateful.DOORBELLS) == 200
    assert guest.memory[:16] == Stateful.filled(0, 200, 16)


@pytest.mark.parametrize("err", [errno.EFAULT, errno.ENODEV, errno.ENOSYS, 0, 0xFFFFFFFF])
def test_an_answer_that_is_an_error(bell, err):
    """VFU-42, VFU-12"""
    id, request = rung(bell)
    bell.send_raw(message(DMA_WRITE, b"", REPLY | ERROR, request.id, err=err))
    bell.reply(REGION_WRITE, id)
    bell.alive()


@pytest.mark.parametrize(
    "payload",
    [
        b"", bytes(8), bytes(11), struct.pack("<QQ", BASE + 1, 64), struct.pack("<QQ", BASE, 63), struct.pack("<QQ", BASE, 65),
        struct.pack("<QQ", BASE, 0), struct.pack("<QI", BASE, 63), struct.pack("<QI", BASE, 0), struct.pack("<QQ", BASE, 64) + b"x",
        struct.pack("<QQ", BASE, 64 | 1 << 32), struct.pack("<QQ", BASE, 64) + bytes(64),
    ],
)
def test_an_answer_of_something_else_ends_the_connection(stateful_host, connect, bell, payload):
    """VFU-43"""
    id, request = rung(bell)
    bell.send_raw(message(DMA_WRITE, payload, REPLY, request.id))
    try:
        # The doorbell's own reply may come first.
        assert bell.recv().id == id
        bell.closed()
    except Closed:
        pass
    bell.close()
    connect(stateful_host).alive()


def test_an_answer_to_something_else(bell):
    """VFU-44"""
    id, request = rung(bell)
    bell.send_raw(message(DMA_WRITE, request.payload[:16], REPLY, request.id ^ 0x55))
    bell.send_raw(message(DMA_READ, request.payload[:16], REPLY, request.id))
    taken(bell, request)
    assert not bell.reply(REGION_WRITE, id).is_error
    bell.alive()


def test_an_answer_that_never_comes(stateful_host, connect, bell):
    """ENOTCONN for the device, and the next client is served"""
    rung(bell)
    bell.close()
    again = connect(stateful_host)
    assert again.read32(0, Stateful.ID) == Stateful.ID_VALUE
    again.alive()


@pytest.mark.parametrize("more", [0, 100])
def test_as_many_requests_as_can_wait_while_an_answer_is_due(stateful_host, connect, bell, more):
    """VFU-48: the flood ends this connection, and nobody else's"""
    rung(bell)
    ended = False
    bell.sock.settimeout(5)
    try:
        for _ in range((WAITING_MAX + more) // 64 + 1):
            bell.send_raw(b"".join(message(GET_INFO, GET, id=1) for _ in range(64)))
        bell.closed()
        ended = True
    except (BrokenPipeError, ConnectionResetError):
        ended = True
    assert ended
    bell.close()
    connect(stateful_host).alive()


def test_fewer_requests_than_can_wait_do(bell):
    """VFU-48: n - 1"""
    id, request = rung(bell)
    for _ in range(8):
        bell.send_raw(b"".join(message(GET_INFO, GET, id=9) for _ in range(500)))
    taken(bell, request)
    assert not bell.reply(REGION_WRITE, id).is_error
    for _ in range(4000):
        assert not bell.reply(GET_INFO, 9).is_error


def test_edus_dma_to_memory(edu):
    """A whole round trip of messages: out of one page, into another"""
    edu.map(BASE, 4 * PAGE)
    edu.bus_master()
    guest = edu.serve = Guest(BASE, 4 * PAGE)
    guest.memory[:PAGE] = bytes((n * 3 + 1) & 0xFF for n in range(PAGE))
    Edu.from_ram(edu, BASE, PAGE)
    Edu.to_ram(edu, BASE + 2 * PAGE + 100, PAGE)
    assert guest.memory[2 * PAGE + 100 : 3 * PAGE + 100] == guest.memory[:PAGE]
    assert {cmd for cmd, _, _ in guest.seen} == {DMA_READ, DMA_WRITE}
    edu.bus_master(False)


@pytest.mark.parametrize("flags", [1, 2])
def test_the_rights_of_a_map_without_a_file(edu1, flags):
    """SIM-11: what may not be read or written is not asked for"""
    edu1.map(BASE, PAGE, flags=flags)
    edu1.bus_master()
    guest = edu1.serve = Guest(BASE, PAGE)
    Edu.from_ram(edu1, BASE, 16)
    Edu.to_ram(edu1, BASE, 16)
    assert {cmd for cmd, _, _ in guest.seen} == ({DMA_READ} if flags == 1 else {DMA_WRITE})
    edu1.bus_master(False)
