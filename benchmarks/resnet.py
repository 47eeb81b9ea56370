"""ResNets: our trainer with everything switched on against a bare loop and a DataLoader, on GPUs where there are any.

    python benchmarks/resnet.py

Each repeat runs every candidate in a launch of its own; what counts are the ratios of medians. The time is that of a
whole epoch with its validation, the first one left out. Images are random numbers of the shape of real ones: what is
measured is the loop. Exits with 1 if a target is missed.

- bare: fused optimizer, gradients as bucket views, images on the device sliced in batches, no look at the loss
- loader: the same loop over a DataLoader with up to 16 workers
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

REPEATS, EPOCHS = 3, 4
TARGET = 0.98
CLASSES, LR, SEED = 10, 0.01, 0


@dataclass(frozen=True)
class Case:
    """What is trained on.

    Parameters
    ----------
    side
        Height and width of an image.
    batch
        Samples of a step over all ranks.
    """

    model: str
    side: int
    batch: int
    steps: int
    precision: str = "no"
    compile: bool = False
    channels_last: bool = False

    @property
    def samples(self) -> int:
        """Training images; there is an eighth of it for the validation."""
        return self.batch * self.steps

    def __str__(self) -> str:
        words = [self.model, f"{self.side}x{self.side}", f"batch {self.batch}", self.precision]
        return ", ".join([*words, *(["compiled"] if self.compile else [])])


CPU_CASES = (Case("resnet18", 32, 128, 12),)
GPU_CASES = tuple(
    Case(model, side, batch, steps, "bf16", compiled, channels_last=True)
    for model, side, batch, steps in (("resnet18", 32, 512, 80), ("resnet50", 224, 256, 20))
    for compiled in (False, True)
)


def main() -> int:
    """Print samples a second and ratios, and what misses its target."""
    if len(sys.argv) > 1:
        return _candidate(sys.argv[1], Case(**json.loads(sys.argv[2])), Path(sys.argv[3]))
    gpus = torch.cuda.device_count()
    print(f"{gpus} x {torch.cuda.get_device_name()}" if gpus else "2 CPU processes")
    missed = [claim for case in (GPU_CASES if gpus else CPU_CASES) for claim in _compare(case, gpus or 2)]
    for claim in missed:
        print(f"MISSED: {claim}", file=sys.stderr)
    return int(bool(missed))


def _compare(case: Case, ranks: int) -> list[str]:
    seconds: dict[str, list[float]] = {name: [] for name in CANDIDATES}
    validation = []
    for _ in range(REPEATS):
        for name, times in seconds.items():
            result = _launch(name, case, ranks)
            times.append(median(result["epochs"]))
            validation += result["validations"]
    speed = {name: case.samples / median(times) for name, times in seconds.items()}
    print(f"\n{case}")
    for name, images in speed.items():
        print(f"  {name:8}{images:10,.0f} images/s   ours {speed['ours'] / images:5.2f} x as fast")
    print(f"  a validation of {case.samples // 8:,} images: {1e3 * median(validation):.1f} ms of an epoch of ours")
    return [] if speed["ours"] >= TARGET * speed["bare"] else [f"{case}: ours >= {TARGET} x bare"]


def _launch(name: str, case: Case, ranks: int) -> dict[str, list[float]]:
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
            __file__, name, json.dumps(vars(case)), folder,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{name}:\n{done.stderr[-3000:]}")
        return json.loads(Path(folder, "result.json").read_text())


def _candidate(name: str, case: Case, folder: Path) -> int:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    epochs, validations = CANDIDATES[name](case, folder)
    if os.environ["RANK"] == "0":
        (folder / "result.json").write_text(json.dumps({"epochs": epochs[1:], "validations": validations[1:]}))
    return 0


def _ours(case: Case, folder: Path) -> tuple[list[float], list[float]]:
    """Everything switched on: ledger, wandb offline where it is installed, checkpoint at every epoch, progress."""
    from importlib.util import find_spec

    from distplateau import fit
    from distplateau.record.ledger import read_ledger

    config = {
        "run": {"name": "bench", "dir": str(folder), "seed": SEED},
        "data": {"global_batch_size": case.batch, "eval_batch_size": case.batch},
        "optimizer": {"name": "sgd", "lr": LR, "momentum": 0.9},
        "training": {
            "epochs": EPOCHS, "precision": case.precision, "channels_last": case.channels_last, "compile": case.compile,
        },
        "tracking": {"wandb": "offline" if find_spec("wandb") else "disabled"},
    }  # fmt: skip
    fit(_model(case), "cross_entropy", _images(case.samples, case), _images(case.samples // 8, case), config)
    events = read_ledger(folder / "bench").validations
    times = [event["time"] for event in events]
    training = [case.samples / event["samples_per_second"] for event in events]
    validations = [event["seconds"] - trained for event, trained in zip(events, training, strict=True)]
    return [0.0, *(after - before for before, after in pairwise(times))], validations


def _bare(case: Case, _folder: Path) -> tuple[list[float], list[float]]:
    device = _device()
    images, labels = (tensor.to(device) for tensor in _images(case.samples, case))
    rank, share = int(os.environ["RANK"]), case.batch // int(os.environ["WORLD_SIZE"])

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch)).to(device)
        for start in range(rank * share, len(order), case.batch):
            index = order[start : start + share]
            yield images[index], labels[index]

    return _loop(case, batches)


def _loader(case: Case, _folder: Path) -> tuple[list[float], list[float]]:
    from torch.utils.data import DataLoader, TensorDataset
    from torch.utils.data.distributed import DistributedSampler

    ranks, rank, device = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"]), _device()
    samples = TensorDataset(*_images(case.samples, case))
    sampler = DistributedSampler(samples, ranks, rank)
    workers = min(16, (os.cpu_count() or 1)) // ranks
    loader = DataLoader(
        samples, case.batch // ranks, sampler=sampler, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=device.type == "cuda",
    )  # fmt: skip

    def batches(epoch: int) -> Iterable[tuple[Tensor, Tensor]]:
        sampler.set_epoch(epoch)
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return _loop(case, batches)


def _loop(case: Case, batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]]) -> tuple[list[float], list[float]]:
    device = _device()
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    network = _model(case).to(device)
    held_out = [tensor.to(device) for tensor in _images(case.samples // 8, case)]
    if case.channels_last:
        network.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    if case.compile:
        network.compile()
    model: nn.Module = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, fused=True)
    seconds = []
    for epoch in range(EPOCHS):
        begin = time.perf_counter()
        model.train()
        for images, labels in batches(epoch):
            with _precision(case, device):
                loss = functional.cross_entropy(model(_laid_out(images, case)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        _evaluate(case, network, held_out)
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return seconds, []


def _evaluate(case: Case, network: nn.Module, held_out: list[Tensor]) -> float:
    network.eval()
    rank, ranks = dist.get_rank(), dist.get_world_size()
    total = torch.zeros(1, device=held_out[0].device)
    share = case.batch // ranks
    with torch.inference_mode(), _precision(case, held_out[0].device):
        for start in range(rank * share, len(held_out[0]), case.batch):
            images, labels = (tensor[start : start + share] for tensor in held_out)
            total += functional.cross_entropy(network(_laid_out(images, case)), labels, reduction="sum")
    dist.all_reduce(total)
    return float(total) / len(held_out[0])


def _precision(case: Case, device: torch.device) -> Any:
    return torch.autocast(device.type, torch.bfloat16) if case.precision == "bf16" else nullcontext()


def _laid_out(images: Tensor, case: Case) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if case.channels_last else images


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _model(case: Case) -> nn.Module:
    import torchvision

    torch.manual_seed(SEED)
    return torchvision.models.get_model(case.model, num_classes=CLASSES)


def _images(count: int, case: Case) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    images = torch.randn(count, 3, case.side, case.side, generator=generator)
    return images, torch.randint(CLASSES, (count,), generator=generator)


CANDIDATES = {"ours": _ours, "bare": _bare, "loader": _loader}

if __name__ == "__main__":
    sys.exit(main())
