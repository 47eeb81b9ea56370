"""Measure the best weights of a run on a split that never took part in training."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from distplateau.config import load_config
from distplateau.errors import InputError
from distplateau.lockstep.metric import GlobalMean
from distplateau.record.ledger import to_json
from distplateau.training.data.datasets import load
from distplateau.training.mistakes import told_once
from distplateau.training.parts.models import load_model
from distplateau.training.parts.objective import build_objective
from distplateau.training.processes import accelerated
from distplateau.training.validation import measure, metric_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from accelerate import Accelerator
    from torch import Tensor

    from distplateau.config import Config

FILE_NAME = "evaluation.json"


def evaluate(run_dir: Path, split: str = "test", data_root: str | None = None) -> dict[str, Any]:
    """Measure ``model.safetensors`` on a split, exactly, and write the result beside the run. Every rank calls it.

    Parameters
    ----------
    split
        ``test`` or ``validation``.
    data_root
        In place of the run's ``data.root``.

    Returns
    -------
    dict
        ``loss``, ``accuracy``, ``top5`` (with more than five classes) and ``count``.

    Raises
    ------
    InputError
        If the folder holds no trained run or the data is missing; before there is a process group.
    """
    config = _run_config(run_dir)
    if data_root is not None:
        config = config.model_copy(update={"data": config.data.model_copy(update={"root": data_root})})
    model = load_model(run_dir)
    data = load(config.data, config.run.seed)
    objective = build_objective(config.training, data.num_classes)
    metrics = {name: GlobalMean() for name in metric_names(objective, model, data)}
    with accelerated(config.training.precision) as accelerator, told_once():
        # Not prepared by Accelerate: there is nothing to train, so the weights need no DDP around them.
        model = model.to(accelerator.device)
        # As in training: the network alone in low precision, loss and metrics of its outputs in full.
        model.forward = _autocast(accelerator, model.forward)
        data, batch_size = data.to(accelerator.device), config.data.eval_batch_size
        measure(accelerator, model, data, split, batch_size, objective, metrics)
        result: dict[str, Any] = {name.removeprefix("val/"): metric.compute() for name, metric in metrics.items()}
        result["count"] = int(metrics["val/loss"].count)
        if accelerator.is_main_process:
            _write(run_dir / FILE_NAME, split, result)
    return result


def _autocast(accelerator: Accelerator, forward: Callable[..., Any]) -> Callable[..., Any]:
    def in_precision(images: Tensor) -> Any:
        with accelerator.autocast():
            return forward(images)

    return in_precision


def _run_config(run_dir: Path) -> Config:
    if not (run_dir / "config.toml").is_file():
        raise InputError(str(run_dir), "is no run folder (it has no config.toml)", "give <run.dir>/<run.name>")
    return load_config(run_dir / "config.toml")


def _write(path: Path, split: str, result: dict[str, Any]) -> None:
    try:
        known = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    partial = path.with_name(f".partial-{path.name}")
    try:
        partial.write_text(json.dumps({**known, split: to_json(result)}, indent=1, allow_nan=False), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        fix = "free space or fix the permissions and evaluate again"
        raise InputError(str(path), f"cannot be written ({error.strerror or error})", fix) from error
