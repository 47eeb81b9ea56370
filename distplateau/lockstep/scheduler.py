"""torch's scheduler interface over the pure schedules and the one exchange of a validation."""

from __future__ import annotations

import math
import struct
import sys
import warnings
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, SupportsFloat, cast

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim import lr_scheduler as torch_schedulers

from distplateau.lockstep import consensus, schedules
from distplateau.lockstep.checksum import parameters_digest
from distplateau.lockstep.exact import ExactSum
from distplateau.lockstep.metric import GlobalMean
from distplateau.lockstep.plateau import Decision, Mode, Nonfinite, PlateauRule, PlateauState, ThresholdMode

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta

    import torch.distributed as dist

    from distplateau.lockstep.schedules import Schedule

_LR_DTYPES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.bfloat16: "bfloat16",
}


@dataclass(frozen=True)
class Consultation:
    """What one exchange between the ranks brought, the same on every rank.

    Parameters
    ----------
    value
        The global mean of the metric that decides.
    votes
        How many ranks voted for each thing.
    ranks
        How many ranks took part.
    digest
        Hexadecimal digest of learning rates, scheduler state, step and weights, equal on all ranks.
    """

    value: float
    votes: tuple[int, ...]
    ranks: int
    digest: str


class LockstepScheduler:
    """The torch face of a `Schedule`: it reads and writes the optimizer's learning rates and talks to the other ranks.

    `step` is a collective and makes one decision per validation. It is `consult` (the exchange) and `decide` (pure, on
    this rank) in one; a trainer that reduces several metrics in the same exchange calls the two by itself.

    Parameters
    ----------
    optimizer
        Its learning rates are the peaks. They may be numbers or tensors.
    schedule
        What decides.
    verbose
        Print one line on the group's first rank for every change a decision makes.
    check_weights
        Put a checksum over the bits of the parameters into the exchange.
    process_group
        The ranks that decide together; default all.
    timeout
        How long `step` waits for the other ranks; default nine tenths of the group's own timeout.
    on_reduce
        Called with the `Decision` on every rank after a reduction.
    """

    # Accelerate's wrapper would call step() once per process and drop it after a skipped optimizer step; with this
    # mark `accelerator.prepare` registers the scheduler (for save_state and load_state) and returns it as it is.
    _is_accelerate_prepared = True

    def __init__(
        self,
        optimizer: Optimizer,
        schedule: Schedule,
        *,
        verbose: bool = False,
        check_weights: bool = True,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        on_reduce: Sequence[Callable[[Decision], None]] = (),
    ) -> None:
        optimizer = getattr(optimizer, "optimizer", optimizer)  # an AcceleratedOptimizer holds the real one
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{type(optimizer).__name__} is not an Optimizer")
        self.optimizer = optimizer
        self.schedule = schedule
        self.verbose = verbose
        self.check_weights = check_weights
        self.process_group = process_group
        self.timeout = timeout
        self.on_reduce = list(on_reduce)
        self._found = _read_lrs(optimizer)
        self._state = _start(schedule, optimizer)
        self._updated_by_hook = False
        self._counted_by_hand = 0
        self._just_loaded = False
        self._told: set[str] = set()
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"].clone() if isinstance(group["lr"], Tensor) else group["lr"])
        if isinstance(schedule.rule.factor, tuple) or isinstance(schedule.rule.min_lr, tuple):
            _unshare_lrs(optimizer)
        self._apply()
        _count_steps(optimizer, self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Count the steps of the copy's own optimizer: hooks are not copied with it."""
        self.__dict__.update(state)
        _count_steps(self.optimizer, self)

    def step(self, metrics: GlobalMean | Tensor | SupportsFloat | None = None, epoch: int | None = None) -> Decision:
        """Decide on the learning rate after one validation. Collective: every rank calls it, once per validation.

        Parameters
        ----------
        metrics
            A `GlobalMean`; or this rank's own number, which is averaged over the ranks with equal weights: numbers
            that are the same everywhere come back unchanged, one warning is given if they differ.
        epoch
            Ignored; torch's interface has it.

        Returns
        -------
        Decision
            The same on every rank.

        Raises
        ------
        StaleMetricError
            If no rank has added a sample since the last step.
        DisagreementError
            If weights, learning rates, scheduler state or step differ between the ranks.
        ConsensusTimeoutError
            If a rank does not arrive.
        NonFiniteMetricError
            If the mean is NaN or infinite under ``nonfinite="raise"``.
        """
        del epoch
        if metrics is None:
            raise TypeError("step() needs the validation metric: a GlobalMean, or a number")
        return self.decide(self.consult(metrics).value)

    def consult(
        self,
        metric: GlobalMean | Tensor | SupportsFloat,
        also: Sequence[GlobalMean] = (),
        votes: Sequence[bool] = (),
    ) -> Consultation:
        """Exchange a validation's metrics, the agreement and votes in one all-reduce. Collective.

        Parameters
        ----------
        metric
            What decides, as in `step`.
        also
            Further metrics of the validation; their `compute` is free afterwards. As many on every rank.
        votes
            Up to two yes/no votes of this rank.
        """
        label = f"validation {self._state.validations + 1}"
        self._take_over_edits()
        means = [metric, *also] if isinstance(metric, GlobalMean) else list(also)
        partials = [mean.partial() for mean in means]
        fingerprint = self._fingerprint()
        if not isinstance(metric, GlobalMean):
            number = float(cast("SupportsFloat", metric))
            partials.insert(0, _single(number))
            fingerprint = replace(
                fingerprint, digests={**fingerprint.digests, "metric": consensus.digest(struct.pack("<d", number))}
            )
        agreement = consensus.exchange(
            partials,
            fingerprint,
            votes,
            group=self.process_group or (metric.process_group if isinstance(metric, GlobalMean) else None),
            timeout=self.timeout,
            label=label,
        )
        sums = agreement.partials[: len(partials) - len(means)] + tuple(
            mean.settle(partial)
            for mean, partial in zip(means, agreement.partials[len(partials) - len(means) :], strict=True)
        )
        if agreement.differing:
            self._tell_once(
                "metric",
                "step() was given another number on every rank and used their average: pass a GlobalMean, so that "
                "each sample counts once",
            )
        return Consultation(
            value=sums[0].mean(),
            votes=agreement.votes,
            ranks=agreement.ranks,
            digest=fingerprint.combined(),
        )

    def decide(self, value: float) -> Decision:
        """Let the schedule decide on a value that is the same on all ranks, and set the learning rates. Local."""
        self._take_over_edits()
        self._counted_by_hand = 0
        self._state, decision = self.schedule.advance(self._state, value)
        if self._state.step == 0 and self.schedule.rule.warmup_steps:
            self._tell_once(
                "warmup",
                f"warmup_steps={self.schedule.rule.warmup_steps}, and no optimizer step was seen: call step_update() "
                f"after each one",
            )
        self._apply()
        if self.verbose and decision.kind in {"reduced", "raised"} and consensus.rank(self.process_group) == 0:
            _print_change(decision)
        if decision.kind == "reduced":
            for callback in self.on_reduce:
                callback(decision)
        return decision

    def step_update(self) -> None:
        """Count one optimizer step: moves the warmup and the timed schedules. No communication, no device access.

        Notes
        -----
        Steps of a `torch.optim.Optimizer` are counted through its own hook, so that warmup works in frameworks that
        never call this; calling it as well is right and counts nothing twice, also before the first step, or with
        gradient accumulation more often than the optimizer steps.
        """
        if not self._updated_by_hook:
            self._count_step()
            self._counted_by_hand += 1

    def get_last_lr(self) -> list[float]:
        """Return the learning rate of each group, as torch does."""
        return [float(group["lr"]) for group in self.optimizer.param_groups]

    def at_floor(self) -> bool:
        """Return whether no group's learning rate can go lower, as far as the schedule's own rate goes."""
        rule = self.schedule.rule
        floors = _per_group(rule.min_lr, len(self._state.lrs))
        return all(lr - floor <= rule.eps for lr, floor in zip(self._state.lrs, floors, strict=True))

    @property
    def state(self) -> PlateauState:
        """The pure state that the schedule decides on."""
        return self._state

    def state_dict(self) -> dict[str, Any]:
        """Return all counters and the settings as plain values. torch's own class can read the common part."""
        rule, state = self.schedule.rule, schedules.dump(self._state)
        return {
            **{name: getattr(rule, name) for name in _SETTINGS},
            "min_lrs": list(_per_group(rule.min_lr, len(self._state.lrs))),
            "best": self._state.best,
            "num_bad_epochs": self._state.num_bad,
            "cooldown_counter": self._state.cooldown,
            "last_epoch": self._state.validations,
            "_last_lr": self.get_last_lr(),
            "applied_lrs": list(self._applied),
            "lockstep": state,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any] | Sequence[Any]) -> None:
        """Continue from a state; the settings of this object stay, and a difference is told in a warning.

        Reads what `state_dict` gave, torch's ReduceLROnPlateau (HF Trainer saves it as ``scheduler.pt``), a Lightning
        checkpoint or its ``lr_schedulers``, and timm's ``{"best", "last_epoch"}``. The optimizer's learning rates are
        left alone: load its state as well.

        Raises
        ------
        ValueError
            If the dict is none of these, or was made for another number of parameter groups.
        """
        state_dict = _unwrap_lightning(state_dict)
        groups = len(self.optimizer.param_groups)
        loaded = _read_state(self.schedule, self._state, state_dict)
        if len(loaded.lrs) != groups:
            raise ValueError(f"the state has {len(loaded.lrs)} parameter groups, the optimizer has {groups}")
        self._tell_changed_settings(state_dict)
        if not math.isfinite(loaded.best):  # the start of the other mode, or torch's best after an infinite metric
            loaded = replace(loaded, best=self.schedule.rule.worst)
        self._state, self._counted_by_hand = loaded, 0
        # What the optimizer was given when it was saved: with other settings now, that is no edit by hand.
        applied = state_dict.get("applied_lrs", state_dict.get("_last_lr"))
        self._just_loaded = applied is not None and len(applied) == groups
        if applied is not None and self._just_loaded:
            saved = tuple(float(lr) for lr in applied)
            if saved == self._found and _read_lrs(self.optimizer) == self._applied:
                # The optimizer was restored before this object was made, which then wrote the start of its warmup.
                self._write(saved)
            self._applied = saved

    @property
    def last_epoch(self) -> int:
        """How many validations there were."""
        return self._state.validations

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        self._state = replace(self._state, validations=value)

    @property
    def _last_lr(self) -> list[float]:
        return self.get_last_lr()

    def _begin_step(self) -> None:
        """Make sure that the optimizer's step is made with the right learning rates. Costs nothing but after a load."""
        if self._counted_by_hand and not self._updated_by_hook:
            self._state = replace(self._state, step=self._state.step - self._counted_by_hand)
            self._apply()
        self._updated_by_hook, self._counted_by_hand = True, 0
        if self._just_loaded:
            self._take_over_edits()
            self._apply()

    def _count_step(self) -> None:
        moves = self._just_loaded or self.schedule.timed or self._state.step < self.schedule.rule.warmup_steps
        if moves:
            self._take_over_edits(read_device=self._just_loaded)
        self._state = replace(self._state, step=self._state.step + 1)
        if moves:
            self._apply()

    def _apply(self) -> None:
        self._applied = self.schedule.applied(self._state)
        self._write(self._applied)

    def _write(self, lrs: Sequence[float]) -> None:
        """Set the learning rates; a tensor keeps its identity and its device."""
        for group, lr in zip(self.optimizer.param_groups, lrs, strict=False):
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def _take_over_edits(self, *, read_device: bool = True) -> None:
        """Respect learning rates that somebody changed by hand, and parameter groups that were added.

        Tensors on a device are compared at validations only, when the host waits for the device anyway.
        """
        lrs, applied = list(self._state.lrs), list(self._applied)
        for place, group in enumerate(self.optimizer.param_groups):
            held = group["lr"]
            if isinstance(held, Tensor) and held.device.type != "cpu" and not read_device:
                continue
            if place >= len(lrs):
                lrs.append(float(held))
                applied.append(float(held))
            elif float(held) != applied[place]:
                self._tell_unrestored(float(held), applied[place])
                lrs[place] = float(held) / (self.schedule.scale(self._state) or 1.0)
                applied[place] = float(held)
        self._just_loaded = False
        if tuple(lrs) != self._state.lrs:
            self._state = replace(self._state, lrs=tuple(lrs))
            self._applied = tuple(applied)

    def _tell_unrestored(self, held: float, saved: float) -> None:
        if self._just_loaded:
            self._tell_once(
                "unrestored",
                f"the optimizer holds the learning rate {held:.6g}, the loaded scheduler state {saved:.6g}: going on "
                f"with the optimizer's; load the optimizer's state as well to continue where it was",
            )

    def _fingerprint(self) -> consensus.Fingerprint:
        rule, state = self.schedule.rule, self._state
        lrs, held = self.get_last_lr(), schedules.dump(replace(state, step=0, lrs=()))
        weights = b""
        if self.check_weights:
            weights = parameters_digest(p for group in self.optimizer.param_groups for p in group["params"])
        contents = {
            "learning rates": struct.pack(f"<{len(lrs)}d", *lrs) + struct.pack(f"<{len(state.lrs)}d", *state.lrs),
            "scheduler state": repr((held, rule)).encode(),
            "step": state.step.to_bytes(8, "little"),
            "weights": weights,
        }
        details = {
            "learning rates": ", ".join(f"{lr:.6g}" for lr in lrs),
            "scheduler state": f"best {state.best:.6g}, bad {state.num_bad}, validations {state.validations}, "
            f"settings {consensus.digest(repr(rule).encode()).hex()[:6]}",
            "step": str(state.step),
            "weights": f"checksum {weights.hex()[:12]}",
        }
        return consensus.Fingerprint({item: consensus.digest(c) for item, c in contents.items()}, details)

    def _tell_changed_settings(self, state_dict: Mapping[str, Any]) -> None:
        rule = self.schedule.rule
        settings = {name: getattr(rule, name) for name in _SETTINGS}
        settings["min_lrs"] = _per_group(rule.min_lr, len(self.optimizer.param_groups))
        changed = [
            f"{name} {state_dict[name]!r} -> {setting!r}"
            for name, setting in settings.items()
            if name in state_dict and _plain(state_dict[name]) != _plain(setting)
        ]
        if changed:
            warnings.warn(
                f"continuing with the settings of this scheduler, not the saved ones: {', '.join(changed)}",
                stacklevel=3,
            )

    def _tell_once(self, topic: str, message: str) -> None:
        if topic not in self._told:
            self._told.add(topic)
            if consensus.rank(self.process_group) == 0:
                warnings.warn(message, stacklevel=4)


def _setting(name: str) -> property:
    """Let a setting of the rule be read and set as an attribute, as torch's class has it."""

    def read(self: LockstepScheduler) -> Any:
        return getattr(self.schedule.rule, name)

    def write(self: LockstepScheduler, value: Any) -> None:
        schedule: Any = self.schedule
        self.schedule = replace(schedule, rule=replace(schedule.rule, **{name: _plain(value)}))

    return property(read, write, doc=f"`PlateauRule.{name}`; may be changed while training goes on.")


class ReduceLROnPlateau(LockstepScheduler, torch_schedulers.ReduceLROnPlateau):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """Reduce the learning rate when the global validation metric stops improving, the same way on every rank.

    In place of `torch.optim.lr_scheduler.ReduceLROnPlateau`, whose names, order and defaults it has and whose
    decisions it takes bit for bit. It is a subclass, so that Lightning and HF Trainer treat it as one, and it makes
    one decision per validation also when it went through ``accelerator.prepare``.

    Parameters
    ----------
    optimizer, mode, factor, patience, threshold, threshold_mode, cooldown, min_lr, eps
        As in torch; `factor` may have one entry per parameter group, as `min_lr` may. In ``rel`` mode the margin is
        taken on ``|best|``, so that negative metrics work.
    verbose
        Print one line per reduction on the group's first rank.
    warmup_steps
        Optimizer steps over which the learning rate rises linearly from ``lr / warmup_steps``; the plateau logic
        waits while they run.
    start_after
        Validations before the plateau logic begins.
    smoothing
        Weight of the past in a moving average of the metric, 0 = off.
    nonfinite
        A NaN or infinite metric counts as ``"bad"`` and never becomes the best, is passed over (``"ignore"``), or
        stops the run (``"raise"``).
    check_weights
        Compare a checksum over the bits of the parameters between the ranks at each validation.
    process_group, timeout, on_reduce
        See `LockstepScheduler`.

    Examples
    --------
    >>> scheduler = ReduceLROnPlateau(optimizer, patience=2)
    >>> metric = GlobalMean()
    >>> for inputs, targets in validation_loader:
    ...     metric.update(cross_entropy(model(inputs), targets, reduction="none"))
    >>> decision = scheduler.step(metric)
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mode: Mode = "min",
        factor: float | Sequence[float] = 0.1,
        patience: int = 10,
        threshold: float = 1e-4,
        threshold_mode: ThresholdMode = "rel",
        cooldown: int = 0,
        min_lr: float | Sequence[float] = 0.0,
        eps: float = 1e-8,
        *,
        verbose: bool = False,
        warmup_steps: int = 0,
        start_after: int = 0,
        smoothing: float = 0.0,
        nonfinite: Nonfinite = "bad",
        check_weights: bool = True,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta | None = None,
        on_reduce: Sequence[Callable[[Decision], None]] = (),
    ) -> None:
        rule = PlateauRule(
            mode=mode,
            factor=_scalar_or_tuple(factor),
            patience=patience,
            threshold=threshold,
            threshold_mode=threshold_mode,
            cooldown=cooldown,
            min_lr=_scalar_or_tuple(min_lr),
            eps=eps,
            warmup_steps=warmup_steps,
            start_after=start_after,
            smoothing=smoothing,
            nonfinite=nonfinite,
            lr_dtype=lr_dtype(optimizer),
        )
        super().__init__(
            optimizer,
            schedules.Plateau(rule),
            verbose=verbose,
            check_weights=check_weights,
            process_group=process_group,
            timeout=timeout,
            on_reduce=on_reduce,
        )

    # torch's attributes, as people read and set them.

    mode = _setting("mode")
    factor = _setting("factor")
    patience = _setting("patience")
    threshold = _setting("threshold")
    threshold_mode = _setting("threshold_mode")
    cooldown = _setting("cooldown")
    eps = _setting("eps")

    @property
    def best(self) -> float:
        """Best metric so far, as the rule compares it."""
        return self._state.best

    @best.setter
    def best(self, value: float) -> None:
        self._state = replace(self._state, best=float(value))

    @property
    def num_bad_epochs(self) -> int:
        """Validations in a row without a better metric."""
        return self._state.num_bad

    @num_bad_epochs.setter
    def num_bad_epochs(self, value: int) -> None:
        self._state = replace(self._state, num_bad=value)

    @property
    def cooldown_counter(self) -> int:
        """Validations left of the cooldown."""
        return self._state.cooldown

    @cooldown_counter.setter
    def cooldown_counter(self, value: int) -> None:
        self._state = replace(self._state, cooldown=value)

    @property
    def in_cooldown(self) -> bool:
        """Whether the rule waits after a reduction."""
        return self._state.cooldown > 0

    @property
    def min_lrs(self) -> list[float]:
        """Floor of each parameter group."""
        return list(_per_group(self.schedule.rule.min_lr, len(self._state.lrs)))

    @min_lrs.setter
    def min_lrs(self, value: Sequence[float]) -> None:
        schedule: Any = self.schedule
        self.schedule = replace(schedule, rule=replace(schedule.rule, min_lr=tuple(value)))


class ScheduledLR(LockstepScheduler, torch_schedulers.LRScheduler):  # pyright: ignore[reportIncompatibleMethodOverride, reportIncompatibleVariableOverride]
    """Any schedule by name (`distplateau.lockstep.schedules.build`) behind the same interface as the plateau."""


def make_scheduler(
    optimizer: Optimizer,
    name: str,
    rule: PlateauRule,
    args: Mapping[str, Any],
    length: schedules.Length,
    **options: Any,
) -> LockstepScheduler:
    """Make the scheduler of a schedule's name; `options` go to `LockstepScheduler`.

    Raises
    ------
    InputError
        For a name or a setting that does not exist.
    """
    schedule = schedules.build(name, replace(rule, lr_dtype=lr_dtype(optimizer)), args, length)
    if isinstance(schedule, schedules.Plateau):
        scheduler = ReduceLROnPlateau.__new__(ReduceLROnPlateau)
        LockstepScheduler.__init__(scheduler, optimizer, schedule, **options)
        return scheduler
    return ScheduledLR(optimizer, schedule, **options)


def lr_dtype(optimizer: Optimizer) -> str:
    """Return what the optimizer stores its learning rates in.

    Raises
    ------
    ValueError
        If the parameter groups differ in that.
    """
    groups = getattr(optimizer, "param_groups", [])
    kinds = {_LR_DTYPES[g["lr"].dtype] if isinstance(g["lr"], Tensor) else "float64" for g in groups}
    if len(kinds) > 1:
        raise ValueError(f"the parameter groups hold learning rates of different kinds ({', '.join(sorted(kinds))})")
    return kinds.pop() if kinds else "float64"


_SETTINGS = (
    "mode",
    "factor",
    "patience",
    "threshold",
    "threshold_mode",
    "cooldown",
    "eps",
    "warmup_steps",
    "start_after",
    "smoothing",
    "nonfinite",
)


def _count_steps(optimizer: Optimizer, scheduler: LockstepScheduler) -> None:
    """Count optimizer steps through the optimizer's own hook; the weak reference lets the scheduler go."""
    reference = weakref.ref(scheduler)

    def before_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        counted = reference()
        if counted is not None:
            counted._begin_step()

    def after_step(_optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        counted = reference()
        if counted is not None:
            counted._count_step()

    optimizer.register_step_pre_hook(before_step)
    optimizer.register_step_post_hook(after_step)


def _unshare_lrs(optimizer: Optimizer) -> None:
    """Give each group a tensor of its own where torch put one into all of them: they are to differ."""
    seen: set[int] = set()
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor) and id(group["lr"]) in seen:
            group["lr"] = group["lr"].clone()
        seen.add(id(group["lr"]))


def _start(schedule: Schedule, optimizer: Optimizer) -> PlateauState:
    """Start from the optimizer's learning rates; whether they can drop is asked of those that training began with."""
    lrs = _read_lrs(optimizer)
    try:
        return schedule.start(lrs)
    except ValueError:
        first = tuple(float(group.get("initial_lr", group["lr"])) for group in optimizer.param_groups)
        if first == lrs:
            raise
        return replace(schedule.start(first), lrs=lrs)


def _read_lrs(optimizer: Optimizer) -> tuple[float, ...]:
    return tuple(float(group["lr"]) for group in optimizer.param_groups)


def _unwrap_lightning(saved: Mapping[str, Any] | Sequence[Any]) -> Mapping[str, Any]:
    """Take the scheduler's state out of a Lightning checkpoint, which has a list of one per optimizer."""
    states = saved.get("lr_schedulers", saved) if isinstance(saved, Mapping) else saved
    if isinstance(states, Mapping):
        return states
    if len(states) != 1:
        raise ValueError(f"the checkpoint has the states of {len(states)} schedulers: give the one that is meant")
    return states[0]


def _read_state(schedule: Schedule, current: PlateauState, saved: Mapping[str, Any]) -> PlateauState:
    """Translate a state dict of ours, torch's or timm's."""
    if "lockstep" in saved:
        return schedule.load(saved["lockstep"])
    if "best" not in saved:
        raise ValueError(
            f"not a state of a plateau scheduler: it has no 'best' (keys: {', '.join(map(str, sorted(saved)[:8]))})"
        )
    best, validations, rule = saved["best"], int(saved.get("last_epoch", 0)), schedule.rule
    # They do not count optimizer steps: who validated before is beyond the warmup.
    begun = validations > 0 and not schedule.timed
    return replace(
        current,
        best=rule.worst if best is None else float(best),
        num_bad=int(saved.get("num_bad_epochs", 0)),
        cooldown=int(saved.get("cooldown_counter", 0)),
        validations=validations,
        step=max(current.step, rule.warmup_steps) if begun else current.step,
        lrs=tuple(float(lr) for lr in saved.get("_last_lr", current.lrs)),
    )


def _single(number: float) -> Any:
    total = ExactSum()
    total.add(number)
    return total.partial()


def _per_group(value: float | tuple[float, ...], groups: int) -> tuple[float, ...]:
    return value if isinstance(value, tuple) else (value,) * groups


def _scalar_or_tuple(value: float | Sequence[float]) -> float | tuple[float, ...]:
    return tuple(map(float, value)) if isinstance(value, Sequence) else float(value)


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def _print_change(decision: Decision) -> None:
    changes = ", ".join(
        f"{old:.4g} -> {new:.4g}" for old, new in zip(decision.lr_before, decision.lr_after, strict=True) if old != new
    )
    best = "none yet" if math.isinf(decision.best) else f"{decision.best:.6g}"
    sys.stdout.write(
        f"validation {decision.validation}: learning rate {decision.kind} {changes} "
        f"(metric {decision.value:.6g}, best {best})\n"
    )
    sys.stdout.flush()
