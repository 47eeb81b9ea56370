"""A replay as a picture: the recorded curve, and below it one row of learning rates for each combination."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any

from distplateau.errors import InputError
from distplateau.record.replay.table import label
from distplateau.record.report.figures import COLOURS, scale, style
from distplateau.record.story import drawable
from distplateau.record.words import metric_label, plural, rates_text, short

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from distplateau.record.replay.curves import Rates
    from distplateau.record.replay.rerun import Outcome, Replay

_MOST_ROWS = 40
_ROW_INCHES = 0.25
_LONGEST_NAME = 32
_MAX_POINT_MARKERS = 80
# From the highest learning rate to the lowest.
_HIGH, _LOW = "#5b2fb3", "#ddd0f5"


def save_replay(result: Replay, target: Path) -> list[Path]:
    """Write the picture as SVG and PNG, whose suffixes are put behind the path, and return the two.

    Raises
    ------
    InputError
        If they cannot be written.
    """
    figure = draw_replay(result)
    paths = [target.with_name(f"{target.name}{suffix}") for suffix in (".svg", ".png")]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _save(figure, paths)
    except OSError as error:
        problem = f"the picture cannot be written ({error.strerror or error})"
        raise InputError(str(target.parent), problem, "give another folder with --out") from None
    return paths


def _save(figure: Figure, paths: list[Path]) -> None:
    import matplotlib as mpl

    with mpl.rc_context(style()):
        figure.savefig(paths[0], metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
        figure.savefig(paths[1], dpi=160)


def draw_replay(result: Replay) -> Figure:
    """Draw the curve and the rows.

    A thick bar is what would have happened; a thin one is what the rule makes of a curve that would have been another.
    Element ids in the SVG: ``curve``, ``row-N`` for each combination, ``lull`` for the one behind the suggestion.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    rows = result.outcomes[:_MOST_ROWS]
    below = 0.75 + _ROW_INCHES * len(rows)
    with mpl.rc_context(style()):
        figure = Figure(figsize=(9.6, 2.9 + below), layout="constrained")
        curve, bars = figure.subplots(2, 1, sharex=True, height_ratios=(2.5, below), gridspec_kw={"hspace": 0.04})
        _draw_curve(curve, result)
        _draw_rows(bars, result, rows)
        bars.set_xlabel(result.curve.axis)
        bars.xaxis.set_major_formatter(lambda value, _place: short(value))
        begin, end = _edges(result)[0], _edges(result)[-1]
        bars.set_xlim(begin, end + 0.012 * (end - begin))
    return figure


def _draw_curve(axes: Axes, result: Replay) -> None:
    curve = result.curve
    values = [drawable(value) for value in curve.values]
    marker = "o" if len(values) <= _MAX_POINT_MARKERS else None
    axes.plot(curve.positions, values, color=COLOURS["validation"][0], marker=marker, gid="curve", zorder=3)
    scale(axes, values)
    axes.set_ylabel(metric_label(curve.monitor))
    name = curve.source if len(curve.source) <= _LONGEST_NAME else f"…{curve.source[1 - _LONGEST_NAME :]}"
    axes.set_title(f"{name}: {metric_label(curve.monitor)} as recorded", loc="left")
    edges = _edges(result)
    rates = [curve.start_lrs or None, *curve.lr_after]
    drops = [
        edges[place]
        for place, (old, new) in enumerate(itertools.pairwise(rates), start=1)
        if old and new and any(b < a for a, b in zip(old, new, strict=False))
    ]
    if len(drops) <= len(values) / 3:
        for number, drop in enumerate(drops):
            look: dict[str, Any] = {"color": COLOURS["drop"][0], "linewidth": 0.9, "linestyle": (0, (4, 2.5))}
            axes.axvline(drop, label="the run's own reductions" if number == 0 else None, zorder=1.5, **look)
    if result.suggestion.lull is not None:
        first, last = result.suggestion.lull
        words = f"longest lull it came out of: {plural(last - first + 1, 'validation')}"
        begin = edges[first - 1] + (edges[first] - edges[first - 1]) / 2
        end = edges[last] + ((edges[last + 1] - edges[last]) / 2 if last + 1 < len(edges) else 0)
        axes.axvspan(begin, end, color=COLOURS["best-back"][0], label=words, gid="lull", zorder=0, linewidth=0)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=2, columnspacing=1.6)


def _draw_rows(axes: Axes, result: Replay, rows: tuple[Outcome, ...]) -> None:
    rates = [rate for outcome in rows for lrs in (outcome.start_lrs, *outcome.lr_after) for rate in lrs[:1] if rate > 0]
    span = (math.log(min(rates)), math.log(max(rates))) if rates else (0.0, 0.0)
    edges = _edges(result)
    for place, outcome in enumerate(rows):
        _draw_row(axes, place, outcome, edges, span)
    names = [label(outcome, result.varying) + (" (the run)" if outcome.as_recorded else "") for outcome in rows]
    axes.set_yticks(range(len(rows)), names)
    for text, outcome in zip(axes.get_yticklabels(), rows, strict=True):
        text.set_color(COLOURS["ink"][0])
        text.set_fontweight("bold" if outcome.as_recorded else "normal")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    left_out = len(result.outcomes) - len(rows)
    note = "learning rate: thick up to the first different decision (dot), thin where the curve would have been another"
    axes.set_title(
        note + (f"; {left_out} more combinations in the table" if left_out else ""),
        loc="left",
        color=COLOURS["muted"][0],
    )


def _draw_row(axes: Axes, place: int, outcome: Outcome, edges: list[float], span: tuple[float, float]) -> None:
    """Draw a bar for each stretch of one learning rate, thin from the first difference on."""
    lrs = [outcome.start_lrs, *outcome.lr_after]
    first = len(lrs) if outcome.first_difference is None else outcome.first_difference
    keys = [(rates, number >= first) for number, rates in enumerate(lrs[: len(edges) - 1])]
    number = 0
    for (rates, guess), group in itertools.groupby(keys):
        count = len(list(group))
        begin, end = edges[number], edges[number + count]
        share = _share(rates, span)
        bar = axes.barh(
            place, end - begin, left=begin, height=0.26 if guess else 0.72, color=_blend(share), linewidth=0,
            gid=f"row-{place}",
        )  # fmt: skip
        if number:
            axes.plot([begin, begin], [place - 0.36, place + 0.36], color=COLOURS["card"][0], linewidth=1.2)
        if not guess and (end - begin) > 0.06 * (edges[-1] - edges[0]):
            colour = "#ffffff" if share > 0.45 else COLOURS["ink"][0]
            axes.bar_label(bar, [rates_text(rates)], label_type="center", fontsize=7.5, color=colour)
        number += count
    if outcome.first_difference:
        axes.plot(
            [edges[outcome.first_difference]], [place], marker="o", markersize=5, color=COLOURS["drop"][0],
            markeredgecolor=COLOURS["card"][0], zorder=4,
        )  # fmt: skip
    axes.annotate(
        plural(len(outcome.reductions), "reduction"), (1, place), xycoords=axes.get_yaxis_transform(), xytext=(4, 0),
        textcoords="offset points", va="center", fontsize=8, color=COLOURS["muted"][0], annotation_clip=False,
    )  # fmt: skip


def _edges(result: Replay) -> list[float]:
    """Return where each learning rate begins: at the start, and at every validation."""
    places = list(result.curve.positions)
    gap = places[1] - places[0] if len(places) > 1 else 1.0
    return [max(0.0, places[0] - gap) if places[0] >= 0 else places[0] - gap, *places]


def _share(rates: Rates, span: tuple[float, float]) -> float:
    """Place the first group's learning rate between the lowest (0) and the highest (1), by its logarithm."""
    low, high = span
    if not rates or rates[0] <= 0:
        return 0.0
    return (math.log(rates[0]) - low) / (high - low) if high > low else 1.0


def _blend(share: float) -> str:
    pairs = zip(_rgb(_LOW), _rgb(_HIGH), strict=True)
    return "#" + "".join(f"{round(low + share * (high - low)):02x}" for low, high in pairs)


def _rgb(colour: str) -> tuple[int, ...]:
    return tuple(int(colour[place : place + 2], 16) for place in (1, 3, 5))
