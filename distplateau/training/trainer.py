"""The loop: batches, validation, decision, ledger, checkpoint.

Everything that can be wrong in the configuration is found in `setup`, before there is a process group.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, NoReturn

from accelerate.utils import DistributedDataParallelKwargs, gather_object

from distplateau.config import Config, interval_in_steps
from distplateau.errors import InputError
from distplateau.lockstep import consensus
from distplateau.lockstep.exact import Partial
from distplateau.lockstep.metric import GlobalMean
from distplateau.lockstep.plateau import NonFiniteMetricError
from distplateau.record.ledger import sealed_run_id
from distplateau.training import journal
from distplateau.training.interruption import Call, Interrupted, Interruption
from distplateau.training.mistakes import told_once
from distplateau.training.processes import accelerated, random_numbers_put_back, repeatable_kernels, threads_put_back
from distplateau.training.progress import ProgressReport
from distplateau.training.replica import Replica
from distplateau.training.saving import snapshot
from distplateau.training.saving.checkpoint import Checkpoint, CheckpointFolder, MisfitError
from distplateau.training.saving.lock import only_one
from distplateau.training.saving.resuming import agree_on_newest
from distplateau.training.saving.snapshot import Unfinished, check_state
from distplateau.training.saving.writer import BackgroundWriter
from distplateau.training.setup import Parts, check_run_folder, check_same, check_samples, prepare_parts
from distplateau.training.step import TrainStep
from distplateau.training.validation import measure, sync_buffers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

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
    check_samples(config, parts.data, override=override)
    with only_one(config.run_dir):
        ddp = DistributedDataParallelKwargs(
            gradient_as_bucket_view=True, broadcast_buffers=False, static_graph=config.training.static_graph
        )
        with (
            accelerated(config.training.precision, kwargs_handlers=[ddp]) as accelerator,
            told_once(),
            threads_put_back(),
            repeatable_kernels(config.training.deterministic),
            random_numbers_put_back(accelerator.device),
        ):
            check_same(config, parts)
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
        self.world_size = accelerator.num_processes
        self.main = accelerator.is_main_process
        self.device = accelerator.device
        self.data = parts.data.to(self.device)
        self.replica = Replica(config, parts, accelerator)
        self.journal = journal.Journal(config)
        self.checkpoints = CheckpointFolder(config.run_dir, config.checkpoint.keep)
        self.validate_every = interval_in_steps(config.training.validate_every, parts.length.steps_per_epoch)
        self.checkpoint_every = (
            interval_in_steps(config.checkpoint.every, parts.length.steps_per_epoch)
            if config.checkpoint.seconds is None
            else None
        )
        self.objective = parts.objective
        self.train_step = TrainStep(config, parts, self.data, self.replica.model, self.replica.optimizer, accelerator)
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
            done_steps=self.replica.step,
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
        replica = self.replica
        self._clock.restart()
        replica.model.train()
        if replica.end() is None:
            self.train_step.settle_buckets()
            self.train_step.begin(replica.step)
        self.train_step.before_update = self._writer.wait_for_copy
        first = replica.step
        while replica.end() is None:
            self._clock.samples += self.train_step(replica.step)
            if self.main and replica.step == first:  # now the optimizer has its state
                self._writer.reserve(vars(snapshot.take(replica, Unfinished())))
            replica.updated()
            progress.stepped(replica.step, self.train_step.last_loss, replica.scheduler.get_last_lr)
            if replica.step % self.validate_every == 0 or replica.step == self.length.total_steps:
                event = self._validate()
                progress.validated(event)
            if self._checkpoint_is_due():
                self._save(wait=replica.end() is not None)
            self._heed(interruption.agreed(self._request()))
            if self._validated_at == replica.step:
                self._clock.restart()

    def _heed(self, call: Call) -> None:
        """Do what the ranks have agreed on. Every rank calls it with the same value."""
        if call is Call.FAILURE:
            self._fail()
        elif self.replica.end() is not None:
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
        return (every is not None and self.replica.step % every == 0) or self.replica.end() is not None

    def _interrupt(self, reason: str) -> NoReturn:
        """Save in the middle of an epoch, so that the run goes on with the same bits, and leave. Collective."""
        self._save(wait=True)
        # A launcher that sees one rank leave may end the others: nobody leaves before all is written.
        if self.main and self._failure is None:
            epoch = self.replica.step / self.length.steps_per_epoch
            self._attempt(lambda: self.journal.interrupted(reason, self.replica.step, epoch))
        self.accelerator.wait_for_everyone()
        if self._failure is not None:
            raise self._failure
        raise Interrupted(reason, self.replica.step)

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

    # One validation.

    def _validate(self) -> Event:
        """Measure, agree, decide, record: the same decision on every rank, one all-reduce for all metrics."""
        self._clock.training_ends()
        sync_buffers(self.replica.network, self.config.training.sync_batchnorm_stats)
        if self.replica.average:
            self.replica.average.copy_buffers()
        batch_size = self.config.data.eval_batch_size
        network = self.replica.validated
        measure(self.accelerator, network, self.data, "validation", batch_size, self.objective, self.metrics)
        monitored = self.metrics[self.config.schedule.monitor]
        others = [metric for metric in self.metrics.values() if metric is not monitored]
        consultation = self.replica.scheduler.consult(monitored, also=[*others, self.train_step.train_loss])
        decision = self._decide(consultation.value)
        self.replica.reductions += decision.reduced
        improved = self.replica.note_best(decision)
        event = self._event(decision, consultation)
        self.replica.mind_best(decision, improved=improved)
        self._validated_at, self._nonfinite = self.replica.step, None
        self.train_step.restart()
        if self.main:
            self._attempt(lambda: self.journal.validation(event))
            if improved and not self._checkpoint_is_due():
                self._attempt(self._save_best)
        return event

    def _decide(self, value: float) -> Decision:
        try:
            return self.replica.scheduler.decide(value)
        except NonFiniteMetricError:
            monitor, step = self.config.schedule.monitor, self.replica.step
            problem = f"{monitor} is {value} after step {step}, which ends the run as asked"
            fix = "use 'bad' or 'ignore', or a lower optimizer.lr"
            raise InputError("schedule.nonfinite", problem, fix, value="raise") from None

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
            "epoch": self.replica.step / self.length.steps_per_epoch,
            "step": self.replica.step,
            **self.replica.lagging_schedule(),
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
        metadata = snapshot.best_metadata(self.replica)
        average = snapshot.average_weights(self.replica)
        # Under the name that they have in a checkpoint: copied to the same memory.
        name, weights = ("model", snapshot.weights(self.replica)) if average is None else ("average", average)
        self._writer.submit({name: weights}, lambda copied: self.checkpoints.save_best(copied[name], metadata))

    def _save(self, *, wait: bool = False) -> None:
        """Save after the decision, so that an observation is never lost or made twice. Collective.

        Parameters
        ----------
        wait
            Return when it is on the disk; otherwise it is written while training goes on.
        """
        self._saved_time = time.monotonic()
        at_validation = self._validated_at == self.replica.step
        unfinished = Unfinished(buffers=self._unsaved_buffers()) if at_validation else self._unfinished()
        if self.main and self._failure is None:
            checkpoint = snapshot.take(self.replica, unfinished)
            self._attempt(lambda: self._write(checkpoint, wait=wait))

    def _write(self, checkpoint: Checkpoint, *, wait: bool) -> None:
        step, validations = self.replica.step, self.replica.scheduler.state.validations
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
        label = f"the checkpoint at step {self.replica.step}"
        sums = consensus.exchange([self.train_step.train_loss.partial()], consensus.Fingerprint(), label=label)
        nonfinite = None if sums.partials[0].finite else self._trace_nonfinite()
        return Unfinished(asdict(sums.partials[0]), self._buffers(), nonfinite)

    def _unsaved_buffers(self) -> list[dict[str, Tensor]]:
        """Gather the buffers at a validation, where all ranks have the same, if some are in no state dict."""
        network = self.replica.network
        return self._buffers() if dict(network.named_buffers()).keys() - network.state_dict().keys() else []

    def _buffers(self) -> list[dict[str, Tensor]]:
        """Gather what each rank holds in buffers. Collective."""
        # On a CPU they would change while the writer copies them.
        own = {name: buffer.clone().cpu() for name, buffer in self.replica.network.named_buffers()}
        return gather_object([own]) if own else []

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
            snapshot.put_back(self.replica, checkpoint)
            self._nonfinite = checkpoint.state["nonfinite"]

        checkpoint, rejected = agree_on_newest(self.checkpoints, apply)
        for one in rejected if self.main else ():
            self.accelerator.print(f"checkpoint {one.path} is passed over: {one.reason}")
        if self.main:
            self.checkpoints.set_aside(rejected)
        if checkpoint is None:
            # Those of the work before are lost, the run is the same.
            self.replica.run_id = expected or self.replica.run_id
        elif checkpoint.state["train_loss"] and self.main:
            self.train_step.train_loss.absorb(Partial(**checkpoint.state["train_loss"]))
        return checkpoint

    def _open_journal(self, resumed: Checkpoint | None) -> None:
        """Write down that the run begins or goes on. Main rank."""
        if resumed is not None:
            self.checkpoints.restore_best(resumed)
        validations = 0 if resumed is None else int(resumed.state["validations"])
        position = {"last_validation": validations, "step": self.replica.step, **self.replica.lagging_schedule()}
        where = journal.circumstances(self.world_size, self.device)
        self.journal.open(
            self.replica.run_id,
            facts={**where, **journal.settings(self.config, self.replica.scheduler, self.length, self.data)},
            description=journal.description(self.data, self.replica.parameters),
            position={**position, "lr": self.replica.scheduler.get_last_lr()},
            resumed=resumed is not None,
            ended=self.replica.end() is not None,
        )

    def _announce(self, progress: ProgressReport, resumed: Checkpoint | None) -> None:
        ranks = f"{self.world_size} rank{'s' if self.world_size > 1 else ''}"
        progress.say(
            f"{self.config.run.name}: {self.config.model.name} with {self.replica.parameters:,} parameters "
            f"on {self.data.name} ({len(self.data.train):,} training, {len(self.data.validation):,} validation "
            f"samples), {ranks} on {journal.device_name(self.device)}, {self.config.schedule.name} schedule"
        )
        for key in self.config.schedule.without_effect:
            progress.say(f"schedule.{key} has no effect on the {self.config.schedule.name} schedule", "yellow")
        if resumed is not None and self.replica.end() is None:
            progress.say(f"resumed from {resumed.path} after validation {resumed.state['validations']}")
            state = self.replica.scheduler.state
            if state.validations:
                progress.stands_at(state.best, state.num_bad)

    def _finish(self, progress: ProgressReport) -> None:
        """Record the end, once everything before it is on the disk."""
        self._attempt(self._writer.wait)
        if self._failure is not None:
            return
        if self.main:
            self._attempt(self._record_end)
        monitor, best = self.config.schedule.monitor, self.replica.best
        told = f"best {monitor} {best.value:.6g} at validation {best.validation}"
        if not best.validation:
            told = f"{monitor} was never a finite number, so that there are no best weights"
        reductions = f"{self.replica.reductions} reduction{'s' if self.replica.reductions != 1 else ''}"
        progress.say(f"{told}, {reductions}; run folder {self.config.run_dir}")

    def _record_end(self) -> None:
        self.journal.finished(
            epoch=self.replica.step / self.length.steps_per_epoch,
            step=self.replica.step,
            validations=self.replica.scheduler.state.validations,
            best=self.replica.best.value,
            best_validation=self.replica.best.validation,
            best_step=self.replica.best.step,
            reductions=self.replica.reductions,
            ended_after=self.replica.end(),
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
