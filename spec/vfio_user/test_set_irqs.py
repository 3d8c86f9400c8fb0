"""DEVICE_SET_IRQS: every form of it, and interrupts that really arrive."""

import errno
import os
import struct

import pytest

from raw import FDS_MAX, NO_REPLY, SET_IRQS, VECTORS_MAX, Edu, EventFd, Memory, Stateful, set_irqs

NONE, BOOL, EVENT, MASK, UNMASK, TRIGGER = (1 << bit for bit in range(6))
INTX, MSI, MSIX, ERR, REQ = range(5)
KINDS, ACTIONS = (NONE, BOOL, EVENT), (MASK, UNMASK, TRIGGER)
SOON = 2.0
# Long enough for a signal that must not come, of a device that raises it before its register's write is answered.
NEVER = 0.02


def raised(client, cause=1):
    client.write32(0, 0x60, cause)


def acknowledge(client):
    client.write32(0, 0x64, 0xFFFFFFFF)


@pytest.fixture
def event():
    with EventFd() as event:
        yield event


@pytest.mark.parametrize("flags", [flags for flags in range(64)])
def test_exactly_one_action_and_one_kind_of_data(edu1, flags):
    """VFU-55"""
    kinds = [kind for kind in KINDS if flags & kind]
    actions = [action for action in ACTIONS if flags & action]
    if len(kinds) == 1 and len(actions) == 1:
        return
    for data in (b"", b"\0"):
        edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(flags, INTX, 0, 1, data))


@pytest.mark.parametrize("bit", range(6, 32))
def test_other_flags(edu1, bit):
    """VFU-4"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(NONE | TRIGGER | 1 << bit, INTX, 0, 0))


@pytest.mark.parametrize("length", range(20))
def test_a_request_shorter_than_its_head(edu1, length):
    """VFU-2"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(NONE | TRIGGER, INTX, 0, 0)[:length])


@pytest.mark.parametrize("index", [5, 6, 0x7FFFFFFF, 0xFFFFFFFF])
def test_an_index_beyond_the_last(edu1, index, event):
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(NONE | TRIGGER, index, 0, 0))
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(EVENT | TRIGGER, index, 0, 1), [event.fd])


@pytest.mark.parametrize("start, count", [(0, 2), (1, 1), (0xFFFFFFFF, 1), (0xFFFFFFFF, 2), (0x80000000, 0x7FF), (1, 0x7FF)])
def test_vectors_beyond_the_last(edu1, start, count):
    """n + 1 of a device with one vector, and sums that pass 32 bits"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(NONE | TRIGGER, MSI, start, count))
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, start, count))
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, start, count, bytes(count)))


@pytest.mark.parametrize("count, err", [(VECTORS_MAX - 1, errno.EINVAL), (VECTORS_MAX, errno.EINVAL), (VECTORS_MAX + 1, errno.E2BIG)])
def test_the_limit_of_vectors(edu, count, err):
    """VFU-4, the table of limits; up to it the device says what it has"""
    edu.fails(err, SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, count))
    edu.fails(err, SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, 0, count, bytes(count)))
    edu.alive()


@pytest.mark.parametrize("count", [1 << 20, 1 << 31, 0xFFFFFFFF])
def test_far_more_vectors(edu1, count):
    """VFU-4, VFU-17"""
    edu1.fails(errno.E2BIG, SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, count))
    edu1.fails((errno.E2BIG, errno.EINVAL), SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, 0, count, b"\1"))


@pytest.mark.parametrize("count, data", [(1, b""), (1, b"\1\1"), (2, b"\1"), (0, b"\1"), (1, bytes(100))])
def test_one_byte_for_each_boolean(edu1, count, data):
    """VFU-55"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, 0, count, data))


@pytest.mark.parametrize("flags", [NONE | TRIGGER, EVENT | TRIGGER])
def test_data_where_there_are_none(edu1, flags):
    """VFU-2"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(flags, MSI, 0, 1, b"\1"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("start", [0, 1])
def test_no_vector(edu1, kind, action, start):
    """VFU-55: only with TRIGGER, without data and from 0 on"""
    request = set_irqs(kind | action, MSI, start, 0)
    if (kind, action, start) == (NONE, TRIGGER, 0):
        edu1.ok(SET_IRQS, request)
    else:
        edu1.fails(errno.EINVAL, SET_IRQS, request)


@pytest.mark.parametrize("given", [2, 3, 16, FDS_MAX])
def test_another_number_of_descriptors(edu1, given, event):
    """VFU-3; facts: cloud-hypervisor sends 16 whatever was agreed on"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd] * given)
    edu1.alive()


@pytest.mark.parametrize("flags, data", [(NONE | TRIGGER, b""), (BOOL | TRIGGER, b"\1"), (NONE | MASK, b"")])
def test_descriptors_without_eventfds(edu1, flags, data, event):
    """VFU-3"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(flags, INTX, 0, 1, data), [event.fd])


def test_what_is_no_eventfd(edu1):
    """VFU-9: refused as the kernel does; a full pipe would stop whoever signals it"""
    read, write = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)
    try:
        with Memory(4096) as memory:
            for fd in (read, write, null, memory.fd, edu1.sock.fileno()):
                for index in (INTX, MSI, REQ):
                    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(EVENT | TRIGGER, index, 0, 1), [fd])
    finally:
        for fd in (read, write, null):
            os.close(fd)
    raised(edu1)
    acknowledge(edu1)
    edu1.alive()


def test_an_eventfd_that_is_full_stops_nobody(edu1):
    """A client that never reads must not hold up the device"""
    fd = os.eventfd(0xFFFFFFFF, os.EFD_CLOEXEC)
    try:
        os.eventfd_write(fd, 0xFFFFFFFFFFFFFFFE - 0xFFFFFFFF)
        edu1.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [fd])
        raised(edu1)
        edu1.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 1))
        edu1.alive()
        edu1.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0))
    finally:
        os.close(fd)
    acknowledge(edu1)


def test_msi_arrives(edu, event):
    """SIM-5, through the socket"""
    edu.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    raised(edu)
    assert event.count(SOON) == 1
    raised(edu, 2)
    assert event.count(SOON) == 1
    acknowledge(edu)
    edu.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0))
    raised(edu)
    assert event.count(NEVER) == 0
    acknowledge(edu)


def test_intx_arrives_and_masks_itself(edu, event):
    """SIM-6, through the socket"""
    edu.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, INTX, 0, 1), [event.fd])
    raised(edu)
    assert event.count(SOON) == 1
    raised(edu, 2)
    assert event.count(NEVER) == 0, "masked until it is unmasked"
    edu.ok(SET_IRQS, set_irqs(NONE | UNMASK, INTX, 0, 1))
    assert event.count(SOON) == 1, "the level is still there"
    acknowledge(edu)
    edu.ok(SET_IRQS, set_irqs(NONE | UNMASK, INTX, 0, 1))
    assert event.count(NEVER) == 0
    edu.ok(SET_IRQS, set_irqs(NONE | MASK, INTX, 0, 1))
    raised(edu)
    assert event.count(NEVER) == 0
    edu.ok(SET_IRQS, set_irqs(BOOL | UNMASK, INTX, 0, 1, b"\0"))
    assert event.count(NEVER) == 0, "a false boolean does nothing"
    edu.ok(SET_IRQS, set_irqs(BOOL | UNMASK, INTX, 0, 1, b"\1"))
    assert event.count(SOON) == 1
    acknowledge(edu)
    edu.ok(SET_IRQS, set_irqs(NONE | TRIGGER, INTX, 0, 0))


def test_a_client_may_trigger_its_own_eventfd(edu, event):
    """The protocol: TRIGGER with NONE or BOOL"""
    edu.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    edu.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 1))
    assert event.count(SOON) == 1
    edu.ok(SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, 0, 1, b"\1"))
    assert event.count(SOON) == 1
    edu.ok(SET_IRQS, set_irqs(BOOL | TRIGGER, MSI, 0, 1, b"\0"))
    assert event.count(NEVER) == 0
    edu.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0))


def test_no_descriptor_takes_the_eventfd_away(edu, event):
    """The protocol: de-assigns"""
    edu.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    edu.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1))
    raised(edu)
    assert event.count(NEVER) == 0
    acknowledge(edu)
    edu.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0))


def test_a_replaced_eventfd_is_closed(edu_host, edu1):
    """IRQ-1"""
    with EventFd() as first, EventFd() as second:
        edu1.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [first.fd])
        held = len(edu_host.fds())
        for _ in range(50):
            edu1.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [second.fd])
        assert len(edu_host.fds()) == held
        raised(edu1)
        assert (first.count(NEVER), second.count(SOON)) == (0, 1)
        acknowledge(edu1)


def test_intx_and_msi_are_never_enabled_together(edu1, event):
    """As vfio-pci has it; the one that is enabled stays"""
    edu1.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, INTX, 0, 1), [event.fd])
    got = edu1.call(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    edu1.alive()
    edu1.ok(SET_IRQS, set_irqs(NONE | TRIGGER, INTX, 0, 0))
    if got.is_error:
        edu1.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    edu1.ok(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0))


def test_what_qemu_sets_at_its_start(stateful, event):
    """Facts: INTx and ERR eventfds, then they are taken away"""
    for index in (INTX, ERR, REQ):
        stateful.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, index, 0, 1), [event.fd])
    for index in (INTX, ERR, REQ):
        stateful.ok(SET_IRQS, set_irqs(NONE | TRIGGER, index, 0, 0))


def test_msi_of_a_doorbell(stateful, event):
    stateful.ok(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd])
    with Memory(4096) as memory:
        stateful.map(0x10000, 4096, memory.fd)
        stateful.bus_master()
        stateful.write32(0, Stateful.IRQ_ENABLE, 1)
        Stateful.ring(stateful, 0x10000, 64, 5)
        assert event.count(SOON) == 1
        assert memory.view[:64] == Stateful.filled(5, 1, 64)


def test_without_a_reply(edu1, event):
    """VFU-13"""
    edu1.send(SET_IRQS, set_irqs(EVENT | TRIGGER, MSI, 0, 1), [event.fd], flags=NO_REPLY)
    raised(edu1)
    assert event.count(SOON) == 1
    acknowledge(edu1)
    edu1.send(SET_IRQS, set_irqs(NONE | TRIGGER, MSI, 0, 0), flags=NO_REPLY)
    edu1.alive()


@pytest.mark.parametrize("index", [MSIX, ERR])
def test_an_index_without_vectors(edu1, index, event):
    """edu has neither MSI-X nor ERR"""
    edu1.fails(errno.EINVAL, SET_IRQS, set_irqs(EVENT | TRIGGER, index, 0, 1), [event.fd])
