"""The candidates of training.py, each on one rank of a launched group: NAME EPOCHS FOLDER."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from distplateau.config import parse_config
from distplateau.training.data.in_memory import load_data

GLOBAL_BATCH, LR, SEED = 64, 1e-3, 0
VALIDATION = 5_000
MEAN, STD = 0.2860, 0.3530


def ours(epochs: int, folder: Path) -> list[float]:
    """Everything switched on: ledger, wandb offline, checkpoint at every epoch, progress lines."""
    from distplateau.record.ledger import read_ledger
    from distplateau.training.trainer import train

    train(
        parse_config(
            {
                "run": {"name": "bench", "dir": str(folder), "seed": SEED},
                "data": {
                    "name": "fashion-mnist",
                    "global_batch_size": GLOBAL_BATCH,
                    "validation_size": VALIDATION,
                    "eval_batch_size": 1_000,
                },
                "optimizer": {"name": "adam", "lr": LR},
                "training": {"epochs": epochs},
            }
        )
    )
    times = [event["time"] for event in read_ledger(folder / "bench").validations]
    return [0.0, *(after - before for before, after in pairwise(times))]


def tuned(epochs: int, _folder: Path) -> list[float]:
    """Train in the loop that a careful person writes by hand."""
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    images, labels, validation_images, validation_labels = _tensors()
    model = nn.parallel.DistributedDataParallel(_model(), gradient_as_bucket_view=True, static_graph=True)
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, fused=True)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    seconds = []
    for epoch in range(epochs):
        begin = time.perf_counter()
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED + epoch))
        share = GLOBAL_BATCH // ranks
        model.train()
        for start in range(0, len(order) - GLOBAL_BATCH + 1, GLOBAL_BATCH):
            index = order[start + rank * share : start + (rank + 1) * share]
            loss = functional.cross_entropy(model(_normalized(images[index])), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.inference_mode():
            total = torch.zeros(1)
            for part in range(rank, VALIDATION // 1_000, ranks):
                block = slice(part * 1_000, (part + 1) * 1_000)
                total += functional.cross_entropy(
                    model.module(_normalized(validation_images[block])), validation_labels[block], reduction="sum"
                )
            dist.all_reduce(total)
        scheduler.step(float(total) / VALIDATION)
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return seconds


def by_hand(epochs: int, _folder: Path) -> list[float]:
    """DDP over torchvision's dataset and a DataLoader, as tutorials have it."""
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    dist.init_process_group("gloo")
    train_set, validation_set = _datasets()
    sampler = DistributedSampler(train_set, drop_last=True)
    share = GLOBAL_BATCH // dist.get_world_size()
    loader = DataLoader(train_set, batch_size=share, sampler=sampler)
    validation = DataLoader(validation_set, batch_size=1_000, sampler=DistributedSampler(validation_set, shuffle=False))
    model = nn.parallel.DistributedDataParallel(_model())
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    seconds = []
    for epoch in range(epochs):
        begin = time.perf_counter()
        sampler.set_epoch(epoch)
        model.train()
        running = 0.0
        for images, labels in loader:
            optimizer.zero_grad()
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
            optimizer.step()
            running += loss.item()
        model.eval()
        with torch.no_grad():
            total = torch.zeros(1)
            for images, labels in validation:
                total += functional.cross_entropy(model(images), labels, reduction="sum")
            dist.all_reduce(total)
        scheduler.step(float(total) / len(validation_set))
        seconds.append(time.perf_counter() - begin)
    dist.destroy_process_group()
    return seconds


def lightning(epochs: int, folder: Path, *, tensors: bool = False) -> list[float]:
    """Train in a Lightning Trainer, with its own defaults but for the progress bar."""
    import lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    seconds: list[float] = []

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = _model()

        def training_step(self, batch: list[Tensor], _index: int) -> Tensor:
            loss = functional.cross_entropy(self.model(batch[0]), batch[1])
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: list[Tensor], _index: int) -> None:
            self.log("val_loss", functional.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)

        def on_train_epoch_start(self) -> None:
            self.begin = time.perf_counter()

        def on_train_epoch_end(self) -> None:
            seconds.append(time.perf_counter() - self.begin)

        def configure_optimizers(self) -> dict:
            optimizer = torch.optim.Adam(self.parameters(), lr=LR)
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_loss"}}

    if tensors:
        images, labels, validation_images, validation_labels = _tensors()
        sets = [
            TensorDataset(_normalized(images), labels),
            TensorDataset(_normalized(validation_images), validation_labels),
        ]
    else:
        sets = _datasets()
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=epochs, default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
    )  # fmt: skip
    share = GLOBAL_BATCH // 2
    trainer.fit(
        Module(), DataLoader(sets[0], batch_size=share, shuffle=True, drop_last=True), DataLoader(sets[1], 1_000)
    )
    return seconds


def _model() -> nn.Sequential:
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10)
    )


def _normalized(images: Tensor) -> Tensor:
    return images.float().div_(255).sub_(MEAN).div_(STD)


def _tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    section = parse_config({"data": {"name": "fashion-mnist", "validation_size": VALIDATION}}).data
    data = load_data(section, SEED)
    return data.train.images, data.train.labels, data.validation.images, data.validation.labels


def _datasets() -> list:
    """Make the splits of `_tensors`, image by image through torchvision's transforms as its own dataset class does."""
    from PIL import Image
    from torch.utils.data import Dataset
    from torchvision import transforms

    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])

    class Images(Dataset):
        def __init__(self, images: Tensor, labels: Tensor) -> None:
            self.images, self.labels = images.reshape(-1, 28, 28), labels

        def __len__(self) -> int:
            return len(self.images)

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return transform(Image.fromarray(self.images[index].numpy(), mode="L")), int(self.labels[index])

    images, labels, validation_images, validation_labels = _tensors()
    return [Images(images, labels), Images(validation_images, validation_labels)]


def main() -> None:
    """Run one candidate and write its times and peak memory."""
    warnings.simplefilter("ignore")
    name, epochs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    candidates = {
        "ours": ours,
        "tuned": tuned,
        "by hand": by_hand,
        "lightning": lightning,
        "lightning, tensors": lambda epochs, folder: lightning(epochs, folder, tensors=True),
    }
    seconds = candidates[name](epochs, folder)
    import os

    if os.environ["RANK"] == "0":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        (folder / "result.json").write_text(json.dumps({"seconds": seconds, "peak_mib": peak}))


if __name__ == "__main__":
    main()
