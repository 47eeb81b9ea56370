"""Does every learning rate of a run follow from what was measured? Each line of the ledger, derived again.

The decisions come from the pure functions that the scheduler ran (`distplateau.lockstep.schedules`), fed with the
recorded values. Validations that a requeue superseded are derived as well: they were decided, too. What a decision does
not show (a value that would have led to the same one, the time of day) is covered by the seal of the line.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distplateau.config import load_config
from distplateau.errors import InputError
from distplateau.lockstep import schedules
from distplateau.lockstep.plateau import NonFiniteMetricError, PlateauRule, PlateauState
from distplateau.record.ledger import FILE_NAME, Event, Line, read_ledger, read_lines, seal
from distplateau.record.words import listing, plural

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from distplateau.config import Config
    from distplateau.lockstep.schedules import Schedule

_DIGEST = re.compile(r"[0-9a-f]{8,128}")
# What a decision says of itself in the ledger: (name of the field, name in `Decision`).
_DECIDED = {
    "decision": "kind",
    "lr_before": "lr_before",
    "lr_after": "lr_after",
    "best": "best",
    "num_bad": "num_bad",
    "cooldown": "cooldown",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """Something in a ledger that does not follow.

    Parameters
    ----------
    line
        Number of the line in the file, 1 for the first; None for what concerns the run folder.
    validation
        Number of the validation that the line records.
    """

    line: int | None
    validation: int | None
    problem: str

    def __str__(self) -> str:
        if self.line is None:
            return self.problem
        where = f"line {self.line}" + (f", validation {self.validation}" if self.validation is not None else "")
        return f"{where}: {self.problem}"


@dataclass(frozen=True)
class Verdict:
    """What `verify` found.

    Parameters
    ----------
    validations
        Those that count; `superseded` ones were measured again after a requeue.
    sealed
        Whether the lines carry seals; those of older versions do not.
    """

    path: Path
    findings: tuple[Finding, ...]
    validations: int
    superseded: int
    reductions: int
    resumed: int
    sealed: bool
    finished: bool

    @property
    def summary(self) -> str:
        """Say in one line how it went."""
        if self.findings:
            return f"{self.path}: {plural(len(self.findings), 'line')} that {_do(len(self.findings))} not follow"
        remarks = []
        if self.resumed:
            again = f", {plural(self.superseded, 'validation')} made again" if self.superseded else ""
            remarks.append(f"resumed {plural(self.resumed, 'time')}{again}")
        if not self.finished:
            remarks.append("not finished")
        if not self.sealed:
            remarks.append("lines without seals: a changed value that decided nothing would not be seen")
        aside = f" ({'; '.join(remarks)})" if remarks else ""
        return (
            f"verified: {plural(self.validations, 'validation')}, {plural(self.reductions, 'reduction')}, "
            f"every learning rate follows{aside}"
        )


def verify(run_dir: str | Path) -> Verdict:
    """Derive every decision and learning rate of a run again from the values in its ledger.

    Raises
    ------
    InputError
        If the folder or its ledger does not exist or holds no event.
    """
    run_dir = Path(run_dir)
    history = read_ledger(run_dir)
    lines = read_lines(history.run_dir / FILE_NAME)
    audit = _Audit()
    for line in lines:
        if line.event is not None:
            audit.read(line, line.event)
    problems = audit.problems
    for line, problem in [*_unreadable(lines), *_broken_seals(lines)]:
        problems.setdefault(line.number, []).append(problem)
    about_folder = [*_check_config(run_dir, audit.segment), *_check_checkpoints(run_dir, audit.furthest)]
    return Verdict(
        path=run_dir / FILE_NAME,
        findings=(*_findings(lines, problems), *(Finding(None, None, problem) for problem in about_folder)),
        validations=len(audit.path),
        superseded=audit.superseded,
        reductions=audit.path[-1].reductions if audit.path else 0,
        resumed=audit.resumed,
        sealed=any(line.seal for line in lines),
        finished=history.finished is not None,
    )


def _findings(lines: Sequence[Line], problems: dict[int, list[str]]) -> Iterator[Finding]:
    for line in lines:
        if line.number in problems:
            number = (line.event or {}).get("validation")
            yield Finding(line.number, number, "; ".join(problems[line.number]))


# The decisions.


@dataclass(frozen=True)
class _Segment:
    """What the decisions of one process follow from: settings and circumstances since ``start`` or ``resumed``."""

    schedule: Schedule
    name: str
    args: dict[str, Any]
    steps_per_epoch: int
    total_steps: int
    world_size: int
    monitor: str
    validation_samples: int | None

    @classmethod
    def read(cls, event: Event) -> _Segment:
        """Read it from a ``start`` or a ``resumed`` event."""
        described = event["schedule"]
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in described["rule"].items()}
        rule = PlateauRule(**fields)
        length = schedules.Length(described["total_steps"], described["steps_per_epoch"])
        return cls(
            schedule=schedules.build(described["name"], rule, described["args"], length),
            name=described["name"],
            args=described["args"],
            steps_per_epoch=length.steps_per_epoch,
            total_steps=length.total_steps,
            world_size=event["world_size"],
            monitor=event["monitor"],
            validation_samples=event.get("samples", {}).get("validation"),
        )


@dataclass(frozen=True)
class _Node:
    """Where the run stood after a validation.

    Parameters
    ----------
    states
        The derived state; after a line that does not follow also the recorded one, so that one damaged line is one
        finding and not one for each line behind it.
    """

    validation: int
    step: int
    states: tuple[PlateauState, ...]
    best: float = math.nan
    best_validation: int = 0
    best_step: int = 0
    reductions: int = 0
    seconds: float = 0.0


@dataclass
class _Audit:
    """Reads the lines in order and goes along with the schedule.

    Parameters
    ----------
    path
        The validations that count so far.
    furthest
        Largest number of a validation on any line.
    """

    problems: dict[int, list[str]] = field(default_factory=dict)
    segment: _Segment | None = None
    origin: _Node | None = None
    path: list[_Node] = field(default_factory=list)
    furthest: int = 0
    superseded: int = 0
    resumed: int = 0
    ended_by: str | None = None
    count: int | None = None
    digest: str | None = None

    def read(self, line: Line, event: Event) -> None:
        """Check one line and move on."""
        check = {
            "start": self._start,
            "validation": self._validation,
            "interrupted": self._interrupted,
            "resumed": self._resumed,
            "finished": self._finished,
        }.get(event["event"])
        if check is None:
            return
        try:
            found = list(check(event))
        except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
            what = f"has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            found = [f"{event['event']} cannot be followed ({what})"]
        if found:
            self.problems.setdefault(line.number, []).extend(found)

    @property
    def here(self) -> _Node:
        """Return where the run stands."""
        node = self.path[-1] if self.path else self.origin
        if node is None:
            raise ValueError("there is no start before it")
        return node

    def _start(self, event: Event) -> Iterator[str]:
        if self.segment is not None:
            yield "a second start"
            return
        self._begin(event)

    def _begin(self, event: Event) -> None:
        self.segment = _Segment.read(event)
        state = self.segment.schedule.start(tuple(event["lrs"]))
        self.origin = _Node(0, 0, (state,), best=self.segment.schedule.rule.worst)

    def _validation(self, event: Event) -> Iterator[str]:
        number, before, segment = event["validation"], self.here, self.segment
        assert segment is not None
        if self.ended_by:
            yield f"comes after '{self.ended_by}' without 'resumed' between"
        if number <= before.validation:
            # Judged by itself it may be sound: the lines behind it follow from the one before.
            yield f"validation {number} comes after validation {before.validation}"
            return
        if number > before.validation + 1:
            yield f"validation {listing(list(range(before.validation + 1, number)))} missing before it"
        yield from self._check_circumstances(event, segment)
        step = event["step"]
        if not before.step < step <= segment.total_steps:
            yield f"step is {step}, after step {before.step} of {segment.total_steps}"
            step = round(event["epoch"] * segment.steps_per_epoch)
        after, differences = _follow(segment.schedule, before, {**event, "step": step})
        yield from differences
        self.path.append(after)
        self.furthest = max(self.furthest, number)

    def _check_circumstances(self, event: Event, segment: _Segment) -> Iterator[str]:
        yield from _differ("epoch", event["epoch"], event["step"] / segment.steps_per_epoch)
        yield from _differ("monitor", event["monitor"], segment.monitor)
        yield from _differ("ranks", event["ranks"], segment.world_size)
        value, repeated = event["value"], event["metrics"].get(segment.monitor)
        if not _same(value, repeated):
            yield f"value is {value!r}, metrics[{segment.monitor!r}] is {repeated!r}"
        lost = not math.isfinite(event["train_loss"])
        if lost != ("nonfinite_loss" in event):
            yield f"train_loss is {event['train_loss']!r}, {'without' if lost else 'with'} nonfinite_loss"
        if self.count is not None:
            yield from _differ("count", event["count"], self.count)
        self.count = self.count or event["count"]
        digest = event["digest"]
        if not _DIGEST.fullmatch(digest) or len(digest) != len(self.digest or digest):
            yield f"digest is {digest!r}, which is not of the form of the others"
        else:
            self.digest = digest

    def _interrupted(self, event: Event) -> Iterator[str]:
        if self.segment is None:
            raise ValueError("there is no start before it")
        if self.ended_by:
            yield f"comes after '{self.ended_by}' without 'resumed' between"
        if not self.here.step <= event["step"] <= self.segment.total_steps:
            yield f"step is {event['step']}, after step {self.here.step} of {self.segment.total_steps}"
        yield from _differ("epoch", event["epoch"], event["step"] / self.segment.steps_per_epoch)
        self.ended_by = "interrupted"

    def _resumed(self, event: Event) -> Iterator[str]:
        kept, step, old = event["last_validation"], event["step"], self.segment
        self.resumed += 1
        self.ended_by = None
        if old is None:
            raise ValueError("there is no start before it")
        if kept > self.here.validation:
            yield f"goes on after validation {kept}, the last one before it is {self.here.validation}"
        next_step = next((node.step for node in self.path if node.validation == kept + 1), math.inf)
        remaining = [node for node in self.path if node.validation <= kept]
        self.superseded += len(self.path) - len(remaining)
        self.path = remaining
        if step == 0:
            # There was no checkpoint to go on from.
            self.count = None
            self._begin(event)
            return
        if not self.here.step <= step < next_step:
            limit = f" and before step {next_step}" if next_step < math.inf else ""
            yield f"goes on from step {step}, which is not from step {self.here.step}{limit}"
        yield from self._go_on(event, old)

    def _go_on(self, event: Event, old: _Segment) -> Iterator[str]:
        """Take the state over into the settings that were given to the run now, as loading a checkpoint does."""
        new = _Segment.read({**_recorded(old), **event}) if "schedule" in event else old
        self.segment = replace(new, world_size=event["world_size"])
        if self.segment.validation_samples != old.validation_samples:
            self.count = None
        step = event.get("schedule_step", event["step"])
        states, problems = [], []
        for state in (replace(state, step=step) for state in self.here.states):
            held = old.schedule.applied(state)
            problems.append(
                [
                    *(_differ("lrs", event["lrs"], list(state.lrs)) if "lrs" in event else ()),
                    *(_differ("lr", event["lr"], list(held)) if "lr" in event else ()),
                ]
            )
            states.append(self.segment.schedule.load(schedules.dump(state)))
        yield from min(problems, key=len)
        place = self.here
        states = tuple(states)
        if self.path:
            self.path[-1] = replace(place, states=states)
        else:
            self.origin = replace(place, states=states)

    def _finished(self, event: Event) -> Iterator[str]:
        if self.segment is None:
            raise ValueError("there is no start before it")
        if self.ended_by:
            yield f"comes after '{self.ended_by}' without 'resumed' between"
        self.ended_by = "finished"
        node = self.here
        expected = {
            "validations": node.validation,
            "step": node.step,
            "epoch": node.step / self.segment.steps_per_epoch,
            "best": node.best,
            "best_validation": node.best_validation,
            "best_step": node.best_step,
            "reductions": node.reductions,
            "seconds": round(node.seconds, 3),
        }
        for key, value in expected.items():
            yield from _differ(key, event[key], value)


def _follow(schedule: Schedule, before: _Node, event: Event) -> tuple[_Node, list[str]]:
    """Advance from the state that fits best, and say what the line records that does not follow."""
    values = [event["value"]]
    repeated = event["metrics"].get(event["monitor"])
    if isinstance(repeated, float) and not _same(repeated, values[0]):
        values.append(repeated)
    outcomes = []
    step = event.get("schedule_step", event["step"])
    for state in before.states:
        then = replace(state, validations=event["validation"] - 1, step=step)
        outcomes += [_derive(schedule, then, value, event) for value in values]
    after, kind, value, differences = min(outcomes, key=lambda outcome: len(outcome[3]))
    states = (after, _as_recorded(schedule, after, event)) if differences else (after,)
    node = replace(
        before,
        validation=event["validation"],
        step=event["step"],
        states=states,
        reductions=before.reductions + (kind == "reduced"),
        seconds=before.seconds + event["seconds"],
    )
    sign = 1 if schedule.rule.mode == "min" else -1
    if math.isfinite(value) and sign * value < sign * before.best:
        node = replace(node, best=value, best_validation=node.validation, best_step=node.step)
    return node, differences


def _derive(
    schedule: Schedule, state: PlateauState, value: float, event: Event
) -> tuple[PlateauState, str, float, list[str]]:
    try:
        after, decision = schedule.advance(state, value)
    except NonFiniteMetricError:
        advanced = replace(state, validations=state.validations + 1)
        return advanced, "", value, [f"value is {value!r}, which stops a run with nonfinite = 'raise'"]
    differences = [
        difference
        for key, name in _DECIDED.items()
        for difference in _differ(key, event[key], _plain(getattr(decision, name)))
    ]
    return after, decision.kind, value, differences


def _as_recorded(schedule: Schedule, state: PlateauState, event: Event) -> PlateauState:
    """Return the state that the line speaks of, as far as a line shows it."""
    lrs = tuple(event["lr_after"])
    keeps_rates = schedule.timed or schedule.scale(state) != 1.0 or len(lrs) != len(state.lrs)
    return replace(
        state,
        lrs=state.lrs if keeps_rates else lrs,
        best=event["best"],
        num_bad=event["num_bad"],
        cooldown=event["cooldown"],
    )


def _recorded(segment: _Segment) -> Event:
    return {"monitor": segment.monitor, "samples": {"validation": segment.validation_samples}}


def _differ(name: str, recorded: Any, derived: Any) -> Iterator[str]:
    if not _same(recorded, derived):
        yield f"{name} is {_show(recorded)}, {_show(derived)} follows"


def _same(one: Any, other: Any) -> bool:
    """Compare bit for bit, NaN equal to itself; 1 and 1.0 are the same number."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, float) and isinstance(other, float) and math.isnan(one):
        return math.isnan(other)
    return type(one) is not bool and one == other


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _show(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(map(repr, value)) or "empty"
    return repr(value)


def _do(count: int) -> str:
    return "does" if count == 1 else "do"


# The file.


def _unreadable(lines: Sequence[Line]) -> Iterator[tuple[Line, str]]:
    """Find lines that are no events. A process that dies while it writes leaves one; its successor says ``resumed``."""
    for place, line in enumerate(lines):
        if line.event is None and not _is_torn(lines, place):
            yield line, "is no event: it was damaged"


def _is_torn(lines: Sequence[Line], place: int) -> bool:
    following = next((line for line in lines[place + 1 :] if line.event is not None), None)
    if following is None:
        return place == len(lines) - 1 and not lines[place].was_whole
    if following.event is None or following.event["event"] not in {"start", "resumed"}:
        return False
    previous = next((line.seal for line in reversed(lines[:place]) if line.event and line.seal), "")
    return following.seal in {None, seal(previous, following.content)}


def _broken_seals(lines: Sequence[Line]) -> Iterator[tuple[Line, str]]:
    """Follow the chain of seals.

    A line whose own seal was damaged does not break the chain behind it: either of its seals, the one it carries and
    the one it should carry, is taken for the next line.
    """
    known, all_seals = {""}, {line.seal or "" for line in lines} | {""}
    sealed = False
    for line in lines:
        if line.event is None:
            known |= {line.seal} if line.seal else set()
        elif line.seal is None:
            if sealed:
                yield line, "has no seal"
        else:
            due = {seal(previous, line.content) for previous in known}
            if line.seal not in due:
                moved = any(seal(previous, line.content) == line.seal for previous in all_seals)
                yield line, "was moved or repeated: its seal fits elsewhere" if moved else _CHANGED
            known, sealed = {line.seal, *due}, True


_CHANGED = "its seal does not fit: the line was changed, or the one before it is missing"


# The rest of the run folder.


def _check_config(run_dir: Path, segment: _Segment | None) -> Iterator[str]:
    """Compare config.toml, where there is one, with the settings that the ledger names last."""
    path = run_dir / "config.toml"
    if segment is None or not path.exists():
        return
    try:
        config = load_config(path)
    except InputError as error:
        yield f"config.toml: {error}"
        return
    for key, written, recorded in _settings(config, segment):
        if written != recorded:
            yield f"config.toml: schedule.{key} is {written!r}, the ledger says {recorded!r}"


def _settings(config: Config, segment: _Segment) -> Iterator[tuple[str, Any, Any]]:
    section, rule = config.schedule, segment.schedule.rule
    yield "name", section.name, segment.name
    yield "monitor", section.monitor, segment.monitor
    yield "args", section.args, segment.args
    yield "mode", section.resolved_mode, rule.mode
    if section.name != segment.name:
        return
    for key in sorted({*schedules.SCHEDULES[section.name].decision_keys, "warmup_steps", "min_lr"} - {"mode"}):
        written = getattr(section, key)
        if key == "factor" and written is None:
            written = schedules.SCHEDULES[section.name].factor
        yield key, written, _plain(getattr(rule, key))


def _check_checkpoints(run_dir: Path, furthest: int) -> Iterator[str]:
    """Find validations that are missing at the end: a checkpoint is saved after the line of its validation."""
    for path in sorted((run_dir / "checkpoints").glob("step-*/state.json")):
        try:
            covered = int(json.loads(path.read_text(encoding="utf-8"))["validations"])
        except (OSError, ValueError, KeyError, TypeError):
            continue  # the trainer passes over a damaged checkpoint, and says so
        if covered > furthest:
            yield f"{FILE_NAME} ends at validation {furthest}, {path.parent.name} was saved after validation {covered}"
