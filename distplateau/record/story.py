"""What happened in a run, told from its ledger alone: changes of the learning rate and why, warnings, agreement."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from distplateau.record.ledger import from_json
from distplateau.record.words import (
    PANEL_METRICS,
    PERCENT_SIGN,
    TIMES_SIGN,
    listing,
    metric_text,
    plural,
    rates_text,
    short,
    times,
    when,
    which,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from distplateau.record.ledger import Event, History


_MAX_SCHEDULED_MARKS = 12
METRIC_DRIVEN = frozenset({"plateau", "greedy"})


@dataclass(frozen=True, slots=True)
class LRChange:
    """One validation after which the learning rate was another.

    Parameters
    ----------
    kind
        ``reduced``, ``raised``, or ``scheduled`` for a schedule that follows the clock.
    before, after
        Learning rate of each parameter group.
    """

    kind: str
    event: Event
    before: list[float]
    after: list[float]

    @property
    def label(self) -> str:
        """Return by what the learning rate was multiplied, such as by 0.5, or by 0.1 / by 0.5 where groups differ."""
        pairs = zip(self.before, self.after, strict=False)
        factors = dict.fromkeys(f"{TIMES_SIGN}{short(b / a, 2)}" if a else f"→{short(b)}" for a, b in pairs if a != b)
        return " / ".join(factors if len(factors) <= 3 else (min(factors), "\N{HORIZONTAL ELLIPSIS}", max(factors)))


def summarize(history: History) -> str:
    """Say in a sentence what happened."""
    validations = history.validations
    if not validations:
        return "The run was started and has not been validated yet: there is nothing to show so far."
    best, monitor = best_validation(history), str(validations[-1]["monitor"])
    ranks = f"on {plural(validations[-1].get('ranks', 1), 'rank')}"
    if best is None:
        return f"No validation gave a finite {monitor}; {_lr_story(history)}, {ranks}."
    where = f"validation {best['validation']} (epoch {short(best['epoch'])})"
    return f"Best {monitor} {metric_text(monitor, best['value'])} at {where}; {_lr_story(history)}, {ranks}."


def best_validation(history: History) -> Event | None:
    """Return the validation with the best finite value of the monitored metric, the first of equals."""
    finite = [event for event in history.validations if math.isfinite(event["value"])]
    pick = max if rule_of(history).get("mode") == "max" else min
    return pick(finite, key=lambda event: event["value"], default=None)


def is_better(value: float, than: float, history: History) -> bool:
    """Tell whether a value of the monitored metric beats another; any number beats NaN."""
    if math.isnan(value) or math.isnan(than):
        return not math.isnan(value)
    return value > than if rule_of(history).get("mode") == "max" else value < than


def lr_changes(history: History) -> list[LRChange]:
    """Return every change of the learning rate that a decision or the clock of a schedule made; warmup is none."""
    changes: list[LRChange] = []
    previous: Event = {}
    for event in history.validations:
        kind, before, after = event["decision"], event["lr_before"], event["lr_after"]
        if kind == "scheduled" and previous.get("decision") == "scheduled":
            before = previous["lr_after"]
        if kind in {"reduced", "raised"} or (kind == "scheduled" and before != after):
            changes.append(LRChange(kind, event, before, after))
        previous = event
    return changes


def marked_changes(history: History) -> list[LRChange]:
    """Return the changes that are marked and listed one by one: a cosine changes the learning rate at every step."""
    changes = lr_changes(history)
    few = len(changes) <= _MAX_SCHEDULED_MARKS
    return [change for change in changes if few or change.kind != "scheduled"]


def find_warnings(history: History) -> list[str]:
    """Return what a reader of the run should know before trusting its curves."""
    found = [*_plateau_warnings(history), *_value_warnings(history)]
    if not history.validations:
        found.append("The ledger holds no validation.")
    if history.torn_lines:
        lines = listing(history.torn_lines)
        found.append(f"The ledger has torn lines (the machine died while writing); they were left out: {lines}.")
    if evaluations(history) is None:
        found.append("evaluation.json cannot be read and was left out.")
    return found


def metric_panels(history: History) -> list[list[str]]:
    """Return the metrics that are drawn apart from the losses, by panel."""
    first = history.validations[0] if history.validations else {}
    names = [name for name in PANEL_METRICS if name in first.get("metrics", {})]
    monitor = first.get("monitor")
    extra = [] if monitor in {None, "val/loss", *names} or not has_loss(history) else [str(monitor)]
    return [panel for panel in (names, extra) if panel]


def _lr_story(history: History) -> str:
    changes, name = lr_changes(history), schedule_name(history)
    first, last = history.validations[0]["lr_before"], history.validations[-1]["lr_after"]
    way = f"from {rates_text(changes[0].before if changes else first)} to {rates_text(last)}"
    if name not in METRIC_DRIVEN:
        # 1cycle begins below the peak that the ledger names.
        first = first if name == "onecycle" else history.start.get("lrs") or first
        way = f"from {rates_text(first)} to {rates_text(last)}"
        if first == last and not changes:
            return f"the learning rate stayed at {rates_text(last)}"
        return f"the {name} schedule took the learning rate {way}"
    counts = [(kind, sum(change.kind == kind for change in changes)) for kind in ("reduced", "raised")]
    told = " and ".join(f"{kind} {times(count)}" for kind, count in counts if count)
    return (
        f"the learning rate was {told}, {way}" if told else f"the learning rate of {rates_text(last)} was never reduced"
    )


def reason(change: LRChange, history: History) -> str:
    """Say why the learning rate was changed."""
    event = change.event
    rule = rule_of(history, event["validation"])
    if change.kind == "scheduled":
        return f"the {schedule_name(history, event['validation'])} schedule"
    if not isinstance(rule.get("patience"), int):
        return "the ledger has no start event that says it"
    patience = rule["patience"]
    row = f"{plural(patience + 1, 'validation')}{' in a row' if patience else ''}"
    if change.kind == "raised":
        began_anew = not math.isfinite(event["best"])
        return (
            "began anew after staying at the floor" if began_anew else f"{row} better than before (patience {patience})"
        )
    threshold = rule.get("threshold", 0.0)
    margin = f"{short(100 * threshold)}{PERCENT_SIGN}" if rule.get("threshold_mode") == "rel" else short(threshold)
    by = f" by {margin}" if threshold else ""
    best = (
        metric_text(event["monitor"], event["best"])
        if math.isfinite(event["best"])
        else "anything (no finite value yet)"
    )
    smoothed = "smoothed, " if rule.get("smoothing") else ""
    return f"{row} without beating {best}{by} ({smoothed}patience {patience})"


def _plateau_warnings(history: History) -> Iterable[str]:
    validations, rule = history.validations, rule_of(history)
    if not validations or schedule_name(history) not in METRIC_DRIVEN or not isinstance(rule.get("patience"), int):
        return
    floor = _floor_warning(history)
    yield from filter(None, [floor, _blocked_warning(history), _requeue_warning(history)])
    patience = rule["patience"]
    decided = history.finished is not None or len(validations) > patience
    if decided and not floor and not any(change.kind == "reduced" for change in lr_changes(history)):
        longest = max(event["num_bad"] for event in validations)
        yield (
            f"The learning rate was never reduced: patience {patience} was never reached. A reduction takes "
            f"{plural(patience + 1, 'validation')} in a row without an improvement; the longest such row was "
            f"{longest}, in {plural(len(validations), 'validation')}."
        )


def _floor_warning(history: History) -> str:
    validations, rule = history.validations, rule_of(history)
    if not _at_floor(validations[-1], rule):
        return ""
    last = validations[-1]["lr_after"]
    since = next(e["validation"] for e in validations if e["lr_after"] == last)
    return (
        f"The learning rate is at its floor (min_lr {rates_text(last)}) since validation {since}: "
        "a plateau after that could not lower it."
    )


def _at_floor(event: Event, rule: dict[str, Any]) -> bool:
    rates, floors = event["lr_after"], rule.get("min_lr", 0.0)
    floors = floors if isinstance(floors, list) else [floors] * len(rates)
    return any(floors) and all(lr - floor <= rule.get("eps", 0.0) for lr, floor in zip(rates, floors, strict=False))


def _blocked_warning(history: History) -> str:
    """Find reductions that were due and not made: the counter began anew, the learning rate stayed."""
    blocked = [
        event["validation"]
        for event in history.validations
        if event["decision"] == "bad" and not event["num_bad"] and not _at_floor(event, rule_of(history))
    ]
    if not blocked:
        return ""
    eps, rate = rule_of(history).get("eps", 0.0), rates_text(history.validations[-1]["lr_after"])
    return (
        f"A reduction was due and was not made, because it would have been smaller than eps {short(eps)}: "
        f"{which(blocked)}, at a learning rate of {rate}. Set schedule.eps to 0 for rates as small as that."
    )


def _requeue_warning(history: History) -> str:
    """Compare the length of the segments with the row that a reduction takes."""
    borders = [event.get("last_validation", 0) for event in history.events if event["event"] == "resumed"]
    if not borders:
        return ""
    lengths = [end - begin for begin, end in zip([0, *borders], borders, strict=False)]
    row, usual = rule_of(history)["patience"] + 1, median(lengths)
    if usual >= row:
        return ""
    return (
        f"The run was requeued {times(len(borders))}, after {short(usual)} validations in the median: fewer than the "
        f"{row} in a row that a reduction takes. The counters were carried over, so that the decisions stand; a "
        "scheduler whose state is not saved would never have reduced the learning rate."
    )


def _value_warnings(history: History) -> Iterable[str]:
    lost = [event["validation"] for event in history.validations if not math.isfinite(event["value"])]
    if lost:
        treated = {"ignore": "passed over", "bad": "counted as bad"}.get(
            rule_of(history).get("nonfinite", ""), "recorded"
        )
        yield f"{history.validations[0]['monitor']} was NaN or infinite and was {treated}: {which(lost)}."
    diverged = [e["validation"] for e in history.validations if not math.isfinite(e.get("train_loss", 0.0))]
    if diverged:
        traced = next((e["nonfinite_loss"] for e in history.validations if "nonfinite_loss" in e), None)
        first = f", first at step {traced['step']:,} on rank {traced['rank']}" if traced else ""
        yield f"The training loss was NaN or infinite: {which(diverged)}{first}."
    counts = sorted({event["count"] for event in history.validations if "count" in event})
    if len(counts) > 1:
        yield f"Validations were not over the same number of samples: {listing(counts)}. Their values do not compare."


def agreement(history: History) -> list[str]:
    """Say in how many validations how many ranks agreed."""
    validations = history.validations
    if not validations:
        return ["Nothing was decided yet."]
    ranks = list(dict.fromkeys(event.get("ranks", 1) for event in validations))
    number, samples = plural(len(validations), "validation"), f"{validations[-1].get('count', 0):,} samples"
    digest = str(validations[-1].get("digest", "none"))
    if ranks == [1]:
        story = f"{number} on one rank, over {samples}: there was nobody to disagree. Last digest: {digest}"
    else:
        who = f"{' then '.join(map(str, ranks))} ranks"
        story = (
            f"{'All ' if len(validations) > 1 else ''}{number} agreed on {who}, over {samples}: every rank had the "
            "same metric, learning rates and scheduler state, or the run would have stopped there. "
            f"Last digest: {digest}"
        )
    requeues = [e for e in history.events if e["event"] == "resumed"]
    told = [
        f"after validation {e.get('last_validation', 0)} on {plural(e.get('world_size', 1), 'rank')}" for e in requeues
    ]
    again = [f"Continued {times(len(told))} from a checkpoint: {', '.join(told)}."] if told else []
    return [story, *again, *changed_settings(history)]


def status(history: History) -> tuple[str, str]:
    """Return how the run stands, in words and as a CSS class."""
    if history.finished:
        return "Finished", "finished"
    last = history.events[-1]
    if last["event"] == "interrupted":
        reason = f": {last['reason']}" if last.get("reason") else ""
        return f"Interrupted at step {last.get('step', '?')}{reason}", "interrupted"
    return "Running or interrupted", "open"


def meta(history: History) -> str:
    """Say when, where and with which schedule the run was started."""
    start = history.start
    schedule = f"{schedule_name(history)} schedule on {start['monitor']}" if "monitor" in start else ""
    last = history.events[-1]
    ended = "" if history.finished else f"last event {when(last)}"
    return " · ".join(filter(None, [when(start), str(start.get("device", "")), schedule, ended]))


def evaluations(history: History) -> dict[str, Any] | None:
    """Return the metrics and the count by split; empty without the file, None for a file that is none."""
    path = history.run_dir / "evaluation.json"
    try:
        results = from_json(json.loads(path.read_text(encoding="utf-8")))
        found = {split: {name: value + 0 for name, value in result.items()} for split, result in results.items()}
        return found if all({"loss", "count"} <= result.keys() for result in found.values()) else None
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def run_name(history: History) -> str:
    """Return the name of the run."""
    return str(history.start.get("run") or history.run_dir.resolve().name)


def schedule_name(history: History, validation: int | None = None) -> str:
    """Return the name of the schedule, such as ``plateau``; see `rule_of` for `validation`."""
    return str(_schedule(history, validation).get("name", "plateau"))


def rule_of(history: History, validation: int | None = None) -> dict[str, Any]:
    """Return the settings of the schedule by name; empty where the ledger has no start.

    Parameters
    ----------
    validation
        The settings that decided it: a resumed run may have been given others. By default those at the end.
    """
    return _schedule(history, validation).get("rule") or {}


def _schedule(history: History, validation: int | None) -> dict[str, Any]:
    settings = [
        event["schedule"]
        for event in history.events
        if event["event"] in {"start", "resumed"}
        and event.get("schedule")
        and (validation is None or event.get("last_validation", 0) < validation)
    ]
    return settings[-1] if settings else {}


def changed_settings(history: History) -> list[str]:
    """Say with what other settings of the schedule a run was continued, if it was."""
    told, before = [], _schedule(history, 1)
    for event in history.events:
        if event["event"] != "resumed" or not event.get("schedule"):
            continue
        now = event["schedule"]
        old, new = ({"name": described.get("name"), **(described.get("rule") or {})} for described in (before, now))
        keys = [key for key in {**old, **new} if key in old and key in new and old[key] != new[key]]
        changes = ", ".join(f"{key} {_setting(old[key])} → {_setting(new[key])}" for key in keys)
        if changes:
            told.append(f"From validation {event.get('last_validation', 0) + 1} on with other settings: {changes}.")
        before = now
    return told


def _setting(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(_setting, value))
    return short(value) if isinstance(value, float) else str(value)


def steps_per_epoch(history: History) -> float:
    """Return optimizer steps per epoch; 0 where they are not known."""
    known = (history.start.get("schedule") or {}).get("steps_per_epoch")
    first = next((event for event in history.validations if event["epoch"]), None)
    return known or (first["step"] / first["epoch"] if first else 0.0)


def has_loss(history: History) -> bool:
    """Tell whether validation losses were recorded."""
    return any("val/loss" in (*e.get("metrics", {}), e["monitor"]) for e in history.validations)


def top_value(event: Event, history: History) -> float:
    """Return what the upper panel shows of a validation: its loss, or the monitored metric where there is none."""
    return measured(event, "val/loss") if has_loss(history) else _finite(event["value"])


def measured(event: Event, name: str) -> float:
    """Return a metric of a validation, NaN where it has none that is finite."""
    value = event["value"] if name == event["monitor"] else None
    return _finite(event.get("metrics", {}).get(name, value))


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def drawable(value: float | None) -> float:
    """Keep clear of where Python's floats end: a run that diverged must not take the report with it."""
    value = _finite(value)
    return math.copysign(min(max(abs(value), 1e-100), 1e100), value) if value else value
