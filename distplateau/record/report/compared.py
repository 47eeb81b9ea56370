"""One of several runs that are compared: its record, its settings, and what it came to."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from distplateau.record.ledger import History, read_ledger
from distplateau.record.story import best_validation, lr_changes, run_name

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True)
class Compared:
    """One of the runs that are compared.

    Parameters
    ----------
    name
        What tells it from the others.
    settings
        The configuration as dotted keys, empty where there is none.
    """

    name: str
    history: History
    settings: dict[str, Any]

    @cached_property
    def monitor(self) -> str:
        """Return the metric that decided."""
        validations = self.history.validations
        return str(validations[-1]["monitor"]) if validations else ""

    @cached_property
    def best(self) -> float:
        """Return the best finite value of the monitored metric, NaN without one."""
        event = best_validation(self.history)
        return event["value"] if event else math.nan

    @property
    def reductions(self) -> int:
        """Return how often the learning rate was reduced."""
        return sum(change.kind == "reduced" for change in lr_changes(self.history))


def load(run_dir: Path) -> Compared:
    """Read a run folder.

    Raises
    ------
    InputError
        If it has no ledger.
    """
    history = read_ledger(run_dir)
    return Compared(run_dir.name or run_name(history), history, _settings(run_dir))


def _settings(run_dir: Path) -> dict[str, Any]:
    try:
        tree = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    tables = {name: table for name, table in tree.items() if isinstance(table, dict)}
    return {f"{name}.{key}": value for name, table in tables.items() for key, value in table.items()}
