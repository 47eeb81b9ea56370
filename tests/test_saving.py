"""When the trainer saves, what it does when it cannot, and that everything it saves is needed."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time

import pytest

from distplateau.config import CheckpointSection
from distplateau.errors import InputError
from distplateau.lockstep.scheduler import LockstepScheduler
from distplateau.record.ledger import Ledger, read_ledger
from distplateau.record.report.page import write_report
from distplateau.training import interruption
from distplateau.training.saving.checkpoint import CheckpointFolder
from distplateau.training.step import TrainStep
from distplateau.training.trainer import Trainer, train
from ranks import run_ranks
from test_interruption import SECTIONS, trace
from test_trainer import _train, make_config, same_tensors


def saved_steps(folder):
    return [int(path.name.removeprefix("step-")) for path in CheckpointFolder(folder / "run").all()]


class KilledError(Exception):
    pass


def _train_to_step(rank, config, steps, patches=()):
    """Train until that many optimizer steps are made, then die without a word. Patches: (class, name, value)."""
    call = TrainStep.__call__
    before = [(owner, name, owner.__dict__[name]) for owner, name, _ in patches]

    def watched(self, at):
        if at == steps:
            raise KilledError
        return call(self, at)

    TrainStep.__call__ = watched
    for owner, name, value in patches:
        setattr(owner, name, value)
    interruption._ROUND_SECONDS = 0.0  # a vote at each step
    try:
        return _train(rank, config)[1]
    except KilledError:
        return "killed"
    except InputError as error:
        return str(error)
    finally:
        TrainStep.__call__, interruption._ROUND_SECONDS = call, 1.0
        for owner, name, value in before:
            setattr(owner, name, value)


@pytest.mark.parametrize(
    ("every", "steps"),
    [("7 steps", [*range(7, 88, 7), 88]), ("2 epochs", [44, 88]), ("50 steps", [50, 88]), ("10 min", [88])],
)
def test_checkpoints_come_at_their_interval_and_at_the_end(tmp_path, every, steps):
    config = make_config(tmp_path, training={"epochs": 4}, checkpoint={"every": every, "keep": 100})
    run_ranks(_train, 1, config)
    assert saved_steps(tmp_path) == steps


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_run_goes_on_from_a_step_between_validations(tmp_path, ranks):
    whole = run_ranks(_train, ranks, make_config(tmp_path / "whole", **SECTIONS))
    config = make_config(tmp_path / "cut", **SECTIONS, checkpoint={"every": "7 steps"})
    for steps in (16, 38, 60):
        assert run_ranks(_train_to_step, ranks, config, steps) == ["killed"] * ranks
    resumed = run_ranks(_train, ranks, config)
    assert all(same_tensors(resumed[rank][1], whole[rank][1]) for rank in range(ranks))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")
    from_steps = [e["step"] for e in read_ledger(tmp_path / "cut" / "run").events if e["event"] == "resumed"]
    assert from_steps == [14, 35, 56]


class Often:
    """In place of the property: a checkpoint is always overdue."""

    def __get__(self, section, owner=None):
        return 0.0


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_checkpoints_by_the_clock_are_agreed_on(tmp_path, ranks):
    """The main rank alone has the clock; all of them take part in each checkpoint between validations."""
    whole = run_ranks(_train, ranks, make_config(tmp_path / "whole", **SECTIONS))
    config = make_config(tmp_path / "cut", **SECTIONS, checkpoint={"every": "1 s", "keep": 100})
    patches = [(CheckpointSection, "seconds", Often())]
    assert run_ranks(_train_to_step, ranks, config, 38, patches) == ["killed"] * ranks
    assert len(saved_steps(tmp_path / "cut")) > 10
    resumed = run_ranks(_train, ranks, config)
    assert all(same_tensors(resumed[rank][1], whole[rank][1]) for rank in range(ranks))
    assert trace(tmp_path / "cut") == trace(tmp_path / "whole")


def test_by_the_clock_means_seconds(tmp_path):
    """One step of 22 sleeps beyond the second that is asked for."""
    call = TrainStep.__call__

    def slow(self, at):
        if at == 9:
            time.sleep(1.1)
        return call(self, at)

    config = make_config(tmp_path, training={"epochs": 1}, checkpoint={"every": "1 s"})
    TrainStep.__call__ = slow
    try:
        train(config)
    finally:
        TrainStep.__call__ = call
    assert saved_steps(tmp_path) == [10, 22]


# What cannot be written.


class Full:
    """Stands in for a method that writes, from its third call on, or as `count` says."""

    def __init__(self, method, count):
        self.method, self.count = method, count

    def __get__(self, owner, kind=None):
        return lambda *args, **kwargs: self.call(owner, *args, **kwargs)

    def call(self, owner, *args, **kwargs):
        self.count -= 1
        if self.count < 0:
            raise InputError(str(owner.path), "cannot be written (No space left on device)", "free space")
        return self.method(owner, *args, **kwargs)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize(("owner", "name", "count"), [(CheckpointFolder, "save", 1), (Ledger, "append", 2)])
def test_a_full_disk_stops_all_ranks_with_one_reason(tmp_path, ranks, owner, name, count):
    config = make_config(tmp_path, **{**SECTIONS, "training": {"epochs": 500}})
    patches = [(owner, name, Full(owner.__dict__[name], count))]
    first, *others = run_ranks(_train_to_step, ranks, config, 10_000, patches)
    assert "No space left on device" in first
    assert all("the main rank cannot write there" in other for other in others)
    kept = saved_steps(tmp_path)
    assert kept == [22] if owner is CheckpointFolder else kept
    assert CheckpointFolder(tmp_path / "run").load_newest()[1] == []  # whole
    # With space again it goes on from there.
    assert run_ranks(_train_to_step, ranks, config, kept[-1] + 30) == ["killed"] * ranks
    assert read_ledger(tmp_path / "run").events[-2]["event"] == "resumed"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        command = [
            sys.executable, "-m", "distplateau", "train", tmp_path / "x.toml", "--run.dir", disk, "--model.args",
            "{hidden = [200]}", "--training.epochs", "40", "--checkpoint.keep", "100", "--tracking.wandb", "disabled",
        ]  # fmt: skip
        (tmp_path / "x.toml").write_text("")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.strip().splitlines()
        assert "No space left on device" in line
        assert "free space" in line
        kept = CheckpointFolder(disk / "run")
        assert kept.all()
        assert kept.load_newest()[1] == []  # those that are there are whole
    finally:
        subprocess.run(["umount", disk], check=True)


# Negative controls: without it, the run ends differently.

EAGER = {"patience": 0, "cooldown": 1, "threshold": 0.9, "factor": 0.5}  # nothing but the first is good enough


def _differs(tmp_path, patches=(), **schedule):
    """Kill a run after each validation and compare it with one that was left alone."""
    sections = {**SECTIONS, "schedule": {**EAGER, **schedule}}
    whole = run_ranks(_train, 1, make_config(tmp_path / "whole", **sections))
    config = make_config(tmp_path / "cut", **sections)
    for steps in (23, 45, 67):
        assert run_ranks(_train_to_step, 1, config, steps, patches) == ["killed"]
    resumed = run_ranks(_train_to_step, 1, config, 10_000, patches)
    same = same_tensors(resumed[0], whole[0][1])
    return not (same and trace(tmp_path / "cut") == trace(tmp_path / "whole"))


def test_all_saved_nothing_differs(tmp_path):
    assert not _differs(tmp_path)


class WithoutCounter:
    """The scheduler's state dict, one counter left at what it was at the start."""

    def __init__(self, counter, value):
        self.counter, self.value, self.method = counter, value, LockstepScheduler.state_dict

    def __get__(self, owner, kind=None):
        def state_dict():
            made = self.method(owner)
            assert self.counter in made["lockstep"]
            made["lockstep"][self.counter] = self.value
            return made

        return state_dict


@pytest.mark.parametrize(
    ("counter", "value", "schedule"),
    [
        ("num_bad", 0, {"patience": 1}),
        ("best", float("inf"), {}),
        ("cooldown", 0, {}),
        ("validations", 0, {}),
        ("step", 0, {"warmup_steps": 50}),
        ("smoothed", None, {"smoothing": 0.5}),
    ],
)
def test_without_one_counter_the_run_ends_differently(tmp_path, counter, value, schedule):
    assert _differs(tmp_path, [(LockstepScheduler, "state_dict", WithoutCounter(counter, value))], **schedule)


_VALIDATE = Trainer._validate


def saves_first(trainer):
    """`Trainer._validate` as others have it: the checkpoint is taken before the decision."""
    trainer._validated_at = trainer.replica.step
    trainer._save(wait=True)
    trainer._checkpoint_is_due = lambda: trainer.replica.end() is not None
    return _VALIDATE(trainer)


def test_saved_before_the_decision_an_observation_is_lost(tmp_path):
    assert _differs(tmp_path, [(Trainer, "_validate", saves_first)])


# A ledger that is damaged.


@pytest.fixture(scope="module")
def stopped_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopped")
    run_ranks(_train_to_step, 1, make_config(folder, **SECTIONS), 70)
    return folder


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_ledger_stops_nothing(stopped_run, tmp_path, seed):
    """The checkpoint says where to go on; what can be read of the ledger is read, and nobody sees a traceback."""
    rng = random.Random(seed)
    shutil.copytree(stopped_run / "run", tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / "ledger.jsonl"
    content = bytearray(path.read_bytes())
    damage = rng.choice(["truncate", "flip", "remove", "empty", "lines", "garbage"])
    if damage == "truncate":
        content = content[: rng.randrange(len(content))]
    elif damage == "flip":
        for _ in range(rng.randrange(1, 20)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif damage == "lines":
        lines = content.splitlines(keepends=True)
        rng.shuffle(lines)
        content = b"".join(lines[rng.randrange(len(lines)) :])
    elif damage == "garbage":
        content = bytearray(rng.randbytes(5_000))
    path.write_bytes(b"" if damage == "empty" else bytes(content))
    if damage == "remove":
        path.unlink()
    config = make_config(tmp_path, **SECTIONS)
    train(config)
    history = read_ledger(tmp_path / "run")
    assert history.finished["validations"] == 4
    assert history.validations[-1]["validation"] == 4
    write_report(tmp_path / "run")
    whole = read_ledger(stopped_run / "run").validations
    if damage in {"truncate", "remove", "empty"}:  # what is there is right
        assert all(event in whole for event in history.validations[:-1])
