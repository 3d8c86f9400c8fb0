"""REGION_READ: every size, every edge of a region, the limits of a transfer."""

import errno
import struct

import pytest

from raw import CONFIG, DATA_MAX, REGION_READ, Memory, Stateful, region_read

TOP = 1 << 64


def test_all_of_config_space(edu):
    """QEMU reads 256 bytes at once"""
    whole = edu.read(CONFIG, 0, 256)
    assert whole[:4] == bytes.fromhex("3412e811")
    for count in (1, 2, 4, 8, 3, 16, 100):
        for at in range(0, 256 - count + 1, 5):
            assert edu.read(CONFIG, at, count) == whole[at : at + count]


def test_a_register(edu):
    """SIM-1"""
    assert edu.read32(0, 0) == 0x010000ED


@pytest.mark.parametrize("region, size", [(0, 1 << 20), (CONFIG, 256)])
@pytest.mark.parametrize("count", [1, 2, 4, 8, 64])
def test_the_edge_of_a_region(edu1, region, size, count):
    """n - 1, n, n + 1"""
    assert len(edu1.read(region, size - count - 1, count)) == count
    assert len(edu1.read(region, size - count, count)) == count
    for at in (size - count + 1, size - 1 if count > 1 else size, size, size + 1, size + 4096, 1 << 40):
        edu1.fails(errno.EINVAL, REGION_READ, region_read(region, at, count))
    edu1.alive()


@pytest.mark.parametrize("offset, count", [(TOP - 1, 1), (TOP - 1, 2), (TOP - 4, 4), (TOP - 4, 8), (1 << 63, 4), ((1 << 63) - 4, 8)])
def test_past_the_last_offset(edu1, offset, count):
    """VFU-53"""
    for region in (0, CONFIG):
        edu1.fails(errno.EINVAL, REGION_READ, region_read(region, offset, count))
    edu1.alive()


@pytest.mark.parametrize("region", [1, 2, 3, 4, 5, 6, 8])
def test_a_region_without_bytes(edu1, region):
    edu1.fails(errno.EINVAL, REGION_READ, region_read(region, 0, 4))


@pytest.mark.parametrize("region", [9, 10, 99, 1 << 31, 0xFFFFFFFF])
def test_no_such_region(edu1, region):
    edu1.fails(errno.EINVAL, REGION_READ, region_read(region, 0, 4))
    edu1.alive()


@pytest.mark.parametrize("region", [0, CONFIG, 3, 99])
def test_no_byte(edu, region):
    """VFU-53"""
    edu.fails(errno.EINVAL, REGION_READ, region_read(region, 0, 0))


@pytest.mark.parametrize("count", [DATA_MAX - 1, DATA_MAX])
def test_as_much_as_can_be(edu, count):
    """The table of limits"""
    got = edu.read(0, 0, count)
    assert len(got) == count
    # SIM-2: cut into accesses of 8 bytes, which the registers below 0x80 do not take.
    assert got[:0x80].strip(b"\xFF") == b"" and got[0x1000 : count & ~7].strip(b"\xFF") == b""


@pytest.mark.parametrize("count", [DATA_MAX + 1, DATA_MAX + 4096, 1 << 31, 0xFFFFFFFF])
def test_more_than_can_be(edu_host, edu, count):
    """VFU-4; seen elsewhere: an allocation of a size that the client chose"""
    before = edu_host.memory_kib()
    edu.fails(errno.E2BIG, REGION_READ, region_read(0, 0, count))
    assert edu_host.memory_kib() - before < 8 << 10
    edu.alive()


@pytest.mark.parametrize("agreed", [1, 16, 255, 4096])
def test_no_more_than_the_client_takes(edu_host, connect, agreed):
    """The table of limits, VFU-47: n - 1, n, n + 1"""
    client = connect(edu_host, capabilities={"max_data_xfer_size": agreed})
    for count in {max(1, agreed - 1), agreed}:
        assert len(client.read(0, 0, count)) == count
    client.fails(errno.E2BIG, REGION_READ, region_read(0, 0, agreed + 1))
    client.alive()


@pytest.mark.parametrize("length", [0, 1, 8, 12, 15, 17, 20, 32])
def test_another_length(edu, length):
    """VFU-2"""
    edu.fails(errno.EINVAL, REGION_READ, (region_read(CONFIG, 0, 4) + bytes(32))[:length])
    edu.alive()


def test_with_a_descriptor(edu1):
    """VFU-3"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, REGION_READ, region_read(CONFIG, 0, 4), [memory.fd])


def test_memory_that_is_switched_off(edu1):
    """CONFIG-2, GATE-3: config space answers, the BAR is EIO"""
    command = edu1.read(CONFIG, 4, 2)
    edu1.write(CONFIG, 4, b"\0\0")
    try:
        edu1.fails(errno.EIO, REGION_READ, region_read(0, 0, 4))
        assert edu1.read(CONFIG, 4, 2) == b"\0\0"
    finally:
        edu1.write(CONFIG, 4, command)
    assert edu1.read32(0, 0) == 0x010000ED


def test_many_at_once(edu):
    """1 MiB replies wait for a client that reads late"""
    for id in range(8):
        edu.send(REGION_READ, region_read(0, 0, DATA_MAX), id=id)
    for id in range(8):
        assert len(edu.reply(REGION_READ, id).payload) == 16 + DATA_MAX


def test_a_region_larger_than_a_page(stateful):
    """What was written is read, in other pieces"""
    content = bytes(range(256)) * 256
    stateful.write(Stateful.MEMORY_BAR, 0, content)
    for count in (1, 8, 4096, 4097, 65535, 65536):
        for at in {0, 65536 - count, (65536 - count) // 2}:
            assert stateful.read(Stateful.MEMORY_BAR, at, count) == content[at : at + count]
