"""What the doctor looks at inside an allocation. Every rank runs it; the first one writes the findings."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from pathlib import Path
from statistics import median
from typing import Any

_SMALL, _LARGE = 1, 25 * 2**18  # float32: 4 bytes, and 25 MiB, the size of DDP's buckets
_REPEATS = 20


def run(folder: str) -> None:
    """Measure and compare the ranks. Collective; the first rank writes ``findings.json`` into `folder`."""
    from submitit import JobEnvironment

    from distplateau.cluster.job import rank_environment

    os.environ.update(rank_environment(os.environ, JobEnvironment().hostnames, None))
    from accelerate.utils import gather_object

    from distplateau.training.processes import start_accelerator

    accelerator = start_accelerator("no")
    clock = _clock(accelerator)
    token = _shared_token(Path(folder), accelerator)
    ranks = gather_object([{**_machine(accelerator), "clock": clock, "token": token}])
    findings = {
        "ranks": ranks,
        "latency": _all_reduce_seconds(accelerator, _SMALL),
        "bandwidth": 4 * _LARGE / _all_reduce_seconds(accelerator, _LARGE),
        "lrs": gather_object([_decide(accelerator.process_index)]),
    }
    if accelerator.is_main_process:
        (Path(folder) / "findings.json").write_text(json.dumps(findings), encoding="utf-8")
    accelerator.end_training()


def _machine(accelerator: Any) -> dict[str, Any]:
    import torch

    import distplateau

    device = accelerator.device
    nccl = torch.cuda.nccl if device.type == "cuda" else None  # pyright: ignore[reportAttributeAccessIssue]
    return {
        "node": os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "versions": {"torch": torch.__version__, "distplateau": distplateau.__version__},
        "nccl": ".".join(map(str, nccl.version())) if nccl else None,
    }


def _clock(accelerator: Any) -> float:
    """Return the time of day right after a barrier: what differs is the clocks' skew and the barrier's."""
    for _ in range(3):
        accelerator.wait_for_everyone()
    return time.time()


def _shared_token(folder: Path, accelerator: Any) -> bool:
    """Return whether this rank reads what the first one wrote a moment before."""
    from accelerate.utils import broadcast_object_list

    token = [secrets.token_hex(8)]
    path = folder / "token"
    if accelerator.is_main_process:
        path.write_text(token[0], encoding="utf-8")
    broadcast_object_list(token)
    deadline = time.monotonic() + 10  # network file systems show new files after some seconds
    while time.monotonic() < deadline:
        try:
            if path.read_text(encoding="utf-8") == token[0]:
                return True
        except OSError:
            pass
        time.sleep(0.2)
    return False


def _all_reduce_seconds(accelerator: Any, count: int) -> float:
    import torch
    import torch.distributed as dist

    if accelerator.num_processes == 1:
        return 0.0
    tensor = torch.ones(count, device=accelerator.device)
    seconds = []
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        dist.all_reduce(tensor)
        float(tensor[0])  # waits for the device
        seconds.append(time.perf_counter() - begin)
        tensor.fill_(1.0)
    return median(seconds[2:])


def _decide(rank: int) -> float:
    """Let the ranks decide on losses that differ, and return the learning rate that this one comes to."""
    import torch

    from distplateau import GlobalMean, ReduceLROnPlateau

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = ReduceLROnPlateau(optimizer, patience=0, factor=0.5, check_weights=False)
    for validation in range(3):
        metric = GlobalMean()
        metric.update(torch.tensor([1.0 + validation + rank]))
        scheduler.step(metric)
    return scheduler.get_last_lr()[0]
