"""The report as blocks of a hosted W&B Report, and the process that saves it with the real client.

Only that process loads it: it takes the extra `report`. What the local page says in its words is said here too; curves
are drawn by the server, from the rows it holds.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wandb_workspaces.reports.v2 import interface as wr

from distplateau.record.report.compared import Compared, load
from distplateau.record.report.comparison import (
    differing,
    numbers_only,
    ranked,
    table_cells,
    table_head,
)
from distplateau.record.report.comparison import summarize as summarize_all
from distplateau.record.report.page import change_texts, changes_head, facts, no_changes, tiles, ways
from distplateau.record.story import (
    agreement,
    find_warnings,
    has_loss,
    marked_changes,
    meta,
    metric_panels,
    rule_of,
    status,
    summarize,
)
from distplateau.record.words import MAX_GROUPS_NAMED, metric_label, plain

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from distplateau.record.ledger import History

# Not the parentheses: Markdown with formulas may take an escaped one for the beginning of one.
_MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|$~&@:!])")
_WIDTH = 24


def main() -> None:
    """Read a request, a JSON object, from standard input; leave the answer in the file that it names."""
    request = json.load(sys.stdin)
    answer = Path(request.pop("answer"))
    try:
        said = {"id": save(**request)}
    except Exception as error:  # whatever the client raises is one line for the user
        said = {"problem": f"{type(error).__name__}: {' '.join(str(error).split())}"}
    answer.with_suffix(".partial").write_text(json.dumps(said), encoding="utf-8")
    answer.with_suffix(".partial").replace(answer)
    # The client's service may be slow to say goodbye; it ends with this process.
    sys.stderr.flush()
    os._exit(0)


def save(run_dirs: Sequence[str], run_ids: Sequence[str], entity: str, project: str, **view: str) -> str:
    """Create a report on the server, or replace the one with the id `view["view_id"]`; return its id."""
    runs = [load(Path(run_dir)) for run_dir in run_dirs]
    runset = wr.Runset(entity=entity, project=project, name="Runs", filters=run_filter(run_ids))
    report = wr.Report(
        entity=entity,
        project=project,
        title=view["title"],
        description=view["description"],
        blocks=page(runs, runset),
        width="fluid",
    )
    report.id = view["view_id"]
    report.save()
    return str(report.id)


def run_filter(run_ids: Sequence[str]) -> str:
    """Return the filter that lets exactly these runs through."""
    return f'Metric("ID") in {json.dumps(list(run_ids))}'


def page(runs: Sequence[Compared], runset: Any) -> list[Any]:
    """Return the blocks of one run's report, or of the comparison of several."""
    return _page_of_one(runs[0].history, runset) if len(runs) == 1 else _page_of_several(ranked(runs), runset)


def _page_of_one(history: History, runset: Any) -> list[Any]:
    return [
        wr.P(plain(summarize(history))),
        wr.P(plain(" · ".join(filter(None, [status(history)[0], meta(history)])))),
        *_warnings(find_warnings(history)),
        wr.MarkdownBlock(table(["", "", ""], tiles(history))),
        wr.H2("Losses and learning rate"),
        wr.PanelGrid(runsets=[runset], panels=_panels([history])),
        wr.H2("Learning rate changes"),
        _changes(history),
        wr.H2("Agreement"),
        *(wr.P(plain(text)) for text in agreement(history)),
        *_facts(history),
    ]


def _page_of_several(runs: Sequence[Compared], runset: Any) -> list[Any]:
    keys = differing(runs)
    cells = [[str(number), run.name, *table_cells(run, keys)] for number, run in enumerate(runs, start=1)]
    panels = _panels([run.history for run in runs])
    blocks = [
        wr.P(plain(summarize_all(runs))),
        wr.MarkdownBlock(table(table_head(runs, keys), cells)),
        wr.H2("Curves"),
        wr.PanelGrid(runsets=[runset], panels=[*panels, *_parallel(runs, keys, below=panels[-1])]),
        wr.H2("Learning rate changes"),
    ]
    for run in runs:
        warned = find_warnings(run.history)
        blocks += [wr.H3(plain(run.name)), wr.P(plain(summarize(run.history))), *_warnings(warned)]
        blocks += [_changes(run.history), *(wr.P(plain(text)) for text in agreement(run.history))]
    return blocks


def _panels(histories: Sequence[History]) -> list[Any]:
    """Return curves, single values and the comparer, laid out in the grid."""
    several = len(histories) > 1
    shown: dict[str, Any] = {"x": "epoch", "title_x": "epoch", "max_runs_to_show": len(histories) if several else None}
    panels: list[Any] = [
        wr.LinePlot(title="Losses", y=_loss_names(histories), **shown),
        wr.LinePlot(title="Learning rate", log_y=True, **_rate_names(histories), **shown),
    ]
    names = dict.fromkeys(tuple(panel) for history in histories for panel in metric_panels(history))
    panels += [wr.LinePlot(title=" and ".join(map(metric_label, panel)), y=list(panel), **shown) for panel in names]
    for place, panel in enumerate(panels):
        panel.layout = wr.Layout(x=place % 2 * 12, y=place // 2 * 8, w=12, h=8)
    below = (len(panels) + 1) // 2 * 8
    for place, (title, metric, over_runs) in enumerate(_scalars(histories)):
        # Over several runs the panel shows one number.
        one = {"groupby_aggfunc": over_runs, "title": f"{title} ({over_runs} of the runs)"}
        said: dict[str, Any] = one if several else {"title": title}
        panels.append(wr.ScalarChart(metric=metric, layout=wr.Layout(x=8 * place, y=below, w=8, h=4), **said))
    panels.append(wr.RunComparer(diff_only="split" if several else None, layout=_row(below + 4)))
    return panels


def _parallel(runs: Sequence[Compared], keys: Sequence[str], below: Any) -> list[Any]:
    """Return a sweep as parallel lines: its settings, and what came of them."""
    numeric = numbers_only(runs, keys)
    if not numeric or len(runs) <= 2:
        return []
    monitor = next((run.monitor for run in runs if run.monitor), "best")
    columns = [wr.ParallelCoordinatesPlotColumn(metric=wr.Config(key), display_name=key) for key in numeric]
    columns.append(wr.ParallelCoordinatesPlotColumn(metric=wr.SummaryMetric("best"), display_name=f"best {monitor}"))
    layout = _row(below.layout.y + below.layout.h)
    return [wr.ParallelCoordinatesPlot(title="Settings and what came of them", columns=columns, layout=layout)]


def _row(y: int) -> Any:
    return wr.Layout(x=0, y=y, w=_WIDTH, h=8)


def _scalars(histories: Sequence[History]) -> list[tuple[str, str, str]]:
    """Return title, key in the run's summary, and what stands for several runs."""
    monitor = next((str(h.validations[-1]["monitor"]) for h in histories if h.validations), "value")
    better = "max" if any(rule_of(history).get("mode") == "max" for history in histories) else "min"
    return [
        (f"best {monitor}", "best", better),
        ("learning rate", "final_lr", "min"),
        ("reductions", "reductions", "max"),
    ]


def _loss_names(histories: Sequence[History]) -> list[Any]:
    """Return the names under which the server knows the losses, or the monitored metric where there is none."""
    names: dict[str, None] = {}
    for history in histories:
        for event in history.validations[:1]:
            names["val/loss" if has_loss(history) else str(event["monitor"])] = None
            if "train_loss" in event:
                names["train/loss"] = None
    return list(names) or ["val/loss", "train/loss"]


def _rate_names(histories: Sequence[History]) -> dict[str, Any]:
    groups = max((len(event["lr_after"]) for history in histories for event in history.validations[:1]), default=1)
    if groups > MAX_GROUPS_NAMED:
        return {"metric_regex": "lr/group.*"}
    return {"y": [f"lr/group{group}" for group in range(groups)]}


def _warnings(texts: Sequence[str]) -> list[Any]:
    return [wr.CalloutBlock(plain(f"Worth knowing: {text}")) for text in texts]


def _changes(history: History) -> Any:
    changes = marked_changes(history)
    if not changes:
        return wr.P(plain(no_changes(history)))
    rows = []
    for change in changes:
        number, *others = change_texts(change, history)
        way = ", ".join(f"{before} → {after}" for before, after in ways(change))
        rows.append([number, way, f"{change.kind} {change.label}", *others])
    return wr.MarkdownBlock(table(changes_head(changes), rows))


def _facts(history: History) -> list[Any]:
    found = facts(history)
    return [wr.H2("Record"), wr.MarkdownBlock(table(["", ""], found.items()))] if found else []


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a Markdown table; nothing in a cell is read as Markdown."""
    lines = [list(map(escaped, head)), ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return text that Markdown shows as it is, on one line."""
    return _MARKDOWN.sub(r"\\\1", plain(text).strip(" "))
