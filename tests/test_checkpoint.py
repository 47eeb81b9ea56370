"""Checkpoints: whole or not there, verified, harmless."""

from __future__ import annotations

import hashlib
import json
import random
import stat

import pytest
import torch

from distplateau.errors import InputError
from distplateau.training.saving.checkpoint import Checkpoint, CheckpointFolder, save_weights, step_of


def make(step: int, best: int = 0) -> Checkpoint:
    weights = {"w": torch.full((50,), float(step)), "b": torch.arange(3)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Checkpoint(weights, optimizer, {"step": step, "best": {"validation": 1, "step": best}})


@pytest.fixture
def folder(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step in (1, 2, 3):
        save_weights(tmp_path / "model.safetensors", {"w": torch.full((50,), float(step))}, {"step": str(step)})
        folder.save(make(step), step)
    return folder


def test_round_trip_of_the_newest_and_the_old_ones_are_removed(folder):
    assert [path.name for path in folder.all()] == ["step-00000002", "step-00000003"]
    checkpoint, rejected = folder.load_newest()
    assert rejected == []
    assert checkpoint.state["step"] == 3
    assert torch.equal(checkpoint.model["w"], torch.full((50,), 3.0))
    assert torch.equal(checkpoint.optimizer["state"][0]["exp_avg"], torch.ones(5))


@pytest.mark.parametrize("seed", range(50))
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder, seed):
    rng = random.Random(seed)
    newest = folder.all()[-1]
    victim = rng.choice(sorted(newest.iterdir()))
    content = bytearray(victim.read_bytes())
    damage = rng.choice(["truncate", "flip", "remove", "empty"])
    if damage == "remove":
        victim.unlink()
    elif damage == "truncate":
        victim.write_bytes(content[: rng.randrange(len(content))])
    elif damage == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        victim.write_bytes(content)
    elif damage == "empty":
        victim.write_bytes(b"")
    checkpoint, rejected = folder.load_newest()
    assert checkpoint.state["step"] == 2
    assert [one.path for one in rejected] == [newest]
    assert rejected[0].reason


def test_a_hostile_optimizer_file_is_not_executed(folder, tmp_path):
    import pickle

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    newest = folder.all()[-1]
    (newest / "optimizer.pt").write_bytes(pickle.dumps(Evil()))
    manifest = json.loads((newest / "manifest.json").read_text())
    manifest["optimizer.pt"] = hashlib.sha256((newest / "optimizer.pt").read_bytes()).hexdigest()
    (newest / "manifest.json").write_text(json.dumps(manifest))
    checkpoint, rejected = folder.load_newest()
    assert checkpoint.state["step"] == 2
    assert "optimizer" in rejected[0].reason or "cannot be read" in rejected[0].reason
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_leaves_the_older_ones_whole(folder, monkeypatch):
    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(InputError, match="No space left on device"):
        folder.save(make(4), 4)
    assert folder.load_newest()[0].state["step"] == 3
    assert not list(folder.path.glob(".partial*"))


def test_a_partial_folder_is_no_checkpoint(folder):
    (folder.path / ".partial-step-00000009").mkdir()
    assert folder.load_newest()[0].state["step"] == 3


def test_best_weights_go_back_with_the_checkpoint(folder, tmp_path):
    from safetensors.torch import load_file

    checkpoint, _ = folder.load_newest()
    save_weights(tmp_path / "model.safetensors", {"w": torch.zeros(50)}, {})  # of work that is done again
    folder.restore_best(checkpoint)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["w"], torch.full((50,), 3.0))


def test_no_checkpoint_is_no_error(tmp_path):
    assert CheckpointFolder(tmp_path).load_newest() == (None, [])


def test_tied_weights_are_saved(tmp_path):
    shared = torch.ones(3)
    save_weights(tmp_path / "tied.safetensors", {"a": shared, "b": shared}, {})


def test_files_are_not_writable_by_others(folder):
    for path in folder.all()[-1].iterdir():
        assert not path.stat().st_mode & stat.S_IWOTH


def rewrite(checkpoint, name, content: bytes):
    """Change a file and the manifest with it, as somebody who means harm does, or another version."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = hashlib.sha256(content).hexdigest()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"format": 2, "step": 3}', "it has format 2, this version reads 1"),
        (b'{"step": 3}', "it has format None"),
        (b'{"format": 1, "step": 33}', "it holds step 33: it was renamed"),
        (b"[1]", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
    ],
)
def test_another_version_is_named(folder, content, reason):
    rewrite(folder.all()[-1], "state.json", content)
    checkpoint, [rejected] = folder.load_newest()
    assert checkpoint.state["step"] == 2
    assert reason in rejected.reason


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("aside", [True, False])
def test_damaged_ones_do_not_push_out_good_ones(tmp_path, keep, aside):
    """Those beyond the step that is saved were passed over: they are not the newest."""
    folder = CheckpointFolder(tmp_path, keep=keep)
    for step in range(1, keep + 1):
        folder.save(make(step), step)
    for step in (7, 8):
        (folder.path / f"step-{step:08d}").mkdir()
    _, rejected = folder.load_newest()
    assert len(rejected) == 2
    if aside:
        folder.set_aside(rejected)
        assert len(folder.all()) == keep
    for step in (keep + 1, keep + 2):
        folder.save(make(step), step)
        checkpoint, rejected = folder.load_newest()
        assert checkpoint.state["step"] == step
        assert len(folder.all()) - len(rejected) == keep


def test_the_one_of_the_best_validation_stays(tmp_path):
    folder = CheckpointFolder(tmp_path, keep=2)
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
        folder.save(make(step, best), step)
    assert [step_of(path) for path in folder.all()] == [2, 4, 5]
    for step in (6, 7):
        folder.save(make(step, best=6), step)
    assert [step_of(path) for path in folder.all()] == [6, 7]


def test_nobody_s_copies_are_checkpoints_and_steps_are_numbers(folder):
    import shutil

    newest = folder.all()[-1]
    shutil.copytree(newest, newest.with_name("step-00000003.bak"))
    (folder.path / "step-x").mkdir()
    big = CheckpointFolder(folder.run_dir, keep=3)
    big.save(make(99_999_999), 99_999_999)
    big.save(make(100_000_000), 100_000_000)
    assert [step_of(path) for path in big.all()] == [3, 99_999_999, 100_000_000]
    assert big.load_newest()[0].state["step"] == 100_000_000
    assert newest.with_name("step-00000003.bak").exists()


def test_writing_into_the_best_weights_damages_no_checkpoint(folder, tmp_path):
    """`cp` and safetensors write into the file that is there."""
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.truncate(5)
    assert folder.load_newest()[1] == []
    folder.restore_best(folder.load_newest()[0])
    with (tmp_path / "model.safetensors").open("rb+") as file:
        file.truncate(5)
    assert folder.load_newest()[1] == []


def test_best_weights_of_abandoned_work_are_not_taken_along(tmp_path):
    """There are some in the run folder, but by the checkpoint's own account there was no best yet."""
    folder = CheckpointFolder(tmp_path)
    save_weights(tmp_path / "model.safetensors", {"w": torch.zeros(5)}, {})
    folder.save(Checkpoint({"w": torch.ones(5)}, {}, {"step": 1, "best": {"validation": 0, "step": 0}}), 1)
    assert folder.load_newest()[0].best_weights() == {}


def test_one_that_does_not_fit_is_passed_over(folder):
    def apply(checkpoint):
        if checkpoint.state["step"] == 3:
            raise RuntimeError("size mismatch for 0.weight:\n copying a param")

    checkpoint, [rejected] = folder.load_newest(apply)
    assert checkpoint.state["step"] == 2
    assert rejected.whole
    assert rejected.reason == "it does not fit this run (RuntimeError: size mismatch for 0.weight: copying a param)"
    assert folder.load_newest(upto=2)[0].state["step"] == 2


@pytest.mark.parametrize(("error", "raised"), [(PermissionError(13, "x"), InputError), (MemoryError(), MemoryError)])
def test_what_is_no_damage_of_the_checkpoint_stops(folder, monkeypatch, error, raised):
    """Otherwise all work would be done again for want of a permission or of memory."""

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr("torch.load", fail)
    with pytest.raises(raised):
        folder.load_newest()
