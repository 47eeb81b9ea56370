"""Losses by name, one value per sample: the mean over a global batch is made of them, whatever the ranks' shares."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn import functional

from distplateau.errors import InputError, closest
from distplateau.training.parts.imports import check_arguments, import_function, short

if TYPE_CHECKING:
    from collections.abc import Mapping

Loss = Callable[[Tensor, Tensor], Tensor]
"""From outputs [n, ...] and targets [n, ...] to one value per sample, [n]."""

_ARGUMENTS = {"cross_entropy": ("label_smoothing",), "mse": (), "bce": ()}


def build_loss(name: str, args: Mapping[str, Any]) -> Loss:
    """Make a loss by its name, or from ``package.module:function`` with keyword arguments.

    ``cross_entropy`` takes class labels and ``label_smoothing``; ``mse`` and ``bce`` (on logits) compare each output
    with a target, or with the one-hot vector of a class label, and take the mean over a sample's outputs. Where there
    is one output for each sample an integer target is a number and no label.

    Raises
    ------
    InputError
        For a name or an argument that does not exist, or a smoothing outside 0 .. 1.
    """
    if ":" in name:
        function = import_function("training.loss", name)
        check_arguments("training.loss_args", name, function, args, provided=_first_two(function))
        return per_sample(partial(function, **args), name)
    if name not in _ARGUMENTS:
        fix = closest(name, [*_ARGUMENTS, "package.module:function"])
        raise InputError("training.loss", "there is no such loss", fix, value=name)
    for key, value in args.items():
        if key not in _ARGUMENTS[name]:
            fix = closest(key, _ARGUMENTS[name]) if _ARGUMENTS[name] else f"{name} takes none"
            raise InputError(f"training.loss_args.{key}", f"unknown argument of {name}", fix, value=value)
    if name == "cross_entropy":
        smoothing = args.get("label_smoothing", 0.0)
        if isinstance(smoothing, bool) or not isinstance(smoothing, int | float) or not 0 <= smoothing < 1:
            raise InputError(
                "training.loss_args.label_smoothing", "must lie in [0, 1)", "use a number like 0.1", value=smoothing
            )
        fix = (
            "it takes outputs [n, classes] and integer labels [n] from 0 to classes - 1, or probabilities [n, classes]"
        )
        return per_sample(partial(_cross_entropy, float(smoothing)), name, fix)
    function = functional.mse_loss if name == "mse" else functional.binary_cross_entropy_with_logits
    return per_sample(partial(_elementwise, function), name, "it takes outputs and targets of one shape, or labels [n]")


def per_sample(function: Callable[[Tensor, Tensor], Any], name: str, fix: str = "mend the function") -> Loss:
    """Check at each call that a loss gives one value per sample; a mean could not be weighted by samples."""

    def checked(outputs: Tensor, targets: Tensor) -> Tensor:
        try:
            losses = function(outputs, targets)
        except Exception as error:  # whatever the user's function raises
            if "out of memory" in str(error):
                raise
            problem = f"it raised {type(error).__name__}: {short(error)}"
            raise InputError("training.loss", problem, fix, value=name) from error
        if not isinstance(losses, Tensor) or losses.shape != (len(outputs),):
            got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
            raise InputError(
                "training.loss",
                f"gave {got} for {len(outputs)} samples",
                "return one value per sample, [n] (reduction='none')",
                value=name,
            )
        return losses

    return checked


def _first_two(function: Callable[..., Any]) -> tuple[str, ...]:
    import inspect

    try:
        return tuple(inspect.signature(function).parameters)[:2]
    except (TypeError, ValueError):
        return ()


def _cross_entropy(smoothing: float, outputs: Tensor, targets: Tensor) -> Tensor:
    if not targets.is_floating_point():
        targets = targets.long()
    losses = functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=smoothing)
    return _mean_of_each(losses)


def _elementwise(function: Callable[..., Tensor], outputs: Tensor, targets: Tensor) -> Tensor:
    # As many numbers as outputs are what is to be reached, also where they are whole.
    if not targets.is_floating_point() and targets.numel() != outputs.numel():
        targets = functional.one_hot(targets.long(), outputs.shape[1])
    return _mean_of_each(function(outputs, targets.to(outputs.dtype).view_as(outputs), reduction="none"))


def _mean_of_each(losses: Tensor) -> Tensor:
    """Return one value per sample, [n], from one per output or place, [n, ...]."""
    return losses.flatten(1).mean(1) if losses.dim() > 1 else losses
