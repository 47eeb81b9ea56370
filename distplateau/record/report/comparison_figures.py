"""The drawings of a comparison: curves on the same axes, and a line for each run through its settings."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from distplateau.record.report.figures import COLOURS, lr_path, scale, style
from distplateau.record.story import drawable
from distplateau.record.words import metric_label, metric_text, short

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from distplateau.record.report.compared import Compared

# As many as an eye tells apart; the best runs get one, the others are grey.
_PALETTE = ("validation", "drop", "good", "lr0", "lr1", "lr2", "lr3", "warn")


def draw_curves(runs: Sequence[Compared], *, narrow: bool = False) -> Figure:
    """Draw the monitored metric and the learning rate of the first group over the epochs, the best run on top.

    Parameters
    ----------
    runs
        Best first. Element ids in the SVG: ``curve-N`` and ``rate-N``, counted from 1.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(style()):
        figure = Figure(figsize=(4.1, 5.6) if narrow else (9.6, 5.8), layout="constrained")
        values, rates = figure.subplots(2, 1, sharex=True, height_ratios=(1.75, 1), gridspec_kw={"hspace": 0.06})
        everything: list[float] = []
        all_rates: list[float] = []
        for place in reversed(range(len(runs))):
            run = runs[place]
            if not run.history.validations:
                continue
            colour, width = _look(place)
            epochs = [event["epoch"] for event in run.history.validations]
            curve = [drawable(event["value"]) for event in run.history.validations]
            marker = "o" if len(epochs) == 1 else None
            label = run.name if place < len(_PALETTE) else None
            values.plot(epochs, curve, color=colour, lw=width, marker=marker, label=label, gid=f"curve-{place + 1}")
            lr_epochs, lrs = lr_path(run.history, 0)
            rates.plot(lr_epochs, lrs, color=colour, lw=width, gid=f"rate-{place + 1}")
            everything += curve
            all_rates += lrs
        if everything:
            scale(values, everything)
            scale(rates, all_rates, log=True)
            _legend(values, len(runs), narrow=narrow)
        monitor = next((run.monitor for run in runs if run.monitor), "")
        values.set_ylabel(f"validation {metric_label(monitor)}")
        rates.set_ylabel("learning rate")
        rates.set_xlabel("epoch")
    return figure


def draw_parallel(runs: Sequence[Compared], keys: Sequence[str], *, narrow: bool = False) -> Figure:
    """Draw a line for each run, from setting to setting to the best value that it came to.

    Parameters
    ----------
    keys
        Dotted keys of settings that are numbers in every run.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    measured = [run for run in runs if not math.isnan(run.best)]
    columns = [[float(run.settings[key]) for run in measured] for key in keys] + [[run.best for run in measured]]
    monitor = next((run.monitor for run in runs if run.monitor), "")
    with mpl.rc_context(style()):
        figure = Figure(figsize=(4.1, 3.6) if narrow else (9.6, 3.8), layout="constrained")
        axes = figure.subplots()
        heights = [_spread(column) for column in columns]
        for place in reversed(range(len(measured))):
            colour, width = _look(place)
            line = [column[place] for column in heights]
            axes.plot(range(len(columns)), line, color=colour, lw=width, gid=f"line-{place + 1}", clip_on=False)
        for number, column in enumerate(columns):
            is_best = number == len(columns) - 1
            _axis(axes, number, column, heights[number], monitor if is_best else None)
        labels = [key.rpartition(".")[2] for key in keys] + [f"best {metric_label(monitor)}"]
        axes.set_xticks(range(len(columns)), labels)
        axes.set_yticks([])
        axes.grid(visible=False)
        axes.set_xlim(-0.35, len(columns) - 0.45)
        axes.set_ylim(-0.06, 1.06)
        for side in axes.spines.values():
            side.set_visible(False)
    return figure


def _axis(axes: Axes, number: int, values: Sequence[float], heights: Sequence[float], monitor: str | None) -> None:
    """Draw one upright axis with the values that occur on it, as many as can be read."""
    axes.axvline(number, color=COLOURS["line"][0], lw=1, zorder=0)
    last = -math.inf
    for height, value in sorted(set(zip(heights, values, strict=True))):
        if height - last < 0.07:
            continue
        text = metric_text(monitor, value) if monitor else short(value)
        axes.annotate(
            text, (number, height), (5, 0), textcoords="offset points", va="center", fontsize=8,
            color=COLOURS["muted"][0],
        )  # fmt: skip
        last = height


def _spread(values: Sequence[float]) -> list[float]:
    """Place values on [0, 1]: by their logarithm where they span more than a power of ten."""
    low, high = min(values), max(values)
    if low > 0 and high / low > 10:
        values, low, high = [math.log(value) for value in values], math.log(low), math.log(high)
    return [0.5 if high == low else (value - low) / (high - low) for value in values]


def _look(place: int) -> tuple[str, float]:
    """Return colour and line width of the run in that place."""
    if place >= len(_PALETTE):
        return COLOURS["train"][0], 0.8
    return COLOURS[_PALETTE[place]][0], 2.2 if place == 0 else 1.3


def _legend(axes: Axes, count: int, *, narrow: bool) -> None:
    """Name the best runs above the drawing: inside, their curves run everywhere."""
    handles, labels = axes.get_legend_handles_labels()
    shown = 4 if narrow else len(_PALETTE)
    handles, labels = handles[::-1][:shown], labels[::-1][:shown]
    title = f"the best {len(labels)} of {count}" if count > len(labels) else None
    figure = axes.get_figure()
    assert figure is not None
    columns = 1 if narrow else 4
    figure.legend(handles, labels, loc="outside upper left", ncols=columns, fontsize=8, title=title, title_fontsize=8)
