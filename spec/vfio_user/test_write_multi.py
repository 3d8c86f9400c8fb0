"""REGION_WRITE_MULTI."""

import errno
import struct

import pytest

from raw import CONFIG, NO_REPLY, WRITE_MULTI, WRITES_MAX, Memory, Stateful

BAR = Stateful.MEMORY_BAR


def write(region, offset, data, count=None):
    return struct.pack("<QII", offset, region, len(data) if count is None else count) + data[:8].ljust(8, b"\xEE")


def multi(*writes, count=None):
    return struct.pack("<Q", len(writes) if count is None else count) + b"".join(writes)


def done(client, *writes):
    payload = client.ok(WRITE_MULTI, multi(*writes))
    assert len(payload) == 8
    return struct.unpack("<Q", payload)[0]


@pytest.mark.parametrize("size", range(1, 9))
def test_one_write_of_each_size(stateful, size):
    """VFU-54: no byte beyond it"""
    stateful.write(BAR, 0, bytes(32))
    assert done(stateful, write(BAR, 8, b"12345678"[:size])) == 1
    assert stateful.read(BAR, 0, 32) == bytes(8) + b"12345678"[:size].ljust(24, b"\0")


@pytest.mark.parametrize("size", [0, 9, 16, 1 << 31, 0xFFFFFFFF])
def test_a_write_of_another_size(stateful1, size):
    """VFU-54: the message is malformed, nothing of it is done"""
    stateful1.fails(errno.EINVAL, WRITE_MULTI, multi(write(BAR, 0, b"first"), write(BAR, 8, b"12345678", size)))
    assert stateful1.read(BAR, 0, 5) == bytes(5)


@pytest.mark.parametrize("count", [2, WRITES_MAX - 1, WRITES_MAX])
def test_many_writes_in_order(stateful, count):
    """VFU-54, the table of limits"""
    writes = [write(BAR, 8 * (n % 100), struct.pack("<Q", n)) for n in range(count)]
    assert done(stateful, *writes) == count
    for slot in range(min(count, 100)):
        last = max(n for n in range(count) if n % 100 == slot)
        assert struct.unpack("<Q", stateful.read(BAR, 8 * slot, 8))[0] == last


@pytest.mark.parametrize("count", [WRITES_MAX + 1, 2000, 40000])
def test_more_writes_than_can_be(stateful, count):
    """VFU-4, the table of limits: nothing of it is done"""
    stateful.fails(errno.E2BIG, WRITE_MULTI, multi(*[write(BAR, 0, b"x")] * count))
    assert stateful.read(BAR, 0, 1) == b"\0"


@pytest.mark.parametrize("count", [0, 2, 3, 1024])
def test_another_number_than_was_sent(stateful1, count):
    """VFU-2"""
    stateful1.fails(errno.EINVAL, WRITE_MULTI, multi(write(BAR, 0, b"x"), count=count))
    assert stateful1.read(BAR, 0, 1) == b"\0"


@pytest.mark.parametrize("count", [1025, 1 << 32, 1 << 61, (1 << 64) // 24, (1 << 64) // 24 + 1, (1 << 64) - 1])
def test_a_number_whose_product_overflows(stateful1, count):
    """VFU-4, VFU-17"""
    stateful1.fails((errno.E2BIG, errno.EINVAL), WRITE_MULTI, multi(write(BAR, 0, b"x"), count=count))
    stateful1.alive()


@pytest.mark.parametrize("length", [0, 1, 7, 9, 8 + 23, 8 + 25])
def test_another_length(stateful1, length):
    """VFU-2"""
    stateful1.fails(errno.EINVAL, WRITE_MULTI, (multi(write(BAR, 0, b"x")) + bytes(8))[:length])
    stateful1.alive()


@pytest.mark.parametrize("bad", [(99, 0), (BAR, 65536), (BAR, 65535), (BAR, (1 << 64) - 4), (3, 0)])
@pytest.mark.parametrize("before", [0, 1, 5])
def test_a_write_that_fails(stateful, bad, before):
    """VFU-54: the number done before it, or its errno if it is the first; nothing behind it is done"""
    region, offset = bad
    writes = [write(BAR, 8 * n, b"done") for n in range(before)] + [write(region, offset, b"fail")] + [write(BAR, 4096, b"behind")]
    if before:
        assert done(stateful, *writes) == before
    else:
        stateful.fails(errno.EINVAL, WRITE_MULTI, multi(*writes))
    for n in range(before):
        assert stateful.read(BAR, 8 * n, 4) == b"done"
    assert stateful.read(BAR, 4096, 6) == bytes(6)


@pytest.mark.parametrize("offset", [(1 << 64) - 3, (1 << 64) - 1])
def test_a_write_past_the_last_offset(stateful1, offset):
    """VFU-53: the message is malformed, nothing of it is done"""
    stateful1.fails(errno.EINVAL, WRITE_MULTI, multi(write(BAR, 0, b"done"), write(BAR, offset, b"fail")))
    assert stateful1.read(BAR, 0, 4) == bytes(4)


def test_several_regions(stateful):
    assert done(stateful, write(0, Stateful.PATTERN, b"\5\0\0\0"), write(BAR, 0, b"memory"), write(CONFIG, 0x3C, b"\x0B")) == 3
    assert stateful.read32(0, Stateful.PATTERN) == 5
    assert stateful.read(BAR, 0, 6) == b"memory"
    assert stateful.read(CONFIG, 0x3C, 1) == b"\x0B"


def test_without_a_reply(stateful1):
    """VFU-13"""
    stateful1.send(WRITE_MULTI, multi(write(BAR, 0, b"posted")), flags=NO_REPLY)
    stateful1.send(WRITE_MULTI, multi(write(99, 0, b"fails")), flags=NO_REPLY)
    assert stateful1.read(BAR, 0, 6) == b"posted"


@pytest.mark.parametrize("capabilities", [{}, {"write_multiple": False}, {"max_msg_fds": 4}])
def test_where_it_was_not_agreed_on(stateful_host, clean, connect, capabilities):
    """VFU-54"""
    client = connect(stateful_host, capabilities=capabilities)
    client.fails(errno.EOPNOTSUPP, WRITE_MULTI, multi(write(BAR, 0, b"x")))
    assert client.read(BAR, 0, 1) == b"\0"


def test_it_is_agreed_on(stateful_host, clean, connect):
    """Facts: offer it only when it works"""
    client = connect(stateful_host, capabilities={"write_multiple": True})
    assert client.negotiated.get("write_multiple") is True
    assert done(client, write(BAR, 0, b"x")) == 1


def test_with_a_descriptor(stateful1):
    """VFU-3"""
    with Memory(4096) as memory:
        stateful1.fails(errno.EINVAL, WRITE_MULTI, multi(write(BAR, 0, b"x")), [memory.fd])
    assert stateful1.read(BAR, 0, 1) == b"\0"
