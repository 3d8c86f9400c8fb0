"""DMA_MAP: what a map may be, where it may lie, and what comes of files that are not what they seem."""

import errno
import os
import struct
import time

import pytest

from raw import DMA_MAP, DMA_UNMAP, MAPS_MAX, NO_REPLY, PAGE, READ, WRITE, Edu, Memory, dma_map, dma_unmap, message

TOP = 1 << 64


@pytest.mark.parametrize("with_fd", [False, True])
@pytest.mark.parametrize("flags", [READ, WRITE, READ | WRITE])
def test_readable_writable_or_both(edu, with_fd, flags):
    """VFU-50"""
    with Memory(2 * PAGE) as memory:
        edu.map(0x10000, 2 * PAGE, memory.fd if with_fd else None, flags)
        edu.unmap(0x10000, 2 * PAGE)


@pytest.mark.parametrize("flags", [0] + [1 << bit for bit in range(2, 32)] + [3 | 1 << bit for bit in (2, 3, 4, 31)])
def test_other_flags(edu1, flags):
    """VFU-50"""
    edu1.fails(errno.EINVAL, DMA_MAP, dma_map(0x10000, PAGE, flags))
    edu1.map(0x10000, PAGE)


@pytest.mark.parametrize("length", [0, 1, 4, 8, 16, 24, 31, 33, 40, 64, 4096])
def test_another_length(edu, length):
    """VFU-2"""
    payload = (dma_map(0x10000, PAGE) + bytes(4096))[:length]
    edu.fails(errno.EINVAL, DMA_MAP, payload)
    edu.alive()


@pytest.mark.parametrize(
    "iova, size",
    [
        (0, 0), (0x1000, 0), (0x1000, 1), (0x1000, 4095), (0x1000, 4097), (0x1001, 4096), (0x0FFF, 4096), (0x1800, 4096), (1, 4095),
        (TOP - PAGE, 2 * PAGE), (TOP - 2 * PAGE, 3 * PAGE), (TOP - PAGE, TOP - PAGE), (PAGE, TOP - PAGE + 0), (TOP - 1, 1),
    ],
)
def test_what_is_no_range_of_pages(edu1, iova, size):
    """VFU-50: (PAGE, 2^64 - PAGE) ends exactly behind the last address and is not among these errors' reasons alone"""
    if iova + size == TOP and iova % PAGE == 0 and size % PAGE == 0:
        assert edu1.call(DMA_MAP, dma_map(iova, size)).errno in (0, errno.ENOMEM, errno.ENOSPC, errno.EINVAL, errno.E2BIG)
        edu1.ok(DMA_UNMAP, dma_unmap(0, 0, 2))
    else:
        edu1.fails(errno.EINVAL, DMA_MAP, dma_map(iova, size))
    edu1.alive()


@pytest.mark.parametrize("iova", [0, PAGE, 0xFFFC0000, 0xFFFFF000, 1 << 32, 1 << 40, 1 << 46])
def test_a_page_at_many_addresses(edu1, iova):
    """VFU-50; facts: QEMU's ROM at 0xfffc0000 has no descriptor"""
    edu1.map(iova, PAGE)
    edu1.unmap(iova, PAGE)


def test_the_last_page(edu1):
    """VFU-50: does not pass the last address"""
    got = edu1.call(DMA_MAP, dma_map(TOP - PAGE, PAGE))
    assert got.errno in (0, errno.EINVAL), got
    if not got.is_error:
        edu1.unmap(TOP - PAGE, PAGE)
    edu1.alive()


@pytest.mark.parametrize("offset", [1, 512, 4095, 4097])
def test_an_offset_that_is_no_pages(edu1, offset):
    """VFU-50: it counts with a file only"""
    with Memory(4 * PAGE) as memory:
        edu1.fails(errno.EINVAL, DMA_MAP, dma_map(0x10000, PAGE, offset=offset), [memory.fd])
    edu1.ok(DMA_MAP, dma_map(0x10000, PAGE, offset=offset))
    edu1.unmap(0x10000, PAGE)


@pytest.mark.parametrize("offset", [TOP - PAGE, TOP - 2 * PAGE, 1 << 63, (1 << 63) - PAGE])
def test_an_offset_beyond_any_file(edu1, offset):
    """VFU-50, VFU-9"""
    with Memory(PAGE) as memory:
        assert edu1.call(DMA_MAP, dma_map(0x10000, 2 * PAGE, offset=offset), [memory.fd]).is_error
    edu1.map(0x10000, 2 * PAGE)


@pytest.mark.parametrize("size, offset, fits", [(4, 0, True), (4, 1, False), (3, 1, True), (5, 0, False), (1, 3, True), (1, 4, False)])
def test_a_map_beyond_its_file(edu_host, edu1, size, offset, fits):
    """VFU-9: refused, or taken and harmless; a host that touched it would be killed"""
    with Memory(4 * PAGE) as memory:
        got = edu1.call(DMA_MAP, dma_map(0x10000, size * PAGE, offset=offset * PAGE), [memory.fd])
        if fits:
            assert not got.is_error
        if not got.is_error:
            edu1.bus_master()
            Edu.to_ram(edu1, 0x10000 + (size - 1) * PAGE, PAGE)
            Edu.from_ram(edu1, 0x10000 + (size - 1) * PAGE, PAGE)
            edu1.bus_master(False)
    edu1.alive()


def test_the_same_file_at_two_places(edu1):
    """One page of RAM under two addresses, as firmware shadowing makes it"""
    with Memory(2 * PAGE) as memory:
        edu1.map(0x10000, PAGE, memory.fd)
        edu1.map(0x20000, PAGE, memory.fd)
        edu1.map(0x30000, 2 * PAGE, memory.fd)
        edu1.unmap(0x10000, PAGE)
        edu1.bus_master()
        memory.view[PAGE : PAGE + 4] = b"here"
        Edu.from_ram(edu1, 0x30000 + PAGE, 4)
        Edu.to_ram(edu1, 0x20000, 4)
        assert memory.view[:4] == b"here"
        edu1.bus_master(False)


def test_a_file_that_is_cut_after_it_was_mapped(edu_host, edu1):
    """A client that truncates its memory must not kill the host"""
    memory = Memory(16 * PAGE, sealed=False)
    try:
        edu1.map(0x10000, 16 * PAGE, memory.fd)
        memory.view[0:4] = b"data"
        edu1.bus_master()
        Edu.from_ram(edu1, 0x10000, 4)
        os.ftruncate(memory.fd, 0)
        Edu.from_ram(edu1, 0x10000, PAGE)
        Edu.to_ram(edu1, 0x18000, PAGE)
        assert edu_host.process.poll() is None
        edu1.bus_master(False)
        edu1.unmap(0x10000, 16 * PAGE)
    finally:
        os.close(memory.fd)
    edu1.alive()


def test_a_file_that_may_not_be_written(edu1):
    """VFU-9: with a map that may be written it is refused, or its DMA moves nothing"""
    name = f"/proc/self/fd/{(memory := Memory(PAGE)).fd}"
    fd = os.open(name, os.O_RDONLY)
    try:
        memory.view[:4] = b"kept"
        got = edu1.call(DMA_MAP, dma_map(0x10000, PAGE), [fd])
        if not got.is_error:
            edu1.bus_master()
            Edu.to_ram(edu1, 0x10000, 4)
            edu1.bus_master(False)
        assert memory.view[:4] == b"kept"
    finally:
        os.close(fd)
        memory.__exit__()
    edu1.alive()


@pytest.mark.parametrize("with_fd", [False, True])
@pytest.mark.parametrize(
    "iova, size",
    [
        (0x10000, 0x4000), (0xF000, 0x2000), (0x13000, 0x2000), (0x11000, 0x1000), (0x10000, 0x1000), (0x13000, 0x1000), (0xF000, 0x6000),
        (0x0, 0x100000),
    ],
)
def test_a_map_over_another(edu1, with_fd, iova, size):
    """VFU-61"""
    with Memory(0x100000) as memory:
        fds = [memory.fd] if with_fd else []
        edu1.map(0x10000, 0x4000, memory.fd if with_fd else None)
        edu1.fails(errno.EEXIST, DMA_MAP, dma_map(iova, size), fds)
        # The one that was there is as it was, and its neighbours are free.
        edu1.map(0xF000, 0x1000, memory.fd if with_fd else None)
        edu1.map(0x14000, 0x1000)
        edu1.unmap(0x10000, 0x4000)


def test_a_refused_map_is_not_there(edu1):
    """VFU-9"""
    edu1.map(0x10000, 0x2000)
    edu1.fails(errno.EEXIST, DMA_MAP, dma_map(0x11000, 0x2000))
    edu1.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(0x11000, 0x2000))
    edu1.map(0x12000, 0x1000)


@pytest.mark.parametrize("maps", [1, 2, 5])
def test_no_more_maps_than_agreed(edu_host, connect, maps):
    """VFU-62: n - 1, n, n + 1"""
    client = connect(edu_host, capabilities={"max_dma_maps": maps})
    for n in range(maps):
        client.map(n * PAGE, PAGE)
    client.fails(errno.ENOSPC, DMA_MAP, dma_map(maps * PAGE, PAGE))
    client.unmap(0, PAGE)
    client.map(maps * PAGE, PAGE)
    client.fails(errno.ENOSPC, DMA_MAP, dma_map(0, PAGE))


@pytest.mark.slow
def test_as_many_maps_as_there_can_be(edu_host, connect):
    """VFU-62, and the table: 65535; they go with their client"""
    client = connect(edu_host)
    for start in range(0, MAPS_MAX - 1, 2048):
        some = range(start, min(start + 2048, MAPS_MAX - 1))
        client.send_raw(b"".join(message(DMA_MAP, dma_map(n * PAGE, PAGE), NO_REPLY) for n in some))
        client.alive()
    client.map((MAPS_MAX - 1) * PAGE, PAGE)
    client.fails(errno.ENOSPC, DMA_MAP, dma_map(MAPS_MAX * PAGE, PAGE))
    # What was refused without a reply would be missing here.
    for n in (0, 1, 4095, 32768, MAPS_MAX - 2):
        client.unmap(n * PAGE, PAGE)
    client.close()
    again = connect(edu_host)
    again.map(0, 1 << 30)


def test_maps_that_want_no_reply(edu):
    """VFU-13: QEMU's NOWAIT maps"""
    with Memory(64 * PAGE) as memory:
        for n in range(64):
            edu.send(DMA_MAP, dma_map(n * PAGE, PAGE, offset=n * PAGE), [memory.fd], flags=NO_REPLY)
        # An error says nothing, either.
        edu.send(DMA_MAP, dma_map(0, PAGE), [memory.fd], flags=NO_REPLY)
        for n in range(64):
            edu.unmap(n * PAGE, PAGE)
        edu.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(0, PAGE))


def test_a_map_without_a_file_of_any_size_takes_no_memory(edu_host, edu1):
    """Nothing is taken for what was only said: refused, or cheap"""
    before = edu_host.memory_kib()
    for shift in range(12, 64):
        got = edu1.call(DMA_MAP, dma_map(0, 1 << shift))
        assert got.errno in (0, errno.ENOMEM, errno.ENOSPC, errno.E2BIG, errno.EINVAL), got
        if not got.is_error:
            edu1.unmap(0, 1 << shift)
    assert edu_host.memory_kib() - before < 64 << 10


def test_a_file_of_any_size_takes_no_memory(edu_host, edu1):
    """A sparse file of a terabyte is no memory"""
    before = edu_host.memory_kib()
    fd = os.memfd_create("test-ram", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, 1 << 46)
        for shift in range(12, 47):
            got = edu1.call(DMA_MAP, dma_map(0, 1 << shift), [fd])
            assert got.errno in (0, errno.ENOMEM, errno.ENOSPC, errno.E2BIG, errno.EINVAL), got
            if not got.is_error:
                edu1.unmap(0, 1 << shift)
    finally:
        os.close(fd)
    assert edu_host.memory_kib() - before < 64 << 10


def test_a_churn_of_maps(edu):
    """Facts: the firmware's shadowing; nothing grows (the fixture counts)"""
    with Memory(16 * PAGE) as memory:
        # In parts: replies that nobody reads would hold up both.
        for part in range(0, 300, 30):
            for n in range(part, part + 30):
                edu.send(DMA_MAP, dma_map(0xC0000, 16 * PAGE), [memory.fd], id=n)
                edu.send(DMA_UNMAP, dma_unmap(0xC0000, 16 * PAGE), id=n)
            for n in range(part, part + 30):
                assert not edu.reply(DMA_MAP, n).is_error
                assert not edu.reply(DMA_UNMAP, n).is_error


@pytest.mark.parametrize("count", [2, 3, 64])
def test_more_than_one_file(edu1, count):
    """VFU-3"""
    with Memory(PAGE) as memory:
        edu1.fails(errno.EINVAL, DMA_MAP, dma_map(0x10000, PAGE), [memory.fd] * count)
    edu1.map(0x10000, PAGE)


def test_shared_memory_is_what_the_device_reaches(edu):
    """A map's rights, addresses and offset, by the device's own DMA"""
    with Memory(8 * PAGE) as memory:
        edu.map(0x100000, 4 * PAGE, memory.fd, offset=2 * PAGE)
        edu.map(0x200000, PAGE, memory.fd, flags=READ, offset=6 * PAGE)
        edu.bus_master()
        memory.view[3 * PAGE - 2 : 3 * PAGE + 2] = b"abcd"
        Edu.from_ram(edu, 0x100000 + PAGE - 2, 4)
        Edu.to_ram(edu, 0x100000 + 2 * PAGE, 4)
        assert memory.view[4 * PAGE : 4 * PAGE + 4] == b"abcd"
        Edu.to_ram(edu, 0x200000, 4)
        assert memory.view[6 * PAGE : 6 * PAGE + 4] == bytes(4), "DMA into a map that may only be read"
        edu.bus_master(False)


def test_dma_follows_the_bus_master_bit(edu1):
    """SIM-11, through the socket"""
    with Memory(PAGE) as memory:
        edu1.map(0x10000, PAGE, memory.fd)
        memory.view[:4] = b"this"
        edu1.bus_master()
        Edu.from_ram(edu1, 0x10000, 4)
        edu1.bus_master(False)
        Edu.to_ram(edu1, 0x10000 + 16, 4)
        assert memory.view[16:20] == bytes(4)
        edu1.bus_master()
        Edu.to_ram(edu1, 0x10000 + 16, 4)
        assert memory.view[16:20] == b"this"
        edu1.bus_master(False)
