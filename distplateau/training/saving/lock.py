"""One process at a time trains a run: two would overwrite each other's checkpoints and mix their ledgers."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import time
from typing import IO, TYPE_CHECKING

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_NAME = ".lock"
# The node of the stretch before may have died with the lock: file servers take it back after a minute or two.
_REQUEUED_SECONDS = 180.0
_SECONDS = 3.0


@contextlib.contextmanager
def only_one(run_dir: Path) -> Iterator[None]:
    """Hold the run folder. For the first rank; on the others it does nothing.

    Raises
    ------
    InputError
        If another process holds it.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    try:
        file = (run_dir / _NAME).open("a+", encoding="utf-8")
    except OSError as error:
        problem = f"cannot be opened ({error.strerror})"
        raise InputError(str(run_dir / _NAME), problem, "fix the permissions, or choose another folder") from None
    with file:
        _acquire(file, run_dir)
        _sign(file)
        yield


def _sign(file: IO[str]) -> None:
    """Write who holds the lock; on a full disk it is held all the same."""
    with contextlib.suppress(OSError):
        file.truncate(0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())


def _acquire(file: IO[str], run_dir: Path) -> None:
    requeued = int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0
    deadline = time.monotonic() + (_REQUEUED_SECONDS if requeued else _SECONDS)
    while True:
        try:
            # Of the open file, not of the process: it holds between threads and forks as well.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}:
                return  # this file system has no locks
            if time.monotonic() > deadline:
                file.seek(0)
                holder = " ".join(file.read().split()) or "another process"
                fix = "wait for it, end it, or choose another run.name"
                raise InputError(str(run_dir), f"is being trained by {holder}", fix) from None
            time.sleep(0.1)
        else:
            return
