"""The processes of a run: Accelerate set up so that CPU ranks and GPU ranks alike find each other."""

from __future__ import annotations

import atexit
import contextlib
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

# Imported before there is a process group: its functions take group.WORLD as a default, once and for all, and whoever
# imports it later (torch._dynamo does) keeps the group and its threads alive beyond destroy_process_group. A thread
# that still holds a tensor when the interpreter ends aborts the process, once in some 15 runs.
import torch.distributed.nn.functional
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch.distributed.distributed_c10d import PrefixStore

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch._C._distributed_c10d import Store


# Backend and store of this process's last group. The first rank's store serves the others as long as it is kept.
_meeting_place: list[tuple[str, Store]] = []
atexit.register(_meeting_place.clear)

# What `accelerate launch` sets, and what it stands for.
_SHARDING = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism config",
}


def on_cpu() -> bool:
    """Return whether this run computes on the CPU, by the launcher's wish or for want of a GPU."""
    wished = os.environ.get("ACCELERATE_USE_CPU", "").lower() in {"1", "true", "yes"}
    return wished or not torch.cuda.is_available()


def launched_ranks() -> int:
    """Return how many ranks the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_launcher(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse a launch configuration that shards the model: weights and checkpoints are taken for replicas'.

    Parameters
    ----------
    environ
        What the launcher sets, or what a job will find.

    Raises
    ------
    InputError
        If `accelerate launch` was told to use one.
    """
    for variable, name in _SHARDING.items():
        if environ.get(variable, "").lower() in {"1", "true", "yes"}:
            fix = "use plain DDP: one of the configurations in launch/"
            raise InputError("accelerate launch", f"{name} is not served by distplateau train", fix, value=name)


def start_accelerator(precision: str, **options: Any) -> Accelerator:
    """Join the ranks that the launcher started. Collective where there are several.

    Raises
    ------
    InputError
        If Accelerate sees another number of ranks than were started: each would train a run of its own into one folder.
        If the caller has set up Accelerate with another precision.
    """
    _share_cores()
    # Without `cpu` Accelerate takes CPU ranks for so many single processes.
    try:
        accelerator = Accelerator(mixed_precision=precision, cpu=on_cpu() and launched_ranks() > 1, **options)
    except ValueError as error:
        if "already been initialized" not in str(error):
            raise
        problem = "this process has set up Accelerate with another precision"
        fix = "give your own Accelerator the same mixed_precision"
        raise InputError("training.precision", problem, fix, value=precision) from error
    if accelerator.num_processes != launched_ranks():
        raise InputError(
            "WORLD_SIZE",
            f"{launched_ranks()} ranks were started and Accelerate sees {accelerator.num_processes}",
            "use one of the configurations in launch/ with accelerate launch",
        )
    return accelerator


@contextlib.contextmanager
def accelerated(precision: str, **options: Any) -> Iterator[Accelerator]:
    """Join the ranks as `start_accelerator` does, and part from them at the end.

    Accelerate keeps the first group of a process for good: without this a second `fit` would find it destroyed. State
    that was there before belongs to the caller and stays.
    """
    found = bool(PartialState._shared_state)
    if _meeting_place and not dist.is_initialized():
        _meet_again()
    accelerator = start_accelerator(precision, **options)
    if dist.is_initialized():
        _meeting_place[:] = [(dist.get_backend(), dist.distributed_c10d._get_default_store())]
    try:
        yield accelerator
    finally:
        accelerator.end_training()
        if not found:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


def _meet_again() -> None:
    """Make the process group of a further run, where the ranks met before, under names of its own. Collective.

    Under the names of the first group a rank could read the addresses that the others had then.
    """
    [(backend, before)] = _meeting_place
    store = PrefixStore("again", before)
    dist.init_process_group(backend, store=store, rank=int(os.environ["RANK"]), world_size=launched_ranks())


@contextlib.contextmanager
def repeatable_kernels(wanted: bool) -> Iterator[None]:
    """Let torch use only kernels that give the same bits each time, and put everything back afterwards."""
    if not wanted:
        yield
        return
    enabled, tuned = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    # cuBLAS reads it when it starts, which is at the first matrix product.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(mode=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode=enabled)
        torch.backends.cudnn.benchmark = tuned


@contextlib.contextmanager
def random_numbers_put_back(device: torch.device) -> Iterator[None]:
    """Put torch's random numbers back afterwards.

    Each step seeds them by rank: the ranks of a script would draw different splits for what they do next.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


@contextlib.contextmanager
def threads_put_back() -> Iterator[None]:
    """Put the number of torch's threads back afterwards: a run that goes on takes that of its start."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share_cores() -> None:
    """Give each rank on this machine its share of the cores; torch would start as many threads in each."""
    if "OMP_NUM_THREADS" not in os.environ:
        threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        torch.set_num_threads(threads)
