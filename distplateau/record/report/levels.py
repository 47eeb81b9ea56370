"""What each learning rate cost and what it brought: time, device hours, the best value at it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from distplateau.record.story import METRIC_DRIVEN, best_validation, is_better, schedule_name
from distplateau.record.words import duration, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distplateau.record.ledger import Event, History

# A cosine has a level at every validation: nothing is learned from a table of them.
_MAX_SCHEDULED = 12


@dataclass(frozen=True, slots=True)
class Level:
    """Validations in a row that were trained with the same learning rates.

    Parameters
    ----------
    lrs
        Learning rate of each parameter group; those at the end for the warmup.
    warmup
        Whether the learning rate was on its way up.
    seconds
        Time from the validation before the first to the last, validations included.
    device_seconds
        That time, once for each rank.
    best
        The best finite value of the monitored metric at this level, NaN without any.
    is_better
        Whether it beat every level before.
    """

    lrs: list[float]
    warmup: bool
    first: int
    last: int
    seconds: float
    device_seconds: float
    best: float
    is_better: bool


def levels(history: History) -> list[Level]:
    """Return the levels of the learning rate in order; none for a schedule that changes it all the time."""
    runs = [list(events) for _, events in groupby(history.validations, key=_trained_with)]
    if len(runs) > _MAX_SCHEDULED and schedule_name(history) not in METRIC_DRIVEN:
        return []
    found: list[Level] = []
    best = math.nan
    for events in runs:
        level = _level(events, best, history)
        best = level.best if level.is_better else best
        found.append(level)
    return found


def device_unit(history: History) -> str:
    """Return what an hour of one rank is called."""
    return "rank hours" if str(history.start.get("device", "")).upper() in {"", "CPU"} else "GPU hours"


def after_best(history: History) -> str:
    """Say how much of the time came after the best validation; empty where that is nothing, or not over yet."""
    best, seconds = best_validation(history), [_seconds(event) for event in history.validations]
    if best is None or not history.finished:
        return ""
    later = sum(s for s, event in zip(seconds, history.validations, strict=True) if event["step"] > best["step"])
    if not later:
        return ""
    share = 100 * later / sum(seconds)
    return f"{duration(later)} of it ({short(share, 2)} %) came after the best validation."


def _level(events: Sequence[Event], before: float, history: History) -> Level:
    finite = [event["value"] for event in events if math.isfinite(event["value"])]
    best = max(finite, key=lambda value: _sign(history) * value, default=math.nan)
    return Level(
        lrs=events[-1]["lr_before"],
        warmup=events[0]["decision"] == "warmup",
        first=events[0]["validation"],
        last=events[-1]["validation"],
        seconds=sum(map(_seconds, events)),
        device_seconds=sum(_seconds(event) * event.get("ranks", 1) for event in events),
        best=best,
        is_better=is_better(best, before, history),
    )


def _trained_with(event: Event) -> tuple[bool, tuple[float, ...]]:
    warmup = event["decision"] == "warmup"
    return warmup, () if warmup else tuple(event["lr_before"])


def _seconds(event: Event) -> float:
    seconds = event.get("seconds", 0.0)
    return seconds if math.isfinite(seconds) else 0.0


def _sign(history: History) -> int:
    return 1 if is_better(1.0, 0.0, history) else -1
