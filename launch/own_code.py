"""Data, model, loss and a metric of one's own, which own_code.toml names: two spirals that wind around each other.

Jobs import it from the current folder: start from `launch/`, or put the module where Python finds it.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset


def spirals(root: Path, samples: int = 2000, noise: float = 0.05) -> tuple[TensorDataset, TensorDataset]:
    """Return training and test set: points [1, 1, 2] and the number of their spiral, 0 or 1.

    `root` is `data.root`, for those who read files; the other arguments come from `[data] args`.
    """
    return _draw(samples, noise, seed=0), _draw(samples // 4, noise, seed=1)


def _draw(samples: int, noise: float, seed: int) -> TensorDataset:
    dice = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples) % 2
    angles = 3 * math.pi * torch.rand(samples, generator=dice).sqrt() + math.pi * labels
    radius = (angles - math.pi * labels) / (3 * math.pi)
    points = torch.stack([radius * angles.cos(), radius * angles.sin()], dim=1)
    points += noise * torch.randn(points.shape, generator=dice)
    dataset = TensorDataset(points[:, None, None, :], labels)
    dataset.classes = ["inward", "outward"]  # the number of classes, and their names in the report
    return dataset


def network(num_classes: int, width: int = 64) -> nn.Module:
    """Return the model; `num_classes` comes from the data, `width` from `[model] args`."""
    layers = [nn.Flatten(), nn.Linear(2, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers, nn.Linear(width, num_classes))


def focal(outputs: Tensor, targets: Tensor, gamma: float = 1.0) -> Tensor:
    """Return one loss for each sample, [n]: what is well classified counts less (Lin et al., 2017)."""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - torch.exp(-losses)) ** gamma * losses


def margins(outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """Return further metrics by name, one value for each sample: here how far the right class is ahead."""
    right = outputs.gather(1, targets[:, None])[:, 0]
    wrong = outputs.scatter(1, targets[:, None], -math.inf).amax(dim=1)
    return {"margin": right - wrong}
