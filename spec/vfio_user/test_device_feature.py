"""DEVICE_FEATURE: methods, and the device's state. Logging is in test_dma_logging.py, low power in test_low_power.py."""

import errno
import os
import struct

import pytest

from raw import CONFIG, DEVICE_FEATURE, NO_REPLY, REGION_READ, RESET, Memory, Stateful, feature, region_read

GET, SET, PROBE = 1 << 16, 1 << 17, 1 << 18
MIGRATION, DEVICE_STATE, LOW_POWER, LOW_POWER_WAKEUP, LOW_POWER_EXIT, LOG_START, LOG_STOP, LOG_REPORT = range(1, 9)
ERROR, STOP, RUNNING, STOP_COPY, RESUMING, RUNNING_P2P, PRE_COPY, PRE_COPY_P2P = range(8)


def state(client):
    payload = client.ok(DEVICE_FEATURE, feature(GET | DEVICE_STATE, argsz=16))
    assert len(payload) == 16
    return struct.unpack_from("<I", payload, 8)[0]


def set_state(client, value):
    request = feature(SET | DEVICE_STATE, struct.pack("<II", value, 0))
    got = client.ok(DEVICE_FEATURE, request)
    assert got[4:12] == request[4:12] and len(got) == 16
    assert state(client) == value


def test_migration_flags(stateful):
    """STOP_COPY at least"""
    got = stateful.ok(DEVICE_FEATURE, feature(GET | MIGRATION, argsz=16))
    argsz, flags, value = struct.unpack("<IIQ", got)
    assert argsz == 16 and flags == GET | MIGRATION
    assert value & 1 and value & ~7 == 0


@pytest.mark.parametrize("index", [MIGRATION, DEVICE_STATE])
def test_a_device_without_migration(edu, index):
    """VFU-4"""
    edu.fails(errno.ENOTTY, DEVICE_FEATURE, feature(GET | index, argsz=16))
    edu.fails(errno.ENOTTY, DEVICE_FEATURE, feature(PROBE | GET | index, argsz=16))


@pytest.mark.parametrize("index", [0, 9, 10, 11, 100, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("method", [GET, SET, PROBE, PROBE | GET, PROBE | SET, PROBE | GET | SET])
def test_an_unknown_feature(stateful1, index, method):
    """VFU-4"""
    stateful1.fails(errno.ENOTTY, DEVICE_FEATURE, feature(method | index, bytes(8), argsz=4096))


@pytest.mark.parametrize(
    "index, get, set",
    [
        (MIGRATION, True, False), (DEVICE_STATE, True, True), (LOW_POWER, False, True), (LOW_POWER_WAKEUP, False, True),
        (LOW_POWER_EXIT, False, True), (LOG_START, False, True), (LOG_STOP, False, True), (LOG_REPORT, True, False),
    ],
)
def test_probes(stateful, index, get, set):
    """VFU-56; the reply is the request's payload; VFU-2: a probe's data are not looked at"""
    for methods, wanted in ((0, get or set), (GET, get), (SET, set), (GET | SET, get and set)):
        for data in (b"", bytes(3), bytes(24), b"\xFF" * 100):
            request = feature(PROBE | methods | index, data, argsz=4096)
            if wanted:
                got = stateful.ok(DEVICE_FEATURE, request)
                assert got[4:8] == request[4:8]
            else:
                stateful.fails(errno.ENOTTY, DEVICE_FEATURE, request)


@pytest.mark.parametrize("index", [MIGRATION, DEVICE_STATE, LOG_START, LOG_STOP, LOG_REPORT])
@pytest.mark.parametrize("method", [0, GET | SET])
def test_not_one_method(stateful1, index, method):
    """VFU-56"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(method | index, bytes(8), argsz=4096))


@pytest.mark.parametrize("bit", range(19, 32))
def test_other_flags(stateful1, bit):
    """VFU-4"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(1 << bit | GET | MIGRATION, argsz=16))


@pytest.mark.parametrize("method, index", [(SET, MIGRATION), (GET, LOG_START), (GET, LOG_STOP), (SET, LOG_REPORT), (GET, LOW_POWER)])
def test_a_feature_that_has_not_this_method(stateful1, method, index):
    """VFU-4"""
    stateful1.fails(errno.ENOTTY, DEVICE_FEATURE, feature(method | index, bytes(24), argsz=4096))


@pytest.mark.parametrize("length", range(8))
def test_a_request_shorter_than_its_head(stateful, length):
    """VFU-2"""
    stateful.fails(errno.EINVAL, DEVICE_FEATURE, feature(GET | MIGRATION)[:length])


@pytest.mark.parametrize("index", [MIGRATION, DEVICE_STATE])
@pytest.mark.parametrize("argsz", [0, 7, 8, 15])
def test_a_reply_without_room(stateful1, index, argsz):
    """VFU-56"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(GET | index, argsz=argsz))


@pytest.mark.parametrize("argsz", [16, 17, 4096, 0xFFFFFFFF])
def test_a_reply_with_room(stateful1, argsz):
    assert len(stateful1.ok(DEVICE_FEATURE, feature(GET | MIGRATION, argsz=argsz))) == 16


@pytest.mark.parametrize("length", [0, 1, 3, 4, 7, 9, 12, 16, 1000])
def test_a_state_of_another_length(stateful, length):
    """VFU-57; seen elsewhere: a heap over-read on SET without data"""
    stateful.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | DEVICE_STATE, (struct.pack("<II", STOP, 0) + bytes(1000))[:length]))
    assert state(stateful) == RUNNING


@pytest.mark.parametrize("value", [ERROR, RUNNING_P2P, PRE_COPY_P2P, 8, 9, 255, 256 + STOP, 1 << 31, 0xFFFFFFFF])
def test_a_state_that_cannot_be_asked_for(stateful, value):
    """VFU-57; seen elsewhere: an off-by-one on the state's number"""
    stateful.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | DEVICE_STATE, struct.pack("<II", value, 0)))
    assert state(stateful) == RUNNING


@pytest.mark.parametrize(
    "path",
    [
        (STOP, RUNNING), (STOP, STOP_COPY, STOP, RUNNING), (STOP_COPY, STOP), (STOP_COPY, RUNNING), (STOP, RESUMING),
        (RESUMING,), (RUNNING,), (STOP, STOP), (PRE_COPY, RUNNING), (PRE_COPY, STOP_COPY, RUNNING), (PRE_COPY, STOP),
    ],
)
def test_ways_through_the_states(stateful, path):
    """The protocol's arcs and the ways combined of them"""
    assert state(stateful) == RUNNING
    for value in path:
        set_state(stateful, value)


def test_a_way_that_does_not_exist(stateful1):
    """The protocol: STOP_COPY to PRE_COPY; the state stays"""
    set_state(stateful1, STOP_COPY)
    got = stateful1.call(DEVICE_FEATURE, feature(SET | DEVICE_STATE, struct.pack("<II", PRE_COPY, 0)))
    assert got.is_error
    assert state(stateful1) == STOP_COPY


@pytest.mark.parametrize("value", [STOP, STOP_COPY, RESUMING])
def test_what_answers_in_a_stopped_device(stateful1, value):
    """VFU-18, STATE-4; seen elsewhere: region access refused in STOP_COPY"""
    stateful1.read(CONFIG, 0, 256)
    set_state(stateful1, value)
    assert stateful1.read(CONFIG, 0, 4) == bytes.fromhex("3412a757")
    stateful1.write(CONFIG, 0x3C, b"\x05")
    for index in range(8):
        region, fds = stateful1.region(index)
        assert region.index == index
        for fd in fds:
            os.close(fd)
    got = stateful1.call(REGION_READ, region_read(0, 0, 4))
    assert got.errno in (0, errno.EIO)


def test_a_reset_ends_every_state(stateful):
    for value in (STOP, STOP_COPY, RESUMING, PRE_COPY):
        set_state(stateful, value)
        stateful.ok(RESET)
        assert state(stateful) == RUNNING


def test_with_a_descriptor(stateful1):
    """VFU-3"""
    with Memory(4096) as memory:
        stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(GET | MIGRATION, argsz=16), [memory.fd])
        stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | DEVICE_STATE, struct.pack("<II", STOP, 0)), [memory.fd])
    assert state(stateful1) == RUNNING


def test_without_a_reply(stateful1):
    """VFU-13"""
    stateful1.send(DEVICE_FEATURE, feature(SET | DEVICE_STATE, struct.pack("<II", STOP, 0)), flags=NO_REPLY)
    assert state(stateful1) == STOP
