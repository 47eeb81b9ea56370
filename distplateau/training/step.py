"""One optimizer step on this rank's slice of the global batch. Nothing here waits for the device."""

from __future__ import annotations

import hashlib
import math
import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from distplateau.errors import InputError
from distplateau.lockstep.metric import GlobalMean
from distplateau.training.data.plan import EpochPlan, Seeds, Slices
from distplateau.training.data.samples import Split

if TYPE_CHECKING:
    from collections.abc import Callable

    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from distplateau.config import Config
    from distplateau.training.data.samples import DataSet
    from distplateau.training.setup import Parts


_UNUSED = re.compile(r"did not receive grad for rank \d+: (?P<indices>[\d ]+)")


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
    before_update
        Called when the gradients are there, before the weights change.
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
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.train_loss = GlobalMean()
        self.before_update: Callable[[], None] = lambda: None
        # Accelerate looks for optional packages at each call of backward() and zero_grad(): 0.2 ms a step, and all they
        # do without a gradient scaler is what is called here.
        scaled = accelerator.scaler is not None
        self._backward: Callable[[Tensor], None] = accelerator.backward if scaled else torch.Tensor.backward
        self._optimizer = optimizer if scaled else optimizer.optimizer
        self._min_samples = 2 if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()) else 1
        self._plan = EpochPlan(config, len(data.train), self.rank, self.world_size)
        # In memory the whole order of an epoch goes to the device at once; what is read by workers is not needed there.
        self._order_device = accelerator.device if isinstance(data.train, Split) else torch.device("cpu")
        self._losses: list[tuple[int, int, Tensor]] = []

    def begin(self, step: int) -> None:
        """Read the samples of step number `step` and of those that follow; those before are not looked at."""
        slices = Slices(self._plan, self.config.training.epochs, step, self._min_samples, self._order_device)
        self._seeds, self._place = Seeds(slices), 0
        self._batches = self.data.train.batches(slices, self.accelerator.device, self._seeds)

    def __call__(self, step: int) -> int:
        """Make optimizer step number `step`, counted from 0; return its global batch size. Every rank calls it."""
        plan = self._plan.steps[step % len(self._plan.steps)]
        seed_step(self.config.run.seed, step, self.rank, self.accelerator.device)
        *others, last = plan.micro_batches
        for begin, end in others:
            with self.accelerator.no_sync(self.model):
                self._add_gradient(end - begin, plan.batch_size, step)
        self._add_gradient(last[1] - last[0], plan.batch_size, step)
        if self.config.training.max_grad_norm is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.config.training.max_grad_norm)
        self.before_update()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return plan.batch_size

    def settle_buckets(self) -> None:
        """Run forward and backward twice for nothing. Every rank calls it, before the first step and after a resume.

        DDP arranges its gradients in other buckets after the first backward pass, and with three or more ranks the
        arrangement decides in which order gradients are added. Without this the first step of a resumed run would
        differ in the last bits from that of a run that went on. Weights, buffers and gradients are left as they were.

        Raises
        ------
        InputError
            If a parameter gets no gradient: DDP would wait for it.
        """
        if not isinstance(self.model, DistributedDataParallel):  # one process, started without a launcher
            return
        first = torch.arange(self._min_samples, device=self._order_device).clamp(max=len(self.data.train) - 1)
        buffers = [buffer.clone() for buffer in self.model.buffers()]
        for _ in range(2):
            [(images, _)] = self.data.train.batches([first], self.accelerator.device)
            images = self.data.normalize(images)
            try:
                (self.model(images).sum() * 0.0).backward()
            except RuntimeError as error:
                self._tell_unused(error)
                raise
        for buffer, held in zip(self.model.buffers(), buffers, strict=True):
            buffer.copy_(held)
        self._optimizer.zero_grad()

    def _tell_unused(self, error: RuntimeError) -> None:
        """Translate what DDP says when it has waited in vain for the gradient of a parameter."""
        match = _UNUSED.search(str(error))
        if match is None:
            return
        named = self.accelerator.unwrap_model(self.model).named_parameters()
        names = [name for name, parameter in named if parameter.requires_grad]
        first, *others = map(int, match["indices"].split())
        more = f" and {len(others)} more" if others else ""
        fix = "remove what is unused, or set training.static_graph = true if it is the same in every step"
        raise InputError(
            "model.name", f"does not use its parameter {names[first]}{more}", fix, value=self.config.model.name
        ) from error

    def last_loss(self) -> float:
        """Return the mean loss of this rank's last micro-batch. Waits for the device."""
        # This rank's slice of a short batch may be empty.
        filled = ((total, samples) for _, samples, total in reversed(self._losses) if samples)
        total, samples = next(filled, (math.nan, 1))
        return float(total) / samples

    def first_nonfinite(self) -> int | None:
        """Return the first step since `restart` at which this rank's loss was NaN or infinite. Waits for the device."""
        if not self._losses:
            return None
        bad = (~torch.stack([total for *_, total in self._losses]).isfinite()).tolist()
        return self._losses[bad.index(True)][0] if True in bad else None

    def restart(self) -> None:
        """Forget the losses: a validation has recorded them."""
        self._losses = []

    def _add_gradient(self, real: int, batch_size: int, step: int) -> None:
        """Add the gradient of the next micro-batch, weighted so that DDP's mean over ranks is that over the batch.

        Its first `real` samples count. A rank whose slice is empty joins the gradient exchange with samples of weight
        zero; BatchNorm cannot compute the statistics of one sample, so such a slice is filled up the same way.
        """
        images, labels = next(self._batches)
        images = self.data.normalize(self.augment(images, self._seeds[self._place]))
        self._place += 1
        losses = self.loss(self.model(images), labels)
        self.train_loss.update(losses.detach()[:real])
        total = losses[:real].sum()
        self._losses.append((step, real, total.detach()))
        # An empty slice has the sum 0 and no gradient, but DDP waits for one.
        loss = total if real else losses.sum() * 0.0
        self._backward(loss * (self.world_size / batch_size))


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
