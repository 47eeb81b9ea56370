"""Which checkpoint a run goes on from, and that it is the same one on every rank."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distplateau.errors import InputError
from distplateau.record.ledger import read_ledger
from distplateau.training import journal
from distplateau.training.saving import checkpoint
from distplateau.training.saving.checkpoint import CheckpointFolder
from distplateau.training.step import TrainStep
from distplateau.training.trainer import Trainer, train
from ranks import run_ranks
from test_interruption import SECTIONS, _signalled, trace
from test_saving import _train_to_step, saved_steps
from test_trainer import _train, make_config, same_tensors


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that was killed after step 70, with checkpoints at 44 and 66."""
    folder = tmp_path_factory.mktemp("stopped")
    assert run_ranks(_train_to_step, 1, make_config(folder, **SECTIONS), 70) == ["killed"]
    assert saved_steps(folder) == [44, 66]
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run, left alone: its weights and validations."""
    folder = tmp_path_factory.mktemp("whole")
    [(_, weights)] = run_ranks(_train, 1, make_config(folder, **SECTIONS))
    return weights, trace(folder)


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """The bits depend on the number of threads."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run_dir(stopped, tmp_path):
    shutil.copytree(stopped / "run", tmp_path / "run")
    return tmp_path / "run"


def rewrite(checkpoint: Path, name: str, content: bytes) -> None:
    """Change a file and the manifest with it."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def resumed_from(folder):
    return [e["step"] for e in read_ledger(folder / "run").events if e["event"] == "resumed"]


def foreign(folder, step, name="other", **sections):
    """Return a checkpoint of that step of another run."""
    config = make_config(folder / name, **{**SECTIONS, **sections})
    assert run_ranks(_train_to_step, 1, config, step + 1) == ["killed"]
    return folder / name / "run" / "checkpoints" / f"step-{step:08d}"


@pytest.mark.parametrize("sections", [{}, {"model": {"args": {"hidden": [33]}}}, {"training": {"epochs": 4}}])
def test_a_checkpoint_of_another_run_is_named_and_passed_over(run_dir, tmp_path, whole, capsys, sections):
    """Also where it would fit; once in the place of one of its own, once beyond them."""
    stranger = foreign(tmp_path, 66, **sections)
    shutil.rmtree(run_dir / "checkpoints/step-00000066")
    shutil.copytree(stranger, run_dir / "checkpoints/step-00000066")
    train(make_config(tmp_path, **SECTIONS))
    assert "step-00000066 is passed over: it is of run" in capsys.readouterr().out
    assert resumed_from(tmp_path) == [44]
    assert trace(tmp_path) == whole[1]
    assert (run_dir / "checkpoints/passed-over-step-00000066").is_dir()


def test_without_a_ledger_what_does_not_fit_is_passed_over(run_dir, tmp_path):
    stranger = foreign(tmp_path, 66, model={"args": {"hidden": [33]}})
    shutil.rmtree(run_dir / "checkpoints/step-00000066")
    shutil.copytree(stranger, run_dir / "checkpoints/step-00000066")
    (run_dir / "ledger.jsonl").unlink()
    train(make_config(tmp_path, **SECTIONS))
    assert resumed_from(tmp_path) == [44]


def test_nothing_starts_anew_beside_checkpoints_of_another_run(run_dir, tmp_path):
    stranger = foreign(tmp_path, 66)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    shutil.copytree(stranger, run_dir / "checkpoints/step-00000066")
    with pytest.raises(InputError, match=r"holds only checkpoints that are not of this run \(step-00000066: it is of"):
        train(make_config(tmp_path, **SECTIONS))
    assert saved_steps(tmp_path) == [66]


def test_a_model_that_does_not_fit_is_told_in_one_line(run_dir, tmp_path):
    changed = make_config(tmp_path, **{**SECTIONS, "model": {"args": {"hidden": [33]}}})
    with pytest.raises(InputError, match=r"step-00000066: it does not fit this run \(RuntimeError: .*size mismatch"):
        train(changed, override=True)
    assert saved_steps(tmp_path) == [44, 66]


def test_a_damaged_ledger_makes_no_stranger_of_a_checkpoint(run_dir, tmp_path):
    """The id in the ledger counts only with its seal."""
    ledger = run_dir / "ledger.jsonl"
    run_id = read_ledger(run_dir).start["run_id"]
    ledger.write_text(ledger.read_text().replace(run_id, "x" * len(run_id)))
    train(make_config(tmp_path, **SECTIONS))
    assert resumed_from(tmp_path) == [66]


class Scaler:
    """Stands in for a GPU's gradient scaler."""

    def load_state_dict(self, state):
        self.state = state


def test_all_of_the_state_is_taken_over(run_dir, tmp_path, monkeypatch):
    """Also what a run of digits would not miss, because its last validation is the best and nothing was reduced."""
    newest = run_dir / "checkpoints/step-00000066"
    state = json.loads((newest / "state.json").read_text())
    state.update(
        reductions=7, best={"value": -5.0, "validation": 1, "step": 22}, nonfinite={"step": 3, "rank": 0},
        scaler={"scale": 8.0},
    )  # fmt: skip
    rewrite(newest, "state.json", json.dumps(state).encode())
    resume, seen = Trainer._resume, []

    def watched(self):
        self.accelerator.scaler = Scaler()
        checkpoint = resume(self)
        one = self.replica
        seen.append((one.step, one.reductions, vars(one.best), self._nonfinite, one.run_id))
        seen.append(self.accelerator.scaler.state)
        self.accelerator.scaler = None
        return checkpoint

    monkeypatch.setattr(Trainer, "_resume", watched)
    train(make_config(tmp_path, **SECTIONS))
    assert seen == [(66, 7, state["best"], state["nonfinite"], state["run_id"]), state["scaler"]]
    finished = read_ledger(run_dir).finished
    assert (finished["reductions"], finished["best"], finished["best_step"]) == (7, -5.0, 22)


STATE_KEYS = (
    "step", "validations", "scheduler", "best", "reductions", "run_id", "scaler", "train_loss", "nonfinite",
    "world_size", "threads",
)  # fmt: skip


@pytest.mark.parametrize("key", STATE_KEYS)
@pytest.mark.parametrize("junk", ["missing", "a string", [1, 2]])
def test_junk_in_a_checkpoint_s_state_is_passed_over(run_dir, tmp_path, whole, key, junk):
    """With right hashes, as another version or an enemy would write it."""
    newest = run_dir / "checkpoints/step-00000066"
    state = json.loads((newest / "state.json").read_text())
    assert set(state) == {*STATE_KEYS, "format"}
    if junk == "missing":
        del state[key]
    else:
        state[key] = junk
    rewrite(newest, "state.json", json.dumps(state).encode())
    train(make_config(tmp_path, **SECTIONS))
    assert resumed_from(tmp_path) == [44]
    assert trace(tmp_path) == whole[1]


@pytest.mark.parametrize("junk", [[], {}, {"state": {}, "param_groups": []}, {"state": 1, "param_groups": 2}])
def test_junk_in_a_checkpoint_s_optimizer_is_passed_over(run_dir, tmp_path, whole, junk):
    newest = run_dir / "checkpoints/step-00000066"
    torch.save(junk, newest / "optimizer.pt")
    rewrite(newest, "optimizer.pt", (newest / "optimizer.pt").read_bytes())
    train(make_config(tmp_path, **SECTIONS))
    assert resumed_from(tmp_path) == [44]
    assert trace(tmp_path) == whole[1]


@pytest.mark.parametrize("threads", [1, 2])
def test_it_goes_on_with_the_threads_of_its_start(run_dir, tmp_path, whole, monkeypatch, threads):
    """A node with other cores; two threads add up in another order, as the negative control shows."""
    newest = run_dir / "checkpoints/step-00000066"
    state = json.loads((newest / "state.json").read_text())
    assert state["threads"] == 1
    rewrite(newest, "state.json", json.dumps({**state, "threads": threads}).encode())
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(2)
    _, weights = _train(0, make_config(tmp_path, **SECTIONS))
    assert torch.get_num_threads() == 2
    assert same_tensors(weights, whole[0]) == (threads == 1)


# The ranks.


def _with_a_view(rank, config, hidden):
    """Train; each rank does not see the steps in `hidden[rank]`."""
    found = CheckpointFolder.all
    names = {f"step-{step:08d}" for step in hidden[rank]}
    CheckpointFolder.all = lambda self: [path for path in found(self) if path.name not in names]
    try:
        return _train(rank, config)[1]
    except InputError as error:
        return str(error)
    finally:
        CheckpointFolder.all = found


def test_ranks_go_on_from_the_newest_that_all_of_them_can_read(run_dir, tmp_path):
    results = run_ranks(_with_a_view, 2, make_config(tmp_path, **SECTIONS), [[], [66]])
    assert same_tensors(*results)
    assert resumed_from(tmp_path) == [44]


def test_ranks_that_see_other_folders_are_told(run_dir, tmp_path):
    results = run_ranks(_with_a_view, 2, make_config(tmp_path, **SECTIONS), [[], [44, 66]])
    assert results[0] == results[1]
    assert "does not hold the same checkpoints for all ranks (rank 0: 66, rank 1: none)" in results[0]
    assert saved_steps(tmp_path) == [44, 66]


def test_a_ledger_without_the_seconds_ends_as_another(run_dir, tmp_path):
    """One flipped bit in a key: the line is an event as before."""
    ledger = run_dir / "ledger.jsonl"
    ledger.write_text(ledger.read_text().replace('"seconds"', '"secondr"', 1))
    train(make_config(tmp_path, **SECTIONS))
    assert read_ledger(run_dir).finished["seconds"] > 0


# Moments at which a job may die.


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_is_there_is_not_written_again(tmp_path, monkeypatch, ranks):
    """A signal at a step that is being saved anyway: to replace it would leave a moment without any."""
    config = make_config(tmp_path, **SECTIONS, checkpoint={"every": "1 steps", "keep": 1})
    results = run_ranks(_counted_saves, ranks, config)
    code, *_, step = results[0][0]
    assert code == 75
    assert results[0][1] == list(range(1, step + 1))  # each once
    assert saved_steps(tmp_path) == [step]


def _counted_saves(rank, config):
    saved, save = [], CheckpointFolder.save
    CheckpointFolder.save = lambda self, made, step: (saved.append(step), save(self, made, step))[1]
    try:
        return _signalled(rank, config, 5, [0], signal.SIGTERM), saved
    finally:
        CheckpointFolder.save = save


def test_the_configuration_is_never_half_written(run_dir, tmp_path, monkeypatch):
    """With half a configuration the run would be refused as another one."""
    before = (run_dir / "config.toml").read_bytes()

    sync = checkpoint._sync

    def dies(path):
        if "config" in path.name:
            raise OSError(28, "No space left on device")
        sync(path)

    monkeypatch.setattr(journal, "dump_config", lambda _: "changed")
    monkeypatch.setattr(checkpoint, "_sync", dies)
    with pytest.raises(InputError, match=r"config.toml: cannot be written \(No space left on device\)"):
        train(make_config(tmp_path, **SECTIONS))
    assert (run_dir / "config.toml").read_bytes() == before


def test_best_weights_that_cannot_be_put_back_are_told_in_one_line(run_dir, tmp_path, monkeypatch):
    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(InputError, match=r"model.safetensors: the best weights cannot be written \(No space left"):
        train(make_config(tmp_path, **SECTIONS))
    assert saved_steps(tmp_path) == [44, 66]


def test_other_settings_are_refused_without_a_ledger_too(run_dir, tmp_path):
    (run_dir / "ledger.jsonl").unlink()
    with pytest.raises(InputError, match=r"optimizer\.lr 0\.01 -> 0\.02"):
        train(make_config(tmp_path, **SECTIONS, optimizer={"lr": 0.02}))


def _no_disk_at_start(rank, config):
    """Train where the main rank cannot write the first line."""

    def full(*_args, **_kwargs):
        raise InputError("ledger.jsonl", "cannot be written (No space left on device)", "free space")

    opened, Trainer._open_journal = Trainer._open_journal, full
    try:
        train(config)
    except InputError as error:
        return str(error)
    finally:
        Trainer._open_journal = opened


def test_all_ranks_stop_when_nothing_can_be_written_at_the_start(tmp_path):
    first, other = run_ranks(_no_disk_at_start, 2, make_config(tmp_path), timeout=60)
    assert "No space left on device" in first
    assert "the main rank cannot write there" in other


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
def test_a_disk_that_is_full_from_the_start(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], check=False).returncode:
        pytest.skip("this machine mounts nothing")
    try:
        (disk / "run").mkdir()
        with pytest.raises(OSError, match="No space"):
            (disk / "filler").write_bytes(b"x" * 2**21)
        (tmp_path / "x.toml").write_text("")
        command = [
            sys.executable, "-m", "distplateau", "train", tmp_path / "x.toml", "--run.dir", disk, "--tracking.wandb",
            "disabled",
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2, done.stderr
        [line] = done.stderr.strip().splitlines()
        assert "No space left on device" in line
    finally:
        subprocess.run(["umount", disk], check=True)


# Each sample once an epoch.


def _recorded(rank, config, stop=None):
    """Train up to a step; return the samples of this rank by step."""
    add, call, seen = TrainStep._add_gradient, TrainStep.__call__, {}

    def recorded(self, real, batch_size, step):
        indices = self._batches_seen[self._place]
        seen.setdefault(step, []).extend(indices[:real].tolist())
        return add(self, real, batch_size, step)

    begin = TrainStep.begin

    def begun(self, step):
        begin(self, step)
        self._batches_seen = self._seeds._slices

    TrainStep._add_gradient, TrainStep.begin = recorded, begun
    try:
        _train_to_step(rank, config, 10_000 if stop is None else stop)
    finally:
        TrainStep._add_gradient, TrainStep.begin, TrainStep.__call__ = add, begin, call
    return seen


def _global_batches(results):
    steps = sorted({step for seen in results for step in seen})
    return {step: [index for seen in results for index in seen.get(step, [])] for step in steps}


def test_other_ranks_see_the_same_sequence_of_global_batches(tmp_path):
    """2 -> 1 -> 4, each killed in mid-epoch: batch by batch what one process sees that is left alone."""
    sections = {**SECTIONS, "training": {"epochs": 3}, "checkpoint": {"every": "5 steps"}}
    expected = _global_batches(run_ranks(_recorded, 1, make_config(tmp_path / "whole", **sections)))
    config = make_config(tmp_path / "cut", **sections)
    made = _global_batches(run_ranks(_recorded, 2, config, 13))
    assert max(made) == 12
    for ranks, stop, first in ((1, 38, 10), (4, None, 35)):
        later = _global_batches(run_ranks(_recorded, ranks, config, stop))
        assert min(later) == first
        made.update(later)
    assert made == expected
    steps_per_epoch = len(made) // 3
    for epoch in range(3):
        samples = [i for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch) for i in made[step]]
        assert sorted(samples) == list(range(len(samples)))
    assert [e["validation"] for e in read_ledger(tmp_path / "cut" / "run").validations] == [1, 2, 3]
