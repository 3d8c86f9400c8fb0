"""DEVICE_RESET."""

import errno

import pytest

from raw import CONFIG, DMA_UNMAP, NO_REPLY, RESET, Memory, Stateful, dma_unmap


def test_a_device_without_a_reset(edu):
    """SIM-13: ENOTTY, and nothing has changed"""
    edu.write32(0, 4, 77)
    edu.fails(errno.ENOTTY, RESET)
    assert edu.read32(0, 4) == 0xFFFFFFFF - 77


def test_a_device_with_one(stateful):
    stateful.write32(0, Stateful.PATTERN, 9)
    stateful.write(Stateful.MEMORY_BAR, 16, b"content")
    assert stateful.ok(RESET) == b""
    assert stateful.read32(0, Stateful.PATTERN) == 0
    assert stateful.read(Stateful.MEMORY_BAR, 16, 7) == bytes(7)


def test_maps_outlive_it(stateful1):
    """The client's maps are not the device's state"""
    with Memory(4096) as memory:
        stateful1.map(0x10000, 4096, memory.fd)
        stateful1.ok(RESET)
        stateful1.bus_master()
        Stateful.ring(stateful1, 0x10000, 8, 1)
        assert memory.view[:8] == Stateful.filled(1, 1, 8)
        stateful1.unmap(0x10000, 4096)


@pytest.mark.parametrize("length", [1, 4, 16, 1000])
def test_with_a_payload(stateful, length):
    """VFU-2: and nothing is reset"""
    stateful.write32(0, Stateful.PATTERN, 9)
    stateful.fails(errno.EINVAL, RESET, bytes(length))
    assert stateful.read32(0, Stateful.PATTERN) == 9


def test_with_a_descriptor(stateful1):
    """VFU-3, VFU-9"""
    stateful1.write32(0, Stateful.PATTERN, 9)
    with Memory(4096) as memory:
        stateful1.fails(errno.EINVAL, RESET, b"", [memory.fd])
    assert stateful1.read32(0, Stateful.PATTERN) == 9


def test_without_a_reply(stateful1):
    """VFU-13"""
    stateful1.write32(0, Stateful.PATTERN, 9)
    stateful1.send(RESET, flags=NO_REPLY)
    assert stateful1.read32(0, Stateful.PATTERN) == 0


def test_many_in_a_row(stateful1):
    for n in range(20):
        stateful1.write32(0, Stateful.PATTERN, n)
        stateful1.ok(RESET)
    assert stateful1.read32(0, Stateful.PATTERN) == 0
