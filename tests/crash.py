"""Kill a run again and again, at random times and in every way, until it is done: it must end as if nothing had been.

    python tests/crash.py [KILLS] [SEED]        # make crash-test: 100 kill points; tests/test_crash.py runs a few

A kill is SIGKILL, SIGTERM or SIGUSR2 to one rank or to all, while the ranks start, train, validate or save, at 1, 2, 3
and 4 processes. Final weights, best weights and every validation of the ledger are compared bit for bit with those of a
run that was left alone.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file

from distplateau.config import Config, parse_config
from distplateau.record.ledger import read_ledger
from distplateau.record.verify import verify

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

    from torch import nn

WORLD_SIZES = (1, 2, 3, 4)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGUSR2)
KEYS = ("validation", "step", "value", "decision", "lr_before", "lr_after", "best", "num_bad", "digest", "train_loss")
_GRACE_SECONDS = 4.0
_CONTEXT = multiprocessing.get_context("forkserver")


def make_config(folder: Path) -> Config:
    """Return a run of about two seconds that has everything which must survive."""
    return parse_config(
        {
            "run": {"name": "run", "dir": str(folder)},
            "data": {"global_batch_size": 16, "validation_size": 0.2, "augment": ["flip"]},
            "model": {"name": "crash:network"},
            "optimizer": {"lr": 0.01},
            "schedule": {"patience": 0, "factor": 0.5, "warmup_steps": 20, "restore_best": True},
            "training": {"epochs": 8, "validate_every": "30 steps", "ema": 0.9},
            "checkpoint": {"every": "25 steps"},
            "tracking": {"wandb": "disabled"},
        }
    )


def network(image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
    """Return a network with random numbers in its forward pass, and buffers that each of them changes."""
    from torch import nn

    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(math.prod(image_shape), 64),
        nn.BatchNorm1d(64),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(64, num_classes),
    )


def crash(folder: Path, world_size: int, kills: int, seed: int) -> list[str]:
    """Run to the end with that many kills on the way; return what each one was."""
    dice, told = random.Random(seed), []
    while len(told) < kills:
        ranks = _start(folder, world_size)
        # Starting takes about a second: some kills come in it, most later.
        time.sleep(dice.uniform(0.3, 1.0 + 0.5 * world_size))
        number, everyone = dice.choice(SIGNALS), dice.random() < 0.5
        victims = ranks if everyone else [dice.choice(ranks)]
        finished = all(rank.exitcode == 0 for rank in ranks)
        for victim in victims:
            if victim.is_alive() and victim.pid is not None:
                os.kill(victim.pid, number)
        _join(ranks)
        if finished:
            break
        told.append(f"{number.name} to {'all' if everyone else 'one'} of {world_size}")
    for _ in range(3):  # a run that is done stays done
        ranks = _start(folder, world_size)
        for rank in ranks:
            rank.join(120)
        if all(rank.exitcode == 0 for rank in ranks):
            return told
        _join(ranks)
    raise AssertionError(f"the run does not come to its end after {told}")


def result(folder: Path) -> dict[str, Any]:
    """Return what must be the same."""
    run_dir = folder / "run"
    newest = max((run_dir / "checkpoints").glob("step-*"))
    history = read_ledger(run_dir)
    return {
        "what does not follow": [str(finding) for finding in verify(run_dir).findings],
        "validations": [[event[key] for key in KEYS] for event in history.validations],
        "finished": {key: history.finished[key] for key in ("step", "validations", "best", "reductions")},
        "weights": {name: tensor.tolist() for name, tensor in load_file(newest / "model.safetensors").items()},
        "average": {name: tensor.tolist() for name, tensor in load_file(newest / "average.safetensors").items()},
        "best weights": {name: t.tolist() for name, t in load_file(run_dir / "model.safetensors").items()},
    }


def _start(folder: Path, world_size: int) -> list[BaseProcess]:
    port = _free_port()
    ranks: list[BaseProcess] = [
        _CONTEXT.Process(target=_rank, args=(folder, rank, world_size, port)) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    return ranks


def _join(ranks: list[BaseProcess]) -> None:
    """Wait as a launcher does: those that are left when one has died get some seconds, then SIGKILL."""
    deadline = time.monotonic() + _GRACE_SECONDS
    while any(rank.is_alive() for rank in ranks) and time.monotonic() < deadline:
        if any(rank.exitcode not in {None, 0, 75} for rank in ranks):
            break
        time.sleep(0.02)
    for rank in ranks:
        if rank.is_alive():
            rank.kill()
        rank.join()


def _rank(folder: Path, rank: int, world_size: int, port: int) -> None:
    import torch

    from distplateau.training import interruption
    from distplateau.training.trainer import train

    torch.set_num_threads(1)
    interruption._ROUND_SECONDS = 0.05  # the runs are short
    sys.stdout = sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - for the life of the process
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo",
        ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    if world_size == 1:
        os.environ.pop("RANK")
    train(make_config(folder))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Run all kill points and print what came of them."""
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
    _CONTEXT.set_forkserver_preload(["torch", "accelerate", "sklearn.datasets", "distplateau.training.trainer"])
    different = done = 0
    with tempfile.TemporaryDirectory() as scratch:
        for world_size in WORLD_SIZES:
            crash(Path(scratch, f"whole-{world_size}"), world_size, 0, 0)
        whole = {size: result(Path(scratch, f"whole-{size}")) for size in WORLD_SIZES}
        number = 0
        while done < kills:
            world_size = WORLD_SIZES[number % len(WORLD_SIZES)]
            folder = Path(scratch, f"run-{number}")
            told = crash(folder, world_size, min(5, kills - done), seed + number)
            wrong = [key for key, value in result(folder).items() if value != whole[world_size][key]]
            verdict = f"DIFFERENT {wrong}" if wrong else "the same bits"
            print(f"{done + len(told):4} kills, run {number}: {', '.join(told)}: {verdict}")
            sys.stdout.flush()
            done, number, different = done + len(told), number + 1, different + bool(wrong)
    print(f"{done} kill points in {number} runs: {different} runs ended differently")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
