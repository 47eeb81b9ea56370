"""The loop: batches, validation, decision, ledger, checkpoint.

Everything that can be wrong in the configuration is found in `setup`, before there is a process group.
"""

from __future__ import annotations

import math
import os
import platform
import socket
import time
import warnings
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

import distplateau
from distplateau.config import Config, dump_config, interval_in_steps
from distplateau.lockstep import consensus
from distplateau.lockstep.exact import Partial
from distplateau.lockstep.metric import GlobalMean
from distplateau.lockstep.plateau import PlateauRule
from distplateau.record.ledger import FILE_NAME, Event, Ledger, read_ledger
from distplateau.record.tracking import Mirror, NoMirror, new_run_id, open_mirror
from distplateau.training.averaging import WeightAverage
from distplateau.training.checkpoint import Checkpoint, CheckpointFolder, save_weights
from distplateau.training.interruption import Interrupted, Interruption
from distplateau.training.processes import repeatable_kernels, start_accelerator
from distplateau.training.progress import ProgressReport
from distplateau.training.setup import Parts, check_run_folder, prepare_parts
from distplateau.training.step import TrainStep
from distplateau.training.validation import measure, sync_buffers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

    from distplateau.lockstep.plateau import Decision
    from distplateau.lockstep.scheduler import Consultation


@dataclass
class Best:
    """The best validation so far, by the plain value of the monitored metric."""

    value: float
    validation: int = 0
    step: int = 0


def train(config: Config, *, override: bool = False) -> Path:
    """Train a run to its end, from its newest checkpoint if there is one. Every rank calls it.

    Parameters
    ----------
    override
        Continue even if the configuration differs from the run's.

    Returns
    -------
    Path
        The run folder.

    Raises
    ------
    InputError
        For anything wrong in the configuration; before there is a process group.
    """
    return train_parts(config, prepare_parts(config), override=override)


def train_parts(config: Config, parts: Parts, *, override: bool = False) -> Path:
    """Train what was built already; see `train`. Every rank calls it."""
    check_run_folder(config, override=override)
    accelerator = start_accelerator(
        config.training.precision,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
    )
    try:
        with repeatable_kernels(config.training.deterministic):
            Trainer(config, parts, accelerator).run()
    finally:
        accelerator.end_training()
    return config.run_dir


class Trainer:
    """One run on this rank.

    Parameters
    ----------
    accelerator
        Wraps model and optimizer and chooses the device.
    """

    def __init__(self, config: Config, parts: Parts, accelerator: Accelerator) -> None:
        self.config, self.accelerator, self.length = config, accelerator, parts.length
        self.rank, self.world_size = accelerator.process_index, accelerator.num_processes
        self.main = accelerator.is_main_process
        self.device = accelerator.device
        self.data = parts.data.to(self.device)
        section = config.training
        if section.channels_last:
            parts.model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        if section.compile:
            parts.model.compile()
        with warnings.catch_warnings():
            # torch >= 2.14 has another name for it, which Accelerate does not know yet.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*", category=FutureWarning)
            prepared = accelerator.prepare(parts.model, parts.optimizer, parts.scheduler)
        self.model, self.optimizer, self.scheduler = prepared
        self.network: nn.Module = accelerator.unwrap_model(self.model)
        self.average = WeightAverage(self.network, section.ema) if section.ema else None
        self.best_weights: dict[str, Tensor] = {}
        self.step = 0
        self.best = Best(math.inf if config.schedule.resolved_mode == "min" else -math.inf)
        self.reductions = 0
        self.run_id = new_run_id()
        self.mirror: Mirror = NoMirror()
        self.checkpoints = CheckpointFolder(config.run_dir, config.checkpoint.keep)
        self.validate_every = interval_in_steps(config.training.validate_every, parts.length.steps_per_epoch)
        self.checkpoint_every = interval_in_steps(config.checkpoint.every, parts.length.steps_per_epoch)
        self.objective = parts.objective
        self.train_step = TrainStep(config, parts, self.data, self.model, self.optimizer, accelerator)
        self.metrics = {name: GlobalMean() for name in parts.metrics}
        self._clock = _Clock()

    def run(self) -> None:
        """Train to the end."""
        resumed = self._resume()
        if self.main:
            self._open_record(resumed)
        progress = ProgressReport(
            main=self.main,
            total_steps=self.length.total_steps,
            done_steps=self.step,
            steps_per_epoch=self.length.steps_per_epoch,
        )
        with progress, Interruption() as interruption:
            self._announce(progress, resumed)
            try:
                self._loop(progress, interruption)
                self._finish(progress)
            finally:
                if self.main:
                    self.mirror.finish()

    def _loop(self, progress: ProgressReport, interruption: Interruption) -> None:
        self._clock.restart()
        self.model.train()
        if self._end() is None:
            self.train_step.settle_buckets()
            self.train_step.begin(self.step)
        saved_at = self.step
        while self._end() is None:
            self._clock.samples += self.train_step(self.step)
            self.scheduler.step_update()
            self.step += 1
            if self.average:
                self.average.update(self.step)
            progress.stepped(self.step, self.train_step.last_loss, self.scheduler.get_last_lr)
            if self.step % self.validate_every == 0 or self.step == self.length.total_steps:
                event = self._validate()
                progress.validated(event, self.config.training.epochs, self._patience)
                if self.step - saved_at >= self.checkpoint_every or self._end() is not None:
                    saved_at = self.step
                    self._save()
                self._clock.restart()
                self.train_step.restart()
            reason = interruption.agreed()
            if reason is not None and self._end() is None:
                self._interrupt(reason)

    def _interrupt(self, reason: str) -> NoReturn:
        """Save in the middle of an epoch, so that the run goes on with the same bits, and leave. Collective."""
        label = f"the interruption at step {self.step}"
        sums = consensus.exchange([self.train_step.train_loss.partial()], consensus.Fingerprint(), label=label)
        own = {name: buffer.cpu() for name, buffer in self.network.named_buffers()}
        self._save(train_loss=sums.partials[0], buffers=gather_object([own]) if own else ())
        if self.main:
            epoch = self.step / self.length.steps_per_epoch
            self.ledger.append("interrupted", reason=reason, step=self.step, epoch=epoch)
        raise Interrupted(reason, self.step)

    def _end(self) -> str | None:
        """Return why the run is at its end, None while it is not. The same on every rank, also after a resume."""
        section = self.config.training
        if self.step >= self.length.total_steps:
            return f"{section.epochs} epochs"
        if section.most_reductions is not None and self.reductions >= section.most_reductions:
            return f"{self.reductions} reductions"
        if section.early_stop == "min_lr" and self.scheduler.at_floor():
            return "min_lr"
        return None

    # One validation.

    def _validate(self) -> Event:
        """Measure, agree, decide, record: the same decision on every rank, one all-reduce for all metrics."""
        self._clock.training_ends()
        sync_buffers(self.network, self.config.training.sync_batchnorm_stats)
        if self.average:
            self.average.copy_buffers()
        batch_size = self.config.data.eval_batch_size
        measure(self.accelerator, self._validated, self.data, "validation", batch_size, self.objective, self.metrics)
        monitored = self.metrics[self.config.schedule.monitor]
        others = [metric for metric in self.metrics.values() if metric is not monitored]
        consultation = self.scheduler.consult(monitored, also=[*others, self.train_step.train_loss])
        decision = self.scheduler.decide(consultation.value)
        self.reductions += decision.reduced
        improved = self._note_best(decision)
        event = self._event(decision, consultation)
        self._mind_best(decision, improved=improved)
        if self.main:
            if improved:
                self._save_best(decision)
            event = self.ledger.append("validation", **event)
        return event

    def _note_best(self, decision: Decision) -> bool:
        """Remember the best value as such, without the threshold that the schedule puts on it."""
        sign = 1 if self.config.schedule.resolved_mode == "min" else -1
        if not math.isfinite(decision.value) or sign * decision.value >= sign * self.best.value:
            return False
        self.best = Best(decision.value, decision.validation, self.step)
        return True

    @property
    def _validated(self) -> nn.Module:
        """The network that is validated and whose weights are saved as the best: the average, where there is one."""
        return self.average.network if self.average else self.network

    def _mind_best(self, decision: Decision, *, improved: bool) -> None:
        """Keep the best weights on every rank, and put them back at a reduction, if that is asked for."""
        wish = self.config.schedule.restore_best
        if wish is False:
            return
        if improved:
            self.best_weights = {name: tensor.detach().clone() for name, tensor in self._validated.state_dict().items()}
        elif decision.reduced and self.best_weights:
            self.network.load_state_dict(self.best_weights)
            if self.average:
                self.average.network.load_state_dict(self.best_weights)
            if wish == "reset":
                self.optimizer.optimizer.state.clear()

    def _trace_nonfinite(self) -> dict[str, int]:
        """Return the first step at which a training loss was NaN or infinite, and the rank. Collective.

        Only called when the reduced training loss says that there was one, which all ranks see alike.
        """
        mine = self.train_step.first_nonfinite()
        steps = gather_object([math.inf if mine is None else mine])
        step, rank = min((step, rank) for rank, step in enumerate(steps))
        return {"step": step, "rank": rank}

    def _event(self, decision: Decision, consultation: Consultation) -> Event:
        train_seconds, seconds = self._clock.read()
        train_loss = self.train_step.train_loss.compute()
        return {
            "validation": decision.validation,
            "epoch": self.step / self.length.steps_per_epoch,
            "step": self.step,
            "monitor": self.config.schedule.monitor,
            "value": decision.value,
            "count": int(self.metrics["val/loss"].count),
            "decision": decision.kind,
            "lr_before": decision.lr_before,
            "lr_after": decision.lr_after,
            "best": decision.best,
            "num_bad": decision.num_bad,
            "cooldown": decision.cooldown,
            "ranks": consultation.ranks,
            "digest": consultation.digest,
            "train_loss": train_loss,
            **({} if math.isfinite(train_loss) else {"nonfinite_loss": self._trace_nonfinite()}),
            "metrics": {name: metric.compute() for name, metric in self.metrics.items()},
            "samples_per_second": round(self._clock.samples / train_seconds, 1),
            "seconds": round(seconds, 3),
        }

    @property
    def _patience(self) -> int | None:
        decides = self.config.schedule.name in {"plateau", "greedy"}
        return self.config.schedule.patience if decides else None

    # What the run leaves behind.

    def _save_best(self, decision: Decision) -> None:
        metadata = {
            "monitor": self.config.schedule.monitor,
            "value": repr(decision.value),
            "validation": str(decision.validation),
            "step": str(self.step),
        }
        save_weights(self.config.run_dir / "model.safetensors", self._validated.state_dict(), metadata)

    def _save(self, train_loss: Partial | None = None, buffers: Sequence[Mapping[str, Tensor]] = ()) -> None:
        """Save after the decision, so that an observation is never lost or made twice.

        Parameters
        ----------
        train_loss
            Sum over all ranks since the last validation, in the middle of an epoch.
        buffers
            Those of each rank, in the middle of an epoch.
        """
        if not self.main:
            return
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "validations": self.scheduler.state.validations,
            "scheduler": self.scheduler.state_dict(),
            "best": vars(self.best),
            "reductions": self.reductions,
            "run_id": self.run_id,
            "scaler": None if scaler is None else scaler.state_dict(),
            "train_loss": None if train_loss is None else asdict(train_loss),
        }
        optimizer = self.optimizer.state_dict()
        average = self.average.network.state_dict() if self.average else None
        checkpoint = Checkpoint(self.network.state_dict(), optimizer, _plain_infinities(state), average, buffers)
        self.checkpoints.save(checkpoint, self.step)
        self.mirror.catch_up()

    def _resume(self) -> Checkpoint | None:
        """Continue from the newest checkpoint that is whole. Every rank reads it."""
        checkpoint, rejected = self.checkpoints.load_newest()
        for one in rejected if self.main else ():
            self.accelerator.print(f"checkpoint {one.path} is passed over: {one.reason}")
        if checkpoint is None:
            return None
        state = _real_infinities(checkpoint.state)
        self.network.load_state_dict(dict(checkpoint.model))
        if len(checkpoint.buffers) == self.world_size:
            self.network.load_state_dict(dict(checkpoint.buffers[self.rank]), strict=False)
        if state.get("train_loss") and self.main:
            self.train_step.train_loss.absorb(Partial(**state["train_loss"]))
        if self.average:
            self.average.network.load_state_dict(dict(checkpoint.average or checkpoint.model))
        if self.config.schedule.restore_best:
            on_device = {name: tensor.to(self.device) for name, tensor in checkpoint.best_weights().items()}
            self.best_weights = on_device
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.step, self.reductions, self.run_id = state["step"], state["reductions"], state["run_id"]
        self.best = Best(**state["best"])
        return checkpoint

    def _open_record(self, resumed: Checkpoint | None) -> None:
        """Write the configuration and the first event, open the mirror. Main rank."""
        run_dir = self.config.run_dir
        started_before = (run_dir / FILE_NAME).exists()
        self.ledger = Ledger(run_dir)
        (run_dir / "config.toml").write_text(dump_config(self.config), encoding="utf-8")
        last_validation = 0
        if resumed is not None:
            self.checkpoints.restore_best(resumed)
            last_validation = int(resumed.state["validations"])
        if not started_before:
            self.ledger.append("start", run=self.config.run.name, **self._circumstances(), **self._description())
        elif read_ledger(run_dir).finished is None or self._end() is None:
            self.ledger.append("resumed", last_validation=last_validation, step=self.step, **self._circumstances())
        self.mirror = open_mirror(self.config, self.run_id)

    def _circumstances(self) -> dict[str, Any]:
        return {
            "world_size": self.world_size,
            "device": _device_name(self.device),
            "hostname": socket.gethostname(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "distplateau": distplateau.__version__,
            },
            "slurm_job_id": os.environ.get("SLURM_JOB_ID"),
            "slurm_nodes": os.environ.get("SLURM_JOB_NODELIST"),
            "restart_count": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        }

    def _description(self) -> dict[str, Any]:
        section, rule = self.config.schedule, self.scheduler.schedule.rule
        return {
            "monitor": section.monitor,
            "schedule": {
                "name": section.name,
                "rule": {name: getattr(rule, name) for name in PlateauRule.__slots__},
                "args": section.args,
                "total_steps": self.length.total_steps,
                "steps_per_epoch": self.length.steps_per_epoch,
            },
            "lrs": self.scheduler.state.lrs,
            "image_shape": self.data.train.shape,
            "num_classes": self.data.num_classes,
            "classes": self.data.classes,
            "samples": {
                "train": len(self.data.train),
                "validation": len(self.data.validation),
                "test": len(self.data.test),
            },
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "run_id": self.run_id,
        }

    def _announce(self, progress: ProgressReport, resumed: Checkpoint | None) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        progress.say(
            f"{self.config.run.name}: {self.config.model.name} with {parameters:,} parameters on {self.data.name} "
            f"({len(self.data.train):,} training, {len(self.data.validation):,} validation samples), "
            f"{ranks} on {_device_name(self.device)}, {self.config.schedule.name} schedule"
        )
        for key in self.config.schedule.without_effect:
            progress.say(f"schedule.{key} has no effect on the {self.config.schedule.name} schedule", "yellow")
        if resumed is not None and self._end() is None:
            progress.say(f"resumed from {resumed.path} after validation {resumed.state['validations']}")

    def _finish(self, progress: ProgressReport) -> None:
        if self.main and read_ledger(self.config.run_dir).finished is None:
            self.ledger.append(
                "finished",
                epoch=self.step / self.length.steps_per_epoch,
                step=self.step,
                validations=self.scheduler.state.validations,
                best=self.best.value,
                best_validation=self.best.validation,
                best_step=self.best.step,
                reductions=self.reductions,
                ended_after=self._end(),
                seconds=_training_seconds(read_ledger(self.config.run_dir).validations),
            )
        progress.say(
            f"best {self.config.schedule.monitor} {self.best.value:.6g} at validation {self.best.validation}, "
            f"{self.reductions} reduction{'s' if self.reductions != 1 else ''}; run folder {self.config.run_dir}"
        )


class _Clock:
    """Time since the last validation, with and without the validation itself."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self.samples = 0
        self._start = self._train_end = time.perf_counter()

    def training_ends(self) -> None:
        self._train_end = time.perf_counter()

    def read(self) -> tuple[float, float]:
        now = time.perf_counter()
        return max(self._train_end - self._start, 1e-9), now - self._start


def _training_seconds(validations: list[Event]) -> float:
    return round(sum(event["seconds"] for event in validations), 3)


def _device_name(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU" if device.type == "cpu" else str(device)
    )


def _plain_infinities(value: Any) -> Any:
    """JSON has no infinities; `best` starts as one."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"nonfinite": repr(value)}
    if isinstance(value, dict):
        return {key: _plain_infinities(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_infinities(item) for item in value]
    return value


def _real_infinities(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {"nonfinite"}:
            return float(value["nonfinite"])
        return {key: _real_infinities(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_real_infinities(item) for item in value]
    return value
