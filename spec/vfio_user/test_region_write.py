"""REGION_WRITE: every size, every edge of a region, the limits of a transfer, writes that are posted."""

import errno
import struct

import pytest

from raw import (
    CONFIG, DATA_MAX, HEADER, MESSAGE_MAX, NO_REPLY, REGION_WRITE, Closed, Memory, Stateful, message, region_write,
)

TOP = 1 << 64


@pytest.mark.parametrize("value", [0, 1, 0xFFFFFFFF, 0x12345678])
def test_a_register(edu, value):
    """SIM-1"""
    edu.write32(0, 4, value)
    assert edu.read32(0, 4) == value ^ 0xFFFFFFFF


@pytest.mark.parametrize("region, size", [(0, 1 << 20), (CONFIG, 256)])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 64])
def test_the_edge_of_a_region(edu1, region, size, count):
    """n - 1, n, n + 1: a write that does not fit does nothing"""
    edu1.write(region, size - count - 1, bytes(count))
    edu1.write(region, size - count, bytes(count))
    for at in (size - count + 1, size, size + 1, size + 4096, 1 << 40):
        edu1.fails(errno.EINVAL, REGION_WRITE, region_write(region, at, bytes(count)))
    edu1.alive()


@pytest.mark.parametrize("offset, count", [(TOP - 1, 1), (TOP - 1, 2), (TOP - 4, 4), (TOP - 4, 8), (1 << 63, 4)])
def test_past_the_last_offset(edu1, offset, count):
    """VFU-53"""
    for region in (0, CONFIG):
        edu1.fails(errno.EINVAL, REGION_WRITE, region_write(region, offset, bytes(count)))


@pytest.mark.parametrize("region", [1, 5, 6, 8, 9, 99, 1 << 31, 0xFFFFFFFF])
def test_no_such_region(edu1, region):
    edu1.fails(errno.EINVAL, REGION_WRITE, region_write(region, 0, b"\0\0\0\0"))
    edu1.alive()


def test_no_byte(edu):
    """VFU-53"""
    edu.fails(errno.EINVAL, REGION_WRITE, region_write(0, 0, b""))


@pytest.mark.parametrize("sent, said", [(4, 3), (4, 5), (4, 0), (0, 4), (4, 8), (8, 4), (3, 4), (100, 99), (99, 100)])
def test_other_data_than_were_said(edu, sent, said):
    """VFU-2; seen elsewhere: an over-read"""
    edu.write32(0, 4, 0xAAAAAAAA)
    edu.fails(errno.EINVAL, REGION_WRITE, region_write(0, 4, bytes(sent), said))
    assert edu.read32(0, 4) == 0x55555555


@pytest.mark.parametrize("said", [DATA_MAX + 1, 1 << 31, 0xFFFFFFFF])
def test_far_more_than_was_sent(edu1, said):
    """VFU-4, VFU-17"""
    edu1.fails((errno.E2BIG, errno.EINVAL), REGION_WRITE, region_write(0, 4, b"\0\0\0\0", said))
    edu1.alive()


@pytest.mark.parametrize("length", [0, 1, 8, 12, 15])
def test_another_length(edu, length):
    """VFU-2"""
    edu.fails(errno.EINVAL, REGION_WRITE, region_write(CONFIG, 0, b"")[:length])
    edu.alive()


@pytest.mark.parametrize("count", [1, 4096, 65535, 65536])
def test_all_of_a_region(stateful, count):
    content = bytes((n * 7 + 3) & 0xFF for n in range(count))
    stateful.write(Stateful.MEMORY_BAR, 65536 - count, content)
    assert stateful.read(Stateful.MEMORY_BAR, 65536 - count, count) == content


@pytest.mark.parametrize("count", [DATA_MAX - 1, DATA_MAX])
def test_as_much_as_can_be(edu1, count):
    """The table of limits: the longest message; to the part of edu's BAR where nothing is, it all but fits"""
    edu1.fails(errno.EINVAL, REGION_WRITE, region_write(0, DATA_MAX - count + 1, bytes(count)))
    edu1.fails(errno.EINVAL, REGION_WRITE, region_write(3, 0, bytes(count)))
    edu1.alive()


def test_all_of_the_largest_region(edu1):
    """1 MiB in one message; SIM-2: in accesses of 8 bytes, which the registers below 0x80 do not take"""
    edu1.write32(0, 4, 7)
    edu1.write(0, 0, bytes(DATA_MAX))
    assert edu1.read32(0, 4) == 0xFFFFFFFF - 7


def test_more_than_can_be(edu1):
    """VFU-7: with its head, one byte more is longer than any message"""
    payload = region_write(0, 0, bytes(DATA_MAX + 1))
    assert HEADER + len(payload) == MESSAGE_MAX + 1
    try:
        edu1.send(REGION_WRITE, payload)
    except (BrokenPipeError, ConnectionResetError):
        return
    edu1.closed()


@pytest.mark.parametrize("agreed", [1, 16, 255])
def test_no_more_than_was_agreed_on(edu_host, connect, agreed):
    """The table of limits: n, n + 1"""
    client = connect(edu_host, capabilities={"max_data_xfer_size": agreed})
    client.write(0, 0x1000, bytes(agreed))
    client.fails(errno.E2BIG, REGION_WRITE, region_write(0, 0x1000, bytes(agreed + 1)))
    client.alive()


def test_with_a_descriptor(edu1):
    """VFU-3, VFU-9: and nothing is written"""
    edu1.write32(0, 4, 0)
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, REGION_WRITE, region_write(0, 4, b"\1\1\1\1"), [memory.fd])
    assert edu1.read32(0, 4) == 0xFFFFFFFF


def test_posted_writes_are_done_in_order(stateful):
    """VFU-13"""
    for value in range(1000):
        stateful.write(Stateful.MEMORY_BAR, 8, struct.pack("<I", value), NO_REPLY)
        if value % 100 == 99:
            assert stateful.read32(Stateful.MEMORY_BAR, 8) == value


def test_posted_writes_that_fail_say_nothing(edu1):
    """VFU-13"""
    for region, at in ((99, 0), (0, 1 << 20), (CONFIG, 256), (0, TOP - 1)):
        edu1.send(REGION_WRITE, region_write(region, at, b"\0"), flags=NO_REPLY)
    edu1.alive()


def test_sizing_of_bars(edu):
    """As QEMU does it: all ones are written, the size is read back"""
    kept = edu.read(CONFIG, 0x10, 24)
    for bar in range(6):
        edu.write(CONFIG, 0x10 + 4 * bar, b"\xFF" * 4)
    sizes = struct.unpack("<6I", edu.read(CONFIG, 0x10, 24))
    edu.write(CONFIG, 0x10, kept)
    assert [size & 0xFFFFFFF0 for size in sizes] == [0xFFF00000, 0, 0, 0, 0, 0]
    assert edu.read(CONFIG, 0x10, 24) == kept


def test_memory_that_is_switched_off(edu1):
    """CONFIG-2, GATE-3"""
    edu1.write32(0, 4, 5)
    command = edu1.read(CONFIG, 4, 2)
    edu1.write(CONFIG, 4, b"\0\0")
    try:
        edu1.fails(errno.EIO, REGION_WRITE, region_write(0, 4, b"\0\0\0\0"))
    finally:
        edu1.write(CONFIG, 4, command)
    assert edu1.read32(0, 4) == 0xFFFFFFFF - 5
