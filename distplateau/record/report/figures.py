"""The drawings of a run, made of its ledger alone.

Their colours are those of `COLOURS` for paper and PNG; in the page they become CSS variables, so that one drawing is
right in light and in dark. A narrow drawing serves phones: a wide one scaled down to a hand's width cannot be read.
"""

from __future__ import annotations

import io
import math
import re
from html import escape
from typing import TYPE_CHECKING, Any

from distplateau.record.story import (
    best_validation,
    drawable,
    has_loss,
    marked_changes,
    measured,
    metric_panels,
    rule_of,
    schedule_name,
    steps_per_epoch,
    top_value,
)
from distplateau.record.words import (
    MAX_GROUPS_NAMED,
    PANEL_METRICS,
    PERCENT_SIGN,
    metric_label,
    metric_text,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from distplateau.record.ledger import History

_MAX_POINT_MARKERS = 60
# Name: (light, dark).
COLOURS = {
    "page": ("#f7f8fa", "#12151a"),
    "card": ("#ffffff", "#1a1e25"),
    "line": ("#e1e5ea", "#2c323c"),
    "ink": ("#1d232b", "#e3e7ed"),
    "muted": ("#5d6874", "#99a4b1"),
    "train": ("#93a0af", "#76828f"),
    "validation": ("#2563d9", "#7aa8ff"),
    "drop": ("#cf4a1f", "#ff8f66"),
    "good": ("#17804a", "#58c98c"),
    "warn": ("#b07503", "#e5b454"),
    "warn-back": ("#fdf5e0", "#2b2517"),
    "best-back": ("#e9f0fe", "#1c2a45"),
    "lr0": ("#7446cf", "#b494ff"),
    "lr1": ("#0d8f83", "#4fd0c3"),
    "lr2": ("#b97a07", "#e9b650"),
    "lr3": ("#c43c86", "#f58cc2"),
}
_LR_COLOURS = ("lr0", "lr1", "lr2", "lr3")
_LR_DASHES = ("-", (0, (5, 2)), (0, (2, 1.5)), (0, (7, 2, 2, 2)))


def draw_run(history: History, *, narrow: bool = False) -> Figure:
    """Draw losses and learning rates over the epochs, every change of the learning rate marked in both panels.

    Element ids in the SVG: ``drop-V``, ``raise-V`` or ``scheduled-V`` for the change at validation V (with ``-lr`` in
    the lower panel), ``requeue-N``, ``best``, ``lr-group-G``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(style()):
        figure = Figure(figsize=(4.1, 5.2) if narrow else (9.6, 5.6), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(1.75, 1), gridspec_kw={"hspace": 0.06})
        if history.validations:
            _draw_losses(losses, history)
            _draw_rates(rates, history)
            _mark_changes(losses, rates, history)
            _mark_requeues((losses, rates), history)
            _legend(losses)
            if 1 < len(history.validations[0]["lr_after"]) <= MAX_GROUPS_NAMED:
                _legend(rates, below=True)
        losses.set_ylabel("loss" if has_loss(history) else "monitored metric")
        _finish_epoch_axis(rates, history)
    return figure


def draw_metrics(history: History, *, narrow: bool = False) -> Figure | None:
    """Draw the accuracies, and the monitored metric where it is neither a loss nor one of them; None without any."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = metric_panels(history)
    if not panels:
        return None
    height = 0.4 + (1.9 if narrow else 2.3) * len(panels)
    with mpl.rc_context(style()):
        figure = Figure(figsize=(4.1 if narrow else 9.6, height), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, names in zip(all_axes, panels, strict=True):
            _draw_metric_panel(axes, names, history)
        _finish_epoch_axis(all_axes[-1], history)
    return figure


def save_figures(history: History, folder: Path) -> list[Path]:
    """Save the drawings as SVG and PNG for slides and papers; return their paths."""
    drawn = {"curves": draw_run(history), "metrics": draw_metrics(history)} if history.validations else {}
    paths = []
    for name, figure in drawn.items():
        for ending in ("svg", "png") if figure is not None else ():
            folder.mkdir(exist_ok=True)
            paths.append(save_figure(figure, folder / f"{name}.{ending}"))
    return paths


def save_figure(figure: Figure | None, path: Path) -> Path:
    """Save a drawing in the format that the name ends with; the same drawing gives the same file."""
    import matplotlib as mpl

    assert figure is not None
    partial = path.with_name(f".partial-{path.name}")
    with mpl.rc_context(style()):
        metadata = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(partial, format=path.suffix[1:], dpi=160, metadata=metadata)
    return partial.replace(path)


def style() -> Any:
    """Return matplotlib's settings for every drawing of the record."""
    muted, line, ink = (COLOURS[name][0] for name in ("muted", "line", "ink"))
    return {
        "font.size": 9,
        "axes.edgecolor": line,
        "axes.labelcolor": muted,
        "axes.titlesize": 9,
        "axes.titlecolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.7,
        "xtick.color": line,
        "ytick.color": line,
        "xtick.labelcolor": muted,
        "ytick.labelcolor": muted,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": ink,
        "lines.linewidth": 1.7,
        "lines.markersize": 3.2,
        "legend.frameon": False,
        "legend.handlelength": 1.5,
        # Metric names are the user's: a dollar sign in one is no formula.
        "text.parse_math": False,
        "svg.fonttype": "none",
        # The same ledger gives the same file.
        "svg.hashsalt": "distplateau",
    }


def _draw_losses(axes: Axes, history: History) -> None:
    epochs = [event["epoch"] for event in history.validations]
    train = [drawable(event.get("train_loss")) for event in history.validations]
    values = [drawable(top_value(event, history)) for event in history.validations]
    if any(map(math.isfinite, train)):
        axes.plot(epochs, train, color=COLOURS["train"][0], marker=_marker(epochs), label="training loss")
    label = "validation loss" if has_loss(history) else metric_label(history.validations[0]["monitor"])
    _plot(axes, epochs, values, "validation", label)
    scale(axes, [*train, *values])
    _mark_best(axes, history, lambda event: top_value(event, history))
    lost = [event["epoch"] for event in history.validations if not math.isfinite(event["value"])]
    if lost:
        _mark_nonfinite(axes, lost)


def _draw_rates(axes: Axes, history: History) -> None:
    everything: list[float] = []
    for group in range(len(history.validations[0]["lr_after"])):
        epochs, rates = lr_path(history, group)
        look = group % len(_LR_COLOURS)
        colour, dashes = COLOURS[_LR_COLOURS[look]][0], _LR_DASHES[look]
        axes.plot(epochs, rates, color=colour, linestyle=dashes, label=f"group {group}", gid=f"lr-group-{group}")
        if len(history.validations) == 1:
            axes.plot(epochs[-1:], rates[-1:], color=colour, marker="o")
        everything += rates
    scale(axes, everything, log=True)
    axes.set_ylabel("learning rate")


def lr_path(history: History, group: int) -> tuple[list[float], list[float]]:
    """Return epochs and learning rates of a group as a line through what each validation found and left.

    Between two validations a plateau schedule is constant and a warmup or a schedule of the clock is on its way, so
    joining the points is exact for the one and close for the others.
    """
    start, rule = history.start, rule_of(history, 1)
    warmup, steps = rule.get("warmup_steps", 0), steps_per_epoch(history)
    peaks = start.get("lrs") or history.validations[0]["lr_before"]
    points: list[tuple[float, float]] = []
    # 1cycle begins below the peak that the ledger names; its line begins at the first validation.
    if schedule_name(history, 1) != "onecycle":
        points.append((0.0, peaks[group] / max(1, warmup)))
        if warmup > 1 and steps and warmup / steps <= history.validations[-1]["epoch"]:
            points.append((warmup / steps, peaks[group]))
    for event in history.validations:
        points += [(event["epoch"], event["lr_before"][group]), (event["epoch"], event["lr_after"][group])]
    points.sort(key=lambda point: point[0])
    return [epoch for epoch, _ in points], [drawable(rate) if rate > 0 else math.nan for _, rate in points]


def _mark_changes(losses: Axes, rates: Axes, history: History) -> None:
    colours = {"reduced": "drop", "raised": "good", "scheduled": "drop"}
    ids = {"reduced": "drop", "raised": "raise", "scheduled": "scheduled"}
    span, free_from = max(history.validations[-1]["epoch"], 1e-9), -math.inf
    letter = span * (0.0085 if _is_wide(losses) else 0.021)
    for change in marked_changes(history):
        epoch, colour = change.event["epoch"], COLOURS[colours[change.kind]][0]
        gid = f"{ids[change.kind]}-{change.event['validation']}"
        look: dict[str, Any] = {"color": colour, "linewidth": 0.9, "linestyle": (0, (4, 2.5)), "zorder": 1.5}
        losses.axvline(epoch, gid=gid, **look)
        rates.axvline(epoch, gid=f"{gid}-lr", **look)
        half_width = letter * len(change.label) / 2
        # Where two labels would touch, the later line goes without.
        if epoch - half_width >= free_from:
            _label(rates, epoch, change.label, colour)
            free_from = epoch + half_width + letter


def _label(axes: Axes, epoch: float, text: str, colour: str) -> None:
    axes.annotate(
        text, (epoch, 1), xycoords=axes.get_xaxis_transform(), xytext=(0, 3), textcoords="offset points",
        ha="center", va="bottom", color=colour, fontsize=8,
    )  # fmt: skip


def _mark_requeues(panels: Iterable[Axes], history: History) -> None:
    steps = steps_per_epoch(history)
    requeues = [event for event in history.events if event["event"] == "resumed"]
    for place, axes in enumerate(panels):
        for number, event in enumerate(requeues if steps else (), start=1):
            label = "requeue" if number == 1 and place == 0 else None
            gid = f"requeue-{number}" + ("-lr" if place else "")
            look: dict[str, Any] = {"color": COLOURS["muted"][0], "linewidth": 1.2, "linestyle": (0, (1, 2))}
            axes.axvline(event.get("step", 0) / steps, label=label, gid=gid, zorder=1.4, **look)


def _mark_best(axes: Axes, history: History, value_of: Any) -> None:
    best = best_validation(history)
    if best is None or not math.isfinite(value := drawable(value_of(best))):
        return
    axes.plot(
        [best["epoch"]], [value], linestyle="none", marker="o", markersize=8, markeredgewidth=1.7,
        markerfacecolor="none", markeredgecolor=COLOURS["validation"][0], zorder=4, gid="best",
        label=f"best {metric_label(best['monitor'])} {metric_text(best['monitor'], best['value'])}",
    )  # fmt: skip


def _mark_nonfinite(axes: Axes, epochs: Sequence[float]) -> None:
    axes.plot(
        epochs, [0.03] * len(epochs), transform=axes.get_xaxis_transform(), linestyle="none", marker="x", markersize=6,
        markeredgewidth=1.6, color=COLOURS["warn"][0], label="NaN or inf", gid="nonfinite", clip_on=False,
    )  # fmt: skip


def _draw_metric_panel(axes: Axes, names: Sequence[str], history: History) -> None:
    epochs = [event["epoch"] for event in history.validations]
    share = names[0] in PANEL_METRICS
    for name, colour in zip(names, ("validation", "lr1"), strict=False):
        _plot(
            axes, epochs, [drawable(measured(event, name)) for event in history.validations], colour, metric_label(name)
        )
    if history.validations[0]["monitor"] in names:
        _mark_best(axes, history, lambda event: event["value"])
    if share:
        axes.yaxis.set_major_formatter(lambda value, _place: f"{short(100 * value)}{PERCENT_SIGN}")
        axes.locator_params(axis="y", nbins=5)
    axes.set_ylabel("accuracy" if share else "monitored metric")
    _legend(axes)


def _plot(axes: Axes, epochs: Sequence[float], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(epochs, values, color=COLOURS[colour][0], marker=_marker(epochs), label=label, zorder=3)


def _marker(points: Sequence[float]) -> str | None:
    return "o" if len(points) <= _MAX_POINT_MARKERS else None


def scale(axes: Axes, values: Sequence[float], *, log: bool = False) -> None:
    """Choose a logarithmic axis for rates and for values of many sizes, with ticks that people say aloud."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = (min(finite), max(finite)) if finite else (0.0, 0.0)
    if low <= 0 or not (log or high / low > 5):
        return
    from matplotlib.ticker import LogLocator, NullFormatter

    decades = math.log10(high) - math.log10(low)
    margin = max(0.06 * decades, 0.3 if log and decades < 0.3 else 0.03)
    axes.set_yscale("log")
    axes.set_ylim(low / 10**margin, high * 10**margin)
    subs = (1.0, 2.0, 5.0) if decades < 1.6 else (1.0, 3.0) if decades < 3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=8))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(lambda value, _place: short(value))
    axes.tick_params(axis="y", which="minor", length=0)


def _legend(axes: Axes, *, below: bool = False) -> None:
    handles, labels = axes.get_legend_handles_labels()
    # Roughly how many letters and handles fit beside each other.
    columns = (118 if _is_wide(axes) else 48) // (max(map(len, labels), default=1) + 6)
    look: dict[str, Any] = {"ncols": max(1, columns), "borderaxespad": 0.3, "columnspacing": 1.6}
    if below:
        axes.figure.legend(handles, labels, loc="outside lower left", **look)
    else:
        axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.0), **look)


def _finish_epoch_axis(axes: Axes, history: History) -> None:
    axes.set_xlabel("epoch")
    if history.validations:
        axes.xaxis.set_major_formatter(lambda value, _place: short(value))
        axes.set_xlim(0, max(history.validations[-1]["epoch"], 1e-9) * 1.015)


def _is_wide(axes: Axes) -> bool:
    return axes.figure.bbox.width / axes.figure.dpi > 6


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as SVG for inlining: ids of its own, colours from the page, no word about other hosts."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(style()):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    opening, _, rest = text[text.index("<svg") :].partition(">")
    opening = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", opening)
    rest = re.sub(r"<style.*?</style>", "", rest, count=1, flags=re.DOTALL)
    rest = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", rest)
    for name, (light, _dark) in COLOURS.items():
        rest = rest.replace(f": {light}", f": var(--{name})")
    return f'{opening} role="img" aria-label="{escape(label)}">{rest}'
