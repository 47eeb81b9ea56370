"""What a person sees while the run goes on: a bar on a terminal, lines elsewhere. Main rank only."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from distplateau.config import interval_in_seconds, interval_in_steps
from distplateau.record.words import PANEL_METRICS, short

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from distplateau.config import Config
    from distplateau.record.ledger import Event

_REFRESH_SECONDS = 0.5


class ProgressReport:
    """Follow the training. Off the main rank every method does nothing.

    Parameters
    ----------
    main
        Whether this process talks.
    total_steps, done_steps
        Optimizer steps of the whole run and those made before a resume.
    patience
        That of the schedule, None for one that has none.
    """

    def __init__(
        self,
        config: Config,
        *,
        main: bool,
        total_steps: int,
        done_steps: int,
        steps_per_epoch: int,
        patience: int | None,
    ) -> None:
        self._main, self._total, self._steps_per_epoch = main, total_steps, steps_per_epoch
        self._epochs, self._batch_size, self._patience = config.training.epochs, config.data.global_batch_size, patience
        self._first_step, self._started = done_steps, time.monotonic()
        self._last_step, self._last_time = done_steps, self._started
        self._standing = ""
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        every = config.tracking.log_every
        self._every_seconds = interval_in_seconds(every)
        self._every_steps = None if self._every_seconds else interval_in_steps(every, steps_per_epoch)
        if main and self._console.is_terminal:
            self._every_seconds, self._every_steps = _REFRESH_SECONDS, None
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("steps  {task.fields[facts]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, facts="")

    def __enter__(self) -> ProgressReport:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, text: str, style: str | None = None) -> None:
        """Print a line."""
        if self._main:
            self._console.print(text, style=style, markup=False)

    def stepped(self, step: int, loss: Callable[[], float], lrs: Callable[[], list[float]]) -> None:
        """Move the bar, or print a line; what waits for the device is asked only when one of them is due."""
        if not self._main or not self._is_due(step):
            return
        pace = (step - self._last_step) * self._batch_size / max(1e-9, time.monotonic() - self._last_time)
        self._begin_interval(step)
        facts = [f"loss {loss():.4f}", f"lr {lrs()[0]:.4g}", self._standing, f"{pace:,.0f} samples/s"]
        if self._bar:
            epoch = f"epoch {-(-step // self._steps_per_epoch)}"
            self._bar.update(self._task, completed=step, description=epoch, facts="  ".join(filter(None, facts)))
        else:
            epoch = f"epoch {step / self._steps_per_epoch:.2f}/{self._epochs}"
            where = [epoch, f"step {step:,}/{self._total:,}"]
            self.say("  ".join(filter(None, [*where, *facts, f"{self._remaining(step)} left"])), "dim")

    def stands_at(self, best: float, num_bad: int) -> None:
        """Take over what the lines between validations say of the schedule."""
        bad = f"  bad {num_bad}/{self._patience}" if self._patience is not None else ""
        self._standing = f"best {best:.4f}{bad}"

    def _is_due(self, step: int) -> bool:
        if self._every_steps is not None:
            return step % self._every_steps == 0
        assert self._every_seconds is not None
        return time.monotonic() - self._last_time >= self._every_seconds

    def _begin_interval(self, step: int) -> None:
        self._last_step, self._last_time = step, time.monotonic()

    def validated(self, event: Event) -> None:
        """Print the line of a validation."""
        if not self._main:
            return
        self._begin_interval(event["step"])
        self.stands_at(event["best"], event["num_bad"])
        style = {"reduced": "yellow", "raised": "cyan", "improved": "green"}.get(event["decision"])
        self.say(validation_line(event, self._epochs, self._patience, self._remaining(event["step"])), style)
        if "nonfinite_loss" in event:
            first = event["nonfinite_loss"]
            self.say(
                f"the training loss was NaN or infinite, first at step {first['step']} on rank {first['rank']}", "red"
            )

    def _remaining(self, step: int) -> str:
        done = step - self._first_step
        seconds = (time.monotonic() - self._started) / max(1, done) * (self._total - step)
        minutes, rest = divmod(round(seconds), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def validation_line(event: Event, epochs: int, patience: int | None, remaining: str) -> str:
    """Write one validation as one line: where, losses, metrics, learning rate, decision, speed, time left."""
    metrics: dict[str, Any] = event["metrics"]
    parts = [
        f"epoch {_number(event['epoch']):>{len(str(epochs))}}/{epochs}",
        f"step {event['step']}",
        f"train {event['train_loss']:.4f}",
        *(_metric(name, value) for name, value in metrics.items()),
        "lr " + ", ".join(f"{lr:.4g}" for lr in event["lr_after"]),
        _decision(event, patience),
        f"{event['samples_per_second']:,.0f} samples/s",
        f"{remaining} left",
    ]
    return "  ".join(parts)


def _metric(name: str, value: float) -> str:
    if name == "val/loss":
        return f"val {value:.4f}"
    text = f"{100 * value:.2f} %" if name in PANEL_METRICS else short(value, 4)
    return f"{name.removeprefix('val/')} {text}"


def _decision(event: Event, patience: int | None) -> str:
    if event["decision"] == "bad" and patience is not None:
        # The count starts anew when the patience ran out and there was no lower rate to go to.
        return f"bad {event['num_bad']}/{patience}" if event["num_bad"] else "bad, at the lowest rate"
    if event["decision"] == "reduced":
        return "REDUCED from " + ", ".join(f"{lr:.4g}" for lr in event["lr_before"])
    return str(event["decision"])


def _number(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")
