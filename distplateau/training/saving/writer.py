"""Writing while training goes on.

The weights change only in the optimizer's update. So a thread copies them to host memory during the forward and
backward passes that follow, the next update waits for that copy alone, and the thread then writes it to the disk at
leisure (CheckFreq, Mohan et al., FAST 2021). The host memory is kept for the next copy: on virtual machines memory that
is touched for the first time has taken 40 times as long as the copy itself. Where there is no memory for a copy, the
thread writes the tensors themselves, and the next update waits until that is done: slower, but nothing is lost.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Callable

Tree = TypeVar("Tree")
_NO_MEMORY = (MemoryError, RuntimeError)  # torch's allocators raise RuntimeError


class BackgroundWriter:
    """Copies tensors and writes the copy in a thread; at most one piece of work is under way. Main rank.

    Parameters
    ----------
    device
        Where the tensors are.

    Notes
    -----
    Whoever changes the tensors calls `wait_for_copy` before. An error of the thread is raised by the next call of
    `poll`, `wait` or `submit`.
    """

    def __init__(self, device: torch.device) -> None:
        self._staging = Staging(device)
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._copied = threading.Event()
        self._copied.set()
        self._work: Future[None] | None = None
        self._then: Callable[[], None] = lambda: None

    def reserve(self, tensors: Any) -> None:
        """Get the memory for copies of these tensors, dictionaries and lists of them, ahead of the first one."""
        self.wait()
        self._work = self._pool.submit(self._staging.reserve, tensors)

    def submit(self, tensors: Tree, write: Callable[[Tree], object], then: Callable[[], None] = lambda: None) -> None:
        """Copy `tensors` and call `write` with the copy, both in the thread. Waits for the work before.

        Parameters
        ----------
        tensors
            Dictionaries, lists and tuples of tensors and plain values.
        write
            Called in the thread.
        then
            Called from `poll` or `wait`, in the caller's thread, when `write` has returned.
        """
        self.wait()
        self._copied.clear()
        copy = self._staging.begin()
        self._work, self._then = self._pool.submit(self._run, tensors, copy, write), then

    def wait_for_copy(self) -> None:
        """Return when the tensors may change: at once, but for the first update after `submit`."""
        self._copied.wait()

    def poll(self) -> None:
        """Finish the work that is done, without waiting."""
        if self._work is not None and self._work.done():
            self.wait()

    def wait(self) -> None:
        """Finish the work that is under way."""
        if self._work is None:
            return
        work, then = self._work, self._then
        self._work, self._then = None, lambda: None
        work.result()
        then()

    def close(self, *, wait: bool = True) -> None:
        """Let the work that is under way end, without a word about its errors.

        Parameters
        ----------
        wait
            Return when it has ended.
        """
        self._pool.shutdown(wait=wait, cancel_futures=not wait)

    def _run(self, tensors: Tree, copy: Callable[[Tree], Tree], write: Callable[[Tree], object]) -> None:
        try:
            try:
                copied = copy(tensors)
            except _NO_MEMORY:
                self._staging.release()
                write(tensors)
                return
        finally:
            self._copied.set()
        write(copied)


class Staging:
    """Host memory that holds a copy of tensors; each copy overwrites the one before.

    On CUDA it is pinned, and the copies run on a stream of their own, after what the device had been told to do when
    `begin` was called.
    """

    def __init__(self, device: torch.device) -> None:
        self._pinned = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._pinned else None
        self._memory: dict[tuple[Any, ...], Tensor] = {}

    def reserve(self, tree: Any) -> None:
        """Get the memory and touch it, as far as there is any."""
        try:
            _map(tree, lambda place, tensor: self._room(place, tensor).zero_())
        except _NO_MEMORY:
            self.release()

    def release(self) -> None:
        """Give the memory back."""
        self._memory.clear()

    def begin(self) -> Callable[[Tree], Tree]:
        """Return the function that copies, to be called in any thread; the device's order is taken from this call."""
        if self._stream is None:
            return self._copy
        ready = torch.cuda.Event()
        ready.record()
        self._stream.wait_event(ready)
        return self._copy

    def _copy(self, tree: Tree) -> Tree:
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            copied = _map(
                tree, lambda place, tensor: self._room(place, tensor).copy_(tensor, non_blocking=self._pinned)
            )
        if self._stream is not None:
            self._stream.synchronize()
        return copied

    def _room(self, place: tuple[Any, ...], tensor: Tensor) -> Tensor:
        room = self._memory.get(place)
        if room is None or room.shape != tensor.shape or room.dtype != tensor.dtype:
            room = self._memory[place] = _allocate(tensor, pinned=self._pinned)
        return room


def _allocate(like: Tensor, *, pinned: bool) -> Tensor:
    """Get host memory; a copy to memory that is not pinned is slower and as good."""
    try:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
    except RuntimeError:
        if not pinned:
            raise
        return torch.empty(like.shape, dtype=like.dtype)


def _map(tree: Any, function: Callable[[tuple[Any, ...], Tensor], Tensor], place: tuple[Any, ...] = ()) -> Any:
    """Replace each tensor; dictionaries and lists are copied, other values are taken over."""
    if isinstance(tree, Tensor):
        return function(place, tree.detach())
    if isinstance(tree, dict):
        return {key: _map(item, function, (*place, key)) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        items = [_map(item, function, (*place, number)) for number, item in enumerate(tree)]
        return items if isinstance(tree, list) else tuple(items)
    return tree
