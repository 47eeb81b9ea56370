"""What of a run's standing is neither weights nor optimizer, and is saved with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from distplateau.lockstep.exact import Partial
from distplateau.lockstep.metric import GlobalMean
from distplateau.training.saving.checkpoint import MisfitError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Best:
    """The best validation so far, by the plain value of the monitored metric."""

    value: float
    validation: int = 0
    step: int = 0


# What the state of a checkpoint holds; None may stand in the place of the optional ones.
_STATE: dict[str, type] = {
    "step": int, "validations": int, "reductions": int, "world_size": int, "threads": int, "run_id": str,
    "scheduler": dict,
}  # fmt: skip
_OPTIONAL_STATE: dict[str, type] = {"scaler": dict, "train_loss": dict, "nonfinite": dict}


@dataclass
class Unfinished:
    """What has happened since the last validation; empty at one.

    Parameters
    ----------
    train_loss
        Exact sum of the training losses over all ranks.
    buffers
        Those of each rank: BatchNorm's statistics of its own samples.
    nonfinite
        Step and rank of the first training loss that was NaN or infinite.
    """

    train_loss: dict[str, int] | None = None
    buffers: list[dict[str, Tensor]] = field(default_factory=list)
    nonfinite: dict[str, int] | None = None


def check_state(state: dict[str, Any]) -> None:
    """Refuse what is no state of a run before any of it is used.

    Raises
    ------
    MisfitError
        Naming what is missing or of another kind.
    """
    for key, kind in _STATE.items():
        if not isinstance(state.get(key), kind):
            raise MisfitError(f"its state has no {key}")
    for key, kind in _OPTIONAL_STATE.items():
        if key not in state or not isinstance(state[key], kind | None):
            raise MisfitError(f"its state has no {key}")
    best = Best(**state["best"])
    if not isinstance(best.value, float) or not isinstance(best.validation, int) or not isinstance(best.step, int):
        raise MisfitError("its state has no best")
    if state["train_loss"] is not None:
        GlobalMean().absorb(Partial(**state["train_loss"]))
    if state["nonfinite"] is not None and state["nonfinite"].keys() != {"step", "rank"}:
        raise MisfitError("its state has no nonfinite")
