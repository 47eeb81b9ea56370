"""The mirror of the ledger in Weights & Biases and other trackers. Main rank only.

The ledger is the truth. A validation is mirrored once a durable checkpoint covers it (or the run is finished), so
that a requeue never sends it twice; rows that a killed process had not sent are sent when the run goes on.

Each tracker lives in a process of its own (`distplateau.record.tracking.mirror`): a server that hangs, a client that
blocks at the end and a start that takes seconds are nothing that the training waits for.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
import time
import tomllib
import warnings
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from distplateau.config import dump_config
from distplateau.errors import InputError
from distplateau.record.ledger import FILE_NAME, decode, read_ledger
from distplateau.record.tracking.mirror import INTERRUPTED, Job

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import IO, TextIO

    from distplateau.config import Config

MIRROR_LOG = "mirror.log"
# Seconds that the end of a run waits for a tracker; after an interruption the job's grace time is running.
END_LIMIT, INTERRUPTED_LIMIT = 17.0, 5.0
# Of Accelerate's trackers: what must be importable, one of these, and what pip calls it.
_NEEDS = {
    "tensorboard": (("tensorboard", "tensorboardX"), "tensorboard"),
    "comet_ml": (("comet_ml",), "comet_ml"),
    "aim": (("aim",), "aim"),
    "mlflow": (("mlflow",), "mlflow"),
    "clearml": (("clearml",), "clearml"),
    "dvclive": (("dvclive",), "dvclive"),
    "swanlab": (("swanlab",), "swanlab"),
    "trackio": (("trackio",), "trackio"),
}
# What a launcher tells the ranks; the tracker's process is none.
_LAUNCHER = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_", "ROLE_", "MASTER_", "ACCELERATE_",
    "TORCHELASTIC_", "OMPI_", "PMI_", "PMIX_", "MPI_", "MV2_", "CCL_", "NODE_RANK",
)  # fmt: skip
# The package may have come to the training script by any way: look for it where it is, after everything else.
_COMMAND = "import sys; sys.path.append({folder!r}); from distplateau.record.tracking.mirror import main; main()"


class Mirror(Protocol):
    """What the trainer asks of a tracker."""

    def catch_up(self, covered: int | None = None) -> None:
        """Send the validations of the ledger that were not sent yet; call it after a checkpoint is durable.

        Parameters
        ----------
        covered
            The last validation that the checkpoint covers; None for all that the ledger holds now.
        """
        ...

    def finish(self) -> None:
        """Send the rest and the summary, and close."""
        ...


class NoMirror:
    """``tracking.wandb = "disabled"``."""

    def catch_up(self, covered: int | None = None) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


def new_run_id() -> str:
    """Return an id that a run keeps for life, whatever becomes of its process."""
    return secrets.token_hex(4)


def check_trackers(config: Config) -> None:
    """Find out whether the trackers that the configuration names are installed.

    Raises
    ------
    InputError
        With the command that installs the first one that is not.
    """
    for name in config.tracking.trackers:
        modules, package = _NEEDS[name]
        if not any(find_spec(module) for module in modules):
            raise InputError("tracking.trackers", f"{name} is not installed", f"pip install {package}", value=name)


def open_mirror(config: Config, run_id: str) -> Mirror:
    """Open the trackers that the configuration asks for; returns at once.

    A tracker that cannot be opened must not cost the training: a warning is given and the ledger goes on alone.

    Parameters
    ----------
    run_id
        Where the ledger names another one (the run was killed before its first checkpoint), that one stays.
    """
    trackers = [*(["wandb"] if config.tracking.wandb != "disabled" else []), *config.tracking.trackers]
    if not trackers:
        return NoMirror()
    try:
        jobs = [describe(config, run_id, tracker) for tracker in trackers]
        return ProcessMirror(config.run_dir, jobs)
    except OSError as error:
        warnings.warn(f"tracking is not available, the ledger goes on alone: {error}", stacklevel=2)
        return NoMirror()


def describe(config: Config, run_id: str, tracker: str = "wandb") -> Job:
    """Return what the process of a tracker is told."""
    section, run_dir = config.tracking, config.run_dir.resolve()
    return Job(
        run_dir=str(run_dir),
        run_id=str(read_ledger(run_dir).start.get("run_id") or run_id),
        tracker=tracker,
        mode="online" if section.wandb == "online" else "offline",
        name=config.run.name,
        project=section.project,
        entity=section.entity,
        group=section.group,
        tags=section.tags,
        # As in config.toml, so that a later upload says the same.
        config=tomllib.loads(dump_config(config)),
        training_pid=os.getpid(),
    )


class ProcessMirror:
    """One process per tracker, told how far the run is."""

    def __init__(self, run_dir: Path, jobs: list[Job]) -> None:
        self._ledger = _LedgerEnd(run_dir / FILE_NAME)
        self._covered = 0
        log = run_dir / "wandb" / MIRROR_LOG
        self._processes = [TrackerProcess(job, _warn, log) for job in jobs]

    def catch_up(self, covered: int | None = None) -> None:
        """Tell the processes that validations are final; returns at once."""
        self._ledger.read()
        self._covered = max(self._covered, self._ledger.validation if covered is None else covered)
        for process in self._processes:
            process.say({"covered": self._covered})

    def finish(self) -> None:
        """Let the processes send the rest, for a limited time."""
        self._ledger.read()
        ended = self._ledger.event in {"finished", "interrupted"}
        covered = self._ledger.validation if ended else self._covered
        code = {"finished": 0, "interrupted": INTERRUPTED}.get(self._ledger.event, 1)
        deadline = time.monotonic() + (INTERRUPTED_LIMIT if code == INTERRUPTED else END_LIMIT)
        for process in self._processes:
            process.say({"covered": covered, "end": code})
        for process in self._processes:
            process.join(deadline)


class TrackerProcess:
    """The process of one tracker.

    Parameters
    ----------
    tell
        Called, in a thread, with each line that the user should see.
    log
        Where it writes what nobody should need.
    lock
        A locked file that the process and its children hold as long as they live.
    """

    def __init__(self, job: Job, tell: Callable[[str], None], log: Path, lock: TextIO | None = None) -> None:
        self._job, self._tell = job, tell
        log.parent.mkdir(parents=True, exist_ok=True)
        descriptors = () if lock is None else (lock.fileno(),)
        with log.open("ab") as stderr:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND.format(folder=str(Path(__file__).parents[3]))],
                # Unbuffered: a line that cannot be written is lost rather than kept for later.
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=_environment(job),
                pass_fds=descriptors,
                # Ctrl-C is for the training; the mirror ends when that has ended.
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.say({**job.to_json(), "lock": descriptors[0] if descriptors else -1})
        # From now on a process that does not read must not hold up the training.
        os.set_blocking(self._stdin.fileno(), False)

    def say(self, message: dict[str, Any]) -> None:
        """Send a line, or lose it if the process is gone or does not read: each line holds all that counts."""
        line = json.dumps(message).encode() + b"\n"
        with suppress(OSError, ValueError):  # ValueError: closed
            while line:
                line = line[self._stdin.write(line) or len(line) :]

    def join(self, deadline: float) -> int:
        """Wait for the end until `deadline` (monotonic seconds), then end it; return its exit code."""
        try:
            code = self._process.wait(max(deadline - time.monotonic(), 0.1))
            self._listener.join(1)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
            self._tell(f"{self._job.tracker} did not end in time; {self._job.advice}")
        with suppress(OSError):
            self._stdin.close()
        return code

    @property
    def _stdin(self) -> IO[bytes]:
        assert self._process.stdin is not None
        return self._process.stdin

    def _listen(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                self._tell(line.decode(errors="replace").strip())


class _LedgerEnd:
    """The last event and the last validation of a ledger that grows; reads only what is new."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self.event, self.validation = "", 0

    def read(self) -> None:
        """Read on."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._offset += len(line)
                self._take(line)

    def _take(self, line: bytes) -> None:
        try:
            event = decode(line.decode())
        except ValueError:
            return
        self.event = event["event"]
        if self.event == "validation":
            self.validation = event["validation"]
        elif self.event == "resumed":
            self.validation = event["last_validation"]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=2)


def _environment(job: Job) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
    # That of a wandb in the training script: in a service of another's, a run that ended badly keeps its id in use.
    kept.pop("WANDB_SERVICE", None)
    if job.tracker != "wandb":
        kept |= {"CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}
    return {**kept, "OMP_NUM_THREADS": "1"}
