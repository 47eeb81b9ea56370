"""The ledger: append-only JSON lines, one event each, the source of truth of a run.

A line is complete when it ends in a newline; a torn last line (the machine died while writing) is ignored. Nothing is
ever truncated: after a requeue from an older checkpoint, a ``resumed`` event names the last validation that was kept,
and readers drop what came between.
"""

from __future__ import annotations

import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distplateau.errors import InputError

FILE_NAME = "ledger.jsonl"
Event = dict[str, Any]

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
# What readers go by: without it a damaged line cannot be placed.
_NUMBERED = {"validation": "validation", "resumed": "last_validation"}


def encode(event: Event) -> str:
    """Write an event as one JSON line; NaN and infinities become the strings ``"nan"``, ``"inf"``, ``"-inf"``."""
    return json.dumps(_to_json(event), allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def decode(line: str) -> Event:
    """Read one line back; the strings for non-finite numbers become floats again.

    Raises
    ------
    ValueError
        If the line is not a JSON object with an ``event``, or a validation without its number.
    """
    event = json.loads(line)
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        raise ValueError("not an event")
    numbered = _NUMBERED.get(event["event"])
    if numbered and not isinstance(event.get(numbered), int):
        raise ValueError(f"{event['event']} without {numbered}")
    return {key: value if key in _AS_WRITTEN else _from_json(value) for key, value in event.items()}


class Ledger:
    """The writing end. Main rank only.

    Parameters
    ----------
    run_dir
        The run folder; it exists.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE_NAME
        self._seal_torn_line()

    def append(self, event: str, **fields: Any) -> Event:
        """Add one event, flushed to the disk before this returns; ``time`` (Unix seconds) is added."""
        line = {"event": event, **fields, "time": round(time.time(), 3)}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(encode(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line

    def _seal_torn_line(self) -> None:
        """End a torn last line, so that the next event does not become its tail."""
        if self.path.exists() and self.path.stat().st_size:
            with self.path.open("rb+") as file:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")


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
    torn: list[int] = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").split("\n"), start=1):
        if not line:
            continue
        try:
            event = decode(line)
        except ValueError:
            torn.append(number)
            continue
        if event["event"] == "resumed":
            events = [e for e in events if not _superseded(e, event)]
        events.append(event)
    if not events:
        raise InputError(str(path), "holds no event", "was the run started? train it again")
    return History(run_dir, events, torn)


def _superseded(event: Event, resumed: Event) -> bool:
    if event["event"] == "finished":
        return True
    return event["event"] == "validation" and event["validation"] > resumed["last_validation"]


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {math.inf: "inf", -math.inf: "-inf"}.get(value, "nan")
    if isinstance(value, dict):
        return {str(k): _to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_to_json(v) for v in value]
    return value


def _from_json(value: Any) -> Any:
    if isinstance(value, str) and value in {"nan", "inf", "-inf"}:
        return float(value)
    if isinstance(value, dict):
        return {k: _from_json(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_from_json(v) for v in value]
    return value
