"""Models by name: ``mlp``, torchvision's classifiers, or a function of the user's."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distplateau.config import load_config
from distplateau.errors import InputError, closest
from distplateau.record.ledger import read_ledger
from distplateau.training.parts.imports import check_arguments, import_function, nearest, short, signature_of, takes_any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from distplateau.config import ModelSection

ImageShape = tuple[int, int, int]
# The name of a model and of data that somebody brought as objects.
GIVEN_TO_FIT = "given to fit()"
_MLP_ARGS = ("hidden", "dropout")
# What a configuration may not set, and why.
_FROM_THE_DATA = "follows from the data set"
_FIXED_ARGS = {"num_classes": _FROM_THE_DATA, "image_shape": _FROM_THE_DATA}
_FIXED_TORCHVISION_ARGS = {
    **_FIXED_ARGS,
    "weights": "a run starts from random weights",
    "aux_logits": "the loss takes one tensor of logits",
}


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
        for inputs, outputs in itertools.pairwise(widths):
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


def check_model(section: ModelSection) -> None:
    """Find out that a model of this name exists and takes these arguments, without building it.

    A user's module is imported. What a torchvision model makes of its arguments shows only when it is built.

    Raises
    ------
    InputError
        For a name that does not exist, or an argument that its signature does not have or lacks.
    """
    if ":" in section.name:
        _check_function_args(section, import_function("model.name", section.name))
    elif section.name == "mlp":
        _check_mlp_args(section.args)
    else:
        _check_torchvision(section)


def build_model(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    """Make the model of a name, initialised from torch's global random state, which the caller seeds.

    Parameters
    ----------
    image_shape
        Channels, height, width of the images it will see, as float32 [n, c, h, w].
    num_classes
        Number of logits it gives per image.

    Returns
    -------
    nn.Module
        On the CPU, in training mode. Only the initialisation has drawn from the global random state.

    Raises
    ------
    InputError
        For a name or argument that does not exist, or a model that cannot take these images.
    """
    check_model(section)
    if ":" in section.name:
        model = _from_function(section, image_shape, num_classes)
    elif section.name == "mlp":
        model = _mlp(section.args, image_shape, num_classes)
    else:
        model = _from_torchvision(section, image_shape, num_classes)
    _try_forward(section, model, image_shape, num_classes)
    return model


def load_model(run_dir: str | Path) -> nn.Module:
    """Return the best model of a run, in evaluation mode on the CPU. torch's global random state is left alone.

    Parameters
    ----------
    run_dir
        The run folder: ``config.toml`` names the model, the ledger's start event the shape of its images and the
        number of classes, ``model.safetensors`` holds the weights.

    Raises
    ------
    InputError
        If the folder holds no run, or no weights that fit its configuration.
    """
    from safetensors.torch import load_file

    run_dir = Path(run_dir)
    start = read_ledger(run_dir).start
    config = load_config(run_dir / "config.toml")
    if config.model.name == GIVEN_TO_FIT:
        fix = "build the model as it was then, and load model.safetensors into it"
        raise InputError(str(run_dir), "was trained by fit() on a model that the run folder does not describe", fix)
    shape, num_classes = start.get("image_shape"), start.get("num_classes")
    if not isinstance(shape, list) or len(shape) != 3 or not isinstance(num_classes, int):
        raise InputError(str(run_dir / "ledger.jsonl"), "has no complete start event", "train the run again")
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        model = build_model(config.model, (channels, height, width), num_classes)
    path = run_dir / "model.safetensors"
    try:
        model.load_state_dict(load_file(path))
    except FileNotFoundError:
        problem = "is not there: no validation has been finished, or the monitored metric was never a finite number"
        raise InputError(str(path), problem, "train the run first") from None
    except Exception as error:  # damaged file, or other keys and shapes
        problem = f"does not fit the run's model ({short(error)})"
        raise InputError(str(path), problem, "train the run again") from None
    return model.eval()


def _check_mlp_args(args: Mapping[str, Any]) -> None:
    for key, value in args.items():
        _refuse_fixed(key, value, _FIXED_ARGS)
        if key not in _MLP_ARGS:
            raise InputError(f"model.args.{key}", "unknown argument of mlp", closest(key, _MLP_ARGS), value=value)
    hidden, dropout = args.get("hidden", []), args.get("dropout", 0.0)
    if not isinstance(hidden, list) or not all(type(width) is int and width > 0 for width in hidden):
        raise InputError("model.args.hidden", "is no list of layer widths", "write it like [512, 256]", value=hidden)
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0 <= dropout < 1:
        raise InputError("model.args.dropout", "is no probability", "give a number from 0 to below 1", value=dropout)


def _mlp(args: Mapping[str, Any], image_shape: ImageShape, num_classes: int) -> nn.Module:
    hidden, dropout = args.get("hidden", [512, 256]), args.get("dropout", 0.0)
    return MLP(image_shape, num_classes, tuple(hidden), float(dropout))


def _check_torchvision(section: ModelSection) -> None:
    from torchvision import models

    names = models.list_models(module=models)  # of the package itself: the classifiers
    if section.name not in names:
        how = "valid: mlp, package.module:function, or one of torchvision.models.list_models(module=torchvision.models)"
        raise InputError(
            "model.name", "there is no such model", nearest(section.name, ["mlp", *names]) + how, value=section.name
        )
    for key, value in section.args.items():
        _refuse_fixed(key, value, _FIXED_TORCHVISION_ARGS)


def _from_torchvision(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    from torchvision import models

    # Without this Inception and GoogLeNet give tuples while they train.
    extra = {"aux_logits": False, "init_weights": True} if section.name in {"googlenet", "inception_v3"} else {}
    try:
        model = models.get_model(section.name, weights=None, num_classes=num_classes, **{**extra, **section.args})
    except Exception as error:  # TypeError, ValueError, AssertionError, ...: each model has its own way
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown and unknown[1] in section.args:
            where, value = f"model.args.{unknown[1]}", section.args[unknown[1]]
            raise InputError(where, f"unknown argument of {section.name}", "remove it", value=value) from None
        problem = f"{section.name} refuses them ({type(error).__name__}: {short(error)})"
        raise InputError("model.args", problem, "mend them", value=section.args) from None
    return GrayToColor(model) if image_shape[0] == 1 else model


def _check_function_args(section: ModelSection, function: Callable[..., Any]) -> None:
    for key, value in section.args.items():
        _refuse_fixed(key, value, _FIXED_ARGS)
    check_arguments("model.args", section.name, function, section.args, provided=_FIXED_ARGS)


def _from_function(section: ModelSection, image_shape: ImageShape, num_classes: int) -> nn.Module:
    function = import_function("model.name", section.name)
    parameters = signature_of(function) or {}
    offered: dict[str, Any] = {"image_shape": image_shape, "num_classes": num_classes}
    context = {key: value for key, value in offered.items() if key in parameters or takes_any(parameters)}
    try:
        model = function(**context, **section.args)
    except (Exception, SystemExit) as error:  # the user's code
        problem = f"it raised {type(error).__name__}: {short(error)}"
        raise InputError("model.name", problem, "mend the function", value=section.name) from error
    if not isinstance(model, nn.Module):
        problem = f"it returned a {type(model).__name__}"
        raise InputError("model.name", problem, "return a torch.nn.Module", value=section.name)
    return model


def _refuse_fixed(key: str, value: Any, fixed: Mapping[str, str]) -> None:
    if key in fixed:
        raise InputError(f"model.args.{key}", f"cannot be set: {fixed[key]}", "remove it", value=value)


def _try_forward(section: ModelSection, model: nn.Module, image_shape: ImageShape, num_classes: int) -> None:
    """Let the model see two images now rather than when all ranks are waiting in the first step."""
    was_training = model.training
    model.eval()
    try:
        # A model may draw random numbers even in evaluation mode; those of the run do not depend on this trial.
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            logits = model(torch.zeros(2, *image_shape))
    except Exception as error:  # whatever a model says of an image size it cannot take
        raise InputError(
            "model.name",
            f"cannot take images of {' x '.join(map(str, image_shape))} ({type(error).__name__}: {short(error)})",
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
