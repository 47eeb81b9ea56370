"""The process that talks to a tracker, so that nothing of a tracker's runs in the training process.

Importing and starting wandb takes a second or two, its server may hang, its client may block at the end or leave
threads behind: here that costs the training nothing. The process reads the ledger itself; it is told on its standard
input, one JSON object a line, up to which validation it may send, and it answers with lines that the user should see.

    {"run_dir": ..., "tracker": "wandb", ...}     what to mirror (see `Job`)
    {"covered": 12}                               validations up to 12 are final
    {"end": 0}                                    send the rest and end; the run's exit code
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from distplateau.record.ledger import History, read_ledger
from distplateau.record.tracking.backend import Backend, Unavailable, connect
from distplateau.record.tracking.rows import alerts, configuration, rows, summary, up_to
from distplateau.record.words import plural

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

EX_KILLED = 1
NO_KEY = "there is no API key; run `wandb login`, or set WANDB_API_KEY"
INTERRUPTED = 75
UPLOAD_LOCK = "upload.lock"
# A requeue leaves a grace time of half a minute or less, and the signal comes to every process of the job.
_NOT_OURS = (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# SIGTERM is none of ours either, but the client's service dies of it: when it came.
_terminated: list[float] = []
_FLUSH_SECONDS = 1.0


@dataclass(frozen=True)
class Job:
    """What is mirrored, and how.

    Parameters
    ----------
    tracker
        ``"wandb"``, or a name that Accelerate knows.
    mode
        ``"online"`` (falls back to offline), ``"offline"``, or ``"upload"``: online or not at all.
    work_dir
        Where the client keeps its files.
    training_pid
        The process whose memory and CPU time are shown; 0 for none.
    finished, rows, lock
        Of an upload: whether the run has ended, how many rows it has, and the descriptor of the lock it is made under.
    """

    run_dir: str
    run_id: str
    tracker: str = "wandb"
    mode: str = "offline"
    name: str = "run"
    project: str = "distplateau"
    entity: str | None = None
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    work_dir: str = ""
    training_pid: int = 0
    finished: bool = False
    rows: int = 0
    lock: int = -1

    @property
    def advice(self) -> str:
        """Say what becomes of rows that did not get through."""
        return f"nothing is lost{f', `distplateau sync {self.run_dir}` uploads it' if self.tracker == 'wandb' else ''}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values for the process."""
        return asdict(self)


class Tracker(Protocol):
    """Where rows go."""

    def held(self) -> set[int]:
        """Return the validations that are there already."""
        ...

    def send(self, number: int, row: dict[str, Any]) -> None:
        """Take one row; returns before it has arrived."""
        ...

    def note(self, history: History, covered: int) -> None:
        """Rows up to `covered` were given."""
        ...

    def end(self, history: History, exit_code: int) -> None:
        """Give the summary and close."""
        ...

    def abandon(self) -> None:
        """Let go of what a failure left behind."""
        ...


def serve(job: Job, lines: Iterator[str], tell: Callable[[str], None]) -> None:
    """Do the job as the lines say, until they end.

    A client that fails is opened once more: a job's signals kill the service of wandb, and the run has yet to end.
    """
    messages = _Messages(lines)
    tracker = _open(job, tell)
    try:
        _follow(tracker, job, messages)
    except Exception:
        tracker.abandon()
        if job.mode == "upload":
            raise
        traceback.print_exc()
        messages.repeat()
        _follow(_open(job, tell), job, messages)


def _open(job: Job, tell: Callable[[str], None]) -> Tracker:
    return WandbTracker(job, tell) if job.tracker == "wandb" else AccelerateTracker(job)


def _follow(tracker: Tracker, job: Job, messages: _Messages) -> None:
    held, covered = tracker.held(), 0
    for message in messages:
        covered = message.get("covered", covered)
        history = read_ledger(job.run_dir)
        for number, values in rows(history).items():
            if number <= covered and number not in held:
                tracker.send(number, values)
                held.add(number)
        tracker.note(history, covered)
        if "end" in message:
            tracker.end(up_to(history, covered), message["end"])
            return


class _Messages:
    """What the training says, up to the end; where it ends without a word, it was killed."""

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines
        self._last: dict[str, Any] = {}
        self._repeat = False

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            if not self._repeat:
                line = next(self._lines, None)
                said = json.loads(line) if line else {"end": EX_KILLED}
                self._last = {**self._last, **said}
            self._repeat = False
            yield self._last

    def repeat(self) -> None:
        """Give the last message once more."""
        self._repeat = True


class WandbTracker:
    """One wandb run per run, for life: ``resume="allow"`` with the run's own id.

    Rows are logged without ``step=`` (wandb drops or doubles replayed ones) against the ``epoch`` they hold. Online,
    the server is asked which rows it holds; offline, a file in the run folder says which rows earlier segments hold.
    """

    def __init__(self, job: Job, tell: Callable[[str], None]) -> None:
        self._job, self._tell = job, tell
        self._folder = Path(job.run_dir) / "wandb"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._notes = Notes(self._folder / "sent.json")
        self._backend: Backend | None = None
        self._entity = self._problem = ""
        self._on_server: set[int] = set()
        self._sent: dict[int, float] = {}
        self._upload_lock: TextIO | None = None
        problem = self._go_online() if job.mode in {"online", "upload"} else ""
        if problem and job.mode == "upload":
            raise Unavailable(problem)
        if problem:
            self._tell(f"wandb: {problem}; the run is mirrored offline, {job.advice}")
        if self._backend is None:
            self._run = self._init("offline")

    def held(self) -> set[int]:
        """Return what the server holds online, what the notes say offline."""
        if self._backend is not None:
            return set(self._on_server)
        last = self._notes.read().get("validation", 0)
        return set(range(1, last + 1)) if isinstance(last, int) else set()

    def send(self, number: int, row: dict[str, Any]) -> None:
        """Log without ``step=``."""
        self._sent[number] = time.monotonic()
        self._run.log(row)

    def note(self, history: History, covered: int) -> None:
        """Note how far the rows went, and send the alerts where that is possible."""
        if self._job.mode == "upload":
            return
        self._notes.write({"validation": covered})
        if self._backend is not None:
            try:
                self._send_alerts(self._backend, history, covered)
                self._problem = ""
            except Unavailable as error:  # the next time, or `sync`
                self._problem = str(error)

    def end(self, history: History, exit_code: int) -> None:
        """Finish in limited time and ask what arrived; an interrupted run is marked as preempted."""
        self._run.summary.update(summary(history))
        if exit_code == INTERRUPTED:
            self._run.mark_preempting()
        self._run.finish(exit_code=exit_code)
        if self._backend is not None and self._job.mode == "online":
            problem = self._problem or self._missing(self._backend, history)
            if problem:
                self._tell(f"wandb: {problem}; {self._job.advice}")

    def _go_online(self) -> str:
        """Open the run online; return what is in the way, if anything is."""
        job = self._job
        if job.lock < 0:
            self._upload_lock = lock_file(self._folder / UPLOAD_LOCK, patience=10)
            if self._upload_lock is None:
                return "another process is uploading this run"
        # wandb-core inherits standard output and with it the lock: it may go on sending after this process was killed.
        os.dup2(self._upload_lock.fileno() if self._upload_lock else job.lock, 1)
        try:
            backend = connect()
            if backend is None:
                return NO_KEY
            backend.probe()
            holding = backend.holding(job.project, job.entity, job.run_id)
            self._run = self._init("online")
        except Exception as error:  # wandb raises whatever its service, its disk or the network raise
            self.abandon()
            return " ".join(str(error).split()) or type(error).__name__
        self._backend, self._on_server = backend, set(holding.validations)
        self._entity = self._run.entity or holding.entity
        return ""

    def _init(self, mode: str) -> Any:
        import wandb

        job = self._job
        history = read_ledger(job.run_dir)
        run = wandb.init(
            id=job.run_id,
            resume="allow",
            mode=mode,  # pyright: ignore[reportArgumentType]
            dir=job.work_dir or job.run_dir,
            project=job.project,
            entity=job.entity,
            group=job.group,
            name=job.name,
            tags=job.tags,
            config=configuration(job.config, history),
            settings=wandb.Settings(**wandb_settings(job)),
        )
        run.define_metric("epoch")
        run.define_metric("*", step_metric="epoch")
        return run

    def _send_alerts(self, backend: Backend, history: History, covered: int) -> None:
        send_alerts(backend, self._folder, (self._job.project, self._entity, self._job.run_id), history, covered)

    def _missing(self, backend: Backend, history: History) -> str:
        """Ask the server what arrived and say what did not."""
        job, wanted = self._job, {event["validation"] for event in history.validations}
        missing = wanted
        try:
            for pause in (0, 0.5, 1):  # what was taken cannot always be read at once
                time.sleep(pause)
                missing = wanted - set(backend.holding(job.project, job.entity, job.run_id, timeout=3).validations)
                if not missing:
                    return ""
        except Unavailable as error:
            return str(error)
        return f"{plural(len(missing), 'row')} did not arrive"

    def abandon(self) -> None:
        """Let go of the lock and of what a failed start left behind: a second one would find the run id in use."""
        import wandb

        self._take_back()
        with contextlib.suppress(Exception):
            wandb.teardown()
        os.dup2(2, 1)
        if self._upload_lock is not None:
            self._upload_lock.close()
            self._upload_lock = None

    def _take_back(self) -> None:
        """Note that what a dying service may have taken without writing it down has yet to be sent."""
        died = _terminated[-1] if _terminated else time.monotonic()
        unsure = [number for number, at in self._sent.items() if at > died - 1.5 * _FLUSH_SECONDS]
        if unsure:
            self._notes.write({"validation": min(unsure) - 1})


class AccelerateTracker:
    """A tracker that Accelerate knows, by its name. A requeued run goes on in a new segment of it."""

    def __init__(self, job: Job) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind: Any = LOGGER_TYPE_TO_CLASS[job.tracker]
        folder = Path(job.run_dir) / "trackers" / job.tracker
        folder.mkdir(parents=True, exist_ok=True)
        self._notes = Notes(folder / "sent.json")
        arguments = (job.name, str(folder)) if kind.requires_logging_directory else (job.project,)
        self._tracker = kind(*arguments)
        self._tracker.start()
        self._tracker.store_init_configuration(flat(configuration(job.config, read_ledger(job.run_dir))))

    def held(self) -> set[int]:
        """Return what the notes say."""
        last = self._notes.read().get("validation", 0)
        return set(range(1, last + 1)) if isinstance(last, int) else set()

    def send(self, number: int, row: dict[str, Any]) -> None:
        """Log against the optimizer step."""
        self._tracker.log(
            {key: value for key, value in row.items() if key[0] != "_"}, step=row.get("scheduler/step", number)
        )

    def note(self, history: History, covered: int) -> None:  # noqa: ARG002
        """Note how far the rows went."""
        self._notes.write({"validation": covered})

    def end(self, history: History, exit_code: int) -> None:  # noqa: ARG002
        """Close."""
        self._tracker.finish()

    def abandon(self) -> None:
        """Let go: nothing is held."""


class Notes:
    """A small JSON file that is there as a whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, Any]:
        """Return what was written; empty where nothing was, or nothing that can be read."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def write(self, content: dict[str, Any]) -> None:
        """Replace the content."""
        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with partial.open("w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(self.path)


def send_alerts(backend: Backend, folder: Path, run: tuple[str, str, str], history: History, covered: int) -> int:
    """Send the alerts that were not sent yet and return how many. The caller holds the upload lock.

    Not through the client: after its ``alert()`` nothing bounds ``finish()``. An alert is noted once it was taken; the
    server itself holds back a second one with the same title, should this process end in between.
    """
    notes = Notes(folder / "alerts.json")
    told: list[str] = list(notes.read().get("sent", []))
    count = 0
    for alert in alerts(history, covered):
        if alert.title not in told:
            backend.alert(*run, alert)
            told.append(alert.title)
            notes.write({"sent": told})
            count += 1
    return count


def lock_file(path: Path, patience: float = 0.0) -> TextIO | None:
    """Return the file, locked until it is closed by all who inherited it, or None if somebody else has it.

    Parameters
    ----------
    patience
        Seconds to wait for it: the service of a client that has ended takes a moment to notice.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                return None
            time.sleep(0.05)
        except OSError:
            return file  # a file system without locks: better no lock than no upload


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings with dotted names and values that every tracker takes."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


def wandb_settings(job: Job) -> dict[str, Any]:
    """Return settings that publish nothing but numbers and the configuration, and wait for nothing without end."""
    live = job.mode != "upload"
    return {
        "silent": True,
        "console": "off",
        # No code, no diff, no command line, no list of packages: they may hold what nobody meant to publish.
        "disable_git": True,
        "disable_code": True,
        "save_code": False,
        "x_disable_meta": True,
        "x_save_requirements": False,
        "x_disable_stats": not (live and job.training_pid),
        **({"x_stats_pid": job.training_pid} if live and job.training_pid else {}),
        # A run that a later upload leaves half done may go on elsewhere: only its end is told.
        "x_update_finish_state": job.mode != "upload" or job.finished,
        "init_timeout": 20,
        "finish_timeout": 8 if live else 60 + 0.01 * job.rows,
        "x_graphql_retry_max": 2,
        "x_graphql_retry_wait_min_seconds": 0.5,
        "x_graphql_retry_wait_max_seconds": 2,
        "x_graphql_timeout_seconds": 5,
        "x_file_transfer_retry_max": 2,
        "x_file_transfer_timeout_seconds": 5,
        # While a run trains the server has all day to come back.
        **({} if live else {"x_file_stream_retry_max": 5}),
        "x_file_stream_retry_wait_min_seconds": 0.5,
        "x_file_stream_retry_wait_max_seconds": 15 if live else 2,
        "x_file_stream_timeout_seconds": 15,
        # The default of 15 s loses that much on SIGKILL.
        "x_transaction_log_flush_interval": _FLUSH_SECONDS,
    }


def main() -> None:
    """Serve standard input, then end at once: what the clients registered for the end may hang."""
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda _number, _frame: _terminated.append(time.monotonic()))
    # The client's service inherits what is standard; it must neither hold our pipes open nor write into them.
    commands = os.fdopen(os.dup(0), encoding="utf-8")
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    def tell(text: str) -> None:
        with contextlib.suppress(OSError):
            answers.write(f"{text}\n")
            answers.flush()

    # Held until the client's service has ended as well: says that somebody writes here.
    with contextlib.suppress(OSError):
        fcntl.flock(2, fcntl.LOCK_EX | fcntl.LOCK_NB)
    job = Job(**json.loads(next(commands)))
    # The client makes folders at import that only an orderly end of the interpreter would remove.
    tempfile.tempdir = tempfile.mkdtemp(prefix="distplateau-mirror-")
    code = 0
    try:
        serve(job, iter(commands), tell)
    except Exception as error:  # clients raise whatever their services, their disk or the network raise
        traceback.print_exc()
        what = " ".join(str(error).split()) or type(error).__name__
        tell(what if job.mode == "upload" else f"{job.tracker}: {what}; {job.advice}")
        code = 1
    shutil.rmtree(tempfile.tempdir, ignore_errors=True)
    sys.stderr.flush()
    os._exit(code)
