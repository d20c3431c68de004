"""Formats numbers, sizes and times for people."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from markupsafe import Markup

from app.languages import gettext, localized, ngettext

NARROW = "\N{NARROW NO-BREAK SPACE}"
NOTHING = "–"


def _or_nothing(function: Callable[..., str]) -> Callable[..., str]:
    """Shows a dash for an unknown number instead of raising."""

    def safe(value: Any, *rest: Any) -> str:
        return NOTHING if value is None or value != value else function(value, *rest)

    return safe


@_or_nothing
def human_bytes(value: float) -> str:
    """1_360_000_000 → `1.36 GB`, 8_000_000_000 → `8 GB`. Decimal units, three significant digits."""
    size, unit = float(value), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(size) < 999.5 or unit == "TB":
            break
        size /= 1000
    digits = 0 if unit == "B" or abs(size) >= 100 else 1 if abs(size) >= 10 else 2
    return localized(f"{size:.{digits}f} {unit}".replace("." + "0" * digits + " ", " "))


@_or_nothing
def human_seconds(value: float) -> str:
    """130 → `2 min 10 s`, 0.0312 → `31 ms`, 0 → `0 s`, 93_600 → `1 d 2 h`. Two units at most."""
    if value < 1:
        return "0 s" if value == 0 else f"{value * 1000:.0f} ms"
    if value < 10:
        return localized(f"{value:.1f} s")
    whole = round(value)
    parts = [(whole // 86_400, "d"), (whole // 3600 % 24, "h"), (whole // 60 % 60, "min"), (whole % 60, "s")]
    while parts[0][0] == 0:
        parts = parts[1:]
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count)


@_or_nothing
def human_number(value: float, digits: int | None = None) -> str:
    """1204 → `1,204`, 1.0834 → `1.08`, 0.00002 → `0.00002`."""
    if digits is None:
        if isinstance(value, int) or abs(value) >= 1000:
            digits = 0
        elif value and abs(value) < 0.01:
            return _small(value)
        else:
            digits = 2
    return localized(f"{value:,.{digits}f}")


def _small(value: float) -> str:
    """Three significant digits, without an exponent as long as the zeros can be counted at a glance."""
    if abs(value) < 1e-6:
        return localized(f"{value:.3g}")
    digits = 2 - math.floor(math.log10(abs(value)))
    return localized(f"{value:.{digits}f}".rstrip("0"))


@_or_nothing
def human_percent(value: float, digits: int = 1) -> str:
    """A fraction, 0 to 1: 0.018 → `1.8%`. A positive value that would round to 0 is shown as below the smallest step."""
    if 0 < abs(value) * 100 < 0.5 * 10**-digits:
        return localized(f"{'−' if value < 0 else ''}<{10**-digits:.{digits}f}%")
    return localized(f"{value * 100:.{digits}f}%")


@_or_nothing
def human_count(value: float) -> str:
    """A number of parameters with three significant digits: `2.44 M`, `135 M`, `1.24 B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return localized(f"{value / size:.3g}{NARROW}{unit}")
    return f"{value:g}"


def plural(count: int, one: str, many: str | None = None) -> str:
    """`1 row`, `1,204 rows`."""
    return f"{human_number(count)} {one if count == 1 else many or one + 's'}"


@_or_nothing
def clock(value: datetime) -> str:
    """A full timestamp, as a `<time>` that `static/js/shell.js` converts to the reader's time zone."""
    moment = value.astimezone(UTC)
    return Markup('<time datetime="{}" data-clock>{} UTC</time>').format(moment.isoformat(timespec="seconds"), f"{moment:%Y-%m-%d %H:%M}")


@_or_nothing
def ago(value: datetime) -> str:
    """Relative time: `3 min ago`, with the full timestamp on hover."""
    seconds = (datetime.now(UTC) - value).total_seconds()
    moment = value.astimezone(UTC)
    return Markup('<time datetime="{}" title="{}">{}</time>').format(
        moment.isoformat(timespec="seconds"), f"{moment:%Y-%m-%d %H:%M:%S} UTC", _ago(seconds)
    )


def _ago(seconds: float) -> str:
    away, past = abs(seconds), seconds > 0
    if away < 45:
        return gettext("just now")
    if away < 3600:
        count = max(1, round(away / 60))
        return ngettext("%(num)s min ago", "%(num)s min ago", count) if past else ngettext("in %(num)s min", "in %(num)s min", count)
    if away < 86_400:
        count = round(away / 3600)
        return ngettext("%(num)s h ago", "%(num)s h ago", count) if past else ngettext("in %(num)s h", "in %(num)s h", count)
    days = away / 86_400
    if days < 30:
        count = round(days)
        return ngettext("%(num)s day ago", "%(num)s days ago", count) if past else ngettext("in %(num)s day", "in %(num)s days", count)
    if days < 365:
        count = round(days / 30)
        return (
            ngettext("%(num)s month ago", "%(num)s months ago", count) if past else ngettext("in %(num)s month", "in %(num)s months", count)
        )
    count = round(days / 365)
    return ngettext("%(num)s year ago", "%(num)s years ago", count) if past else ngettext("in %(num)s year", "in %(num)s years", count)
