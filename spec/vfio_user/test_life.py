"""A connection's life: who comes, who goes, who waits, and what the device makes of it."""

import errno
import os
import random
import signal
import socket
import struct
import threading
import time

import pytest

from raw import (
    CONFIG, DMA_MAP, DMA_UNMAP, GET_INFO, IRQ_INFO, NO_REPLY, PAGE, REGION_INFO, REGION_READ, REGION_WRITE, RESET, SET_IRQS, Client,
    Closed, Edu, EventFd, Memory, Stateful, dma_map, dma_unmap, message, region_read, region_write, set_irqs, version, VERSION,
)

GET = struct.pack("<IIII", 16, 0, 0, 0)
EVENT_TRIGGER, DISABLE = 4 | 32, 1 | 32


def test_a_client_that_goes_leaves_the_device_as_it_is(edu_host, connect):
    """The protocol: the device's state is retained"""
    client = connect(edu_host)
    client.write32(0, 4, 0x1234)
    client.write(CONFIG, 0x3C, b"\x0A")
    client.close()
    again = connect(edu_host)
    assert again.read32(0, 4) == 0xFFFFFFFF - 0x1234
    assert again.read(CONFIG, 0x3C, 1) == b"\x0A"


def test_its_maps_and_irqs_go_with_it(edu_host, connect):
    """The protocol: memory is unmapped, descriptors are closed (the fixture counts); the addresses are free"""
    with Memory(16 * PAGE) as memory, EventFd() as event:
        for _ in range(3):
            client = connect(edu_host)
            client.map(0x10000, 16 * PAGE, memory.fd)
            client.map(0x80000, PAGE)
            client.ok(SET_IRQS, set_irqs(EVENT_TRIGGER, 1, 0, 1), [event.fd])
            client.close()
        again = connect(edu_host)
        again.write32(0, 0x60, 1)
        assert event.count(0.05) == 0
        again.write32(0, 0x64, 1)


@pytest.mark.parametrize("with_fd", [True, False])
def test_no_dma_after_the_loss(edu_host, connect, with_fd):
    """Bus master is off when the next client comes, and nothing is written"""
    with Memory(PAGE) as memory:
        client = connect(edu_host)
        client.map(0x10000, PAGE, memory.fd)
        client.bus_master()
        memory.view[:4] = b"seen"
        Edu.from_ram(client, 0x10000, 4)
        if not with_fd:
            client.map(0x20000, PAGE)
        Edu.start(client, Edu.BUFFER, 0x10040 if with_fd else 0x20000, 4, Edu.TO_RAM)
        client.close()
        again = connect(edu_host)
        assert struct.unpack("<H", again.read(CONFIG, 4, 2))[0] & 4 == 0, "bus master is still on"
        before = bytes(memory.view)
        Edu.wait(again)
        assert bytes(memory.view) == before
        assert not again.requests


def test_a_second_client_waits_for_the_first_to_go(edu_host, connect):
    """One client at a time; the second is served when the first has gone"""
    first = connect(edu_host)
    second = connect(edu_host, hello=False)
    second.send(VERSION, version(), id=5)
    with pytest.raises(TimeoutError):
        second.recv_any(0.2)
    first.alive()
    first.close()
    assert not second.reply(VERSION, 5).is_error
    second.alive()


def test_those_who_wait_and_go_are_no_hindrance(edu_host, connect):
    """A backlog of clients that have given up"""
    first = connect(edu_host)
    for n in range(8):
        waiting = connect(edu_host, hello=False)
        if n % 2:
            waiting.send(VERSION, version())
        waiting.close()
    first.alive()
    first.close()
    connect(edu_host).alive()


def test_a_client_that_says_nothing_more_is_answered_first(edu_host, connect):
    """What was sent before the end is served: half a connection is closed"""
    client = connect(edu_host)
    client.write32(0, 4, 99, NO_REPLY)
    client.send(GET_INFO, GET, id=7)
    client.sock.shutdown(socket.SHUT_WR)
    try:
        got = client.recv_any()
        assert got.id == 7 and not got.is_error
        client.closed()
    except Closed:
        pass
    client.close()
    assert connect(edu_host).read32(0, 4) == 0xFFFFFFFF - 99


def test_a_client_that_reads_nothing_more(edu_host, connect):
    client = connect(edu_host)
    client.sock.shutdown(socket.SHUT_RD)
    try:
        for _ in range(50):
            client.send(GET_INFO, GET)
    except (BrokenPipeError, ConnectionResetError):
        pass
    client.close()
    connect(edu_host).alive()


def test_a_client_that_asks_and_never_reads(edu_host, connect):
    """VFU-10: the server stops reading; it neither grows nor dies"""
    client = connect(edu_host)
    before = edu_host.memory_kib()
    client.sock.setblocking(False)
    stream = message(REGION_READ, region_read(0, 0, 1 << 20)) * 64
    sent = 0
    deadline = time.monotonic() + 0.5
    while time.monotonic() < deadline and sent < 32 << 20:
        try:
            sent += client.sock.send(stream)
        except BlockingIOError:
            time.sleep(0.01)
        except (BrokenPipeError, ConnectionResetError):
            break
    assert edu_host.memory_kib() - before < 32 << 10
    client.close()
    connect(edu_host).alive()


def test_a_stalled_client_of_one_device_holds_up_no_other(start_host, connect):
    """No client can starve another: neither by silence, nor with its memory, nor by not reading"""
    host = start_host("sim:edu?dma_mask=0xffffffffffffffff", "sim:stateful")
    edu = connect(host, path=host.paths[0])
    stateful = connect(host, path=host.paths[1])
    # Half a message.
    edu.send_raw(message(REGION_WRITE, region_write(0, 4, bytes(4)))[:20])
    stateful.alive()
    edu.send_raw(message(REGION_WRITE, region_write(0, 4, bytes(4)))[20:])
    edu.recv()
    # A doorbell whose memory is never answered.
    stateful.map(0x10000, 16 * PAGE)
    stateful.bus_master()
    for offset, value in ((Stateful.TARGET, 0x10000), (Stateful.LENGTH, 64)):
        stateful.write32(0, offset, value)
    stateful.send(REGION_WRITE, region_write(0, Stateful.DOORBELL, b"\1\0\0\0"))
    assert stateful.recv_request().cmd == 12
    for _ in range(20):
        started = time.monotonic()
        edu.alive()
        assert time.monotonic() - started < 1
    edu.map(0x40000, PAGE)
    edu.unmap(0x40000, PAGE)
    stateful.close()
    again = connect(host, path=host.paths[1])
    again.alive()
    # A flood that nobody reads.
    edu.sock.setblocking(False)
    try:
        for _ in range(1000):
            edu.sock.send(message(REGION_READ, region_read(0, 0, 1 << 20)) * 16)
    except (BlockingIOError, BrokenPipeError, ConnectionResetError):
        pass
    for _ in range(20):
        started = time.monotonic()
        again.alive()
        assert time.monotonic() - started < 1


def test_two_devices_of_one_vm(start_host, connect):
    """DMA-2: equal maps are joined, others over them are EEXIST; each device has its own irqs"""
    host = start_host("sim:edu?dma_mask=0xffffffffffffffff", "sim:stateful")
    edu, stateful = (connect(host, path=path) for path in host.paths)
    with Memory(16 * PAGE) as memory, Memory(16 * PAGE) as other:
        for client in (edu, stateful):
            client.map(0x100000, 16 * PAGE, memory.fd)
            client.bus_master()
        stateful.unmap(0x100000, 16 * PAGE)
        stateful.fails(errno.EEXIST, DMA_MAP, dma_map(0x100000, 16 * PAGE), [other.fd])
        stateful.fails(errno.EEXIST, DMA_MAP, dma_map(0x100000, 8 * PAGE), [memory.fd])
        stateful.map(0x100000, 16 * PAGE, memory.fd)
        Stateful.ring(stateful, 0x100000, 16, 0x41)
        Edu.from_ram(edu, 0x100000, 16)
        stateful.close()
        connect(host, path=host.paths[1]).close()
        Edu.to_ram(edu, 0x100000 + PAGE, 16)
        assert memory.view[PAGE : PAGE + 16] == Stateful.filled(0x41, 1, 16)


def test_an_inherited_socket(start_host, connect):
    """`--socket fd:N`"""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            path = f"{folder}/inherited.sock"
            listener.bind(path)
            listener.listen(4)
            host = start_host("sim:edu", sockets=[f"fd:{listener.fileno()}"], paths=[path], pass_fds=[listener.fileno()])
            for _ in range(3):
                client = connect(host)
                assert client.read32(0, 0) == 0x010000ED
                client.close()


def test_the_ready_line_names_the_sockets(edu_host):
    """`--json`: devices, their sockets, and what to give to QEMU"""
    (device,) = edu_host.ready["devices"]
    assert device["socket"] == edu_host.path
    assert device["device"].startswith("sim:edu")
    assert "vfio-user-pci" in device["qemu"] and edu_host.path in device["qemu"]


def test_what_qemu_does_at_its_start(edu_host, connect):
    """Facts: QEMU's client, message by message"""
    with Memory(64 * PAGE) as memory, EventFd() as intx:
        client = connect(edu_host, minor=0, capabilities={
            "max_msg_fds": 16, "max_data_xfer_size": 1048576, "max_dma_maps": 65535, "pgsizes": 4096, "write_multiple": True,
        })
        for n, (iova, pages) in enumerate(((0, 16), (0x100000, 48))):
            client.send(DMA_MAP, dma_map(iova, pages * PAGE, offset=n * 16 * PAGE), [memory.fd], flags=NO_REPLY)
        client.send(DMA_MAP, dma_map(0xFFFC0000, 0x40000, flags=1), flags=NO_REPLY)
        regions = struct.unpack("<IIII", client.ok(GET_INFO, GET))[2]
        assert regions >= 8
        for index in (0, 1, 2, 3, 4, 5, 7):
            head, _ = client.region(index, 32)
            if head.argsz > 32:
                client.region(index, head.argsz)
        for index in (0, 1, 2, 4):
            client.ok(IRQ_INFO, struct.pack("<IIII", 16, 0, index, 0))
        client.read(CONFIG, 0, 256)
        for bar in range(6):
            kept = client.read(CONFIG, 0x10 + 4 * bar, 4)
            client.write(CONFIG, 0x10 + 4 * bar, b"\xFF" * 4)
            client.read(CONFIG, 0x10 + 4 * bar, 4)
            client.write(CONFIG, 0x10 + 4 * bar, kept)
        client.ok(SET_IRQS, set_irqs(EVENT_TRIGGER, 0, 0, 1), [intx.fd])
        client.call(SET_IRQS, set_irqs(EVENT_TRIGGER, 3, 0, 1), [intx.fd])
        client.call(RESET)
        for _ in range(50):
            client.send(DMA_UNMAP, dma_unmap(0x100000, 48 * PAGE), flags=NO_REPLY)
            client.send(DMA_MAP, dma_map(0x100000, 16 * PAGE), [memory.fd], flags=NO_REPLY)
            client.send(DMA_UNMAP, dma_unmap(0x100000, 16 * PAGE), flags=NO_REPLY)
            client.send(DMA_MAP, dma_map(0x100000, 48 * PAGE, offset=16 * PAGE), [memory.fd], flags=NO_REPLY)
        client.alive()
        client.unmap(0x100000, 48 * PAGE)


def behave(client, rng, memory, event):
    """A random while of a client's life."""
    for _ in range(rng.randrange(1, 12)):
        what = rng.randrange(7)
        if what == 0:
            client.send(DMA_MAP, dma_map(rng.randrange(8) << 16, 16 * PAGE), [memory.fd] if rng.random() < 0.7 else ())
        elif what == 1:
            client.send(SET_IRQS, set_irqs(EVENT_TRIGGER, rng.randrange(2), 0, 1), [event.fd])
        elif what == 2:
            client.send(REGION_WRITE, region_write(CONFIG, 4, struct.pack("<H", 6)), flags=NO_REPLY)
        elif what == 3:
            for offset, value in ((0x80, 0x40000), (0x88, rng.randrange(8) << 16), (0x90, 64), (0x98, 7)):
                client.send(REGION_WRITE, region_write(0, offset, struct.pack("<Q", value)), flags=NO_REPLY)
        elif what == 4:
            client.send(DMA_UNMAP, dma_unmap(0, 0, 2))
        elif what == 5:
            client.send(REGION_READ, region_read(0, 0, 1 << 16))
        else:
            client.send_raw(message(REGION_WRITE, region_write(0, 4, b"1234"))[: rng.randrange(36)], [memory.fd])
            return


def test_a_hundred_clients_that_die_at_random_points(edu_host, connect):
    """No leaks (the fixture counts), and the next start works"""
    seed = int(os.environ.get("VFU_SEED", "20261121"))
    print("VFU_SEED", seed)
    rng = random.Random(seed)
    with Memory(16 * PAGE) as memory, EventFd() as event:
        for _ in range(100):
            client = Client(edu_host.path)
            client.hello()
            behave(client, rng, memory, event)
            client.close()
        last = connect(edu_host)
        # DMA of the last life has ended, or does nothing.
        Edu.wait(last)
        before = bytes(memory.view)
        last.bus_master()
        last.bus_master(False)
        assert bytes(memory.view) == before


@pytest.mark.parametrize("seed", range(10))
def test_a_client_that_is_killed(edu_host, connect, seed):
    """SIGKILL, as an operator's or the kernel's"""
    with Memory(16 * PAGE) as memory, EventFd() as event:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                client = Client(edu_host.path)
                client.hello()
                os.write(write, b"x")
                rng = random.Random(seed)
                while True:
                    client.map(0x10000, 16 * PAGE, memory.fd)
                    client.ok(SET_IRQS, set_irqs(EVENT_TRIGGER, 1, 0, 1), [event.fd])
                    client.read(0, 0, rng.randrange(1, 4096))
                    client.ok(DMA_UNMAP, dma_unmap(0, 0, 2))
            finally:
                os._exit(1)
        os.read(read, 1)
        time.sleep(random.Random(seed).random() * 0.03)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
        connect(edu_host).map(0x10000, 16 * PAGE, memory.fd)


def test_a_host_that_ends_while_a_client_is_attached(start_host, connect):
    """SIGTERM: the connection is closed, the host ends in good order; its socket is gone"""
    host = start_host("sim:edu")
    client = connect(host)
    with Memory(PAGE) as memory:
        client.map(0x10000, PAGE, memory.fd)
    assert host.stop() == 0
    client.closed()
    assert not os.path.exists(host.path)
    connect.hosts.clear()
    host.ended = True


def test_many_connections(edu_host):
    """300 in a row, each served"""
    for _ in range(300):
        client = Client(edu_host.path)
        client.hello()
        client.close()
    edu_host.check()


@pytest.mark.slow
def test_clients_that_make_the_server_wait_are_disconnected(start_host, connect):
    """VFU-83, VFU-91: five seconds for what the other waits for; meanwhile nobody else waits, and the next is served"""
    host = start_host("sim:edu", "sim:stateful", "sim:stateful")
    deaf, mute, busy = (connect(host, path=path) for path in host.paths)
    # One reads nothing of what it asked for, the other does not answer for its memory.
    deaf.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        for _ in range(1000):
            deaf.sock.send(message(REGION_READ, region_read(0, 0, 1 << 20)) * 16)
    mute.map(0x10000, 16 * PAGE)
    mute.bus_master()
    for offset, value in ((Stateful.TARGET, 0x10000), (Stateful.LENGTH, 64)):
        mute.write32(0, offset, value)
    mute.send(REGION_WRITE, region_write(0, Stateful.DOORBELL, b"\1\0\0\0"))
    assert mute.recv_request().cmd == 12
    next_ones = [connect(host, path=path, hello=False, patience=12) for path in host.paths[:2]]
    for client in next_ones:
        client.send(VERSION, version(), id=1)
    for client in next_ones:
        assert not client.reply(VERSION, 1).is_error
        client.alive()
        started = time.monotonic()
        busy.alive()
        assert time.monotonic() - started < 1


def test_the_socket_is_its_owners(edu_host):
    """VFU-86"""
    assert os.stat(edu_host.path).st_mode & 0o777 == 0o600
