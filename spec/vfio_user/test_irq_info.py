"""DEVICE_GET_IRQ_INFO."""

import errno
import struct

import pytest

from raw import IRQ_INFO, Memory

EVENTFD, MASKABLE, AUTOMASKED, NORESIZE = 1, 2, 4, 8


def info(index, argsz=16):
    return struct.pack("<IIII", argsz, 0, index, 0)


def irqs(client, indices=range(5)):
    return [struct.unpack("<IIII", client.ok(IRQ_INFO, info(index))) for index in indices]


def test_edus_irqs(edu):
    """INTx, MSI, MSI-X, REQ; ERR is EINVAL on a device without PCI Express, as with vfio-pci"""
    got = irqs(edu, (0, 1, 2, 4))
    edu.fails(errno.EINVAL, IRQ_INFO, info(3))
    assert [count for _, _, _, count in got] == [1, 1, 0, 1]
    assert [index for _, _, index, _ in got] == [0, 1, 2, 4]
    assert all(argsz == 16 for argsz, _, _, _ in got)
    assert got[0][1] == EVENTFD | MASKABLE | AUTOMASKED
    assert got[1][1] == EVENTFD | NORESIZE


def test_statefuls_irqs(stateful):
    """It is on PCI Express and has ERR"""
    assert [count for _, _, _, count in irqs(stateful)] == [1, 1, 0, 1, 1]


@pytest.mark.parametrize("index", [5, 6, 100, 1 << 31, 0xFFFFFFFF])
def test_an_index_beyond_the_last(edu1, index):
    edu1.fails(errno.EINVAL, IRQ_INFO, info(index))


@pytest.mark.parametrize("argsz", [16, 17, 0xFFFFFFFF])
def test_more_room_than_needed(edu1, argsz):
    assert len(edu1.ok(IRQ_INFO, info(0, argsz))) == 16


@pytest.mark.parametrize("argsz", [0, 15])
def test_less_room_than_needed(edu1, argsz):
    """VFU-4"""
    edu1.fails(errno.EINVAL, IRQ_INFO, info(0, argsz))


@pytest.mark.parametrize("length", [0, 1, 15, 17, 32])
def test_another_length(edu, length):
    """VFU-2"""
    edu.fails(errno.EINVAL, IRQ_INFO, (info(0) + bytes(64))[:length])
    edu.alive()


def test_with_a_descriptor(edu1):
    """VFU-3"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, IRQ_INFO, info(0), [memory.fd])
