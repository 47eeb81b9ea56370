"""The ledger: append-only JSON lines, one event each, the source of truth of a run.

A line is complete when it ends in a newline; a torn last line (the machine died while writing) is ignored. Nothing is
ever truncated: after a requeue from an older checkpoint, a ``resumed`` event names the last validation that was kept,
and readers drop what came between.

Each line ends in a ``seal`` over its content and the seal of the line before it, so that ``verify`` sees any change
made later, be it to a value that decided nothing. Readers leave it out of the events they return.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distplateau.errors import InputError

FILE_NAME = "ledger.jsonl"
Event = dict[str, Any]

_SEAL = re.compile(r',"seal":"([0-9a-f]{16})"\}$')
_END = ',"seal":"################"}'

# A run may be called "nan".
_AS_WRITTEN = frozenset(
    {
        "event",
        "run",
        "config",
        "hostname",
        "device",
        "classes",
        "versions",
        "run_id",
        "reason",
        "slurm_job_id",
        "slurm_nodes",
    }
)
_NUMBER, _RATES = (int, float), list
# What readers go by: a line without it is damaged.
_REQUIRED: dict[str, dict[str, Any]] = {
    "resumed": {"last_validation": int},
    "validation": {
        "validation": int,
        "epoch": _NUMBER,
        "step": int,
        "monitor": str,
        "value": _NUMBER,
        "decision": str,
        "lr_before": _RATES,
        "lr_after": _RATES,
        "best": _NUMBER,
        "num_bad": int,
        "cooldown": int,
    },
}


def encode(event: Event) -> str:
    """Write an event as one JSON line; NaN and infinities become the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
    return json.dumps(to_json(event), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def decode(line: str) -> Event:
    """Read one line back; the strings for non-finite numbers become floats again.

    Raises
    ------
    ValueError
        If the line is not a JSON object with an ``event``, or lacks what every event of its kind has.
    """
    parsed = json.loads(line)
    if not isinstance(parsed, dict) or not isinstance(parsed.get("event"), str):
        raise ValueError("not an event")
    event = {key: value if key in _AS_WRITTEN else from_json(value) for key, value in parsed.items()}
    for key, kind in _REQUIRED.get(event["event"], {}).items():
        if not isinstance(event.get(key), kind):
            raise ValueError(f"{event['event']} without {key}")
    return event


def seal(previous: str, content: str) -> str:
    """Return the seal of a line: 64 bits of SHA-256 over the seal before it ("" for none) and its own content."""
    return hashlib.sha256(f"{previous}{content}".encode()).hexdigest()[:16]


class Ledger:
    """The writing end. Main rank only, and one at a time: each line is sealed over the one before it.

    Parameters
    ----------
    run_dir
        The run folder; it exists.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        try:
            self._end_torn_line()
            lines = read_lines(self.path) if self.path.exists() else []
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._last_seal = next((line.seal for line in reversed(lines) if line.event and line.seal), "")

    def append(self, event: str, **fields: Any) -> Event:
        """Add one event, flushed to the disk before this returns; ``time`` (Unix seconds) is added.

        Raises
        ------
        InputError
            If it cannot be written (the disk is full, the folder is gone).
        """
        line = {"event": event, **fields, "time": round(time.time(), 3)}
        content = encode(line)
        own = seal(self._last_seal, content)
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(f'{content[:-1]},"seal":"{own}"}}\n')
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _unwritable(self.path, error) from error
        self._last_seal = own
        return line

    def _end_torn_line(self) -> None:
        """End a torn last line, so that the next event does not become its tail."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file as it stands there.

    Parameters
    ----------
    number
        1 for the first.
    text
        Without the newline.
    event
        None for a line that is no event.
    """

    number: int
    text: str
    event: Event | None

    @property
    def seal(self) -> str | None:
        """Return the seal that the line carries; older ledgers have none."""
        match = _SEAL.search(self.text)
        return match[1] if match else None

    @property
    def content(self) -> str:
        """Return the line as it was before it was sealed."""
        return _SEAL.sub("}", self.text)

    @property
    def was_whole(self) -> bool:
        """Tell whether the line ends as a whole one does, or did before somebody changed a letter or two of its end."""
        return any(_misses(text[-len(_END) :]) <= 2 for text in (self.text, self.text[:-1]))


@dataclass(frozen=True)
class History:
    """What readers see of a ledger.

    Parameters
    ----------
    events
        All events in the order they were written, superseded validations left out.
    torn_lines
        Numbers of the lines (1 for the first) that are no events.
    """

    run_dir: Path
    events: list[Event]
    torn_lines: list[int]

    @property
    def start(self) -> Event:
        """Return the ``start`` event, empty if there is none."""
        return next((e for e in self.events if e["event"] == "start"), {})

    @property
    def validations(self) -> list[Event]:
        """Return the validations, each number once, in order."""
        return [e for e in self.events if e["event"] == "validation"]

    @property
    def finished(self) -> Event | None:
        """Return the ``finished`` event of a run that ran to its end."""
        last = self.events[-1] if self.events else {}
        return last if last.get("event") == "finished" else None


def read_ledger(run_dir: str | Path) -> History:
    """Read the ledger of a run folder.

    Raises
    ------
    InputError
        If the folder or its ledger does not exist or holds no event.
    """
    run_dir = Path(run_dir)
    path = run_dir / FILE_NAME
    if not path.is_file():
        raise InputError(str(run_dir), f"has no {FILE_NAME}", "give a run folder, <run.dir>/<run.name>")
    events: list[Event] = []
    lines = read_lines(path)
    for event in (line.event for line in lines if line.event):
        if event["event"] == "resumed":
            events = [e for e in events if not _superseded(e, event)]
        events.append(event)
    if not events:
        raise InputError(str(path), "holds no event", "was the run started? train it again")
    return History(run_dir, events, [line.number for line in lines if line.event is None])


def sealed_run_id(run_dir: Path) -> str | None:
    """Return the id that the run was started with, None if the ledger does not say so beyond doubt."""
    try:
        first = read_lines(run_dir / FILE_NAME)[0]
    except (OSError, IndexError):
        return None
    if first.event is None or first.event["event"] != "start" or first.seal != seal("", first.content):
        return None
    run_id = first.event.get("run_id")
    return run_id if isinstance(run_id, str) else None


def read_lines(path: Path) -> list[Line]:
    """Read every line of a ledger that is not empty, superseded ones as well."""
    texts = path.read_text(encoding="utf-8", errors="replace").split("\n")
    return [Line(number, text, _event(text)) for number, text in enumerate(texts, start=1) if text]


def _unwritable(path: Path, error: OSError) -> InputError:
    problem = f"cannot be written ({error.strerror or error})"
    return InputError(str(path), problem, "free space or fix the permissions and start again")


def _event(text: str) -> Event | None:
    try:
        event = decode(text)
    except (ValueError, RecursionError):
        return None
    event.pop("seal", None)
    return event


def _misses(text: str) -> int:
    """Count the letters that differ from what a line ends in."""
    if len(text) < len(_END):
        return len(_END)
    return sum(c not in "0123456789abcdef" if due == "#" else c != due for c, due in zip(text, _END, strict=True))


def _superseded(event: Event, resumed: Event) -> bool:
    if event["event"] == "finished":
        return True
    return event["event"] == "validation" and event["validation"] > resumed["last_validation"]


def to_json(value: Any) -> Any:
    """Return a value that JSON can hold: NaN and infinities become the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, dict):
        return {str(k): to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """Turn the strings for non-finite numbers into floats again."""
    if isinstance(value, str) and value in {"nan", "inf", "-inf"}:
        return float(value)
    if isinstance(value, dict):
        return {k: from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return value
