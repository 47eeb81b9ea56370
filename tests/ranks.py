"""Run a function on real ranks: warm processes with torch loaded, one pool per world size.

Importing torch costs seconds per process; here it is paid once, in the fork server.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_TESTS = Path(__file__).parent
_POOLS: dict[int, _Pool] = {}


class RankError(AssertionError):
    """A rank raised, died or hung."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of a gloo group and return the values by rank.

    `function` is importable (top level of a test module). A worker's exception is raised here with its traceback; a
    worker that dies or does not answer within `timeout` seconds is named. The next call works in either case.
    """
    pool = _POOLS.get(ranks)
    if pool is None:
        pool = _POOLS[ranks] = _Pool(ranks)
    try:
        return pool.call(function, args, timeout)
    except RankError:
        _POOLS.pop(ranks).close()
        raise


def shut_down() -> None:
    """End all workers."""
    while _POOLS:
        _POOLS.popitem()[1].close()


atexit.register(shut_down)


class _Pool:
    def __init__(self, ranks: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "torch.distributed", "accelerate", "torchvision"])
        self._connections: list[Connection] = []
        self._processes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(rank, ranks, theirs, str(_TESTS)), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)
            self._processes.append(process)

    def call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            for connection in self._connections:
                connection.send((function, args, f"{folder}/store"))
            silent = self._wait(timeout)
            answers = [None if rank in silent else self._answer(rank) for rank in range(len(self._connections))]
        failed = [(rank, text) for rank, answer in enumerate(answers) if answer and (text := answer[1])]
        if failed:
            raise RankError("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
        if silent:
            raise RankError(f"ranks {sorted(silent)} gave no answer within {timeout:g} s")
        return [answer[0] for answer in answers if answer]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()

    def _answer(self, rank: int) -> tuple[Any, str]:
        try:
            return self._connections[rank].recv()
        except EOFError:
            return None, f"died (exit code {self._processes[rank].exitcode})"

    def _wait(self, timeout: float) -> set[int]:
        """Wait for all ranks, but only a little for the others once one has failed; return the silent ones."""
        from multiprocessing.connection import wait
        from time import monotonic

        deadline, waiting = monotonic() + timeout, dict(enumerate(self._connections))
        while waiting and (left := deadline - monotonic()) > 0:
            ready = wait(list(waiting.values()), left)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                del waiting[rank]
                if not self._processes[rank].is_alive():
                    deadline = min(deadline, monotonic() + 5)
        return set(waiting)


def _work(rank: int, ranks: int, connection: Connection, tests: str) -> None:
    import torch

    sys.path.insert(0, tests)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    torch.set_num_threads(1)
    while True:
        try:
            function, args, store = connection.recv()
        except EOFError:
            return
        connection.send(_call(function, args, rank, ranks, store))


def _call(function: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, store: str) -> tuple[Any, str]:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
    try:
        return function(rank, *args), ""
    except Exception:
        return None, traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
