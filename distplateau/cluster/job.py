"""What runs on the nodes: one rank, started by submitit in a task of Slurm (or on this machine)."""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING

from distplateau.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
_WRONG_INPUT, _INTERRUPTED = 2, 75


def run(config: str, code: str, port: int | None = None) -> None:
    """Train the run of a frozen configuration on this rank. Every task of the job calls it.

    Parameters
    ----------
    config
        Path of the frozen configuration.
    code
        Folder with the code as it was at the submission.
    port
        Of the first rank; by default the one that the batch script has chosen (``MASTER_PORT``).

    Raises
    ------
    SystemExit
        With the exit code, unless all went well: 1 failed, 2 wrong input, 75 interrupted.
    """
    # In place of submitit's, which would ignore SIGTERM, and requeue on SIGUSR2 from the first rank alone. Training
    # sets its own later; until then there is nothing to save.
    for number in _SIGNALS:
        signal.signal(number, _leave)
    os.environ["DISTPLATEAU_CODE"] = code
    try:
        os.environ.update(rank_environment(os.environ, _hostnames(), port))
        from distplateau.config import load_config
        from distplateau.training.session import train_and_report

        exit_code = train_and_report(load_config(config))
    except InputError as error:
        sys.stderr.write(f"distplateau: {error}\n")
        raise SystemExit(_WRONG_INPUT) from None
    if exit_code:
        raise SystemExit(exit_code)


def run_in_turn(payloads: Sequence[tuple[str, str]], port: int) -> None:
    """Train one run after the other in the same processes, as a sweep on one machine does; see `run`.

    Raises
    ------
    SystemExit
        With 75 at once if one is interrupted; else at the end, with the largest exit code of those that failed.
    """
    codes = [0]
    for config, code in payloads:
        try:
            run(config, code, port)
        except SystemExit as stop:
            codes.append(stop.code if isinstance(stop.code, int) else 1)
        except Exception:
            traceback.print_exc()
            codes.append(1)
        if codes[-1] == _INTERRUPTED:
            raise SystemExit(_INTERRUPTED)
    if max(codes):
        raise SystemExit(max(codes))


def rank_environment(environ: Mapping[str, str], hostnames: Sequence[str], port: int | None) -> dict[str, str]:
    """Return what torch.distributed and Accelerate read, from what submitit knows of this task.

    Raises
    ------
    InputError
        If the first node does not resolve from here, or nobody has chosen a port.
    """
    from submitit import JobEnvironment

    task = JobEnvironment()
    head = environ.get("MASTER_ADDR") or (hostnames[0] if task.num_nodes > 1 else "127.0.0.1")
    try:
        socket.getaddrinfo(head, None)
    except OSError as error:
        raise InputError(
            "MASTER_ADDR",
            f"the first node does not resolve from {socket.gethostname()} ({error})",
            "name one that does in [slurm.env] MASTER_ADDR, or ask the cluster's administrators",
            value=head,
        ) from None
    master_port = str(port) if port else environ.get("MASTER_PORT", "")
    if not master_port:
        raise InputError("MASTER_PORT", "is not set", "submit with distplateau submit, which chooses one")
    return {
        "RANK": str(task.global_rank),
        "WORLD_SIZE": str(task.num_tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": environ.get("SLURM_NTASKS_PER_NODE") or str(task.num_tasks // task.num_nodes),
        "MASTER_ADDR": head,
        "MASTER_PORT": master_port,
    }


def _hostnames() -> Sequence[str]:
    from submitit import JobEnvironment

    return JobEnvironment().hostnames


def _leave(_number: int, _frame: FrameType | None) -> None:
    raise SystemExit(_INTERRUPTED)
