"""Models by name: ``mlp``, torchvision's classifiers, or a function of the user's."""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distplateau.config import load_config
from distplateau.errors import InputError, closest
from distplateau.record.ledger import read_ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distplateau.config import ModelSection

ImageShape = tuple[int, int, int]


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between them.

    Parameters
    ----------
    image_shape
        Channels, height, width; their product is the size of the input.
    hidden
        Widths of the hidden layers.
    dropout
        Probability of dropping a hidden unit.
    """

    def __init__(
        self, image_shape: ImageShape, num_classes: int, hidden: tuple[int, ...] = (512, 256), dropout: float = 0.0
    ) -> None:
        channels, height, width = image_shape
        widths = [channels * height * width, *hidden]
        layers: list[nn.Module] = [nn.Flatten()]
        for inputs, outputs in zip(widths, widths[1:], strict=False):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            if dropout:
                layers.append(nn.Dropout(dropout))
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class GrayToColor(nn.Module):
    """Show a gray image to a model that wants three channels."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Repeat the channel: [n, 1, h, w] -> [n, 3, h, w]."""
        return self.model(images.expand(-1, 3, -1, -1))


def build_model(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Make the model of a name, initialised from torch's global random state.

    Raises
    ------
    InputError
        For a name or argument that does not exist, or a model that cannot take these images.
    """
    if ":" in section.name:
        model = _from_function(section, image_shape, num_classes)
    elif section.name == "mlp":
        model = _mlp(section.args, image_shape, num_classes)
    else:
        model = _from_torchvision(section, image_shape, num_classes)
    _try_forward(section, model, image_shape, num_classes)
    return model


def load_model(run_dir: str | Path) -> nn.Module:
    """Return the best model of a run, in evaluation mode on the CPU.

    Raises
    ------
    InputError
        If the folder holds no run, or no weights that fit its configuration.
    """
    from safetensors.torch import load_file

    run_dir = Path(run_dir)
    start = read_ledger(run_dir).start
    config = load_config(run_dir / "config.toml")
    if not {"image_shape", "num_classes"} <= start.keys():
        raise InputError(str(run_dir / "ledger.jsonl"), "has no complete start event", "train the run again")
    channels, height, width = start["image_shape"]
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, (channels, height, width), start["num_classes"])
    path = run_dir / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        raise InputError(str(path), "is not there: no validation has been finished", "train the run first") from None
    except Exception as error:  # damaged file, or other keys and shapes
        reason = " ".join(str(error).split())[:200]
        raise InputError(str(path), f"does not fit the run's model ({reason})", "train the run again") from None
    return model.eval()


def _mlp(args: Mapping[str, Any], image_shape: ImageShape, num_classes: int) -> nn.Module:
    valid = ("hidden", "dropout")
    for key, value in args.items():
        if key not in valid:
            raise InputError(f"model.args.{key}", "unknown argument of mlp", closest(key, valid), value=value)
    hidden, dropout = args.get("hidden", [512, 256]), args.get("dropout", 0.0)
    if not isinstance(hidden, list) or not all(type(width) is int and width > 0 for width in hidden):
        raise InputError("model.args.hidden", "is no list of layer widths", "write it like [512, 256]", value=hidden)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError("model.args.dropout", "is no probability", "give a number from 0 to below 1", value=dropout)
    return MLP(image_shape, num_classes, tuple(hidden), float(dropout))


def _from_torchvision(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    from torchvision import models

    names = models.list_models(module=models)
    if section.name not in names:
        near = difflib.get_close_matches(section.name, ["mlp", *names], n=3, cutoff=0.4)
        hint = f"did you mean {', '.join(map(repr, near))}? " if near else ""
        raise InputError(
            "model.name",
            "there is no such model",
            f"{hint}valid: mlp, package.module:function, or one of torchvision.models.list_models()",
            value=section.name,
        )
    # Without this Inception and GoogLeNet give tuples while they train.
    extra = {"aux_logits": False, "init_weights": True} if section.name in {"googlenet", "inception_v3"} else {}
    try:
        model = models.get_model(section.name, weights=None, num_classes=num_classes, **{**extra, **section.args})
    except (TypeError, ValueError) as error:
        raise InputError("model.args", f"{section.name} refuses them ({error})", "mend them", value=section.args) from None
    return GrayToColor(model) if image_shape[0] == 1 else model


def _from_function(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    function = _import(section.name)
    offered: dict[str, Any] = {"image_shape": image_shape, "num_classes": num_classes}
    try:
        accepted = inspect.signature(function).parameters
    except (TypeError, ValueError):
        accepted = {}
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in getattr(accepted, "values", list)())
    context = {key: value for key, value in offered.items() if key in accepted or takes_any}
    for key, value in section.args.items():
        if key not in accepted and not takes_any:
            raise InputError(
                f"model.args.{key}", f"unknown argument of {section.name}", closest(key, accepted), value=value
            )
    try:
        model = function(**{**context, **section.args})
    except Exception as error:  # the user's code
        raise InputError(
            "model.name", f"it raised {type(error).__name__}: {error}", "mend the function", value=section.name
        ) from error
    if not isinstance(model, nn.Module):
        raise InputError(
            "model.name", f"it returned a {type(model).__name__}", "return a torch.nn.Module", value=section.name
        )
    return model


def _import(name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise InputError(
            "model.name",
            f"{module_name!r} cannot be imported ({type(error).__name__}: {error})",
            "write package.module:function, with the module in the current folder or installed",
            value=name,
        ) from None
    function = getattr(module, function_name, None)
    if not callable(function):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise InputError("model.name", f"{module_name} has no such function", closest(function_name, names), value=name)
    return function


def _try_forward(section: ModelSection, model: nn.Module, image_shape: ImageShape, num_classes: int) -> None:
    """Let the model see two images now rather than when all ranks are waiting in the first step."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(torch.zeros(2, *image_shape))
    except Exception as error:  # whatever a model says of an image size it cannot take
        raise InputError(
            "model.name",
            f"cannot take images of {' x '.join(map(str, image_shape))} ({type(error).__name__}: {error})",
            "choose another model or data set",
            value=section.name,
        ) from None
    finally:
        model.train(was_training)
    if not isinstance(logits, Tensor) or logits.shape != (2, num_classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InputError(
            "model.name",
            f"gives {shape} for 2 images of {num_classes} classes",
            f"return logits of shape (2, {num_classes})",
            value=section.name,
        )
