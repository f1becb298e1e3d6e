"""Numbers, times and foreign text for human eyes."""

from __future__ import annotations

import pytest

from picotrain.text import brief, clock, duration, encodable, flops, printable, several, short, size


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (0, "0"),
        (4745, "4,745"),
        (9999.4, "9,999"),
        (9999.6, "10.0k"),
        (47_450, "47.5k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (2.5e13, "25.0T"),
    ],
)
def test_short_numbers_have_three_digits_and_at_most_five_characters(number: float, expected: str) -> None:
    assert short(number) == expected


def test_units_change_where_the_rounded_number_would_have_four_digits() -> None:
    assert [flops(37_700_000), flops(9.89e14)] == ["37.7 MFLOP", "989 TFLOP"]
    assert [size(512), size(999.6), size(45_600_000), size(5e15)] == ["512 B", "1.00 kB", "45.6 MB", "5000 TB"]


def test_durations_read_like_a_clock() -> None:
    assert [clock(s) for s in (7, 59.7, 151, 3751, 273_900)] == ["0:07", "1:00", "2:31", "1:02:31", "3d 04:05"]
    assert [brief(s) for s in (0.0123, 0.9996, 1.234, 12.34, 123.4)] == ["12ms", "1.00s", "1.23s", "12.3s", "123s"]


def test_a_terminal_escape_becomes_visible_and_layout_stays() -> None:
    assert printable("a\tb\nc\x1b[31m\x07\x7f\x9b\r\n") == "a\tb\nc␛[31m␇␡\ufffd\n"


def test_what_an_encoding_lacks_becomes_a_question_mark_of_the_same_length() -> None:
    assert encodable("naïve 日本", "ascii") == "na?ve ??"
    assert encodable("again − first, 3 µs a call", "ascii") == "again - first, 3 us a call"
    assert encodable("naïve 日本", "utf-8") == encodable("naïve 日本", None) == "naïve 日本"


def test_long_times_read_as_one_says_them() -> None:
    told = {
        0.2: "1 s",
        40: "40 s",
        310: "5 min",
        5400: "90 min",
        22100: "6 h 10 min",
        7200: "2 h",
        3600 * 40.2: "40 h",
        86400 * 5: "5 days",
    }
    assert {seconds: duration(seconds) for seconds in told} == told


def test_one_thing_is_not_many() -> None:
    assert [several(count, "shard") for count in (0, 1, 1200)] == ["0 shards", "1 shard", "1,200 shards"]
