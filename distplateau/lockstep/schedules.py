"""Every learning-rate strategy by name, behind one small interface. Standard library only.

A `Schedule` is pure: it turns a state and a metric into the next state and a `Decision`, and a state into learning
rates. The scheduler, the trainer, the ledger, ``verify`` and resume treat all of them alike; communication and
optimizers live elsewhere.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from dataclasses import fields as dataclass_fields
from typing import TYPE_CHECKING, Any, Protocol

from distplateau.errors import InputError, closest
from distplateau.lockstep import plateau
from distplateau.lockstep.plateau import Decision, Kind, PlateauRule, PlateauState, round_lr

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LRs = tuple[float, ...]


class Schedule(Protocol):
    """What a strategy has to offer. All methods are pure."""

    @property
    def rule(self) -> PlateauRule:
        """Return the settings that all strategies share: mode, warmup, floor, and the plateau's own."""
        ...

    @property
    def timed(self) -> bool:
        """Return whether the learning rate follows the optimizer steps rather than the metric."""
        ...

    def start(self, lrs: LRs) -> PlateauState:
        """Return the state before training, for the optimizer's learning rates."""
        ...

    def advance(self, state: PlateauState, metric: float) -> tuple[PlateauState, Decision]:
        """Decide after one validation."""
        ...

    def applied(self, state: PlateauState) -> LRs:
        """Return what the optimizer uses for its next step, warmup included."""
        ...

    def scale(self, state: PlateauState) -> float:
        """Return the factor between the state's learning rates and the applied ones; 1.0 where there is none."""
        ...

    def load(self, state: Mapping[str, Any]) -> PlateauState:
        """Read a state back from the dict that `dump` made."""
        ...


def dump(state: PlateauState) -> dict[str, Any]:
    """Return the state as a dict of plain values; tuples become lists, as in JSON."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(state).items()}


def _load(kind: type[PlateauState], values: Mapping[str, Any]) -> PlateauState:
    if other := {field.name for field in dataclass_fields(kind)} ^ set(values):
        raise ValueError(
            f"the state is that of another schedule (it differs in {', '.join(sorted(other))}): "
            f"go on with the one it was saved by"
        )
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return kind(**fields)


@dataclass(frozen=True, slots=True)
class Plateau:
    """Reduce on a plateau of the metric (torch's ReduceLROnPlateau)."""

    rule: PlateauRule
    timed = False

    def start(self, lrs: LRs) -> PlateauState:
        """Return the state before training."""
        return plateau.start(self.rule, lrs)

    def advance(self, state: PlateauState, metric: float) -> tuple[PlateauState, Decision]:
        """Decide after one validation."""
        return plateau.advance(self.rule, state, metric)

    def applied(self, state: PlateauState) -> LRs:
        """Return the plateau's learning rates times the warmup."""
        return plateau.applied_lrs(self.rule, state)

    def scale(self, state: PlateauState) -> float:
        """Return the warmup multiplier."""
        return plateau.warmup_multiplier(state.step, self.rule.warmup_steps)

    def load(self, state: Mapping[str, Any]) -> PlateauState:
        """Read a state back."""
        return _load(PlateauState, state)


@dataclass(frozen=True, slots=True)
class GreedyState(PlateauState):
    """What the greedy schedule remembers on top: runs of good validations, and where it began."""

    num_good: int = 0
    raise_cooldown: int = 0
    floor_hits: int = 0
    initial_lrs: LRs = ()


@dataclass(frozen=True, slots=True)
class Greedy:
    """GreedyLR: raise while the metric improves, lower while it does not.

    Subramanian and others, "GreedyLR", arXiv 2512.14527; the order of the checks is that of
    ``transformers.GreedyLR``, which it matches bit for bit. The learning rate is divided by ``factor`` after more
    than ``patience`` better validations in a row, multiplied by it after as many bad ones.

    Parameters
    ----------
    max_lr
        Ceiling; 0 stands for ten times the learning rate at the start.
    raise_cooldown
        Validations to wait after a raise.
    reset_after
        Drops made at the floor in every group after which all begins anew; 0 = never.
    """

    rule: PlateauRule
    max_lr: float = 0.0
    raise_cooldown: int = 0
    reset_after: int = 0
    timed = False

    def start(self, lrs: LRs) -> GreedyState:
        """Return the state before training."""
        begin = plateau.start(self.rule, lrs)
        return GreedyState(lrs=lrs, best=begin.best, initial_lrs=lrs)

    def advance(self, state: PlateauState, metric: float) -> tuple[PlateauState, Decision]:
        """Decide after one validation."""
        assert isinstance(state, GreedyState)
        before, rule = state, self.rule
        state = replace(state, validations=state.validations + 1)
        if not math.isfinite(metric) and rule.nonfinite == "raise":
            raise plateau.NonFiniteMetricError(f"validation {state.validations}: the monitored metric is {metric!r}")
        kind: Kind
        if state.step < rule.warmup_steps:
            kind = "warmup"
        elif before.validations < rule.start_after:
            kind = "waiting"
        elif not math.isfinite(metric) and rule.nonfinite == "ignore":
            kind = "ignored"
        else:
            state, kind = self._observe(state, metric)
        return state, plateau.decision(rule, before, state, metric, kind)

    def applied(self, state: PlateauState) -> LRs:
        """Return the greedy learning rates times the warmup."""
        return plateau.applied_lrs(self.rule, state)

    def scale(self, state: PlateauState) -> float:
        """Return the warmup multiplier."""
        return plateau.warmup_multiplier(state.step, self.rule.warmup_steps)

    def load(self, state: Mapping[str, Any]) -> PlateauState:
        """Read a state back."""
        return _load(GreedyState, state)

    def _observe(self, state: GreedyState, metric: float) -> tuple[GreedyState, Kind]:
        smoothed, value = plateau.smooth(self.rule, state, metric)
        assert isinstance(smoothed, GreedyState)
        state = smoothed
        if state.cooldown > 0:
            return replace(state, cooldown=state.cooldown - 1, num_bad=0, num_good=0), "cooldown"
        if state.raise_cooldown > 0:
            return replace(state, raise_cooldown=state.raise_cooldown - 1, num_bad=0, num_good=0), "cooldown"
        if plateau.is_better(self.rule, value, state.best):
            state = replace(state, best=value, num_bad=0, num_good=state.num_good + 1)
            return self._raise(state) if state.num_good > self.rule.patience else (state, "improved")
        state = replace(state, num_bad=state.num_bad + 1, num_good=0)
        return self._lower(state) if state.num_bad > self.rule.patience else (state, "bad")

    def _raise(self, state: GreedyState) -> tuple[GreedyState, Kind]:
        rule = self.rule
        factors, _ = plateau.per_group(rule, len(state.lrs))
        ceilings = [self.max_lr or 10 * lr for lr in state.initial_lrs]
        higher = [min(lr / f, top) for lr, f, top in zip(state.lrs, factors, ceilings, strict=True)]
        lrs = tuple(
            round_lr(new, rule.lr_dtype) if new - old > rule.eps else old
            for old, new in zip(state.lrs, higher, strict=True)
        )
        kind: Kind = "raised" if lrs != state.lrs else "improved"
        return replace(state, lrs=lrs, num_good=0, raise_cooldown=self.raise_cooldown, floor_hits=0), kind

    def _lower(self, state: GreedyState) -> tuple[GreedyState, Kind]:
        lrs = plateau.reduced_lrs(self.rule, state.lrs)
        kind: Kind = "reduced" if lrs != state.lrs else "bad"
        state = replace(state, lrs=lrs, num_bad=0, cooldown=self.rule.cooldown)
        _, floors = plateau.per_group(self.rule, len(lrs))
        if any(lr > low for lr, low in zip(lrs, floors, strict=True)):
            return state, kind
        hits = state.floor_hits + 1
        if not self.reset_after or hits < self.reset_after:
            return replace(state, floor_hits=hits), kind
        fresh = self.start(state.initial_lrs)
        # The drop that led here has its cooldown all the same, as in transformers.
        fresh = replace(fresh, validations=state.validations, step=state.step, cooldown=self.rule.cooldown)
        return fresh, "raised" if fresh.lrs != lrs else kind


@dataclass(frozen=True, slots=True)
class Timed:
    """A learning rate that is a closed form of the optimizer step; the metric is recorded and decides nothing.

    Parameters
    ----------
    curve
        ``curve(step, peak, floor)``: the learning rate of optimizer step `step` (0 for the first), counted from the
        end of the warmup where `after_warmup` is set.
    after_warmup
        Whether the clock stands still during the warmup. ``step`` and ``exponential`` count epochs of the run and go
        on; the others span what is left of it.
    cycle_warmup
        The curve has a warmup of its own (``cosine_restarts`` warms up in each cycle).
    """

    rule: PlateauRule
    curve: Callable[[int, float, float], float]
    after_warmup: bool = True
    cycle_warmup: bool = False
    timed = True

    def start(self, lrs: LRs) -> PlateauState:
        """Return the state before training; its learning rates are the peaks."""
        plateau.per_group(self.rule, len(lrs))
        return PlateauState(lrs=lrs, best=self.rule.worst)

    def advance(self, state: PlateauState, metric: float) -> tuple[PlateauState, Decision]:
        """Record a validation; `lr_before` is what the last optimizer step used, `lr_after` what the next one will."""
        rule, count = self.rule, state.validations + 1
        if not math.isfinite(metric) and rule.nonfinite == "raise":
            raise plateau.NonFiniteMetricError(f"validation {count}: the monitored metric is {metric!r}")
        best = metric if plateau.is_better(replace(rule, threshold=0.0), metric, state.best) else state.best
        after = replace(state, validations=count, best=best)
        return after, Decision(
            kind="warmup" if state.step < rule.warmup_steps else "scheduled",
            validation=count,
            value=metric,
            lr_before=self.applied(replace(state, step=max(0, state.step - 1))),
            lr_after=self.applied(after),
            best=best,
            num_bad=0,
            cooldown=0,
        )

    def applied(self, state: PlateauState) -> LRs:
        """Return the closed form at the state's step, times the warmup."""
        warmup = 0 if self.cycle_warmup else self.rule.warmup_steps
        step = max(0, state.step - warmup) if self.after_warmup else state.step
        scale = plateau.warmup_multiplier(state.step, warmup)
        _, floors = plateau.per_group(self.rule, len(state.lrs))
        return tuple(
            round_lr(scale * self.curve(step, peak, low), self.rule.lr_dtype)
            for peak, low in zip(state.lrs, floors, strict=True)
        )

    def scale(self, state: PlateauState) -> float:
        """Return the factor between peak and applied learning rate, taken without the floor."""
        probe = replace(self, rule=replace(self.rule, min_lr=0.0, lr_dtype="float64"))
        return probe.applied(replace(state, lrs=(1.0,)))[0]

    def load(self, state: Mapping[str, Any]) -> PlateauState:
        """Read a state back."""
        return _load(PlateauState, state)


@dataclass(frozen=True, slots=True)
class Length:
    """How long the run is, in optimizer steps."""

    total_steps: int
    steps_per_epoch: int


def build(name: str, rule: PlateauRule, args: Mapping[str, Any], length: Length) -> Schedule:
    """Make a schedule by its name.

    Parameters
    ----------
    args
        ``schedule.args``: the settings of this one schedule, see `SCHEDULES`.
    length
        The closed forms need it; ``plateau`` and ``greedy`` do not look at it.

    Raises
    ------
    InputError
        For a name or a setting that does not exist, or a setting out of range.
    """
    if name not in SCHEDULES:
        raise InputError("schedule.name", "there is no such schedule", closest(name, SCHEDULES), value=name)
    for key in args:
        if key not in SCHEDULES[name].args:
            fix = closest(key, SCHEDULES[name].args) if SCHEDULES[name].args else f"the {name!r} schedule takes none"
            raise InputError(f"schedule.args.{key}", "unknown setting", fix, value=args[key])
    return SCHEDULES[name].build(rule, length, {**SCHEDULES[name].args, **args})


def _plateau(rule: PlateauRule, _length: Length, _args: dict[str, Any]) -> Schedule:
    return Plateau(rule)


def _greedy(rule: PlateauRule, _length: Length, args: dict[str, Any]) -> Schedule:
    for factor in rule.factor if isinstance(rule.factor, tuple) else (rule.factor,):
        if factor == 0:
            raise InputError("schedule.factor", "greedy divides by it", "choose one above 0, such as 0.95", value=0)
    return Greedy(
        rule,
        max_lr=_number(args, "max_lr", low=0),
        raise_cooldown=_count(args, "raise_cooldown"),
        reset_after=_count(args, "reset_after"),
    )


def _constant(rule: PlateauRule, _length: Length, _args: dict[str, Any]) -> Schedule:
    return Timed(rule, lambda _step, peak, _low: peak)


def _step(rule: PlateauRule, length: Length, args: dict[str, Any]) -> Schedule:
    epochs, gamma = _count(args, "step_size", low=1), _number(args, "gamma", low=0, high=1)

    def curve(step: int, peak: float, low: float) -> float:
        return max(low, peak * gamma ** (step // length.steps_per_epoch // epochs))

    return Timed(rule, curve, after_warmup=False)


def _exponential(rule: PlateauRule, length: Length, args: dict[str, Any]) -> Schedule:
    gamma = _number(args, "gamma", low=0, high=1)

    def curve(step: int, peak: float, low: float) -> float:
        return max(low, peak * gamma ** (step // length.steps_per_epoch))

    return Timed(rule, curve, after_warmup=False)


def _cosine(rule: PlateauRule, length: Length, _args: dict[str, Any]) -> Schedule:
    span = max(1, length.total_steps - rule.warmup_steps)

    def curve(step: int, peak: float, low: float) -> float:
        return _half_cosine(peak, low, min(1.0, step / span))

    return Timed(rule, curve)


def _cosine_restarts(rule: PlateauRule, length: Length, args: dict[str, Any]) -> Schedule:
    """Cosine annealing with warm restarts (Loshchilov and Hutter, arXiv 1608.03983), a linear warmup in each cycle."""
    first = _count(args, "t_0", low=1) * length.steps_per_epoch
    mult, gamma = _count(args, "t_mult", low=1), _number(args, "gamma", low=0, high=1)
    warmup = rule.warmup_steps
    if warmup >= first:
        raise InputError(
            "schedule.warmup_steps",
            f"fills the first cycle of {first} steps (schedule.args.t_0)",
            "use fewer warmup steps or a longer t_0",
            value=warmup,
        )

    def curve(step: int, peak: float, low: float) -> float:
        cycle, position, span = _cycle(step, first, mult)
        top = max(low, peak * gamma**cycle)
        if position < warmup:
            return max(low, top * plateau.warmup_multiplier(position, warmup))
        return _half_cosine(top, low, (position - warmup) / (span - warmup))

    return Timed(rule, curve, cycle_warmup=True)


def _onecycle(rule: PlateauRule, length: Length, args: dict[str, Any]) -> Schedule:
    """1cycle (Smith and Topin, arXiv 1708.07120) with torch's phases; the peak is the optimizer's learning rate."""
    pct_start = _number(args, "pct_start", low=0, high=1)
    div, final_div = _number(args, "div_factor", low=1), _number(args, "final_div_factor", low=1)
    span = max(2, length.total_steps - rule.warmup_steps)
    turn, end = pct_start * span - 1, span - 1

    def curve(step: int, peak: float, low: float) -> float:
        begin, step = peak / div, min(step, end)
        if step <= turn:
            lr = _half_cosine(begin, peak, step / turn) if turn > 0 else peak
        else:
            lr = _half_cosine(peak, begin / final_div, (step - turn) / (end - turn)) if end > turn else peak
        return max(low, lr)

    return Timed(rule, curve)


def _half_cosine(begin: float, end: float, share: float) -> float:
    return end + (begin - end) * (1 + math.cos(math.pi * share)) / 2


def _cycle(step: int, first: int, mult: int) -> tuple[int, int, int]:
    """Return the number of the cycle, the position in it and its length."""
    if mult == 1:
        return step // first, step % first, first
    cycle, begin, span = 0, 0, first
    while step >= begin + span:
        cycle, begin, span = cycle + 1, begin + span, span * mult
    return cycle, step - begin, span


def _number(args: dict[str, Any], key: str, low: float, high: float = math.inf) -> float:
    value = args[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high or value == math.inf:
        span = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise InputError(f"schedule.args.{key}", "is out of range", f"give a number {span}", value=value)
    return float(value)


def _count(args: dict[str, Any], key: str, low: int = 0) -> int:
    value = args[key]
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise InputError(f"schedule.args.{key}", "is out of range", f"give a whole number, at least {low}", value=value)
    return value


@dataclass(frozen=True, slots=True)
class Entry:
    """A schedule in the list: how to make it, the shared settings it heeds, and its own with their defaults."""

    build: Callable[[PlateauRule, Length, dict[str, Any]], Schedule]
    decision_keys: frozenset[str]
    args: Mapping[str, Any]
    factor: float = 0.1


_DECIDES = frozenset(
    "mode factor patience threshold threshold_mode cooldown eps start_after smoothing nonfinite".split()
)
_RECORDS = frozenset({"mode", "nonfinite"})

SCHEDULES: Mapping[str, Entry] = {
    "plateau": Entry(_plateau, _DECIDES, {}),
    "constant": Entry(_constant, _RECORDS, {}),
    "step": Entry(_step, _RECORDS, {"step_size": 10, "gamma": 0.1}),
    "exponential": Entry(_exponential, _RECORDS, {"gamma": 0.95}),
    "cosine": Entry(_cosine, _RECORDS, {}),
    "cosine_restarts": Entry(_cosine_restarts, _RECORDS, {"t_0": 10, "t_mult": 1, "gamma": 1.0}),
    "onecycle": Entry(_onecycle, _RECORDS, {"pct_start": 0.3, "div_factor": 25.0, "final_div_factor": 1e4}),
    "greedy": Entry(_greedy, _DECIDES, {"max_lr": 0.0, "raise_cooldown": 0, "reset_after": 0}, factor=0.95),
}
