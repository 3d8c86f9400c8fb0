"""The header, and the stream as such: lengths, types, ids, order, cuts, descriptors."""

import errno
import os
import struct

import pytest

from raw import (
    COMMAND, CONFIG, DATA_MAX, DMA_MAP, DMA_READ, DMA_WRITE, ERROR, FDS_MAX, GET_INFO, HEADER, IRQ_INFO, MESSAGE_MAX, NO_REPLY,
    REGION_READ, REGION_WRITE, REPLY, RESET, SET_IRQS, EventFd, Memory, dma_map, dma_unmap, message, region_read, region_write,
    set_irqs, version, DMA_UNMAP,
)

GET = struct.pack("<IIII", 16, 0, 0, 0)


@pytest.mark.parametrize("cmd", [0, 14, 19, 20, 255, 256, 0x7FFF, 0xFFFF])
@pytest.mark.parametrize("length", [0, 1, 16, 100, 5000])
def test_an_unknown_command_is_refused_and_its_payload_leaves_the_stream(edu, cmd, length):
    """VFU-4, VFU-16; seen elsewhere: an unknown command's payload left in the stream."""
    edu.fails(errno.ENOSYS, cmd, b"\xA5" * length)
    edu.alive()


@pytest.mark.parametrize("cmd", [DMA_READ, DMA_WRITE])
def test_the_servers_own_commands_are_unknown_from_a_client(edu, cmd):
    """VFU-4"""
    edu.fails(errno.ENOSYS, cmd, struct.pack("<QQ", 0x1000, 4) + b"data")
    edu.alive()


@pytest.mark.parametrize("kind", range(2, 16))
def test_what_is_neither_command_nor_reply_is_refused(edu1, kind):
    """VFU-14"""
    edu1.fails(errno.EINVAL, GET_INFO, GET, flags=kind)
    edu1.alive()


@pytest.mark.parametrize("size", [0, 1, 4, 15])
def test_a_message_shorter_than_its_header_ends_the_connection(edu, size):
    """VFU-7"""
    edu.send_raw(message(GET_INFO, GET, size=size))
    edu.closed()


@pytest.mark.parametrize("size", [MESSAGE_MAX + 1, MESSAGE_MAX + 4096, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF])
def test_a_message_beyond_the_limit_ends_the_connection_at_once(edu, size):
    """VFU-7, VFU-17: nothing is waited for."""
    edu.send_raw(message(REGION_WRITE, size=size))
    edu.closed()


@pytest.mark.parametrize("size", [MESSAGE_MAX - 1, MESSAGE_MAX])
def test_a_message_up_to_the_limit_is_read_whole(edu1, size):
    """VFU-15, VFU-16"""
    edu1.fails(errno.ENOSYS, 77, bytes(size - HEADER))
    edu1.alive()


def test_a_length_that_was_said_and_not_sent_takes_no_memory(edu_host, edu1):
    """VFU-17"""
    before = edu_host.memory_kib()
    edu1.send_raw(message(REGION_WRITE, region_write(0, 0, b""), size=MESSAGE_MAX))
    assert edu_host.memory_kib() - before < 8 << 10


def test_a_header_alone_is_waited_for(edu1):
    """VFU-5"""
    whole = message(GET_INFO, GET, id=9)
    edu1.send_raw(whole[:HEADER])
    with pytest.raises(TimeoutError):
        edu1.recv_any(0.1)
    edu1.send_raw(whole[HEADER:])
    assert edu1.reply(GET_INFO, 9).errno == 0


@pytest.mark.parametrize("at", range(1, 32))
def test_a_request_cut_anywhere_is_the_same_request(edu1, at):
    """VFU-5"""
    whole = message(GET_INFO, GET, id=at)
    edu1.send_raw(whole[:at])
    edu1.send_raw(whole[at:])
    assert len(edu1.reply(GET_INFO, at).payload) == 16


def test_requests_sent_byte_by_byte(edu):
    """VFU-5"""
    stream = message(GET_INFO, GET, id=1) + message(REGION_READ, region_read(CONFIG, 0, 4), id=2) + message(99, b"abc", id=3)
    for byte in stream:
        edu.send_raw(bytes([byte]))
    assert edu.reply(GET_INFO, 1).errno == 0
    assert edu.reply(REGION_READ, 2).payload[16:] == bytes.fromhex("3412e811")
    assert edu.reply(99, 3).errno == errno.ENOSYS


@pytest.mark.parametrize("cut", [1, 3, 7, 15, 16, 17, 31, 47, 1000])
def test_a_stream_in_pieces_of_any_size(edu1, cut):
    """VFU-5, VFU-15"""
    stream = b""
    for id in range(1, 40):
        stream += message(REGION_READ, region_read(CONFIG, id % 64, 1 + id % 8), id=id)
        stream += message(200, bytes(id * 7), id=1000 + id)
    for at in range(0, len(stream), cut):
        edu1.send_raw(stream[at : at + cut])
    for id in range(1, 40):
        assert len(edu1.reply(REGION_READ, id).payload) == 16 + 1 + id % 8
        assert edu1.reply(200, 1000 + id).errno == errno.ENOSYS


def test_replies_come_in_the_order_of_the_requests(edu):
    """VFU-5, VFU-11"""
    ids = [(n * 7919) & 0xFFFF for n in range(1500)]
    for batch in range(0, len(ids), 300):
        edu.send_raw(b"".join(message(GET_INFO, GET, id=id) for id in ids[batch : batch + 300]))
    for id in ids:
        assert edu.reply(GET_INFO, id).errno == 0


def test_ids_may_repeat_at_the_same_time(edu):
    """VFU-11"""
    edu.send_raw(message(GET_INFO, GET, id=5) + message(99, id=5) + message(IRQ_INFO, GET, id=5) + message(GET_INFO, GET, id=5))
    assert edu.reply(GET_INFO, 5).errno == 0
    assert edu.reply(99, 5).errno == errno.ENOSYS
    assert edu.reply(IRQ_INFO, 5).errno == 0
    assert edu.reply(GET_INFO, 5).errno == 0


@pytest.mark.parametrize("id", [0, 1, 0x7FFF, 0x8000, 0xFFFF])
def test_every_id_is_echoed(edu1, id):
    """VFU-11"""
    edu1.send(GET_INFO, GET, id=id)
    edu1.reply(GET_INFO, id)
    edu1.send(123, id=id)
    assert edu1.reply(123, id).errno == errno.ENOSYS


def test_the_errno_field_of_a_request_is_not_looked_at(edu1):
    """The protocol: reserved in a command."""
    edu1.send_raw(message(GET_INFO, GET, id=3, err=5))
    assert edu1.reply(GET_INFO, 3).errno == 0


def test_requests_without_a_reply_get_none_and_come_first(edu):
    """VFU-13"""
    for value in (1, 2, 3):
        edu.write32(0, 4, value, NO_REPLY)
    assert edu.read32(0, 4) == 0xFFFFFFFF - 3
    edu.alive()


@pytest.mark.parametrize(
    "cmd, payload",
    [(99, b""), (GET_INFO, b"short"), (REGION_READ, region_read(99, 0, 4)), (DMA_MAP, dma_map(1, 1)), (RESET, b""), (DMA_READ, b"")],
)
def test_an_error_that_wants_no_reply_gets_none(edu1, cmd, payload):
    """VFU-13"""
    edu1.send(cmd, payload, flags=NO_REPLY)
    edu1.alive()


def test_a_read_that_wants_no_reply_gets_none(edu1):
    """VFU-13"""
    edu1.send(REGION_READ, region_read(CONFIG, 0, 4), flags=NO_REPLY)
    edu1.send(GET_INFO, GET, flags=NO_REPLY)
    edu1.alive()


@pytest.mark.parametrize("cmd", [0, GET_INFO, DMA_READ, DMA_WRITE, 99])
@pytest.mark.parametrize("flags", [REPLY, REPLY | ERROR, REPLY | NO_REPLY])
def test_a_reply_to_nothing_is_dropped(edu1, cmd, flags):
    """VFU-44"""
    edu1.send_raw(message(cmd, b"\0" * 24, flags, id=1))
    edu1.alive()


def test_descriptors_of_a_reply_to_nothing_are_closed(edu1):
    """VFU-44 (the fixture counts descriptors)"""
    with Memory(4096) as memory:
        for _ in range(100):
            edu1.send(DMA_READ, struct.pack("<QQ", 0, 0), fds=[memory.fd] * 8, flags=REPLY)
        edu1.alive()


@pytest.mark.parametrize(
    "cmd, payload",
    [
        (GET_INFO, GET), (IRQ_INFO, GET), (REGION_READ, region_read(CONFIG, 0, 4)), (RESET, b""),
        (REGION_WRITE, region_write(0, 4, b"\0\0\0\0")), (DMA_UNMAP, dma_unmap(0, 0, 2)),
        (SET_IRQS, set_irqs(1 | 32, 0, 0, 0)),
    ],
)
@pytest.mark.parametrize("count", [1, 2, FDS_MAX])
def test_descriptors_with_a_request_that_takes_none(edu1, cmd, payload, count):
    """VFU-3, VFU-9"""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, cmd, payload, fds=[memory.fd] * count)
    edu1.alive()


@pytest.mark.parametrize("count", [FDS_MAX - 1, FDS_MAX, FDS_MAX + 1, 128, 253])
def test_too_many_descriptors_are_closed(edu_host, edu1, count):
    """VFU-8: more than a map takes; beyond 64 they are closed before anything is looked at."""
    with Memory(4096) as memory:
        edu1.fails(errno.EINVAL, DMA_MAP, dma_map(0x10000, 4096), fds=[memory.fd] * count)
    edu1.alive()
    assert len(edu_host.fds()) <= edu_host.settled["fds"] + 2


def test_descriptors_in_several_receives_of_one_message(edu1):
    """VFU-8: 64 and then one more, while the message is not whole."""
    with Memory(4096) as memory:
        whole = message(DMA_MAP, dma_map(0x10000, 4096), id=4)
        for at in range(10):
            edu1.send_raw(whole[at : at + 1], [memory.fd] * 64)
        edu1.send_raw(whole[10:])
        assert edu1.reply(DMA_MAP, 4).errno == errno.EINVAL
        edu1.alive()


@pytest.mark.parametrize("at", [0, 1, 15, 16, 17, 40, 47])
def test_descriptors_with_any_byte_of_their_message(edu1, at):
    """VFU-5"""
    with Memory(4096) as memory:
        whole = message(DMA_MAP, dma_map(0x10000, 4096), id=4)
        if at:
            edu1.send_raw(whole[:at])
        edu1.send_raw(whole[at:], [memory.fd])
        assert edu1.reply(DMA_MAP, 4).errno == 0
        edu1.unmap(0x10000, 4096)


def test_descriptors_follow_the_request_that_they_came_with(edu1):
    """VFU-5: requests with and without, in turn, sent one after the other without waiting."""
    with Memory(4096) as memory:
        for n in range(64):
            edu1.send(DMA_MAP, dma_map(n << 12, 4096), [memory.fd] if n % 2 else (), id=n)
            edu1.send(GET_INFO, GET, id=n)
        for n in range(64):
            assert edu1.reply(DMA_MAP, n).errno == 0
            assert edu1.reply(GET_INFO, n).errno == 0
        assert edu1.ok(DMA_UNMAP, dma_unmap(0, 0, 2)) == dma_unmap(0, 0, 2)


def test_descriptors_of_a_message_that_never_becomes_whole(edu_host, connect):
    """VFU-6 (the fixture counts descriptors)"""
    with Memory(4096) as memory:
        for _ in range(20):
            client = connect(edu_host)
            client.send_raw(message(DMA_MAP, dma_map(0, 4096))[:20], [memory.fd] * 64)
            client.close()


def test_descriptors_of_every_kind(edu1):
    """VFU-9: what cannot be mapped is refused with an errno; nobody dies of it."""
    folder = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    path = os.open("/", os.O_PATH)
    null = os.open("/dev/null", os.O_RDWR)
    read, write = os.pipe()
    fds = [folder, path, null, read, write, edu1.sock.fileno(), 0]
    try:
        with EventFd() as event:
            for fd in fds + [event.fd]:
                got = edu1.call(DMA_MAP, dma_map(0x20000, 4096), [fd])
                assert got.is_error, f"descriptor {fd} was mapped"
                edu1.map(0x20000, 4096)
                edu1.unmap(0x20000, 4096)
    finally:
        for fd in (folder, path, null, read, write):
            os.close(fd)
    edu1.alive()


def test_nothing_but_a_connection(edu_host, connect):
    """A client that goes without a word."""
    for _ in range(20):
        connect(edu_host, hello=False).close()


@pytest.mark.parametrize("at", [1, 8, 15, 16, 20, 31])
def test_a_client_that_goes_in_the_middle_of_a_message(edu_host, connect, at):
    client = connect(edu_host)
    client.send_raw(message(REGION_WRITE, region_write(0, 4, b"\1\2\3\4"))[:at])
    client.close()
    connect(edu_host).alive()


def test_long_messages_between_short_ones(edu):
    """VFU-15"""
    for length in (0, DATA_MAX, 1, DATA_MAX - 1, 4096, 65535):
        edu.fails(errno.ENOSYS, 50, bytes(length))
        edu.alive()


def test_random_bytes_end_a_connection_or_are_refused(edu_host, connect):
    """VFU-6"""
    import random

    seed = int(os.environ.get("VFU_SEED", "20261121"))
    print("VFU_SEED", seed)
    random = random.Random(seed)
    for _ in range(60):
        client = connect(edu_host, patience=2)
        try:
            client.send_raw(random.randbytes(random.choice((16, 48, 300, 5000))))
        except (BrokenPipeError, ConnectionResetError):
            pass
        client.close()
    connect(edu_host).alive()


def test_random_payloads_of_every_command(edu_host, connect):
    """VFU-2, VFU-6: a header that is right, and anything behind it."""
    import random

    seed = int(os.environ.get("VFU_SEED", "20261121"))
    print("VFU_SEED", seed)
    random = random.Random(seed)
    interesting = [0, 1, 2, 3, 4, 7, 8, 9, 15, 16, 32, 0xFFF, 0x1000, 0xFFFF, 1 << 20, (1 << 20) + 1, 1 << 31, 0xFFFFFFFF]
    client = connect(edu_host)
    for n in range(3000):
        cmd = random.choice(list(range(2, 19)))
        length = random.choice((0, 4, 8, 16, 20, 24, 32, 40, random.randrange(200)))
        payload = b"".join(struct.pack("<I", random.choice(interesting)) for _ in range(length // 4)) + bytes(length % 4)
        got = client.call(cmd, payload)
        assert got.size == HEADER or not got.is_error
        for fd in got.fds:
            os.close(fd)
    client.alive()
