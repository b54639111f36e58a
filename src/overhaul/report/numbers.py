"""Numbers as people read them: significant digits, decimal units (1 kB = 1,000 bytes), "n/a" for None."""

from __future__ import annotations

import math

from overhaul.table import Row

MISSING = "n/a"


def as_quantity(value: float | None, digits: int = 4) -> str:
    """`28.05`, `1197`, `0.01234`: `digits` significant digits, at least the whole part; powers from 1e6."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return str(value)
    if value != 0 and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{_decimals(value, digits)}f}"


def as_interval(row: Row | None) -> str:
    """`28.05 [27.21, 28.93]`, ends with the decimals of the value; without an interval the value alone."""
    if row is None:
        return MISSING
    ends = interval_ends(row)
    return f"{as_quantity(row.value)} {ends}" if ends else as_value(row)


def as_value(row: Row) -> str:
    """The value alone; a whole number that was not sampled is a count, and has no decimals."""
    is_count = row.low == row.value == row.high and float(row.value).is_integer() and abs(row.value) < 1e6
    return f"{row.value:.0f}" if is_count else as_quantity(row.value)


def interval_ends(row: Row) -> str:
    """`[27.21, 28.93]`, or nothing where low and high equal the value."""
    if row.low == row.value == row.high:
        return ""
    if not 1e-4 <= abs(row.value) < 1e6:
        return f"[{as_quantity(row.low)}, {as_quantity(row.high)}]"
    decimals = _decimals(row.value, 4)
    return f"[{row.low:.{decimals}f}, {row.high:.{decimals}f}]"


def as_percent(share: float | None, digits: int = 3) -> str:
    """A share between 0 and 1 as `50.0%`, `0.0346%`, `100%`."""
    if share is None:
        return MISSING
    if share in (0, 1):
        return f"{share:.0%}"
    percent = 100 * share
    # 99.97% must not read 100%: not everything is not all.
    decimals = max(_decimals(percent, digits), 2 if 99.9 < percent < 100 else 0)
    return f"{percent:.{min(decimals, 6)}f}%"


def as_size(num_bytes: float | None) -> str:
    """`269 MB`, `1.21 GB`: three digits, decimal units."""
    return MISSING if num_bytes is None else _scaled(num_bytes, ("B", "kB", "MB", "GB", "TB"))


def as_count(count: float | None) -> str:
    """`134.5 M`, `7.24 B`: four digits in thousands, millions, billions; below a thousand as it is."""
    return MISSING if count is None else _scaled(count, ("", "K", "M", "B", "T"), digits=4)


def as_speed(per_second: float | None) -> str:
    """`3,412`, `31.2`: whole units with thousands separators, three digits below a hundred."""
    if per_second is None:
        return MISSING
    return as_quantity(per_second, digits=3) if per_second < 99.5 else f"{per_second:,.0f}"


def as_place(x: float) -> str:
    """A place on an x axis: `1,234,567`, `0.25`; whole numbers with all their digits."""
    return f"{x:,.0f}" if x == round(x) and abs(x) < 1e15 else f"{x:.6g}"


def as_tokens(count: float) -> str:
    """Tokens on an axis: `200,000`, `1.5M`, `2B`; suffixes from a million on."""
    for size, suffix in ((1e9, "B"), (1e6, "M")):
        if abs(count) >= size:
            return f"{count / size:.6g}{suffix}"
    return as_place(count)


def as_duration(seconds: float | None) -> str:
    """`0.8 s`, `42 s`, `2 min 10 s`, `1 h 05 min`."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _decimals(value: float, digits: int) -> int:
    """Decimals that leave `digits` significant digits after rounding: 9.9996 to four is 10.00, so two."""
    rounded = float(f"{value:.{digits - 1}e}")
    return max(0, digits - 1 - math.floor(math.log10(abs(rounded)))) if rounded else 0


def _scaled(value: float, units: tuple[str, ...], digits: int = 3) -> str:
    """The largest unit that leaves at least 1; rounding up to 1,000 moves to the next."""
    power = 0
    while power < len(units) - 1 and float(f"{value / 1000**power:.{digits - 1}e}") >= 1000:
        power += 1
    scaled = value / 1000**power
    number = f"{scaled:.0f}" if power == 0 else f"{scaled:.{_decimals(scaled, digits)}f}"
    return f"{number} {units[power]}".rstrip()
