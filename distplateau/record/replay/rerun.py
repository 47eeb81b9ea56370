"""What would another patience, another factor have decided? The rule, run again on a recorded curve.

The decisions come from the functions that the scheduler runs. They are what would have happened up to the first one
that sets another learning rate than the run had; from there on the run would have measured another curve, and what the
rule makes of the recorded one is a guess. Everything here keeps the two apart.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from distplateau.errors import InputError, closest
from distplateau.lockstep import schedules
from distplateau.lockstep.plateau import NonFiniteMetricError, PlateauRule, is_better
from distplateau.record.story import METRIC_DRIVEN
from distplateau.record.words import plural, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from distplateau.lockstep.plateau import Decision
    from distplateau.lockstep.schedules import Schedule
    from distplateau.record.replay.curves import Curve, Rates

# The settings that may be varied, in the order of the table.
VARIED = ("schedule", "patience", "factor", "threshold", "cooldown", "smoothing", "min_lr")
_PATIENCES = (0, 1, 2, 3, 5, 10)
_MOST_COMBINATIONS = 500
_FEWEST_VALIDATIONS = 6
# A gain that noise alone would hardly make: two standard deviations below what is the best of several anyway.
_SIGNIFICANT = 2.0
_MAD_TO_SIGMA = 1.4826
Settings = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Change:
    """A validation after which the learning rate was another.

    Parameters
    ----------
    kind
        ``reduced`` or ``raised``.
    hypothetical
        Whether it rests on values that would have been others.
    """

    validation: int
    kind: str
    rates: Rates
    hypothetical: bool


@dataclass(frozen=True)
class Outcome:
    """What one combination of settings makes of a curve.

    Parameters
    ----------
    settings
        The value of each setting of `VARIED`.
    lr_after
        Learning rates after each validation.
    first_difference
        Validation whose decision sets another learning rate than the run had; 0 if they differ from the start, None if
        they never do.
    stopped_at
        Validation at which a NaN would have stopped the run (``nonfinite = "raise"``).
    as_recorded
        Whether these are the settings of the run.
    """

    settings: Settings
    start_lrs: Rates
    lr_after: tuple[Rates, ...]
    changes: tuple[Change, ...]
    first_difference: int | None
    validations: int
    stopped_at: int | None = None
    as_recorded: bool = False

    @property
    def reductions(self) -> list[Change]:
        """Return the changes that lowered the learning rate."""
        return [change for change in self.changes if change.kind == "reduced"]

    @property
    def hypothetical(self) -> int:
        """Return how many validations come after the first difference: their values would have been others."""
        return 0 if self.first_difference is None else self.validations - self.first_difference

    @property
    def final_lrs(self) -> Rates:
        """Return the learning rates at the end."""
        return self.lr_after[-1] if self.lr_after else self.start_lrs


@dataclass(frozen=True)
class Suggestion:
    """A patience that fits the curve, and why; None where the curve does not say.

    Parameters
    ----------
    noise
        Standard deviation of a validation's value around the trend, at the learning rate of the lull.
    lull
        First and last validation of the longest lull that was recovered from.
    """

    patience: int | None
    reason: str
    noise: float = math.nan
    lull: tuple[int, int] | None = None


@dataclass(frozen=True)
class Replay:
    """All combinations on one curve.

    Parameters
    ----------
    varying
        Settings with more than one value.
    rule
        What the combinations have in common.
    """

    curve: Curve
    outcomes: tuple[Outcome, ...]
    varying: tuple[str, ...]
    rule: PlateauRule
    suggestion: Suggestion


def replay(curve: Curve, varied: Mapping[str, Sequence[Any]], fixed: Mapping[str, Any], lr: float | None) -> Replay:
    """Run every combination of settings on a curve.

    Parameters
    ----------
    varied
        Values by setting, names from `VARIED`; what is not given stays as the run had it, or is torch's default.
        Without any, several patiences are tried.
    fixed
        Settings that all combinations share: ``mode``, ``threshold_mode``.
    lr
        Learning rate to start from, in place of the recorded one.

    Raises
    ------
    InputError
        For a setting out of range or more combinations than anybody reads.
    """
    base = base_rule(curve, fixed)
    start_lrs = curve.start_lrs or (1.0,) if lr is None else (lr,) * max(1, len(curve.start_lrs))
    given = {name: list(dict.fromkeys(values)) for name, values in varied.items() if values}
    own = _own_settings(curve, base)
    for name in given.get("schedule", ()):
        _check_schedule(name)
    shared = _shared(given, own)
    suggestion = suggest_patience(curve, _checked(lambda: replace(base, **shared)))
    values = {name: given.get(name, [own[name]]) for name in VARIED}
    if not given:
        extra = {own["patience"]} if curve.recorded else set()
        extra |= set() if suggestion.patience is None else {suggestion.patience}
        values["patience"] = sorted({p for p in _PATIENCES if p < len(curve.values)} | extra)
    count = math.prod(map(len, values.values()))
    if count > _MOST_COMBINATIONS:
        raise InputError("replay", f"{count:,} combinations are more than anybody reads", "give fewer values")
    outcomes = []
    for combination in itertools.product(*values.values()):
        settings = dict(zip(values, combination, strict=True))
        if "factor" not in given and settings["schedule"] != own["schedule"]:
            settings["factor"] = schedules.SCHEDULES[settings["schedule"]].factor
        as_recorded = settings == own and _is_own(curve, base, own)
        outcomes.append(_run(curve, base, settings, start_lrs, as_recorded=as_recorded))
    varying = tuple(name for name in VARIED if len({outcome.settings[name] for outcome in outcomes}) > 1)
    return Replay(curve, tuple(outcomes), varying or ("patience",), base, suggestion)


def base_rule(curve: Curve, fixed: Mapping[str, Any]) -> PlateauRule:
    """Return the settings of the run, or torch's defaults for the record of another tool."""
    recorded = curve.recorded
    fields = {k: _frozen(v) for k, v in recorded.rule.items()} if recorded else {}
    if recorded is None or recorded.monitor != curve.monitor:
        fields["mode"] = curve.mode
    return _checked(lambda: PlateauRule(**fields | {k: v for k, v in fixed.items() if v is not None}))


def _own_settings(curve: Curve, rule: PlateauRule) -> Settings:
    recorded = curve.recorded.name if curve.recorded else "plateau"
    name = recorded if recorded in METRIC_DRIVEN else "plateau"
    return {"schedule": name} | {setting: getattr(rule, setting) for setting in VARIED if setting != "schedule"}


def _shared(given: Mapping[str, Sequence[Any]], own: Settings) -> Settings:
    """Return what the suggestion is made with: the settings that have one value, the run's own for the others."""
    names = ("threshold", "smoothing")
    return {name: given[name][0] if len(given.get(name, ())) == 1 else own[name] for name in names}


def _is_own(curve: Curve, base: PlateauRule, own: Settings) -> bool:
    """Tell whether the run itself was decided by these settings on this metric."""
    recorded = curve.recorded
    if recorded is None or recorded.settings_changed or recorded.monitor != curve.monitor:
        return False
    return recorded.name == own["schedule"] and base == base_rule(curve, {})


def _run(
    curve: Curve, base: PlateauRule, settings: Settings, start_lrs: Rates, *, as_recorded: bool = False
) -> Outcome:
    schedule = _build(curve, base, settings)
    state = _checked(lambda: schedule.start(start_lrs))
    lr_after: list[Rates] = []
    changes: list[Decision] = []
    stopped_at = None
    for place, value in enumerate(curve.values):
        step = curve.steps[place] if curve.steps else state.step
        try:
            state, decision = schedule.advance(replace(state, step=step), value)
        except NonFiniteMetricError:
            stopped_at = place + 1
            break
        lr_after.append(decision.lr_after)
        if decision.kind in {"reduced", "raised"}:
            changes.append(decision)
    first = _first_difference(curve, start_lrs, lr_after)
    return Outcome(
        settings=settings,
        start_lrs=start_lrs,
        lr_after=tuple(lr_after),
        changes=tuple(
            Change(one.validation, one.kind, one.lr_after, first is not None and one.validation > first)
            for one in changes
        ),
        first_difference=first,
        validations=len(curve.values),
        stopped_at=stopped_at,
        as_recorded=as_recorded,
    )


def _check_schedule(name: str) -> None:
    if name not in schedules.SCHEDULES:
        raise InputError("--schedule", "there is no such schedule", closest(name, METRIC_DRIVEN), value=name)
    if name not in METRIC_DRIVEN:
        problem = "it goes by the clock and decides nothing on a curve"
        raise InputError("--schedule", problem, "choose plateau or greedy", value=name)


def _build(curve: Curve, base: PlateauRule, settings: Settings) -> Schedule:
    name, recorded = settings["schedule"], curve.recorded
    rule = _checked(lambda: replace(base, **{key: value for key, value in settings.items() if key != "schedule"}))
    args = recorded.args if recorded is not None and recorded.name == name else {}
    return schedules.build(name, rule, args, schedules.Length(1, 1))


def _first_difference(curve: Curve, start_lrs: Rates, lr_after: Sequence[Rates]) -> int | None:
    if curve.start_lrs and not _equal(start_lrs, curve.start_lrs):
        return 0
    for place, rates in enumerate(lr_after):
        recorded = curve.lr_after[place]
        if not curve.start_lrs:
            recorded = start_lrs  # nothing is known: taken as constant
        if recorded is not None and not _equal(rates, recorded):
            return place + 1
    return None


def _equal(one: Rates, other: Rates) -> bool:
    """Compare learning rates; other tools write them with fewer digits."""
    return len(one) == len(other) and all(map(_close, one, other))


def _close(one: float, other: float) -> bool:
    return math.isclose(one, other, rel_tol=1e-5)


# A patience from the curve itself.


@dataclass(frozen=True, slots=True)
class _Lull:
    """Validations `first` to `last` (1 for the first of the run) that were not better than `best`."""

    first: int
    last: int
    best: float
    noise: float = 0.0

    @property
    def length(self) -> int:
        return self.last - self.first + 1


def suggest_patience(curve: Curve, rule: PlateauRule) -> Suggestion:
    """Suggest the smallest patience that would have waited out every lull the curve came out of by itself.

    A lull is a row of validations that the rule calls bad. It counts if the curve, at the same learning rate, was later
    better than before the lull by more than noise explains: what is gained after a drop is the drop's, and a record
    by luck on a flat stretch is no recovery.
    """
    finite = sum(map(math.isfinite, curve.values))
    if finite < _FEWEST_VALIDATIONS:
        return Suggestion(None, f"{plural(finite, 'validation')} are too few to tell noise from a plateau")
    values, bad = _as_compared(curve, rule)
    segments, moving = _segments(curve)
    stretches = [values[begin:end] for begin, end in segments]
    overall = noise_of(stretches)
    lulls = []
    for (begin, end), stretch in zip(segments, stretches, strict=True):
        # A lower learning rate is a quieter one: each stretch has its own noise, where it is long enough to show it.
        noise = noise_of([stretch]) if len(stretch) >= _FEWEST_VALIDATIONS else overall
        tolerant = replace(rule, threshold=_SIGNIFICANT * noise, threshold_mode="abs")
        for lull in _lulls(values, bad, begin + rule.cooldown if begin else 0, end, rule):
            if any(is_better(tolerant, value, lull.best) for value in values[lull.last : end]):
                lulls.append(replace(lull, noise=noise))
    longest = max(lulls, key=lambda lull: lull.length, default=None)
    noise = longest.noise if longest else overall
    margin = f"gains within twice the noise of {short(noise, 2)} do not count"
    aside = "; the learning rate moved all along, so take it with care" if moving else ""
    if longest is None:
        return Suggestion(
            1,
            f"the curve never came out of a lull at the same learning rate, so that not even patience 0 would have cut "
            f"a recovery short; 1 forgives one unlucky validation; {margin}{aside}",
            noise,
        )
    where = f"validation {longest.first}" if longest.length == 1 else f"validations {longest.first} to {longest.last}"
    return Suggestion(
        longest.length,
        f"the longest lull that the curve came out of by itself, at the same learning rate, was "
        f"{plural(longest.length, 'validation')} ({where}), and this is the smallest patience that waits it out; "
        f"{margin}{aside}",
        noise,
        (longest.first, longest.last),
    )


def noise_of(stretches: Sequence[Sequence[float]]) -> float:
    """Return the standard deviation of the values around their trend.

    From second differences, in which a linear trend cancels: for independent noise of variance s^2 theirs is 6 s^2. The
    median of their sizes is not moved by the few that a drop or a spike makes. 0 with fewer than three values.
    """
    second = [
        abs(a - 2 * b + c)
        for stretch in stretches
        for a, b, c in zip(stretch, stretch[1:], stretch[2:], strict=False)
        if math.isfinite(a + b + c)
    ]
    return _MAD_TO_SIGMA * median(second) / math.sqrt(6) if second else 0.0


def _as_compared(curve: Curve, rule: PlateauRule) -> tuple[list[float], list[bool]]:
    """Return what the rule compares at each validation (smoothed, if it smooths) and whether it calls it bad."""
    patient = replace(
        rule, patience=len(curve.values) + 1, cooldown=0, nonfinite="bad", factor=0.5, min_lr=0.0, eps=0.0
    )
    schedule = schedules.Plateau(patient)
    state = schedule.start((1.0,))
    values, bad = [], []
    for place, value in enumerate(curve.values):
        step = curve.steps[place] if curve.steps else state.step
        state, decision = schedule.advance(replace(state, step=step), value)
        values.append(state.smoothed if state.smoothed is not None and math.isfinite(value) else value)
        bad.append(decision.kind == "bad")
    return values, bad


def _segments(curve: Curve) -> tuple[list[tuple[int, int]], bool]:
    """Return the stretches of equal learning rate; one stretch and True for a learning rate that moves all along."""
    count, rates = len(curve.values), curve.lr_after
    cuts = [
        place + 1
        for place, (before, after) in enumerate(itertools.pairwise([curve.start_lrs or None, *rates[:-1]]))
        if before is not None and after is not None and not _equal(before, after)
    ]
    if len(cuts) > count / 2:
        return [(0, count)], True
    return list(itertools.pairwise([0, *cuts, count])), False


def _lulls(values: Sequence[float], bad: Sequence[bool], begin: int, end: int, rule: PlateauRule) -> Iterator[_Lull]:
    """Find the rows of bad validations in a stretch, each with the best value before it."""
    sign = 1 if rule.mode == "min" else -1
    place = begin
    while place < end:
        if not bad[place]:
            place += 1
            continue
        first = place
        while place < end and bad[place]:
            place += 1
        earlier = [sign * value for value in values[:first] if math.isfinite(value)]
        if earlier:
            yield _Lull(first + 1, place, sign * min(earlier))


def _checked(make: Any) -> Any:
    """Turn a setting that is out of range into the error of who gave it."""
    try:
        return make()
    except InputError:
        raise
    except ValueError as error:
        raise InputError("replay", str(error), "mend that setting") from None


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
