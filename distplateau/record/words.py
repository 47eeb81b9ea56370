"""How the record writes numbers, counts and times: as a person would."""

from __future__ import annotations

import math
import re
import textwrap
from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distplateau.record.ledger import Event


PERCENT_SIGN = "\N{NO-BREAK SPACE}%"
TIMES_SIGN = "\N{MULTIPLICATION SIGN}"
MAX_GROUPS_NAMED = 8
PANEL_METRICS = ("val/accuracy", "val/top5")


def metric_label(name: str) -> str:
    """Return what a figure calls a metric."""
    words = {"val/loss": "loss", "val/accuracy": "accuracy", "val/top5": "top-5 accuracy"}
    # A name that is too long for the figure would leave no room for the curves.
    return words.get(name) or textwrap.shorten(str(name), 32, placeholder="…") or "…"


def short(value: float, digits: int = 3) -> str:
    """Write a number as a person would: ``0.005``, ``1e-5``, ``1,200``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].replace("+", ""), f"{value:.{digits}g}")


def metric_text(name: str, value: float) -> str:
    """Write a metric: shares in percent, the rest with four digits."""
    share = name in PANEL_METRICS and math.isfinite(value)
    return f"{100 * value:.2f}{PERCENT_SIGN}" if share else short(value, 4)


def rates_text(rates: Sequence[float]) -> str:
    """Write the learning rates of the groups, once where all are equal."""
    if len(set(map(short, rates))) == 1:
        return short(rates[0])
    if len(rates) > MAX_GROUPS_NAMED:
        return f"{short(min(rates))} to {short(max(rates))} ({len(rates)} groups)"
    return " / ".join(map(short, rates))


def plural(count: int, noun: str) -> str:
    """Write a count and its noun: ``1 rank``, ``2 ranks``."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def times(count: int) -> str:
    """Write how often: ``once``, ``twice``, ``3 times``."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def listing(numbers: Sequence[int]) -> str:
    """Join numbers, the first twelve of many."""
    shown = ", ".join(f"{number:,}" for number in numbers[:12])
    return shown if len(numbers) <= 12 else f"{shown} and {len(numbers) - 12} more"


def which(validations: Sequence[int]) -> str:
    """Name validations: ``validations 3, 4``."""
    return f"validation{'s' if len(validations) > 1 else ''} {listing(validations)}"


def duration(seconds: float) -> str:
    """Write a duration: ``12.0 s``, ``3 min 4 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def when(event: Event) -> str:
    """Write when an event was, in UTC; empty where it does not say."""
    try:
        return f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d %H:%M} UTC"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return ""


def plain(text: str) -> str:
    """Return text on one line that UTF-8 can carry: a run name may hold half of a surrogate pair, or line breaks."""
    whole = str(text).encode("utf-8", "replace").decode("utf-8")
    return "".join(char if char.isprintable() or char == "\N{NO-BREAK SPACE}" else " " for char in whole)
