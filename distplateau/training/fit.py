"""Training for somebody who brings objects: a model, a loss, data and no names in a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from distplateau.config import Config, load_config, parse_config
from distplateau.errors import InputError
from distplateau.training.data import DataSet, Split
from distplateau.training.losses import build_loss, per_sample
from distplateau.training.objective import Objective, build_objective
from distplateau.training.setup import assemble_parts, check_ranks
from distplateau.training.trainer import train_parts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn

    Samples = Dataset[Any] | tuple[Tensor, Tensor]

_BY_HAND = "given to fit()"


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
        Its weights are trained in place. Build it with the same seed on every rank.
    loss
        A name of `distplateau.training.losses`, or a function from (outputs, targets) to one value per sample, [n].
    train_data, val_data
        ``(inputs, targets)`` tensors, [n, ...] each, or a map-style dataset of such pairs, which is read into memory.
        Inputs go to the model as they are. With integer targets [n] there is an accuracy beside the loss.
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
    data = _data_set(_tensors("train_data", train_data), _tensors("val_data", val_data))
    further = build_objective(settings.training, 0).further
    function = build_loss(loss, settings.training.loss_args) if isinstance(loss, str) else per_sample(loss, _name(loss))
    objective = Objective(function, data.num_classes, further)
    return train_parts(settings, assemble_parts(settings, data, model, objective))


def _settings(config: Config | Mapping[str, Any] | str | Path | None) -> Config:
    if config is None:
        config = {}
    if isinstance(config, str | Path):
        config = load_config(config)
    elif not isinstance(config, Config):
        config = parse_config(dict(config))
    by_hand = {"name": _BY_HAND, "args": {}}
    sections = {"model": config.model.model_copy(update=by_hand), "data": config.data.model_copy(update=by_hand)}
    return config.model_copy(update=sections)


def _tensors(argument: str, samples: Samples) -> Split:
    """Read samples into memory: data that is sliced there needs no worker processes."""
    if isinstance(samples, TensorDataset):
        samples = (samples.tensors[0], samples.tensors[-1])
    if not isinstance(samples, tuple):
        try:
            pairs = [samples[index] for index in range(len(samples))]  # pyright: ignore[reportArgumentType]
            samples = (
                torch.stack([torch.as_tensor(x) for x, _ in pairs]),
                torch.stack([torch.as_tensor(y) for _, y in pairs]),
            )
        except (TypeError, ValueError, RuntimeError, LookupError) as error:
            problem = f"cannot be read as (input, target) pairs of one shape ({' '.join(str(error).split())[:160]})"
            raise InputError(argument, problem, "give tensors, or a map-style dataset of such pairs") from None
    inputs, targets = samples
    if len(inputs) != len(targets) or not len(inputs):
        problem = f"has {len(inputs)} inputs and {len(targets)} targets"
        raise InputError(argument, problem, "give as many of both, at least one")
    return Split(inputs, targets)


def _data_set(train: Split, validation: Split) -> DataSet:
    labels = torch.cat([train.labels, validation.labels])
    are_classes = not labels.is_floating_point() and labels.dim() == 1
    classes = tuple(map(str, range(int(labels.max()) + 1))) if are_classes else ()
    empty = Split(validation.images[:0], validation.labels[:0])
    return DataSet(_BY_HAND, train, validation, empty, classes, mean=(), std=())


def _name(function: object) -> str:
    return str(getattr(function, "__qualname__", type(function).__name__))
