"""Questions to a wandb server, each with a time limit: who am I, what is there, send this alert.

The client's own ways wait for minutes, and report success where there was none; what has arrived is asked here.
"""

from __future__ import annotations

import json
import netrc
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from distplateau.record.tracking.rows import Alert

_PAGE = 500
_VIEWS_A_PAGE = 100
# The server sends the same title once within this time, whatever becomes of our own notes. Milliseconds, as the client
# sends them; 30 days.
_ALERT_WAIT = 30 * 24 * 3600 * 1000
# The hosted service has had two addresses; a key in netrc may stand under the older one.
_CLASSIC_URL = "https://api.wandb.ai"
_HOSTED_URLS = {_CLASSIC_URL, "https://api.forge.coreweave.com"}

_VIEWER = "query Viewer { viewer { id entity username } }"
_STATUS = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) {
    name entity { name }
    bucket(name: $name, missingOk: true) { name historyLineCount historyTail summaryMetrics }
  }
}"""
_HISTORY = """query HistoryPage($entity: String!, $project: String!, $run: String!,
                  $minStep: Int64!, $maxStep: Int64!, $pageSize: Int!) {
  project(name: $project, entityName: $entity) {
    run(name: $run) { history(minStep: $minStep, maxStep: $maxStep, samples: $pageSize) }
  }
}"""
_VIEWS = """query ProjectViews($project: String!, $entity: String!, $reportCursor: String, $reportLimit: Int!) {
  project(name: $project, entityName: $entity) {
    allViews(viewType: "runs", first: $reportLimit, after: $reportCursor) {
      edges { node { id displayName description createdAt } }
      pageInfo { endCursor hasNextPage }
    }
  }
}"""
_ALERT = """mutation NotifyScriptableRunAlert($entityName: String!, $projectName: String!, $runName: String!,
    $title: String!, $text: String!, $severity: AlertSeverity = INFO, $waitDuration: Duration) {
  notifyScriptableRunAlert(input: {entityName: $entityName, projectName: $projectName, runName: $runName,
    title: $title, text: $text, severity: $severity, waitDuration: $waitDuration}) { success }
}"""


class Unavailable(Exception):  # noqa: N818 - a state of the server, not a mistake of anybody here
    """The server cannot be used now, and why."""


@dataclass(frozen=True)
class Holding:
    """What the server holds of a run.

    Parameters
    ----------
    rows
        History rows in their order, only those of validations.
    summary
        The run's summary.
    entity
        Who the run belongs to, resolved by the server.
    """

    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    entity: str

    @property
    def validations(self) -> list[int]:
        """Return the validation number of each row."""
        return [int(row["validation"]) for row in self.rows]


@dataclass(frozen=True)
class View:
    """A report on the server: its id, its title, and what stands under the title."""

    view_id: str
    title: str
    description: str
    created: str


class Backend:
    """A wandb server and a key for it.

    Parameters
    ----------
    base_url
        Address of the API, such as ``https://api.wandb.ai``.
    key
        The API key.
    """

    def __init__(self, base_url: str, key: str) -> None:
        import requests

        self.base_url = base_url.rstrip("/")
        self._session = requests.Session()
        # Given for each request: a netrc entry of the host must not take its place.
        self._session.auth = self._auth = ("api", key)

    def probe(self, timeout: float = 2.0) -> str:
        """Return the entity that the key belongs to, or raise `Unavailable` within about `timeout` seconds."""
        viewer = self._ask(_VIEWER, {}, timeout).get("viewer")
        if not viewer:
            raise Unavailable("the API key is not known there")
        return str(viewer.get("entity") or viewer.get("username") or "")

    def holding(self, project: str, entity: str | None, run_id: str, timeout: float = 10.0) -> Holding:
        """Return what the server holds of a run; empty for a run that it does not know.

        Raises
        ------
        Unavailable
            If one of the answers takes longer than `timeout` seconds, or is none.
        """
        try:
            return self._holding(project, entity, run_id, timeout)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise Unavailable(f"{self.base_url} does not answer like a wandb server ({error!r})") from None

    def _holding(self, project: str, entity: str | None, run_id: str, timeout: float) -> Holding:
        status = self._ask(_STATUS, {"project": project, "entity": entity, "name": run_id}, timeout).get("model") or {}
        owner, bucket = str((status.get("entity") or {}).get("name") or entity or ""), status.get("bucket")
        if not bucket:
            return Holding([], {}, owner)
        lines = self._history(owner, project, run_id, _last_step(bucket), timeout)
        count = int(bucket.get("historyLineCount") or 0)
        if len(lines) < count:
            # To send now what cannot be seen yet would double it.
            raise Unavailable(f"{self.base_url} shows only {len(lines)} of {count} rows so far")
        held = [row for row in lines if isinstance(row.get("validation"), int | float)]
        return Holding(held, json.loads(bucket.get("summaryMetrics") or "{}"), owner)

    def presence(self, project: str, entity: str | None, run_id: str, timeout: float = 10.0) -> tuple[str, int | None]:
        """Return the entity that a project belongs to, and how many rows of a run are there; None without the run."""
        try:
            answer = self._ask(_STATUS, {"project": project, "entity": entity, "name": run_id}, timeout)
            status = answer.get("model") or {}
            owner, bucket = str((status.get("entity") or {}).get("name") or entity or ""), status.get("bucket")
            return owner, int(bucket.get("historyLineCount") or 0) if bucket else None
        except (ValueError, TypeError, AttributeError) as error:
            raise Unavailable(f"{self.base_url} does not answer like a wandb server ({error!r})") from None

    def views(self, project: str, entity: str, timeout: float = 10.0) -> list[View]:
        """Return the reports of a project, the oldest first."""
        found: list[View] = []
        cursor = None
        while True:
            variables = {"project": project, "entity": entity, "reportCursor": cursor, "reportLimit": _VIEWS_A_PAGE}
            try:
                page = (self._ask(_VIEWS, variables, timeout).get("project") or {}).get("allViews") or {}
                nodes = [edge["node"] for edge in page.get("edges") or []]
                keys = ("id", "displayName", "description", "createdAt")
                found += [View(*(str(node.get(key) or "") for key in keys)) for node in nodes]
                further = page.get("pageInfo") or {}
                before, cursor = cursor, further.get("endCursor")
            except (TypeError, AttributeError, KeyError) as error:
                raise Unavailable(f"{self.base_url} does not answer like a wandb server ({error!r})") from None
            if not further.get("hasNextPage") or cursor in {None, before}:
                return sorted(found, key=lambda view: view.created)

    def redact(self, text: str) -> str:
        """Take the key out of what somebody else wrote."""
        return text.replace(self._auth[1], "[key]")

    def alert(self, project: str, entity: str, run_id: str, alert: Alert, timeout: float = 3.0) -> None:
        """Send an alert of a run."""
        names = {"entityName": entity, "projectName": project, "runName": run_id}
        said = {"title": alert.title, "text": alert.text, "severity": alert.level, "waitDuration": _ALERT_WAIT}
        answer = self._ask(_ALERT, {**names, **said}, timeout)
        if not (answer.get("notifyScriptableRunAlert") or {}).get("success"):
            raise Unavailable("the alert was not taken")

    def _history(self, entity: str, project: str, run_id: str, last_step: int, timeout: float) -> list[dict[str, Any]]:
        """Read all rows, a page of steps at a time."""
        rows: list[dict[str, Any]] = []
        for start in range(0, last_step + 1, _PAGE):
            variables = {
                "entity": entity, "project": project, "run": run_id,
                "minStep": start, "maxStep": start + _PAGE, "pageSize": _PAGE,
            }  # fmt: skip
            run = (self._ask(_HISTORY, variables, timeout).get("project") or {}).get("run") or {}
            rows += [json.loads(line) for line in run.get("history") or []]
        return rows

    def _ask(self, query: str, variables: dict[str, Any], timeout: float) -> dict[str, Any]:
        import requests

        body = {"query": query, "variables": variables}
        try:
            response = self._session.post(f"{self.base_url}/graphql", json=body, timeout=timeout)
        except requests.RequestException as error:
            raise Unavailable(f"no answer from {self.base_url} ({_reason(error)})") from None
        if response.status_code in {401, 403}:
            raise Unavailable(f"{self.base_url} refuses the API key ({response.status_code})")
        if not response.ok:
            raise Unavailable(f"{self.base_url} answers {response.status_code}")
        try:
            answer = response.json()
            data, errors = answer.get("data"), answer.get("errors")
        except (ValueError, AttributeError):
            raise Unavailable(f"{self.base_url} does not answer like a wandb server") from None
        if data is None or errors:
            message = errors[0].get("message") if errors else "no data"
            raise Unavailable(f"{self.base_url} says: {' '.join(str(message).split())[:200]}")
        return data


def connect() -> Backend | None:
    """Return the server that the user is logged in to, None without a key.

    The key is looked for where the client does: ``WANDB_API_KEY``, then netrc.
    """
    url = server_url()
    key = os.environ.get("WANDB_API_KEY", "").strip() or _netrc_key(url)
    return Backend(url, key) if key else None


def server_url() -> str:
    """Return the address of the API that the client would use."""
    import wandb

    return os.environ.get("WANDB_BASE_URL") or str(wandb.setup().settings.base_url)


def app_url(base_url: str) -> str:
    """Return the address of the pages that people look at."""
    import wandb

    return str(getattr(wandb.Settings(base_url=base_url), "app_url", base_url)).rstrip("/")


def _last_step(bucket: dict[str, Any]) -> int:
    """Return the step of the newest row, -1 where there is none."""
    tail = json.loads(bucket.get("historyTail") or "[]")
    return int(json.loads(tail[-1]).get("_step", -1)) if tail else -1


def _netrc_key(url: str) -> str:
    path = Path(os.environ.get("NETRC") or "~/.netrc").expanduser()
    try:
        entries = netrc.netrc(path)
    except (OSError, netrc.NetrcParseError):
        return ""
    for address in (url, *([_CLASSIC_URL] if url in _HOSTED_URLS else [])):
        found = entries.authenticators(urlsplit(address).netloc)
        if found and found[2]:
            return found[2]
    return ""


def _reason(error: Exception) -> str:
    import requests

    if isinstance(error, requests.Timeout):
        return "timed out"
    if isinstance(error, requests.ConnectionError):
        return "connection failed"
    return type(error).__name__
