"""DEVICE_GET_INFO."""

import errno
import struct

import pytest

from raw import GET_INFO, Memory

RESET, PCI = 1, 2


def test_edu(edu):
    """Facts: QEMU takes at most 100 regions and 50 irqs; edu has no reset"""
    argsz, flags, regions, irqs = struct.unpack("<IIII", edu.ok(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
    assert (argsz, flags) == (16, PCI)
    assert 9 <= regions <= 100 and irqs == 5


def test_stateful(stateful):
    argsz, flags, regions, irqs = struct.unpack("<IIII", stateful.ok(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))
    assert (argsz, flags) == (16, PCI | RESET)
    assert 9 <= regions <= 100 and irqs == 5


@pytest.mark.parametrize("argsz", [16, 17, 4096, 0xFFFFFFFF])
def test_more_room_than_needed(edu1, argsz):
    got = edu1.ok(GET_INFO, struct.pack("<IIII", argsz, 0, 0, 0))
    assert len(got) == 16 and struct.unpack_from("<I", got) == (16,)


@pytest.mark.parametrize("argsz", [0, 1, 15])
def test_less_room_than_needed(edu1, argsz):
    """VFU-4"""
    edu1.fails(errno.EINVAL, GET_INFO, struct.pack("<IIII", argsz, 0, 0, 0))


@pytest.mark.parametrize("length", [0, 1, 4, 8, 15, 17, 32, 1000])
def test_another_length(edu, length):
    """VFU-2"""
    edu.fails(errno.EINVAL, GET_INFO, (struct.pack("<IIII", 16, 0, 0, 0) + bytes(1000))[:length])
    edu.alive()


def test_with_a_descriptor(edu1):
    """VFU-3"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, GET_INFO, struct.pack("<IIII", 16, 0, 0, 0), [memory.fd])
