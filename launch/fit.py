"""Training of objects instead of names: a model, a loss and data that this script holds.

    accelerate launch --config_file launch/cpu.yaml launch/fit.py [--run.name NAME ...]

Everything that `distplateau train` does comes with it: one decision on all ranks, checkpoints, resume, ledger, report.
"""

from __future__ import annotations

import sys

import torch
from sklearn.datasets import load_digits
from torch import nn

from distplateau import fit
from distplateau.config import parse_config, read_overrides, with_overrides

CONFIG = {
    "run": {"name": "fit"},
    "data": {"global_batch_size": 64},
    "optimizer": {"name": "adamw", "lr": 0.01},
    "schedule": {"factor": 0.3, "patience": 2, "threshold": 0.02},
    "training": {"epochs": 10},
}


def main() -> None:
    """Train on scikit-learn's digits."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    torch.manual_seed(0)  # the same weights on every rank
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.1), nn.Linear(128, 10))
    config = parse_config(with_overrides(CONFIG, read_overrides(sys.argv[1:])))
    fit(model, "cross_entropy", (images[:1400], labels[:1400]), (images[1400:], labels[1400:]), config)


if __name__ == "__main__":
    main()
