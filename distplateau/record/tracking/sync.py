"""Upload runs to wandb from their ledgers, as often as one likes.

The server is asked which validations it holds, the others are sent, and the server is asked again: what a run mirrored
online before an outage, what an earlier upload sent before it was killed and what a requeue repeats is never doubled.
Only validations that no requeue can undo are sent, so that a run may still be training.
"""

from __future__ import annotations

import math
import tempfile
import time
import tomllib
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distplateau.errors import InputError
from distplateau.record.ledger import History, read_ledger
from distplateau.record.story import run_name
from distplateau.record.tracking.backend import Backend, Holding, Unavailable, app_url, connect
from distplateau.record.tracking.mirror import UPLOAD_LOCK, Job, lock_file, send_alerts
from distplateau.record.tracking.rows import durable_validation, rows, summary, up_to
from distplateau.record.tracking.tracker import MIRROR_LOG, TrackerProcess
from distplateau.record.words import plural, which

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import TextIO

# Seconds: for an upload as such, for each of its rows, and until what was sent can be read back.
_UPLOAD_LIMIT, _ROW_LIMIT, _ARRIVAL_LIMIT = 120.0, 0.02, 10.0


@dataclass
class Outcome:
    """What became of one run.

    Parameters
    ----------
    uploaded, there
        Rows that this upload brought, and that the server held before it.
    waiting
        Validations that wait for a checkpoint: a requeue may still repeat them.
    problem
        Why not everything is there; empty if it is.
    """

    name: str
    uploaded: int = 0
    there: int = 0
    waiting: int = 0
    alerts: int = 0
    url: str = ""
    problem: str = ""
    remarks: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Return whether the server confirmed everything."""
        return not self.problem

    def __str__(self) -> str:
        told = [f"{plural(self.uploaded, 'row')} uploaded, {self.there:,} already there"]
        if self.alerts:
            told.append(f"{plural(self.alerts, 'alert')} sent")
        if self.waiting:
            told.append(f"{plural(self.waiting, 'validation')} not yet covered by a checkpoint")
        if self.problem:
            told.append(f"not complete: {self.problem}")
        return f"{self.name}: {', '.join([*told, *self.remarks])}{f' -> {self.url}' if self.url else ''}"


def sync(run_dirs: Sequence[str | Path], say: Callable[[Outcome], None] = lambda _outcome: None) -> list[Outcome]:
    """Bring runs to wandb, one after the other; `say` is called after each.

    Raises
    ------
    InputError
        For a folder that is no run, and without an API key; before anything is sent.
    """
    histories = [read_ledger(run_dir) for run_dir in run_dirs]
    jobs = [describe(history) for history in histories]
    backend = connect()
    if backend is None:
        raise InputError("WANDB_API_KEY", "there is no API key", "run `wandb login`, or set WANDB_API_KEY")
    outcomes = []
    for history, job in zip(histories, jobs, strict=True):
        outcome = Outcome(run_name(history))
        try:
            backend.probe(timeout=5)
            _sync_run(backend, history, job, outcome)
        except Unavailable as error:
            outcome.problem = f"{error}; run the same command again later"
        say(outcome)
        outcomes.append(outcome)
    return outcomes


def _sync_run(backend: Backend, whole: History, job: Job, outcome: Outcome) -> None:
    covered = durable_validation(whole)
    history = up_to(whole, covered)
    wanted = rows(history)
    outcome.waiting = len(whole.validations) - len(wanted)
    if not wanted:
        return
    folder = whole.run_dir / "wandb"
    lock = lock_file(folder / UPLOAD_LOCK, patience=3)
    with lock or nullcontext():
        before = backend.holding(job.project, job.entity, job.run_id)
        holding = before
        if lock is not None and _lacking(history, before):
            failure = _upload(replace(job, finished=history.finished is not None), covered, len(wanted), lock)
            holding = _await_arrival(backend, history, job)
        else:
            failure = "" if lock else "another process is uploading this run (the run itself, or another sync)"
        outcome.there = len(wanted.keys() & set(before.validations))
        outcome.uploaded = len(wanted.keys() & set(holding.validations)) - outcome.there
        lacking = _lacking(history, holding)
        outcome.problem = f"{lacking}{f' ({failure})' if failure else ''}" if lacking else ""
        outcome.remarks = _remarks(holding, wanted, str(history.validations[-1]["monitor"]))
        outcome.url = f"{app_url(backend.base_url)}/{holding.entity}/{job.project}/runs/{job.run_id}"
        if lock is not None and not lacking:
            outcome.alerts = send_alerts(backend, folder, (job.project, holding.entity, job.run_id), history, covered)
            _mark_segments(folder, job.run_id)


def describe(history: History) -> Job:
    """Describe the upload from what the run folder says.

    Raises
    ------
    InputError
        If the folder has no configuration that can be read, or its ledger names no run id.
    """
    path = history.run_dir / "config.toml"
    try:
        config = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(str(path), f"cannot be read ({error})", "give a whole run folder") from None
    run_id = history.start.get("run_id")
    if not run_id:
        raise InputError(str(history.run_dir), "its ledger names no run_id", "train the run again with this version")
    section: dict[str, Any] = config.get("tracking", {})
    known = {key: section[key] for key in ("project", "entity", "group", "tags") if key in section}
    return Job(
        run_dir=str(history.run_dir.resolve()),
        run_id=str(run_id),
        mode="upload",
        name=run_name(history),
        config=config,
        **known,
    )


def _lacking(history: History, holding: Holding) -> str:
    """Say what the server does not hold; empty if it holds everything."""
    missing = [e["validation"] for e in history.validations if e["validation"] not in set(holding.validations)]
    if missing:
        return f"the server lacks {which(missing)}"
    told = [key for key, value in summary(history).items() if not _same(holding.summary.get(key), value)]
    return f"the server's summary lacks {', '.join(told)}" if told else ""


def _upload(job: Job, covered: int, count: int, lock: TextIO) -> str:
    """Send what is missing with the real client, in a process that is ended if it hangs; return what it said."""
    said: list[str] = []
    with tempfile.TemporaryDirectory(prefix="distplateau-sync-", ignore_cleanup_errors=True) as folder:
        log = Path(job.run_dir) / "wandb" / "sync.log"
        process = TrackerProcess(replace(job, work_dir=folder, rows=count), said.append, log=log, lock=lock)
        process.say({"covered": covered, "end": 0})
        process.join(time.monotonic() + _UPLOAD_LIMIT + _ROW_LIMIT * count)
    return "; ".join(said)


def _await_arrival(backend: Backend, history: History, job: Job) -> Holding:
    """Ask until everything is there, or for a limited time: a large server takes a moment."""
    deadline, pause = time.monotonic() + _ARRIVAL_LIMIT, 0.25
    while True:
        last_chance = time.monotonic() + pause > deadline
        with nullcontext() if last_chance else suppress(Unavailable):
            holding = backend.holding(job.project, job.entity, job.run_id)
            if last_chance or not _lacking(history, holding):
                return holding
        time.sleep(pause)
        pause *= 2


def _remarks(holding: Holding, wanted: dict[int, dict[str, Any]], monitor: str) -> list[str]:
    """Say what is there but should not be. The server takes no row back."""
    doubled = sorted(number for number, count in Counter(holding.validations).items() if count > 1)
    other = {
        int(held["validation"])
        for held in holding.rows
        if not _same(held.get(monitor), wanted.get(int(held["validation"]), held).get(monitor))
    }
    found = []
    if doubled:
        found.append(f"{which(doubled)} more than once there (`wandb sync` after `distplateau sync` does that)")
    if other:
        found.append(f"{which(sorted(other))} there with values of work that was done again after a requeue")
    return found


def _same(held: Any, value: Any) -> bool:
    if isinstance(held, str) and isinstance(value, float):
        with suppress(ValueError):
            held = float(held)  # "NaN", "Infinity"
    if isinstance(held, int | float) and isinstance(value, int | float):
        return (math.isnan(held) and math.isnan(value)) or math.isclose(held, value, rel_tol=1e-9)
    return held == value


def _mark_segments(folder: Path, run_id: str) -> None:
    """Tell `wandb sync` that it has nothing to do, once no mirror writes them any more: it would double the rows."""
    log = lock_file(folder / MIRROR_LOG, patience=1)
    if log is None:
        return
    with log:
        for segment in folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb"):
            segment.with_name(f"{segment.name}.synced").touch()
