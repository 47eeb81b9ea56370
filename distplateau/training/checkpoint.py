"""Checkpoints: complete, verified, and found by looking.

A checkpoint is a folder ``checkpoints/step-00000123`` that was written under another name, flushed to the disk and
renamed; a manifest holds the SHA-256 of its files. Weights are safetensors, the optimizer is read with
``weights_only``: loading one executes no code.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

FORMAT = 1
_MODEL, _OPTIMIZER, _STATE, _BEST, _AVERAGE, _BUFFERS, _MANIFEST = (
    "model.safetensors",
    "optimizer.pt",
    "state.json",
    "best.safetensors",
    "average.safetensors",
    "buffers.safetensors",
    "manifest.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """What training continues from.

    Parameters
    ----------
    model
        The model's state dict.
    optimizer
        The optimizer's state dict.
    state
        Plain values: scheduler, position, best so far, gradient scaler, tracking id.
    average
        State dict of the moving average of the weights, where there is one.
    buffers
        In the middle of an epoch: the buffers of each rank, which hold BatchNorm statistics of its own samples.
    path
        Where it was read from; None before it is saved.
    """

    model: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    average: Mapping[str, Tensor] | None = None
    buffers: Sequence[Mapping[str, Tensor]] = ()
    path: Path | None = None

    def best_weights(self) -> dict[str, Tensor]:
        """Read the best weights as they were at the checkpoint; empty if there were none."""
        assert self.path is not None
        best = self.path / _BEST
        return safetensors.torch.load_file(best) if best.exists() else {}


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was passed over, and why."""

    path: Path
    reason: str


class CheckpointFolder:
    """The checkpoints of one run. Writing is for the main rank; every rank reads.

    Parameters
    ----------
    run_dir
        The run folder.
    keep
        How many of the newest stay.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "checkpoints"
        self.keep = keep

    def save(self, checkpoint: Checkpoint, step: int) -> Path:
        """Write a checkpoint that is either there as a whole or not at all, then remove those that are too old.

        Raises
        ------
        InputError
            If the folder cannot be written (full, read-only); older checkpoints stay as they are.
        """
        final = self.path / f"step-{step:08d}"
        partial = self.path / f".partial-step-{step:08d}"
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write_files(checkpoint, partial)
            _sync(partial)
            if final.exists():
                shutil.rmtree(final)
            partial.rename(final)
            _sync(self.path)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise InputError(
                str(self.path),
                f"the checkpoint of step {step} cannot be written ({error.strerror or error})",
                "free space or fix the permissions and start again; older checkpoints are whole",
            ) from error
        self._prune()
        return final

    def load_newest(self) -> tuple[Checkpoint | None, list[Rejected]]:
        """Return the newest checkpoint that is whole, and those that were passed over with the reason."""
        rejected = []
        for path in reversed(self.all()):
            try:
                return _read(path), rejected
            except _DamagedError as error:
                rejected.append(Rejected(path, str(error)))
        return None, rejected

    def all(self) -> list[Path]:
        """Return all checkpoint folders, oldest first."""
        return sorted(path for path in self.path.glob("step-*") if path.is_dir())

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Put the best weights back as they were at the checkpoint: later ones belong to work that is done again."""
        assert checkpoint.path is not None
        best = checkpoint.path / _BEST
        if best.exists():
            _replace(self.run_dir / _MODEL, lambda path: _link(best, path))

    def _write_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        safetensors.torch.save_file(_contiguous(checkpoint.model), folder / _MODEL)
        if checkpoint.average is not None:
            safetensors.torch.save_file(_contiguous(checkpoint.average), folder / _AVERAGE)
        if checkpoint.buffers:
            by_rank = {f"{rank}/{name}": b for rank, held in enumerate(checkpoint.buffers) for name, b in held.items()}
            safetensors.torch.save_file(_contiguous(by_rank), folder / _BUFFERS)
        torch.save(checkpoint.optimizer, folder / _OPTIMIZER)
        state = {"format": FORMAT, **checkpoint.state}
        (folder / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        best = self.run_dir / _MODEL
        if best.exists():
            _link(best, folder / _BEST)
        names = sorted(path.name for path in folder.iterdir())
        for name in names:
            _sync(folder / name)
        manifest = {name: _sha256(folder / name) for name in names}
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(folder / _MANIFEST)

    def _prune(self) -> None:
        for path in self.all()[: -self.keep]:
            shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".partial-*"):
            shutil.rmtree(path, ignore_errors=True)


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, whole or not at all."""
    _replace(path, lambda partial: safetensors.torch.save_file(_contiguous(weights), partial, dict(metadata)))


class _DamagedError(Exception):
    """A checkpoint that must not be used."""


def _read(path: Path) -> Checkpoint:
    try:
        manifest = json.loads((path / _MANIFEST).read_text(encoding="utf-8"))
        for name in (_MODEL, _OPTIMIZER, _STATE):
            if name not in manifest:
                raise _DamagedError(f"{name} is not in the manifest")
        for name, expected in manifest.items():
            if _sha256(path / Path(name).name) != expected:
                raise _DamagedError(f"{name} is damaged: its SHA-256 is not the one in the manifest")
        state = json.loads((path / _STATE).read_text(encoding="utf-8"))
        if state.get("format") != FORMAT:
            raise _DamagedError(f"it has format {state.get('format')!r}, this version reads {FORMAT}")
        model = safetensors.torch.load_file(path / _MODEL)
        average = safetensors.torch.load_file(path / _AVERAGE) if _AVERAGE in manifest else None
        buffers = _by_rank(safetensors.torch.load_file(path / _BUFFERS)) if _BUFFERS in manifest else []
        optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    except _DamagedError:
        raise
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename or '').name} is missing") from error
    except Exception as error:  # whatever a reader says of foreign bytes
        raise _DamagedError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return Checkpoint(model, optimizer, state, average, buffers, path)


def _by_rank(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    ranks: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        rank, _, name = key.partition("/")
        ranks.setdefault(int(rank), {})[name] = tensor
    return [ranks[rank] for rank in sorted(ranks)]


def _contiguous(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Detach from shared memory: safetensors refuses tied weights."""
    seen: set[int] = set()
    result = {}
    for name, tensor in weights.items():
        pointer = tensor.data_ptr()
        result[name] = tensor.detach().clone().contiguous() if pointer in seen else tensor.detach().contiguous()
        seen.add(pointer)
    return result


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    partial = path.with_name(f".partial-{path.name}")
    partial.unlink(missing_ok=True)
    write(partial)
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _link(source: Path, target: Path) -> None:
    """Share the bytes where the file system can; the source is only ever replaced, never written into."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
