"""What it costs to be ready for a signal: the votes of the ranks in a loop of small steps, at 2 and 4 processes.

    python benchmarks/votes.py

A step is the forward and backward pass of a small perceptron under DDP and fused SGD. Blocks of steps with and without
the votes alternate, because the machine is noisy; what counts is the time that the steps of a block spend in
`Interruption.agreed`, and beside it the ratio of the blocks' medians, which has the noise of the machine in it. Exits
with 1 if the votes take more than 1 % of a step.
"""

from __future__ import annotations

import sys
import time
from statistics import median

import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from distplateau.training.interruption import Call, Interruption

WORLD_SIZES = (2, 4)
BLOCKS, BLOCK_SECONDS = 10, 2.0
BATCH_SIZE = 64
TARGET = 0.01


def measure() -> tuple[float, float, float]:
    """Return the seconds of a step, the share of the votes, and how much longer the blocks with votes took."""
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 10)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, fused=True)
    images, labels = torch.randn(BATCH_SIZE, 784), torch.randint(10, (BATCH_SIZE,))

    def steps(count: int, interruption: Interruption | None) -> tuple[float, float]:
        voting = 0.0
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            cross_entropy(model(images), labels).backward()
            optimizer.step()
            optimizer.zero_grad()
            if interruption is not None:
                before = time.perf_counter()
                assert interruption.agreed() is Call.NOTHING
                voting += time.perf_counter() - before
        return time.perf_counter() - begin, voting

    warm, _ = steps(50, None)
    count = torch.tensor([max(1, round(BLOCK_SECONDS / (warm / 50)))])
    dist.broadcast(count, src=0)  # the same on every rank
    blocks = []
    with Interruption() as interruption:
        for _ in range(BLOCKS):
            without, _ = steps(int(count), None)
            blocks.append((without, *steps(int(count), interruption)))
    without, with_votes, voting = zip(*blocks, strict=True)
    return median(without) / int(count), sum(voting) / sum(with_votes), median(with_votes) / median(without)


def main() -> int:
    """Print the figures; return whether a target is missed."""
    missed = False
    for world_size in WORLD_SIZES:
        results = on_ranks(measure, world_size)
        step, share, ratio = (max(result[index] for result in results) for index in range(3))
        print(
            f"{world_size} processes: a step takes {1e3 * step:.2f} ms, votes {100 * share:.3f} % of it "
            f"(target: {100 * TARGET:g} %); blocks with votes take {ratio:.3f} x those without"
        )
        missed |= share > TARGET
    if missed:
        print("MISSED: the votes take <= 1 % of a small step", file=sys.stderr)
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
