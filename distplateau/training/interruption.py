"""Stopping in an orderly way: a signal to any rank, one step boundary for all of them.

A signal handler may not communicate, and the ranks are at different steps when a signal comes. So it only sets a flag.
Every few steps the ranks reduce their flags to the largest on a gloo group of their own, without waiting: it is read as
many steps later, when it has long arrived, and it is the same on every rank, so that all of them stop after the same
step. What one rank alone knows otherwise, that it is time for a checkpoint or that the disk is full, goes the same way.
"""

from __future__ import annotations

import enum
import signal
import time
from typing import TYPE_CHECKING, cast

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from types import FrameType, TracebackType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
RESUMABLE = 75
# Issuing a vote costs 0.2 ms. Two rounds pass between a signal and the stop.
_ROUND_SECONDS = 1.0
_MOST_STEPS = 1_000


class Call(enum.IntEnum):
    """What a rank asks of all ranks; the largest number wins. Signals have their own."""

    NOTHING = 0
    CHECKPOINT = 1
    SIGINT = signal.SIGINT
    SIGUSR1 = signal.SIGUSR1
    SIGUSR2 = signal.SIGUSR2
    SIGTERM = signal.SIGTERM
    FAILURE = 99

    @property
    def is_signal(self) -> bool:
        """Return whether the run has to be interrupted."""
        return Call.CHECKPOINT < self < Call.FAILURE


class Interrupted(SystemExit):
    """Training has stopped at a signal and can be continued; uncaught, the process exits with code 75.

    Parameters
    ----------
    reason
        Name of the signal, such as ``SIGTERM``.
    step
        Optimizer steps that were made and saved.
    """

    def __init__(self, reason: str, step: int) -> None:
        super().__init__(RESUMABLE)
        self.reason, self.step = reason, step


class Interruption:
    """A context that catches signals, and the vote on them.

    Notes
    -----
    Every rank makes one, enters it and calls `agreed` after each of the same steps. A second SIGINT is not caught: it
    raises KeyboardInterrupt at once. The handlers that were there before are put back at the end.
    """

    def __init__(self) -> None:
        self.received = Call.NOTHING
        self._before: dict[int, object] = {}
        several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        self._group = cast("dist.ProcessGroup", dist.new_group(backend="gloo")) if several else None
        self._vote: tuple[dist.Work, torch.Tensor, int] | None = None
        self._interval = self._steps_left = 1
        self._began = time.monotonic()

    def __enter__(self) -> Interruption:
        try:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        except ValueError:  # not in the main thread: whoever runs us there takes care of signals
            self._before = {}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            if handler is not None:  # it was not set from Python, which cannot put it back
                signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        if self._vote is not None and error is None:
            self._vote[0].wait()
        if self._group is not None and error is None:
            dist.destroy_process_group(self._group)

    def agreed(self, request: Call = Call.NOTHING) -> Call:
        """Return what the ranks agree to do after this step. Collective in effect.

        Waits for nothing but a vote that was issued some steps before; with one rank there is no vote.

        Parameters
        ----------
        request
            What this rank asks for, beside the signal it may have received; repeated until it is agreed.
        """
        if self._group is None:
            return max(self.received, request)
        self._steps_left -= 1
        if self._steps_left:
            return Call.NOTHING
        agreed, step_seconds = self._count_votes()
        now = time.monotonic()
        mine, self._began = now - self._began, now
        # A checkpoint that is granted now need not be asked for again.
        flag = self.received if request == agreed == Call.CHECKPOINT else max(self.received, request)
        votes = torch.tensor([int(flag), round(mine * 1e6)], dtype=torch.int64)
        work = dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        assert work is not None
        self._vote = work, votes, self._interval
        self._interval = self._steps_left = next_interval(self._interval, step_seconds)
        return agreed

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.received == Call.SIGINT:
            raise KeyboardInterrupt
        self.received = Call(number)

    def _count_votes(self) -> tuple[Call, float]:
        """Return the largest request of the vote before, and how long a step of the slowest rank took before it."""
        if self._vote is None:
            return Call.NOTHING, _ROUND_SECONDS
        work, votes, steps = self._vote
        work.wait()
        self._vote = None
        call, microseconds = votes.tolist()
        return Call(call), microseconds / 1e6 / steps


def next_interval(interval: int, step_seconds: float) -> int:
    """Return how many steps the next round has. The same on every rank, for the seconds are.

    It at most doubles: a GPU's first steps only join its queue and look faster than they are. It is never settled: a
    first step that compiles looks slower than those that follow, and a validation makes the next rounds shorter for a
    while, which costs a few votes.
    """
    fitting = int(_ROUND_SECONDS / max(step_seconds, 1e-6))
    return max(1, min(_MOST_STEPS, 2 * interval, fitting))
