"""A replay as a person reads it on a terminal: a table, what it cannot know, and a suggestion."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING, Any

from distplateau.record.words import listing, plural, rates_text, short

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

    from rich.console import Console
    from rich.table import Table

    from distplateau.record.replay.curves import Curve, Rates
    from distplateau.record.replay.rerun import Outcome, Replay

_MOST_LISTED = 10
_PIPED_WIDTH = 10_000
_LABELS = {"min_lr": "min LR"}


def print_replay(result: Replay, stream: TextIO | None = None) -> None:
    """Print the table: with colours and lines on a terminal, as plain columns into a file or a pipe."""
    from rich.console import Console

    out: TextIO = sys.stdout if stream is None else stream
    console = Console(file=out, highlight=False)
    if console.is_terminal:
        _print(result, console)
        return
    # A pipe has no width, and wrapped lines would be hard to search.
    plain = Console(file=out, width=_PIPED_WIDTH, highlight=False)
    with plain.capture() as captured:
        _print(result, plain)
    out.writelines(f"{line.rstrip()}\n" for line in captured.get().splitlines())


def _print(result: Replay, console: Console) -> None:
    from rich.text import Text

    for line in header(result):
        console.print(Text(line))
    console.print()
    console.print(_table(result, console))
    console.print()
    for title, text in remarks(result):
        console.print(Text.assemble((title, "bold"), f" {text}"))


def header(result: Replay) -> Iterator[str]:
    """Say what was read: the curve, and what the run itself decided."""
    curve = result.curve
    better = "smaller" if result.rule.mode == "min" else "larger"
    yield f"{curve.source}: {curve.monitor} ({better} is better), {plural(len(curve.values), 'validation')}"
    yield f"recorded: {_recorded(curve)}"
    yield f"replayed: {', '.join(_common(result))}"


def remarks(result: Replay) -> Iterator[tuple[str, str]]:
    """Say what the table cannot know, and the suggestion."""
    if any(outcome.hypothetical for outcome in result.outcomes):
        yield (
            "What this cannot know:",
            "up to its first difference a combination would have trained as the run did. After it the learning "
            "rate is another, and so would the curve have been; what stands in brackets is what the rule makes of the "
            "recorded curve all the same, a guess.",
        )
    patience = result.suggestion.patience
    title = "No suggestion:" if patience is None else f"Suggestion: patience {patience}."
    text = result.suggestion.reason
    yield title, f"{text[0].upper()}{text[1:]}." if patience is not None else f"{text}."


def label(outcome: Outcome, varying: Sequence[str]) -> str:
    """Name a combination by what varies: ``greedy, patience 3, factor 0.5``."""
    texts = {name: setting_text(outcome.settings[name]) for name in varying}
    return ", ".join(t if name == "schedule" else f"{_LABELS.get(name, name)} {t}" for name, t in texts.items())


def setting_text(value: Any) -> str:
    """Write a setting: ``0.5``, ``greedy``, ``0.5 / 0.1`` for one per group."""
    if isinstance(value, tuple):
        return " / ".join(map(setting_text, value))
    return short(value) if isinstance(value, int | float) else str(value)


def difference(outcome: Outcome, curve: Curve) -> str:
    """Say which decision of a combination is the first that the run did not make."""
    first = outcome.first_difference
    if first is None:
        stopped = f"stops at {outcome.stopped_at} (NaN)" if outcome.stopped_at else ""
        return stopped or ("the run itself" if outcome.as_recorded else "none")
    if first == 0:
        return f"from {rates_text(outcome.start_lrs)}, not {rates_text(curve.start_lrs)}"
    place = first - 1
    before = outcome.lr_after[place - 1] if place else outcome.start_lrs
    ours, theirs = outcome.lr_after[place], curve.lr_after[place] or ()
    move = _move(before, ours)
    if move == _move((curve.lr_after[place - 1] if place else curve.start_lrs) or (), theirs):
        return f"{first}: to {rates_text(ours)}, not {rates_text(theirs)}"
    return f"{first}: {move}"


def _move(before: Rates, after: Rates) -> str:
    """Say what a decision did to the learning rate."""
    lower = any(new < old for old, new in zip(before, after, strict=False))
    higher = any(new > old for old, new in zip(before, after, strict=False))
    return {(True, False): "reduced", (False, True): "raised", (True, True): "moved"}.get((lower, higher), "waited")


def _table(result: Replay, console: Console) -> Table:
    from rich import box
    from rich.table import Table

    terminal = console.is_terminal
    lines = box.SIMPLE_HEAD if terminal else None
    gap = 1 if terminal else 2
    table = Table(
        box=lines, show_edge=False, pad_edge=False, padding=(0, gap, 0, 0), header_style="bold" if terminal else ""
    )
    # Three settings that vary fit beside the rest into 80 columns.
    fold, hyphen = ("\n", "-\n") if terminal else (" ", "")
    for name in result.varying:
        table.add_column(_LABELS.get(name, name), justify="right", no_wrap=True)
    table.add_column("drops", justify="right", no_wrap=True)
    table.add_column(f"at{fold}validation", min_width=10)
    table.add_column("final LR", no_wrap=True)
    table.add_column(f"first{fold}difference", min_width=10)
    table.add_column(f"hypo{hyphen}thetical", justify="right", no_wrap=True)
    total = len(result.curve.values)
    for outcome in result.outcomes:
        table.add_row(
            *(setting_text(outcome.settings[name]) for name in result.varying),
            str(len(outcome.reductions)),
            _listed(outcome),
            _bracketed(rates_text(outcome.final_lrs), outcome.hypothetical > 0),
            difference(outcome, result.curve),
            f"{outcome.hypothetical} of {total}",
            style="bold" if outcome.as_recorded else None,
        )
    return table


def _listed(outcome: Outcome) -> str:
    """List the validations at which the learning rate changed, those that are a guess in brackets."""
    signs = {"raised": "\N{UPWARDS ARROW}"}
    texts = [_bracketed(f"{one.validation}{signs.get(one.kind, '')}", one.hypothetical) for one in outcome.changes]
    more = len(texts) - _MOST_LISTED
    return ", ".join(texts[:_MOST_LISTED]) + (f" and {more} more" if more > 0 else "") or "never"


def _bracketed(text: str, hypothetical: bool) -> str:
    return f"({text})" if hypothetical else text


def _recorded(curve: Curve) -> str:
    """Say in a line what the run decided."""
    if not curve.start_lrs:
        return "no learning rate; it is taken as constant (give --lr for the size)"
    rates = [curve.start_lrs, *(rate for rate in curve.lr_after if rate)]
    way = f"learning rate {rates_text(rates[0])}"
    way += f" to {rates_text(rates[-1])}" if rates[-1] != rates[0] else " all along"
    if curve.decisions:
        drops = [place for place, kind in enumerate(curve.decisions, start=1) if kind == "reduced"]
    else:
        drops = [
            place
            for place, (old, new) in enumerate(zip([curve.start_lrs, *curve.lr_after], curve.lr_after, strict=False), 1)
            if old and new and _move(old, new) == "reduced"
        ]
    told = f", reduced at {listing(drops)}" if drops else ""
    name = f"{curve.recorded.name} schedule, " if curve.recorded else ""
    changed = (
        " (its settings were changed when it was resumed)" if curve.recorded and curve.recorded.settings_changed else ""
    )
    return f"{name}{way}{told}{changed}"


def _common(result: Replay) -> Iterator[str]:
    """Name the settings that all combinations share and that matter."""
    first = result.outcomes[0]
    for name, value in first.settings.items():
        quiet = {"cooldown": 0, "smoothing": 0.0, "min_lr": 0.0}
        if name in result.varying or quiet.get(name, math.nan) == value:
            continue
        if name == "schedule":
            yield f"{value} schedule"
        else:
            unit = f" ({result.rule.threshold_mode})" if name == "threshold" else ""
            yield f"{_LABELS.get(name, name)} {setting_text(value)}{unit}"
    if result.rule.warmup_steps and result.curve.steps:
        yield f"warmup over {plural(result.rule.warmup_steps, 'step')}"
    if result.rule.start_after:
        yield f"from validation {result.rule.start_after + 1} on"
