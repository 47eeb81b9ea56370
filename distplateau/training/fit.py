"""Training for somebody who brings objects: a model, a loss, data and no names in a TOML file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from distplateau.config import Config, load_config, parse_config
from distplateau.errors import InputError
from distplateau.record.private import keep_others_out
from distplateau.record.report.page import write_report
from distplateau.training.data.loader import (
    MapStyle,
    PairSpec,
    StreamedSplit,
    WrongItemError,
    kind_of,
    raised,
    repeatable,
)
from distplateau.training.data.samples import DataSet, Split
from distplateau.training.parts.losses import build_loss, per_sample
from distplateau.training.parts.models import GIVEN_TO_FIT
from distplateau.training.parts.objective import Objective, build_objective
from distplateau.training.setup import assemble_parts, check_ranks
from distplateau.training.trainer import train_parts
from distplateau.training.validation import try_forward

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Samples = Dataset[Any] | tuple[Tensor, Tensor]


def fit(
    model: nn.Module,
    loss: str | Callable[[Tensor, Tensor], Tensor],
    train_data: Samples,
    val_data: Samples,
    config: Config | Mapping[str, Any] | str | Path | None = None,
) -> Path:
    """Train a model with everything that ``distplateau train`` does. Every rank calls it, with the same arguments.

    Parameters
    ----------
    model
        Its weights are trained in place, and in the end those of the last step; the best are in ``model.safetensors``
        of the run folder. Build it with the same seed on every rank.
    loss
        A name of `training.parts.losses`, or a function from (outputs, targets) to one value per sample, [n].
    train_data, val_data
        ``(inputs, targets)`` tensors, [n, ...] each, which stay in memory, or a map-style dataset of such pairs, which
        ``data.workers`` processes read while it is used, with its random transforms seeded by (seed, step, rank).
        Inputs go to the model as they are. With integer targets [n] and more than one output for each sample there
        is an accuracy beside the loss.
    config
        A run's configuration, a tree of plain values, or the path of a TOML file; ``[data]`` gives the batch sizes,
        ``[model]`` is not used.

    Returns
    -------
    Path
        The run folder. Called again it goes on from the newest checkpoint.

    Raises
    ------
    InputError
        For anything wrong in the arguments.

    Examples
    --------
    >>> fit(model, "cross_entropy", (images, labels), (val_images, val_labels), {"training": {"epochs": 5}})
    """
    settings = _settings(config)
    check_ranks(settings)
    if not isinstance(model, nn.Module):
        raise InputError("model", f"is {kind_of(model)}", "give a torch.nn.Module")
    workers = settings.data.workers
    train, validation = _samples("train_data", train_data, workers), _samples("val_data", val_data, workers)
    data = _data_set(train, validation, model)
    _check_targets("train_data", train, loss, data.num_classes)
    _check_targets("val_data", validation, loss, data.num_classes)
    further = build_objective(settings.training, 0).further
    section = settings.training
    function = build_loss(loss, section.loss_args) if isinstance(loss, str) else per_sample(loss, _name(loss))
    objective = Objective(function, data.num_classes, further)
    # Another loss makes it another run, which config.toml has to tell.
    named = section.model_copy(update={"loss": loss if isinstance(loss, str) else _name(loss)})
    settings = settings.model_copy(update={"training": named})
    with keep_others_out(), _forward_put_back(model):
        run_dir = train_parts(settings, assemble_parts(settings, data, model, objective))
        if os.environ.get("RANK", "0") == "0":
            write_report(run_dir)
    return run_dir


@contextlib.contextmanager
def _forward_put_back(model: nn.Module) -> Iterator[None]:
    """Take off what Accelerate puts around a model's forward for mixed precision: the model is the caller's."""
    own = model.__dict__.get("forward")
    try:
        yield
    finally:
        model.__dict__.pop("_original_forward", None)
        model.__dict__.pop("forward", None)
        if own is not None:
            model.__dict__["forward"] = own


def _settings(config: Config | Mapping[str, Any] | str | Path | None) -> Config:
    if config is None:
        config = {}
    if isinstance(config, str | Path):
        config = load_config(config)
    elif isinstance(config, Mapping):
        config = parse_config(dict(config))
    elif not isinstance(config, Config):
        raise InputError("config", f"is {kind_of(config)}", "give a table of plain values, or the path of a TOML file")
    by_hand = {"name": GIVEN_TO_FIT, "args": {}}
    sections = {"model": config.model.model_copy(update=by_hand), "data": config.data.model_copy(update=by_hand)}
    return config.model_copy(update=sections)


def _samples(argument: str, given: Samples, workers: int) -> Split | StreamedSplit:
    """Keep tensors in memory, where they need no worker processes; read a data set while it is used."""
    if type(given) is TensorDataset and len(given.tensors) == 2:  # a subclass may transform its samples
        given = (given.tensors[0], given.tensors[1])
    if not isinstance(given, tuple):
        return _streamed(argument, given, workers)
    fix = "give (inputs, targets), as many of both and at least one, or a map-style data set of such pairs"
    if len(given) != 2 or not all(isinstance(part, Tensor) and part.dim() for part in given):
        raise InputError(argument, f"is {kind_of(given)}, which are no two tensors", fix)
    inputs, targets = given
    if len(inputs) != len(targets) or not len(inputs):
        raise InputError(argument, f"has {len(inputs)} inputs and {len(targets)} targets", fix)
    return Split(inputs, targets)


def _streamed(argument: str, dataset: Dataset[Any], workers: int) -> StreamedSplit:
    """Look at the first sample now rather than when all ranks are waiting for it."""
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        fix = "give tensors, or a data set with __len__ and __getitem__"
        raise InputError(argument, f"is {kind_of(dataset)} without numbered samples", fix)
    samples: MapStyle = dataset  # pyright: ignore[reportAssignmentType]  # it has both
    if not len(samples):
        raise InputError(argument, "has no samples", "give at least one")
    try:
        with repeatable(0):
            spec = PairSpec.of(samples[0])
    except WrongItemError as error:
        raise InputError(argument, f"sample 0 {error}", PairSpec.form) from None
    except Exception as error:  # the user's code
        raise InputError(argument, f"sample 0 {raised(error)}", "mend the data set") from error
    part = {"train_data": "training", "val_data": "validation"}[argument]
    return StreamedSplit(samples, spec, workers, source=GIVEN_TO_FIT, part=part)


def _data_set(train: Split | StreamedSplit, validation: Split | StreamedSplit, model: nn.Module) -> DataSet:
    nothing = torch.empty(0)
    classes = tuple(map(str, range(_num_classes(train, validation, model))))
    return DataSet(GIVEN_TO_FIT, train, validation, Split(nothing, nothing), classes, mean=(), std=())


def _num_classes(train: Split | StreamedSplit, validation: Split | StreamedSplit, model: nn.Module) -> int:
    """Return how many classes the model tells apart; 0 where the targets are no labels."""
    with repeatable(0):
        first = [next(iter(part.batches([torch.tensor([0])], torch.device("cpu")))) for part in (train, validation)]
    if any(targets.is_floating_point() or targets.dim() != 1 for _, targets in first):
        return 0
    with torch.no_grad():
        outputs = try_forward(model, first[0][0], training=False)
    return outputs.shape[1] if outputs.dim() == 2 and outputs.shape[1] > 1 else 0


def _check_targets(argument: str, samples: Split | StreamedSplit, loss: object, num_classes: int) -> None:
    """Look at all targets in memory, for the losses that are known; those of a data set are seen as they are read."""
    if not isinstance(samples, Split):
        return
    low, high = samples.labels.min().item(), samples.labels.max().item()
    if isinstance(loss, str) and num_classes and not 0 <= low <= high < num_classes:
        problem = f"has labels from {low} to {high}, and the model gives {num_classes} outputs"
        raise InputError(argument, problem, "number the classes from 0, and give the model an output for each")
    if loss == "bce" and not num_classes and not 0 <= low <= high <= 1:
        raise InputError(argument, f"has targets from {low:g} to {high:g}", "'bce' takes targets from 0 to 1")


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
