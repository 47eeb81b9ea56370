"""One optimizer step on this rank's slice of the global batch. Nothing here waits for the device."""

from __future__ import annotations

import hashlib
import math
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distplateau.lockstep.metric import GlobalMean
from distplateau.training.data import epoch_order, rank_slice

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from distplateau.config import Config
    from distplateau.training.data import DataSet
    from distplateau.training.setup import Parts


class TrainStep:
    """Forward, backward and optimizer step, on the samples that (seed, step, rank) determine.

    Parameters
    ----------
    data
        On this rank's device.
    model, optimizer
        As Accelerate prepared them.

    Attributes
    ----------
    train_loss
        Mean of the losses since the last validation; reduced together with its metrics.
    """

    def __init__(
        self,
        config: Config,
        parts: Parts,
        data: DataSet,
        model: nn.Module,
        optimizer: AcceleratedOptimizer,
        accelerator: Accelerator,
    ) -> None:
        self.config, self.data, self.model, self.accelerator = config, data, model, accelerator
        self.loss, self.augment = parts.objective.loss, parts.augment
        self.steps_per_epoch = parts.length.steps_per_epoch
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.train_loss = GlobalMean()
        # Accelerate looks for optional packages at each call of backward() and zero_grad(): 0.2 ms a step, and all they
        # do without a gradient scaler is what is called here.
        scaled = accelerator.scaler is not None
        self._backward: Callable[[Tensor], None] = accelerator.backward if scaled else torch.Tensor.backward
        self._optimizer = optimizer if scaled else optimizer.optimizer
        self._min_samples = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1
        self._order: tuple[int, Tensor] | None = None
        self._losses: list[tuple[int, int, Tensor]] = []

    def __call__(self, step: int) -> int:
        """Make optimizer step number `step`, counted from 0; return its global batch size. Every rank calls it."""
        indices, batch_size = self._batch_indices(step)
        seed_step(self.config.run.seed, step, self.rank, self.accelerator.device)
        section = self.config.training
        most = section.micro_batch_size or len(indices)
        micro_batches = max(section.grad_accumulation, -(-len(indices) // max(1, most)))
        for place in range(micro_batches):
            begin, end = rank_slice(0, len(indices), place, micro_batches)
            last = place == micro_batches - 1
            if begin < end or last:
                with nullcontext() if last else self.accelerator.no_sync(self.model):
                    self._add_gradient(indices[begin:end], batch_size, step, place)
        if section.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), section.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        return batch_size

    def settle_buckets(self) -> None:
        """Run forward and backward twice for nothing. Every rank calls it, before the first step and after a resume.

        DDP arranges its gradients in other buckets after the first backward pass, and with three or more ranks the
        arrangement decides in which order gradients are added. Without this the first step of a resumed run would
        differ in the last bits from that of a run that went on. Weights, buffers and gradients are left as they were.
        """
        if self.world_size == 1:
            return
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        for _ in range(2):
            images = self.data.normalize(self.data.train.images[: self._min_samples])
            (self.model(images).sum() * 0.0).backward()
        for buffer, held in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(held)
        self._optimizer.zero_grad()

    def last_loss(self) -> float:
        """Return the mean loss of this rank's last micro-batch. Waits for the device."""
        _, samples, total = self._losses[-1] if self._losses else (0, 0, None)
        return math.nan if total is None or not samples else float(total) / samples

    def first_nonfinite(self) -> int | None:
        """Return the first step since `restart` at which this rank's loss was NaN or infinite. Waits for the device."""
        if not self._losses:
            return None
        bad = (~torch.stack([total for *_, total in self._losses]).isfinite()).tolist()
        return self._losses[bad.index(True)][0] if True in bad else None

    def restart(self) -> None:
        """Forget the losses: a validation has recorded them."""
        self._losses = []

    def _add_gradient(self, indices: Tensor, batch_size: int, step: int, place: int) -> None:
        """Add the gradient of these samples, weighted so that DDP's mean over ranks is the mean over the batch.

        A rank whose slice is empty joins the gradient exchange with samples of weight zero. BatchNorm cannot compute
        the statistics of one sample: such a slice is padded the same way.
        """
        real = len(indices)
        if real < self._min_samples:
            filler = self._epoch_order(step)[: self._min_samples - real]
            indices = torch.cat([indices, filler])
        seed = (self.config.run.seed, step, self.rank, place)
        images = self.data.normalize(self.augment(self.data.train.images[indices], *seed))
        losses = self.loss(self.model(images), self.data.train.labels[indices])
        self.train_loss.update(losses.detach()[:real])
        total = losses[:real].sum()
        self._losses.append((step, real, total.detach()))
        # An empty slice has the sum 0 and no gradient, but DDP waits for one.
        loss = total if real else losses.sum() * 0.0
        self._backward(loss * (self.world_size / batch_size))

    def _batch_indices(self, step: int) -> tuple[Tensor, int]:
        """Return the indices of this rank's samples of the global batch, and the size of that batch."""
        size = self.config.data.global_batch_size
        start = step % self.steps_per_epoch * size
        stop = min(start + size, len(self.data.train))
        begin, end = rank_slice(start, stop, self.rank, self.world_size)
        return self._epoch_order(step)[begin:end], stop - start

    def _epoch_order(self, step: int) -> Tensor:
        epoch = step // self.steps_per_epoch
        if self._order is None or self._order[0] != epoch:
            order = epoch_order(len(self.data.train), self.config.run.seed, epoch)
            self._order = epoch, order.to(self.accelerator.device)
        return self._order[1]


def seed_step(seed: int, step: int, shard: int, device: torch.device) -> None:
    """Make dropout a function of (seed, step, shard), so that a resumed run repeats itself.

    Not through torch.manual_seed: as long as CUDA sleeps that keeps a stack trace for each call, which takes time and
    memory.
    """
    mixed = hashlib.blake2b(f"{seed} {step} {shard}".encode(), digest_size=8).digest()
    number = int.from_bytes(mixed, "little") >> 1
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(number)
