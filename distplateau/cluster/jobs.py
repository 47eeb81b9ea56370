"""The runs of a folder and what Slurm says of them."""

from __future__ import annotations

import json
import os
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
    from collections.abc import Callable, Iterator, Sequence

JOBS_FILE = "jobs.jsonl"
LOCAL = "local"
COLUMNS = ("run", "job", "state", "nodes", "epoch", "lr", "best", "requeues", "left")
_DEPTH = 3
_POLL_SECONDS = 1.0


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
        os.kill(int(self.job_id), signal.SIGINT)  # submitit's controller ends its processes
        return None


def submissions(run_dir: Path) -> list[Job]:
    """Return the jobs that were submitted for a run, oldest first."""
    path = run_dir / "submission" / JOBS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            event = json.loads(line)
            found.append(Job(str(event["job_id"]), str(event["cluster"])))
        except (ValueError, LookupError, TypeError):
            continue  # torn when it was written
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
    """Return a row for each run below a folder. Asks Slurm for all of them side by side."""
    runs = find_runs(folder)
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda run_dir: describe(run_dir, folder), runs))


def describe(run_dir: Path, folder: Path) -> Row:
    """Return the row of one run, named as seen from `folder`."""
    name = str(run_dir.relative_to(folder)) if run_dir != folder else run_dir.name
    jobs = submissions(run_dir)
    state = jobs[-1].state() if jobs else None
    try:
        history = read_ledger(run_dir)
    except InputError:
        history = None
    return Row(
        run=name,
        job=jobs[-1].job_id if jobs else "-",
        state=_state_text(state, history, is_job=bool(jobs)),
        nodes=(state.nodes if state else "") or "-",
        requeues=str(_requeues(history, state)),
        **(_progress(history) if history else {}),
    )


def follow(run_dir: Path, write: Callable[[str], object]) -> int:
    """Write what the first rank prints, from the beginning on, until the run has ended; return its exit code.

    Raises
    ------
    InputError
        If no job was submitted for the run.
    """
    job = _last_job(run_dir)
    offset = 0
    while True:
        state = job.state()
        over = state is None or state.has_ended
        log = next((path for path in _logs(run_dir, job.job_id) if path.exists()), None)
        if log is not None:
            with log.open("rb") as file:
                file.seek(offset)
                text = file.read()
            offset += len(text)
            write(text.decode("utf-8", errors="replace"))
        if over:
            return exit_code(run_dir, state)
        time.sleep(_POLL_SECONDS)


def cancel(run_dir: Path) -> str:
    """End the job of a run for good, and return its id; the run itself can be submitted again.

    Raises
    ------
    InputError
        If there is no such job, or Slurm refuses.
    """
    job = _last_job(run_dir)
    problem = job.cancel()
    if problem is not None:
        raise InputError(str(run_dir), f"job {job.job_id} cannot be cancelled ({problem})", "see distplateau jobs")
    return job.job_id


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
        for child in folder.iterdir():
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
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return JobState("COMPLETED")
    return JobState("COMPLETED" if stat.rpartition(")")[2].split()[0] == "Z" else "RUNNING", "this machine")


def _requeues(history: History | None, state: JobState | None) -> int:
    events = history.events if history else []
    counted = [int(event.get("restart_count") or 0) for event in events if event["event"] == "resumed"]
    return max([*counted, state.restarts if state else 0])


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
