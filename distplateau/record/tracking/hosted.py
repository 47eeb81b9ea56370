"""The report as a hosted W&B Report: made once, and updated in place whenever the command is repeated.

The server is asked first, with time limits, whether the runs are there and whether it holds their report already. The
client that saves it knows no limit, and works in a process of its own that is ended when it takes too long.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import textwrap
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from distplateau.errors import InputError
from distplateau.record.ledger import History, read_ledger
from distplateau.record.report.comparison import common_folder
from distplateau.record.story import run_name
from distplateau.record.tracking.backend import Backend, Unavailable, View, app_url, connect
from distplateau.record.tracking.rows import durable_validation
from distplateau.record.tracking.sync import describe
from distplateau.record.words import plain, plural

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distplateau.record.tracking.mirror import Job

# The client takes no longer title.
_MAX_TITLE = 128
NOTE = "wandb-report.json"
# Seconds for the client to save a report: its start takes up to 10 on a busy machine.
_SAVE_LIMIT = 60.0
_COMMAND = (
    # The client makes folders at import that only an orderly end of the interpreter would remove.
    "import os, sys, tempfile; tempfile.tempdir = os.getcwd(); sys.path.append({folder!r}); "
    "from distplateau.record.tracking.hosted_page import main; main()"
)


@dataclass(frozen=True)
class Hosted:
    """What became of it.

    Parameters
    ----------
    created
        Whether the report is new, not an update of one that was there.
    remarks
        What a reader of the report should know.
    """

    url: str
    created: bool
    remarks: list[str] = field(default_factory=list)


def check_installed() -> None:
    """Raise `InputError` without the package that writes hosted reports."""
    if find_spec("wandb_workspaces") is None:
        fix = "pip install 'distplateau[report]'"
        raise InputError("report --wandb", "the package wandb-workspaces is not installed", fix)


def host_report(run_dirs: Sequence[Path], out: Path | None = None, sweep: Path | None = None) -> Hosted:
    """Save the report of a run, or the comparison of several, on the server; no torch, one process calls it.

    Parameters
    ----------
    out
        Folder of the note that says where the comparison of several runs lies; by default the one they lie in.
    sweep
        The folder that stands for these runs, if one does: its report stays the same when runs are added.

    Raises
    ------
    InputError
        If the package or the API key is missing, a folder is no run, the runs are not of one project, or a run was
        not uploaded.
    Unavailable
        If the server does not answer, or refuses.
    """
    check_installed()
    histories = [read_ledger(run_dir) for run_dir in run_dirs]
    jobs = [describe(history) for history in histories]
    backend = connect()
    if backend is None:
        raise InputError("WANDB_API_KEY", "there is no API key", "run `wandb login`, or set WANDB_API_KEY")
    project, entity = _owner(jobs, backend.probe(timeout=5))
    entity, remarks = _look_for_runs(backend, histories, jobs, (project, entity))
    marker = _marker(histories, jobs, sweep)
    note = _Note(run_dirs[0] if len(run_dirs) == 1 else out or common_folder(run_dirs), marker)
    place = {"server": backend.base_url, "entity": entity, "project": project}
    found = _find(backend.views(project, entity), note.read(place), marker)
    title = (found.title[:_MAX_TITLE] if found else "") or _title(histories, sweep)
    request = {
        "run_dirs": [str(Path(run_dir).resolve()) for run_dir in run_dirs],
        "run_ids": list(dict.fromkeys(job.run_id for job in jobs)),
        "entity": entity,
        "project": project,
        "title": title,
        "description": f"Made by distplateau from the ledger of {plural(len(run_dirs), 'run')} [{marker}]",
        "view_id": found.view_id if found else "",
    }
    view_id = _save(backend, request)
    url = f"{app_url(backend.base_url)}/{quote(entity)}/{quote(project)}/reports/{_slug(title)}--{view_id.rstrip('=')}"
    remarks += note.write({**place, "id": view_id, "url": url})
    return Hosted(url, created=found is None, remarks=remarks)


def _owner(jobs: Sequence[Job], default_entity: str) -> tuple[str, str]:
    """Return the one project and entity of the runs."""
    owners = sorted({(job.project, job.entity or default_entity) for job in jobs})
    if len(owners) > 1:
        told = ", ".join(f"{entity}/{project}" for project, entity in owners)
        fix = "give runs with the same tracking.project and tracking.entity"
        raise InputError("report --wandb", f"the runs are of different projects ({told})", fix)
    return owners[0]


def _look_for_runs(
    backend: Backend, histories: Sequence[History], jobs: Sequence[Job], owner: tuple[str, str]
) -> tuple[str, list[str]]:
    """Return the entity as the server writes it, and which runs it does not hold whole."""
    project, entity = owner
    remarks = []
    for history, job in zip(histories, jobs, strict=True):
        resolved, lines = backend.presence(project, entity, job.run_id)
        if lines is None:
            problem = f"the run is not on {backend.base_url} ({entity}/{project}/{job.run_id})"
            raise InputError(str(history.run_dir), problem, f"run `distplateau sync {history.run_dir}` first")
        durable = durable_validation(history)
        expected = sum(event["validation"] <= durable for event in history.validations)
        if lines < expected:
            missing = f"the server holds {lines:,} of {plural(expected, 'validation')} of {run_name(history)}"
            remarks.append(f"{missing}; `distplateau sync {history.run_dir}` brings the rest")
        entity = resolved or entity
    return entity, remarks


def _marker(histories: Sequence[History], jobs: Sequence[Job], sweep: Path | None) -> str:
    """Return what tells this report from every other in its description, wherever the run folders are moved."""
    if sweep is not None and len(jobs) > 1:
        # Runs are added to a sweep; the one that was started first stays.
        pairs = zip(histories, jobs, strict=True)
        first = min((history.start.get("time", 0.0), job.run_id) for history, job in pairs)
        said = ["sweep", first[1]]
    else:
        said = ["runs", *sorted({job.run_id for job in jobs})]
    return f"distplateau:{hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]}"


def _title(histories: Sequence[History], sweep: Path | None) -> str:
    """Name a report so that the same command gives the same name: after its run, its sweep, or its first runs."""
    names = [plain(run_name(history)).strip() or "run" for history in histories]
    subject = names[0] if len(names) == 1 else f"{', '.join(names[:3])}{' and more' * (len(names) > 3)}"
    if sweep is not None and len(names) > 1:
        subject = plain(sweep.resolve().name).strip() or subject
    ending = " · distplateau"
    room = _MAX_TITLE - len(ending)
    return f"{subject if len(subject) <= room else f'{subject[: room - 1]}…'}{ending}"


def _find(views: Sequence[View], noted: str, marker: str) -> View | None:
    """Return the report of before: the noted one, or if that is gone the oldest with the marker."""
    by_id = [view for view in views if noted and view.view_id == noted]
    marked = [view for view in views if f"[{marker}]" in view.description]
    return next(iter([*by_id, *marked]), None)


def _save(backend: Backend, request: dict[str, Any]) -> str:
    """Save a report with the real client, in a process that is ended if it hangs; return the report's id."""
    with tempfile.TemporaryDirectory(prefix="distplateau-report-", ignore_cleanup_errors=True) as folder:
        answer = Path(folder, "answer.json")
        environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
        with Path(folder, "log").open("wb") as log:
            # Files, not pipes: the client's service holds them open for a while after the client has gone.
            process = subprocess.Popen(
                [sys.executable, "-c", _COMMAND.format(folder=str(Path(__file__).parents[3]))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**environment, "WANDB_DIR": folder, "WANDB_CACHE_DIR": folder, "OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
            try:
                process.communicate(json.dumps({**request, "answer": str(answer)}).encode(), timeout=_SAVE_LIMIT)
            except subprocess.TimeoutExpired:
                took = f"did not take the report within {_SAVE_LIMIT:.0f} s"
                raise Unavailable(f"{backend.base_url} {took}") from None
            finally:
                process.kill()
                process.wait()
        try:
            said = json.loads(answer.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            last = Path(folder, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
            said = {"problem": "; ".join([f"died with exit code {process.returncode}", *last])}
    if "problem" in said:
        raise Unavailable(f"the wandb client: {textwrap.shorten(backend.redact(plain(said['problem'])), 200)}")
    return str(said["id"])


def _slug(title: str) -> str:
    """Write a title as the server's pages do in their addresses."""
    return quote(re.sub(r"-+", "-", re.sub(r"\W", "-", title)).strip("-"))


class _Note:
    """Where the reports of a folder lie on the server; a convenience, they are found without it."""

    def __init__(self, folder: Path, marker: str) -> None:
        self._path, self._marker = folder / NOTE, marker

    def read(self, place: dict[str, str]) -> str:
        """Return the id of the report in this place, empty without one."""
        entry = self._all().get(self._marker)
        if not isinstance(entry, dict) or any(entry.get(key) != value for key, value in place.items()):
            return ""
        return str(entry.get("id") or "")

    def write(self, entry: dict[str, str]) -> list[str]:
        """Remember the report; return what there is to say if that fails."""
        partial = self._path.with_name(f".partial-{NOTE}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({**self._all(), self._marker: entry}, indent=1), encoding="utf-8")
            partial.replace(self._path)
        except OSError as error:
            return [f"{self._path} cannot be written ({error.strerror}); the report will be found by its description"]
        return []

    def _all(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            notes = json.loads(self._path.read_text(encoding="utf-8"))
            return notes if isinstance(notes, dict) else {}
        return {}
