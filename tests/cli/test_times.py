"""Times as an operator writes and reads them."""

import pytest
from command import NOW

from usage_middleware.cli.times import format_time, parse_expiry, parse_time


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30d", NOW + 30 * 86400),
        ("12h", NOW + 12 * 3600),
        ("45M", NOW + 45 * 60),
        ("90 s", NOW + 90),
        ("2w", NOW + 14 * 86400),
        ("1y", NOW + 365 * 86400),
        ("never", 0),
        ("Never", 0),
        ("0", 0),
        ("-1", 0),
        ("2027-01-01", 1798761600),
        ("2027-01-01 18:30", 1798761600 + 18 * 3600 + 30 * 60),
        ("2027-01-01T18:30:15", 1798761600 + 18 * 3600 + 30 * 60 + 15),
        ("2027-01-01T18:30Z", 1798761600 + 18 * 3600 + 30 * 60),
        ("2027-01-01T18:30+02:00", 1798761600 + 16 * 3600 + 30 * 60),
        (" 2027-01-01 ", 1798761600),
        ("1798761600", 1798761600),
        ("9999-12-31T23:59:59", 253402300799),
        ("1960-01-01", 1),
    ],
)
def test_times_are_parsed(text, expected):
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize(
    ("text", "expected"), [("30d", NOW - 30 * 86400), ("0s", NOW), ("2027-01-01", 1798761600), ("100y", 1)]
)
def test_a_duration_counts_back_for_a_past_time(text, expected):
    assert parse_time(text, NOW, past=True) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "30",
        "30x",
        "d",
        "-5d",
        "1.5d",
        "2027-13-01",
        "2027-02-30",
        "999999999y",
        "9" * 30,
        "9" * 5000,
        "+1e9",
    ],
)
def test_what_is_not_a_time_is_refused(text):
    with pytest.raises(ValueError, match="is not a time; write 30d"):
        parse_time(text, NOW)


@pytest.mark.parametrize("text", ["never", "0", "-1"])
def test_never_is_not_a_past_time(text):
    with pytest.raises(ValueError, match="is not a time"):
        parse_time(text, NOW, past=True)


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [(0, "never"), (-1, "never"), (NOW, "2027-01-15 08:00 UTC"), (2**63 - 1, str(2**63 - 1))],
)
def test_times_are_formatted_in_utc(seconds, expected):
    assert format_time(seconds) == expected
