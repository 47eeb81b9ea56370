"""What a person sees while the run goes on: a bar on a terminal, one line per validation elsewhere. Main rank only."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

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
    """

    def __init__(self, *, main: bool, total_steps: int, done_steps: int, steps_per_epoch: int) -> None:
        self._main, self._total, self._steps_per_epoch = main, total_steps, steps_per_epoch
        self._first_step, self._started, self._refreshed = done_steps, time.monotonic(), 0.0
        self._console = Console(file=sys.stdout, soft_wrap=True, highlight=False)
        self._bar: Progress | None = None
        if main and self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("steps  loss {task.fields[loss]}  lr {task.fields[lr]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("training", total=total_steps, completed=done_steps, loss="-", lr="-")

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
        """Move the bar; what waits for the device is asked only when the bar is drawn, twice a second."""
        if self._bar and time.monotonic() - self._refreshed >= _REFRESH_SECONDS:
            self._refreshed = time.monotonic()
            epoch = f"epoch {step // self._steps_per_epoch + 1}"
            self._bar.update(self._task, completed=step, description=epoch, loss=f"{loss():.4f}", lr=f"{lrs()[0]:.3g}")

    def validated(self, event: Event, epochs: int, patience: int | None) -> None:
        """Print the line of a validation."""
        if not self._main:
            return
        style = {"reduced": "yellow", "raised": "cyan", "improved": "green"}.get(event["decision"])
        self.say(validation_line(event, epochs, patience, self._remaining(event["step"])), style)
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
    short = name.removeprefix("val/")
    return f"val {value:.4f}" if short == "loss" else f"{short} {100 * value:.2f} %"


def _decision(event: Event, patience: int | None) -> str:
    if event["decision"] == "bad" and patience is not None:
        # The count starts anew when the patience ran out and there was no lower rate to go to.
        return f"bad {event['num_bad']}/{patience}" if event["num_bad"] else "bad, at the lowest rate"
    if event["decision"] == "reduced":
        return "REDUCED from " + ", ".join(f"{lr:.4g}" for lr in event["lr_before"])
    return str(event["decision"])


def _number(epoch: float) -> str:
    return f"{epoch:.2f}".rstrip("0").rstrip(".")
