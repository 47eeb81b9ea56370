"""An exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import nn

_RAMP = 10


class WeightAverage:
    """A copy of a network that follows its weights: ``average += (1 - decay) * (weights - average)``.

    The decay grows as ``(1 + n) / (10 + n)`` up to the one that is asked for, n being the steps so far, so that the
    average does not hang on to the random weights of the start (as TensorFlow's ExponentialMovingAverage has it).
    Every rank keeps one; replicas with the same weights have the same average, without communication.

    Parameters
    ----------
    network
        Not wrapped in DDP.
    decay
        Between 0 and 1.

    Notes
    -----
    Not `torch.optim.swa_utils.AveragedModel`: it asks the device for its step count at each update, which waits for it.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        # What a forward pass left on a module cannot be copied as long as it has a graph.
        held = (value for module in network.modules() for value in vars(module).values())
        memo = {id(one): one.detach().clone() for one in held if isinstance(one, torch.Tensor) and not one.is_leaf}
        self.network = copy.deepcopy(network, memo).eval().requires_grad_(requires_grad=False)
        self._source = network
        self._pairs = [
            pair
            for pair in zip(self.network.parameters(), network.parameters(), strict=True)
            if pair[0].is_floating_point()
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Follow the weights after optimizer step number `step`, counted from 1."""
        decay = min(self.decay, (1 + step) / (_RAMP + step))
        averages, weights = [p.data for p, _ in self._pairs], [p.data for _, p in self._pairs]
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    @torch.no_grad()
    def copy_buffers(self) -> None:
        """Take over the buffers, such as BatchNorm's statistics; they are averages already."""
        for held, current in zip(self.network.buffers(), self._source.buffers(), strict=True):
            held.copy_(current)
