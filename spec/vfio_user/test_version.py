"""VERSION: what must come first, and what both sides then keep to."""

import errno
import json
import struct

import pytest

from raw import (
    COMMAND, CONFIG, FIRST_MESSAGE_MAX, GET_INFO, HEADER, NO_REPLY, REGION_READ, REPLY, RESET, VERSION, VERSION_DATA_MAX, Client,
    Closed, Memory, message, region_read, version,
)

GET = struct.pack("<IIII", 16, 0, 0, 0)


def answered(client, payload):
    """The reply to a VERSION that is accepted: minor, capabilities."""
    got = client.call(VERSION, payload)
    assert not got.is_error, got
    assert not got.fds
    major, minor = struct.unpack_from("<HH", got.payload)
    assert major == 0
    data = got.payload[4:]
    assert not data or data[-1:] == b"\0" and b"\0" not in data[:-1]
    return minor, json.loads(data[:-1] or b"{}").get("capabilities", {})


def refused(client, err, payload, fds=(), cmd=VERSION, flags=COMMAND):
    """The answer is sent, then the connection ends."""
    client.fails(err, cmd, payload, fds, flags)
    client.closed()


@pytest.mark.parametrize(
    "data",
    [b"", b"\0", b"{}", b"{}\0", b'{"capabilities":{}}', b'{"capabilities":{}}\0', b' { "capabilities" : { } } \n', b'{"other":[1,2]}\0'],
)
@pytest.mark.parametrize("minor", [0, 1])
def test_data_may_be_missing_or_empty_and_without_a_nul(fresh, minor, data):
    """VFU-20; seen elsewhere: a panic without a NUL, `{}` refused"""
    got, capabilities = answered(fresh, version(minor, data=data))
    assert got == minor
    # VFU-24: nothing but these is named to a client that named nothing.
    assert set(capabilities) <= {"max_msg_fds", "max_data_xfer_size"}
    fresh.alive()


@pytest.mark.parametrize("minor, wanted", [(0, 0), (1, 1), (2, 1), (255, 1), (65535, 1)])
def test_the_minor_version_is_not_above_the_clients(fresh, minor, wanted):
    """VFU-24"""
    assert answered(fresh, version(minor))[0] == wanted
    fresh.alive()


@pytest.mark.parametrize("major", [1, 2, 256, 65535])
def test_another_major_version(fresh, major):
    """VFU-25"""
    refused(fresh, errno.EPROTONOSUPPORT, version(0, major=major))


@pytest.mark.parametrize("length", range(4))
def test_a_version_without_its_numbers(fresh, length):
    """VFU-2, VFU-25"""
    refused(fresh, errno.EINVAL, bytes(length))


def test_what_qemu_proposes(fresh):
    """Facts: QEMU's client"""
    minor, capabilities = answered(
        fresh,
        version(0, {"max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535, "pgsizes": 4096, "write_multiple": True}),
    )
    assert minor == 0
    # It refuses more than its own.
    assert capabilities["max_msg_fds"] <= 16
    assert capabilities["max_data_xfer_size"] <= 1048576
    assert capabilities.get("write_multiple", True) is True
    fresh.alive()


@pytest.mark.parametrize("size", [1, 4095, 4096, 1048575, 1048576, 1048577, 1 << 31])
def test_the_data_size_is_not_above_the_clients(fresh, size):
    """VFU-24"""
    _, capabilities = answered(fresh, version(1, {"max_data_xfer_size": size}))
    assert capabilities["max_data_xfer_size"] == min(size, 1 << 20)
    if size < 256:
        fresh.fails(errno.E2BIG, REGION_READ, region_read(CONFIG, 0, size + 1))
        fresh.read(CONFIG, 0, size)
    fresh.alive()


@pytest.mark.parametrize("count", [1, 2, 16, 64, 1000])
def test_the_number_of_descriptors_is_not_above_the_clients(fresh, count):
    """VFU-24"""
    _, capabilities = answered(fresh, version(1, {"max_msg_fds": count}))
    assert 1 <= capabilities["max_msg_fds"] <= count
    fresh.alive()


@pytest.mark.parametrize("maps", [1, 100, 65535, 100000])
def test_the_number_of_maps_is_not_above_the_clients(fresh, maps):
    """VFU-24"""
    _, capabilities = answered(fresh, version(1, {"max_dma_maps": maps}))
    assert capabilities["max_dma_maps"] <= maps
    fresh.alive()


@pytest.mark.parametrize("sizes", [4096, 4096 | 1 << 21, 4096 | 1 << 21 | 1 << 30, (1 << 53) - 4096])
def test_a_common_page_size(fresh, sizes):
    """VFU-21"""
    _, capabilities = answered(fresh, version(1, {"pgsizes": sizes}))
    assert capabilities.get("pgsizes", 4096) & sizes & 4096
    fresh.alive()


@pytest.mark.parametrize("sizes", [0, 1, 2048, 8192, 65536, 1 << 21])
def test_no_common_page_size(fresh, sizes):
    """VFU-25"""
    refused(fresh, errno.EINVAL, version(1, {"pgsizes": sizes}))


def test_data_of_no_bytes(fresh):
    """VFU-25"""
    refused(fresh, errno.EINVAL, version(1, {"max_data_xfer_size": 0}))


@pytest.mark.parametrize("twin", [{"supported": True}, {"supported": False}, {}])
def test_twin_sockets_are_not_offered(fresh, twin):
    """VFU-24"""
    _, capabilities = answered(fresh, version(1, {"twin_socket": twin, "max_msg_fds": 8}))
    assert capabilities.get("twin_socket", {}).get("supported", False) is False
    fresh.alive()


def test_the_reply_names_only_what_the_client_has_named(fresh):
    """VFU-24"""
    offered = {"pgsizes": 4096, "write_multiple": False, "migration": {"pgsize": 4096, "max_bitmap_size": 1 << 20}, "new": {"x": [1]}}
    _, capabilities = answered(fresh, version(1, offered))
    assert set(capabilities) <= set(offered) - {"new"} | {"max_msg_fds", "max_data_xfer_size"}
    assert capabilities.get("write_multiple", False) is False
    fresh.alive()


@pytest.mark.parametrize(
    "data",
    [
        b"{", b"}", b"[]", b"[1]", b"1", b"null", b"true", b'"text"', b"{\xff}", b'{"a":}', b"nonsense", b'{"capabilities":{}', b"{}{}",
        b'{"capabilities":[]}', b'{"capabilities":1}', b'{"capabilities":"x"}',
    ],
)
@pytest.mark.parametrize("end", [b"", b"\0"])
def test_data_that_are_no_object(fresh, data, end):
    """VFU-22"""
    refused(fresh, errno.EINVAL, version(1, data=data + end))


@pytest.mark.parametrize("name", ["max_msg_fds", "max_data_xfer_size", "max_dma_maps", "pgsizes"])
@pytest.mark.parametrize("value", ["-1", "1.5", '"16"', "true", "[]", "{}", "18446744073709551616", "1e400", "-1e5"])
def test_a_number_of_another_type_or_beyond_its_range(fresh, name, value):
    """VFU-22"""
    refused(fresh, errno.EINVAL, version(1, data=f'{{"capabilities":{{"{name}":{value}}}}}\0'.encode()))


@pytest.mark.parametrize(
    "text",
    [
        '"write_multiple":1', '"write_multiple":"true"', '"write_multiple":{}', '"twin_socket":true', '"twin_socket":[]',
        '"twin_socket":{"supported":1}', '"twin_socket":{"supported":"yes"}', '"migration":1', '"migration":[]',
        '"migration":{"pgsize":"4096"}', '"migration":{"pgsize":-1}', '"migration":{"max_bitmap_size":1.5}',
    ],
)
def test_a_capability_of_another_type(fresh, text):
    """VFU-22"""
    refused(fresh, errno.EINVAL, version(1, data=f'{{"capabilities":{{{text}}}}}\0'.encode()))


@pytest.mark.parametrize("length", [VERSION_DATA_MAX - 1, VERSION_DATA_MAX])
def test_the_longest_data(fresh, length):
    """VFU-23"""
    data = b"{}" + b" " * (length - 3) + b"\0"
    assert len(data) == length
    answered(fresh, version(1, data=data))
    fresh.alive()


def test_data_that_are_too_long(fresh):
    """VFU-23; the table of limits: E2BIG, or the end at once, since the message is longer than a first message may be"""
    try:
        fresh.send(VERSION, version(1, data=b"{}" + b" " * (VERSION_DATA_MAX - 1)), id=3)
        assert fresh.reply(VERSION, 3).errno == errno.E2BIG
    except (Closed, BrokenPipeError, ConnectionResetError):
        return
    fresh.closed()


@pytest.mark.parametrize("cmd", [VERSION, GET_INFO])
@pytest.mark.parametrize("size", [FIRST_MESSAGE_MAX + 1, 100000, 1048608, 0xFFFFFFFF])
def test_before_version_nothing_longer_is_waited_for(fresh, cmd, size):
    """VFU-26"""
    fresh.send_raw(message(cmd, b"", size=size))
    try:
        got = fresh.recv_any()
        assert got.is_error and got.errno in (errno.E2BIG, errno.EPROTO), got
    except Closed:
        return
    fresh.closed()


@pytest.mark.parametrize("size", [0, 15])
def test_a_first_message_shorter_than_its_header(fresh, size):
    """VFU-7"""
    fresh.send_raw(message(VERSION, version(), size=size))
    fresh.closed()


@pytest.mark.parametrize("cmd", [0, 2, GET_INFO, RESET, 11, 14, 18, 99, 65535])
def test_another_command_first(fresh, cmd):
    """VFU-25"""
    refused(fresh, errno.EPROTO, GET if cmd == GET_INFO else b"", cmd=cmd)


def test_a_version_that_wants_no_reply(fresh):
    """VFU-25: it is told so all the same"""
    refused(fresh, errno.EPROTO, version(), flags=NO_REPLY)


def test_a_reply_first(fresh):
    """Nothing was asked: nothing is served before VERSION"""
    fresh.send_raw(message(VERSION, version(), REPLY))
    try:
        got = fresh.recv_any(0.3)
        assert got.is_error, got
    except (Closed, TimeoutError):
        pass


@pytest.mark.parametrize("count", [1, 2, 64, 65])
def test_descriptors_with_version(fresh, count):
    """VFU-3, VFU-25 (the fixture counts descriptors)"""
    with Memory(4096) as memory:
        refused(fresh, errno.EINVAL, version(), fds=[memory.fd] * count)


@pytest.mark.parametrize("minor", [0, 1])
def test_a_version_cut_anywhere(edu_host, connect, minor):
    """VFU-5"""
    whole = message(VERSION, version(minor, {"max_msg_fds": 4}), id=7)
    for at in range(1, len(whole)):
        client = connect(edu_host, hello=False)
        client.send_raw(whole[:at])
        client.send_raw(whole[at:])
        assert struct.unpack_from("<HH", client.reply(VERSION, 7).payload) == (0, minor)
        client.close()


def test_a_version_byte_by_byte(fresh):
    """VFU-5"""
    for byte in message(VERSION, version(), id=7):
        fresh.send_raw(bytes([byte]))
    assert not fresh.reply(VERSION, 7).is_error
    fresh.alive()


def test_requests_right_behind_version_are_served(fresh):
    """VFU-5"""
    fresh.send_raw(
        message(VERSION, version(), id=1) + message(GET_INFO, GET, id=2) + message(REGION_READ, region_read(CONFIG, 0, 4), id=3)
    )
    assert not fresh.reply(VERSION, 1).is_error
    assert not fresh.reply(GET_INFO, 2).is_error
    assert fresh.reply(REGION_READ, 3).payload[16:] == bytes.fromhex("3412e811")


def test_what_came_behind_a_refused_version_is_not_served(edu_host, connect, fresh):
    """VFU-25"""
    from raw import REGION_WRITE, region_write

    behind = message(REGION_WRITE, region_write(0, 4, struct.pack("<I", 0x600DBAD)), id=2)
    fresh.send_raw(message(VERSION, version(major=9), id=1) + behind)
    assert fresh.reply(VERSION, 1).errno == errno.EPROTONOSUPPORT
    fresh.closed()
    fresh.close()
    assert connect(edu_host).read32(0, 4) != 0xFFFFFFFF & ~0x600DBAD


def test_a_second_version_changes_nothing(edu_host, connect):
    """VFU-27"""
    client = connect(edu_host, capabilities={"max_data_xfer_size": 64})
    client.fails(errno.EINVAL, VERSION, version(1, {"max_data_xfer_size": 1 << 20}))
    client.fails(errno.E2BIG, REGION_READ, region_read(CONFIG, 0, 65))
    client.read(CONFIG, 0, 64)
    client.fails(errno.EINVAL, VERSION, version(0, major=5))
    client.alive()


@pytest.mark.parametrize("depth", [10, 100, 1000, 2000])
@pytest.mark.parametrize("opening, closing", [("[", "]"), ('{"a":', "}")])
def test_data_nested_deeply_overflow_no_stack(edu_host, fresh, depth, opening, closing):
    """VFU-2"""
    if len(opening) * depth > 7000:
        depth = 1200
    text = '{"capabilities":{"x":' + opening * depth + "1" + closing * depth + "}}"
    got = fresh.call(VERSION, version(1, data=text.encode()[:VERSION_DATA_MAX]))
    assert not got.is_error or got.errno == errno.EINVAL
    assert edu_host.process.poll() is None


def test_every_first_message_of_random_bytes_ends_without_harm(edu_host, connect):
    """VFU-6"""
    import os
    import random

    seed = int(os.environ.get("VFU_SEED", "20261121"))
    print("VFU_SEED", seed)
    random = random.Random(seed)
    for _ in range(100):
        client = connect(edu_host, hello=False)
        payload = struct.pack("<HH", 0, random.randrange(3)) + random.randbytes(random.randrange(60))
        got = client.call(VERSION, payload)
        assert not got.is_error or got.errno == errno.EINVAL
        client.close()
