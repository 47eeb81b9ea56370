"""Checkpoints: complete, verified, and found by looking.

A checkpoint is a folder ``checkpoints/step-00000123`` that was written under another name, flushed to the disk and
renamed; a manifest holds the SHA-256 of its files. Weights are safetensors, the optimizer is read with
``weights_only``: loading one executes no code.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

FORMAT = 1
_WRITE_ERRORS = (OSError, MemoryError, RuntimeError, safetensors.SafetensorError)  # torch raises RuntimeError
# What applying the contents of a checkpoint to another model, optimizer or version raises.
_MISFIT_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_NAME = re.compile(r"step-(\d+)")
_FULL_BYTES = 2**20
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
        In the middle of an epoch: the buffers of each rank, which hold BatchNorm statistics of its own samples. At a
        validation they are equal on all ranks, and there only where some are in no state dict.
    best
        If its weights (the average, where there is one) are the best so far: what is to be written in their file.
    path
        Where it was read from; None before it is saved.
    """

    model: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    state: dict[str, Any]
    average: Mapping[str, Tensor] | None = None
    buffers: Sequence[Mapping[str, Tensor]] = ()
    best: Mapping[str, str] | None = None
    path: Path | None = None

    @property
    def judged(self) -> str:
        """Return the name of the file with the weights that are validated."""
        return _MODEL if self.average is None else _AVERAGE

    def best_weights(self) -> dict[str, Tensor]:
        """Read the best weights as they were at the checkpoint; empty if there were none."""
        assert self.path is not None
        best = self.path / _BEST
        return safetensors.torch.load_file(best) if best.exists() else {}


@dataclass(frozen=True)
class Rejected:
    """A checkpoint that was passed over, and why.

    Parameters
    ----------
    whole
        Whether it is as it was written, but belongs elsewhere.
    """

    path: Path
    reason: str
    whole: bool = False


class MisfitError(Exception):
    """A checkpoint is whole and of another run."""


class CheckpointFolder:
    """The checkpoints of one run. Writing is for the main rank; every rank reads.

    Parameters
    ----------
    run_dir
        The run folder.
    keep
        How many of the newest stay. The one of the best validation stays as well, where there is one.
    """

    def __init__(self, run_dir: Path, keep: int = 2) -> None:
        self.run_dir = run_dir
        self.path = run_dir / "checkpoints"
        self.keep = keep

    def save(self, checkpoint: Checkpoint, step: int) -> Path:
        """Write a checkpoint that is either there as a whole or not at all, then remove those that are too old.

        If its weights are the best so far, they become those of the run.

        Raises
        ------
        InputError
            If the folder cannot be written (full, read-only); older checkpoints stay as they are.
        """
        final = self.path / f"step-{step:08d}"
        unfinished = self.path / f".partial-step-{step:08d}"
        try:
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir(parents=True)
            _sync(self.run_dir)
            self._write_files(checkpoint, unfinished)
            _sync(unfinished)
            if final.exists():
                shutil.rmtree(final)
            unfinished.rename(final)
            _sync(self.path)
            if checkpoint.best is not None:
                self._publish_best(final)
        except _WRITE_ERRORS as error:
            problem = f"the checkpoint of step {step} cannot be written ({_reason(error, self.path)})"
            shutil.rmtree(unfinished, ignore_errors=True)
            fix = "free space or fix the permissions and start again; older checkpoints are whole"
            raise InputError(str(self.path), problem, fix) from error
        self._prune(step, best=checkpoint.state["best"]["step"])
        return final

    def load_newest(
        self, apply: Callable[[Checkpoint], object] = lambda _: None, upto: int | None = None
    ) -> tuple[Checkpoint | None, list[Rejected]]:
        """Return the newest checkpoint that is whole and fits, and those that were passed over with the reason.

        Parameters
        ----------
        apply
            Continues from the checkpoint. If it raises, the checkpoint is passed over as one of another run.
        upto
            Look no further than at this step.

        Raises
        ------
        InputError
            If a checkpoint may not be read.
        """
        rejected = []
        for path in reversed(self.all()):
            if upto is not None and step_of(path) > upto:
                continue
            try:
                checkpoint = _read(path)
                apply(checkpoint)
            except _DamagedError as error:
                rejected.append(Rejected(path, str(error)))
            except MisfitError as error:
                rejected.append(Rejected(path, str(error), whole=True))
            except (InputError, torch.OutOfMemoryError):
                raise
            except _MISFIT_ERRORS as error:
                said = " ".join(str(error).split())[:200]
                reason = f"it does not fit this run ({type(error).__name__}: {said})"
                rejected.append(Rejected(path, reason, whole=True))
            else:
                return checkpoint, rejected
        return None, rejected

    def all(self) -> list[Path]:
        """Return all checkpoint folders, oldest first; what somebody else put beside them is none."""
        found = (path for path in self.path.glob("step-*") if _NAME.fullmatch(path.name) and path.is_dir())
        return sorted(found, key=step_of)

    def set_aside(self, rejected: Sequence[Rejected]) -> None:
        """Rename those that were passed over: they must not count among the newest that stay. Main rank.

        Nothing is deleted, for they may be somebody's.
        """
        for one in rejected:
            aside = one.path.with_name(f"passed-over-{one.path.name}")
            with contextlib.suppress(OSError):
                shutil.rmtree(aside, ignore_errors=True)
                one.path.rename(aside)

    def restore_best(self, checkpoint: Checkpoint) -> None:
        """Put the best weights back as they were at the checkpoint: later ones belong to work that is done again.

        Raises
        ------
        InputError
            If they cannot be written.
        """
        assert checkpoint.path is not None
        try:
            self._publish_best(checkpoint.path)
        except _WRITE_ERRORS as error:
            raise self._no_best(error) from error

    def save_best(self, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
        """Write the run's best weights without a checkpoint.

        Raises
        ------
        InputError
            If they cannot be written.
        """
        try:
            save_weights(self.run_dir / _MODEL, weights, metadata)
        except _WRITE_ERRORS as error:
            raise self._no_best(error) from error

    def _no_best(self, error: Exception) -> InputError:
        problem = f"the best weights cannot be written ({_reason(error, self.run_dir)})"
        fix = "free space or fix the permissions and start again"
        return InputError(str(self.run_dir / _MODEL), problem, fix)

    def _publish_best(self, folder: Path) -> None:
        best = folder / _BEST
        if best.exists():
            replace_file(self.run_dir / _MODEL, lambda path: shutil.copyfile(best, path))

    def _write_files(self, checkpoint: Checkpoint, folder: Path) -> None:
        """Write each file in a thread of its own: writing, flushing and hashing do not hold Python's lock."""
        files = _files(checkpoint)
        best = self.run_dir / _MODEL
        if checkpoint.best is None and checkpoint.state["best"]["validation"] and best.exists():
            # No link: one bad block, or somebody who writes into the run's model.safetensors, would damage them all.
            files[_BEST] = partial(shutil.copyfile, best)
        pool = ThreadPoolExecutor(len(files))
        try:
            digests = pool.map(lambda name: _write_and_digest(files[name], folder / name), files)
            manifest = dict(zip(files, digests, strict=True))
        except KeyboardInterrupt:  # at once means now, not when the disk is ready
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        except BaseException:
            pool.shutdown()
            raise
        pool.shutdown()
        if checkpoint.best is not None:
            _link(folder / checkpoint.judged, folder / _BEST)
            manifest[_BEST] = manifest[checkpoint.judged]
        (folder / _MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        _sync(folder / _MANIFEST)

    def _prune(self, step: int, best: int) -> None:
        """Remove what is older than the newest few up to `step`; what is beyond is no work of this run."""
        for path in [path for path in self.all() if step_of(path) <= step][: -self.keep]:
            if step_of(path) != best:
                shutil.rmtree(path, ignore_errors=True)
        for path in self.path.glob(".partial-*"):
            shutil.rmtree(path, ignore_errors=True)


def _files(checkpoint: Checkpoint) -> dict[str, Callable[[Path], object]]:
    """Return the names of the files and what writes each."""
    tensors = {_MODEL: checkpoint.model}
    if checkpoint.average is not None:
        tensors[_AVERAGE] = checkpoint.average
    if checkpoint.buffers:
        by_rank = {f"{rank}/{name}": b for rank, held in enumerate(checkpoint.buffers) for name, b in held.items()}
        tensors[_BUFFERS] = by_rank

    def write_tensors(name: str, path: Path) -> None:
        metadata = dict(checkpoint.best) if checkpoint.best is not None and name == checkpoint.judged else None
        safetensors.torch.save_file(_contiguous(tensors[name]), path, metadata)

    state = json.dumps({"format": FORMAT, **_plain_infinities(checkpoint.state)}, indent=1)
    return {
        **{name: partial(write_tensors, name) for name in tensors},
        _OPTIMIZER: partial(torch.save, checkpoint.optimizer),
        _STATE: lambda path: path.write_text(state, encoding="utf-8"),
    }


def _write_and_digest(write: Callable[[Path], object], path: Path) -> str:
    write(path)
    _sync(path)
    return _sha256(path)


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    match = _NAME.fullmatch(path.name)
    assert match
    return int(match[1])


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write weights as safetensors, whole or not at all."""
    replace_file(path, lambda unfinished: safetensors.torch.save_file(_contiguous(weights), unfinished, dict(metadata)))


def _reason(error: Exception, folder: Path) -> str:
    """Say why writing failed; torch and safetensors do not tell a full disk from other errors."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    is_full = folder.exists() and shutil.disk_usage(folder).free < _FULL_BYTES
    return os.strerror(errno.ENOSPC) if is_full else " ".join(str(error).split())


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
        state = _real_infinities(json.loads((path / _STATE).read_text(encoding="utf-8")))
        if state.get("format") != FORMAT:
            raise _DamagedError(f"it has format {state.get('format')!r}, this version reads {FORMAT}")
        if state.get("step") != step_of(path):
            raise _DamagedError(f"it holds step {state.get('step')!r}: it was renamed")
        model = safetensors.torch.load_file(path / _MODEL)
        average = safetensors.torch.load_file(path / _AVERAGE) if _AVERAGE in manifest else None
        buffers = _by_rank(safetensors.torch.load_file(path / _BUFFERS)) if _BUFFERS in manifest else []
        optimizer = torch.load(path / _OPTIMIZER, map_location="cpu", weights_only=True)
    except (_DamagedError, MemoryError):
        raise
    except PermissionError as error:  # not a damage: what is older would be used, or nothing, without need
        fix = "fix the permissions and start again"
        raise InputError(str(path), f"may not be read ({_reason(error, path)})", fix) from error
    except FileNotFoundError as error:
        raise _DamagedError(f"{Path(error.filename or '').name} is missing") from error
    except Exception as error:  # whatever a reader says of foreign bytes
        raise _DamagedError(f"it cannot be read ({type(error).__name__}: {error})") from error
    return Checkpoint(model, optimizer, state, average, buffers, path=path)


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


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file, so that there is either the old or the new one, whole, whatever happens."""
    unfinished = path.with_name(f".partial-{path.name}")
    unfinished.unlink(missing_ok=True)
    write(unfinished)
    _sync(unfinished)
    unfinished.replace(path)
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


def _plain_infinities(value: Any) -> Any:
    """JSON has no infinities; the best value of a run starts as one."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nonfinite": repr(value)}
    if isinstance(value, dict):
        return {key: _plain_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_infinities(item) for item in value]
    return value


def _real_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"nonfinite"}:
            return float(value["nonfinite"])
        return {key: _real_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_real_infinities(item) for item in value]
    return value
