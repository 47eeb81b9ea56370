"""What a validation costs: ours against an all-reduce, torchmetrics and Accelerate, side by side at 2 and 4 processes.

    python benchmarks/validation.py

A validation of 10,000 losses in batches of 64, dealt out to the ranks: adding the batches and computing the mean.
Repeats alternate between the candidates, because the machine is noisy; what counts are the ratios of medians.
Exits with 1 if a ratio misses its target.
"""

from __future__ import annotations

import sys
import time
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD_SIZES = (2, 4)
SAMPLES, BATCH_SIZE = 10_000, 64
REPEATS, ROW = 20, 5
PAYLOAD = 106  # integers of 8 bytes: what GlobalMean.compute exchanges

# Which candidate against which, how, and the target.
TARGET_ALL_REDUCE, SLACK_SECONDS = 2.0, 0.002
TARGET_TORCHMETRICS = 3.0
TARGET_GATHER = 15.0
TARGET_APPEND = 5.0  # "of the order of" a copy: some calls of Python more


def measure() -> dict[str, float]:
    """Return the median seconds of each candidate on this rank. Collective."""
    losses = torch.rand(SAMPLES, generator=torch.Generator().manual_seed(0))
    batches = losses.split(BATCH_SIZE)[dist.get_rank() :: dist.get_world_size()]
    rounds = -(-SAMPLES // BATCH_SIZE // dist.get_world_size())
    candidates = {
        "ours": partial(_ours, batches),
        "ours, updates": partial(_updates, batches),
        "appends": partial(_appends, batches),
        "all-reduce": _all_reduce,
        "torchmetrics": _torchmetrics(batches),
        "gather": _gather(batches, rounds),
    }
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(REPEATS):
        for name, candidate in candidates.items():
            dist.barrier()
            begin = time.perf_counter()
            # Several in a row: the ranks leave a barrier half a millisecond apart.
            for _ in range(ROW):
                candidate()
            seconds[name].append((time.perf_counter() - begin) / ROW)
    return {name: median(values[2:]) for name, values in seconds.items()}


def _ours(batches: tuple[Tensor, ...]) -> float:
    from distplateau import GlobalMean

    metric = GlobalMean()
    for batch in batches:
        metric.update(batch)
    return metric.compute()


def _updates(batches: tuple[Tensor, ...]) -> None:
    from distplateau import GlobalMean

    metric = GlobalMean()
    for batch in batches:
        metric.update(batch)


def _appends(batches: tuple[Tensor, ...]) -> list[Tensor]:
    """Do the least that a correct update does: keep a copy."""
    held = []
    for batch in batches:
        held.append(batch.clone())
    return held


def _all_reduce() -> None:
    dist.all_reduce(torch.zeros(PAYLOAD, dtype=torch.int64))


def _torchmetrics(batches: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    from torchmetrics import MeanMetric

    def run() -> Tensor:
        metric = MeanMetric()
        for batch in batches:
            metric.update(batch)
        return metric.compute()

    return run


def _gather(batches: tuple[Tensor, ...], rounds: int) -> Callable[[], Tensor]:
    """Do what Accelerate's examples do: gather every batch and collect the losses."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)

    def run() -> Tensor:
        gathered = [accelerator.gather_for_metrics(batch) for batch in batches[: rounds - 1]]
        return torch.cat(gathered).mean()

    return run


def main() -> int:
    """Print the table and the ratios, and what misses its target."""
    print(f"one validation: {SAMPLES:,} losses in batches of {BATCH_SIZE}; median of {REPEATS - 2} on the slowest rank")
    missed = []
    for world_size in WORLD_SIZES:
        by_rank = on_ranks(measure, world_size)
        slowest = {name: max(result[name] for result in by_rank) for name in by_rank[0]}
        print(f"\n{world_size} processes")
        for name, seconds in slowest.items():
            print(f"  {name:16}{1e3 * seconds:9.3f} ms   {seconds / slowest['ours']:7.2f} x ours")
        missed += [f"{world_size} processes: {claim}" for claim, holds in _claims(slowest).items() if not holds]
    for claim in missed:
        print(f"MISSED: {claim}", file=sys.stderr)
    return 1 if missed else 0


def _claims(slowest: dict[str, float]) -> dict[str, bool]:
    ours = slowest["ours"]
    return {
        f"ours <= {TARGET_ALL_REDUCE:g} x all-reduce + {1e3 * SLACK_SECONDS:g} ms": ours
        <= TARGET_ALL_REDUCE * slowest["all-reduce"] + SLACK_SECONDS,
        f"torchmetrics >= {TARGET_TORCHMETRICS:g} x ours": slowest["torchmetrics"] >= TARGET_TORCHMETRICS * ours,
        f"gather_for_metrics per batch >= {TARGET_GATHER:g} x ours": slowest["gather"] >= TARGET_GATHER * ours,
        f"an update costs <= {TARGET_APPEND:g} x a copy": slowest["ours, updates"]
        <= TARGET_APPEND * slowest["appends"],
    }


if __name__ == "__main__":
    sys.exit(main())
