"""DEVICE_GET_REGION_IO_FDS: refused for now, and properly."""

import errno
import struct

import pytest

from raw import REGION_IO_FDS, Memory


@pytest.mark.parametrize("index", range(9))
@pytest.mark.parametrize("argsz", [16, 56, 4096])
def test_it_is_not_supported(edu, index, argsz):
    """VFU-34"""
    edu.fails(errno.EOPNOTSUPP, REGION_IO_FDS, struct.pack("<IIII", argsz, 0, index, 0))
    edu.alive()


@pytest.mark.parametrize("length", [0, 15, 17, 56])
def test_another_length(edu1, length):
    """VFU-2"""
    edu1.fails(errno.EINVAL, REGION_IO_FDS, (struct.pack("<IIII", 16, 0, 0, 0) + bytes(64))[:length])
    edu1.alive()


def test_with_a_descriptor(edu1):
    """VFU-3"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, REGION_IO_FDS, struct.pack("<IIII", 16, 0, 0, 0), [memory.fd])
