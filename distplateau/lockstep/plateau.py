"""The decision as a pure function: `advance(rule, state, metric) -> (state, decision)`. Standard library only.

The scheduler, ``verify``, ``replay`` and the simulated thousand-rank tests all run this one function. Over finite
metrics (positive ones in ``rel`` mode) it is bit-identical to `torch.optim.lr_scheduler.ReduceLROnPlateau`.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["min", "max"]
ThresholdMode = Literal["rel", "abs"]
Nonfinite = Literal["bad", "ignore", "raise"]
Kind = Literal["warmup", "waiting", "improved", "bad", "cooldown", "reduced", "raised", "scheduled", "ignored"]


class NonFiniteMetricError(ValueError):
    """The metric is NaN or infinite and the rule says ``nonfinite="raise"``."""


@dataclass(frozen=True, slots=True)
class PlateauRule:
    """The settings of a plateau schedule, with torch's names and defaults.

    Parameters
    ----------
    factor, min_lr
        One value for all parameter groups, or a tuple with one per group.
    threshold_mode
        ``rel``: a better metric beats ``best`` by ``threshold * |best|``; ``abs``: by ``threshold``.
    warmup_steps
        Optimizer steps of linear warmup; the plateau logic waits while they run.
    start_after
        Validations before the plateau logic begins.
    smoothing
        Weight of the past in an exponential moving average of the metric, 0 = off.
    nonfinite
        A NaN or infinite metric counts as ``bad``, is passed over (``ignore``), or stops the run (``raise``).
    lr_dtype
        What the optimizer stores its learning rate in: ``float64`` for Python floats, or a tensor's dtype.
    """

    mode: Mode = "min"
    factor: float | tuple[float, ...] = 0.1
    patience: int = 10
    threshold: float = 1e-4
    threshold_mode: ThresholdMode = "rel"
    cooldown: int = 0
    min_lr: float | tuple[float, ...] = 0.0
    eps: float = 1e-8
    warmup_steps: int = 0
    start_after: int = 0
    smoothing: float = 0.0
    nonfinite: Nonfinite = "bad"
    lr_dtype: str = "float64"

    def __post_init__(self) -> None:
        _check_choice("mode", self.mode, ("min", "max"))
        _check_choice("threshold_mode", self.threshold_mode, ("rel", "abs"))
        _check_choice("nonfinite", self.nonfinite, ("bad", "ignore", "raise"))
        _check_choice("lr_dtype", self.lr_dtype, tuple(_ROUNDING))
        for factor in _each(self.factor):
            if not 0 <= factor < 1:
                raise ValueError(f"factor={factor!r} must be at least 0 and below 1: the LR is multiplied by it")
        for low in _each(self.min_lr):
            if not 0 <= low < math.inf:
                raise ValueError(f"min_lr={low!r} must be a finite number, at least 0")
        for name in ("patience", "cooldown", "warmup_steps", "start_after"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)!r} must not be negative")
        for name in ("threshold", "eps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a finite number, at least 0")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing={self.smoothing!r} must be at least 0 and below 1 (0 = off)")

    @property
    def worst(self) -> float:
        """Return what ``best`` starts from: any finite metric beats it."""
        return math.inf if self.mode == "min" else -math.inf


@dataclass(frozen=True, slots=True)
class PlateauState:
    """Everything that `advance` remembers between two validations.

    Parameters
    ----------
    lrs
        Learning rate of each parameter group without the warmup multiplier.
    validations
        How many there were so far.
    step
        Optimizer steps so far.
    smoothed
        Moving average of the metric, None before the first value or with ``smoothing=0``.
    """

    lrs: tuple[float, ...]
    best: float
    num_bad: int = 0
    cooldown: int = 0
    validations: int = 0
    step: int = 0
    smoothed: float | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """What one validation led to; the same on every rank.

    Parameters
    ----------
    kind
        Why the learning rate is what it is now.
    validation
        1 for the first.
    value
        The metric as measured, before smoothing.
    lr_before, lr_after
        Applied learning rate of each group, warmup included.
    """

    kind: Kind
    validation: int
    value: float
    lr_before: tuple[float, ...]
    lr_after: tuple[float, ...]
    best: float
    num_bad: int
    cooldown: int

    @property
    def reduced(self) -> bool:
        """Return whether this validation lowered the learning rate of a group."""
        return self.kind == "reduced"


def start(rule: PlateauRule, lrs: tuple[float, ...]) -> PlateauState:
    """Return the state before the first validation.

    Raises
    ------
    ValueError
        If ``factor`` or ``min_lr`` has another number of entries than there are groups, or if ``eps`` would
        block the first drop of every group: such a schedule could never do anything.
    """
    factors, floors = per_group(rule, len(lrs))
    drops = [lr - max(lr * f, low) for lr, f, low in zip(lrs, factors, floors, strict=True) if lr > low]
    if drops and max(drops) <= rule.eps:
        raise ValueError(
            f"eps={rule.eps!r} blocks every drop: the largest first one would be {max(drops):.3g}; "
            f"use eps below that, 0 to allow any"
        )
    return PlateauState(lrs=lrs, best=rule.worst)


def advance(rule: PlateauRule, state: PlateauState, metric: float) -> tuple[PlateauState, Decision]:
    """Decide on the learning rate after one validation.

    Parameters
    ----------
    metric
        The global mean: the same bits on every rank.

    Returns
    -------
    tuple
        The new state and the decision. Nothing is changed in place.

    Raises
    ------
    NonFiniteMetricError
        If the metric is NaN or infinite and ``rule.nonfinite == "raise"``.

    Notes
    -----
    The order is torch's: compare, count, cool down, reduce. ``rel`` thresholds use torch's expressions
    ``best * (1 - threshold)`` and ``best * (1 + threshold)``, mirrored for a negative ``best`` so that the margin
    always lies on the better side (torch's own turns it around there: issues 47513 and 38622).
    """
    before = state
    state = replace(state, validations=state.validations + 1)
    if not math.isfinite(metric) and rule.nonfinite == "raise":
        raise NonFiniteMetricError(f"validation {state.validations}: the monitored metric is {metric!r}")
    kind: Kind
    if state.step < rule.warmup_steps:
        kind = "warmup"
    elif before.validations < rule.start_after:
        kind = "waiting"
    elif not math.isfinite(metric) and rule.nonfinite == "ignore":
        kind = "ignored"
    else:
        state, kind = _observe(rule, state, metric)
    return state, decision(rule, before, state, metric, kind)


def decision(rule: PlateauRule, before: PlateauState, after: PlateauState, metric: float, kind: Kind) -> Decision:
    """Describe the way from one state to the next, with the warmup multiplier put on the learning rates."""
    return Decision(
        kind=kind,
        validation=after.validations,
        value=metric,
        lr_before=applied_lrs(rule, before),
        lr_after=applied_lrs(rule, after),
        best=after.best,
        num_bad=after.num_bad,
        cooldown=after.cooldown,
    )


def applied_lrs(rule: PlateauRule, state: PlateauState) -> tuple[float, ...]:
    """Return what the optimizer uses for its next step: the state's learning rates times the warmup."""
    scale = warmup_multiplier(state.step, rule.warmup_steps)
    return state.lrs if scale == 1.0 else tuple(round_lr(lr * scale, rule.lr_dtype) for lr in state.lrs)


def warmup_multiplier(step: int, warmup_steps: int) -> float:
    """Return the factor on the learning rate of optimizer step `step` (0 for the first): linear, then exactly 1."""
    return (step + 1) / warmup_steps if step + 1 < warmup_steps else 1.0


def is_better(rule: PlateauRule, value: float, best: float) -> bool:
    """Return whether `value` beats `best` by more than the threshold; NaN and infinities never do."""
    if not math.isfinite(value):
        return False
    if not math.isfinite(best):
        return value < best if rule.mode == "min" else value > best
    sign = -1.0 if rule.mode == "min" else 1.0
    if rule.threshold_mode == "abs":
        bound = best + sign * rule.threshold
    elif best > 0:
        bound = best * (1.0 + sign * rule.threshold)
    else:
        bound = best * (1.0 - sign * rule.threshold)
    return value < bound if rule.mode == "min" else value > bound


def smooth(rule: PlateauRule, state: PlateauState, metric: float) -> tuple[PlateauState, float]:
    """Put a finite metric into the moving average and return what the rule compares."""
    if rule.smoothing == 0.0 or not math.isfinite(metric):
        return state, metric
    past = state.smoothed
    value = metric if past is None else rule.smoothing * past + (1.0 - rule.smoothing) * metric
    return replace(state, smoothed=value), value


def reduced_lrs(rule: PlateauRule, lrs: tuple[float, ...]) -> tuple[float, ...]:
    """Multiply each learning rate by its factor, not below its floor; changes up to ``eps`` are not made."""
    factors, floors = per_group(rule, len(lrs))
    lowered = [max(lr * f, low) for lr, f, low in zip(lrs, factors, floors, strict=True)]
    return tuple(
        round_lr(new, rule.lr_dtype) if old - new > rule.eps else old for old, new in zip(lrs, lowered, strict=True)
    )


def per_group(rule: PlateauRule, groups: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return ``factor`` and ``min_lr`` with one entry per parameter group.

    Raises
    ------
    ValueError
        If a tuple has another length than there are groups.
    """
    return _spread("factor", rule.factor, groups), _spread("min_lr", rule.min_lr, groups)


def round_lr(lr: float, dtype: str) -> float:
    """Round a learning rate as storing it in a tensor of `dtype` does, by way of float32 for the half types."""
    return _ROUNDING[dtype](lr)


def _observe(rule: PlateauRule, state: PlateauState, metric: float) -> tuple[PlateauState, Kind]:
    state, value = smooth(rule, state, metric)
    kind: Kind = "improved" if is_better(rule, value, state.best) else "bad"
    if kind == "improved":
        state = replace(state, best=value, num_bad=0)
    else:
        state = replace(state, num_bad=state.num_bad + 1)
    if state.cooldown > 0:
        state = replace(state, cooldown=state.cooldown - 1, num_bad=0)
        kind = kind if kind == "improved" else "cooldown"
    if state.num_bad > rule.patience:
        lrs = reduced_lrs(rule, state.lrs)
        kind = "reduced" if lrs != state.lrs else kind
        state = replace(state, lrs=lrs, cooldown=rule.cooldown, num_bad=0)
    return state, kind


def _to_float32(value: float) -> float:
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _to_float16(value: float) -> float:
    try:
        return struct.unpack("<e", struct.pack("<e", _to_float32(value)))[0]
    except OverflowError:
        return math.copysign(math.inf, value)


def _to_bfloat16(value: float) -> float:
    """Round half to even on the upper 16 bits of the float32."""
    bits = struct.unpack("<I", struct.pack("<f", _to_float32(value)))[0]
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return struct.unpack("<f", struct.pack("<I", rounded))[0]


_ROUNDING = {"float64": float, "float32": _to_float32, "float16": _to_float16, "bfloat16": _to_bfloat16}


def _each(value: float | tuple[float, ...]) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,)


def _spread(name: str, value: float | tuple[float, ...], groups: int) -> tuple[float, ...]:
    if not isinstance(value, tuple):
        return (value,) * groups
    if len(value) != groups:
        raise ValueError(f"{name} has {len(value)} entries for {groups} parameter groups: give one number or {groups}")
    return value


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(choices)}")
