"""Hosted reports against a stand-in server, with the real wandb client and wandb-workspaces."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
import shutil
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from distplateau.cli import main
from distplateau.config import dump_config, parse_config
from distplateau.record.ledger import Ledger, read_ledger
from distplateau.record.story import marked_changes, reason, summarize
from distplateau.record.tracking import hosted
from distplateau.record.tracking.backend import Backend, Unavailable
from distplateau.record.tracking.hosted import NOTE, host_report
from distplateau.record.words import TIMES_SIGN
from tracked import event
from wandb_server import API_KEY, StoredRun, WandbServer

pytest.importorskip("wandb_workspaces")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:wandb_workspaces.*")

HOSTILE = """a|b "c" 'd' `e` *f* _g_ <b>h</b> [i](http://j) $k$ \\ ~~l~~ &amp; #m"""


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server
        assert not server.unknown_operations


def record(folder, name="alpha", run_id="aaaa1111", *, patience=3, started=1000.0, **tracking):
    """Write what a run with one reduction leaves behind, and return its folder."""
    tree = {"run": {"name": "any", "dir": str(folder)}, "schedule": {"patience": patience}}
    config = parse_config({**tree, "tracking": {"wandb": "offline", "project": "tests", **tracking}})
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "config.toml").write_text(dump_config(config), encoding="utf-8")
    ledger = Ledger(run_dir)
    rule = {"mode": "min", "patience": patience, "factor": 0.1, "threshold": 1e-4, "threshold_mode": "rel"}
    start = {"run": name, "run_id": run_id, "schedule": {"name": "plateau", "rule": rule}, "hostname": "node7"}
    ledger.append("start", time=started, monitor="val/loss", lrs=[0.1, 0.2], **start)
    ledger.append("validation", **event(1))
    ledger.append("validation", **event(2, "reduced", lr_after=[0.01, 0.02], num_bad=0))
    ledger.append("validation", **event(3, lr_before=[0.01, 0.02], lr_after=[0.01, 0.02]))
    ledger.append("finished", seconds=3.0)
    return run_dir


def uploaded(server, run_dir, project="tests", entity=None):
    """Let the server hold a run, as `distplateau sync` would."""
    history = read_ledger(run_dir)
    lines = {place: json.dumps({"_step": place, **one}) for place, one in enumerate(history.validations)}
    name = history.start["run_id"]
    server.runs[name] = StoredRun(entity or server.entity, project, name, lines={"wandb-history.jsonl": lines})
    return run_dir


def report(capsys, *words):
    """Return exit code, standard output and standard error of the command."""
    capsys.readouterr()
    code = main(["report", "--wandb", *map(str, words)])
    return code, *capsys.readouterr()


def blocks(server, kind, view=None):
    [view] = [view] if view else server.views.values()
    return [block for block in json.loads(view["spec"])["blocks"] if block["type"] == kind]


def panels(server, kind=None, view=None):
    [grid] = blocks(server, "panel-grid", view)
    found = grid["metadata"]["panelBankSectionConfig"]["panels"]
    return [panel for panel in found if kind in {None, panel["viewType"]}]


def run_ids(server, view=None):
    [grid] = blocks(server, "panel-grid", view)
    [runset] = grid["metadata"]["runSets"]
    [leaf] = runset["filters"]["filters"]
    assert leaf["key"] == {"section": "run", "name": "name"} and leaf["op"] == "IN" and not leaf["disabled"]
    assert (runset["project"]["entityName"], runset["project"]["name"]) == (server.entity, "tests")
    return leaf["value"]


def assert_laid_out(found):
    """No panel lies on another, or below a gap."""
    corners = [panel["layout"] for panel in found]
    taken = [(one["x"] + x, one["y"] + y) for one in corners for x in range(one["w"]) for y in range(one["h"])]
    assert len(taken) == len(set(taken))
    assert {y for _, y in taken} == set(range(max(y for _, y in taken) + 1))
    assert max(x for x, _ in taken) < 24


def without_ids(spec):
    """Leave out the ids that the client draws anew for every panel."""
    return re.sub(r'"(__id__|id)":"\w+"', "", spec)


def words(block):
    return block.get("content") or "".join(child.get("text", "") for child in block["children"])


def tables(server, view=None):
    """Read the Markdown as a renderer does; return head and rows of each table, as text."""
    from markdown_it import MarkdownIt

    found = []
    for block in blocks(server, "markdown-block", view):
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(block["content"])
        assert tokens[0].type == "table_open" and tokens[-1].type == "table_close"
        cells = []
        for token in tokens:
            if token.type == "tr_open":
                cells.append([])
            if token.type == "inline":
                assert {child.type for child in token.children} <= {"text", "text_special"}, token.content
                cells[-1].append("".join(child.content for child in token.children))
        assert len({len(row) for row in cells}) == 1
        found.append(cells)
    return found


def test_a_run_that_was_synced_gets_its_report_and_keeps_its_address(server, tmp_path, capsys):
    run_dir = record(tmp_path)
    assert main(["sync", str(run_dir)]) == 0
    code, out, err = report(capsys, run_dir)
    assert (code, err) == (0, "")
    [local, made] = out.splitlines()
    assert local == f"report {run_dir / 'report.html'}"
    [view_id] = server.views
    assert made == f"created {server.url}/somebody/tests/reports/alpha-distplateau--{view_id.rstrip('=')}"
    before = without_ids(server.views[view_id]["spec"])

    code, out, err = report(capsys, run_dir)
    assert (code, err) == (0, "")
    assert out.splitlines()[1] == made.replace("created", "updated")
    assert list(server.views) == [view_id]
    assert server.count("upsertView") == 2
    assert without_ids(server.views[view_id]["spec"]) == before


def test_the_hosted_report_says_what_the_local_one_says(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    host_report([run_dir])
    history = read_ledger(run_dir)
    assert run_ids(server) == ["aaaa1111"]
    assert [words(block) for block in blocks(server, "heading")] == [
        "Losses and learning rate", "Learning rate changes", "Agreement", "Record"
    ]  # fmt: skip
    assert words(blocks(server, "paragraph")[1]) == summarize(history)
    assert "agreed on 2 ranks" in words(blocks(server, "paragraph")[-2])
    tiles, drops, facts = tables(server)
    assert tiles[1] == ["best val/loss", "0.3333", "validation 3, epoch 3"]
    assert ["reductions", "1", f"{TIMES_SIGN}0.1, patience 3"] in tiles
    assert drops[0] == ["validation", "learning rate", "", "epoch", "step", "val/loss", "best", "why"]
    why = reason(marked_changes(history)[0], history)
    assert drops[1:] == [["2", "0.1 → 0.01, 0.2 → 0.02", f"reduced {TIMES_SIGN}0.1", "2", "20", "0.5", "0.5", why]]
    assert ["Host", "node7"] in facts


def test_the_curves_and_values_are_those_that_the_mirror_writes(server, tmp_path):
    from distplateau.record.tracking.rows import rows, summary

    run_dir = uploaded(server, record(tmp_path))
    host_report([run_dir])
    lines = [panel["config"] for panel in panels(server, "Run History Line Plot")]
    assert [line["chartTitle"] for line in lines] == ["Losses", "Learning rate", "accuracy"]
    assert [line.get("yLogScale") for line in lines] == [None, True, None]
    assert [line["metrics"] for line in lines] == [
        ["val/loss", "train/loss"], ["lr/group0", "lr/group1"], ["val/accuracy"]
    ]  # fmt: skip
    scalars = [panel["config"] for panel in panels(server, "Scalar Chart")]
    assert [one["chartTitle"] for one in scalars] == ["best val/loss", "learning rate", "reductions"]
    assert len(panels(server, "Run Comparer")) == 1
    history = read_ledger(run_dir)
    held = set(rows(history)[1])
    assert {name for line in lines for name in [*line["metrics"], line["xAxis"]]} <= held
    assert {name for one in scalars for name in one["metrics"]} <= set(summary(history))
    assert_laid_out(panels(server))


def test_a_run_that_went_on_is_updated(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    first = host_report([run_dir])
    Ledger(run_dir).append("validation", **event(4, "reduced", lr_before=[0.01, 0.02], lr_after=[0.001, 0.002]))
    Ledger(run_dir).append("interrupted", step=40)
    second = host_report([run_dir])
    assert (first.created, second.created) == (True, False)
    assert first.url == second.url
    assert [row[0] for row in tables(server)[1][1:]] == ["2", "4"]
    [remark] = second.remarks
    assert remark == f"the server holds 3 of 4 validations of alpha; `distplateau sync {run_dir}` brings the rest"


@pytest.mark.parametrize("note", [None, "", "[1]", "{", '{"%s": 3}', '{"%s": {"id": "bm8="}}'])
def test_a_report_is_found_when_the_note_is_lost_or_damaged(server, tmp_path, note):
    run_dir = uploaded(server, record(tmp_path))
    first = host_report([run_dir])
    path = run_dir / NOTE
    [marker] = json.loads(path.read_text(encoding="utf-8"))
    path.unlink()
    if note is not None:
        path.write_text(note.replace("%s", marker), encoding="utf-8")
    # A moved folder is the same run.
    moved = run_dir.rename(tmp_path / "elsewhere")
    second = host_report([moved])
    assert (second.url, second.created) == (first.url, False)
    assert len(server.views) == 1


def test_the_note_finds_a_report_whose_description_was_changed(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    first = host_report([run_dir])
    [view] = server.views.values()
    view["description"] = "mine"
    assert host_report([run_dir]).url == first.url
    view["description"] = "mine"
    (run_dir / NOTE).unlink()
    assert host_report([run_dir]).created, "negative control: neither note nor description"


def test_a_title_given_on_the_server_is_kept(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    host_report([run_dir])
    [view] = server.views.values()
    view["displayName"] = "For the meeting: 50 % less?"
    url = host_report([run_dir]).url
    assert view["displayName"] == "For the meeting: 50 % less?"
    assert url.startswith(f"{server.url}/somebody/tests/reports/For-the-meeting-50-less--")
    assert host_report([run_dir]).url == url


def test_a_report_that_was_deleted_is_made_again(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    first = host_report([run_dir])
    server.views = {"b3RoZXI=": {**next(iter(server.views.values())), "id": "b3RoZXI=", "description": "another"}}
    second = host_report([run_dir])
    assert second.created and second.url != first.url
    assert not host_report([run_dir]).created


def test_a_note_counts_on_its_own_server_only(server, tmp_path, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    first = host_report([run_dir])
    [foreign] = server.views.values()
    with WandbServer() as other, monkeypatch.context() as patch:
        uploaded(other, run_dir)
        # Ids of servers of one's own are counted from 1: what has the noted id there is somebody else's.
        other.views = {foreign["id"]: {**foreign, "description": "of somebody else", "spec": "{}"}}
        patch.setenv("WANDB_BASE_URL", other.url)
        assert host_report([run_dir]).created
        assert other.views[foreign["id"]]["spec"] == "{}"
    assert host_report([run_dir]).url == first.url


def sweep_of(server, folder, count, start=0):
    return [
        uploaded(server, record(folder, f"run-{i}", f"run{i}run{i}", patience=2 + i, started=1000.0 + i))
        for i in range(start, start + count)
    ]


def test_several_runs_are_compared_on_one_page(server, tmp_path, capsys):
    sweep_of(server, tmp_path / "sweep", 3)
    code, out, err = report(capsys, tmp_path / "sweep")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].startswith(f"created {server.url}/somebody/tests/reports/sweep-distplateau--")
    assert (tmp_path / "sweep" / NOTE).exists()
    assert sorted(run_ids(server)) == ["run0run0", "run1run1", "run2run2"]
    compared, *drops = tables(server)
    assert compared[0][:4] == ["", "run", "schedule.patience", "val/loss"]
    assert [row[1] for row in compared[1:]] == ["run-0", "run-1", "run-2"]
    assert [row[2] for row in compared[1:]] == ["2", "3", "4"]
    assert [len(table) for table in drops] == [2, 2, 2]
    assert [words(block) for block in blocks(server, "heading") if block["level"] == 3] == ["run-0", "run-1", "run-2"]
    scalars = [panel["config"] for panel in panels(server, "Scalar Chart")]
    assert [one["groupAgg"] for one in scalars] == ["min", "min", "max"]
    assert all(panel["config"]["limit"] == 3 for panel in panels(server, "Run History Line Plot"))
    [parallel] = panels(server, "Parallel Coordinates Plot")
    columns = [column["accessor"] for column in parallel["config"]["columns"]]
    assert columns == ["config:schedule.value.patience", "summary:best"]
    assert_laid_out(panels(server))


@pytest.mark.slow
def test_a_sweep_keeps_its_report_when_runs_are_added(server, tmp_path, capsys):
    sweep = tmp_path / "sweep"
    sweep_of(server, sweep, 2)
    first = report(capsys, sweep)[1].splitlines()[-1]
    sweep_of(server, sweep, 1, start=2)
    assert report(capsys, sweep)[1].splitlines()[-1] == first.replace("created", "updated")
    (sweep / NOTE).unlink()
    assert report(capsys, sweep)[1].splitlines()[-1] == first.replace("created", "updated")
    assert len(run_ids(server)) == 3


@pytest.mark.slow
def test_different_reports_do_not_mix(server, tmp_path):
    server.views_a_page = 2
    a, b, c = sweep_of(server, tmp_path, 3)
    asked = [([a], None), ([b], None), ([a, b], None), ([a, c], None), ([a, b, c], None), ([a, b, c], tmp_path)]
    first = [host_report(runs, None, sweep) for runs, sweep in asked]
    assert all(one.created for one in first)
    assert len({one.url for one in first}) == len(asked) == len(server.views)
    for note in tmp_path.rglob(NOTE):
        note.unlink()
    again = [host_report(runs[::-1], None, sweep) for runs, sweep in asked]
    assert [one.url for one in again] == [one.url for one in first]
    assert [len(run_ids(server, view)) for view in server.views.values()] == [1, 1, 2, 2, 3, 3]


def test_names_are_shown_as_they_are(server, tmp_path):
    runs = [uploaded(server, record(tmp_path, HOSTILE.replace("/", "\N{DIVISION SLASH}"), "hhhh1111"))]
    runs.append(uploaded(server, record(tmp_path, "plain", "pppp1111")))
    url = host_report(runs).url
    assert re.fullmatch(r"[-\w:/.%]+", url)
    shown = tables(server)[0]
    assert HOSTILE.replace("/", "\N{DIVISION SLASH}") in [row[1] for row in shown]
    [view] = server.views.values()
    assert HOSTILE[:20] in view["displayName"]
    assert host_report(runs).url == url


def test_a_name_of_any_bytes_and_length_does_not_stop_the_report(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    text = (run_dir / "ledger.jsonl").read_text(encoding="utf-8")
    name = '"x\\ud800\\n\\u0007/?%' + 200 * "y" + '"'
    (run_dir / "ledger.jsonl").write_text(text.replace('"alpha"', name, 1), encoding="utf-8")
    url = host_report([run_dir]).url
    [view] = server.views.values()
    assert len(view["displayName"]) == 128
    assert view["displayName"].startswith("x?  /?%yyy")
    assert url.count("/") == 6
    assert not host_report([run_dir]).created


NAN = float("nan")


@pytest.mark.parametrize(
    ("events", "losses", "best"),
    [
        ([], ["val/loss", "train/loss"], "best value"),
        ([event(1, "nonfinite", value=NAN, train_loss=NAN, metrics={"val/loss": NAN})], None, "best val/loss"),
        (
            [event(1, monitor="val/accuracy", value=0.5, metrics={"val/accuracy": 0.5})],
            ["val/accuracy", "train/loss"],
            "best val/accuracy",
        ),
        ([event(1, "raised", lr_after=[0.2, 0.4])], ["val/loss", "train/loss"], "best val/loss"),
        ([event(1, "scheduled", lr_after=[0.0, 0.0])], ["val/loss", "train/loss"], "best val/loss"),
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_a_run_of_any_kind_has_a_page(tmp_path, events, losses, best, count):
    """Offline: what the client would send."""
    from wandb_workspaces.reports.v2 import interface as wr

    from distplateau.record.report.compared import load
    from distplateau.record.tracking.hosted_page import page

    ledger = Ledger(tmp_path)
    rule = {"mode": "min", "patience": 3, "factor": [0.1, 0.5], "threshold": 0.0}
    ledger.append("start", run="x", run_id="xxxx1111", schedule={"name": "plateau", "rule": rule})
    for one in events:
        ledger.append("validation", **one)
    model = wr.Report(project="p", entity="e", blocks=page(count * [load(tmp_path)], wr.Runset()))._to_model()
    spec = json.loads(model.spec.model_dump_json(by_alias=True, exclude_none=True))
    shown = panels(None, view={"spec": json.dumps(spec)})
    assert shown[0]["config"]["metrics"] == (losses or ["val/loss", "train/loss"])
    assert best in [panel["config"]["chartTitle"].split(" (")[0] for panel in shown if "Scalar" in panel["viewType"]]


def test_many_groups_are_drawn_by_a_pattern(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    text = (run_dir / "ledger.jsonl").read_text(encoding="utf-8")
    many = json.dumps([0.1 * (i + 1) for i in range(12)])
    text = re.sub(r'"lr_(before|after)":\s*\[[^\]]*\]', lambda found: f'"lr_{found[1]}": {many}', text)
    (run_dir / "ledger.jsonl").write_text(text, encoding="utf-8")
    host_report([run_dir])
    assert panels(server)[1]["config"]["metricRegex"] == "lr/group.*"


def one_line(err):
    [line] = err.splitlines()
    assert line.startswith("distplateau: ")
    return line


def test_a_missing_extra_is_said_before_anything_is_written(server, tmp_path, capsys, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    monkeypatch.setattr(hosted, "find_spec", lambda name: None if name == "wandb_workspaces" else importlib.util)
    code, out, err = report(capsys, run_dir)
    assert (code, out) == (2, "")
    assert "pip install 'distplateau[report]'" in one_line(err)
    assert not (run_dir / "report.html").exists()


def test_without_a_key(server, tmp_path, capsys, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    code, _, err = report(capsys, run_dir)
    assert code == 2
    assert "wandb login" in one_line(err)
    assert not server.requests


def test_a_key_in_netrc_and_an_offline_client_are_enough(server, tmp_path, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine {server.url.removeprefix('http://')}\n  login user\n  password {API_KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert host_report([run_dir]).created


@pytest.mark.parametrize("other", [{"project": "others"}, {"entity": "team"}])
def test_runs_of_different_projects(server, tmp_path, capsys, other):
    runs = [record(tmp_path), record(tmp_path, "beta", "bbbb1111", **other)]
    code, _, err = report(capsys, *runs)
    assert code == 2
    assert "different projects" in one_line(err)
    assert "somebody/tests" in err
    assert not server.views


def test_a_run_whose_entity_is_named_is_of_the_same_project_as_one_without(server, tmp_path):
    runs = [record(tmp_path), record(tmp_path, "beta", "bbbb1111", entity=server.entity)]
    for run_dir in runs:
        uploaded(server, run_dir)
    assert host_report(runs).created


def test_a_run_that_was_never_uploaded(server, tmp_path, capsys):
    there, missing = uploaded(server, record(tmp_path)), record(tmp_path, "beta", "bbbb1111")
    code, _, err = report(capsys, there, missing)
    assert code == 2
    assert f"`distplateau sync {missing}` first" in one_line(err)
    assert not server.views


def test_a_ledger_without_a_run_id(server, tmp_path, capsys):
    run_dir = record(tmp_path, run_id="")
    assert report(capsys, run_dir)[0] == 2


@pytest.mark.parametrize(
    ("fault", "said", "limit"),
    [
        ("down", "connection failed", 5),
        pytest.param("hang", "timed out", 12, marks=pytest.mark.slow),
        pytest.param("500", "answers 500", 5, marks=pytest.mark.slow),
        pytest.param("401", "refuses the API key", 5, marks=pytest.mark.slow),
    ],
)
def test_a_server_that_cannot_be_used_is_one_line_in_limited_time(server, tmp_path, capsys, fault, said, limit):
    run_dir = uploaded(server, record(tmp_path))
    report(capsys, run_dir)
    if fault == "down":
        server.die()
    else:
        server.behave(fault)
    start = time.monotonic()
    code, out, err = report(capsys, run_dir)
    took = time.monotonic() - start
    assert code == 1
    assert said in one_line(err)
    assert "run the same command again later" in err
    assert out.splitlines() == [f"report {run_dir / 'report.html'}"], "the local page needs no server"
    assert took < limit
    server.behave()
    if fault == "down":
        server.come_back()
    assert report(capsys, run_dir)[0] == 0
    assert len(server.views) == 1


@pytest.mark.parametrize(
    "fault", ["401", *(pytest.param(fault, marks=pytest.mark.slow) for fault in ("die", "hang", "500"))]
)
def test_an_outage_while_the_report_is_saved_is_limited_too(server, tmp_path, capsys, monkeypatch, fault):
    run_dir = uploaded(server, record(tmp_path))
    monkeypatch.setattr(hosted, "_SAVE_LIMIT", 8.0)
    plain = server.operations["ProjectInternalId"]

    def then_fail(server, variables):
        server.behave("hang" if fault == "die" else fault)
        return plain(server, variables)

    server.operations["ProjectInternalId"] = then_fail
    if fault == "die":
        server.operations["ProjectInternalId"] = lambda server, _variables: server.die()
    start = time.monotonic()
    code, _, err = report(capsys, run_dir)
    assert time.monotonic() - start < 16
    assert code == 1
    assert "the hosted report was not saved" in one_line(err)
    assert API_KEY not in err
    assert not server.views
    assert_no_process_left()
    server.operations["ProjectInternalId"] = plain
    server.behave()
    if fault == "die":
        server.come_back()
    assert report(capsys, run_dir)[0] == 0


def assert_no_process_left():
    """Neither the client nor its service stays behind, in the folder that both work in."""
    deadline = time.monotonic() + 15
    while left := [link for link in map(working_folder, Path("/proc").glob("[0-9]*/cwd")) if link]:
        assert time.monotonic() < deadline, left
        time.sleep(0.2)


def working_folder(link):
    try:
        folder = str(link.readlink())
    except OSError:
        return ""
    # Of this machine's processes, those of this test: a report made beside it has another parent.
    return folder if "distplateau-report-" in folder and os.environ["WANDB_BASE_URL"] in environment(link) else ""


def environment(link):
    try:
        return (link.parent / "environ").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def test_a_client_that_cannot_start_says_why(server, tmp_path, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    monkeypatch.setattr(hosted, "_COMMAND", "raise ImportError('no such name')  # {folder}")
    with pytest.raises(Unavailable, match="exit code 1; ImportError: no such name"):
        host_report([run_dir])


def test_the_key_is_written_and_printed_nowhere(server, tmp_path, capsys, monkeypatch):
    home, work = tmp_path / "home", tmp_path / "work"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    # What the client writes there is kept to be searched.
    work.mkdir()
    kept = SimpleNamespace(TemporaryDirectory=lambda **_options: nullcontext(str(work)))
    monkeypatch.setattr(hosted, "tempfile", kept)
    run_dir = uploaded(server, record(tmp_path / "runs"))
    code, out, err = report(capsys, run_dir)
    assert code == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {run_dir / NOTE, work / "answer.json", work / "log"} <= set(files)
    for path in files:
        assert API_KEY.encode() not in path.read_bytes(), path
    assert API_KEY not in out + err
    assert API_KEY.encode() not in server.received()
    assert any(API_KEY in str(os.environ.get(name)) for name in os.environ), "negative control: there is one"


def test_what_others_say_is_told_without_the_key(server, tmp_path, monkeypatch):
    run_dir = uploaded(server, record(tmp_path))
    monkeypatch.setattr(hosted, "_COMMAND", "import os; exit('key ' + os.environ['WANDB_API_KEY'])  # {folder}")
    with pytest.raises(Unavailable, match=r"key \[key\]"):
        host_report([run_dir])
    assert Backend(server.url, "secret").redact("a secret b") == "a [key] b"


def test_a_folder_that_takes_no_note_is_no_failure(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    (run_dir / NOTE).mkdir()
    first, second = host_report([run_dir]), host_report([run_dir])
    assert "cannot be written" in first.remarks[0]
    assert first.url == second.url


def test_a_copy_of_a_run_is_the_same_run(server, tmp_path):
    run_dir = uploaded(server, record(tmp_path))
    shutil.copytree(run_dir, tmp_path / "copy")
    first = host_report([run_dir])
    assert host_report([tmp_path / "copy"]).url == first.url


@pytest.mark.skipif(
    not (os.environ.get("WANDB_API_KEY") and os.environ.get("DISTPLATEAU_WANDB_LIVE")),
    reason="set WANDB_API_KEY and DISTPLATEAU_WANDB_LIVE=1 to try the real service",
)
def test_the_real_service(tmp_path, capsys):
    """Opt-in: a run and a report in the project "tests" of whoever the key belongs to."""
    run_dir = record(tmp_path, run_id=secrets.token_hex(4), started=time.time())
    assert main(["sync", str(run_dir)]) == 0
    code, out, err = report(capsys, run_dir)
    assert (code, err) == (0, "")
    made = out.splitlines()[-1]
    (run_dir / NOTE).unlink()
    code, out, err = report(capsys, run_dir)
    assert (code, err) == (0, "")
    assert out.splitlines()[-1] == made.replace("created", "updated")
