"""DMA_READ: what the server asks for while it has no file of the memory, and clients that answer anything."""

import errno
import struct
import time

import pytest

from raw import (
    CONFIG, DMA_READ, DMA_WRITE, ERROR, GET_INFO, HEADER, PAGE, REGION_READ, REPLY, Closed, Edu, Guest, Memory, message, region_read,
)

BASE = 0x100000
GET = struct.pack("<IIII", 16, 0, 0, 0)


@pytest.fixture
def bus(edu1):
    """A client of edu whose memory has no file."""
    edu1.map(BASE, 4 * PAGE)
    edu1.bus_master()
    return edu1


def asked(client, count=64, at=BASE):
    """Starts DMA from memory; the server's request."""
    Edu.start(client, at, Edu.BUFFER, count, 0)
    request = client.recv_request()
    assert request.cmd == DMA_READ and request.flags == 0 and not request.fds
    assert struct.unpack("<QQ", request.payload) == (at, count)
    return request


def answer(client, request, data, address=None, count=None, **changed):
    got_address, got_count = struct.unpack_from("<QQ", request.payload)
    head = struct.pack("<QQ", got_address if address is None else address, got_count if count is None else count)
    client.send_raw(message(changed.get("cmd", DMA_READ), head + data, REPLY, changed.get("id", request.id)))


def fetched(client, count=64):
    """What the device has in its buffer, through DMA into a page of its own."""
    guest = Guest(BASE, 4 * PAGE)
    client.serve = guest
    try:
        Edu.to_ram(client, BASE + 2 * PAGE, count)
    finally:
        client.serve = None
    return bytes(guest.memory[2 * PAGE : 2 * PAGE + count])


@pytest.mark.parametrize("count", [1, 3, 8, 4095, 4096])
def test_it_is_asked_for_and_arrives(edu, count):
    """VFU-1, VFU-41, both minor versions"""
    edu.map(BASE, 4 * PAGE)
    edu.bus_master()
    data = bytes((n * 31 + 7) & 0xFF for n in range(count))
    request = asked(edu, count)
    answer(edu, request, data)
    Edu.wait(edu)
    assert fetched(edu, count) == data
    edu.bus_master(False)


def test_an_answer_cut_anywhere(bus):
    """VFU-41: it is taken when it is whole"""
    request = asked(bus, 8)
    whole = message(DMA_READ, request.payload + b"in parts", REPLY, request.id)
    for byte in whole:
        bus.send_raw(bytes([byte]))
    Edu.wait(bus)
    assert fetched(bus, 8) == b"in parts"


def test_an_answer_behind_requests(bus):
    """VFU-41: DMA never waits for a client's request, nor a request for DMA"""
    request = asked(bus, 8)
    stream = b"".join(message(GET_INFO, GET, id=id) for id in range(100))
    stream += message(REGION_READ, region_read(CONFIG, 0, 4), id=request.id)
    stream += message(DMA_READ, request.payload + b"in order", REPLY, request.id)
    bus.send_raw(stream)
    for id in range(100):
        bus.reply(GET_INFO, id)
    assert bus.reply(REGION_READ, request.id).payload[16:] == bytes.fromhex("3412e811")
    Edu.wait(bus)
    assert fetched(bus, 8) == b"in order"


def test_requests_while_an_answer_is_due(bus):
    """A client that asks first and answers later is served meanwhile"""
    request = asked(bus, 4)
    bus.alive()
    assert bus.read(CONFIG, 0, 4) == bytes.fromhex("3412e811")
    answer(bus, request, b"late")
    Edu.wait(bus)
    assert fetched(bus, 4) == b"late"


@pytest.mark.parametrize("err", [errno.EFAULT, errno.ENODEV, errno.ENOSYS, errno.EINVAL, 0, 0xFFFFFFFF, 4096, 1 << 31])
def test_an_answer_that_is_an_error(bus, err):
    """VFU-42, VFU-12: moves nothing and completes; facts: QEMU says ENODEV while bus master is off"""
    answer(bus, asked(bus, 4), b"good")
    Edu.wait(bus)
    request = asked(bus, 4)
    bus.send_raw(message(DMA_READ, b"", REPLY | ERROR, request.id, err=err))
    Edu.wait(bus)
    assert fetched(bus, 4) == b"good"
    bus.alive()


def test_an_error_with_a_payload(bus):
    """An error is a header alone; more is taken out of the stream, or ends the connection"""
    request = asked(bus, 4)
    bus.send_raw(message(DMA_READ, request.payload + b"abcd", REPLY | ERROR, request.id, err=5))
    try:
        bus.alive()
    except (Closed, BrokenPipeError, ConnectionResetError):
        pass


@pytest.mark.parametrize("id_off, cmd", [(1, DMA_READ), (0x8000, DMA_READ), (0, DMA_WRITE), (0, GET_INFO), (0, 99)])
def test_an_answer_to_something_else(bus, id_off, cmd):
    """VFU-44: it is dropped, and the right one still counts"""
    request = asked(bus, 4)
    answer(bus, request, b"nope", id=request.id + id_off & 0xFFFF, cmd=cmd)
    bus.alive()
    answer(bus, request, b"yes!")
    Edu.wait(bus)
    assert fetched(bus, 4) == b"yes!"


def test_an_answer_twice(bus):
    """VFU-44"""
    request = asked(bus, 4)
    answer(bus, request, b"one!")
    answer(bus, request, b"two!")
    bus.alive()
    Edu.wait(bus)
    assert fetched(bus, 4) == b"one!"


@pytest.mark.parametrize(
    "address, count, data",
    [
        (BASE + 1, None, bytes(8)), (0, None, bytes(8)), (None, 7, bytes(8)), (None, 9, bytes(8)), (None, 0, b""), (None, None, b""),
        (None, None, bytes(7)), (None, None, bytes(9)), (None, 7, bytes(7)), (None, 1 << 63, bytes(8)), (None, None, bytes(100000)),
    ],
)
def test_an_answer_of_something_else_ends_the_connection(edu_host, connect, bus, address, count, data):
    """VFU-43"""
    request = asked(bus, 8)
    answer(bus, request, data, address, count)
    bus.closed()
    bus.close()
    again = connect(edu_host)
    Edu.wait(again)
    again.alive()


@pytest.mark.parametrize("length", [0, 1, 8, 15])
def test_an_answer_shorter_than_its_head(edu_host, connect, bus, length):
    """VFU-43"""
    request = asked(bus, 8)
    bus.send_raw(message(DMA_READ, request.payload[:length], REPLY, request.id))
    bus.closed()
    bus.close()
    connect(edu_host).alive()


def test_an_answer_with_descriptors(bus):
    """They are closed (the fixture counts); the answer counts or the connection ends"""
    request = asked(bus, 4)
    with Memory(PAGE) as memory:
        bus.send_raw(message(DMA_READ, request.payload + b"data", REPLY, request.id), [memory.fd] * 4)
    try:
        bus.alive()
    except (Closed, BrokenPipeError, ConnectionResetError):
        pass


def test_an_answer_that_never_comes(edu_host, connect, bus):
    """The client goes instead; the device is there for the next"""
    asked(bus, 64)
    bus.close()
    again = connect(edu_host)
    Edu.wait(again)
    assert again.read32(0, 0) == 0x010000ED


def test_half_an_answer(edu_host, connect, bus):
    request = asked(bus, 64)
    bus.send_raw(message(DMA_READ, request.payload + bytes(64), REPLY, request.id)[:40])
    bus.close()
    again = connect(edu_host)
    Edu.wait(again)
    again.alive()


@pytest.mark.parametrize("agreed", [8, 100, 1000, 4095, 4096])
def test_no_more_is_asked_for_than_the_client_takes(edu_host, connect, agreed):
    """VFU-47"""
    client = connect(edu_host, capabilities={"max_data_xfer_size": agreed})
    client.map(BASE, 4 * PAGE)
    client.bus_master()
    guest = client.serve = Guest(BASE, 4 * PAGE)
    count = 4096 if agreed >= 100 else 8
    guest.memory[:count] = bytes((n * 13 + 1) & 0xFF for n in range(count))
    Edu.from_ram(client, BASE, count)
    reads = [(address, size) for cmd, address, size in guest.seen if cmd == DMA_READ]
    assert max(size for _, size in reads) <= agreed and sum(size for _, size in reads) == count
    Edu.to_ram(client, BASE + PAGE, count)
    writes = [size for cmd, _, size in guest.seen if cmd == DMA_WRITE]
    assert max(writes) <= agreed and sum(writes) == count
    assert guest.memory[PAGE : PAGE + count] == guest.memory[:count]
    client.bus_master(False)


def test_nothing_is_asked_of_what_is_not_mapped(bus):
    """SIM-11: nor with bus master off"""
    Edu.from_ram(bus, 0x900000, 64)
    Edu.from_ram(bus, BASE + 4 * PAGE, 64)
    bus.bus_master(False)
    Edu.from_ram(bus, BASE, 64)
    assert not bus.requests
    bus.bus_master()
    # Of a transfer that leaves the map its part within may be asked for, and nothing else: the guest looks.
    bus.serve = Guest(BASE, 4 * PAGE)
    Edu.from_ram(bus, BASE + 4 * PAGE - 32, 64)


def test_across_a_map_with_a_file_and_one_without(bus):
    """Two maps that touch, of two kinds"""
    with Memory(PAGE) as memory:
        bus.map(BASE + 4 * PAGE, PAGE, memory.fd)
        memory.view[:4] = b"file"
        guest = bus.serve = Guest(BASE, 4 * PAGE)
        guest.memory[-4:] = b"wire"
        Edu.from_ram(bus, BASE + 4 * PAGE - 4, 8)
        guest.memory[:8] = bytes(8)
        Edu.to_ram(bus, BASE, 8)
        assert guest.memory[:8] in (b"wirefile", bytes(8)), "all of it, or a fault"
