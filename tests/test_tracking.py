"""The mirror with the real wandb client: offline, against a stand-in server, and through every outage of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from distplateau.cli import main as command_line
from distplateau.config import parse_config
from distplateau.errors import InputError
from distplateau.record.ledger import Ledger, read_ledger
from distplateau.record.tracking import mirror
from distplateau.record.tracking import tracker as tracking
from distplateau.record.tracking.mirror import Notes, flat
from distplateau.record.tracking.rows import alerts, durable_validation, row, rows, segments, summary, up_to
from distplateau.record.tracking.tracker import NoMirror, check_trackers, describe, open_mirror
from tracked import RUN_ID, Recorder, drop, event, make_config
from wandb_server import API_KEY, WandbServer

pytest.importorskip("wandb")
TESTS = Path(__file__).parent


@pytest.fixture
def server(monkeypatch):
    with WandbServer() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def history(run_dir: Path) -> list[dict]:
    """Read the rows back from the transaction logs with wandb's own tool."""
    found = []
    for log in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        wandb = Path(sys.executable).parent / "wandb"
        result = subprocess.run(
            [wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True, timeout=60
        )
        for line in result.stdout.splitlines():
            values = json.loads(line).get("history", {}).get("item", {})
            if "epoch" in values:
                found.append(values)
    return found


# What a tracker is told.


def test_rows_hold_everything_by_name():
    values = row(event(3, "reduced"))
    assert values["epoch"] == 3.0
    assert (values["lr/group0"], values["lr/group1"]) == (0.1, 0.2)
    assert values["val/loss"] == 1 / 3
    assert values["train/loss"] == 2 / 3
    assert values["scheduler/decision"] == "reduced"
    assert values["scheduler/lr_drop"] == 1
    assert {"scheduler/best", "scheduler/num_bad", "scheduler/cooldown", "validation"} <= values.keys()


def test_rows_name_segment_reductions_and_the_time_of_the_validation(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.validate(1, 2)
    recorder.ledger.append("validation", **drop(3))
    recorder.requeue(2, slurm_job_id="77", slurm_nodes="n[1-2]", restart_count=1, world_size=4)
    recorder.ledger.append("validation", **drop(3))
    recorder.validate(4)
    found = rows(read_ledger(recorder.run_dir))
    assert [values["run/segment"] for values in found.values()] == [0, 0, 1, 1]
    assert [values["scheduler/reductions"] for values in found.values()] == [0, 0, 1, 1]
    assert {values["scheduler/patience"] for values in found.values()} == {3}
    assert found[4]["_timestamp"] == read_ledger(recorder.run_dir).validations[3]["time"]
    first, second = segments(read_ledger(recorder.run_dir))
    assert first["after_validation"] == 0
    told = ("after_validation", "slurm_job_id", "slurm_nodes", "restart_count", "world_size")
    assert [second[key] for key in told] == [2, "77", "n[1-2]", 1, 4]


def test_summary_names_best_last_rate_and_reductions(tmp_path):
    recorder = Recorder(tmp_path)
    assert summary(read_ledger(recorder.run_dir)) == {}
    recorder.validate(1, 2)
    recorder.ledger.append("validation", **drop(3))
    recorder.finish()
    told = summary(read_ledger(recorder.run_dir))
    expected = {"best": 1 / 3, "best_validation": 3, "final_lr": 0.01, "reductions": 1, "status": "finished"}
    assert told.items() >= expected.items()
    earlier = summary(up_to(read_ledger(recorder.run_dir), 2))
    assert (earlier["validations"], earlier["reductions"], earlier["status"]) == (2, 0, "unfinished")


def test_alerts_are_drops_the_first_nan_and_the_end(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.validate(1)
    recorder.ledger.append("validation", **drop(2))
    recorder.validate(3, value=float("nan"))
    recorder.validate(4, value=float("nan"))
    recorder.finish()
    told = alerts(read_ledger(recorder.run_dir), 4)
    titles = ["Learning rate reduced at validation 2", "NaN or infinite at validation 3", "Finished"]
    assert [alert.title for alert in told] == titles
    assert [alert.level for alert in told] == ["INFO", "ERROR", "INFO"]
    assert "From 0.1 to 0.01" in told[0].text
    assert [alert.title for alert in alerts(read_ledger(recorder.run_dir), 2)] == titles[:1]


def test_durable_is_what_no_requeue_can_undo(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.validate(1, 2, 3, 4)
    assert durable_validation(read_ledger(recorder.run_dir)) == 0
    recorder.checkpoint(2)
    recorder.checkpoint(3)
    assert durable_validation(read_ledger(recorder.run_dir)) == 3
    (recorder.run_dir / "checkpoints/step-00000030/state.json").write_text("torn")
    assert durable_validation(read_ledger(recorder.run_dir)) == 2
    recorder.requeue(3)
    recorder.validate(4)
    assert durable_validation(read_ledger(recorder.run_dir)) == 3
    recorder.ledger.append("interrupted", reason="SIGTERM", step=45)
    assert durable_validation(read_ledger(recorder.run_dir)) == 4
    recorder.requeue(4)
    recorder.validate(5)
    assert durable_validation(read_ledger(recorder.run_dir)) == 4
    recorder.finish()
    assert durable_validation(read_ledger(recorder.run_dir)) == 5


# Offline.


def test_two_segments_of_one_run_hold_every_validation_once(tmp_path):
    config = make_config(tmp_path)
    ledger = Ledger(config.run_dir)
    ledger.append("start", run="tracked")
    for numbers in ((1, 2), (3,)):
        mirror = open_mirror(config, RUN_ID)
        for number in numbers:
            ledger.append("validation", **event(number))
            mirror.catch_up()
        mirror.catch_up()  # nothing new
        mirror.finish()
    found = history(config.run_dir)
    assert sorted(r["epoch"] for r in found) == [1.0, 2.0, 3.0]
    assert {r["val/accuracy"] for r in found} == {0.5}
    folders = list((config.run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all(RUN_ID in folder.name for folder in folders)
    assert json.loads((config.run_dir / "wandb" / "sent.json").read_text()) == {"validation": 3}


def test_a_wandb_service_of_the_training_script_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SERVICE", f"3-{os.getpid()}-unix-/nowhere/socket")
    recorder = Recorder(tmp_path)
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1)
    mirror.catch_up(1)
    mirror.finish()
    assert [row["epoch"] for row in history(recorder.run_dir)] == [1.0]


def test_nothing_stays_in_the_folder_for_temporary_files(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    recorder = Recorder(tmp_path)
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1)
    mirror.catch_up(1)
    mirror.finish()
    assert len(history(recorder.run_dir)) == 1
    # The log is of the client's command, with which `history` reads.
    left = [path.name for path in (tmp_path / "tmp").iterdir()]
    assert not [name for name in left if "socket" not in name and not name.startswith("debug-cli.")]


def test_what_no_checkpoint_covers_is_not_sent(tmp_path):
    recorder = Recorder(tmp_path)
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1, 2)
    mirror.catch_up(1)
    mirror.finish()  # as after an exception: the run goes on from validation 1
    assert [r["epoch"] for r in history(recorder.run_dir)] == [1.0]


def test_the_ledger_names_the_run_even_if_the_checkpoint_has_another_id(tmp_path):
    """A run that was killed before its first checkpoint makes up a new id when it starts again."""
    recorder = Recorder(tmp_path)
    assert describe(recorder.config, "another").run_id == RUN_ID


def test_a_killed_run_loses_no_more_than_the_last_second(tmp_path):
    """SIGKILL to the training and to everything it started."""
    script = (
        "import sys, time; from tracked import *; r = Recorder(sys.argv[1]); m = open_mirror(r.config, RUN_ID)\n"
        "for n in range(1, 100):\n    r.validate(n); m.catch_up(); print(n, flush=True); time.sleep(0.05)\n"
    )
    path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    while int(process.stdout.readline()) < 70:
        pass
    for pid in [process.pid, *descendants(process.pid)]:
        os.kill(pid, 9)
    process.wait()
    validations = len(read_ledger(tmp_path / "tracked").validations)
    assert len(history(tmp_path / "tracked")) >= validations - 40  # 20 rows a second, and a slow machine


@pytest.mark.parametrize(("mode", "pause"), [("online", 0), ("offline", 0), ("offline", 1)])
def test_the_signals_of_a_job_do_not_stop_the_mirror(server, tmp_path, mode, pause, monkeypatch):
    """Slurm sends SIGTERM to every process of a job; wandb's service dies of it, and a new one takes time to start.

    Without a pause the service that is dying may take the row, and not write it down.
    """
    monkeypatch.setattr(tracking, "INTERRUPTED_LIMIT", tracking.END_LIMIT)
    recorder = Recorder(tmp_path, mode)
    before = descendants(os.getpid())
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1)
    mirror.catch_up()
    sent = recorder.run_dir / "wandb" / "sent.json"
    while not sent.exists():
        time.sleep(0.05)
    time.sleep(2)  # twice the flush interval of the transaction log
    for pid in set(descendants(os.getpid())) - set(before):
        os.kill(pid, signal.SIGTERM)
    time.sleep(pause)
    recorder.validate(2)
    recorder.ledger.append("interrupted", reason="SIGTERM", step=20)
    mirror.finish()
    if mode == "online":
        assert server.run.validations == [1, 2]
        assert any(b'"preempting":true' in one.body for one in server.requests)
    else:
        assert [r["epoch"] for r in history(recorder.run_dir)] == [1.0, 2.0]


@pytest.mark.parametrize(("service_died", "noted"), [(10.0, 1), (13.0, 2), (30.0, 3)])
def test_what_a_dying_service_took_is_sent_again(tmp_path, monkeypatch, service_died, noted):
    """Rows were sent at 9, 12 and 15 s; one is on the disk a second later."""
    monkeypatch.setattr(mirror, "_terminated", [service_died])
    tracker = mirror.WandbTracker.__new__(mirror.WandbTracker)
    tracker._notes, tracker._sent = Notes(tmp_path / "sent.json"), {2: 9.2, 3: 12.0, 4: 15.0}
    if service_died == 30.0:
        del tracker._sent[4]
    tracker._notes.write({"validation": max(tracker._sent)})
    tracker._take_back()
    assert tracker._notes.read() == {"validation": noted}


def test_after_an_interruption_the_end_is_not_waited_for_as_long(server, tmp_path):
    """The grace time of the job is running."""
    recorder = Recorder(tmp_path, "online")
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1)
    mirror.catch_up()
    server.behave("hang")
    recorder.validate(2)
    recorder.ledger.append("interrupted", reason="SIGTERM", step=20)
    start = time.perf_counter()
    mirror.finish()
    assert time.perf_counter() - start < tracking.INTERRUPTED_LIMIT + 2


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1]) if entry.name.isdigit() else None
        except OSError:
            continue
        if parent == pid:
            found += [int(entry.name), *descendants(int(entry.name))]
    return found


def test_disabled_leaves_nothing(tmp_path):
    config = make_config(tmp_path, "disabled")
    assert isinstance(open_mirror(config, "x"), NoMirror)
    assert not (config.run_dir / "wandb").exists()


def test_a_tracker_that_cannot_be_opened_costs_a_warning_only(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise OSError("no such program")

    monkeypatch.setattr(tracking.subprocess, "Popen", broken)
    with pytest.warns(UserWarning, match="the ledger goes on alone: no such program"):
        assert isinstance(open_mirror(Recorder(tmp_path).config, "x"), NoMirror)


@pytest.mark.filterwarnings("ignore:wandb")
def test_a_tracker_that_fails_costs_a_warning_only(tmp_path):
    recorder = Recorder(tmp_path)
    (recorder.run_dir / "wandb").mkdir()
    (recorder.run_dir / "wandb" / "sent.json").mkdir()  # cannot be written
    mirror = open_mirror(recorder.config, RUN_ID)
    recorder.validate(1)
    mirror.catch_up()
    with pytest.warns(UserWarning, match="wandb: .*directory.*nothing is lost"):
        mirror.finish()
    mirror.catch_up()  # nobody listens


def test_notes_are_whole_or_not_there(tmp_path, monkeypatch):
    notes = Notes(tmp_path / "sent.json")
    assert notes.read() == {}
    notes.write({"validation": 1})

    def torn(*_args):
        raise OSError("disk full")

    monkeypatch.setattr("distplateau.record.tracking.mirror.os.fsync", torn)
    with pytest.raises(OSError, match="disk full"):
        notes.write({"validation": 2})
    assert notes.read() == {"validation": 1}
    notes.path.write_text('{"valid')
    assert notes.read() == {}


# Online.


def test_a_requeued_run_is_one_history_online(server, tmp_path):
    recorder = Recorder(tmp_path, "online", group="sweep", tags=["a", "b"])
    for first, resumed_after in ((1, None), (3, 2)):
        if resumed_after is not None:
            recorder.requeue(resumed_after, slurm_job_id="77", restart_count=1)
        mirror = open_mirror(recorder.config, RUN_ID)
        recorder.validate(first)
        recorder.ledger.append("validation", **drop(first + 1))
        mirror.catch_up()
        if resumed_after is None:
            recorder.validate(3)  # no checkpoint covers it: made again after the requeue
        else:
            recorder.finish()
        mirror.finish()
    run = server.run
    assert run.validations == [1, 2, 3, 4]
    assert [values["run/segment"] for values in run.history] == [0, 0, 1, 1]
    assert run.summary.items() >= {"reductions": 2, "requeues": 1, "best": 0.25, "status": "finished"}.items()
    assert run.config["segments"]["value"][1]["slurm_job_id"] == "77"
    assert run.config["schedule"]["value"]["patience"] == 10
    assert (run.group, run.tags, run.project, run.display_name) == ("sweep", ["a", "b"], "tests", "tracked")
    titles = ["Learning rate reduced at validation 2", "Learning rate reduced at validation 4", "Finished"]
    assert [alert["title"] for alert in run.alerts] == titles
    assert run.exit_codes == [1, 0]
    assert not server.unknown_operations


START, MIDDLE = ("down", "hang", "500", "401"), ("die", "hang", "500", "401", "none")


def outage(fault: str, when: str, folder: Path) -> dict:
    """Mirror a run in a process of its own while the server fails; say what it cost and what a sync brings."""
    with WandbServer() as server:
        if when == "start":
            break_server(server, fault)
        environment = {**os.environ, **server.environment}
        words = [sys.executable, str(TESTS / "tracked.py"), str(folder), "online"]
        process = subprocess.Popen(
            words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        if when == "middle":
            deadline = time.monotonic() + 60
            while not server.runs and time.monotonic() < deadline:
                time.sleep(0.05)
            break_server(server, fault)
        output, error = process.communicate("go\n", timeout=120)
        assert process.returncode == 0, error
        result = json.loads(output.splitlines()[-1])
        result["before"] = [run.validations for run in server.runs.values()]
        server.behave()
        if fault in {"down", "die"}:
            server.come_back()
        for _ in range(2):
            words = [sys.executable, "-m", "distplateau", "sync", str(folder / "tracked")]
            synced = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120, check=False)
            result["sync"] = (synced.returncode, synced.stdout, synced.stderr)
        result["after"] = server.run.validations
        result["alerts"] = [alert["title"] for alert in server.run.alerts]
        result["summary"] = server.run.summary
        return result


def break_server(server: WandbServer, fault: str) -> None:
    if fault in {"down", "die"}:
        server.die()
    elif fault != "none":
        server.behave(fault)


CASES = [*((fault, "start") for fault in START), *((fault, "middle") for fault in MIDDLE)]


@pytest.fixture(scope="module")
def outages(tmp_path_factory):
    """All outages at once: they consist of waiting."""
    folders = [tmp_path_factory.mktemp(f"{when}-{fault}") for fault, when in CASES]
    with ThreadPoolExecutor(4) as pool:
        tasks = [pool.submit(outage, *case, folder) for case, folder in zip(CASES, folders, strict=True)]
        return dict(zip(CASES, [task.result() for task in tasks], strict=True))


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_no_outage_holds_up_the_training_or_loses_a_row(outages, case):
    result = outages[case]
    assert result["open"] < 1  # starts processes, waits for nothing
    assert max(result["catch_up"]) < 0.1
    assert result["finish"] < 20
    assert len(result["told"]) == (case != ("none", "middle")), "one warning, if there is something to say"
    assert all("distplateau sync" in text and API_KEY not in text for text in result["told"])
    code, said, error = result["sync"]
    assert (code, error) == (0, "")
    assert "0 rows uploaded, 4 already there" in said
    assert result["after"] == [1, 2, 3, 4]
    assert result["alerts"] == ["Learning rate reduced at validation 2", "Finished"]
    assert result["summary"]["status"] == "finished"


def test_without_an_outage_nothing_is_left_to_sync(outages):
    """Negative control: the outages above did keep rows from the server."""
    assert outages["none", "middle"]["before"] == [[1, 2, 3, 4]]
    assert all(outages[fault, "start"]["before"] == [] for fault in START)
    assert all(outages[fault, "middle"]["before"] != [[1, 2, 3, 4]] for fault in MIDDLE if fault != "none")


@pytest.mark.filterwarnings("ignore:wandb")
def test_a_step_does_not_wait_for_a_server_that_hangs(server, tmp_path):
    """Seen from the training: the mirror's calls of a whole run take less than 1 % of its time."""
    server.behave("hang")
    recorder = Recorder(tmp_path, "online")
    start = time.perf_counter()
    mirror = open_mirror(recorder.config, RUN_ID)
    waited = time.perf_counter() - start
    calls = 12
    for number in range(1, calls + 1):
        recorder.validate(number)
        begin = time.perf_counter()
        mirror.catch_up()
        waited += time.perf_counter() - begin
        time.sleep(0.25)  # an epoch
    assert waited < 0.01 * (time.perf_counter() - start)
    server.behave()
    mirror.finish()


def test_without_a_key_the_run_is_mirrored_offline(tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    recorder = Recorder(tmp_path, "online")
    recorder.validate(1)
    recorder.finish()
    with pytest.warns(UserWarning, match=r"no API key; run `wandb login`, or set WANDB_API_KEY; .*offline"):
        open_mirror(recorder.config, RUN_ID).finish()
    assert [r["epoch"] for r in history(recorder.run_dir)] == [1.0]


# Nothing but numbers and settings.

MARKER = "tangerine-elephant-7431"


def test_no_key_no_argument_no_diff_is_written_or_sent(server, tmp_path):
    """A real training in a dirty repository, with a marker on its command line, and a sync of it."""
    folder = tmp_path / MARKER  # on the command line, and the working directory
    folder.mkdir()
    toml = '[run]\nname = "quiet"\n[model.args]\nhidden = [8]\n[training]\nepochs = 2\n[tracking]\nwandb = "online"\n'
    (folder / f"{MARKER}.toml").write_text(toml)
    (folder / "code.py").write_text("print(1)\n")
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=folder, check=True)
    (folder / "code.py").write_text(f"print('{MARKER}')\n")
    # The run folder is elsewhere, so that its path does not hold the marker.
    words = ["train", f"{MARKER}.toml", "--run.dir", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for command in (words, ["sync", str(tmp_path / "runs/quiet")]):
        done = subprocess.run(
            [sys.executable, "-m", "distplateau", *command],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert API_KEY not in done.stdout + done.stderr
    assert server.run.validations == [1, 2]
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert any(path.suffix == ".wandb" for path in files)
    for needle in (API_KEY.encode(), MARKER.encode()):
        assert not [path for path in files if needle in path.read_bytes()]
        assert needle not in server.received()
    assert b"quiet" in server.received()  # negative control: what is sent can be searched
    assert not [path for path in files if path.suffix in {".py", ".patch"} or path.name == "requirements.txt"]
    assert server.run.files.keys() <= {"config.yaml", "wandb-summary.json"}


# Other trackers.

WRITER = """
import json
from pathlib import Path

class SummaryWriter:
    def __init__(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.file = (Path(folder) / "scalars.jsonl").open("a")
    def add_scalar(self, name, value, global_step=None, **_):
        print(json.dumps([name, value, global_step]), file=self.file, flush=True)
    def add_text(self, *_, **__): ...
    def add_hparams(self, values, metric_dict):
        print(json.dumps(values), file=self.file, flush=True)
    def flush(self): ...
    def close(self): self.file.close()
"""


def test_a_tracker_of_accelerate_gets_the_same_rows(tmp_path, monkeypatch):
    """Accelerate's TensorBoard tracker, with a writer that needs no TensorBoard."""
    packages = tmp_path / "packages"
    packages.mkdir()
    (packages / "tensorboardX.py").write_text(WRITER)
    if tracking.find_spec("tensorboard"):
        (packages / "tensorboard.py").write_text("raise ModuleNotFoundError('tensorboard')\n")
    monkeypatch.syspath_prepend(packages)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(packages), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    recorder = Recorder(tmp_path, "disabled", trackers=["tensorboard"])
    check_trackers(recorder.config)
    for number in (1, 2):
        mirror = open_mirror(recorder.config, RUN_ID)
        recorder.validate(number)
        mirror.catch_up()
        mirror.finish()
    [path] = recorder.run_dir.glob("trackers/tensorboard/**/scalars.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line for line in lines if isinstance(line, list) and line[0] == "val/loss"] == [
        ["val/loss", 1.0, 10],
        ["val/loss", 0.5, 20],
    ]
    assert lines[0]["schedule.patience"] == 10
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")


def test_a_tracker_that_is_not_installed_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda _name: None)
    config = make_config(tmp_path, trackers=["mlflow"])
    with pytest.raises(InputError, match=r"tracking.trackers = 'mlflow': .*pip install mlflow"):
        check_trackers(config)
    path = tmp_path / "run.toml"
    path.write_text('[tracking]\ntrackers = ["tensorboard"]\n')
    assert command_line(["train", str(path), "--run.dir", str(tmp_path / "runs")]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "tensorboard is not installed; pip install tensorboard" in line
    assert not (tmp_path / "runs").exists()


def test_every_tracker_of_accelerate_is_known_by_name():
    """Oracle: Accelerate's own list."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    assert set(tracking._NEEDS) == set(LOGGER_TYPE_TO_CLASS) - {"wandb"}
    with pytest.raises(InputError, match=r"tracking\.trackers"):
        parse_config({"tracking": {"trackers": ["tensorbord"]}})


def test_settings_are_flattened_for_trackers():
    assert flat({"a": {"b": 1, "c": [1, 2]}, "d": None}) == {"a.b": 1, "a.c": "[1, 2]", "d": "None"}
