"""DMA_UNMAP: exactly what was mapped, or all of it; and with the dirty bitmap."""

import errno
import struct
import time

import pytest

from raw import ALL, BITMAP_MAX, DEVICE_FEATURE, DMA_MAP, DMA_UNMAP, GET_DIRTY, PAGE, Edu, Memory, Stateful, dma_map, dma_unmap, feature

TOP = 1 << 64


def with_bitmap(iova, size, page_size, room, argsz=None, flags=GET_DIRTY):
    argsz = 24 + 16 + room if argsz is None else argsz
    return dma_unmap(iova, size, flags, argsz) + struct.pack("<QQ", page_size, room)


def start_logging(client):
    client.ok(DEVICE_FEATURE, feature(1 << 17 | 6, struct.pack("<QII", PAGE, 0, 0)))


@pytest.mark.parametrize("with_fd", [False, True])
def test_what_was_mapped(edu, with_fd):
    """VFU-61; the reply is the request's own entry"""
    with Memory(4 * PAGE) as memory:
        edu.map(0x10000, 4 * PAGE, memory.fd if with_fd else None)
        edu.unmap(0x10000, 4 * PAGE)
        edu.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(0x10000, 4 * PAGE))


@pytest.mark.parametrize(
    "iova, size",
    [
        (0x10000, 0x1000), (0x10000, 0x3000), (0x10000, 0x5000), (0x11000, 0x3000), (0xF000, 0x5000), (0xF000, 0x6000), (0x20000, 0x4000),
        (0x13000, 0x2000), (0x10000, 0x8000), (0x0, 0x4000),
    ],
)
def test_what_is_not_exactly_a_map(edu1, iova, size):
    """VFU-61: nor are two maps one"""
    edu1.map(0x10000, 0x4000)
    edu1.map(0x14000, 0x4000)
    edu1.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(iova, size))
    edu1.unmap(0x10000, 0x4000)
    edu1.unmap(0x14000, 0x4000)


def test_nothing_was_mapped(edu1):
    edu1.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(0x10000, PAGE))


@pytest.mark.parametrize("iova, size", [(0, 0), (0x10000, 0)])
def test_an_empty_range(edu1, iova, size):
    """VFU-51"""
    edu1.map(0x10000, PAGE)
    edu1.fails(errno.EINVAL, DMA_UNMAP, dma_unmap(iova, size))
    edu1.unmap(0x10000, PAGE)


@pytest.mark.parametrize("iova, size", [(TOP - PAGE, 2 * PAGE), (TOP - 1, TOP - 1), (1, TOP - 1), (0x10001, 5)])
def test_a_range_that_nothing_can_have(edu1, iova, size):
    """VFU-51, VFU-61"""
    edu1.map(0x10000, PAGE)
    edu1.fails((errno.EINVAL, errno.ENOENT), DMA_UNMAP, dma_unmap(iova, size))
    edu1.unmap(0x10000, PAGE)


@pytest.mark.parametrize("maps", [0, 1, 2, 100])
def test_everything(edu, maps):
    """VFU-51, VFU-63"""
    with Memory(PAGE) as memory:
        for n in range(maps):
            edu.map(n * 2 * PAGE, PAGE, memory.fd if n % 2 else None)
        assert edu.ok(DMA_UNMAP, dma_unmap(0, 0, ALL)) == dma_unmap(0, 0, ALL)
        for n in range(maps):
            edu.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(n * 2 * PAGE, PAGE))
        edu.map(0, maps * 2 * PAGE + PAGE)


@pytest.mark.parametrize("iova, size", [(0, PAGE), (0x10000, 0), (0x10000, PAGE), (0, TOP - PAGE)])
def test_everything_and_a_range(edu1, iova, size):
    """VFU-51"""
    edu1.map(0x10000, PAGE)
    edu1.fails(errno.EINVAL, DMA_UNMAP, dma_unmap(iova, size, ALL))
    edu1.unmap(0x10000, PAGE)


@pytest.mark.parametrize("flags", [1 << bit for bit in range(2, 32)])
def test_other_flags(edu1, flags):
    """VFU-4"""
    edu1.map(0x10000, PAGE)
    edu1.fails(errno.EINVAL, DMA_UNMAP, dma_unmap(0x10000, PAGE, flags))
    edu1.unmap(0x10000, PAGE)


@pytest.mark.parametrize("length", [0, 1, 8, 16, 23, 25, 32, 40, 4096])
def test_another_length(edu, length):
    """VFU-2"""
    edu.map(0x10000, PAGE)
    edu.fails(errno.EINVAL, DMA_UNMAP, (dma_unmap(0x10000, PAGE) + bytes(4096))[:length])
    edu.unmap(0x10000, PAGE)


def test_no_dma_after_the_reply(edu):
    """SIM-12, the protocol: all references are released before the reply"""
    with Memory(PAGE) as memory:
        edu.map(0x10000, PAGE, memory.fd)
        edu.bus_master()
        memory.view[:4] = b"from"
        Edu.from_ram(edu, 0x10000, 4)
        Edu.start(edu, Edu.BUFFER, 0x10000 + 64, 4, Edu.TO_RAM)
        edu.unmap(0x10000, PAGE)
        before = bytes(memory.view)
        Edu.wait(edu)
        assert bytes(memory.view) == before
        edu.bus_master(False)


def test_no_message_after_the_reply(edu):
    """Nor does a message ask for it"""
    edu.map(0x10000, PAGE)
    edu.bus_master()
    Edu.start(edu, 0x10000, Edu.BUFFER, 4, 0)
    edu.unmap(0x10000, PAGE)
    Edu.wait(edu)
    assert not edu.requests
    edu.bus_master(False)


@pytest.mark.parametrize("page_size", [4096, 8192, 65536, 1 << 20])
def test_with_the_dirty_bitmap(stateful, page_size):
    """VFU-52"""
    with Memory(64 * PAGE) as memory:
        stateful.map(0x100000, 64 * PAGE, memory.fd)
        stateful.bus_master()
        start_logging(stateful)
        Stateful.ring(stateful, 0x100000 + 5 * PAGE, 2 * PAGE, 7)
        got = stateful.ok(DMA_UNMAP, with_bitmap(0x100000, 64 * PAGE, page_size, 16))
        assert len(got) == 24 + 16 + 16
        bits = int.from_bytes(got[40:], "little")
        wanted = 0
        for page in (5, 6):
            wanted |= 1 << (page * PAGE // page_size)
        assert bits == wanted
        stateful.fails(errno.ENOENT, DMA_UNMAP, dma_unmap(0x100000, 64 * PAGE))


@pytest.mark.parametrize("page_size", [0, 1, 2048, 4097, 3 * 4096, 1 << 63 | 4096])
def test_a_bitmap_of_no_page_size(stateful1, page_size):
    """VFU-52"""
    stateful1.map(0x100000, 64 * PAGE)
    stateful1.fails(errno.EINVAL, DMA_UNMAP, with_bitmap(0x100000, 64 * PAGE, page_size, 8))
    stateful1.unmap(0x100000, 64 * PAGE)


@pytest.mark.parametrize("pages, room, fits", [(64, 8, True), (64, 0, False), (65, 8, False), (65, 16, True), (1, 8, True), (64, 16, True)])
def test_room_for_all_pages(stateful1, pages, room, fits):
    """VFU-52"""
    stateful1.map(0x100000, pages * PAGE)
    start_logging(stateful1)
    request = with_bitmap(0x100000, pages * PAGE, PAGE, room)
    if fits:
        assert len(stateful1.ok(DMA_UNMAP, request)) == 40 + room
    else:
        stateful1.fails(errno.EINVAL, DMA_UNMAP, request)
        stateful1.unmap(0x100000, pages * PAGE)


@pytest.mark.parametrize("room", [BITMAP_MAX + 1, BITMAP_MAX + 8, 1 << 32, 1 << 63, TOP - 8, TOP - 1])
def test_a_bitmap_beyond_its_limit(stateful1, room):
    """VFU-4, the table of limits"""
    stateful1.map(0x100000, 64 * PAGE)
    stateful1.fails((errno.E2BIG, errno.EINVAL), DMA_UNMAP, with_bitmap(0x100000, 64 * PAGE, PAGE, room, argsz=0xFFFFFFFF))
    stateful1.unmap(0x100000, 64 * PAGE)


def test_the_longest_bitmap(stateful1):
    """The table of limits: n is taken"""
    stateful1.map(0x100000, 64 * PAGE)
    start_logging(stateful1)
    got = stateful1.ok(DMA_UNMAP, with_bitmap(0x100000, 64 * PAGE, PAGE, BITMAP_MAX - 56))
    assert len(got) == 40 + BITMAP_MAX - 56


def test_everything_with_a_bitmap(stateful1):
    """A bitmap is one range's"""
    stateful1.map(0x100000, PAGE)
    stateful1.fails(errno.EINVAL, DMA_UNMAP, with_bitmap(0, 0, PAGE, 8, flags=GET_DIRTY | ALL))
    stateful1.unmap(0x100000, PAGE)
