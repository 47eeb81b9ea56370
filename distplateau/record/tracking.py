"""The mirror of the ledger in Weights & Biases. Main rank only.

The ledger is the truth. A validation is mirrored once a durable checkpoint covers it (or the run is finished), so
that a requeue never sends it twice; rows that a killed process had not sent are sent when the run goes on.
"""

from __future__ import annotations

import json
import secrets
import warnings
from typing import TYPE_CHECKING, Any, Protocol

from distplateau.record.ledger import Event, read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable

    from distplateau.config import Config

_COUNTERS = ("best", "num_bad", "cooldown", "decision", "step", "samples_per_second", "ranks", "count")


class Mirror(Protocol):
    """What the trainer asks of a tracker."""

    def catch_up(self, through: int) -> None:
        """Send the validations up to that number that were not sent yet: a checkpoint that is durable covers them."""
        ...

    def finish(self) -> None:
        """Send the rest and the summary if the run has finished, and close."""
        ...


class NoMirror:
    """``tracking.wandb = "disabled"``."""

    def catch_up(self, through: int) -> None:
        """Do nothing."""

    def finish(self) -> None:
        """Do nothing."""


def new_run_id() -> str:
    """Return an id that a run keeps for life, whatever becomes of its process."""
    return secrets.token_hex(4)


def open_mirror(config: Config, run_id: str) -> Mirror:
    """Open the tracker that the configuration asks for.

    A tracker that cannot be opened must not cost the training: a warning is given and the ledger goes on alone.
    """
    if config.tracking.wandb == "disabled":
        return NoMirror()
    try:
        return Shielded(WandbMirror(config, run_id))
    except Exception as error:  # wandb raises whatever its service, its disk or the network raise
        _warn(error)
        return NoMirror()


def _warn(error: Exception) -> None:
    warnings.warn(f"wandb is not available, the ledger goes on alone: {error}", stacklevel=3)


class Shielded:
    """A mirror whose errors are told once and end it: a tracker must not cost the training.

    Slurm signals every process of a job, and wandb's service dies of what the ranks survive.
    """

    def __init__(self, mirror: Mirror) -> None:
        self._mirror = mirror

    def catch_up(self, through: int) -> None:
        """Send the validations up to that number that were not sent yet."""
        self._attempt(lambda: self._mirror.catch_up(through))

    def finish(self) -> None:
        """Send the rest and the summary if the run has finished, and close."""
        self._attempt(self._mirror.finish)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            _warn(error)
            self._mirror = NoMirror()


class WandbMirror:
    """One wandb run per run, for life: ``resume="allow"`` with the run's own id.

    Rows are logged without ``step=`` (wandb drops or doubles replayed ones) against the ``epoch`` they hold.
    """

    def __init__(self, config: Config, run_id: str) -> None:
        import wandb

        self._run_dir = config.run_dir
        self._sent_path = self._run_dir / "wandb" / "sent.json"
        self._sent_path.parent.mkdir(parents=True, exist_ok=True)
        section = config.tracking
        self._run = wandb.init(
            id=run_id,
            resume="allow",
            mode=section.wandb if section.wandb != "disabled" else "offline",
            dir=str(self._run_dir),
            project=section.project,
            entity=section.entity,
            group=section.group,
            name=config.run.name,
            tags=section.tags,
            config=config.model_dump(exclude_none=True),
            settings=wandb.Settings(
                silent=True,
                console="off",
                # No code, no diff, no command line: they may hold what nobody meant to publish.
                disable_git=True,
                disable_code=True,
                save_code=False,
                x_disable_meta=True,
                init_timeout=30,
                finish_timeout=15,
                # The default of 15 s loses that much on SIGKILL.
                x_transaction_log_flush_interval=1.0,
            ),
        )
        self._run.define_metric("*", step_metric="epoch")

    def catch_up(self, through: int) -> None:
        """Send the validations up to number `through` that were not sent yet."""
        sent = self._read_sent()
        for event in read_ledger(self._run_dir).validations:
            if sent < event["validation"] <= through:
                self._run.log(row(event))
                sent = event["validation"]
        unfinished = self._sent_path.with_suffix(".partial")
        unfinished.write_text(json.dumps({"validation": sent}), encoding="utf-8")
        unfinished.replace(self._sent_path)

    def finish(self) -> None:
        """Send the rest and the summary if the run has finished, and close."""
        history = read_ledger(self._run_dir)
        if history.finished:
            self.catch_up(len(history.validations))
            keys = ("best", "best_validation", "best_step", "reductions", "step", "epoch")
            self._run.summary.update({key: history.finished[key] for key in keys if key in history.finished})
        self._run.finish()

    def _read_sent(self) -> int:
        try:
            return int(json.loads(self._sent_path.read_text(encoding="utf-8"))["validation"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0


def row(event: Event) -> dict[str, Any]:
    """Translate a validation of the ledger to a wandb row: every metric, learning rate and counter by name."""
    lrs = {f"lr/group{place}": lr for place, lr in enumerate(event["lr_after"])}
    counters = {f"scheduler/{key}": event[key] for key in _COUNTERS if key in event}
    dropped = {"scheduler/lr_drop": int(event["decision"] == "reduced")}
    train = {"train/loss": event["train_loss"]} if "train_loss" in event else {}
    return {"epoch": event["epoch"], **event.get("metrics", {}), **train, **lrs, **counters, **dropped}
