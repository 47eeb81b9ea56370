"""Uploading runs to a stand-in server with the real wandb client: never doubled, nothing dropped, always checked."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time

import pytest

from distplateau.cli import main
from distplateau.record.tracking.backend import Backend
from distplateau.record.tracking.mirror import UPLOAD_LOCK, lock_file
from distplateau.record.tracking.rows import rows
from distplateau.record.tracking.tracker import open_mirror
from tracked import RUN_ID, Recorder, drop
from wandb_server import API_KEY, WandbServer

pytest.importorskip("wandb")

CLIENT = """
import sys, wandb
settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_meta=True, x_disable_stats=True)
run = wandb.init(id="abcd1234", resume="allow", project="tests", dir=sys.argv[1], settings=settings)
for number in map(int, sys.argv[2:]):
    run.log({"validation": number, "val/loss": float("nan") if number == 2 else 1 / number})
run.summary["best"] = 0.25
run.finish()
"""


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        # Of tests before this one: the client of another program would go through it.
        monkeypatch.delenv("WANDB_SERVICE", raising=False)
        yield server


def client(folder, *numbers):
    """Log rows as somebody else's program would."""
    words = [sys.executable, "-c", CLIENT, str(folder), *map(str, numbers)]
    subprocess.run(words, check=True, timeout=60, capture_output=True)


def sync(capsys, *run_dirs):
    """Return exit code, standard output and standard error."""
    capsys.readouterr()
    code = main(["sync", *map(str, run_dirs)])
    return code, *capsys.readouterr()


def recorded(folder, validations=3, mode="offline", *, finished=True):
    recorder = Recorder(folder, mode)
    for number in range(1, validations + 1):
        if number == 2:
            recorder.ledger.append("validation", **drop(2))
        else:
            recorder.validate(number)
    if finished:
        recorder.finish()
    return recorder


def test_the_stand_in_server_holds_what_the_real_client_sends(server, tmp_path):
    client(tmp_path, 1, 2)
    client(tmp_path, 3)
    assert server.run.validations == [1, 2, 3]
    assert [row["_step"] for row in server.run.history] == [0, 1, 2]
    assert server.run.history[1]["val/loss"] != server.run.history[1]["val/loss"]
    assert server.run.summary["best"] == 0.25
    assert "config.yaml" in server.run.files
    assert not server.unknown_operations
    assert API_KEY.encode() not in server.received()


def test_a_run_is_uploaded_once_however_often_it_is_asked_for(server, tmp_path, capsys):
    recorder = recorded(tmp_path)
    mirror = open_mirror(recorder.config, RUN_ID)
    mirror.finish()
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, err) == (0, "")
    url = f"{server.url}/somebody/tests/runs/{RUN_ID}"
    assert out == f"tracked: 3 rows uploaded, 0 already there, 2 alerts sent -> {url}\n"
    run = server.run
    assert run.validations == [1, 2, 3]
    assert [row["_timestamp"] for row in run.history] == [pytest.approx(e["_timestamp"]) for e in wanted(recorder)]
    assert run.summary.items() >= {"reductions": 1, "final_lr": 0.1, "status": "finished"}.items()
    assert run.config["schedule"]["value"]["patience"] == 10
    assert run.exit_codes == [0]
    asked = server.count("UpsertBucket")
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, err) == (0, "")
    assert out == f"tracked: 0 rows uploaded, 3 already there -> {url}\n"
    assert server.count("UpsertBucket") == asked, "nothing to send: the run is not even opened"
    assert [alert["title"] for alert in run.alerts] == ["Learning rate reduced at validation 2", "Finished"]
    # wandb's own upload of the offline segment has nothing to do any more.
    [segment] = (recorder.run_dir / "wandb").glob("offline-run-*")
    assert (segment / f"run-{RUN_ID}.wandb.synced").exists()
    wandb_sync(segment)
    assert run.validations == [1, 2, 3]
    # Negative control: without the mark it doubles them, which is told.
    (segment / f"run-{RUN_ID}.wandb.synced").unlink()
    wandb_sync(segment)
    assert run.validations == [1, 2, 3, 1, 2, 3]
    code, out, _ = sync(capsys, recorder.run_dir)
    assert code == 0
    assert "validations 1, 2, 3 more than once there" in out


def wandb_sync(segment):
    # It leaves its logs where it is called.
    command = [sys.executable, "-m", "wandb", "sync", str(segment)]
    subprocess.run(command, cwd=segment.parent, check=True, capture_output=True, timeout=60)


def wanted(recorder):
    from distplateau.record.ledger import read_ledger

    return rows(read_ledger(recorder.run_dir)).values()


def test_what_is_there_already_is_not_sent_and_gaps_are_filled(server, tmp_path, capsys):
    """The server has rows 1 and 3: of a run that was online in part, of `wandb sync`, of an upload that was killed."""
    recorder = recorded(tmp_path, 4)
    client(tmp_path, 1, 3)
    code, out, _ = sync(capsys, recorder.run_dir)
    assert code == 0
    assert "2 rows uploaded, 2 already there" in out
    assert sorted(server.run.validations) == [1, 2, 3, 4]


def test_a_run_in_training_is_uploaded_up_to_its_checkpoint(server, tmp_path, capsys):
    recorder = recorded(tmp_path, 3, finished=False)
    assert sync(capsys, recorder.run_dir)[0] == 0
    assert not server.runs  # nothing is durable yet
    recorder.checkpoint(2)
    mirror = open_mirror(recorder.config, RUN_ID)  # the training, which goes on meanwhile
    mirror.catch_up(2)
    code, out, _ = sync(capsys, recorder.run_dir)
    assert code == 0
    assert "2 rows uploaded, 0 already there, 1 alert sent, 1 validation not yet covered by a checkpoint" in out
    assert server.run.exit_codes != [0]
    segments = list((recorder.run_dir / "wandb").glob("offline-run-*"))
    assert segments and not list(segments[0].glob("*.synced")), "still written"
    recorder.requeue(2)
    recorder.validate(3, 4)  # 3 is made again
    recorder.finish()
    mirror.finish()
    assert sync(capsys, recorder.run_dir)[0] == 0
    assert server.run.validations == [1, 2, 3, 4]
    assert [row["run/segment"] for row in server.run.history] == [0, 0, 1, 1]
    assert server.run.summary["status"] == "finished"
    assert server.run.exit_codes[-1] == 0


def test_a_requeue_from_an_older_checkpoint_doubles_nothing_and_says_what_differs(server, tmp_path, capsys):
    """The newest checkpoint was damaged after its validations had been uploaded."""
    recorder = recorded(tmp_path, 3, finished=False)
    recorder.checkpoint(3)
    assert sync(capsys, recorder.run_dir)[0] == 0
    recorder.requeue(1)
    recorder.ledger.append("validation", **drop(2))
    recorder.validate(3, metrics={"val/loss": 0.77})
    recorder.validate(4)
    recorder.finish()
    code, out, _ = sync(capsys, recorder.run_dir)
    assert code == 0
    assert server.run.validations == [1, 2, 3, 4]
    assert "validation 3 there with values of work that was done again after a requeue" in out


def test_rows_that_the_server_does_not_show_yet_are_not_sent_again(server, tmp_path, capsys, monkeypatch):
    """It took them and counts them, but its history lags behind."""
    monkeypatch.setattr("distplateau.record.tracking.sync._ARRIVAL_LIMIT", 1.0)
    recorder = recorded(tmp_path)
    client(tmp_path, 1, 2)
    prompt = server.operations["HistoryPage"]
    server.operations["HistoryPage"] = lambda *_: {"project": {"run": {"history": []}}}
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, out) == (1, "")
    assert "shows only 0 of 2 rows so far; run the same command again later" in err
    server.operations["HistoryPage"] = prompt
    assert sync(capsys, recorder.run_dir)[0] == 0
    assert server.run.validations == [1, 2, 3]


def test_a_long_history_with_gaps_in_its_steps_is_read_to_its_end(server, tmp_path):
    client(tmp_path, 1)
    lines = server.run.lines["wandb-history.jsonl"]
    for place, step in enumerate([*range(1, 1203), 5000, 5001], start=1):
        lines[place] = json.dumps({"_step": step, "validation": place + 1})
    holding = Backend(server.url, API_KEY).holding("tests", None, RUN_ID)
    assert holding.validations == list(range(1, 1206))
    assert holding.entity == "somebody"


@pytest.mark.parametrize("victim", ["command", "client", "everything"])
def test_killed_in_the_middle_and_repeated(server, tmp_path, capsys, victim):
    """SIGKILL while the server holds back its answer to the rows; the next upload begins at once."""
    recorder = recorded(tmp_path, 40)
    server.behave("hang", where="file_stream")
    words = [sys.executable, "-m", "distplateau", "sync", str(recorder.run_dir)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: server.count("/file_stream"))
    for pid in {"command": [process.pid], "client": children(process.pid)}.get(
        victim, [process.pid, *children(process.pid)]
    ):
        os.kill(pid, signal.SIGKILL)
    if victim == "client":
        time.sleep(1)
        process.kill()
    process.wait()
    server.behave()
    deadline = time.monotonic() + 60
    while sync(capsys, recorder.run_dir)[0] and time.monotonic() < deadline:
        time.sleep(0.5)
    assert server.run.validations == list(range(1, 41))
    assert server.run.summary["status"] == "finished"
    assert [alert["title"] for alert in server.run.alerts] == ["Learning rate reduced at validation 2", "Finished"]


def children(pid):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(pid)], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert condition()


def test_two_uploads_at_once_do_not_meet(server, tmp_path, capsys):
    recorder = recorded(tmp_path)
    lock = lock_file(recorder.run_dir / "wandb" / UPLOAD_LOCK)
    assert lock is not None
    with lock:
        code, out, err = sync(capsys, recorder.run_dir)
        assert (code, out) == (1, "")
        assert "another process is uploading this run" in err
        assert not server.runs
    assert sync(capsys, recorder.run_dir)[0] == 0


FAULTS = [("down", "no answer"), ("hang", "timed out"), ("500", "answers 500"), ("401", "refuses the API")]


@pytest.mark.parametrize(("fault", "says"), FAULTS)
def test_a_server_that_fails_is_an_exit_code(server, tmp_path, capsys, fault, says):
    recorder = recorded(tmp_path)
    server.die() if fault == "down" else server.behave(fault)
    start = time.perf_counter()
    code, out, err = sync(capsys, recorder.run_dir)
    assert time.perf_counter() - start < 15
    assert (code, out) == (1, "")
    assert says in err and "run the same command again later" in err
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_an_upload_that_did_not_happen_is_told(server, tmp_path, capsys):
    """The server takes the run but not its rows: the client ends as if all were well."""
    recorder = recorded(tmp_path)
    server.behave("500", where="file_stream")
    start = time.perf_counter()
    code, out, err = sync(capsys, recorder.run_dir)
    assert time.perf_counter() - start < 60
    assert (code, out) == (1, "")
    assert "0 rows uploaded, 0 already there, not complete: the server lacks validations 1, 2, 3" in err
    assert server.run.alerts == []
    server.behave()
    code, out, _ = sync(capsys, recorder.run_dir)
    assert code == 0
    assert server.run.validations == [1, 2, 3]


def test_one_failure_of_several_runs_is_told_and_the_others_go_up(server, tmp_path, capsys):
    first, second = recorded(tmp_path / "a"), recorded(tmp_path / "b")
    (first.run_dir / "wandb" / UPLOAD_LOCK).parent.mkdir()
    lock = lock_file(first.run_dir / "wandb" / UPLOAD_LOCK)
    assert lock is not None
    with lock:
        code, out, err = sync(capsys, first.run_dir, second.run_dir)
    assert code == 1
    assert "another process" in err
    assert "3 rows uploaded" in out


@pytest.mark.parametrize("how", ["no key", "no run", "no config"])
def test_wrong_input_is_one_line(tmp_path, capsys, monkeypatch, how):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    run_dir = recorded(tmp_path).run_dir
    if how == "no config":
        (run_dir / "config.toml").unlink()
    code, out, err = sync(capsys, tmp_path / "nowhere" if how == "no run" else run_dir)
    assert (code, out) == (2, "")
    [line] = err.splitlines()
    named = {"no key": "WANDB_API_KEY.*wandb login", "no run": "nowhere", "no config": "config.toml"}[how]
    assert re.search(named, line)


def test_a_key_in_netrc_is_used(server, tmp_path, capsys, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text(f"machine 127.0.0.1:{server.port} login user password {API_KEY}\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    monkeypatch.delenv("WANDB_API_KEY")
    recorder = recorded(tmp_path)
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, err) == (0, "")
    assert "3 rows uploaded" in out


def test_nan_is_told_once_at_error_level(server, tmp_path, capsys):
    recorder = recorded(tmp_path, 1, finished=False)
    recorder.validate(2, 3, value=float("nan"), metrics={"val/loss": float("nan"), "val/accuracy": 0.5})
    recorder.checkpoint(3)
    for _ in range(2):
        assert sync(capsys, recorder.run_dir)[0] == 0
    [alert] = server.run.alerts
    assert (alert["title"], alert["severity"]) == ("NaN or infinite at validation 2", "ERROR")
    assert server.run.validations == [1, 2, 3]


@pytest.mark.skipif(
    not (os.environ.get("WANDB_API_KEY") and os.environ.get("DISTPLATEAU_WANDB_LIVE")),
    reason="set WANDB_API_KEY and DISTPLATEAU_WANDB_LIVE=1 to try the real service",
)
def test_the_real_service(tmp_path, capsys, monkeypatch):
    """Opt-in: a run of its own in the project "tests" of whoever the key belongs to."""
    monkeypatch.setattr("tracked.RUN_ID", secrets.token_hex(4))
    recorder = recorded(tmp_path, 5)
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, err) == (0, "")
    assert "5 rows uploaded" in out
    code, out, err = sync(capsys, recorder.run_dir)
    assert (code, err) == (0, "")
    assert "0 rows uploaded, 5 already there" in out
