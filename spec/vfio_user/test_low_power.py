"""DEVICE_FEATURE's low power: entry, entry with a wake-up, exit."""

import errno
import struct

import pytest

from raw import CONFIG, DEVICE_FEATURE, GET_INFO, REGION_READ, EventFd, Memory, Stateful, feature, region_read

SET = 1 << 17
ENTRY, WAKEUP, EXIT = 3, 4, 5


def enter(client):
    client.ok(DEVICE_FEATURE, feature(SET | ENTRY))


def leave(client):
    client.ok(DEVICE_FEATURE, feature(SET | EXIT))


def test_it_is_entered_and_left(edu):
    """POWER-1, POWER-12"""
    enter(edu)
    edu.fails(errno.EIO, REGION_READ, region_read(0, 0, 4))
    edu.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | ENTRY))
    leave(edu)
    leave(edu)
    assert edu.read32(0, 0) == 0x010000ED


@pytest.mark.parametrize("index", [ENTRY, EXIT])
@pytest.mark.parametrize("length", [1, 8, 100])
def test_data_where_there_are_none(edu1, index, length):
    """VFU-2"""
    edu1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | index, bytes(length)))
    assert edu1.read32(0, 0) == 0x010000ED


@pytest.mark.parametrize("length", [0, 4, 7, 9, 16])
def test_a_wake_up_of_another_length(edu1, length):
    """VFU-2"""
    with EventFd() as event:
        edu1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | WAKEUP, bytes(length)), [event.fd])
    assert edu1.read32(0, 0) == 0x010000ED


@pytest.mark.parametrize("count", [0, 2, 64])
def test_a_wake_up_has_one_descriptor(edu1, count):
    """VFU-3"""
    with EventFd() as event:
        edu1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | WAKEUP, struct.pack("<iI", 0, 0)), [event.fd] * count)
    assert edu1.read32(0, 0) == 0x010000ED


@pytest.mark.parametrize("index", [ENTRY, EXIT])
def test_a_descriptor_where_there_is_none(edu1, index):
    """VFU-3"""
    with EventFd() as event:
        edu1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | index), [event.fd])
    assert edu1.read32(0, 0) == 0x010000ED


def test_the_first_request_wakes_it(edu):
    """POWER-13"""
    with EventFd() as event:
        edu.ok(DEVICE_FEATURE, feature(SET | WAKEUP, struct.pack("<iI", 0, 0)), [event.fd])
        assert edu.read32(0, 0) == 0x010000ED
        assert event.count(2.0) == 1
        assert edu.read32(0, 0) == 0x010000ED
        assert event.count() == 0


def test_a_sleeper_whose_client_goes_is_awake_for_the_next(edu_host, connect):
    """POWER-16"""
    for wakeup in (False, True):
        client = connect(edu_host)
        if wakeup:
            with EventFd() as event:
                client.ok(DEVICE_FEATURE, feature(SET | WAKEUP, struct.pack("<iI", 0, 0)), [event.fd])
        else:
            enter(client)
        client.close()
        assert connect(edu_host).read32(0, 0) == 0x010000ED
        # One client at a time.
        connect.end()


def test_a_wake_up_of_no_eventfd(edu1):
    """Refused or harmless"""
    with Memory(4096) as memory:
        edu1.call(DEVICE_FEATURE, feature(SET | WAKEUP, struct.pack("<iI", 0, 0)), [memory.fd])
    edu1.ok(DEVICE_FEATURE, feature(SET | EXIT))
    assert edu1.read32(0, 0) == 0x010000ED
