"""The two runs that the README opens with: torch's scheduler goes wrong in both of them, and ours does not."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"

RUN_ALL = """
import json, why
if __name__ == "__main__":
    names = ("stock_prepared", "ours_prepared", "stock_local", "ours_global")
    print(json.dumps({name: getattr(why, name)(4) for name in names}))
"""


@pytest.fixture(scope="module")
def lrs(tmp_path_factory):
    # A process of its own: the forkserver behind it would otherwise outlive the test.
    script = tmp_path_factory.mktemp("why") / "run_all.py"
    script.write_text(RUN_ALL)
    environment = {**os.environ, "PYTHONPATH": str(BENCHMARKS)}
    done = subprocess.run(
        [sys.executable, script], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def why(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location("why", BENCHMARKS / "why.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_prepared_torch_scheduler_collapses_while_the_loss_improves(lrs):
    assert lrs["stock_prepared"] == [0.5**6] * 4


def test_prepared_distplateau_scheduler_keeps_the_learning_rate(lrs):
    assert lrs["ours_prepared"] == [1.0] * 4


def test_torch_scheduler_on_local_losses_splits_the_ranks(lrs):
    assert len(set(lrs["stock_local"])) > 1


def test_distplateau_scheduler_gives_all_ranks_one_learning_rate(lrs):
    assert len(set(lrs["ours_global"])) == 1
    assert lrs["ours_global"][0] < 1.0


def fake_runs(monkeypatch, why, **changes):
    runs = {
        "stock_prepared": lambda n: [0.5**6 if n == 4 else 1.0] * n,
        "ours_prepared": lambda n: [1.0] * n,
        "stock_local": lambda n: [0.5, 0.25, 0.5, 0.5],
        "ours_global": lambda n: [0.5] * n,
        **changes,
    }
    for name, run in runs.items():
        monkeypatch.setattr(why, name, run)


def test_script_exits_0_when_every_claim_holds(monkeypatch, capsys, why):
    fake_runs(monkeypatch, why)
    assert why.main() == 0
    out, err = capsys.readouterr()
    assert "64 times lower at 4 processes" in out
    assert not err


@pytest.mark.parametrize(
    ("name", "run"),
    [
        ("stock_prepared", lambda n: [1.0] * n),
        ("stock_prepared", lambda n: [0.5**6] * n),
        ("ours_prepared", lambda n: [1.0 if n < 4 else 0.5] * n),
        ("stock_local", lambda n: [0.5] * n),
        ("ours_global", lambda n: [0.5, 0.5, 0.25, 0.5]),
        ("ours_global", lambda n: [1.0] * n),
    ],
)
def test_script_exits_1_when_a_claim_does_not_hold(monkeypatch, capsys, why, name, run):
    fake_runs(monkeypatch, why, **{name: run})
    assert why.main() == 1
    assert "DOES NOT HOLD" in capsys.readouterr().err
