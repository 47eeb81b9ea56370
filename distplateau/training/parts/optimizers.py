"""The optimizer by its name, with parameter groups by regular expression."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from distplateau.errors import InputError, closest
from distplateau.training.parts.imports import short

if TYPE_CHECKING:
    from distplateau.config import OptimizerSection

_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    # LBFGS needs a closure and SparseAdam sparse gradients; neither works in this loop.
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and name not in {"Optimizer", "LBFGS", "SparseAdam"}
}
_OWN_KEYS = {"params", "lr", "weight_decay"}


def build_optimizer(section: OptimizerSection, model: nn.Module) -> torch.optim.Optimizer:
    """Make the optimizer, fused into one kernel where torch has that.

    Raises
    ------
    InputError
        For an unknown name or argument, a value that the optimizer refuses, or a group that matches no parameter.
    """
    kind = _OPTIMIZERS.get(section.name)
    if kind is None:
        raise InputError(
            "optimizer.name", "there is no such optimizer", closest(section.name, _OPTIMIZERS), value=section.name
        )
    accepted = set(inspect.signature(kind).parameters) - {"self"}
    for key, value in section.args.items():
        if key not in accepted - _OWN_KEYS:
            raise InputError(
                f"optimizer.{key}",
                f"unknown key, {section.name} has none of that name",
                closest(key, (accepted - _OWN_KEYS) | {"groups", "lr", "name", "weight_decay"}),
                value=value,
            )
    args: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in section.args.items()}
    if "weight_decay" in accepted:
        args["weight_decay"] = section.weight_decay
    elif section.weight_decay:
        raise InputError(
            "optimizer.weight_decay",
            f"{section.name} has no weight decay",
            "remove it or choose another optimizer",
            value=section.weight_decay,
        )
    if "fused" in accepted and not {"fused", "foreach", "differentiable"} & set(args):
        args["fused"] = all(p.is_floating_point() for p in model.parameters())
    groups = parameter_groups(section, model)
    try:
        return kind(groups, lr=section.lr, **args)  # pyright: ignore[reportCallIssue]
    except Exception as error:  # (0.9,) for two betas is an IndexError
        raise InputError(
            "optimizer", f"{section.name} refuses its settings ({short(error)})", "mend that setting"
        ) from None


def parameter_groups(section: OptimizerSection, model: nn.Module) -> list[dict[str, Any]]:
    """Sort the trainable parameters into groups: those that match no expression first, then one per ``groups``.

    A parameter goes to the first group whose expression is found in its name.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise InputError("model.name", "the model has no parameter to train", "choose another model")
    groups: list[dict[str, Any]] = [{"params": []}]
    for place, group in enumerate(section.groups):
        expression = _compile(f"optimizer.groups.{place}.match", group.match)
        matching = [(name, p) for name, p in named if expression.search(name)]
        if not matching:
            raise InputError(
                f"optimizer.groups.{place}.match",
                "matches no parameter that is left",
                f"the names are like {', '.join(name for name, _ in named[:4])}",
                value=group.match,
            )
        names = {name for name, _ in matching}
        named = [(name, p) for name, p in named if name not in names]
        groups.append({"params": [p for _, p in matching], **group.model_dump(exclude={"match"}, exclude_none=True)})
    groups[0]["params"] = [p for _, p in named]
    return [group for group in groups if group["params"]]


def _compile(key: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(key, f"is no regular expression ({error})", "mend it", value=pattern) from None
