"""The problem this package exists for, in two runs, and the same two runs with it.

Starts 1, 2 and 4 CPU processes itself (gloo, no GPU needed):

    python benchmarks/why.py

1. ``accelerator.prepare(ReduceLROnPlateau)``: AcceleratedScheduler calls the inner ``step`` once per process, so that
   one validation counts as four. Six validations, each better than the one before, and the learning rate collapses.
2. Plain DDP, every rank stepping its scheduler on the loss of its own validation shard, as a script does that was
   written for one process: the ranks go on with different learning rates, and DDP's replicas drift apart.

Exits with 1 if one of these is not so any more, or if distplateau gets one of them wrong.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from _ranks import on_ranks
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

WORLD_SIZES = (1, 2, 4)
PATIENCE, FACTOR = 2, 0.5
IMPROVING_LOSSES = (6.0, 5.0, 4.0, 3.0, 2.0, 1.0)
LOCAL_EPOCHS = 20


def stock_prepared(world_size: int) -> list[float]:
    """Return the final LR by rank after six improving validations: torch's scheduler, prepared by Accelerate."""
    return on_ranks(partial(_prepared, _stock), world_size)


def ours_prepared(world_size: int) -> list[float]:
    """Return the same with distplateau's scheduler in its place."""
    return on_ranks(partial(_prepared, _ours), world_size)


def stock_local(world_size: int) -> list[float]:
    """Return the final LR by rank after 20 epochs of DDP: torch's scheduler, stepped on each rank's own shard."""
    return on_ranks(partial(_ddp, _stock), world_size)


def ours_global(world_size: int) -> list[float]:
    """Return the same with distplateau's scheduler, stepped on the mean over all shards."""
    return on_ranks(partial(_ddp, _ours), world_size)


# What differs between the two: the scheduler's class, and what is given to step().


def _stock(optimizer: torch.optim.Optimizer):
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=PATIENCE, factor=FACTOR)
    return scheduler, lambda scheduler, losses: scheduler.step(losses.mean())


def _ours(optimizer: torch.optim.Optimizer):
    from distplateau import GlobalMean, ReduceLROnPlateau

    metric = GlobalMean()

    def step(scheduler: ReduceLROnPlateau, losses: Tensor):
        metric.update(losses)
        scheduler.step(metric)

    return ReduceLROnPlateau(optimizer, patience=PATIENCE, factor=FACTOR), step


def _prepared(make: Callable) -> float:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, step = make(optimizer)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    for loss in IMPROVING_LOSSES:
        optimizer.zero_grad()
        accelerator.backward(model(torch.ones(8, 4)).square().mean() * 1e-3)
        optimizer.step()
        step(scheduler, torch.full((8,), loss))
    return float(optimizer.param_groups[0]["lr"])


def _ddp(make: Callable) -> float:
    """Fit a line to noisy points. Each rank has points of its own to train on and to validate on."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    generator = torch.Generator().manual_seed(rank)
    train_x, train_y = _points(256, generator)
    validation_x, validation_y = _points(32, generator)
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    replica = nn.parallel.DistributedDataParallel(model) if dist.is_initialized() else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    scheduler, step = make(optimizer)
    for _ in range(LOCAL_EPOCHS):
        for x, y in zip(train_x.split(16), train_y.split(16), strict=True):
            optimizer.zero_grad()
            # Scaled so that the fit takes most of the epochs: a plateau that nobody argues about shows nothing.
            (replica(x) - y).square().mean().mul(0.01).backward()
            optimizer.step()
        with torch.no_grad():
            step(scheduler, (model(validation_x) - validation_y).square().flatten())
    return float(optimizer.param_groups[0]["lr"])


def _points(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x = torch.randn(count, 8, generator=generator)
    return x, x.sum(dim=1, keepdim=True) + torch.randn(count, 1, generator=generator)


# The table.


def main() -> int:
    """Print both runs before and after, and what does not hold."""
    prepared = {
        name: {n: run(n) for n in WORLD_SIZES} for name, run in (("torch", stock_prepared), ("ours", ours_prepared))
    }
    local = {"torch": stock_local(WORLD_SIZES[-1]), "ours": ours_global(WORLD_SIZES[-1])}

    print(
        "1. accelerator.prepare(scheduler): six validations, each better than the last; final learning rate, from 1.0"
    )
    _print_row("", [f"{n} process{'es' if n > 1 else ''}" for n in WORLD_SIZES])
    for name, by_size in prepared.items():
        _print_row(_LABELS[name], [_different(by_size[n]) for n in WORLD_SIZES])
    factor = prepared["ours"][4][0] / prepared["torch"][4][0]
    print(f"  torch's ends {factor:.0f} times lower at 4 processes, and nothing had got worse\n")

    print(f"2. DDP, {LOCAL_EPOCHS} epochs, each rank validating its own shard; final learning rate, from 1.0")
    _print_row("", [f"rank {rank}" for rank in range(WORLD_SIZES[-1])])
    for name, lrs in local.items():
        _print_row(_LABELS[name], [f"{lr:.4g}" for lr in lrs])
    print(f"  torch's: {len(set(local['torch']))} different learning rates, distplateau's: {len(set(local['ours']))}")

    broken = [claim for claim, holds in _claims(prepared, local).items() if not holds]
    for claim in broken:
        print(f"DOES NOT HOLD: {claim}", file=sys.stderr)
    return 1 if broken else 0


_LABELS = {"torch": "torch's ReduceLROnPlateau", "ours": "distplateau's"}


def _claims(prepared: dict[str, dict[int, list[float]]], local: dict[str, list[float]]) -> dict[str, bool]:
    collapsed = FACTOR ** len(IMPROVING_LOSSES)
    return {
        "torch's scheduler keeps 1.0 at 1 and 2 processes": all(set(prepared["torch"][n]) == {1.0} for n in (1, 2)),
        "torch's scheduler falls to 0.0156 at 4 processes": set(prepared["torch"][4]) == {collapsed},
        "distplateau's keeps 1.0 everywhere": all(set(lrs) == {1.0} for lrs in prepared["ours"].values()),
        "torch's scheduler on local losses gives the ranks different learning rates": len(set(local["torch"])) > 1,
        "distplateau's gives them the same one": len(set(local["ours"])) == 1,
        "distplateau's does reduce on the global plateau": local["ours"][0] < 1.0,
    }


def _different(lrs: list[float]) -> str:
    return ", ".join(f"{lr:.4g}" for lr in sorted(set(lrs)))


def _print_row(label: str, cells: list[str]) -> None:
    print(f"  {label:<26}" + "".join(f"{cell:>13}" for cell in cells))


if __name__ == "__main__":
    raise SystemExit(main())
