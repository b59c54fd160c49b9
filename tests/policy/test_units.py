"""How a duration and a size are written."""

from __future__ import annotations

import pytest

from proxy.policy.units import parse_duration, parse_size


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        (0, 0),
        (60, 60),
        (0.5, 0.5),
        ("0", 0),
        ("60", 60),
        ("0.5", 0.5),
        ("500ms", 0.5),
        ("5.5s", 5.5),
        ("300s", 300),
        ("1.5m", 90),
        ("15 m", 900),
        (" 12h ", 43200),
        ("1d", 86400),
    ],
)
def test_a_duration_is_a_number_of_seconds_or_carries_its_unit(written: object, seconds: float) -> None:
    parsed = parse_duration(written)
    assert parsed == seconds
    assert isinstance(parsed, float)


@pytest.mark.parametrize(
    "written",
    [
        -1,
        "-1s",
        float("inf"),
        float("nan"),
        "inf",
        "nan",
        True,
        None,
        [],
        "",
        "s",
        "1w",
        "1 M",
        "1D",
        "1h30m",
        "1e3",
        "1_000",
        ".5",
        "5.",
        "\u0661s",
        10**400,
        "9" * 400 + "d",
    ],
)
def test_what_is_no_duration_is_refused_with_examples(written: object) -> None:
    with pytest.raises(ValueError, match=r'such as .*"500ms"'):
        parse_duration(written)


@pytest.mark.parametrize(
    ("written", "size"),
    [
        (0, 0),
        (1048576, 1048576),
        (2.0, 2),
        ("1048576", 1048576),
        ("512KiB", 524288),
        ("64MiB", 67108864),
        ("1.5GiB", 1610612736),
        ("10kB", 10000),
        ("1.1MB", 1100000),
        ("2 GB", 2000000000),
    ],
)
def test_a_size_is_a_number_of_bytes_or_carries_its_unit(written: object, size: int) -> None:
    parsed = parse_size(written)
    assert parsed == size
    assert isinstance(parsed, int)


@pytest.mark.parametrize(
    "written",
    [-1, 0.5, "0.3KiB", "-1MiB", float("inf"), float("nan"), True, None, {}, "", "MiB", "64mib", "64 TB", "1e6"],
)
def test_what_is_no_size_is_refused_with_examples(written: object) -> None:
    with pytest.raises(ValueError, match=r'such as .*"64MiB"'):
        parse_size(written)
