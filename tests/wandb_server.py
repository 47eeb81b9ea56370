"""A local stand-in for the wandb backend, for tests with the real client.

It keeps what the client sends (history rows by their offset, config, summary, files, alerts) and can be told to be
down, to hang, to answer 500 or 401, to die in the middle of a run and to come back with what it held.

Further GraphQL operations are added by name: ``server.operations["UpsertView"] = lambda server, variables: {...}``.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable

API_KEY = "5eadbeef" * 5
ENTITY = "somebody"
_OPERATION = re.compile(r"\b(?:query|mutation)\s+(\w+)")
# Without a "t" (telemetry) the client takes a run for one that cannot be resumed, and counts its steps from 0 again.
_RESUMABLE = '{"t": 1}'
# Nobody waits longer for an answer than a test lasts.
_LONGEST_HANG_SECONDS = 120.0
_CREATED = "2026-01-01T00:00:00"


@dataclass
class StoredRun:
    """What the server holds of one run."""

    entity: str
    project: str
    name: str
    display_name: str = ""
    group: str | None = None
    tags: list[str] = field(default_factory=list)
    host: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    alerts: list[dict[str, Any]] = field(default_factory=list)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def history(self) -> list[dict[str, Any]]:
        """Return the rows in the order of their offsets."""
        return [json.loads(line) for _, line in sorted(self.lines.get("wandb-history.jsonl", {}).items())]

    @property
    def validations(self) -> list[int]:
        """Return the validation number of every row: duplicates and gaps show."""
        return [row["validation"] for row in self.history if "validation" in row]

    def line_count(self, name: str) -> int:
        """Return how many lines of a streamed file are held."""
        return len(self.lines.get(name, {}))


@dataclass(frozen=True)
class Request:
    """One request as it came in."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes
    time: float


class WandbServer:
    """The server: ``with WandbServer() as server``, then give `environment` to the client.

    `entity` is who the API key belongs to.
    """

    def __init__(self, entity: str = ENTITY) -> None:
        self.entity = entity
        self.runs: dict[str, StoredRun] = {}
        self.views: dict[str, dict[str, Any]] = {}
        self.views_a_page = 100
        self.requests: list[Request] = []
        self.operations: dict[str, Callable[[WandbServer, dict[str, Any]], Any]] = dict(_OPERATIONS)
        self.unknown_operations: Counter[str] = Counter()
        self.lock = threading.RLock()
        self._faults: dict[str, str] = {}
        self._recovered = threading.Event()
        self._http: _Http | None = None
        self.come_back()

    def __enter__(self) -> WandbServer:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.behave()
        self.die()

    @property
    def url(self) -> str:
        """Return the address, the same after a return from the dead."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that lead the real client here."""
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": API_KEY, "WANDB_ERROR_REPORTING": "false"}

    @property
    def run(self) -> StoredRun:
        """Return the only run."""
        [run] = self.runs.values()
        return run

    def behave(self, how: str = "well", where: str = "everything") -> None:
        """Answer ``"well"``, with ``"500"`` or ``"401"``, or ``"hang"``.

        `where` is ``"graphql"``, ``"file_stream"``, ``"files"`` or ``"everything"``.
        """
        with self.lock:
            if where == "everything":
                self._faults.clear()
            self._faults[where] = how
            self._recovered.set()
            self._recovered = threading.Event()

    def die(self) -> None:
        """Stop listening and cut every connection; what was received stays."""
        if self._http is not None:
            http, self._http = self._http, None
            http.cut()

    def come_back(self) -> None:
        """Listen again, at the same port."""
        self._http = _Http(getattr(self, "port", 0), self)
        self.port = self._http.server_address[1]

    def count(self, operation: str) -> int:
        """Return how many requests of a GraphQL operation or of a path part came in."""
        return sum(operation.encode() in one.body or operation in one.path for one in list(self.requests))

    def received(self) -> bytes:
        """Return everything that came in but the header that the key belongs in."""
        parts = []
        for one in list(self.requests):
            headers = {name: value for name, value in one.headers.items() if name.lower() != "authorization"}
            parts += [one.path.encode(), json.dumps(headers).encode(), one.body]
        return b"\n".join(parts)

    # What the handler asks.

    def fault(self, where: str) -> str:
        with self.lock:
            return self._faults.get(where, self._faults.get("everything", "well"))

    def wait_for_recovery(self) -> None:
        self._recovered.wait(_LONGEST_HANG_SECONDS)

    def graphql(self, payload: dict[str, Any]) -> dict[str, Any]:
        found = _OPERATION.search(payload.get("query", ""))
        name = payload.get("operationName") or (found[1] if found else "")
        operation = self.operations.get(name)
        if operation is None:
            self.unknown_operations[name] += 1
            return {"errors": [{"message": f"the stand-in server does not know {name}"}], "data": None}
        with self.lock:
            return {"data": operation(self, payload.get("variables") or {})}

    def store_lines(self, name: str, body: dict[str, Any]) -> None:
        with self.lock:
            run = self.runs[name]
            for file, chunk in (body.get("files") or {}).items():
                lines = run.lines.setdefault(file, {})
                for place, line in enumerate(chunk["content"], start=chunk.get("offset") or 0):
                    lines[place] = line
                if file == "wandb-summary.json":
                    run.summary = json.loads(chunk["content"][-1])
            if body.get("complete"):
                run.exit_codes.append(body.get("exitcode", -1))

    def store_file(self, name: str, file: str, content: bytes) -> None:
        with self.lock:
            self.runs[name].files[file] = content


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, port: int, owner: WandbServer) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.owner = owner
        self.connections: set[socket.socket] = set()
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self._thread.start()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what these tests are about."""

    def cut(self) -> None:
        self.shutdown()
        self.socket.close()
        for connection in list(self.connections):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Http

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        owner = self.server.owner
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        with owner.lock:
            owner.requests.append(Request(self.command, self.path, dict(self.headers), body, time.time()))
        path = urlsplit(self.path).path
        where = "graphql" if path == "/graphql" else "file_stream" if path.endswith("/file_stream") else "files"
        fault = owner.fault(where)
        if fault == "hang":
            owner.wait_for_recovery()
            self.close_connection = True
            return
        if fault in {"500", "401"}:
            self._answer({"errors": [{"message": f"told to answer {fault}"}]}, int(fault))
        elif where != "files" and not self._knows_key():
            self._answer({"errors": [{"message": "invalid API key"}]}, 401)
        else:
            self._dispatch(path, where, body)

    def _dispatch(self, path: str, where: str, body: bytes) -> None:
        owner = self.server.owner
        if where == "graphql":
            self._answer(owner.graphql(json.loads(body)))
        elif where == "file_stream":
            owner.store_lines(unquote(path.split("/")[-2]), json.loads(body))
            self._answer({"exitcode": None, "limits": {}})
        elif path.startswith("/storage/"):
            _, _, run, file = path.split("/", 3)
            owner.store_file(unquote(run), unquote(file), body)
            self._answer({})
        else:
            self._answer({}, 200 if path in {"/", "/healthz"} else 404)

    def _knows_key(self) -> bool:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        return scheme == "Basic" and base64.b64decode(value).decode().endswith(f":{API_KEY}")

    def _answer(self, payload: Any, status: int = 200) -> None:
        content = json.dumps(payload).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Be silent."""


def _viewer(server: WandbServer, _variables: dict[str, Any]) -> dict[str, Any]:
    viewer = {
        "id": "1", "entity": server.entity, "username": server.entity, "email": "somebody@example.com", "admin": False,
        "flags": "{}", "teams": {"edges": [{"node": {"name": server.entity}}]},
    }  # fmt: skip
    return {"viewer": viewer}


def _resume_status(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables["name"])
    entity = variables.get("entity") or server.entity
    model = {"id": "1", "name": variables.get("project"), "entity": {"id": "1", "name": entity}}
    if run is None:
        return {"model": {**model, "bucket": None}}
    bucket = {
        "id": f"id-{run.name}", "name": run.name, "displayName": run.display_name, "tags": run.tags, "notes": None,
        "config": json.dumps(run.config), "summaryMetrics": json.dumps(run.summary), "wandbConfig": _RESUMABLE,
        "logLineCount": run.line_count("output.log"), "historyLineCount": run.line_count("wandb-history.jsonl"),
        "eventsLineCount": run.line_count("wandb-events.jsonl"), "historyTail": _tail(run, "wandb-history.jsonl"),
        "eventsTail": _tail(run, "wandb-events.jsonl"),
    }  # fmt: skip
    return {"model": {**model, "bucket": bucket}}


def _tail(run: StoredRun, file: str) -> str:
    lines = run.lines.get(file, {})
    return json.dumps([lines[max(lines)]] if lines else [])


def _upsert_bucket(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    name = variables.get("name") or variables["id"].removeprefix("id-")
    entity, project = variables.get("entity") or server.entity, variables.get("project") or "uncategorized"
    inserted = name not in server.runs
    run = server.runs.setdefault(name, StoredRun(entity, project, name))
    run.display_name = variables.get("displayName") or run.display_name
    run.group = variables.get("groupName") or run.group
    run.tags = variables.get("tags") or run.tags
    run.host = variables.get("host") or run.host
    if variables.get("config"):
        run.config = json.loads(variables["config"])
    if variables.get("summaryMetrics"):
        run.summary = json.loads(variables["summaryMetrics"])
    owner = {"id": "1", "name": run.project, "entity": {"id": "1", "name": run.entity}}
    bucket = {
        "id": f"id-{name}", "name": name, "displayName": run.display_name, "description": None,
        "config": json.dumps(run.config), "sweepName": None, "project": owner,
        "historyLineCount": run.line_count("wandb-history.jsonl"),
    }  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": inserted}}


def _create_run_files(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = variables["run"]
    files = [{"name": file, "uploadUrl": f"{server.url}/storage/{run}/{file}"} for file in variables["files"]]
    return {"createRunFiles": {"runID": run, "uploadHeaders": [], "files": files}}


def _alert(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    server.runs[variables["runName"]].alerts.append(variables)
    return {"notifyScriptableRunAlert": {"success": True}}


def _history_page(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    run = server.runs.get(variables["run"])
    if run is None:
        return {"project": {"run": None}}
    lines = [line for _, line in sorted(run.lines.get("wandb-history.jsonl", {}).items())]
    wanted = [line for line in lines if variables["minStep"] <= json.loads(line)["_step"] < variables["maxStep"]]
    return {"project": {"run": {"history": wanted[: variables["pageSize"]]}}}


def _projects(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    names = sorted({run.project for run in server.runs.values() if run.entity == variables["entity"]})
    nodes = [
        {
            "id": name,
            "name": name,
            "entityName": variables["entity"],
            "createdAt": _CREATED,
            "isBenchmark": False,
            "user": None,
        }
        for name in names
    ]
    edges = [{"node": node, "cursor": node["name"]} for node in nodes]
    return {"models": {"edges": edges, "pageInfo": {"endCursor": None, "hasNextPage": False}}}


def _internal_id(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    owner = (variables["entityName"], variables["projectName"])
    known = any((run.entity, run.project) == owner for run in server.runs.values())
    return {"project": {"id": "1", "internalId": "project-1"} if known else None}


def _upsert_view(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    """Store a report; an id that is not known is an error, as it is there."""
    view_id = variables.get("id")
    inserted = not view_id
    if inserted:
        # As ids are there: base64, with its padding.
        view_id = base64.b64encode(f"View:{len(server.views) + 1}".encode()).decode()
        created = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(1.7e9 + len(server.views)))
        server.views[view_id] = {"id": view_id, "createdAt": created}
    project = {"id": "1", "name": variables["projectName"], "entityName": variables["entityName"]}
    told = {key: variables[key] for key in ("type", "name", "displayName", "description", "spec")}
    server.views[view_id] |= {**told, "project": project, "updatedAt": _CREATED}
    return {"upsertView": {"view": server.views[view_id], "inserted": inserted}}


def _project_views(server: WandbServer, variables: dict[str, Any]) -> dict[str, Any]:
    owner = (variables["entity"], variables["project"])
    views = [
        view
        for view in server.views.values()
        if (view["project"]["entityName"], view["project"]["name"]) == owner and view["type"] == "runs"
    ]
    start = int(variables.get("reportCursor") or 0)
    end = start + min(variables["reportLimit"], server.views_a_page)
    page_info = {"endCursor": str(end), "hasNextPage": end < len(views)}
    edges = [{"node": view, "cursor": str(place)} for place, view in enumerate(views[start:end], start=start)]
    return {"project": {"allViews": {"edges": edges, "pageInfo": page_info}}}


_OPERATIONS: dict[str, Callable[[WandbServer, dict[str, Any]], Any]] = {
    "Viewer": _viewer,
    "RunResumeStatus": _resume_status,
    "UpsertBucket": _upsert_bucket,
    "ServerFeaturesQuery": lambda _server, _variables: {"serverInfo": {"features": []}},
    "OrganizationCoreWeaveOrganizationID": lambda _server, _variables: {
        "entity": {"organization": {"coreWeaveOrganizationId": None}}
    },
    "CreateRunFiles": _create_run_files,
    "NotifyScriptableRunAlert": _alert,
    "HistoryPage": _history_page,
    "GetProjects": _projects,
    "ProjectInternalId": _internal_id,
    "upsertView": _upsert_view,
    "ProjectViews": _project_views,
    "RunState": lambda server, variables: {
        "project": {"run": {"state": "finished" if server.runs[variables["run"]].exit_codes else "running"}}
    },
}
