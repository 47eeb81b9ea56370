"""Runs for the tests of tracking: ledgers without training, and a process that trains nothing but mirrors."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

from distplateau.config import dump_config, parse_config
from distplateau.record.ledger import Ledger
from distplateau.record.tracking.tracker import open_mirror

RUN_ID = "abcd1234"


def event(number: int, decision: str = "improved", **changes):
    return {
        "validation": number, "epoch": float(number), "step": 10 * number, "monitor": "val/loss", "value": 1 / number,
        "count": 50, "decision": decision, "lr_before": [0.1, 0.2], "lr_after": [0.1, 0.2], "best": 1 / number,
        "num_bad": 0, "cooldown": 0, "ranks": 2, "digest": "00", "train_loss": 2 / number,
        "metrics": {"val/loss": 1 / number, "val/accuracy": 0.5}, "samples_per_second": 10.0, "seconds": 1.0, **changes,
    }  # fmt: skip


def drop(number: int, before: float = 0.1, after: float = 0.01):
    return event(number, "reduced", lr_before=[before], lr_after=[after])


def make_config(folder, mode="offline", **tracking):
    section = {"wandb": mode, "project": "tests", **tracking}
    config = parse_config({"run": {"name": "tracked", "dir": str(folder)}, "tracking": section})
    config.run_dir.mkdir(parents=True, exist_ok=True)
    return config


class Recorder:
    """What a trainer leaves in a run folder."""

    def __init__(self, folder, mode="offline", **tracking):
        self.config = make_config(folder, mode, **tracking)
        self.run_dir: Path = self.config.run_dir
        (self.run_dir / "config.toml").write_text(dump_config(self.config), encoding="utf-8")
        self.ledger = Ledger(self.run_dir)
        if not self.ledger.path.exists():
            rule = {"mode": "min", "patience": 3}
            self.ledger.append("start", run="tracked", run_id=RUN_ID, schedule={"name": "plateau", "rule": rule})

    def validate(self, *numbers, **changes):
        for number in numbers:
            self.ledger.append("validation", **event(number, **changes))

    def checkpoint(self, validations):
        folder = self.run_dir / "checkpoints" / f"step-{10 * validations:08d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "state.json").write_text(json.dumps({"validations": validations}), encoding="utf-8")

    def requeue(self, last_validation, **circumstances):
        self.ledger.append("resumed", last_validation=last_validation, step=10 * last_validation, **circumstances)

    def finish(self):
        self.ledger.append("finished", seconds=3.0)


def main(folder: str, mode: str) -> None:
    """Mirror four validations and a reduction; wait for a line after the second. Print what it cost."""
    recorder = Recorder(folder, mode)
    start = time.perf_counter()
    mirror = open_mirror(recorder.config, RUN_ID)
    opened = time.perf_counter() - start
    calls = []
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for number in range(1, 5):
            recorder.ledger.append("validation", **(drop(number) if number == 2 else event(number)))
            recorder.checkpoint(number)
            start = time.perf_counter()
            mirror.catch_up()
            calls.append(time.perf_counter() - start)
            if number == 2:
                print("half", flush=True)  # noqa: T201
                sys.stdin.readline()
        recorder.finish()
        start = time.perf_counter()
        mirror.finish()
        finished = time.perf_counter() - start
    cost = {"open": opened, "catch_up": calls, "finish": finished, "told": [str(one.message) for one in told]}
    print(json.dumps(cost), flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
