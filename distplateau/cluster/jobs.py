"""The runs of a folder and what Slurm says of them."""

from __future__ import annotations

import json
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from distplateau.cluster import queue
from distplateau.errors import InputError
from distplateau.record.ledger import History, read_ledger
from distplateau.record.words import duration, metric_text, rates_text, short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from distplateau.cluster.queue import JobState

JOBS_FILE = "jobs.jsonl"
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


def submissions(run_dir: Path) -> list[str]:
    """Return the ids of the jobs that were submitted for a run, oldest first."""
    path = run_dir / "submission" / JOBS_FILE
    if not path.exists():
        return []
    return [json.loads(line)["job_id"] for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


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
    state = queue.job_state(jobs[-1]) if jobs else None
    try:
        history = read_ledger(run_dir)
    except InputError:
        history = None
    return Row(
        run=name,
        job=jobs[-1] if jobs else "-",
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
    job_id = _last_job(run_dir)
    offset = 0
    while True:
        state = queue.job_state(job_id)
        over = state is None or state.has_ended
        log = next((path for path in _logs(run_dir, job_id) if path.exists()), None)
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
    job_id = _last_job(run_dir)
    problem = queue.cancel(job_id)
    if problem is not None:
        raise InputError(str(run_dir), f"job {job_id} cannot be cancelled ({problem})", "see distplateau jobs")
    return job_id


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


def _last_job(run_dir: Path) -> str:
    jobs = submissions(run_dir)
    if not jobs:
        raise InputError(str(run_dir), "no job was submitted for it", "give a run folder that distplateau submit named")
    return jobs[-1]


def _logs(run_dir: Path, job_id: str) -> list[Path]:
    """Return where the first rank may write: a run of a sweep has its log with the sweep."""
    name = f"{job_id}_0_log.out"
    return [run_dir / "logs" / name, run_dir.parent / "logs" / name]
