"""DEVICE_FEATURE's DMA logging: start, stop, report, of any range and page size."""

import errno
import struct

import pytest

from raw import BITMAP_MAX, DEVICE_FEATURE, PAGE, RANGES_MAX, Guest, Memory, Stateful, feature

GET, SET = 1 << 16, 1 << 17
START, STOP, REPORT = 6, 7, 8
BASE = 0x100000
TOP = 1 << 64


def start(page_size=PAGE, ranges=(), count=None):
    data = struct.pack("<QII", page_size, len(ranges) if count is None else count, 0)
    return feature(SET | START, data + b"".join(struct.pack("<QQ", iova, length) for iova, length in ranges))


def report(iova, length, page_size=PAGE, argsz=None):
    bits = -(-length // page_size) if page_size else 0
    argsz = min(8 + 24 + -(-bits // 64) * 8, 0xFFFFFFFF) if argsz is None else argsz
    return feature(GET | REPORT, struct.pack("<QQQ", iova, length, page_size), argsz)


def dirty(client, iova, length, page_size=PAGE):
    """The dirty pages of the range, as numbers."""
    got = client.ok(DEVICE_FEATURE, report(iova, length, page_size))
    assert struct.unpack_from("<QQQ", got, 8) == (iova, length, page_size)
    bitmap = int.from_bytes(got[32:], "little")
    pages = -(-length // page_size)
    assert len(got) == 32 + -(-pages // 64) * 8
    assert bitmap >> pages == 0, "bits that have no page"
    return {n for n in range(bitmap.bit_length()) if bitmap >> n & 1}


@pytest.fixture
def logged(stateful):
    """A client of stateful that logs everything, with memory."""
    with Memory(64 * PAGE) as memory:
        stateful.map(BASE, 64 * PAGE, memory.fd)
        stateful.bus_master()
        stateful.ok(DEVICE_FEATURE, start())
        yield stateful


def test_what_was_written_is_dirty_once(logged):
    """VFU-64; bit i is page i (the text's formula is off)"""
    assert dirty(logged, BASE, 64 * PAGE) == set()
    Stateful.ring(logged, BASE + 3 * PAGE - 4, 8, 1)
    Stateful.ring(logged, BASE + 63 * PAGE, 64, 1)
    assert dirty(logged, BASE, 64 * PAGE) == {2, 3, 63}
    assert dirty(logged, BASE, 64 * PAGE) == set()


@pytest.mark.parametrize("page_size", [PAGE, 2 * PAGE, 1 << 16, 1 << 18, 1 << 21, 1 << 30])
def test_a_report_of_any_page_size(logged, page_size):
    """VFU-64; VFU-59: it begins with such a page"""
    Stateful.ring(logged, BASE + 5 * PAGE, 64, 1)
    first = BASE // page_size * page_size
    if first != BASE:
        logged.fails(errno.EINVAL, DEVICE_FEATURE, report(BASE, 64 * PAGE, page_size))
    assert dirty(logged, first, BASE - first + 64 * PAGE, page_size) == {(BASE - first + 5 * PAGE) // page_size}


@pytest.mark.parametrize("log_size", [PAGE, 1 << 16, 1 << 21])
def test_a_report_finer_than_the_log(stateful, log_size):
    """VFU-64; seen elsewhere: an endless loop when the report's page size is the smaller one"""
    with Memory(64 * PAGE) as memory:
        stateful.map(0, 64 * PAGE, memory.fd)
        stateful.bus_master()
        granted = struct.unpack_from("<Q", stateful.ok(DEVICE_FEATURE, start(log_size)), 8)[0]
        assert granted & (granted - 1) == 0 and granted >= PAGE
        Stateful.ring(stateful, 5 * PAGE, 64, 1)
        got = dirty(stateful, 0, 64 * PAGE)
        assert 5 in got
        assert all(page * PAGE // granted == 5 * PAGE // granted for page in got)
        assert dirty(stateful, 0, 64 * PAGE) == set()


@pytest.mark.parametrize(
    "first, pages", [(0, 64), (5, 1), (4, 2), (5, 59), (0, 6), (6, 58), (0, 5), (1, 63)],
)
def test_any_range_of_a_map(logged, first, pages):
    """VFU-64; seen elsewhere: only exactly one mapped region; pages outside the range are kept"""
    Stateful.ring(logged, BASE + 5 * PAGE, 64, 1)
    within = first <= 5 < first + pages
    assert dirty(logged, BASE + first * PAGE, pages * PAGE) == ({5 - first} if within else set())
    assert dirty(logged, BASE, 64 * PAGE) == (set() if within else {5})


def test_a_range_over_several_maps_and_none(logged):
    """VFU-64"""
    with Memory(2 * PAGE) as memory:
        logged.map(BASE + 128 * PAGE, 2 * PAGE, memory.fd)
        Stateful.ring(logged, BASE + 129 * PAGE, 64, 1)
        Stateful.ring(logged, BASE, 64, 1)
        got = dirty(logged, BASE - 16 * PAGE, 300 * PAGE)
        # TRACK-5: a map made while logging is dirty at each report, or just what was written.
        assert {16, 16 + 129} <= got <= {16, 16 + 128, 16 + 129}
        assert dirty(logged, 0x40000000, 100 * PAGE) == set()


@pytest.mark.parametrize("length, pages", [(1, 1), (PAGE - 1, 1), (PAGE + 1, 2), (5 * PAGE + 1, 6), (5 * PAGE, 5), (64 * PAGE - 1, 64)])
def test_a_report_may_end_anywhere(logged, length, pages):
    """VFU-59"""
    Stateful.ring(logged, BASE, 60000, 1)
    got = dirty(logged, BASE, length)
    assert got == set(range(min(pages, 15)))


@pytest.mark.parametrize("iova", [BASE + 1, BASE + 2048, BASE + 4095])
def test_a_report_that_begins_within_a_page(logged, iova):
    """VFU-59"""
    logged.fails(errno.EINVAL, DEVICE_FEATURE, report(iova, PAGE))


@pytest.mark.parametrize("page_size", [0, 1, 512, 2048, 4097, 3 * PAGE, TOP - 1, PAGE | 1 << 63])
def test_a_report_of_no_page_size(logged, page_size):
    """VFU-58, VFU-59"""
    logged.fails(errno.EINVAL, DEVICE_FEATURE, report(BASE, 64 * PAGE, page_size, argsz=4096))


@pytest.mark.parametrize("iova, length", [(BASE, 0), (TOP - PAGE, 2 * PAGE), (TOP - PAGE, TOP - 1), (PAGE, TOP - 1)])
def test_a_report_of_no_range(logged, iova, length):
    """VFU-59"""
    logged.fails((errno.EINVAL, errno.E2BIG), DEVICE_FEATURE, report(iova, length, argsz=0xFFFFFFFF))
    logged.alive()


def test_the_last_page_of_all(logged):
    assert dirty(logged, TOP - PAGE, PAGE) == set()


def test_the_longest_bitmap(stateful_host, logged):
    """The table of limits: n - 1, n, n + 1 words of 64 pages; and nothing is taken for more"""
    pages = BITMAP_MAX * 8
    # The reply is one message, whose data and head are 32 bytes and the bitmap.
    logged.ok(DEVICE_FEATURE, report(0, (pages - 64 * 8) * PAGE))
    Stateful.ring(logged, BASE, 64, 1)
    got = logged.call(DEVICE_FEATURE, report(0, pages * PAGE))
    assert got.errno in (0, errno.E2BIG)
    before = stateful_host.memory_kib()
    for more in (pages + 1, pages + 64, 1 << 40, (1 << 52) - 1):
        logged.fails(errno.E2BIG, DEVICE_FEATURE, report(0, more * PAGE, argsz=0xFFFFFFFF))
    assert stateful_host.memory_kib() - before < 8 << 10


@pytest.mark.parametrize("argsz", [0, 8, 32, 39])
def test_a_report_without_room(logged, argsz):
    """VFU-56; what would have been reported is kept"""
    Stateful.ring(logged, BASE + PAGE, 64, 1)
    logged.fails(errno.EINVAL, DEVICE_FEATURE, report(BASE, 64 * PAGE, argsz=argsz))
    assert dirty(logged, BASE, 64 * PAGE) == {1}


@pytest.mark.parametrize("length", [0, 8, 16, 23, 25, 32])
def test_a_report_of_another_length(logged, length):
    """VFU-2"""
    data = (struct.pack("<QQQ", BASE, PAGE, PAGE) + bytes(8))[:length]
    logged.fails(errno.EINVAL, DEVICE_FEATURE, feature(GET | REPORT, data, 4096))


def test_a_report_without_logging(stateful):
    got = stateful.call(DEVICE_FEATURE, report(BASE, PAGE))
    assert got.is_error and got.errno == errno.EINVAL, got


def test_stop_and_start_again(logged):
    """What was logged before is forgotten"""
    Stateful.ring(logged, BASE, 64, 1)
    logged.ok(DEVICE_FEATURE, feature(SET | STOP))
    assert logged.call(DEVICE_FEATURE, report(BASE, PAGE)).is_error
    logged.ok(DEVICE_FEATURE, start())
    assert dirty(logged, BASE, 64 * PAGE) == set()


def test_stop_without_start(stateful):
    got = stateful.call(DEVICE_FEATURE, feature(SET | STOP))
    assert got.errno in (0, errno.EINVAL)
    stateful.alive()


def test_start_twice(logged):
    """Refused, and the log that is there goes on"""
    Stateful.ring(logged, BASE, 64, 1)
    got = logged.call(DEVICE_FEATURE, start())
    assert got.is_error and got.errno in (errno.EINVAL, errno.EBUSY, errno.EEXIST), got
    assert dirty(logged, BASE, 64 * PAGE) == {0}


@pytest.mark.parametrize("length", [1, 8, 100])
def test_stop_with_data(logged, length):
    """VFU-2"""
    logged.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | STOP, bytes(length)))


@pytest.mark.parametrize("page_size", [0, 1, 512, 2048, 4097, 3 * PAGE, TOP - PAGE, TOP - 1])
def test_a_log_of_no_page_size(stateful1, page_size):
    """VFU-58"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, start(page_size))


@pytest.mark.parametrize("page_size", [PAGE, 2 * PAGE, 1 << 16, 1 << 21, 1 << 30, 1 << 40, 1 << 63])
def test_a_log_of_any_page_size(stateful1, page_size):
    """The protocol: a hint; the one that was chosen comes back"""
    got = stateful1.ok(DEVICE_FEATURE, start(page_size))
    granted = struct.unpack_from("<Q", got, 8)[0]
    assert PAGE <= granted and granted & (granted - 1) == 0
    assert len(got) == 24


@pytest.mark.parametrize(
    "ranges",
    [
        [(BASE, 0)], [(BASE, PAGE), (BASE, PAGE)], [(BASE, 2 * PAGE), (BASE + PAGE, PAGE)], [(BASE + 1, PAGE)], [(BASE, PAGE + 1)],
        [(BASE, 2048)], [(TOP - PAGE, 2 * PAGE)], [(BASE, PAGE), (0, TOP - PAGE)], [(BASE, PAGE), (BASE + PAGE, PAGE), (BASE, PAGE)],
    ],
)
def test_ranges_that_are_none(stateful1, ranges):
    """VFU-58"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, start(ranges=ranges))
    stateful1.ok(DEVICE_FEATURE, start())


def test_ranges_in_any_order(stateful1):
    """VFU-58"""
    ranges = [(BASE + 2 * n * PAGE, PAGE) for n in (5, 1, 3, 0, 4, 2)] + [(BASE + PAGE, PAGE)]
    got = stateful1.ok(DEVICE_FEATURE, start(ranges=ranges))
    assert len(got) == 24 + 16 * len(ranges)


def test_only_what_is_in_a_range_must_be_logged(stateful):
    with Memory(64 * PAGE) as memory:
        stateful.map(BASE, 64 * PAGE, memory.fd)
        stateful.bus_master()
        stateful.ok(DEVICE_FEATURE, start(ranges=[(BASE + 8 * PAGE, 8 * PAGE)]))
        Stateful.ring(stateful, BASE + 9 * PAGE, 64, 1)
        assert 1 in dirty(stateful, BASE + 8 * PAGE, 8 * PAGE)


@pytest.mark.parametrize("count, fits", [(1, True), (RANGES_MAX - 1, True), (RANGES_MAX, True), (RANGES_MAX + 1, False), (5000, False)])
def test_the_limit_of_ranges(stateful, count, fits):
    """VFU-4, the table of limits"""
    request = start(ranges=[(2 * n * PAGE, PAGE) for n in range(count)])
    if fits:
        assert len(stateful.ok(DEVICE_FEATURE, request)) == 24 + 16 * count
    else:
        stateful.fails(errno.E2BIG, DEVICE_FEATURE, request)
        stateful.ok(DEVICE_FEATURE, start())


@pytest.mark.parametrize("count", [0, 2, 1024])
def test_another_number_of_ranges_than_was_sent(stateful1, count):
    """VFU-2"""
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, start(ranges=[(BASE, PAGE)], count=count))


@pytest.mark.parametrize("count", [1025, 1 << 28, (1 << 32) - 1])
def test_a_number_of_ranges_whose_product_overflows(stateful1, count):
    """VFU-4, VFU-17"""
    stateful1.fails((errno.E2BIG, errno.EINVAL), DEVICE_FEATURE, start(ranges=[(BASE, PAGE)], count=count))
    stateful1.alive()


@pytest.mark.parametrize("length", [0, 4, 8, 12, 15, 17, 31])
def test_a_start_of_another_length(stateful1, length):
    """VFU-2"""
    data = (struct.pack("<QIIQQ", PAGE, 0, 0, 0, 0))[:length]
    stateful1.fails(errno.EINVAL, DEVICE_FEATURE, feature(SET | START, data))


def test_memory_without_a_file_is_logged_as_well(stateful):
    stateful.map(BASE, 64 * PAGE)
    stateful.bus_master()
    stateful.ok(DEVICE_FEATURE, start())
    stateful.serve = Guest(BASE, 64 * PAGE)
    Stateful.ring(stateful, BASE + 7 * PAGE, 64, 1)
    assert dirty(stateful, BASE, 64 * PAGE) == {7}


def test_logging_ends_with_its_client(stateful_host, logged, connect):
    """The next client begins without"""
    logged.close()
    again = connect(stateful_host)
    assert again.call(DEVICE_FEATURE, report(BASE, PAGE)).is_error
    again.ok(DEVICE_FEATURE, start())


def test_a_device_without_a_log_of_its_own(edu):
    """TRACK-4, or ENOTTY: never a page called clean on doubt"""
    edu.map(BASE, 4 * PAGE)
    got = edu.call(DEVICE_FEATURE, start())
    if got.is_error:
        assert got.errno in (errno.ENOTTY, errno.EOPNOTSUPP)
    else:
        assert dirty(edu, BASE, 4 * PAGE) == {0, 1, 2, 3}
        edu.ok(DEVICE_FEATURE, feature(SET | STOP))
