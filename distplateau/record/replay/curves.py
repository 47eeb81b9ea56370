"""The validation curve of a run, from whatever recorded it: our ledger, a CSV, Lightning, Hugging Face, wandb.

Foreign tables are sparse: a row has the learning rate, another one the validation. What was logged last counts.
"""

from __future__ import annotations

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distplateau.errors import InputError, closest
from distplateau.record.ledger import FILE_NAME, read_ledger
from distplateau.record.story import run_name

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Rates = tuple[float, ...]
LRs = tuple[Rates | None, ...]
Row = dict[str, float]

_WANDB_SECONDS = 120
_API_SECONDS = 20
_ACCEPTED = "give a run folder, a .csv, a Lightning metrics.csv, an HF trainer_state.json, or a wandb run"
_VALIDATION_WORDS = ("val", "valid", "validation", "eval", "evaluation", "dev", "test")
_BIGGER_IS_BETTER = frozenset(
    "acc accuracy auc auroc f1 precision recall map ap iou miou dice bleu rouge psnr ssim r2 top1 top3 top5 score "
    "reward match".split()
)
_PLACES = frozenset("epoch step steps iteration iter time runtime timestamp".split())


@dataclass(frozen=True)
class Recorded:
    """The schedule that a run of ours had.

    Parameters
    ----------
    rule, args
        Its settings as the ledger has them; the last ones, if they changed when the run was resumed.
    """

    name: str
    monitor: str
    rule: Mapping[str, Any]
    args: Mapping[str, Any]
    settings_changed: bool


@dataclass(frozen=True)
class Curve:
    """The monitored metric over a run, and what the learning rate was.

    Parameters
    ----------
    source
        What a person calls it.
    positions
        Epoch (or step, or number; `axis` says which) of each validation.
    start_lrs
        Learning rate of each parameter group at the start, without warmup; empty where the record does not say.
    lr_after
        Applied learning rates after each validation; None where the record does not say.
    steps
        Optimizer steps before each validation; empty where the record does not say.
    decisions
        What was decided at each validation; empty where the record does not say.
    recorded
        None for a record that is not ours.
    picture
        Where a picture of it goes, without the suffix: beside what was read.
    """

    source: str
    monitor: str
    values: tuple[float, ...]
    positions: tuple[float, ...]
    axis: str
    start_lrs: Rates
    lr_after: LRs
    picture: Path
    steps: tuple[int, ...] = ()
    decisions: tuple[str, ...] = ()
    recorded: Recorded | None = None

    @property
    def mode(self) -> str:
        """Return ``max`` where the name of the metric says so, else ``min``."""
        return _mode(self.monitor)


def read_curve(source: str, monitor: str | None = None) -> Curve:
    """Read a curve from a run folder, a file or ``wandb:entity/project/run_id``.

    Parameters
    ----------
    monitor
        Name of the metric or the column; default is the one the run monitored, or the one that looks like a
        validation loss.

    Raises
    ------
    InputError
        If there is nothing to read, or it is not clear which column is meant.
    """
    if source.startswith("wandb:"):
        return _from_rows(source, _wandb_rows(source), monitor, Path(f"{source.rpartition('/')[2]}-replay"))
    path = Path(source)
    try:
        found = _recognise(path)
        if found.name == FILE_NAME:
            return _from_ledger(found.parent, monitor)
        read = {".json": _trainer_state_rows, ".wandb": _offline_rows}.get(found.suffix, _csv_rows)
        picture = found.with_name("replay" if path.is_dir() else f"{found.stem}-replay")
        return _from_rows(source, read(found), monitor, picture)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(source, f"cannot be read ({_one_line(error)})", _ACCEPTED) from None


def _recognise(path: Path) -> Path:
    """Find the file that holds the curve."""
    if path.is_dir():
        for name in (FILE_NAME, "metrics.csv", "trainer_state.json"):
            if (path / name).is_file():
                return path / name
        logs = sorted(path.glob("*.wandb"))
        if logs:
            return logs[0]
        states = sorted(path.glob("checkpoint-*/trainer_state.json"), key=lambda state: state.stat().st_mtime)
        if states:
            return states[-1]
        raise InputError(str(path), f"holds no {FILE_NAME} and no record of another tool", _ACCEPTED)
    if not path.exists():
        raise InputError(str(path), "there is no such file or folder", _ACCEPTED)
    if path.suffix not in {".csv", ".tsv", ".txt", ".json", ".wandb"} and path.name != FILE_NAME:
        raise InputError(str(path), "is of a kind that is not known", _ACCEPTED)
    return path


def _from_ledger(run_dir: Path, monitor: str | None) -> Curve:
    history = read_ledger(run_dir)
    validations, start = history.validations, history.start
    if not validations:
        raise InputError(str(run_dir), "holds no validation yet", "let the run come to its first one")
    own = str(validations[0]["monitor"])
    monitor = monitor or own
    names = [*validations[0].get("metrics", {own: None})]
    if monitor not in names:
        raise InputError("--monitor", f"{run_dir} has no such metric", closest(monitor, names), value=monitor)
    settings = [event["schedule"] for event in history.events if "schedule" in event]
    recorded = None
    if settings:
        last = settings[-1]
        recorded = Recorded(
            name=last["name"],
            monitor=own,
            rule=last["rule"],
            args=last.get("args", {}),
            settings_changed=any((one["name"], one["rule"]) != (last["name"], last["rule"]) for one in settings),
        )
    return Curve(
        source=run_name(history),
        monitor=monitor,
        values=tuple(float(e["value"] if monitor == own else e["metrics"][monitor]) for e in validations),
        positions=tuple(float(e["epoch"]) for e in validations),
        axis="epoch",
        start_lrs=tuple(start.get("lrs") or validations[0]["lr_before"]),
        lr_after=tuple(tuple(e["lr_after"]) for e in validations),
        picture=run_dir / "replay",
        steps=tuple(e.get("schedule_step", e["step"]) for e in validations),
        decisions=tuple(str(e["decision"]) for e in validations),
        recorded=recorded,
    )


# Tables of other tools.


def _from_rows(source: str, rows: Sequence[Row], monitor: str | None, picture: Path) -> Curve:
    """Make a curve of sparse rows."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    column = _monitored(source, columns, monitor)
    rate_columns = sorted((name for name in columns if _is_rate(name)), key=_natural)
    validations, positions, rates, together = _walk(rows, column, rate_columns)
    if not validations:
        raise InputError(source, f"column {column!r} holds no number", "choose another one with --monitor")
    axis, places = _axis(columns, positions)
    lr_after = _after(validations, rates, _mode(column), together=together)
    known = next((rate for rate in rates if rate), ())
    return Curve(
        source=source,
        monitor=column,
        values=tuple(validations),
        positions=places,
        axis=axis,
        start_lrs=known,
        lr_after=lr_after,
        picture=picture,
    )


def _walk(
    rows: Sequence[Row], column: str, rate_columns: Sequence[str]
) -> tuple[list[float], list[Row], list[Rates | None], bool]:
    """Return values, rows and the learning rate last seen at each validation, and whether it stood in the same row."""
    values: list[float] = []
    found: list[Row] = []
    rates: list[Rates | None] = []
    held: dict[str, float] = {}
    together = bool(rate_columns)
    for row in rows:
        held |= {name: row[name] for name in rate_columns if name in row}
        if column not in row:
            continue
        if found and _is_repeated(found[-1], row, column):
            continue
        values.append(row[column])
        found.append(row)
        rates.append(tuple(held[name] for name in rate_columns) if len(held) == len(rate_columns) and held else None)
        together &= all(name in row for name in rate_columns)
    return values, found, rates, together


def _is_repeated(before: Row, row: Row, column: str) -> bool:
    """Tell whether a validation was logged twice, as a last evaluation after the training is."""
    steps = [name for name in row if _words(name)[-1:] in (["step"], ["steps"])]
    return bool(steps) and all(before.get(name) == row[name] for name in [*steps, column])


def _after(values: Sequence[float], rates: Sequence[Rates | None], mode: str, *, together: bool) -> LRs:
    """Shift the logged learning rates to those after each validation.

    What a row before the validation says was used up to it. In one and the same row it may be the rate before or after
    the decision; a drop that shows at a validation which is the best so far cannot have been decided there.
    """
    pairs = enumerate(itertools.pairwise(rates), start=1)
    drops = [place for place, (old, new) in pairs if old and new and any(map(float.__lt__, new, old))]
    sign = 1 if mode == "min" else -1
    at_best = any(sign * values[place] < min(sign * value for value in values[:place]) for place in drops)
    return tuple(rates) if together and drops and not at_best else (*rates[1:], None)


def _monitored(source: str, columns: Sequence[str], monitor: str | None) -> str:
    """Return the column that is meant, or the only one that looks like a validation loss."""
    measured = [name for name in columns if not _is_rate(name) and not _is_place(name) and not name.startswith("_")]
    if monitor is not None:
        if monitor in columns:
            return monitor
        raise InputError("--monitor", f"{source} has no such column", closest(monitor, measured), value=monitor)
    losses = [name for name in measured if "loss" in _words(name)]
    of_validation = [name for name in measured if set(_VALIDATION_WORDS) & set(_words(name))]
    groups = (
        [
            name
            for name in losses
            if name in of_validation and "step" not in _words(name) and "test" not in _words(name)
        ],
        [name for name in losses if name in of_validation],
        of_validation,
        measured,
    )
    for group in groups:
        if len(group) == 1:
            return group[0]
        if group:
            break
    if not measured:
        raise InputError(source, "holds no column of numbers that could be a curve", _ACCEPTED)
    raise InputError(source, "which column is the curve?", f"give --monitor NAME, one of: {', '.join(measured)}")


def _axis(columns: Sequence[str], found: Sequence[Row]) -> tuple[str, tuple[float, ...]]:
    """Return epochs, or steps, or numbers: the first that every validation has and that grows."""
    for word, names in (("epoch", ("epoch",)), ("step", ("step", "steps", "iteration", "iter"))):
        for column in (name for name in columns if _words(name)[-1:] and _words(name)[-1] in names):
            places = [row.get(column, math.nan) for row in found]
            if all(a < b for a, b in itertools.pairwise(places)) and all(map(math.isfinite, places)):
                return word, tuple(places)
    return "validation", tuple(float(place) for place in range(1, len(found) + 1))


def _mode(name: str) -> str:
    return "max" if _BIGGER_IS_BETTER & {*_words(name), name.lower()} else "min"


def _words(name: str) -> list[str]:
    return re.findall(r"[a-z]+\d*|\d+", name.lower())


def _is_rate(name: str) -> bool:
    words = _words(name)
    rate = "lr" in words or ("learning", "rate") in itertools.pairwise(words)
    return rate and not {"drop", "momentum", "weight", "decay"} & set(words)


def _is_place(name: str) -> bool:
    words = _words(name)
    measures = "loss" in words or _mode(name) == "max"  # such as val_loss_epoch
    return not measures and bool(words) and words[-1] in _PLACES


def _natural(name: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part]


def _csv_rows(path: Path) -> list[Row]:
    text = path.read_text(encoding="utf-8-sig")
    header = text.split("\n", 1)[0]
    if not header.strip():
        raise InputError(str(path), "is empty or has no header line", "give a CSV whose first line names its columns")
    delimiter = max(",;\t", key=header.count)
    try:
        table = list(csv.DictReader(text.splitlines(), delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise InputError(str(path), f"is no CSV ({error})", _ACCEPTED) from None
    if all(_number(name) is not None for name in header.split(delimiter)):
        raise InputError(str(path), "has no header line", "give a CSV whose first line names its columns")
    return [_numbers({(name or "").strip(): cell for name, cell in row.items()}) for row in table]


def _trainer_state_rows(path: Path) -> list[Row]:
    try:
        log = json.loads(path.read_text(encoding="utf-8"))["log_history"]
        return [_numbers(entry) for entry in log]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InputError(str(path), "is no trainer_state.json of the HF Trainer", _ACCEPTED) from None


def _offline_rows(path: Path) -> list[Row]:
    """Read an offline wandb run with wandb's own tool: the format of its file changes from version to version."""
    command = [sys.executable, "-P", "-m", "wandb", "leet", "inspect", "--json", str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_WANDB_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise InputError(str(path), f"wandb took more than {_WANDB_SECONDS} s to read it", _OTHER_WAY) from None
    rows = []
    for line in done.stdout.splitlines():
        try:
            item = json.loads(line).get("history", {}).get("item")
        except (ValueError, AttributeError):
            continue
        if item:
            rows.append(_numbers(item))
    if not rows:
        said = _one_line(done.stderr) or "it holds no history"
        raise InputError(str(path), f"wandb cannot read a history from it ({said[-160:]})", _OTHER_WAY)
    return rows


def _wandb_rows(source: str) -> list[Row]:
    """Read a run through wandb's public API."""
    name = source.removeprefix("wandb:")
    if name.count("/") != 2 or not all(name.split("/")):
        raise InputError(source, "names no run", "write wandb:ENTITY/PROJECT/RUN_ID")
    try:
        import wandb

        rows = [_numbers(row) for row in wandb.Api(timeout=_API_SECONDS).run(name).scan_history()]
    except Exception as error:  # wandb raises whatever its service, its settings or the network raise
        raise InputError(source, f"cannot be read ({_one_line(error)[:200]})", _REACH) from None
    if not rows:
        raise InputError(source, "holds no history", "choose another run")
    return rows


_OTHER_WAY = "export the run to a CSV, or sync it and give wandb:ENTITY/PROJECT/RUN_ID"
_REACH = "check the name, the network and WANDB_API_KEY; or give the offline run folder or a CSV"


def _numbers(row: Mapping[Any, Any]) -> Row:
    """Keep what is a number; text such as ``NaN`` counts as one."""
    found = {str(name): _number(value) for name, value in row.items() if name}
    return {name: value for name, value in found.items() if value is not None}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _one_line(text: object) -> str:
    return " ".join(str(text).split())
