"""MIG_DATA_READ and MIG_DATA_WRITE: a whole migration through the socket, and every way to do it wrong."""

import errno
import struct

import pytest

from raw import (
    DATA_MAX, DEVICE_FEATURE, MIG_DATA_READ, MIG_DATA_WRITE, NO_REPLY, RESET, Memory, Stateful, feature,
)

SET, GET = 1 << 17, 1 << 16
STATE = 2
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, _, PRE_COPY = range(7)
BAR = Stateful.MEMORY_BAR


def set_state(client, value):
    client.ok(DEVICE_FEATURE, feature(SET | STATE, struct.pack("<II", value, 0)))


def state(client):
    return struct.unpack_from("<I", client.ok(DEVICE_FEATURE, feature(GET | STATE, argsz=16)), 8)[0]


def read(size, argsz=None):
    return struct.pack("<II", 8 + size if argsz is None else argsz, size)


def write(data, size=None, argsz=None):
    return struct.pack("<II", 8 + len(data) if argsz is None else argsz, len(data) if size is None else size) + data


def pull(client, size):
    """One read: its data; fewer than `size` bytes are the end."""
    payload = client.ok(MIG_DATA_READ, read(size))
    argsz, got = struct.unpack_from("<II", payload)
    assert got == len(payload) - 8 <= size and argsz == 8 + got
    return payload[8:]


def saved(client, size=DATA_MAX):
    """The device's state, from STOP_COPY, in pieces."""
    data = b""
    while True:
        piece = pull(client, size)
        data += piece
        if len(piece) < size:
            return data


def filled(client):
    client.write(BAR, 0, bytes(range(256)) * 256)
    client.write32(0, Stateful.PATTERN, 0xABCD1234)


def is_filled(client):
    return client.read(BAR, 0, 65536) == bytes(range(256)) * 256 and client.read32(0, Stateful.PATTERN) == 0xABCD1234


@pytest.mark.parametrize("out, into", [(DATA_MAX, DATA_MAX), (4096, 4096), (1000, 3333), (65536, 7), (77, DATA_MAX)])
def test_a_whole_migration(stateful, out, into):
    """STATE-7, SAVED-1: in pieces of any size, in both minor versions"""
    filled(stateful)
    set_state(stateful, STOP_COPY)
    data = saved(stateful, out)
    assert len(data) > 65536
    stateful.ok(RESET)
    assert not is_filled(stateful)
    set_state(stateful, RESUMING)
    for at in range(0, len(data), into):
        if into < 100:
            stateful.send(MIG_DATA_WRITE, write(data[at : at + into]), flags=NO_REPLY)
        else:
            assert stateful.ok(MIG_DATA_WRITE, write(data[at : at + into])) == b""
    set_state(stateful, STOP)
    set_state(stateful, RUNNING)
    assert is_filled(stateful)


def test_with_pre_copy(stateful1):
    filled(stateful1)
    set_state(stateful1, PRE_COPY)
    data = pull(stateful1, 4096)
    stateful1.write32(0, Stateful.PATTERN, 77)
    set_state(stateful1, STOP_COPY)
    data += saved(stateful1)
    stateful1.ok(RESET)
    set_state(stateful1, RESUMING)
    stateful1.ok(MIG_DATA_WRITE, write(data))
    set_state(stateful1, RUNNING)
    assert stateful1.read32(0, Stateful.PATTERN) == 77


def test_after_the_end(stateful1):
    """VFU-60: a short read is the end, and so are those behind it"""
    set_state(stateful1, STOP_COPY)
    saved(stateful1)
    for _ in range(3):
        assert pull(stateful1, 4096) == b""


@pytest.mark.parametrize("value", [RUNNING, STOP, RESUMING])
def test_a_read_in_another_state(stateful, value):
    set_state(stateful, value)
    got = stateful.call(MIG_DATA_READ, read(4096))
    assert got.is_error and got.errno in (errno.EINVAL, errno.ENODATA, errno.ENODEV), got
    assert state(stateful) == value


@pytest.mark.parametrize("value", [RUNNING, STOP, STOP_COPY, PRE_COPY])
def test_a_write_in_another_state(stateful, value):
    set_state(stateful, value)
    got = stateful.call(MIG_DATA_WRITE, write(b"data"))
    assert got.is_error and got.errno in (errno.EINVAL, errno.ENODEV), got
    assert state(stateful) == value


@pytest.mark.parametrize("cmd, payload", [(MIG_DATA_READ, read(16)), (MIG_DATA_WRITE, write(b"x"))])
def test_a_device_without_migration(edu, cmd, payload):
    got = edu.call(cmd, payload)
    assert got.is_error and got.errno in (errno.ENOTTY, errno.EINVAL), got


def test_no_byte(stateful):
    """VFU-60"""
    set_state(stateful, STOP_COPY)
    stateful.fails(errno.EINVAL, MIG_DATA_READ, read(0))
    stateful.ok(RESET)
    set_state(stateful, RESUMING)
    stateful.fails(errno.EINVAL, MIG_DATA_WRITE, write(b""))


@pytest.mark.parametrize("size", [1, DATA_MAX - 1, DATA_MAX])
def test_as_much_as_can_be_read(stateful1, size):
    """The table of limits"""
    set_state(stateful1, STOP_COPY)
    assert pull(stateful1, size)


@pytest.mark.parametrize("size", [DATA_MAX + 1, 1 << 31, 0xFFFFFFF0, 0xFFFFFFFF])
def test_more_than_can_be_read(stateful_host, stateful, size):
    """VFU-4; seen elsewhere: an allocation of a size that the client chose"""
    set_state(stateful, STOP_COPY)
    before = stateful_host.memory_kib()
    stateful.fails(errno.E2BIG, MIG_DATA_READ, read(size, 0xFFFFFFFF))
    assert stateful_host.memory_kib() - before < 8 << 10


@pytest.mark.parametrize("agreed", [16, 4096])
def test_no_more_than_was_agreed_on(stateful_host, clean, connect, agreed):
    """VFU-47's other side"""
    client = connect(stateful_host, capabilities={"max_data_xfer_size": agreed})
    set_state(client, STOP_COPY)
    assert len(pull(client, agreed)) == agreed
    client.fails(errno.E2BIG, MIG_DATA_READ, read(agreed + 1))


@pytest.mark.parametrize("argsz", [0, 7, 8, 8 + 4095])
def test_no_room_for_what_is_asked_for(stateful1, argsz):
    """VFU-60: and nothing of the data is lost"""
    filled(stateful1)
    set_state(stateful1, STOP_COPY)
    stateful1.fails(errno.EINVAL, MIG_DATA_READ, read(4096, argsz))
    data = saved(stateful1)
    stateful1.ok(RESET)
    set_state(stateful1, RESUMING)
    stateful1.ok(MIG_DATA_WRITE, write(data))
    set_state(stateful1, RUNNING)
    assert is_filled(stateful1)


@pytest.mark.parametrize("length", [0, 1, 4, 7, 9, 16])
def test_a_read_of_another_length(stateful1, length):
    """VFU-2"""
    set_state(stateful1, STOP_COPY)
    stateful1.fails(errno.EINVAL, MIG_DATA_READ, (read(16) + bytes(8))[:length])


@pytest.mark.parametrize("sent, said", [(4, 3), (4, 5), (4, 0), (0, 4), (100, 1000), (1000, 100)])
def test_other_data_than_were_said(stateful, sent, said):
    """VFU-2; seen elsewhere: an over-read"""
    set_state(stateful, RESUMING)
    stateful.fails(errno.EINVAL, MIG_DATA_WRITE, write(bytes(sent), said))


@pytest.mark.parametrize("said", [DATA_MAX + 1, 1 << 31, 0xFFFFFFFF])
def test_far_more_than_was_sent(stateful1, said):
    """VFU-4, VFU-17"""
    set_state(stateful1, RESUMING)
    stateful1.fails((errno.E2BIG, errno.EINVAL), MIG_DATA_WRITE, write(b"data", said))


def test_more_than_can_be_written(stateful1):
    """VFU-4, the table of limits: such a message is still within its limit"""
    set_state(stateful1, RESUMING)
    stateful1.fails(errno.E2BIG, MIG_DATA_WRITE, write(bytes(DATA_MAX + 1)))
    stateful1.alive()


@pytest.mark.parametrize("length", [0, 4, 7])
def test_a_write_shorter_than_its_head(stateful1, length):
    """VFU-2"""
    set_state(stateful1, RESUMING)
    stateful1.fails(errno.EINVAL, MIG_DATA_WRITE, write(b"")[:length])


@pytest.mark.parametrize("spoil", ["short", "changed", "random", "nothing", "zeroes", "head"])
def test_data_that_are_not_a_devices(stateful, spoil):
    """SAVED-2, STATE-6: refused at the latest when they end; a reset ends it"""
    import random

    random = random.Random(7)
    filled(stateful)
    set_state(stateful, STOP_COPY)
    data = saved(stateful)
    stateful.ok(RESET)
    changed = bytearray(data)
    changed[len(data) // 2] ^= 0x40
    bad = {
        "short": data[:-1], "changed": bytes(changed), "random": random.randbytes(5000), "nothing": b"", "zeroes": bytes(5000),
        "head": data[:8],
    }[spoil]
    set_state(stateful, RESUMING)
    refused = bool(bad) and stateful.call(MIG_DATA_WRITE, write(bad)).is_error
    got = stateful.call(DEVICE_FEATURE, feature(SET | STATE, struct.pack("<II", STOP, 0)))
    assert got.is_error or refused, "it was taken"
    assert got.is_error, "a stream that was refused has ended well"
    assert state(stateful) in (ERROR, RESUMING)
    stateful.ok(RESET)
    assert state(stateful) == RUNNING
    assert not is_filled(stateful)
    # And the right one is still taken.
    set_state(stateful, RESUMING)
    stateful.ok(MIG_DATA_WRITE, write(data))
    set_state(stateful, RUNNING)
    assert is_filled(stateful)


def test_data_behind_the_end(stateful1):
    """SAVED-2"""
    set_state(stateful1, STOP_COPY)
    data = saved(stateful1)
    stateful1.ok(RESET)
    set_state(stateful1, RESUMING)
    stateful1.ok(MIG_DATA_WRITE, write(data))
    refused = stateful1.call(MIG_DATA_WRITE, write(b"more")).is_error
    got = stateful1.call(DEVICE_FEATURE, feature(SET | STATE, struct.pack("<II", STOP, 0)))
    assert refused or got.is_error


@pytest.mark.parametrize("cmd, payload", [(MIG_DATA_READ, read(16)), (MIG_DATA_WRITE, write(b"x"))])
def test_with_a_descriptor(stateful1, cmd, payload):
    """VFU-3"""
    with Memory(4096) as memory:
        stateful1.fails(errno.EINVAL, cmd, payload, [memory.fd])


def test_a_client_that_goes_amid_a_migration(stateful_host, clean, connect):
    """The next finds a device that it can use, in the state that it was left in"""
    for value in (STOP_COPY, RESUMING, PRE_COPY):
        client = connect(stateful_host)
        client.ok(RESET)
        set_state(client, value)
        if value == RESUMING:
            client.ok(MIG_DATA_WRITE, write(b"beginning"[:4]))
        else:
            pull(client, 100)
        client.close()
        again = connect(stateful_host)
        assert state(again) in range(8)
        again.ok(RESET)
        assert state(again) == RUNNING
        again.close()
