"""The page a run leaves behind: one HTML file, drawn from the ledger alone, that needs nothing from outside.

Whatever comes from the run goes through `escape`.
"""

from __future__ import annotations

import math
from html import escape
from importlib import resources
from statistics import median
from string import Template
from typing import TYPE_CHECKING, Any

from distplateau.record.ledger import Event, History, read_ledger
from distplateau.record.report.figures import COLOURS, draw_metrics, draw_run, inline_svg, save_figures
from distplateau.record.report.levels import Level, after_best, device_unit, levels
from distplateau.record.story import (
    METRIC_DRIVEN,
    LRChange,
    agreement,
    best_validation,
    evaluations,
    find_warnings,
    lr_changes,
    marked_changes,
    measured,
    meta,
    metric_panels,
    reason,
    rule_of,
    run_name,
    schedule_name,
    status,
    summarize,
)
from distplateau.record.words import (
    MAX_GROUPS_NAMED,
    TIMES_SIGN,
    duration,
    metric_label,
    metric_text,
    plural,
    rates_text,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path


FILE_NAME = "report.html"
FIGURES = "figures"
_IN_TILE = 6  # metrics of an evaluation


def write_report(run_dir: str | Path) -> Path:
    """Write ``report.html`` and ``figures/`` into a run folder and return the page's path.

    No torch, no network; one process calls it.

    The page is made of ``ledger.jsonl``, and of ``config.toml`` and ``evaluation.json`` where they exist.

    Raises
    ------
    InputError
        If the folder has no ledger or the ledger holds no event.
    """
    history = read_ledger(run_dir)
    path = history.run_dir / FILE_NAME
    save_figures(history, history.run_dir / FIGURES)
    partial = path.with_name(f".partial-{FILE_NAME}")
    # A run name may hold half of a surrogate pair: JSON allows it, UTF-8 does not.
    partial.write_text(render(history), encoding="utf-8", errors="xmlcharrefreplace")
    return partial.replace(path)


def render(history: History) -> str:
    """Return the page as HTML."""
    template = resources.files("distplateau.record.report").joinpath("report_template.html").read_text(encoding="utf-8")
    style = resources.files("distplateau.record.report").joinpath("page.css").read_text(encoding="utf-8")
    standing, status_class = status(history)
    name = escape(run_name(history))
    return Template(template).substitute(
        title=f"{name} · distplateau",
        name=name,
        style=Template(style).substitute(light=_css_variables(0), dark=_css_variables(1)),
        status=escape(standing),
        status_class=status_class,
        meta=escape(meta(history)),
        lead=escape(summarize(history)),
        warnings=_warnings_html(find_warnings(history)),
        tiles="".join(_tile(*tile) for tile in tiles(history)),
        figures=_figures_html(history),
        changes=_changes_html(history),
        levels=_levels_html(history),
        agreement=_paragraphs(agreement(history)),
        facts=_facts_html(history),
        validations=_validations_html(history),
        config=_config_html(history),
    )


def tiles(history: History) -> Iterable[tuple[str, str, str]]:
    """Say what somebody looks for first: label, value and note of each figure."""
    validations, best = history.validations, best_validation(history)
    if validations:
        last, monitor = validations[-1], str(validations[-1]["monitor"])
        if best:
            where = f"validation {best['validation']}, epoch {short(best['epoch'])}"
            yield f"best {monitor}", metric_text(monitor, best["value"]), where
            if monitor != "val/accuracy" and "val/accuracy" in best.get("metrics", {}):
                yield (
                    "val/accuracy there",
                    metric_text("val/accuracy", best["metrics"]["val/accuracy"]),
                    "with the best weights",
                )
        for split, result in (evaluations(history) or {}).items():
            yield _evaluation_tile(split, result)
        yield (
            "learning rate",
            rates_text(last["lr_after"]),
            f"from {rates_text(history.start.get('lrs') or last['lr_before'])}",
        )
        yield from _change_tiles(history)
        speeds = [speed for event in validations if math.isfinite(speed := event.get("samples_per_second", math.nan))]
        if speeds:
            yield "training speed", f"{median(speeds):,.0f}/s", "samples on all ranks, median"
        yield (
            "duration",
            duration(sum(e.get("seconds", 0.0) for e in validations)),
            plural(len(validations), "validation"),
        )
    ranks = dict.fromkeys(e.get("ranks", 1) for e in validations) or [history.start.get("world_size", 1)]
    yield "ranks", " → ".join(map(str, ranks)), str(history.start.get("device", ""))


def _evaluation_tile(split: str, result: dict[str, Any]) -> tuple[str, str, str]:
    """Show what a split was measured to be: the accuracy, or the loss where there is none, then the others."""
    head = "accuracy" if "accuracy" in result else "loss"
    others = [name for name in result if name not in {head, "count"}]
    facts = [f"{metric_label(f'val/{name}')} {metric_text(f'val/{name}', result[name])}" for name in others[:_IN_TILE]]
    if len(others) > _IN_TILE:
        facts.append(f"{len(others) - _IN_TILE} more in evaluation.json")
    return (
        f"{split} {head}",
        metric_text(f"val/{head}", result[head]),
        ", ".join([*facts, f"{result['count']:,} samples"]),
    )


def _change_tiles(history: History) -> Iterable[tuple[str, str, str]]:
    kinds, rule = [change.kind for change in lr_changes(history)], rule_of(history)
    if schedule_name(history) in METRIC_DRIVEN:
        factor = rule.get("factor", [])
        by = " / ".join(f"{TIMES_SIGN}{short(f)}" for f in (factor if isinstance(factor, list) else [factor]))
        yield "reductions", str(kinds.count("reduced")), f"{by}, patience {rule['patience']}" if rule else ""
        if "raised" in kinds:
            yield "raises", str(kinds.count("raised")), "after better validations in a row"


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
    if metric_panels(history):
        figures.append(
            ("Accuracy" if "val/accuracy" in metric_panels(history)[0] else "Metrics", "metrics", "", draw_metrics)
        )
    return "\n".join(_figure_html(history, *figure) for figure in figures)


def _figure_html(history: History, title: str, prefix: str, caption: str, draw: Callable[..., Any]) -> str:
    wide = inline_svg(draw(history), prefix, f"{title} over the epochs")
    slim = inline_svg(draw(history, narrow=True), f"{prefix}-narrow", f"{title} over the epochs")
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<h2>{title}</h2>\n<figure><div class="wide">{wide}</div><div class="narrow">{slim}</div>{note}</figure>'


def _table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]], text: Sequence[int] = ()) -> str:
    """Lay out escaped cells; `text` are the columns that are read as words, not compared as numbers."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "".join(f"<{tag}{' class=text' * (i in text)}>{value}</{tag}>" for i, value in enumerate(values))

    body = "\n".join(f"<tr{look}>{cells('td', values)}</tr>" for look, values in rows)
    table = f"<table><thead><tr>{cells('th', head)}</tr></thead><tbody>\n{body}\n</tbody></table>"
    return f'<div class="scroll" tabindex="0">{table}</div>'


def no_changes(history: History) -> str:
    """Say that no change of the learning rate is listed, and why."""
    every, name = lr_changes(history), schedule_name(history)
    many = f"The {name} schedule changed it at {len(every)} of {plural(len(history.validations), 'validation')}."
    return many if every else "There was none."


def changes_head(changes: Sequence[LRChange]) -> list[str]:
    """Return the heads of the columns of the table of changes."""
    return ["validation", "learning rate", "", "epoch", "step", str(changes[0].event["monitor"]), "best", "why"]


def _changes_html(history: History) -> str:
    changes = marked_changes(history)
    if not changes:
        return _paragraphs([no_changes(history)])
    rows = [("", _change_cells(change, history)) for change in changes]
    return _table(list(map(escape, changes_head(changes))), rows, text=(7,))


def _change_cells(change: LRChange, history: History) -> list[str]:
    way = "<br>".join(f"{before} → <strong>{after}</strong>" for before, after in ways(change))
    number, *others, why = change_texts(change, history)
    return [number, way, _kind(change.kind, change.label), *others, escape(why)]


def ways(change: LRChange) -> list[tuple[str, str]]:
    """Return the learning rate before and after, group by group where they are few."""
    pairs = [(change.before, change.after)]
    if len(change.after) <= MAX_GROUPS_NAMED:
        pairs = [([before], [after]) for before, after in zip(change.before, change.after, strict=True)]
    return [(rates_text(before), rates_text(after)) for before, after in pairs]


def change_texts(change: LRChange, history: History) -> list[str]:
    """Return what the table says of a change beside the learning rates themselves."""
    event, monitor = change.event, change.event["monitor"]
    place = [str(event["validation"]), short(event["epoch"]), f"{event['step']:,}"]
    compared = [metric_text(monitor, event["value"]), metric_text(monitor, event["best"])]
    return [*place, *compared, reason(change, history)]


def _levels_html(history: History) -> str:
    found = levels(history)
    if not found:
        return _paragraphs([f"The {schedule_name(history)} schedule changed it all the time."])
    monitor, whole = str(history.validations[-1]["monitor"]), sum(level.seconds for level in found)
    head = ["learning rate", "validations", "time", "", device_unit(history), f"best {escape(monitor)}"]
    rows = [("", _level_cells(level, whole, monitor)) for level in found]
    hours = sum(level.device_seconds for level in found) / 3600
    total = f"{duration(whole)} in all, {short(hours)} {device_unit(history)}. {after_best(history)}"
    return _table(head, rows, text=(3,)) + f'<p class="total">{escape(total.strip())}</p>'


def _level_cells(level: Level, whole: float, monitor: str) -> list[str]:
    rate = f"warmup to {rates_text(level.lrs)}" if level.warmup else rates_text(level.lrs)
    place = str(level.first) if level.first == level.last else f"{level.first} to {level.last}"
    share = 100 * level.seconds / whole if whole else 0.0
    best = _kind("improved" if level.is_better else "bad", metric_text(monitor, level.best))
    bar = f'<span class="bar" style="width: {share:.1f}%"></span>'
    return [escape(rate), place, duration(level.seconds), bar, short(level.device_seconds / 3600), best]


def _validations_html(history: History) -> str:
    validations, best = history.validations, best_validation(history)
    if not validations:
        return ""
    names = list(dict.fromkeys(name for event in validations for name in event.get("metrics", {})))
    head = ["#", "epoch", "step", "train loss", *map(escape, names), "decision", "learning rate", "bad in a row"]
    head += ["samples", "ranks", "samples/s", "seconds", "digest"]
    rows = [(' class="best"' if event is best else "", _validation_cells(event, names)) for event in validations]
    table = _table(head, rows, text=(4 + len(names), len(head) - 1))
    return f"<details><summary>All {plural(len(validations), 'validation')}</summary>{table}</details>"


def _validation_cells(event: Event, names: Sequence[str]) -> list[str]:
    place = [str(event["validation"]), short(event["epoch"], 5), f"{event['step']:,}"]
    metrics = [
        short(event.get("train_loss", math.nan), 4),
        *(metric_text(name, measured(event, name)) for name in names),
    ]
    decided = [_kind(event["decision"]), rates_text(event["lr_after"]), str(event["num_bad"])]
    counted = [
        f"{event.get('count', 0):,}",
        str(event.get("ranks", 1)),
        short(event.get("samples_per_second", 0.0), 6),
    ]
    ended = [short(event.get("seconds", 0.0)), f"<code>{escape(str(event.get('digest', ''))[:12])}</code>"]
    return [*place, *metrics, *decided, *counted, *ended]


def _kind(kind: str, text: str | None = None) -> str:
    return f'<span class="kind {escape(str(kind))}">{escape(str(kind if text is None else text))}</span>'


def facts(history: History) -> dict[str, str]:
    """Return where and on what a run was made."""
    start = history.start
    samples, versions = start.get("samples") or {}, start.get("versions") or {}
    classes = ", ".join(map(str, start.get("classes") or []))
    found = {
        "Host": start.get("hostname"),
        "Slurm job": start.get("slurm_job_id"),
        "Versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "Samples": ", ".join(f"{count:,} {split}" for split, count in samples.items()),
        "Images": f" {TIMES_SIGN} ".join(map(str, start.get("image_shape") or [])),
        "Classes": f"{start.get('num_classes', '?')}: {classes}" if classes else None,
    }
    return {key: str(value) for key, value in found.items() if value}


def _facts_html(history: History) -> str:
    rows = (f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts(history).items())
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
    return " ".join(f"--{name}: {pair[which]};" for name, pair in COLOURS.items())
