"""What Slurm says of a job, and what it is told. Missing tools degrade: an answer may be None."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_TIMEOUT_S = 30
ENDED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED REVOKED TIMEOUT".split()
)


@dataclass(frozen=True)
class JobState:
    """A job as Slurm sees it.

    Parameters
    ----------
    name
        ``PENDING``, ``RUNNING``, ``COMPLETED``, ...
    nodes
        Node list, empty while it waits.
    reason
        Why it waits, or "None".
    restarts
        How often it was requeued.
    exit_code
        None until it has ended.
    """

    name: str
    nodes: str = ""
    reason: str = ""
    restarts: int = 0
    exit_code: int | None = None

    @property
    def has_ended(self) -> bool:
        """Return whether it will not run again by itself."""
        return self.name in ENDED


def job_state(job_id: str) -> JobState | None:
    """Ask the controller, then the accounting; None if neither knows the job or can be asked.

    Parameters
    ----------
    job_id
        ``123``, or ``123_4`` for a task of an array.
    """
    said = ask(["scontrol", "show", "job", "--oneliner", job_id])
    if said is not None and "JobState=" in said:
        return _read_scontrol(said)
    return _accounted(job_id)


def is_wanted(job_id: str) -> bool:
    """Return whether a job whose ranks have left should come back: not one that somebody cancelled.

    While it is ending the controller says COMPLETING, whatever the cause. The accounting knows that; where there is
    none, only the time limit is told. One that Slurm preempts or that lost a node is queued again by Slurm.
    """
    state = job_state(job_id)
    if state is None or state.name in {"RUNNING", "TIMEOUT"}:
        return True
    if state.name != "COMPLETING":
        return False
    if state.reason == "TimeLimit":
        return True
    accounted = _accounted(job_id)
    return accounted is not None and accounted.name in {"TIMEOUT", "RUNNING"}


def requeue(job_id: str) -> str | None:
    """Put a job back into the queue, which ends what runs of it. Return what is wrong, None if nothing is."""
    return _tell(["scontrol", "requeue", job_id])


def cancel(job_id: str) -> str | None:
    """End a job for good. Return what is wrong, None if nothing is."""
    return _tell(["scancel", job_id])


def largest_array() -> int | None:
    """Return how many tasks an array may have, None if nobody can be asked."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", ask(["scontrol", "show", "config"]) or "", re.MULTILINE)
    return int(found[1]) - 1 if found else None


def _accounted(job_id: str) -> JobState | None:
    said = ask(["sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--jobs", job_id,
                 "--format", "State,NodeList,ExitCode"])  # fmt: skip
    lines = (said or "").strip().splitlines()
    return _read_sacct(lines[-1], len(lines) - 1) if lines else None


def _read_scontrol(line: str) -> JobState:
    fields = dict(re.findall(r"(\w+)=(\S*)", line))
    name = fields["JobState"]
    code = int(fields.get("ExitCode", "0:0").split(":")[0]) if name in ENDED else None
    nodes = fields.get("NodeList", "").replace("(null)", "")
    return JobState(name, nodes, fields.get("Reason", ""), int(fields.get("Restarts", "0")), code)


def _read_sacct(line: str, restarts: int) -> JobState:
    state, nodes, code = line.split("|")[:3]
    name = state.split()[0]  # "CANCELLED by 1000"
    nodes = "" if nodes == "None assigned" else nodes
    return JobState(name, nodes, "", restarts, int(code.split(":")[0]) if name in ENDED else None)


def ask(command: Sequence[str]) -> str | None:
    """Return what a command of Slurm says, None if it is missing or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _tell(command: Sequence[str]) -> str | None:
    if shutil.which(command[0]) is None:
        return f"there is no {command[0]} here"
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{command[0]}: {error}"
    return None if done.returncode == 0 else f"{' '.join(command)}: {' '.join((done.stderr or done.stdout).split())}"
