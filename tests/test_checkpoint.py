"""Checkpoints: whole or not there, verified, harmless."""

from __future__ import annotations

import random
import stat

import pytest
import torch

from distplateau.errors import InputError
from distplateau.training.checkpoint import Checkpoint, CheckpointFolder, save_weights


def make(step: int) -> Checkpoint:
    weights = {"w": torch.full((50,), float(step)), "b": torch.arange(3)}
    optimizer = {"state": {0: {"exp_avg": torch.ones(5)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return Checkpoint(weights, optimizer, {"step": step})


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
    victim.unlink()  # the best weights are a link
    if damage == "truncate":
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
    import hashlib
    import json
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
