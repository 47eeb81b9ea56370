"""Run a function on real ranks: warm processes with torch loaded, one pool per world size.

Importing torch costs seconds per process; here it is paid once, in the fork server.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from multiprocessing.connection import wait
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

_TESTS = Path(__file__).parent
_POOLS: dict[int, _Pool] = {}
# The others may have been waiting for the rank that failed: what they say helps, but is not worth a long wait.
_GRACE_SECONDS = 5.0


class RankError(AssertionError):
    """A rank raised, died or hung."""


def run_ranks(function: Callable[..., Any], ranks: int, *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call ``function(rank, *args)`` on every rank of a gloo group and return the values by rank.

    `function` is importable (top level of a test module). The default process group is initialised before the call,
    and the environment is that of a launcher, so that `accelerate.Accelerator` joins the group. Environment, group
    and accelerate's state are new in each call.

    Raises
    ------
    RankError
        With the traceback of each rank that raised, and the numbers of those that died or gave no answer within
        `timeout` seconds. The processes are replaced: the next call works in any case.
    """
    task = pickle.dumps((function, args))  # what cannot be sent is the caller's error and leaves the pool alone
    pool = _POOLS.get(ranks)
    if pool is None:
        pool = _POOLS[ranks] = _Pool(ranks)
    try:
        return pool.call(task, timeout)
    except BaseException:  # also KeyboardInterrupt and pytest-timeout: a late answer must not reach the next call
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

    def call(self, task: bytes, timeout: float) -> list[Any]:
        with tempfile.TemporaryDirectory() as folder:
            answers = self._collect({r: self._send(r, task, f"{folder}/store") for r in self._ranks}, timeout)
        silent = [rank for rank in self._ranks if rank not in answers]
        problems = [f"rank {rank}: {answers[rank][1].rstrip()}" for rank in sorted(answers) if answers[rank][1]]
        if silent:
            problems.append(f"{_named(silent)} gave no answer within {timeout:g} s")
        if problems:
            raise RankError("\n".join(problems))
        return [pickle.loads(answers[rank][0]) for rank in self._ranks]

    def close(self) -> None:
        for process in self._processes:
            process.kill()
        for process, connection in zip(self._processes, self._connections, strict=True):
            process.join()
            connection.close()

    @property
    def _ranks(self) -> range:
        return range(len(self._connections))

    def _send(self, rank: int, task: bytes, store: str) -> Connection:
        with contextlib.suppress(OSError):  # it died between two calls: receiving says so
            self._connections[rank].send((task, store))
        return self._connections[rank]

    def _collect(self, waiting: dict[int, Connection], timeout: float) -> dict[int, tuple[bytes, str]]:
        """Receive answers as they come; once a rank has failed, wait only a little for the others."""
        answers: dict[int, tuple[bytes, str]] = {}
        deadline = monotonic() + timeout
        while waiting and (left := deadline - monotonic()) > 0:
            ready = wait(list(waiting.values()), left)
            for rank in [rank for rank, connection in waiting.items() if connection in ready]:
                del waiting[rank]
                answers[rank] = self._receive(rank)
                if answers[rank][1]:
                    deadline = min(deadline, monotonic() + _GRACE_SECONDS)
        return answers

    def _receive(self, rank: int) -> tuple[bytes, str]:
        try:
            return self._connections[rank].recv()
        except (EOFError, OSError):
            self._processes[rank].join(1)
            return b"", f"died (exit code {self._processes[rank].exitcode})"


def _named(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"


def _work(rank: int, ranks: int, connection: Connection, tests: str) -> None:
    """Serve calls until the parent is gone."""
    # A daemon, that it goes with the parent; but daemons may have no children, and data is read by some.
    multiprocessing.current_process()._config["daemon"] = False
    sys.path.insert(0, tests)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(ranks),
        LOCAL_RANK=str(rank),
        LOCAL_WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",  # the group meets through a file: no port to collide on
        GLOO_SOCKET_IFNAME="lo",
        OMP_NUM_THREADS="1",
        ACCELERATE_USE_CPU="true",
    )
    environment = dict(os.environ)
    while True:
        try:
            task, store = connection.recv()
        except EOFError:
            return
        connection.send(_call(task, rank, ranks, store))
        os.environ.clear()
        os.environ.update(environment)


def _call(task: bytes, rank: int, ranks: int, store: str) -> tuple[bytes, str]:
    """Return the pickled value and no text, or no value and the traceback."""
    import torch
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState, PartialState

    try:
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        torch.set_num_threads(1)
        function, args = pickle.loads(task)
        dist.init_process_group("gloo", store=dist.FileStore(store, ranks), rank=rank, world_size=ranks)
        # A function that does not communicate would take the group down while another rank still connects.
        dist.barrier()
        return pickle.dumps(function(rank, *args)), ""
    except BaseException:  # pytest.fail and SystemExit are answers, too
        return b"", traceback.format_exc()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
