"""The end of a batch script: what becomes of the job. Run by the shell of the job's first node, without torch.

    python -m distplateau.cluster.requeue RUN CODE MAX_REQUEUES
    python -m distplateau.cluster.requeue --folder-of CONFIG.toml [--section.key value ...]

The second form prints the run folder, for a script that has only the arguments of ``distplateau train``.

Slurm takes a job whose ranks saved and left for one that is done, and an interrupted run would stay where it is. So
the script asks for the job to be queued again, unless it is done, was cancelled, or nothing would come of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from distplateau.cluster import queue
from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger

DONE, WRONG_INPUT, INTERRUPTED = 0, 2, 75
# Also what Python leaves with where a signal comes before its handlers are set: 128 + USR1, USR2, TERM.
_LEFT = frozenset({INTERRUPTED, 138, 140, 143})
FAILURES = "failures.json"
# The same failure at the same checkpoint: the first may have been the machine's, the second is the program's.
MOST_ALIKE = 2
_KILL_SECONDS = 120
_TRIES, _TRY_SECONDS = 4, 10.0


@dataclass(frozen=True)
class Failure:
    """How a stretch of the job ended.

    Parameters
    ----------
    code
        Exit code of the ranks.
    checkpoint
        Newest checkpoint at that time, empty if there was none.
    times
        How often in a row it ended so.
    ledger
        Size of the ledger at that time.
    """

    code: int
    checkpoint: str
    times: int = 1
    ledger: int = -1


def verdict(code: int, restarts: int, max_requeues: int, *, interrupted: bool, failure: Failure) -> str | None:
    """Return why a job is not queued again, None if it is.

    Parameters
    ----------
    code
        Exit code of the ranks.
    interrupted
        Whether the ledger ends with an interruption: everything was saved, whatever the exit code became.
    failure
        The way it ended, with its count.
    """
    if code == DONE:
        return "it is done"
    if code == WRONG_INPUT:
        return "its input is wrong, which another try would not change"
    if restarts >= max_requeues:
        return f"it came back {restarts} times already (slurm.max_requeues = {max_requeues})"
    if not interrupted and code not in _LEFT and failure.times >= MOST_ALIKE:
        where = failure.checkpoint or "its start"
        return f"it failed {failure.times} times in a row with code {code} after {where}: look into the logs"
    return None


def main(arguments: list[str]) -> int:
    """Decide, ask Slurm, and return the exit code that the batch script has to end with."""
    run_dir, code, max_requeues = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    # The last word may be that of an earlier stretch, if this one did not come to its first.
    interrupted = was_interrupted(run_dir) and _ledger_size(run_dir) != _failure_before(run_dir).ledger
    failure = count_failure(run_dir, code)
    reason = verdict(code, restarts, max_requeues, interrupted=interrupted, failure=failure)
    job_id = own_job_id()
    if reason is None:
        reason = None if queue.is_wanted(job_id) else "it was cancelled, or Slurm takes care of it"
    if reason is None:
        _say(f"queued again ({restarts + 1} of {max_requeues}), from the newest whole checkpoint")
        reason = _requeue(job_id)
        if reason is None:
            # Slurm ends this script; if it ended by itself before, the job would count as done.
            time.sleep(_KILL_SECONDS)
            reason = "Slurm did not take it"
    _say(f"not queued again: {reason}")
    return code


def _requeue(job_id: str) -> str | None:
    """Ask for it again where a controller that restarts did not answer; return what is wrong in the end."""
    reason = queue.requeue(job_id)
    for _ in range(_TRIES - 1):
        if reason is None or shutil.which("scontrol") is None or not queue.is_wanted(job_id):
            break
        _say(f"not queued again yet: {reason}")
        time.sleep(_TRY_SECONDS)
        reason = queue.requeue(job_id)
    return reason


def print_folder(arguments: list[str]) -> int:
    """Print the run folder of the arguments of ``distplateau train``; return the exit code."""
    from distplateau.config import load_config, read_overrides

    try:
        config, words = arguments[0], arguments[1:]
        if "--resume" in words:  # as `distplateau train` takes it: with its value, wherever it stands
            place = words.index("--resume")
            del words[place : place + 2]
        rest = [word for word in words if not word.startswith("--resume=")]
        sys.stdout.write(f"{load_config(config, read_overrides(rest)).run_dir.absolute()}\n")
    except InputError as error:
        sys.stderr.write(f"distplateau: {error}\n")
        return WRONG_INPUT
    return DONE


def own_job_id() -> str:
    """Return what Slurm calls this job; a task of an array is queued again on its own."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")


def was_interrupted(run_dir: Path) -> bool:
    """Return whether the last thing that the run recorded is that all was saved."""
    try:
        return read_ledger(run_dir).events[-1]["event"] == "interrupted"
    except (InputError, OSError):
        return False


def count_failure(run_dir: Path, code: int) -> Failure:
    """Compare how it ended with how it ended before, and note it for the next time."""
    path = run_dir / "submission" / FAILURES
    checkpoints = sorted(folder.name for folder in (run_dir / "checkpoints").glob("step-*"))
    newest, size = checkpoints[-1] if checkpoints else "", _ledger_size(run_dir)
    before = _failure_before(run_dir)
    times = before.times + 1 if (before.code, before.checkpoint) == (code, newest) else 1
    failure = Failure(code, newest, times, size)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(failure)), encoding="utf-8")
    except OSError as error:  # the disk is full: what limits the requeues then is their number
        _say(f"not counted among the failures: {path}: {error.strerror or error}")
    return failure


def _failure_before(run_dir: Path) -> Failure:
    try:
        return Failure(**json.loads((run_dir / "submission" / FAILURES).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Failure(DONE, "", 0)


def _ledger_size(run_dir: Path) -> int:
    try:
        return (run_dir / "ledger.jsonl").stat().st_size
    except OSError:
        return 0


def _say(text: str) -> None:
    sys.stderr.write(f"distplateau: job {own_job_id()} is {text}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--folder-of"]:
        sys.exit(print_folder(sys.argv[2:]))
    sys.exit(main(sys.argv[1:]))
