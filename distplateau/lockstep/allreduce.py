"""Sum a small vector of integers over ranks, in the fastest way that the backend has.

gloo's all-reduce of some hundred bytes takes 5 to 7 ms at 4 processes on one machine; its point-to-point messages up a
tree and down again (reduce and broadcast: Thakur, Rabenseifner and Gropp, 2005) take about one. Messages that cross
cost more than a second trip: a rank that sends holds the lock that gloo's thread needs to take in what arrives, and
that thread spins, for a time slice of 3 ms where no core is free. Other backends run their own all-reduce. Integer
addition is associative, so that every way gives the same bits.
"""

from __future__ import annotations

import time
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Sequence

# Keeps the messages apart from any of the user's on the same group.
_TAG = 0x6C6F636B
_BRANCHES = 8
DEFAULT_TIMEOUT = timedelta(minutes=9)


class ExchangeTimeoutError(RuntimeError):
    """Not every rank took part in time."""


def sum_over_ranks(vector: Sequence[int], group: dist.ProcessGroup | None, timeout: timedelta) -> list[int]:
    """Return the sum of the ranks' vectors, the same on every rank. Collective; blocks.

    Parameters
    ----------
    vector
        As long on every rank; no sum may leave the range of int64.
    group
        Process group; the default one if None.

    Raises
    ------
    ExchangeTimeoutError
        If a rank does not arrive in time.
    RuntimeError
        As the backend raises it, if a rank went away.
    """
    tensor = torch.tensor(vector, dtype=torch.int64, device=payload_device(group))
    deadline = _Deadline(timeout)
    if tensor.device.type == "cpu" and "cpu:gloo" in dist.get_backend_config(group):
        tensor = _up_and_down(tensor, group, deadline)
    else:
        _all_reduce(tensor, group, deadline)
    return tensor.tolist()


def patience(group: dist.ProcessGroup | None) -> timedelta:
    """Return how long to wait for the ranks of a group by default: nine tenths of the group's own timeout.

    The backend would report a timeout of its own without a word about the validation, and NCCL's watchdog ends the
    process. Where the backend does not tell, it is 9 minutes, for NCCL's default is 10.
    """
    try:
        backend = (group or dist.group.WORLD)._get_backend(payload_device(group))  # pyright: ignore[reportOptionalMemberAccess]
        own = backend.options._timeout
        return own * 0.9 if isinstance(own, timedelta) else DEFAULT_TIMEOUT
    except (AttributeError, RuntimeError):
        return DEFAULT_TIMEOUT


def payload_device(group: dist.ProcessGroup | None) -> torch.device:
    """Choose the device of the payload by the group alone, so that a rank without samples chooses the same."""
    if "nccl" in str(dist.get_backend_config(group)):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


class _Deadline:
    def __init__(self, timeout: timedelta) -> None:
        self._end = time.monotonic() + timeout.total_seconds()

    def passed(self) -> bool:
        return time.monotonic() > self._end

    def wait(self, work: dist.Work | None) -> None:
        assert work is not None
        left = max(0.001, self._end - time.monotonic())
        try:
            work.wait(timedelta(seconds=left))
        except RuntimeError as error:
            if self.passed() or "timed out" in str(error).lower():
                raise ExchangeTimeoutError(str(error)) from error
            raise


def _up_and_down(tensor: Tensor, group: dist.ProcessGroup | None, deadline: _Deadline) -> Tensor:
    """Sum towards rank 0 along a tree of `_BRANCHES` children each, and send the sum down again."""
    rank, ranks = dist.get_rank(group), dist.get_world_size(group)
    children = range(_BRANCHES * rank + 1, min(_BRANCHES * rank + _BRANCHES + 1, ranks))
    # All at once: each child may come first.
    arriving = [(part := torch.empty_like(tensor), _receive(part, child, group)) for child in children]
    for part, receiving in arriving:
        deadline.wait(receiving)
        tensor = tensor + part
    if rank:
        parent, total = (rank - 1) // _BRANCHES, torch.empty_like(tensor)
        receiving = _receive(total, parent, group)  # before the send, that nothing crosses the answer
        deadline.wait(_send(tensor, parent, group))
        deadline.wait(receiving)
        tensor = total
    for sending in [_send(tensor, child, group) for child in children]:
        deadline.wait(sending)
    return tensor


def _send(tensor: Tensor, to: int, group: dist.ProcessGroup | None) -> dist.Work | None:
    return dist.isend(tensor, _global_rank(to, group), group=group, tag=_TAG)


def _receive(into: Tensor, source: int, group: dist.ProcessGroup | None) -> dist.Work | None:
    return dist.irecv(into, _global_rank(source, group), group=group, tag=_TAG)


def _global_rank(rank: int, group: dist.ProcessGroup | None) -> int:
    return rank if group is None else dist.get_global_rank(group, rank)


def _all_reduce(tensor: Tensor, group: dist.ProcessGroup | None, deadline: _Deadline) -> None:
    work = dist.all_reduce(tensor, group=group, async_op=True)
    assert work is not None
    # NCCL's wait() only orders streams: a missing rank would be noticed by the watchdog, which kills the process.
    # Others take no timeout.
    while not work.is_completed():
        if deadline.passed():
            raise ExchangeTimeoutError("timed out")
        time.sleep(2e-5)
    work.wait()
