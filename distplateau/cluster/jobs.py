"""The runs of a folder and what Slurm says of them."""

from __future__ import annotations

import codecs
import json
import os
import re
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from distplateau.cluster import queue
from distplateau.cluster.queue import JobState
from distplateau.errors import InputError
from distplateau.record.ledger import History, read_ledger
from distplateau.record.words import duration, metric_text, rates_text, short

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

JOBS_FILE = "jobs.jsonl"
LOCAL = "local"
COLUMNS = ("run", "job", "state", "nodes", "epoch", "lr", "best", "requeues", "left")
_JOB_ID = re.compile(r"[1-9]\d*(?:_\d+)?", re.ASCII)
_CONTROLLER = b"submitit.local._local"
_DEPTH = 3
_POLL_SECONDS = 1.0
_ALIKE = 3
_ASK_SECONDS = 60.0
_EXEC_TRIES, _EXEC_SECONDS = 5, 0.01


@dataclass(frozen=True)
class Row:
    """One run, every cell as text; "-" for what is not known."""

    run: str
    job: str = "-"
    state: str = "-"
    nodes: str = "-"
    epoch: str = "-"
    lr: str = "-"
    best: str = "-"
    requeues: str = "-"
    left: str = "-"


@dataclass(frozen=True)
class Job:
    """A job that was submitted for a run.

    Parameters
    ----------
    job_id
        Slurm's, or the process id of submitit's controller on this machine.
    cluster
        Path of the profile, or ``local``.
    """

    job_id: str
    cluster: str

    def state(self) -> JobState | None:
        """Return what becomes of it, None if nobody knows."""
        return _process_state(int(self.job_id)) if self.cluster == LOCAL else queue.job_state(self.job_id)

    def cancel(self) -> str | None:
        """End it for good. Return what is wrong, None if nothing is."""
        if self.cluster != LOCAL:
            return queue.cancel(self.job_id)
        if _process_state(int(self.job_id)).has_ended:
            return "it is not running"
        try:
            os.kill(int(self.job_id), signal.SIGINT)  # submitit's controller ends its processes
        except OSError as error:
            return str(error.strerror)
        return None


def submissions(run_dir: Path) -> list[Job]:
    """Return the jobs that were submitted for a run, oldest first."""
    path = run_dir / "submission" / JOBS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
            job = Job(str(event["job_id"]), str(event["cluster"]))
        except (ValueError, LookupError, TypeError):
            continue  # torn when it was written
        # It becomes an argument of scontrol and scancel.
        if _JOB_ID.fullmatch(job.job_id):
            found.append(job)
    return found


def find_runs(folder: Path) -> list[Path]:
    """Return the run folders at and below a folder, sweeps included.

    Raises
    ------
    InputError
        If there is no such folder.
    """
    if not folder.is_dir():
        raise InputError(str(folder), "there is no such folder", "give the folder that holds the runs, <run.dir>")
    return sorted(set(_walk(folder, _DEPTH)))


def overview(folder: Path) -> list[Row]:
    """Return a row for each run below a folder.

    Asks Slurm for those that are not finished, several at a time, and stops asking when that has taken a minute.
    """
    runs = find_runs(folder)
    deadline = time.monotonic() + _ASK_SECONDS
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda run_dir: describe(run_dir, folder, ask=time.monotonic() < deadline), runs))


def describe(run_dir: Path, folder: Path, *, ask: bool = True) -> Row:
    """Return the row of one run, named as seen from `folder`; `ask` Slurm for it, unless it is finished."""
    name = str(run_dir.relative_to(folder)) if run_dir != folder else run_dir.name
    jobs = submissions(run_dir)
    history, cells = _read(run_dir)
    finished = history is not None and history.finished is not None
    state = jobs[-1].state() if jobs and ask and not finished else None
    if state is not None:
        cells["requeues"] = str(max(state.restarts, int(cells["requeues"])))
    return Row(
        run=name,
        job=jobs[-1].job_id if jobs else "-",
        state=_state_text(state, history, is_job=bool(jobs)),
        nodes=(state.nodes if state else "") or "-",
        **cells,
    )


def _read(run_dir: Path) -> tuple[History | None, dict[str, str]]:
    """Return a run's ledger, and the cells that follow from it; one that is damaged must not hide all other runs."""
    try:
        history = read_ledger(run_dir)
    except (InputError, OSError, RecursionError):
        return None, {"requeues": "0"}
    try:
        return history, {"requeues": str(_requeues(history)), **_progress(history)}
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return history, {"requeues": "0", "epoch": "damaged"}


def follow(run_dir: Path, write: Callable[[str], object]) -> int:
    """Write what the first rank prints, from the beginning on, until the run has ended; return its exit code.

    Raises
    ------
    InputError
        If no job was submitted for the run.
    """
    job = _last_job(run_dir)
    offset, decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
    last = None
    for state in states(job):
        last = state
        log = next((path for path in _logs(run_dir, job.job_id) if path.exists()), None)
        if log is None:
            continue
        with log.open("rb") as file:
            file.seek(offset)
            text = file.read()
        offset += len(text)
        write(decoder.decode(text))
    return exit_code(run_dir, last)


def states(job: Job) -> Iterator[JobState | None]:
    """Yield what becomes of a job, about every second, until it has ended for good or nobody knows it any more.

    One answer is not enough: a job that is about to be requeued shows its end for a moment, and a controller that
    restarts is silent for some seconds.
    """
    alike = 0
    while alike < _ALIKE:
        state = job.state()
        alike = alike + 1 if state is None or state.has_ended else 0
        yield state
        if alike < _ALIKE:
            time.sleep(_POLL_SECONDS)


def cancel(run_dir: Path, cancelled: Collection[Job] = ()) -> Job:
    """End the job of a run for good, and return it; the run itself can be submitted again.

    Parameters
    ----------
    cancelled
        Jobs that were told so already: on one machine the runs of a sweep share one.

    Raises
    ------
    InputError
        If there is no such job, it has ended, or Slurm refuses.
    """
    job = _last_job(run_dir)
    if job in cancelled:
        return job
    state = job.state()
    # scancel is silent about a job that has ended.
    problem = f"it has ended: {state.name}" if state is not None and state.has_ended else job.cancel()
    if problem is not None:
        raise InputError(str(run_dir), f"job {job.job_id} cannot be cancelled ({problem})", "see distplateau jobs")
    return job


def exit_code(run_dir: Path, state: JobState | None) -> int:
    """Return 0 for a run that is finished, else what its job ended with."""
    try:
        if read_ledger(run_dir).finished is not None:
            return 0
    except InputError:
        pass
    return (state.exit_code if state else None) or 1


def print_table(rows: Sequence[Row]) -> None:
    """Print the rows: a table on a terminal, tab-separated lines elsewhere."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    cells = [[getattr(row, column) for column in COLUMNS] for row in rows]
    if not console.is_terminal:
        sys.stdout.write("".join("\t".join(line) + "\n" for line in [list(COLUMNS), *cells]))
        return
    table = Table(*COLUMNS, box=None, pad_edge=False, header_style="bold")
    for line in cells:
        table.add_row(*line)
    console.print(table)


def _walk(folder: Path, depth: int) -> Iterator[Path]:
    if (folder / "ledger.jsonl").exists() or (folder / "submission" / JOBS_FILE).exists():
        yield folder
        return
    if depth:
        try:
            children = list(folder.iterdir())
        except OSError:
            return  # somebody else's
        for child in children:
            if child.is_dir() and not child.name.startswith("."):
                yield from _walk(child, depth - 1)


def _state_text(state: JobState | None, history: History | None, *, is_job: bool) -> str:
    if history is not None and history.finished is not None:
        return "finished"
    if state is None:
        return "unknown" if is_job else "not submitted"
    text = state.name.lower()
    return f"{text} ({state.reason})" if state.name == "PENDING" and state.reason not in {"", "None"} else text


def _process_state(pid: int) -> JobState:
    stat, command = _look_at(pid)
    is_zombie = stat.rpartition(")")[2].split()[:1] == ["Z"]
    # The number may be another process's by now, after a reboot above all.
    if not stat or is_zombie or _CONTROLLER not in command:
        return JobState("COMPLETED")
    return JobState("RUNNING", "this machine")


def _look_at(pid: int) -> tuple[str, bytes]:
    """Return what the kernel says of a process and its command line; both empty if there is none."""
    stat, command = "", b""
    for _ in range(_EXEC_TRIES):
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return "", b""
        if command:
            break
        time.sleep(_EXEC_SECONDS)  # for a moment at its start a program has no command line
    return stat, command


def _requeues(history: History) -> int:
    return max([0, *(int(event.get("restart_count") or 0) for event in history.events if event["event"] == "resumed")])


def _progress(history: History) -> dict[str, str]:
    """Return how far a run is, what it has found, and how long it will take."""
    validations = history.validations
    if not validations:
        return {}
    last = validations[-1]
    schedule = history.start.get("schedule", {})
    total, per_epoch = schedule.get("total_steps"), schedule.get("steps_per_epoch")
    epochs = f"/{short(total / per_epoch)}" if total and per_epoch else ""
    cells = {
        "epoch": f"{short(last['epoch'])}{epochs}",
        "lr": rates_text(last["lr_after"]),
        "best": metric_text(last["monitor"], last["best"]) if "best" in last else "-",
    }
    if total and history.finished is None and last["step"]:
        seconds = sum(event.get("seconds", 0.0) for event in validations) / last["step"] * (total - last["step"])
        cells["left"] = duration(seconds)
    return cells


def _last_job(run_dir: Path) -> Job:
    jobs = submissions(run_dir)
    if not jobs:
        raise InputError(str(run_dir), "no job was submitted for it", "give a run folder that distplateau submit named")
    return jobs[-1]


def _logs(run_dir: Path, job_id: str) -> list[Path]:
    """Return where the first rank may write: a run of a sweep has its log with the sweep."""
    name = f"{job_id}_0_log.out"
    return [run_dir / "logs" / name, run_dir.parent / "logs" / name]
