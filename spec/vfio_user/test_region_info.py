"""DEVICE_GET_REGION_INFO: sizes, flags, the chain of capabilities, and the file."""

import errno
import mmap
import os
import struct

import pytest

from raw import GET_INFO, REGION_INFO, RESET, Memory, Region, Stateful


def info(index, argsz=32):
    return struct.pack("<IIIIQQ", argsz, 0, index, 0, 0, 0)


def regions(client):
    return struct.unpack("<IIII", client.ok(GET_INFO, struct.pack("<IIII", 16, 0, 0, 0)))[2]


@pytest.fixture
def trusted(shared_host, connect):
    """A client of stateful that may have the device's file."""
    client = connect(shared_host)
    client.ok(RESET)
    return client


@pytest.fixture
def mapped(trusted):
    """The region that can be mapped, its file, and the client."""
    region, fds = trusted.region(Stateful.MEMORY_BAR)
    assert region.flags & Region.MMAP and len(fds) == 1
    yield region, fds[0], trusted
    os.close(fds[0])


def test_edus_regions(edu):
    """Nothing of edu can be mapped; VGA, the ninth, is EINVAL where there is none, as with vfio-pci"""
    edu.fails(errno.EINVAL, REGION_INFO, info(8))
    sizes = {0: 1 << 20, 7: 256}
    assert regions(edu) == 9
    for index in range(8):
        region, fds = edu.region(index)
        assert region.size == sizes.get(index, 0), index
        assert region.argsz == 32 and not region.flags & (Region.MMAP | Region.CAPS) and not fds
        assert region.flags & 3 == (3 if index in sizes else 0), index
        assert region.index == index and region.cap_offset == 0


@pytest.mark.parametrize("past", [0, 1, 100])
def test_an_index_beyond_the_last(edu1, past):
    edu1.fails(errno.EINVAL, REGION_INFO, info(regions(edu1) + past))


@pytest.mark.parametrize("index", [1 << 31, 0xFFFFFFFF])
def test_an_index_beyond_all(edu1, index):
    edu1.fails(errno.EINVAL, REGION_INFO, info(index))


@pytest.mark.parametrize("length", [0, 1, 16, 31, 33, 64])
def test_another_length(edu, length):
    """VFU-2"""
    edu.fails(errno.EINVAL, REGION_INFO, (info(0) + bytes(64))[:length])
    edu.alive()


@pytest.mark.parametrize("argsz", [0, 8, 31])
def test_less_room_than_the_fixed_part(edu1, argsz):
    """VFU-4"""
    edu1.fails(errno.EINVAL, REGION_INFO, info(0, argsz))


def test_with_a_descriptor(edu1):
    """VFU-3"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, REGION_INFO, info(0), [memory.fd])


def chain(client, has_file):
    """VFU-32: first the room that is needed, then all, as QEMU asks."""
    head, fds = client.region(Stateful.MEMORY_BAR, 32)
    assert not fds, "the file comes only with an answer that fits"
    assert len(head.payload) == 32 and head.argsz > 32 and head.flags & Region.CAPS
    # QEMU refuses CAPS with an offset within the fixed part.
    assert head.cap_offset == 32
    assert head.size == Stateful.MEMORY_SIZE
    short, fds = client.region(Stateful.MEMORY_BAR, head.argsz - 1)
    assert not fds and short.payload == head.payload
    for argsz in (head.argsz, head.argsz + 1, 0xFFFFFFFF):
        whole, fds = client.region(Stateful.MEMORY_BAR, argsz)
        for fd in fds:
            os.close(fd)
        assert len(fds) == int(has_file)
        assert len(whole.payload) == whole.argsz == head.argsz
        assert bool(whole.flags & Region.MMAP) == has_file and whole.flags & Region.CAPS
        assert whole.areas() == [(4096, Stateful.MEMORY_SIZE - 4096)]


def test_first_the_room_that_is_needed_then_all(stateful):
    """VFU-32; facts: no file by default, since it cannot be taken back"""
    chain(stateful, False)


def test_with_a_file(trusted):
    """VFU-32, VFU-33"""
    chain(trusted, True)


def test_only_what_can_be_mapped_has_a_file(trusted):
    """VFU-33"""
    for index in range(8):
        region, fds = trusted.region(index)
        for fd in fds:
            os.close(fd)
        assert len(fds) == (1 if region.flags & Region.MMAP else 0)
        assert bool(region.flags & Region.MMAP) == (index == Stateful.MEMORY_BAR)


def test_no_file_for_a_client_that_is_not_trusted(stateful):
    """VFU-33"""
    for index in range(8):
        region, fds = stateful.region(index)
        assert not fds and not region.flags & Region.MMAP


def test_the_mapping_is_the_device(mapped):
    """What is stored through one way is seen through the other"""
    region, fd, client = mapped
    (at, length), = region.areas()
    view = mmap.mmap(fd, length, offset=region.offset + at)
    try:
        client.write(Stateful.MEMORY_BAR, at + 8, b"by socket")
        assert view[8:17] == b"by socket"
        view[length - 8 : length] = b"by store"
        assert client.read(Stateful.MEMORY_BAR, at + length - 8, 8) == b"by store"
    finally:
        view.close()


def test_the_file_cannot_be_cut(mapped):
    """A client that truncates the device's memory would kill the host"""
    region, fd, client = mapped
    with pytest.raises(OSError):
        os.ftruncate(fd, 0)
    client.read(Stateful.MEMORY_BAR, 4096, 4096)
    client.alive()


def test_descriptors_that_a_client_keeps(trusted):
    """They are the client's: nothing stays open in the host (the fixture counts)"""
    kept = []
    for _ in range(20):
        kept += trusted.region(Stateful.MEMORY_BAR)[1]
    assert len(kept) == 20
    trusted.alive()
    for fd in kept:
        os.close(fd)


def test_a_client_of_one_descriptor_gets_it(shared_host, connect):
    """Facts: QEMU takes one descriptor for each region; the default of max_msg_fds is one"""
    client = connect(shared_host, capabilities={})
    _, fds = client.region(Stateful.MEMORY_BAR)
    for fd in fds:
        os.close(fd)
    assert len(fds) == 1
