"""What the main rank writes down of a run: the ledger, the configuration beside it, and the ledger's mirror."""

from __future__ import annotations

import math
import os
import platform
import socket
from typing import TYPE_CHECKING, Any

import torch

import distplateau
from distplateau.config import dump_config
from distplateau.errors import InputError
from distplateau.lockstep.plateau import PlateauRule
from distplateau.record.ledger import Event, History, Ledger, read_ledger
from distplateau.record.tracking.tracker import Mirror, NoMirror, open_mirror
from distplateau.training.saving.checkpoint import replace_file

if TYPE_CHECKING:
    from pathlib import Path

    from distplateau.config import Config
    from distplateau.lockstep.scheduler import LockstepScheduler
    from distplateau.lockstep.schedules import Length
    from distplateau.training.data.samples import DataSet


class Journal:
    """The record of a run in writing. Main rank only; `open` comes first.

    Parameters
    ----------
    config
        Names the run folder, which exists.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._mirror: Mirror = NoMirror()

    def open(
        self, run_id: str, facts: Event, description: Event, position: Event, *, resumed: bool, ended: bool
    ) -> None:
        """Write the configuration and the first event, and open the mirror.

        Parameters
        ----------
        facts
            Where the run is and what its decisions follow from; for each process anew.
        description
            What the run is; for its first process alone.
        position
            Where this process goes on.
        resumed
            Whether there was a checkpoint to go on from.
        ended
            Whether nothing is left to do.

        Raises
        ------
        InputError
            If something cannot be written.
        """
        run_dir = self._config.run_dir
        before = _read_history(run_dir)
        self._ledger = Ledger(run_dir)
        is_over = ended and before is not None and before.finished is not None
        if not is_over:
            self._write_config()
        if before is None or not before.start:
            self._ledger.append("start", run=self._config.run.name, **facts, **description, run_id=run_id)
        if (before is not None or resumed) and not is_over:
            self._ledger.append("resumed", **position, **facts)
        self._mirror = open_mirror(self._config, run_id)

    def _write_config(self) -> None:
        """Write the configuration whole or not at all: with half of it the run would be refused as another one."""
        path, text = self._config.run_dir / "config.toml", dump_config(self._config)
        try:
            if not path.exists() or path.read_bytes() != text.encode():
                replace_file(path, lambda unfinished: unfinished.write_text(text, encoding="utf-8"))
        except OSError as error:
            fix = "free space or fix the permissions and start again"
            raise InputError(str(path), f"cannot be written ({error.strerror or error})", fix) from error

    def validation(self, event: Event) -> None:
        """Record a validation and its decision."""
        self._ledger.append("validation", **event)

    def interrupted(self, reason: str, step: int, epoch: float) -> None:
        """Record that the run was told to stop, and did."""
        self._ledger.append("interrupted", reason=reason, step=step, epoch=epoch)

    def finished(self, **facts: Any) -> None:
        """Record the end, once."""
        history = read_ledger(self._config.run_dir)
        if history.finished is None:
            # A damaged line may say nothing.
            seconds = [event.get("seconds") for event in history.validations]
            known = [s for s in seconds if isinstance(s, int | float) and math.isfinite(s)]
            self._ledger.append("finished", **facts, seconds=round(sum(known), 3))

    def mirror(self, validations: int) -> None:
        """Mirror what a durable checkpoint covers."""
        self._mirror.catch_up(validations)

    def close(self) -> None:
        """Let the mirror end."""
        self._mirror.finish()


def circumstances(world_size: int, device: torch.device) -> dict[str, Any]:
    """Return where a process of a run is."""
    return {
        "world_size": world_size,
        "device": device_name(device),
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


def settings(config: Config, scheduler: LockstepScheduler, length: Length, data: DataSet) -> dict[str, Any]:
    """Return what the decisions follow from; a run that is resumed may have been given other settings."""
    section, rule = config.schedule, scheduler.schedule.rule
    return {
        "monitor": section.monitor,
        "schedule": {
            "name": section.name,
            "rule": {name: getattr(rule, name) for name in PlateauRule.__slots__},
            "args": section.args,
            "total_steps": length.total_steps,
            "steps_per_epoch": length.steps_per_epoch,
        },
        "lrs": scheduler.state.lrs,
        "samples": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
    }


def description(data: DataSet, parameters: int) -> dict[str, Any]:
    """Return what stays as it is for the whole run."""
    return {
        "image_shape": data.train.shape,
        "num_classes": data.num_classes,
        "classes": data.classes,
        "parameters": parameters,
    }


def device_name(device: torch.device) -> str:
    """Return what people call a device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "CPU" if device.type == "cpu" else str(device)


def _read_history(run_dir: Path) -> History | None:
    """Return what the ledger holds, None if there is none or nothing in it can be read."""
    try:
        return read_ledger(run_dir)
    except InputError:
        return None
