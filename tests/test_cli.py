"""The command line as people type it: real processes, exit codes, one line for a mistake."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distplateau import cli
from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from distplateau.training.data.in_memory import DEBIAN_FASHION_MNIST

ROOT = Path(__file__).parent.parent
TINY = """
[run]
name = "tiny run"
[data]
global_batch_size = 64
validation_size = 300
[model.args]
hidden = [16]
[optimizer]
lr = 0.01
[schedule]
patience = 0
threshold = 0.3
[training]
epochs = 3
"""


def run(*command, cwd, **options):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        **options,
    )


def distplateau(*words, cwd):
    return run(sys.executable, "-m", "distplateau", *words, cwd=cwd)


def launch(ranks, *words, cwd, module=True):
    accelerate = Path(sys.executable).parent / "accelerate"
    program = ("-m", "distplateau") if module else ()
    return run(
        accelerate, "launch", "--config_file", ROOT / "launch/cpu.yaml", "--num_processes", ranks,
        *program, *words, cwd=cwd,
    )  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "tiny.toml").write_text(TINY, encoding="utf-8")
    return tmp_path


def test_train_evaluate_report_in_one_process(folder):
    trained = distplateau("train", "tiny.toml", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    run_dir = folder / "runs" / "tiny run"
    assert (run_dir / "report.html").exists()
    assert len([line for line in trained.stdout.splitlines() if line.startswith("epoch ")]) == 3
    evaluated = distplateau("evaluate", run_dir, cwd=folder)
    assert evaluated.returncode == 0, evaluated.stderr
    result = json.loads((run_dir / "evaluation.json").read_text())["test"]
    assert result["count"] == 360
    assert result["accuracy"] > 0.8
    assert f"accuracy {100 * result['accuracy']:.2f} %" in evaluated.stdout
    (run_dir / "report.html").unlink()
    reported = distplateau("report", run_dir, cwd=folder)
    assert reported.returncode == 0, reported.stderr
    assert reported.stdout.strip().endswith("report.html")
    assert f"{100 * result['accuracy']:.2f}" in (run_dir / "report.html").read_text()


def test_accelerate_launch_on_two_ranks_prints_each_line_once(folder):
    trained = launch(2, "train", "tiny.toml", "--run.name", "two", cwd=folder)
    assert trained.returncode == 0, trained.stderr
    assert len([line for line in trained.stdout.splitlines() if line.startswith("epoch ")]) == 3
    assert {event["ranks"] for event in read_ledger(folder / "runs/two").validations} == {2}
    alone = distplateau("evaluate", "runs/two", cwd=folder)
    exact = json.loads((folder / "runs/two/evaluation.json").read_text())
    together = launch(2, "evaluate", "runs/two", cwd=folder)
    assert (alone.returncode, together.returncode) == (0, 0), together.stderr
    assert json.loads((folder / "runs/two/evaluation.json").read_text()) == exact
    assert together.stdout.count("accuracy") == 1


THREADS = """
import os, sys
from pathlib import Path
from distplateau.training.evaluate import evaluate
evaluate(Path("runs/tiny run"))
names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
assert not [name for name in names if "gloo" in name], names
"""


def test_no_thread_of_a_process_group_outlives_it(folder):
    """One that still holds a tensor when the interpreter ends aborts the process, now and then."""
    assert distplateau("train", "tiny.toml", "--training.epochs", "1", cwd=folder).returncode == 0
    (folder / "threads.py").write_text(THREADS, encoding="utf-8")
    result = launch(2, folder / "threads.py", cwd=folder, module=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--schedule.patiance", "3"], ["schedule.patiance", "3", "'patience'"]),
        (["--schedule.factor", "2.0"], ["schedule.factor", "2.0", "below 1"]),
        (["--data.global_batch_size", "many"], ["data.global_batch_size", "'many'", "integer"]),
        (["--data.name", "fashion-mnits"], ["data.name", "'fashion-mnits'", "'fashion-mnist'"]),
        (["--data.name", "cifar10", "--data.root", "nowhere"], ["data.root", "nowhere", "cifar10"]),
        (["--model.name", "resnet19"], ["model.name", "'resnet19'", "'resnet18'"]),
        (["--patience", "3"], ["--patience", "--schedule.patience"]),
        (["--schedule.patience"], ["schedule.patience", "VALUE"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(folder, words, says):
    result = distplateau("train", "tiny.toml", *words, cwd=folder)
    assert result.returncode == 2
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert all(part in line for part in says), line
    assert not (folder / "runs").exists()


def test_a_mistake_is_printed_once_for_all_ranks(folder):
    result = launch(4, "train", "tiny.toml", "--data.global_batch_size", "3", cwd=folder)
    assert result.returncode != 0
    assert result.stderr.count("data.global_batch_size = 3: is smaller than the 4 ranks; use at least 4") == 1
    assert 'distplateau/cli.py", line' not in result.stderr  # no traceback of ours


@pytest.mark.parametrize("command", ["evaluate", "report"])
def test_a_folder_without_a_run_is_one_line(folder, command):
    result = distplateau(command, "nowhere", cwd=folder)
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1
    assert "nowhere" in result.stderr


def test_help_needs_no_torch():
    code = "import sys; from distplateau.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    result = run(sys.executable, "-c", code + "sys.exit('torch' in sys.modules)", cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert "--schedule.patience" in result.stdout


def test_an_interrupted_run_can_be_continued(folder):
    words = [sys.executable, "-m", "distplateau", "train", "tiny.toml", "--training.epochs", "4000"]
    process = subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    while not process.stdout.readline().startswith("epoch"):
        pass
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 75
    assert error.splitlines()[-1].startswith("interrupted")
    assert "Traceback" not in error


def test_a_killed_run_goes_on_and_ends_like_an_uninterrupted_one(folder):
    options = ["--training.epochs", "30", "--model.args", "{hidden = [64]}"]
    whole = distplateau("train", "tiny.toml", "--run.name", "whole", *options, cwd=folder)
    assert whole.returncode == 0, whole.stderr
    ledger = folder / "runs/killed/ledger.jsonl"
    for _ in range(2):
        process = subprocess.Popen(
            [sys.executable, "-m", "distplateau", "train", "tiny.toml", "--run.name", "killed", *options],
            cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        before = ledger.read_bytes().count(b"validation") if ledger.exists() else 0
        while process.poll() is None and (
            not ledger.exists() or ledger.read_bytes().count(b'"event":"validation"') < before // 2 + 3
        ):
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert distplateau("train", "tiny.toml", "--run.name", "killed", *options, cwd=folder).returncode == 0
    keys = ("validation", "step", "value", "decision", "lr_before", "lr_after", "best", "digest")
    traces = [
        [[event[key] for key in keys] for event in read_ledger(folder / "runs" / name).validations]
        for name in ("whole", "killed")
    ]
    assert traces[0] == traces[1]


@pytest.mark.skipif(not DEBIAN_FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
@pytest.mark.parametrize("ranks", [2, *(pytest.param(ranks, marks=pytest.mark.slow) for ranks in (1, 4))])
def test_fashion_mnist_recipe(tmp_path, ranks):
    words = [
        "train", ROOT / "launch/fashion_mnist.toml", "--training.epochs", "1", "--data.global_batch_size", "512",
        "--optimizer.lr", "0.001", "--run.dir", tmp_path, "--run.name", "recipe",
    ]  # fmt: skip
    result = launch(ranks, *words, cwd=tmp_path) if ranks > 1 else distplateau(*words, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    [event] = read_ledger(tmp_path / "recipe").validations
    assert event["ranks"] == ranks  # the digest agreed on all of them, or there would be no such line
    assert event["metrics"]["val/accuracy"] > 0.8


@pytest.mark.parametrize(("rank", "told"), [("0", False), ("1", True)])
def test_the_rank_that_met_a_mistake_tells_it(monkeypatch, capsys, rank, told):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(cli.time, "sleep", lambda _seconds: None)
    error = InputError("training.loss", "it raised", "mend it")
    error.rank = 1
    assert cli._refuse(error) == 2
    assert ("training.loss" in capsys.readouterr().err) is told
