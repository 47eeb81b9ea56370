"""A mistake that shows on one rank in the middle of the work is told by that rank, once, and by no other."""

from __future__ import annotations

import contextlib
import itertools
import json
from typing import TYPE_CHECKING

import torch.distributed as dist

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._C._distributed_c10d import Store

_STRETCHES = itertools.count()


@contextlib.contextmanager
def told_once() -> Iterator[None]:
    """Let all ranks raise the first mistake that any of them meets, with the rank that has to tell it.

    A rank that stops leaves the others with a lost connection, and a traceback that says nothing of the reason. It
    writes the reason down where the ranks found each other, before they can miss it. Every rank enters it, as often.

    Raises
    ------
    InputError
        With `InputError.rank` set: this rank's own mistake, or that of the rank which was first.
    """
    key = f"distplateau/mistake/{next(_STRETCHES)}"
    try:
        yield
    except InputError as error:
        if error.rank is not None:  # it is known who tells it
            raise
        first = _write_down(key, error)
        if first.rank == error.rank:
            raise
        raise first from error
    except Exception as error:
        first = _read(key)
        if first is None:
            raise
        raise first from error


def _store() -> Store | None:
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    # torch has no other way to a process group's store; a store of our own would need a free port.
    return dist.distributed_c10d._get_default_store()


def _write_down(key: str, error: InputError) -> InputError:
    """Return the mistake that was written down first, which may be this one."""
    store = _store()
    error.rank = 0 if store is None else dist.get_rank()
    if store is None:
        return error
    subject = error.where if error.value is ... else f"{error.where} = {error.value!r}"
    text = json.dumps([error.rank, subject, error.problem, error.fix])
    try:
        return _parse(store.compare_set(key, "", text))
    except RuntimeError:  # whoever kept the store has gone
        return error


def _read(key: str) -> InputError | None:
    store = _store()
    try:
        return _parse(store.get(key)) if store is not None and store.check([key]) else None
    except RuntimeError:
        return None


def _parse(text: bytes) -> InputError:
    rank, where, problem, fix = json.loads(text)
    error = InputError(where, problem, fix)
    error.rank = rank
    return error
