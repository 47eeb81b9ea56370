"""What training changes, as one rank holds it."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from distplateau.record.tracking.tracker import new_run_id
from distplateau.training.exchange import share_gradients
from distplateau.training.parts.averaging import WeightAverage

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn

    from distplateau.config import Config
    from distplateau.lockstep.plateau import Decision
    from distplateau.training.setup import Parts


@dataclass
class Best:
    """The best validation so far, by the plain value of the monitored metric."""

    value: float
    validation: int = 0
    step: int = 0


class Replica:
    """Weights, their average, optimizer and schedule, and how far they are. The same bits on every rank.

    Parameters
    ----------
    accelerator
        Wraps model, optimizer and schedule and chooses the device.

    Attributes
    ----------
    model, network
        The model as it is trained (in DDP, with more than one rank), and the bare one.
    step
        Optimizer steps made.
    reductions
        How often the schedule has reduced the learning rate.
    best_weights
        Those that a reduction puts back; empty unless ``schedule.restore_best`` asks for it.
    """

    def __init__(self, config: Config, parts: Parts, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.total_steps = config, accelerator, parts.length.total_steps
        if config.training.channels_last:
            parts.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if config.training.compile:
            parts.model.compile()
        with warnings.catch_warnings():
            # torch >= 2.14 has another name for it, which Accelerate does not know yet.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            prepared = accelerator.prepare(parts.model, parts.optimizer, parts.scheduler)
        self.model, self.optimizer, self.scheduler = prepared
        share_gradients(self.model)
        self.network: nn.Module = accelerator.unwrap_model(self.model)
        self.average = WeightAverage(self.network, config.training.ema) if config.training.ema else None
        self.best_weights: dict[str, Tensor] = {}
        self.step = 0
        self.best = Best(math.inf if config.schedule.resolved_mode == "min" else -math.inf)
        self.reductions = 0
        self.run_id = new_run_id()

    @property
    def validated(self) -> nn.Module:
        """The network that is validated and whose weights are saved as the best: the average, where there is one."""
        return self.average.network if self.average else self.network

    @property
    def parameters(self) -> int:
        """The number of trained and frozen parameters."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def updated(self) -> None:
        """Count a step of the optimizer, which schedule and average follow."""
        self.scheduler.step_update()
        self.step += 1
        if self.average:
            self.average.update(self.step)

    def end(self) -> str | None:
        """Return why the run is at its end, None while it is not. The same on every rank, also after a resume."""
        section = self.config.training
        if self.step >= self.total_steps:
            return f"{section.epochs} epochs"
        if section.most_reductions is not None and self.reductions >= section.most_reductions:
            return f"{self.reductions} reductions"
        if section.early_stop == "min_lr" and self.scheduler.at_floor():
            return "min_lr"
        return None

    def lagging_schedule(self) -> dict[str, int]:
        """Return the schedule's own step where a gradient scaler left out steps of the optimizer."""
        step = self.scheduler.state.step
        return {} if step == self.step else {"schedule_step": step}

    def note_best(self, decision: Decision) -> bool:
        """Remember the best value as such, without the threshold that the schedule puts on it; say if this is it."""
        sign = 1 if self.config.schedule.resolved_mode == "min" else -1
        if not math.isfinite(decision.value) or sign * decision.value >= sign * self.best.value:
            return False
        self.best = Best(decision.value, decision.validation, self.step)
        return True

    def mind_best(self, decision: Decision, *, improved: bool) -> None:
        """Keep the best weights on every rank, and put them back at a reduction, if that is asked for."""
        wish = self.config.schedule.restore_best
        if wish is False:
            return
        if improved:
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self.validated.state_dict().items()}
        elif decision.reduced and self.best_weights:
            self.network.load_state_dict(self.best_weights)
            if self.average:
                self.average.network.load_state_dict(self.best_weights)
            if wish == "reset":
                self.optimizer.optimizer.state.clear()
