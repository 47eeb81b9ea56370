"""Several runs on one page: a table sorted by the best value, curves on the same axes, a sweep as parallel lines."""

from __future__ import annotations

import math
import os
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from distplateau.errors import InputError
from distplateau.record.ledger import FILE_NAME as LEDGER
from distplateau.record.report.compared import Compared, load
from distplateau.record.report.comparison_figures import draw_curves, draw_parallel
from distplateau.record.report.figures import COLOURS, inline_svg, save_figure
from distplateau.record.story import best_validation, rule_of, status
from distplateau.record.words import duration, metric_text, plural, rates_text, short

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

FILE_NAME = "comparison.html"
_MOST_COLUMNS = 6


def expand(folders: Iterable[Path]) -> list[Path]:
    """Return run folders; one without a ledger stands for the runs in it, as a sweep does.

    Raises
    ------
    InputError
        If a folder is neither.
    """
    found: list[Path] = []
    for folder in folders:
        if (folder / LEDGER).exists():
            found.append(folder)
            continue
        below = sorted(path.parent for path in folder.glob(f"*/{LEDGER}"))
        if not below:
            raise InputError(str(folder), f"has no {LEDGER}, and no run below it has", "give run folders, or a sweep's")
        found += below
    return list(dict.fromkeys(found))


def write_comparison(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Write ``comparison.html`` with ``comparison.svg`` and ``.png`` and return the page's path.

    No torch, no network; one process calls it.

    Parameters
    ----------
    out
        Folder; by default the one that all runs lie in.

    Raises
    ------
    InputError
        If a run has no ledger, or the runs were decided by different metrics.
    """
    runs = ranked([load(run_dir) for run_dir in run_dirs])
    folder = out or common_folder(run_dirs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for ending in ("svg", "png"):
            save_figure(draw_curves(runs), folder / f"comparison.{ending}")
        path = folder / FILE_NAME
        partial = path.with_name(f".partial-{FILE_NAME}")
        partial.write_text(render(runs, folder), encoding="utf-8", errors="xmlcharrefreplace")
        return partial.replace(path)
    except OSError as error:
        raise InputError(str(folder), f"cannot be written ({error.strerror})", "choose another with --out") from None


def common_folder(run_dirs: Sequence[Path]) -> Path:
    """Return the folder that all runs lie in."""
    return Path(os.path.commonpath([str(Path(run_dir).absolute().parent) for run_dir in run_dirs]))


def ranked(runs: Sequence[Compared]) -> list[Compared]:
    """Sort by the best value; runs without one come last.

    Raises
    ------
    InputError
        If the runs were decided by different metrics, which do not compare.
    """
    monitors = sorted({run.monitor for run in runs if run.monitor})
    if len(monitors) > 1:
        fix = "compare runs with the same schedule.monitor"
        raise InputError("report", f"the runs were decided by different metrics ({', '.join(monitors)})", fix)
    modes = {rule_of(run.history).get("mode") for run in runs}
    sign = -1 if modes == {"max"} else 1
    return sorted(runs, key=lambda run: (math.isnan(run.best), sign * run.best if not math.isnan(run.best) else 0.0))


def render(runs: Sequence[Compared], folder: Path) -> str:
    """Return the page as HTML; links to the runs' own reports are relative to `folder`."""
    pages = resources.files("distplateau.record.report")
    style = pages.joinpath("page.css").read_text(encoding="utf-8")
    colours = [" ".join(f"--{name}: {pair[which]};" for name, pair in COLOURS.items()) for which in (0, 1)]
    template = pages.joinpath("comparison_template.html").read_text(encoding="utf-8")
    keys = differing(runs)
    return Template(template).substitute(
        style=Template(style).substitute(light=colours[0], dark=colours[1]),
        title=escape(f"{plural(len(runs), 'run')} compared"),
        lead=escape(summarize(runs)),
        table=_table(runs, keys, folder),
        figures=_figures(runs, keys),
    )


def summarize(runs: Sequence[Compared]) -> str:
    """Say in a sentence which run is the best, and by how much."""
    measured = [run for run in runs if not math.isnan(run.best)]
    if not measured:
        return "None of the runs has a finite value of its monitored metric yet."
    first = measured[0]
    text = f"Best {first.monitor} {metric_text(first.monitor, first.best)}: {first.name}"
    if len(measured) > 1:
        last = measured[-1]
        text += f"; the last of {len(measured)}, {last.name}, came to {metric_text(last.monitor, last.best)}"
    return f"{text}."


def differing(runs: Sequence[Compared]) -> list[str]:
    """Return the dotted keys in which the configurations differ, names and folders left out."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    different = [key for key in keys if len({repr(run.settings.get(key)) for run in runs}) > 1]
    return [key for key in different if not key.startswith(("run.name", "run.dir", "tracking."))][:_MOST_COLUMNS]


def numbers_only(runs: Sequence[Compared], keys: Sequence[str]) -> list[str]:
    """Return the settings that are a number in every run."""
    return [key for key in keys if all(isinstance(run.settings.get(key), int | float) for run in runs)]


def _figures(runs: Sequence[Compared], keys: Sequence[str]) -> str:
    figures = [("Curves", "curves", draw_curves(runs), draw_curves(runs, narrow=True))]
    numeric = numbers_only(runs, keys)
    if numeric and len(runs) > 2:
        wide = draw_parallel(runs, numeric)
        figures.append(("Settings and what came of them", "parallel", wide, draw_parallel(runs, numeric, narrow=True)))
    return "\n".join(
        f'<h2>{title}</h2>\n<figure><div class="wide">{inline_svg(wide, prefix, title)}</div>'
        f'<div class="narrow">{inline_svg(slim, f"{prefix}-narrow", title)}</div></figure>'
        for title, prefix, wide, slim in figures
    )


def _table(runs: Sequence[Compared], keys: Sequence[str], folder: Path) -> str:
    head = table_head(runs, keys)
    rows = "\n".join(_row(number, run, keys, folder) for number, run in enumerate(runs, start=1))
    cells = "".join(f"<th{' class=text' if name == 'run' else ''}>{escape(name)}</th>" for name in head)
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>\n{rows}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def table_head(runs: Sequence[Compared], keys: Sequence[str]) -> list[str]:
    """Return the heads of the table's columns."""
    monitor = next((run.monitor for run in runs if run.monitor), "best")
    return ["", "run", *keys, monitor, "at epoch", "epochs", "final LR", "reductions", "duration", "status"]


def table_cells(run: Compared, keys: Sequence[str]) -> list[str]:
    """Return what the table says of a run, after its number and its name."""
    history, best = run.history, best_validation(run.history)
    last = history.validations[-1] if history.validations else None
    return [
        *(_setting(run.settings.get(key)) for key in keys),
        metric_text(run.monitor, run.best) if best else "-",
        short(best["epoch"]) if best else "-",
        short(last["epoch"]) if last else "-",
        rates_text(last["lr_after"]) if last else "-",
        str(run.reductions),
        duration(sum(event.get("seconds", 0.0) for event in history.validations)),
        status(history)[0],
    ]


def _row(number: int, run: Compared, keys: Sequence[str], folder: Path) -> str:
    link = os.path.relpath(run.history.run_dir.absolute() / "report.html", folder)
    name = f'<a href="{escape(quote(Path(link).as_posix(), safe="/=,"))}">{escape(run.name)}</a>'
    cells = [str(number), name, *map(escape, table_cells(run, keys))]
    body = "".join(f"<td{' class=text' if place == 1 else ''}>{cell}</td>" for place, cell in enumerate(cells))
    return f"<tr{' class=best' if number == 1 else ''}>{body}</tr>"


def _setting(value: Any) -> str:
    if isinstance(value, float):
        return short(value)
    return "-" if value is None else str(value)
