"""From a replica to a checkpoint and back."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from distplateau.lockstep.exact import Partial
from distplateau.lockstep.metric import GlobalMean
from distplateau.training.replica import Best
from distplateau.training.saving.checkpoint import Checkpoint, MisfitError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from distplateau.training.replica import Replica

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
        Those of each rank: BatchNorm's statistics of its own samples, and what is in no state dict.
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


def take(replica: Replica, unfinished: Unfinished) -> Checkpoint:
    """Collect what training continues from. The tensors are those that training goes on with. Main rank."""
    scaler = replica.accelerator.scaler
    state = {
        "step": replica.step,
        "validations": replica.scheduler.state.validations,
        "scheduler": replica.scheduler.state_dict(),
        "best": vars(replica.best),
        "reductions": replica.reductions,
        "world_size": replica.accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "run_id": replica.run_id,
        "scaler": None if scaler is None else scaler.state_dict(),
        "train_loss": unfinished.train_loss,
        "nonfinite": unfinished.nonfinite,
    }
    best = best_metadata(replica) if replica.best.validation and replica.best.step == replica.step else None
    optimizer = replica.optimizer.state_dict()
    return Checkpoint(weights(replica), optimizer, state, average_weights(replica), unfinished.buffers, best)


def weights(replica: Replica) -> dict[str, Tensor]:
    """Return the network's state dict."""
    # Buffers change in the forward pass, before the writer has copied the rest.
    buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in replica.network.named_buffers()}
    state: dict[str, Tensor] = replica.network.state_dict()
    return {name: buffers.get(name, tensor) for name, tensor in state.items()}


def average_weights(replica: Replica) -> dict[str, Tensor] | None:
    """Return the state dict of the average, None where there is none."""
    return dict(replica.average.network.state_dict()) if replica.average else None


def best_metadata(replica: Replica) -> dict[str, str]:
    """Return what the file of the best weights says of them."""
    best = replica.best
    return {
        "monitor": replica.config.schedule.monitor,
        "value": repr(best.value),
        "validation": str(best.validation),
        "step": str(best.step),
    }


def _put_back_buffers(network: nn.Module, saved: Mapping[str, Tensor]) -> None:
    """Take over all buffers, also those that are in no state dict."""
    for name, buffer in network.named_buffers():
        if saved[name].shape != buffer.shape:
            raise MisfitError(f"its buffer {name} is {list(saved[name].shape)} and not {list(buffer.shape)}")
        buffer.copy_(saved[name])


def put_back(replica: Replica, checkpoint: Checkpoint) -> None:
    """Take over everything but the losses since the last validation, which would be added twice. Every rank."""
    state, accelerator = checkpoint.state, replica.accelerator
    same_ranks = state["world_size"] == accelerator.num_processes
    replica.network.load_state_dict(dict(checkpoint.model))
    if checkpoint.buffers:
        same = len(checkpoint.buffers) == accelerator.num_processes
        _put_back_buffers(replica.network, checkpoint.buffers[accelerator.process_index if same else 0])
    if replica.average:
        replica.average.network.load_state_dict(dict(checkpoint.average or checkpoint.model))
    if replica.config.schedule.restore_best:
        on_device = {name: tensor.to(accelerator.device) for name, tensor in checkpoint.best_weights().items()}
        replica.best_weights = on_device
    replica.optimizer.load_state_dict(checkpoint.optimizer)
    replica.scheduler.load_state_dict(state["scheduler"])
    if accelerator.scaler is not None and state["scaler"] is not None:
        accelerator.scaler.load_state_dict(state["scaler"])
    if accelerator.device.type == "cpu" and same_ranks:
        torch.set_num_threads(state["threads"])  # their number decides in which order sums are added
    replica.step, replica.reductions, replica.run_id = state["step"], state["reductions"], state["run_id"]
    replica.best = Best(**state["best"])
