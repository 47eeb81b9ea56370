"""Where a run goes on: from the newest checkpoint that is whole and its own, the same one on every rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from accelerate.utils import gather_object

from distplateau.errors import InputError
from distplateau.training.saving.checkpoint import step_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from distplateau.training.saving.checkpoint import Checkpoint, CheckpointFolder, Rejected


def agree_on_newest(
    folder: CheckpointFolder, apply: Callable[[Checkpoint], object]
) -> tuple[Checkpoint | None, list[Rejected]]:
    """Return the newest checkpoint that every rank can use, and those that were passed over. Collective.

    Parameters
    ----------
    apply
        Continues from a checkpoint; see `CheckpointFolder.load_newest`.

    Raises
    ------
    InputError
        If there is none but those of other runs, or the ranks do not find the same ones.
    """
    checkpoint, rejected = folder.load_newest(apply)
    steps = _found_steps(checkpoint)
    if len(set(steps)) > 1 and min(steps) >= 0:  # not every rank can read the newest one
        checkpoint, rejected = folder.load_newest(apply, upto=min(steps))
        steps = _found_steps(checkpoint)
    _check_found(folder.path, steps, rejected)
    return checkpoint, rejected


def _found_steps(checkpoint: Checkpoint | None) -> list[int]:
    """Return the step of each rank's checkpoint, -1 for none. Collective."""
    return gather_object([-1 if checkpoint is None or checkpoint.path is None else step_of(checkpoint.path)])


def _check_found(folder: Path, steps: list[int], rejected: list[Rejected]) -> None:
    """Refuse to go on from different places, or anew where there is work of another run."""
    if len(set(steps)) > 1:
        found = ", ".join(f"rank {rank}: {step if step >= 0 else 'none'}" for rank, step in enumerate(steps))
        problem = f"does not hold the same checkpoints for all ranks ({found})"
        raise InputError(str(folder), problem, "use a run.dir that all nodes share")
    strangers = [one for one in rejected if one.whole]
    if steps[0] < 0 and strangers:
        problem = f"holds only checkpoints that are not of this run ({strangers[0].path.name}: {strangers[0].reason})"
        raise InputError(str(folder), problem, "remove them, or choose another run.name")
