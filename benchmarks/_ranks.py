"""Run a function on several CPU ranks; what every benchmark here starts its processes with."""

from __future__ import annotations

import os
import socket
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def on_ranks(task: Callable[[], T], world_size: int) -> list[T]:
    """Run a task in as many processes as there are ranks and return what each rank returned, in order."""
    context = get_context("forkserver")
    # The children come from a server that has torch already: a second less for each of them.
    context.set_forkserver_preload(["torch", "accelerate"])
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(world_size, mp_context=context) as pool,
    ):
        port, rendezvous = _free_port(), str(Path(folder, "rendezvous"))
        # A task ends only when all ranks have met, so each one gets a process of its own.
        ranks = [pool.submit(_as_rank, task, rank, world_size, rendezvous, port) for rank in range(world_size)]
        return [rank.result() for rank in ranks]


def _as_rank(task: Callable[[], T], rank: int, world_size: int, rendezvous: str, port: int) -> T:
    torch.set_num_threads(1)
    if world_size == 1:
        return task()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # What a launcher sets: Accelerate looks here to see that it is not alone.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), OMP_NUM_THREADS="1")
    os.environ.update(LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    store = dist.FileStore(rendezvous, world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    try:
        return task()
    finally:
        dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
