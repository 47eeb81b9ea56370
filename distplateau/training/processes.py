"""The processes of a run: Accelerate set up so that CPU ranks and GPU ranks alike find each other."""

from __future__ import annotations

import os
from typing import Any

import torch

# Imported before there is a process group: its functions take group.WORLD as a default, once and for all, and whoever
# imports it later (torch._dynamo does) keeps the group and its threads alive beyond destroy_process_group. A thread
# that still holds a tensor when the interpreter ends aborts the process, once in some 15 runs.
import torch.distributed.nn.functional
from accelerate import Accelerator

from distplateau.errors import InputError


def on_cpu() -> bool:
    """Return whether this run computes on the CPU, by the launcher's wish or for want of a GPU."""
    wished = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return wished or not torch.cuda.is_available()


def launched_ranks() -> int:
    """Return how many ranks the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def start_accelerator(precision: str, **options: Any) -> Accelerator:
    """Join the ranks that the launcher started. Collective where there are several.

    Raises
    ------
    InputError
        If Accelerate sees another number of ranks than were started: each would train a run of its own into one folder.
    """
    _share_cores()
    # Without `cpu` Accelerate takes CPU ranks for so many single processes.
    accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu() and launched_ranks() > 1, **options)
    if accelerator.num_processes != launched_ranks():
        raise InputError(
            "WORLD_SIZE",
            f"{launched_ranks()} ranks were started and Accelerate sees {accelerator.num_processes}",
            "use one of the configurations in launch/ with accelerate launch",
        )
    return accelerator


def _share_cores() -> None:
    """Give each rank on this machine its share of the cores; torch would start as many threads in each."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
