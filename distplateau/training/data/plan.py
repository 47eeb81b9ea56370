"""Which samples a rank takes at each step: a pure function of (seed, step, rank), read from any step on."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from distplateau.training.data.order import derived_seed, epoch_order, rank_slice

if TYPE_CHECKING:
    from distplateau.config import Config


@dataclass(frozen=True)
class StepPlan:
    """What a rank does in one step of an epoch.

    Parameters
    ----------
    batch_size
        Samples of the global batch, over all ranks.
    micro_batches
        Where each one begins and ends in the order of the epoch. There is at least one; a rank without samples has one
        that is empty.
    """

    batch_size: int
    micro_batches: tuple[tuple[int, int], ...]


class EpochPlan:
    """The steps of an epoch; all epochs have the same, each in an order of its own.

    Parameters
    ----------
    samples
        Size of the training set.
    """

    def __init__(self, config: Config, samples: int, rank: int, world_size: int) -> None:
        self.seed, self.samples, self.rank = config.run.seed, samples, rank
        size, section = config.data.global_batch_size, config.training
        self.steps: list[StepPlan] = []
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            begin, end = rank_slice(start, stop, rank, world_size)
            most = section.micro_batch_size or end - begin
            pieces = max(section.grad_accumulation, -(-(end - begin) // max(1, most)))
            ranges = [rank_slice(begin, end, piece, pieces) for piece in range(pieces)]
            filled = tuple((a, b) for a, b in ranges if a < b) or ((begin, begin),)
            self.steps.append(StepPlan(stop - start, filled))
        self.first = [0, *accumulate(len(step.micro_batches) for step in self.steps)]


class Slices(Sequence[Tensor]):
    """The indices of every micro-batch from a step on, to the end of the run; made when they are looked up.

    Parameters
    ----------
    least
        Samples that a micro-batch must have; it is filled up with the first ones of the epoch, which count nothing.
    device
        Where the indices are wanted.
    """

    def __init__(self, plan: EpochPlan, epochs: int, step: int, least: int, device: torch.device) -> None:
        self.plan, self.epochs, self.least, self.device = plan, epochs, least, device
        epoch, in_epoch = divmod(step, len(plan.steps))
        self._begin = epoch * plan.first[-1] + plan.first[in_epoch]
        self._ranges = [micro_batch for step_plan in plan.steps for micro_batch in step_plan.micro_batches]
        self._order: tuple[int, Tensor] = -1, torch.empty(0)

    def __len__(self) -> int:
        return self.epochs * self.plan.first[-1] - self._begin

    def __getitem__(self, place: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        epoch, in_epoch = self.locate(place)
        begin, end = self._ranges[in_epoch]
        if self._order[0] != epoch:
            order = epoch_order(self.plan.samples, self.plan.seed, epoch)
            self._order = epoch, order.to(self.device)
        indices = self._order[1][begin:end]
        if end - begin < self.least:
            order = self._order[1]
            fill = torch.arange(self.least - (end - begin), device=order.device).clamp(max=len(order) - 1)
            indices = torch.cat([indices, order[fill]])
        return indices

    def locate(self, place: int) -> tuple[int, int]:
        """Return the epoch of an item and its place among the micro-batches of that epoch."""
        if not 0 <= place < len(self):
            raise IndexError(place)
        return divmod(self._begin + place, self.plan.first[-1])


class Seeds(Sequence[int]):
    """What the random transforms of each item of `Slices` follow from: (seed, step, shard, micro-batch)."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def __len__(self) -> int:
        return len(self._slices)

    def __getitem__(self, place: int) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]  # no slices
        plan = self._slices.plan
        epoch, in_epoch = self._slices.locate(place)
        step_in_epoch = bisect_right(plan.first, in_epoch) - 1
        step = epoch * len(plan.steps) + step_in_epoch
        return derived_seed("augment", plan.seed, step, plan.rank, in_epoch - plan.first[step_in_epoch])
