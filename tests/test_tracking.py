"""The wandb mirror with the real client, offline."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from distplateau.config import parse_config
from distplateau.record.ledger import Ledger
from distplateau.record.rows import row
from distplateau.record.tracking import NoMirror, open_mirror

pytest.importorskip("wandb")


def event(number: int, decision: str = "improved"):
    return {
        "validation": number, "epoch": float(number), "step": 10 * number, "monitor": "val/loss", "value": 1 / number,
        "count": 50, "decision": decision, "lr_before": [0.1, 0.2], "lr_after": [0.1, 0.2], "best": 1 / number,
        "num_bad": 0, "cooldown": 0, "ranks": 2, "digest": "00", "train_loss": 2 / number,
        "metrics": {"val/loss": 1 / number, "val/accuracy": 0.5}, "samples_per_second": 10.0, "seconds": 1.0,
    }  # fmt: skip


def make_config(folder, mode="offline"):
    config = parse_config({"run": {"name": "tracked", "dir": str(folder)}, "tracking": {"wandb": mode}})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


def history(run_dir: Path) -> list[dict]:
    """Read the rows back from the transaction logs with wandb's own tool."""
    rows = []
    for log in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        wandb = Path(sys.executable).parent / "wandb"
        result = subprocess.run(
            [wandb, "leet", "inspect", "--json", log], capture_output=True, text=True, check=True, timeout=60
        )
        for line in result.stdout.splitlines():
            values = json.loads(line).get("history", {}).get("item", {})
            if "epoch" in values:
                rows.append(values)
    return rows


def test_rows_hold_everything_by_name():
    values = row(event(3, "reduced"))
    assert values["epoch"] == 3.0
    assert (values["lr/group0"], values["lr/group1"]) == (0.1, 0.2)
    assert values["val/loss"] == 1 / 3
    assert values["train/loss"] == 2 / 3
    assert values["scheduler/decision"] == "reduced"
    assert values["scheduler/lr_drop"] == 1
    assert {"scheduler/best", "scheduler/num_bad", "scheduler/cooldown"} <= values.keys()


def test_two_segments_of_one_run_hold_every_validation_once(tmp_path):
    config = make_config(tmp_path)
    ledger = Ledger(config.run_dir)
    ledger.append("start", run="tracked")
    for numbers in ((1, 2), (3,)):
        mirror = open_mirror(config, "abcd1234")
        for number in numbers:
            ledger.append("validation", **event(number))
            mirror.catch_up()
        mirror.catch_up()  # nothing new
        mirror.finish()
    rows = history(config.run_dir)
    assert sorted(r["epoch"] for r in rows) == [1.0, 2.0, 3.0]
    assert {r["val/accuracy"] for r in rows} == {0.5}
    folders = list((config.run_dir / "wandb").glob("offline-run-*"))
    assert len(folders) == 2
    assert all("abcd1234" in folder.name for folder in folders)


def test_nothing_but_numbers_and_settings_is_written(tmp_path, monkeypatch):
    secret = "5f" * 20
    monkeypatch.setattr(sys, "argv", ["train", f"--api-key={secret}"])
    monkeypatch.setenv("WANDB_API_KEY", secret)
    config = make_config(tmp_path)
    Ledger(config.run_dir).append("start", run="tracked")
    open_mirror(config, "abcd1234").finish()
    files = [path for path in config.run_dir.rglob("*") if path.is_file()]
    assert files
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert not [path for path in files if path.suffix in {".py", ".patch"}]


def test_disabled_leaves_nothing(tmp_path):
    config = make_config(tmp_path, "disabled")
    assert isinstance(open_mirror(config, "x"), NoMirror)
    assert not (config.run_dir / "wandb").exists()


def test_a_tracker_that_cannot_be_opened_costs_a_warning_only(tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise OSError("no such service")

    monkeypatch.setattr("wandb.init", broken)
    with pytest.warns(UserWarning, match="the ledger goes on alone: no such service"):
        assert isinstance(open_mirror(make_config(tmp_path), "x"), NoMirror)
