"""The page a run leaves behind: one HTML file, drawn from the ledger alone, that needs nothing from outside.

Figures are inlined as SVG. Their colours are those of `_COLOURS` for paper and PNG; in the page they become CSS
variables, so that one drawing is right in light and in dark. A second, narrow drawing serves phones: a wide one scaled
down to a hand's width cannot be read.
"""

from __future__ import annotations

import io
import json
import math
import re
import textwrap
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from importlib import resources
from statistics import median
from string import Template
from typing import TYPE_CHECKING, Any

from distplateau.record.ledger import Event, History, read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FILE_NAME = "report.html"
_MAX_SCHEDULED_MARKS = 12
_PERCENT = "\N{NO-BREAK SPACE}%"
_TIMES = "\N{MULTIPLICATION SIGN}"
_MAX_POINT_MARKERS = 60
_MAX_GROUPS_NAMED = 8
_METRIC_DRIVEN = frozenset({"plateau", "greedy"})
_PANEL_METRICS = ("val/accuracy", "val/top5")

# Name: (light, dark).
_COLOURS = {
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


@dataclass(frozen=True, slots=True)
class LRChange:
    """One validation after which the learning rate was another.

    Parameters
    ----------
    kind
        ``reduced``, ``raised``, or ``scheduled`` for a schedule that follows the clock.
    before, after
        Learning rate of each parameter group.
    """

    kind: str
    event: Event
    before: list[float]
    after: list[float]

    @property
    def label(self) -> str:
        """Return by what the learning rate was multiplied, such as by 0.5, or by 0.1 / by 0.5 where groups differ."""
        pairs = zip(self.before, self.after, strict=False)
        factors = dict.fromkeys(f"{_TIMES}{_short(b / a, 2)}" if a else f"→{_short(b)}" for a, b in pairs if a != b)
        return " / ".join(factors if len(factors) <= 3 else (min(factors), "\N{HORIZONTAL ELLIPSIS}", max(factors)))


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` into a run folder and return its path. No torch, no network; one process calls it.

    The page is made of ``ledger.jsonl``, and of ``config.toml`` and ``evaluation.json`` where they exist.

    Raises
    ------
    InputError
        If the folder has no ledger or the ledger holds no event.
    """
    history = read_ledger(run_dir)
    path = history.run_dir / FILE_NAME
    partial = path.with_name(f".partial-{FILE_NAME}")
    # A run name may hold half of a surrogate pair: JSON allows it, UTF-8 does not.
    partial.write_text(render(history), encoding="utf-8", errors="xmlcharrefreplace")
    return partial.replace(path)


def render(history: History) -> str:
    """Return the page as HTML."""
    template = resources.files("distplateau.record").joinpath("report_template.html").read_text(encoding="utf-8")
    status, status_class = _status(history)
    name = escape(_run_name(history))
    return Template(template).substitute(
        title=f"{name} · distplateau",
        name=name,
        light=_css_variables(0),
        dark=_css_variables(1),
        status=escape(status),
        status_class=status_class,
        meta=escape(_meta(history)),
        lead=escape(summarize(history)),
        warnings=_warnings_html(find_warnings(history)),
        tiles="".join(_tile(*tile) for tile in _tiles(history)),
        figures=_figures_html(history),
        changes=_changes_html(history),
        agreement=_paragraphs(_agreement(history)),
        facts=_facts_html(history),
        validations=_validations_html(history),
        config=_config_html(history),
    )


def summarize(history: History) -> str:
    """Say in a sentence what happened."""
    validations = history.validations
    if not validations:
        return "The run was started and has not been validated yet: there is nothing to show so far."
    best, monitor = best_validation(history), str(validations[-1]["monitor"])
    ranks = f"on {_plural(validations[-1].get('ranks', 1), 'rank')}"
    if best is None:
        return f"No validation gave a finite {monitor}; {_lr_story(history)}, {ranks}."
    where = f"validation {best['validation']} (epoch {_short(best['epoch'])})"
    return f"Best {monitor} {_metric(monitor, best['value'])} at {where}; {_lr_story(history)}, {ranks}."


def best_validation(history: History) -> Event | None:
    """Return the validation with the best finite value of the monitored metric, the first of equals."""
    finite = [event for event in history.validations if math.isfinite(event["value"])]
    pick = max if _rule(history).get("mode") == "max" else min
    return pick(finite, key=lambda event: event["value"], default=None)


def lr_changes(history: History) -> list[LRChange]:
    """Return every change of the learning rate that a decision or the clock of a schedule made; warmup is none."""
    changes: list[LRChange] = []
    previous: Event = {}
    for event in history.validations:
        kind, before, after = event["decision"], event["lr_before"], event["lr_after"]
        if kind == "scheduled" and previous.get("decision") == "scheduled":
            before = previous["lr_after"]
        if kind in {"reduced", "raised"} or (kind == "scheduled" and before != after):
            changes.append(LRChange(kind, event, before, after))
        previous = event
    return changes


def marked_changes(history: History) -> list[LRChange]:
    """Return the changes that are marked and listed one by one: a cosine changes the learning rate at every step."""
    changes = lr_changes(history)
    few = len(changes) <= _MAX_SCHEDULED_MARKS
    return [change for change in changes if few or change.kind != "scheduled"]


def find_warnings(history: History) -> list[str]:
    """Return what a reader of the run should know before trusting its curves."""
    found = [*_plateau_warnings(history), *_value_warnings(history)]
    if not history.validations:
        found.append("The ledger holds no validation.")
    if history.torn_lines:
        lines = _listing(history.torn_lines)
        found.append(f"The ledger has torn lines (the machine died while writing); they were left out: {lines}.")
    if _evaluation(history) is None:
        found.append("evaluation.json cannot be read and was left out.")
    return found


# The figures.


def draw_run(history: History, *, narrow: bool = False) -> Figure:
    """Draw losses and learning rates over the epochs, every change of the learning rate marked in both panels.

    Element ids in the SVG: ``drop-V``, ``raise-V`` or ``scheduled-V`` for the change at validation V (with ``-lr`` in
    the lower panel), ``requeue-N``, ``best``, ``lr-group-G``.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_style()):
        figure = Figure(figsize=(4.1, 5.2) if narrow else (9.6, 5.6), layout="constrained")
        losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(1.75, 1), gridspec_kw={"hspace": 0.06})
        if history.validations:
            _draw_losses(losses, history)
            _draw_rates(rates, history)
            _mark_changes(losses, rates, history)
            _mark_requeues((losses, rates), history)
            _legend(losses)
            if 1 < len(history.validations[0]["lr_after"]) <= _MAX_GROUPS_NAMED:
                _legend(rates, below=True)
        losses.set_ylabel("loss" if _has_loss(history) else "monitored metric")
        _finish_epoch_axis(rates, history)
    return figure


def draw_metrics(history: History, *, narrow: bool = False) -> Figure | None:
    """Draw the accuracies, and the monitored metric where it is neither a loss nor one of them; None without any."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    panels = _metric_panels(history)
    if not panels:
        return None
    height = 0.4 + (1.9 if narrow else 2.3) * len(panels)
    with mpl.rc_context(_style()):
        figure = Figure(figsize=(4.1 if narrow else 9.6, height), layout="constrained")
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, names in zip(all_axes, panels, strict=True):
            _draw_metric_panel(axes, names, history)
        _finish_epoch_axis(all_axes[-1], history)
    return figure


def _style() -> Any:
    muted, line, ink = (_COLOURS[name][0] for name in ("muted", "line", "ink"))
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
    train = [_drawable(event.get("train_loss")) for event in history.validations]
    values = [_drawable(_top_value(event, history)) for event in history.validations]
    if any(map(math.isfinite, train)):
        axes.plot(epochs, train, color=_COLOURS["train"][0], marker=_marker(epochs), label="training loss")
    label = "validation loss" if _has_loss(history) else _label_of(history.validations[0]["monitor"])
    _plot(axes, epochs, values, "validation", label)
    _scale(axes, [*train, *values])
    _mark_best(axes, history, lambda event: _top_value(event, history))
    lost = [event["epoch"] for event in history.validations if not math.isfinite(event["value"])]
    if lost:
        _mark_nonfinite(axes, lost)


def _draw_rates(axes: Axes, history: History) -> None:
    everything: list[float] = []
    for group in range(len(history.validations[0]["lr_after"])):
        epochs, rates = _lr_path(history, group)
        look = group % len(_LR_COLOURS)
        colour, dashes = _COLOURS[_LR_COLOURS[look]][0], _LR_DASHES[look]
        axes.plot(epochs, rates, color=colour, linestyle=dashes, label=f"group {group}", gid=f"lr-group-{group}")
        if len(history.validations) == 1:
            axes.plot(epochs[-1:], rates[-1:], color=colour, marker="o")
        everything += rates
    _scale(axes, everything, log=True)
    axes.set_ylabel("learning rate")


def _lr_path(history: History, group: int) -> tuple[list[float], list[float]]:
    """Return epochs and learning rates of a group as a line through what each validation found and left.

    Between two validations a plateau schedule is constant and a warmup or a schedule of the clock is on its way, so
    joining the points is exact for the one and close for the others.
    """
    start, rule = history.start, _rule(history)
    warmup, steps = rule.get("warmup_steps", 0), _steps_per_epoch(history)
    peaks = start.get("lrs") or history.validations[0]["lr_before"]
    points: list[tuple[float, float]] = []
    # 1cycle begins below the peak that the ledger names; its line begins at the first validation.
    if _schedule_name(history) != "onecycle":
        points.append((0.0, peaks[group] / max(1, warmup)))
        if warmup > 1 and steps and warmup / steps <= history.validations[-1]["epoch"]:
            points.append((warmup / steps, peaks[group]))
    for event in history.validations:
        points += [(event["epoch"], event["lr_before"][group]), (event["epoch"], event["lr_after"][group])]
    points.sort(key=lambda point: point[0])
    return [epoch for epoch, _ in points], [_drawable(rate) if rate > 0 else math.nan for _, rate in points]


def _mark_changes(losses: Axes, rates: Axes, history: History) -> None:
    colours = {"reduced": "drop", "raised": "good", "scheduled": "drop"}
    ids = {"reduced": "drop", "raised": "raise", "scheduled": "scheduled"}
    span, free_from = max(history.validations[-1]["epoch"], 1e-9), -math.inf
    letter = span * (0.0085 if _is_wide(losses) else 0.021)
    for change in marked_changes(history):
        epoch, colour = change.event["epoch"], _COLOURS[colours[change.kind]][0]
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
    steps = _steps_per_epoch(history)
    requeues = [event for event in history.events if event["event"] == "resumed"]
    for place, axes in enumerate(panels):
        for number, event in enumerate(requeues if steps else (), start=1):
            label = "requeue" if number == 1 and place == 0 else None
            gid = f"requeue-{number}" + ("-lr" if place else "")
            look: dict[str, Any] = {"color": _COLOURS["muted"][0], "linewidth": 1.2, "linestyle": (0, (1, 2))}
            axes.axvline(event.get("step", 0) / steps, label=label, gid=gid, zorder=1.4, **look)


def _mark_best(axes: Axes, history: History, value_of: Any) -> None:
    best = best_validation(history)
    if best is None or not math.isfinite(value := _drawable(value_of(best))):
        return
    axes.plot(
        [best["epoch"]], [value], linestyle="none", marker="o", markersize=8, markeredgewidth=1.7,
        markerfacecolor="none", markeredgecolor=_COLOURS["validation"][0], zorder=4, gid="best",
        label=f"best {_label_of(best['monitor'])} {_metric(best['monitor'], best['value'])}",
    )  # fmt: skip


def _mark_nonfinite(axes: Axes, epochs: Sequence[float]) -> None:
    axes.plot(
        epochs, [0.03] * len(epochs), transform=axes.get_xaxis_transform(), linestyle="none", marker="x", markersize=6,
        markeredgewidth=1.6, color=_COLOURS["warn"][0], label="NaN or inf", gid="nonfinite", clip_on=False,
    )  # fmt: skip


def _metric_panels(history: History) -> list[list[str]]:
    first = history.validations[0] if history.validations else {}
    names = [name for name in _PANEL_METRICS if name in first.get("metrics", {})]
    monitor = first.get("monitor")
    extra = [] if monitor in {None, "val/loss", *names} or not _has_loss(history) else [str(monitor)]
    return [panel for panel in (names, extra) if panel]


def _draw_metric_panel(axes: Axes, names: Sequence[str], history: History) -> None:
    epochs = [event["epoch"] for event in history.validations]
    share = names[0] in _PANEL_METRICS
    for name, colour in zip(names, ("validation", "lr1"), strict=False):
        _plot(
            axes, epochs, [_drawable(_measured(event, name)) for event in history.validations], colour, _label_of(name)
        )
    if history.validations[0]["monitor"] in names:
        _mark_best(axes, history, lambda event: event["value"])
    if share:
        axes.yaxis.set_major_formatter(lambda value, _place: f"{_short(100 * value)}{_PERCENT}")
        axes.locator_params(axis="y", nbins=5)
    axes.set_ylabel("accuracy" if share else "monitored metric")
    _legend(axes)


def _plot(axes: Axes, epochs: Sequence[float], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(epochs, values, color=_COLOURS[colour][0], marker=_marker(epochs), label=label, zorder=3)


def _label_of(name: str) -> str:
    words = {"val/loss": "loss", "val/accuracy": "accuracy", "val/top5": "top-5 accuracy"}
    # A name that is too long for the figure would leave no room for the curves.
    return words.get(name) or textwrap.shorten(str(name), 32, placeholder="…") or "…"


def _marker(points: Sequence[float]) -> str | None:
    return "o" if len(points) <= _MAX_POINT_MARKERS else None


def _scale(axes: Axes, values: Sequence[float], *, log: bool = False) -> None:
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
    axes.yaxis.set_major_formatter(lambda value, _place: _short(value))
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
        axes.xaxis.set_major_formatter(lambda value, _place: _short(value))
        axes.set_xlim(0, max(history.validations[-1]["epoch"], 1e-9) * 1.015)


def _is_wide(axes: Axes) -> bool:
    return axes.figure.bbox.width / axes.figure.dpi > 6


def _svg(figure: Figure, prefix: str, label: str) -> str:
    """Return a figure as SVG for inlining: ids of its own, colours from the page, no word about other hosts."""
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_style()):
        figure.savefig(
            buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    text = buffer.getvalue()
    opening, _, rest = text[text.index("<svg") :].partition(">")
    opening = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", opening)
    rest = re.sub(r"<style.*?</style>", "", rest, count=1, flags=re.DOTALL)
    rest = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{prefix}-", rest)
    for name, (light, _dark) in _COLOURS.items():
        rest = rest.replace(f": {light}", f": var(--{name})")
    return f'{opening} role="img" aria-label="{escape(label)}">{rest}'


# The words.


def _lr_story(history: History) -> str:
    changes, name = lr_changes(history), _schedule_name(history)
    first, last = history.validations[0]["lr_before"], history.validations[-1]["lr_after"]
    way = f"from {_rates(changes[0].before if changes else first)} to {_rates(last)}"
    if name not in _METRIC_DRIVEN:
        # 1cycle begins below the peak that the ledger names.
        first = first if name == "onecycle" else history.start.get("lrs") or first
        way = f"from {_rates(first)} to {_rates(last)}"
        if first == last and not changes:
            return f"the learning rate stayed at {_rates(last)}"
        return f"the {name} schedule took the learning rate {way}"
    counts = [(kind, sum(change.kind == kind for change in changes)) for kind in ("reduced", "raised")]
    told = " and ".join(f"{kind} {_times(count)}" for kind, count in counts if count)
    return f"the learning rate was {told}, {way}" if told else f"the learning rate of {_rates(last)} was never reduced"


def _reason(change: LRChange, history: History) -> str:
    rule, event = _rule(history), change.event
    if change.kind == "scheduled":
        return f"the {_schedule_name(history)} schedule"
    if not rule:
        return "the ledger has no start event that says it"
    patience = rule["patience"]
    row = f"{_plural(patience + 1, 'validation')}{' in a row' if patience else ''}"
    if change.kind == "raised":
        began_anew = not math.isfinite(event["best"])
        return (
            "began anew after staying at the floor" if began_anew else f"{row} better than before (patience {patience})"
        )
    threshold = rule.get("threshold", 0.0)
    margin = f"{_short(100 * threshold)}{_PERCENT}" if rule.get("threshold_mode") == "rel" else _short(threshold)
    by = f" by {margin}" if threshold else ""
    best = (
        _metric(event["monitor"], event["best"]) if math.isfinite(event["best"]) else "anything (no finite value yet)"
    )
    smoothed = "smoothed, " if rule.get("smoothing") else ""
    return f"{row} without beating {best}{by} ({smoothed}patience {patience})"


def _plateau_warnings(history: History) -> Iterable[str]:
    validations, rule = history.validations, _rule(history)
    if not validations or not rule or _schedule_name(history) not in _METRIC_DRIVEN:
        return
    patience = rule["patience"]
    last, floors = validations[-1]["lr_after"], rule.get("min_lr", 0.0)
    floors = floors if isinstance(floors, list) else [floors] * len(last)
    at_floor = any(floors) and all(lr - floor <= rule.get("eps", 0.0) for lr, floor in zip(last, floors, strict=False))
    if at_floor:
        since = next(e["validation"] for e in validations if e["lr_after"] == last)
        yield (
            f"The learning rate is at its floor (min_lr {_rates(last)}) since validation {since}: "
            "a plateau after that could not lower it."
        )
    decided = history.finished is not None or len(validations) > patience
    if decided and not at_floor and not any(change.kind == "reduced" for change in lr_changes(history)):
        longest = max(event["num_bad"] for event in validations)
        yield (
            f"The learning rate was never reduced: patience {patience} was never reached. A reduction takes "
            f"{_plural(patience + 1, 'validation')} in a row without an improvement; the longest such row was "
            f"{longest}, in {_plural(len(validations), 'validation')}."
        )


def _value_warnings(history: History) -> Iterable[str]:
    lost = [event["validation"] for event in history.validations if not math.isfinite(event["value"])]
    if lost:
        treated = {"ignore": "passed over", "bad": "counted as bad"}.get(
            _rule(history).get("nonfinite", ""), "recorded"
        )
        yield f"{history.validations[0]['monitor']} was NaN or infinite and was {treated}: {_which(lost)}."
    diverged = [e["validation"] for e in history.validations if not math.isfinite(e.get("train_loss", 0.0))]
    if diverged:
        yield f"The training loss was NaN or infinite: {_which(diverged)}."
    counts = sorted({event["count"] for event in history.validations if "count" in event})
    if len(counts) > 1:
        yield f"Validations were not over the same number of samples: {_listing(counts)}. Their values do not compare."


def _agreement(history: History) -> list[str]:
    validations = history.validations
    if not validations:
        return ["Nothing was decided yet."]
    ranks = list(dict.fromkeys(event.get("ranks", 1) for event in validations))
    number, samples = _plural(len(validations), "validation"), f"{validations[-1].get('count', 0):,} samples"
    digest = str(validations[-1].get("digest", "none"))
    if ranks == [1]:
        story = f"{number} on one rank, over {samples}: there was nobody to disagree. Last digest: {digest}"
    else:
        who = f"{' then '.join(map(str, ranks))} ranks"
        story = (
            f"{'All ' if len(validations) > 1 else ''}{number} agreed on {who}, over {samples}: every rank had the "
            "same metric, learning rates and scheduler state, or the run would have stopped there. "
            f"Last digest: {digest}"
        )
    requeues = [e for e in history.events if e["event"] == "resumed"]
    told = [
        f"after validation {e.get('last_validation', 0)} on {_plural(e.get('world_size', 1), 'rank')}" for e in requeues
    ]
    again = [f"Continued {_times(len(told))} from a checkpoint: {', '.join(told)}."] if told else []
    return [story, *again]


def _status(history: History) -> tuple[str, str]:
    if history.finished:
        return "Finished", "finished"
    last = history.events[-1]
    if last["event"] == "interrupted":
        reason = f": {last['reason']}" if last.get("reason") else ""
        return f"Interrupted at step {last.get('step', '?')}{reason}", "interrupted"
    return "Running or interrupted", "open"


def _meta(history: History) -> str:
    start = history.start
    schedule = f"{_schedule_name(history)} schedule on {start['monitor']}" if "monitor" in start else ""
    last = history.events[-1]
    ended = "" if history.finished else f"last event {_when(last)}"
    return " · ".join(filter(None, [_when(start), str(start.get("device", "")), schedule, ended]))


def _tiles(history: History) -> Iterable[tuple[str, str, str]]:
    validations, best = history.validations, best_validation(history)
    if validations:
        last, monitor = validations[-1], str(validations[-1]["monitor"])
        if best:
            where = f"validation {best['validation']}, epoch {_short(best['epoch'])}"
            yield f"best {monitor}", _metric(monitor, best["value"]), where
            if monitor != "val/accuracy" and "val/accuracy" in best.get("metrics", {}):
                yield (
                    "val/accuracy there",
                    _metric("val/accuracy", best["metrics"]["val/accuracy"]),
                    "with the best weights",
                )
        for split, result in (_evaluation(history) or {}).items():
            facts = f"loss {_short(result['loss'], 4)}, {result['count']:,} samples"
            yield f"{split} accuracy", _metric("val/accuracy", result["accuracy"]), facts
        yield "learning rate", _rates(last["lr_after"]), f"from {_rates(history.start.get('lrs') or last['lr_before'])}"
        yield from _change_tiles(history)
        speeds = [speed for event in validations if math.isfinite(speed := event.get("samples_per_second", math.nan))]
        if speeds:
            yield "training speed", f"{median(speeds):,.0f}/s", "samples on all ranks, median"
        yield (
            "duration",
            _duration(sum(e.get("seconds", 0.0) for e in validations)),
            _plural(len(validations), "validation"),
        )
    ranks = dict.fromkeys(e.get("ranks", 1) for e in validations) or [history.start.get("world_size", 1)]
    yield "ranks", " → ".join(map(str, ranks)), str(history.start.get("device", ""))


def _change_tiles(history: History) -> Iterable[tuple[str, str, str]]:
    kinds, rule = [change.kind for change in lr_changes(history)], _rule(history)
    if _schedule_name(history) in _METRIC_DRIVEN:
        factor = rule.get("factor", [])
        by = " / ".join(f"{_TIMES}{_short(f)}" for f in (factor if isinstance(factor, list) else [factor]))
        yield "reductions", str(kinds.count("reduced")), f"{by}, patience {rule['patience']}" if rule else ""
        if "raised" in kinds:
            yield "raises", str(kinds.count("raised")), "after better validations in a row"


# The markup. Whatever comes from the run goes through `escape`.


def _tile(label: str, value: str, note: str) -> str:
    long = ' class="long"' if len(value) > 11 else ""
    return f'<div class="tile"><dt>{escape(label)}</dt><dd{long}>{escape(value)}</dd><dd>{escape(note)}</dd></div>\n'


def _warnings_html(warnings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in warnings)
    return f'<aside class="warnings"><strong>Worth knowing</strong><ul>{items}</ul></aside>' if items else ""


def _figures_html(history: History) -> str:
    if not history.validations:
        return ""
    caption = "Dashed lines mark the changes of the learning rate, with what it was multiplied by. "
    caption = caption if marked_changes(history) else ""
    caption += "Dotted lines are requeues. " if any(e["event"] == "resumed" for e in history.events) else ""
    figures: list[tuple[str, str, str, Callable[..., Any]]] = [("Losses and learning rate", "run", caption, draw_run)]
    if _metric_panels(history):
        figures.append(
            ("Accuracy" if "val/accuracy" in _metric_panels(history)[0] else "Metrics", "metrics", "", draw_metrics)
        )
    return "\n".join(_figure_html(history, *figure) for figure in figures)


def _figure_html(history: History, title: str, prefix: str, caption: str, draw: Callable[..., Any]) -> str:
    wide = _svg(draw(history), prefix, f"{title} over the epochs")
    slim = _svg(draw(history, narrow=True), f"{prefix}-narrow", f"{title} over the epochs")
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<h2>{title}</h2>\n<figure><div class="wide">{wide}</div><div class="narrow">{slim}</div>{note}</figure>'


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text: Sequence[int] = ()) -> str:
    """Lay out escaped cells; `text` are the columns that are read as words, not compared as numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=text' * (i in text)}>{value}</{tag}>" for i, value in enumerate(values))

    body = "\n".join(f"<tr{look}>{cells('td', values)}</tr>" for look, values in rows)
    table = f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def _changes_html(history: History) -> str:
    changes, every = marked_changes(history), lr_changes(history)
    if not changes:
        name = _schedule_name(history)
        many = f"The {name} schedule changed it at {len(every)} of {_plural(len(history.validations), 'validation')}."
        return _paragraphs([many if every else "There was none."])
    monitor = str(changes[0].event["monitor"])
    head = ["validation", "learning rate", "", "epoch", "step", escape(monitor), "best", "why"]
    rows = [("", _change_cells(change, history)) for change in changes]
    return _table(head, rows, text=(7,))


def _change_cells(change: LRChange, history: History) -> list[str]:
    event, monitor = change.event, change.event["monitor"]
    pairs = [(change.before, change.after)]
    if len(change.after) <= _MAX_GROUPS_NAMED:
        pairs = [([before], [after]) for before, after in zip(change.before, change.after, strict=True)]
    way = "<br>".join(f"{_rates(before)} → <strong>{_rates(after)}</strong>" for before, after in pairs)
    place = [_short(event["epoch"]), f"{event['step']:,}"]
    measured = [_metric(monitor, event["value"]), _metric(monitor, event["best"])]
    decided = _kind(change.kind, change.label)
    return [str(event["validation"]), way, decided, *place, *measured, escape(_reason(change, history))]


def _validations_html(history: History) -> str:
    validations, best = history.validations, best_validation(history)
    if not validations:
        return ""
    names = list(dict.fromkeys(name for event in validations for name in event.get("metrics", {})))
    head = ["#", "epoch", "step", "train loss", *map(escape, names), "decision", "learning rate", "bad in a row"]
    head += ["samples", "ranks", "samples/s", "seconds", "digest"]
    rows = [(' class="best"' if event is best else "", _validation_cells(event, names)) for event in validations]
    table = _table(head, rows, text=(4 + len(names), len(head) - 1))
    return f"<details><summary>All {_plural(len(validations), 'validation')}</summary>{table}</details>"


def _validation_cells(event: Event, names: Sequence[str]) -> list[str]:
    place = [str(event["validation"]), _short(event["epoch"], 5), f"{event['step']:,}"]
    measured = [
        _short(event.get("train_loss", math.nan), 4),
        *(_metric(name, _measured(event, name)) for name in names),
    ]
    decided = [_kind(event["decision"]), _rates(event["lr_after"]), str(event["num_bad"])]
    counted = [
        f"{event.get('count', 0):,}",
        str(event.get("ranks", 1)),
        _short(event.get("samples_per_second", 0.0), 6),
    ]
    ended = [_short(event.get("seconds", 0.0)), f"<code>{escape(str(event.get('digest', ''))[:12])}</code>"]
    return [*place, *measured, *decided, *counted, *ended]


def _kind(kind: str, text: str | None = None) -> str:
    return f'<span class="kind {escape(str(kind))}">{escape(str(kind if text is None else text))}</span>'


def _facts_html(history: History) -> str:
    start = history.start
    samples, versions = start.get("samples") or {}, start.get("versions") or {}
    classes = ", ".join(map(str, start.get("classes") or []))
    facts = {
        "Host": start.get("hostname"),
        "Slurm job": start.get("slurm_job_id"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Samples": ", ".join(f"{count:,} {split}" for split, count in samples.items()),
        "Images": f" {_TIMES} ".join(map(str, start.get("image_shape") or [])),
        "Classes": f"{start.get('num_classes', '?')}: {classes}" if classes else None,
    }
    rows = (f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>" for key, value in facts.items() if value)
    return f'<dl class="facts">{"".join(rows)}</dl>'


def _config_html(history: History) -> str:
    path = history.run_dir / "config.toml"
    if not path.is_file():
        return ""
    text = path.read_text(encoding="utf-8", errors="replace")
    return f'<details class="config"><summary>Configuration</summary><pre>{escape(text)}</pre></details>'


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{escape(text)}</p>" for text in texts)


def _css_variables(which: int) -> str:
    return " ".join(f"--{name}: {pair[which]};" for name, pair in _COLOURS.items())


# Reading the ledger, writing numbers.


def _evaluation(history: History) -> dict[str, Any] | None:
    """Return the results by split; empty without the file, None for a file that is none."""
    path = history.run_dir / "evaluation.json"
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        return {split: {k: r[k] + 0 for k in ("loss", "accuracy", "count")} for split, r in results.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _run_name(history: History) -> str:
    return str(history.start.get("run") or history.run_dir.resolve().name)


def _schedule_name(history: History) -> str:
    return str((history.start.get("schedule") or {}).get("name", "plateau"))


def _rule(history: History) -> dict[str, Any]:
    return (history.start.get("schedule") or {}).get("rule") or {}


def _steps_per_epoch(history: History) -> float:
    known = (history.start.get("schedule") or {}).get("steps_per_epoch")
    first = next((event for event in history.validations if event["epoch"]), None)
    return known or (first["step"] / first["epoch"] if first else 0.0)


def _has_loss(history: History) -> bool:
    return any("val/loss" in (*e.get("metrics", {}), e["monitor"]) for e in history.validations)


def _top_value(event: Event, history: History) -> float:
    """Return what the upper panel shows of a validation: its loss, or the monitored metric where there is none."""
    return _measured(event, "val/loss") if _has_loss(history) else _finite(event["value"])


def _measured(event: Event, name: str) -> float:
    value = event["value"] if name == event["monitor"] else None
    return _finite(event.get("metrics", {}).get(name, value))


def _finite(value: float | None) -> float:
    return value if value is not None and math.isfinite(value) else math.nan


def _drawable(value: float | None) -> float:
    """Keep clear of where Python's floats end: a run that diverged must not take the report with it."""
    value = _finite(value)
    return math.copysign(min(max(abs(value), 1e-100), 1e100), value) if value else value


def _short(value: float, digits: int = 3) -> str:
    """Write a number as a person would: ``0.005``, ``1e-5``, ``1,200``."""
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return re.sub(r"e([+-])0*", lambda sign: "e" + sign[1].replace("+", ""), f"{value:.{digits}g}")


def _metric(name: str, value: float) -> str:
    share = name in _PANEL_METRICS and math.isfinite(value)
    return f"{100 * value:.2f}{_PERCENT}" if share else _short(value, 4)


def _rates(rates: Sequence[float]) -> str:
    if len(set(map(_short, rates))) == 1:
        return _short(rates[0])
    if len(rates) > _MAX_GROUPS_NAMED:
        return f"{_short(min(rates))} to {_short(max(rates))} ({len(rates)} groups)"
    return " / ".join(map(_short, rates))


def _plural(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _listing(numbers: Sequence[int]) -> str:
    """Join numbers, the first twelve of many."""
    shown = ", ".join(f"{number:,}" for number in numbers[:12])
    return shown if len(numbers) <= 12 else f"{shown} and {len(numbers) - 12} more"


def _which(validations: Sequence[int]) -> str:
    return f"validation{'s' if len(validations) > 1 else ''} {_listing(validations)}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds) or seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02} min"


def _when(event: Event) -> str:
    try:
        return f"{datetime.fromtimestamp(event['time'], UTC):%Y-%m-%d %H:%M} UTC"
    except (KeyError, TypeError, ValueError, OverflowError, OSError):
        return ""
