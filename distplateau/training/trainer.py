"""The loop: batches, validation, decision, ledger, checkpoint.

Everything that can be wrong in the configuration is found in `setup`, before there is a process group.
"""

from __future__ import annotations

import math
import time
import warnings
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

import torch
from accelerate.utils import DistributedDataParallelKwargs, gather_object
from torch import Tensor

from distplateau.config import Config, interval_in_steps
from distplateau.errors import InputError
from distplateau.lockstep import consensus
from distplateau.lockstep.exact import Partial
from distplateau.lockstep.metric import GlobalMean
from distplateau.lockstep.plateau import NonFiniteMetricError
from distplateau.record.ledger import sealed_run_id
from distplateau.record.tracking.tracker import new_run_id
from distplateau.training import journal
from distplateau.training.exchange import share_gradients
from distplateau.training.interruption import Call, Interrupted, Interruption
from distplateau.training.mistakes import told_once
from distplateau.training.parts.averaging import WeightAverage
from distplateau.training.processes import accelerated, repeatable_kernels, threads_put_back
from distplateau.training.progress import ProgressReport
from distplateau.training.saving.checkpoint import Checkpoint, CheckpointFolder, MisfitError
from distplateau.training.saving.lock import only_one
from distplateau.training.saving.resuming import agree_on_newest
from distplateau.training.saving.state import Best, Unfinished, check_state
from distplateau.training.saving.writer import BackgroundWriter
from distplateau.training.setup import Parts, check_run_folder, prepare_parts
from distplateau.training.step import TrainStep
from distplateau.training.validation import measure, sync_buffers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import nn

    from distplateau.lockstep.plateau import Decision
    from distplateau.lockstep.scheduler import Consultation
    from distplateau.record.ledger import Event


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
    with only_one(config.run_dir):
        ddp = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=config.training.static_graph
        )
        with (
            accelerated(config.training.precision, kwargs_handlers=[ddp]) as accelerator,
            told_once(),
            threads_put_back(),
            repeatable_kernels(config.training.deterministic),
        ):
            Trainer(config, parts, accelerator).run()
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
        share_gradients(self.model)
        self.network: nn.Module = accelerator.unwrap_model(self.model)
        self.average = WeightAverage(self.network, section.ema) if section.ema else None
        self.best_weights: dict[str, Tensor] = {}
        self.step = 0
        self.best = Best(math.inf if config.schedule.resolved_mode == "min" else -math.inf)
        self.reductions = 0
        self.run_id = new_run_id()
        self.journal = journal.Journal(config)
        self.checkpoints = CheckpointFolder(config.run_dir, config.checkpoint.keep)
        self.validate_every = interval_in_steps(config.training.validate_every, parts.length.steps_per_epoch)
        self.checkpoint_every = (
            interval_in_steps(config.checkpoint.every, parts.length.steps_per_epoch)
            if config.checkpoint.seconds is None
            else None
        )
        self.objective = parts.objective
        self.train_step = TrainStep(config, parts, self.data, self.model, self.optimizer, accelerator)
        self.metrics = {name: GlobalMean() for name in parts.metrics}
        self._writer = BackgroundWriter(self.device)
        self._failure: InputError | None = None
        self._saved_time = time.monotonic()
        self._submitted_step = -1
        self._validated_at = 0
        self._nonfinite: dict[str, int] | None = None
        self._clock = _Clock()

    def run(self) -> None:
        """Train to the end."""
        resumed = self._resume()
        if self.main:
            self._attempt(lambda: self._open_journal(resumed))
        if any(gather_object([self._failure is not None])):
            self._fail()
        progress = ProgressReport(
            self.config,
            main=self.main,
            total_steps=self.length.total_steps,
            done_steps=self.step,
            steps_per_epoch=self.length.steps_per_epoch,
            patience=self._patience,
        )
        with progress, Interruption() as interruption:
            self._announce(progress, resumed)
            try:
                self._loop(progress, interruption)
                self._finish(progress)
            except KeyboardInterrupt:  # the second one: somebody wants it to end at once
                self._writer.close(wait=False)
                raise
            except BaseException:
                self._close()
                raise
            self._close()
            # A launcher that sees a rank leave may end the others: nobody leaves before everything is written.
            self.accelerator.wait_for_everyone()
            if self._failure is not None:
                raise self._failure

    def _close(self) -> None:
        """End what runs beside the training."""
        self._writer.close()
        if self.main:
            self.journal.close()

    def _loop(self, progress: ProgressReport, interruption: Interruption) -> None:
        self._clock.restart()
        self.model.train()
        if self._end() is None:
            self.train_step.settle_buckets()
            self.train_step.begin(self.step)
        self.train_step.before_update = self._writer.wait_for_copy
        first = self.step
        while self._end() is None:
            self._clock.samples += self.train_step(self.step)
            if self.main and self.step == first:  # now the optimizer has its state
                self._writer.reserve(vars(self._checkpoint(Unfinished())))
            self.scheduler.step_update()
            self.step += 1
            if self.average:
                self.average.update(self.step)
            progress.stepped(self.step, self.train_step.last_loss, self.scheduler.get_last_lr)
            if self.step % self.validate_every == 0 or self.step == self.length.total_steps:
                event = self._validate()
                progress.validated(event)
            if self._checkpoint_is_due():
                self._save(wait=self._end() is not None)
            self._heed(interruption.agreed(self._request()))
            if self._validated_at == self.step:
                self._clock.restart()

    def _heed(self, call: Call) -> None:
        """Do what the ranks have agreed on. Every rank calls it with the same value."""
        if call is Call.FAILURE:
            self._fail()
        elif self._end() is not None:
            return
        elif call is Call.CHECKPOINT:
            self._save()
        elif call.is_signal:
            self._interrupt(call.name)

    def _request(self) -> Call:
        """Return what this rank has to ask of the others. Only the main rank has the clock and the disk."""
        if not self.main:
            return Call.NOTHING
        self._attempt(self._writer.poll)
        if self._failure is not None:
            return Call.FAILURE
        seconds = self.config.checkpoint.seconds
        overdue = seconds is not None and time.monotonic() - self._saved_time >= seconds
        return Call.CHECKPOINT if overdue else Call.NOTHING

    def _checkpoint_is_due(self) -> bool:
        every = self.checkpoint_every
        return (every is not None and self.step % every == 0) or self._end() is not None

    def _interrupt(self, reason: str) -> NoReturn:
        """Save in the middle of an epoch, so that the run goes on with the same bits, and leave. Collective."""
        self._save(wait=True)
        # A launcher that sees one rank leave may end the others: nobody leaves before all is written.
        if self.main and self._failure is None:
            epoch = self.step / self.length.steps_per_epoch
            self._attempt(lambda: self.journal.interrupted(reason, self.step, epoch))
        self.accelerator.wait_for_everyone()
        if self._failure is not None:
            raise self._failure
        raise Interrupted(reason, self.step)

    def _attempt(self, action: Callable[[], object]) -> None:
        """Keep an error of the main rank until all have agreed to stop: alone it would leave them waiting for it."""
        try:
            action()
        except InputError as error:
            self._failure = self._failure or error

    def _fail(self) -> NoReturn:
        if self._failure is not None:
            raise self._failure
        error = InputError(str(self.config.run_dir), "the main rank cannot write there", "see its message")
        error.rank = 0
        raise error

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
        decision = self._decide(consultation.value)
        self.reductions += decision.reduced
        improved = self._note_best(decision)
        event = self._event(decision, consultation)
        self._mind_best(decision, improved=improved)
        self._validated_at, self._nonfinite = self.step, None
        self.train_step.restart()
        if self.main:
            self._attempt(lambda: self.journal.validation(event))
            if improved and not self._checkpoint_is_due():
                self._attempt(self._save_best)
        return event

    def _decide(self, value: float) -> Decision:
        try:
            return self.scheduler.decide(value)
        except NonFiniteMetricError:
            problem = f"{self.config.schedule.monitor} is {value} after step {self.step}, which ends the run as asked"
            fix = "use 'bad' or 'ignore', or a lower optimizer.lr"
            raise InputError("schedule.nonfinite", problem, fix, value="raise") from None

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
        if self._nonfinite is not None:
            return self._nonfinite
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
            **self._lagging_schedule(),
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

    def _save_best(self) -> None:
        """Write the best weights, where no checkpoint is due that would hold them. Main rank."""
        metadata = self._best_metadata()
        average = self._average_weights()
        # Under the name that they have in a checkpoint: copied to the same memory.
        name, weights = ("model", self._weights()) if average is None else ("average", average)
        self._writer.submit({name: weights}, lambda copied: self.checkpoints.save_best(copied[name], metadata))

    def _weights(self) -> dict[str, Tensor]:
        # Buffers change in the forward pass, before the writer has copied the rest.
        buffers: dict[str, Tensor] = {name: buffer.clone() for name, buffer in self.network.named_buffers()}
        weights: dict[str, Tensor] = self.network.state_dict()
        return {name: buffers.get(name, tensor) for name, tensor in weights.items()}

    def _average_weights(self) -> dict[str, Tensor] | None:
        return dict(self.average.network.state_dict()) if self.average else None

    def _best_metadata(self) -> dict[str, str]:
        best = self.best
        return {
            "monitor": self.config.schedule.monitor,
            "value": repr(best.value),
            "validation": str(best.validation),
            "step": str(best.step),
        }

    def _save(self, *, wait: bool = False) -> None:
        """Save after the decision, so that an observation is never lost or made twice. Collective.

        Parameters
        ----------
        wait
            Return when it is on the disk; otherwise it is written while training goes on.
        """
        self._saved_time = time.monotonic()
        unfinished = self._unfinished() if self._validated_at != self.step else Unfinished()
        if self.main and self._failure is None:
            checkpoint = self._checkpoint(unfinished)
            self._attempt(lambda: self._write(checkpoint, wait=wait))

    def _write(self, checkpoint: Checkpoint, *, wait: bool) -> None:
        step, validations = self.step, self.scheduler.state.validations
        if wait:
            self._writer.wait()
            # One of this step may be there already, and to replace it would leave a moment without it.
            if self._submitted_step != step:
                self.checkpoints.save(checkpoint, step)
            self.journal.mirror(validations)
        else:
            self._writer.submit(
                vars(checkpoint),
                lambda copied: self.checkpoints.save(Checkpoint(**copied), step),
                lambda: self.journal.mirror(validations),
            )
            self._submitted_step = step

    def _unfinished(self) -> Unfinished:
        """Gather what the ranks hold since the last validation. Collective."""
        label = f"the checkpoint at step {self.step}"
        sums = consensus.exchange([self.train_step.train_loss.partial()], consensus.Fingerprint(), label=label)
        own = {name: buffer.cpu() for name, buffer in self.network.named_buffers()}
        nonfinite = None if sums.partials[0].finite else self._trace_nonfinite()
        return Unfinished(asdict(sums.partials[0]), gather_object([own]) if own else [], nonfinite)

    def _checkpoint(self, unfinished: Unfinished) -> Checkpoint:
        """Collect what training continues from. The tensors are those that training goes on with. Main rank."""
        scaler = self.accelerator.scaler
        state = {
            "step": self.step,
            "validations": self.scheduler.state.validations,
            "scheduler": self.scheduler.state_dict(),
            "best": vars(self.best),
            "reductions": self.reductions,
            "world_size": self.world_size,
            "threads": torch.get_num_threads(),
            "run_id": self.run_id,
            "scaler": None if scaler is None else scaler.state_dict(),
            "train_loss": unfinished.train_loss,
            "nonfinite": unfinished.nonfinite,
        }
        best = self._best_metadata() if self.best.validation and self.best.step == self.step else None
        optimizer = self.optimizer.state_dict()
        return Checkpoint(self._weights(), optimizer, state, self._average_weights(), unfinished.buffers, best)

    def _resume(self) -> Checkpoint | None:
        """Continue from the newest checkpoint that is whole and this run's. Every rank reads it. Collective.

        Raises
        ------
        InputError
            If there is none but those of other runs, or the ranks do not find the same ones.
        """
        expected = sealed_run_id(self.config.run_dir)

        def apply(checkpoint: Checkpoint) -> None:
            check_state(checkpoint.state)
            found = checkpoint.state["run_id"]
            if expected is not None and found != expected:
                raise MisfitError(f"it is of run {found}, this one is {expected}")
            self._restore(checkpoint)

        checkpoint, rejected = agree_on_newest(self.checkpoints, apply)
        for one in rejected if self.main else ():
            self.accelerator.print(f"checkpoint {one.path} is passed over: {one.reason}")
        if self.main:
            self.checkpoints.set_aside(rejected)
        if checkpoint is None:
            # Those of the work before are lost, the run is the same.
            self.run_id = expected or self.run_id
        elif checkpoint.state["train_loss"] and self.main:
            self.train_step.train_loss.absorb(Partial(**checkpoint.state["train_loss"]))
        return checkpoint

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take over everything but the losses since the last validation, which would be added twice."""
        state = checkpoint.state
        self.network.load_state_dict(dict(checkpoint.model))
        if len(checkpoint.buffers) == self.world_size:
            self.network.load_state_dict(dict(checkpoint.buffers[self.rank]), strict=False)
        if self.average:
            self.average.network.load_state_dict(dict(checkpoint.average or checkpoint.model))
        if self.config.schedule.restore_best:
            on_device = {name: tensor.to(self.device) for name, tensor in checkpoint.best_weights().items()}
            self.best_weights = on_device
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.scheduler.load_state_dict(state["scheduler"])
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.device.type == "cpu" and state["world_size"] == self.world_size:
            torch.set_num_threads(state["threads"])  # their number decides in which order sums are added
        self.step, self.reductions, self.run_id = state["step"], state["reductions"], state["run_id"]
        self.best = Best(**state["best"])
        self._nonfinite = state["nonfinite"]

    def _open_journal(self, resumed: Checkpoint | None) -> None:
        """Write down that the run begins or goes on. Main rank."""
        if resumed is not None:
            self.checkpoints.restore_best(resumed)
        validations = 0 if resumed is None else int(resumed.state["validations"])
        position = {"last_validation": validations, "step": self.step, **self._lagging_schedule()}
        where = journal.circumstances(self.world_size, self.device)
        self.journal.open(
            self.run_id,
            facts={**where, **journal.settings(self.config, self.scheduler, self.length, self.data)},
            description=journal.description(self.data, self._parameters),
            position={**position, "lr": self.scheduler.get_last_lr()},
            resumed=resumed is not None,
            ended=self._end() is not None,
        )

    def _lagging_schedule(self) -> dict[str, int]:
        """Return the schedule's own step where a gradient scaler left out steps of the optimizer."""
        step = self.scheduler.state.step
        return {} if step == self.step else {"schedule_step": step}

    @property
    def _parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def _announce(self, progress: ProgressReport, resumed: Checkpoint | None) -> None:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        progress.say(
            f"{self.config.run.name}: {self.config.model.name} with {self._parameters:,} parameters "
            f"on {self.data.name} ({len(self.data.train):,} training, {len(self.data.validation):,} validation "
            f"samples), {ranks} on {journal.device_name(self.device)}, {self.config.schedule.name} schedule"
        )
        for key in self.config.schedule.without_effect:
            progress.say(f"schedule.{key} has no effect on the {self.config.schedule.name} schedule", "yellow")
        if resumed is not None and self._end() is None:
            progress.say(f"resumed from {resumed.path} after validation {resumed.state['validations']}")

    def _finish(self, progress: ProgressReport) -> None:
        """Record the end, once everything before it is on the disk."""
        self._attempt(self._writer.wait)
        if self._failure is not None:
            return
        if self.main:
            self._attempt(self._record_end)
        monitor, best = self.config.schedule.monitor, self.best
        told = f"best {monitor} {best.value:.6g} at validation {best.validation}"
        if not best.validation:
            told = f"{monitor} was never a finite number, so that there are no best weights"
        reductions = f"{self.reductions} reduction{'s' if self.reductions != 1 else ''}"
        progress.say(f"{told}, {reductions}; run folder {self.config.run_dir}")

    def _record_end(self) -> None:
        self.journal.finished(
            epoch=self.step / self.length.steps_per_epoch,
            step=self.step,
            validations=self.scheduler.state.validations,
            best=self.best.value,
            best_validation=self.best.validation,
            best_step=self.best.step,
            reductions=self.reductions,
            ended_after=self._end(),
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
