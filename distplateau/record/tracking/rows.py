"""What a tracker is told of a run, from its ledger alone: rows, configuration, summary, alerts.

The mirror of a run in training and a later upload say the same, because both ask here.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from distplateau.record.story import best_validation, lr_changes, rule_of
from distplateau.record.words import metric_text, rates_text, which

if TYPE_CHECKING:
    from pathlib import Path

    from distplateau.record.ledger import Event, History

_COUNTERS = ("best", "num_bad", "cooldown", "decision", "step", "samples_per_second", "ranks", "count")
_CIRCUMSTANCES = ("world_size", "device", "hostname", "slurm_job_id", "slurm_nodes", "restart_count", "time")
_MAX_TITLE = 64


@dataclass(frozen=True, slots=True)
class Alert:
    """A message that a tracker sends on, once. The title is unique in the run."""

    title: str
    text: str
    level: Literal["INFO", "WARN", "ERROR"]


def row(event: Event) -> dict[str, Any]:
    """Translate a validation of the ledger to a tracker's row: every metric, learning rate and counter by name."""
    lrs = {f"lr/group{place}": lr for place, lr in enumerate(event["lr_after"])}
    counters = {f"scheduler/{key}": event[key] for key in _COUNTERS if key in event}
    dropped = {"scheduler/lr_drop": int(event["decision"] == "reduced")}
    train = {"train/loss": event["train_loss"]} if "train_loss" in event else {}
    train |= {f"train/nonfinite_{key}": value for key, value in (event.get("nonfinite_loss") or {}).items()}
    place = {"validation": event["validation"], "epoch": event["epoch"]}
    return {**place, **event.get("metrics", {}), **train, **lrs, **counters, **dropped}


def rows(history: History) -> dict[int, dict[str, Any]]:
    """Return the row of each validation by its number, with the segment it was made in and the reductions so far."""
    found: dict[int, dict[str, Any]] = {}
    patience = rule_of(history).get("patience")
    segment = reductions = 0
    for event in history.events:
        segment += event["event"] == "resumed"
        if event["event"] != "validation":
            continue
        reductions += event["decision"] == "reduced"
        further = {"run/segment": segment, "scheduler/reductions": reductions}
        if patience is not None:
            further["scheduler/patience"] = patience
        # The time of the validation, not of the upload.
        when = {"_timestamp": event["time"]} if "time" in event else {}
        found[event["validation"]] = {**row(event), **further, **when}
    return found


def segments(history: History) -> list[dict[str, Any]]:
    """Return where each segment of the run ran and after which validation it began: one per start and requeue."""
    began = [event for event in history.events if event["event"] in {"start", "resumed"}]
    return [
        {
            "after_validation": event.get("last_validation", 0),
            **{key: event[key] for key in _CIRCUMSTANCES if event.get(key) is not None},
        }
        for event in began
    ]


def configuration(config: dict[str, Any], history: History) -> dict[str, Any]:
    """Return the run's configuration and where it ran."""
    facts = {key: history.start[key] for key in ("versions", "parameters", "samples") if key in history.start}
    return {**config, **facts, "segments": segments(history)}


def summary(history: History) -> dict[str, Any]:
    """Return what a table of runs shows: the best, the last learning rate, how often it was reduced and requeued."""
    validations = history.validations
    if not validations:
        return {}
    best, last = best_validation(history), validations[-1]
    told: dict[str, Any] = {
        "reductions": sum(event["decision"] == "reduced" for event in validations),
        "requeues": sum(event["event"] == "resumed" for event in history.events),
        "final_lr": last["lr_after"][0],
        "validations": len(validations),
        "status": "finished" if history.finished else "unfinished",
    }
    if best is not None:
        told |= {"best": best["value"], "best_validation": best["validation"], "best_step": best["step"]}
        told |= {"best_epoch": best["epoch"]}
    if history.finished and "seconds" in history.finished:
        told["seconds"] = history.finished["seconds"]
    return told


def alerts(history: History, covered: int) -> list[Alert]:
    """Return what somebody may want to be told, up to the validation `covered`: drops, the first NaN, the end."""
    found: list[tuple[int, Alert]] = []
    for change in lr_changes(history):
        number, monitor = change.event["validation"], change.event["monitor"]
        if change.kind != "scheduled":
            text = f"From {rates_text(change.before)} to {rates_text(change.after)}; best {monitor} so far "
            text += metric_text(monitor, change.event["best"])
            found.append((number, Alert(_title(f"Learning rate {change.kind}", number), text, "INFO")))
    lost = [event["validation"] for event in history.validations if not _finite(event)]
    if lost:
        text = f"A loss or the monitored metric was NaN or infinite: {which(lost)}"
        found.append((lost[0], Alert(_title("NaN or infinite", lost[0]), text, "ERROR")))
    told = [alert for number, alert in sorted(found, key=lambda pair: pair[0]) if number <= covered]
    if history.finished and history.validations and covered >= history.validations[-1]["validation"]:
        best = best_validation(history)
        value = f"best {best['monitor']} {metric_text(best['monitor'], best['value'])}" if best else "no finite value"
        told.append(Alert("Finished", f"After {len(history.validations)} validations: {value}", "INFO"))
    return told


def up_to(history: History, covered: int) -> History:
    """Return the history without the validations after `covered`, as if they had not been made yet."""
    kept = [e for e in history.events if e["event"] != "validation" or e["validation"] <= covered]
    complete = len(kept) == len(history.events)
    return replace(history, events=kept if complete else [e for e in kept if e["event"] != "finished"])


def durable_validation(history: History) -> int:
    """Return the last validation that no requeue can undo: it is covered by a checkpoint, or the run has ended."""
    last = history.validations[-1]["validation"] if history.validations else 0
    if history.finished or (history.events and history.events[-1]["event"] == "interrupted"):
        return last
    kept = [event["last_validation"] for event in history.events if event["event"] == "resumed"]
    return min(last, max([_checkpointed(history.run_dir), *kept[-1:]]))


def _checkpointed(run_dir: Path) -> int:
    """Read how many validations the newest checkpoint holds; its folder got its name when it was whole."""
    for folder in sorted((run_dir / "checkpoints").glob("step-*"), reverse=True):
        try:
            return int(json.loads((folder / "state.json").read_text(encoding="utf-8"))["validations"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return 0


def _title(what: str, validation: int) -> str:
    return f"{what} at validation {validation}"[:_MAX_TITLE]


def _finite(event: Event) -> bool:
    return math.isfinite(event["value"]) and math.isfinite(event.get("train_loss", 0.0))
