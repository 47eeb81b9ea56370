"""Augmentation of whole batches on their device, with randomness per sample.

torchvision's v2 transforms draw one set of parameters for a batch. ``flip``, ``crop`` and ``erase`` draw one for each
sample and work on the batch at once; any other transform is torchvision's own, called for one image after the other.
The random numbers follow from a seed alone: the same again after a resume.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from distplateau.errors import InputError, closest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True)
class Augment:
    """What is done to a batch of images, one operation after the other. Without any it returns them as they are."""

    operations: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = ()

    def __call__(self, images: Tensor, seed: int) -> Tensor:
        """Return the images augmented: a pure function of the arguments, nothing waits for the device.

        Parameters
        ----------
        images
            [n, channels, height, width] of any dtype; not changed.
        seed
            What the draws follow from, below 2**63.
        """
        if not self.operations or not len(images):
            return images
        generator = torch.Generator().manual_seed(seed)
        for operation in self.operations:
            images = operation(images, generator)
        return images

    def check(self, images: Tensor) -> None:
        """Try the operations on a batch such as they will be given.

        Raises
        ------
        InputError
            If one cannot be applied, or makes something else of the images than images of that size, with
            ``data.augment.N``.
        """
        for place, operation in enumerate(self.operations):
            key, shape = f"data.augment.{place}", list(images.shape[1:])
            try:
                result = operation(images, torch.Generator())
            except Exception as error:  # whatever a transform says of what it cannot do
                fix = "leave it out, or choose one for such images"
                raise InputError(key, f"cannot be applied to images of {shape} ({_one_line(error)})", fix) from error
            if (result.shape, result.dtype) != (images.shape, images.dtype):
                made = f"{images.dtype} of {shape} into {result.dtype} of {list(result.shape[1:])}"
                raise InputError(key, f"turns {made}", "choose settings that leave the size and the type as they are")


def build_augment(specs: Sequence[str | Mapping[str, Any]]) -> Augment:
    """Make the operations that a configuration lists, by name or as a table with a name and settings.

    ``flip`` (``p``), ``crop`` (``padding``, ``mode``), ``erase`` (``p``, ``size``, a share of the side), or the name of
    a class of ``torchvision.transforms.v2`` with its arguments.

    Raises
    ------
    InputError
        For a name or setting that does not exist or a value out of range, with ``data.augment.N``.
    """
    return Augment(tuple(_build(f"data.augment.{place}", spec) for place, spec in enumerate(specs)))


def _build(key: str, spec: str | Mapping[str, Any]) -> Callable[[Tensor, torch.Generator], Tensor]:
    args = {} if isinstance(spec, str) else dict(spec)
    name = spec if isinstance(spec, str) else args.pop("name", None)
    if name not in _OPERATIONS:
        return _build_transform(key, name, args)
    operation, settings = _OPERATIONS[name]
    for setting, value in args.items():
        if setting not in settings:
            raise InputError(f"{key}.{setting}", f"unknown setting of {name}", closest(setting, settings), value=value)
        problem = _CHECKS[setting](value)
        if problem:
            raise InputError(f"{key}.{setting}", problem, f"the default is {settings[setting]!r}", value=value)
    return partial(operation, **{**settings, **args})


def _build_transform(key: str, name: Any, args: Mapping[str, Any]) -> Callable[[Tensor, torch.Generator], Tensor]:
    """Make one of torchvision's transforms."""
    from torchvision.transforms import v2

    transforms = {
        known for known, kind in vars(v2).items() if isinstance(kind, type) and issubclass(kind, v2.Transform)
    }
    if name not in transforms - {"Transform"}:
        near = get_close_matches(str(name), {*_OPERATIONS, *transforms}, 1)
        fix = f"did you mean {near[0]!r}?" if near else "use flip, crop, erase or a class of torchvision.transforms.v2"
        raise InputError(key, "there is no such augmentation", fix, value=name)
    try:
        transform = getattr(v2, name)(**args)
    except (TypeError, ValueError) as error:
        fix = f"see torchvision.transforms.v2.{name}"
        raise InputError(key, f"{name} does not take these settings ({_one_line(error)})", fix, value=args) from None
    return partial(_transform_each, transform)


def _transform_each(transform: nn.Module, images: Tensor, generator: torch.Generator) -> Tensor:
    """Call a transform for each image; what it draws from torch's own generators follows from `generator`."""
    seed = int(torch.randint(2**62, (), generator=generator))
    own = _generators(images.device)
    before = [one.get_state() for one in own]
    try:
        for one in own:
            one.manual_seed(seed)
        return torch.stack([transform(image) for image in images])
    finally:
        for one, state in zip(own, before, strict=True):
            one.set_state(state)


def _generators(device: torch.device) -> list[torch.Generator]:
    cuda = [torch.cuda.default_generators[torch.cuda.current_device()]] if device.type == "cuda" else []
    return [torch.default_generator, *cuda]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _flip(images: Tensor, generator: torch.Generator, *, p: float) -> Tensor:
    chosen = torch.rand(len(images), generator=generator) < p
    return torch.where(_onto(chosen, images).view(-1, 1, 1, 1), images.flip(3), images)


def _crop(images: Tensor, generator: torch.Generator, *, padding: int, mode: str) -> Tensor:
    """Move each image by up to `padding` pixels in both directions; the border is mirrored or zero."""
    count, _, height, width = images.shape
    offsets = _onto(torch.randint(-padding, padding + 1, (count, 2), generator=generator), images)
    rows = torch.arange(height, device=images.device) + offsets[:, :1]
    columns = torch.arange(width, device=images.device) + offsets[:, 1:]
    inside = ((rows >= 0) & (rows < height))[:, None, :, None] & ((columns >= 0) & (columns < width))[:, None, None, :]
    rows, columns = _mirror(rows, height), _mirror(columns, width)
    places = (rows[:, :, None] * width + columns[:, None, :]).view(count, 1, -1).expand(-1, images.shape[1], -1)
    moved = images.flatten(2).gather(2, places).view(images.shape)
    return moved if mode == "reflect" else moved * inside


def _erase(images: Tensor, generator: torch.Generator, *, p: float, size: float) -> Tensor:
    """Set a square to zero in each chosen image: its side is `size` times that of the image, part may lie outside."""
    count, _, height, width = images.shape
    centre = torch.rand(count, 2, generator=generator) * torch.tensor([height, width])
    chosen = torch.rand(count, generator=generator) < p
    centre, chosen = _onto(centre, images), _onto(chosen, images)
    rows = (torch.arange(height, device=images.device) + 0.5 - centre[:, :1]).abs() * 2 < size * height
    columns = (torch.arange(width, device=images.device) + 0.5 - centre[:, 1:]).abs() * 2 < size * width
    erased = rows[:, :, None] & columns[:, None, :] & chosen[:, None, None]
    return images.masked_fill(erased[:, None], 0)


def _mirror(places: Tensor, size: int) -> Tensor:
    """Fold coordinates beyond the border back inside, without repeating the border itself."""
    period = max(1, 2 * size - 2)
    folded = places.remainder(period)
    return torch.minimum(folded, period - folded) if size > 1 else torch.zeros_like(places)


def _onto(values: Tensor, images: Tensor) -> Tensor:
    if images.device.type == "cuda":
        values = values.pin_memory()
    return values.to(images.device, non_blocking=True)


def _check_share(value: Any) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return "" if number and 0 <= value <= 1 else "must lie between 0 and 1"


def _check_padding(value: Any) -> str:
    whole = isinstance(value, int) and not isinstance(value, bool)
    return "" if whole and value > 0 else "must be a whole number above 0"


_CHECKS: dict[str, Callable[[Any], str]] = {
    "p": _check_share,
    "size": _check_share,
    "padding": _check_padding,
    "mode": lambda value: "" if value in {"reflect", "zero"} else "must be 'reflect' or 'zero'",
}
_OPERATIONS: dict[Any, tuple[Callable[..., Tensor], dict[str, Any]]] = {
    "flip": (_flip, {"p": 0.5}),
    "crop": (_crop, {"padding": 4, "mode": "reflect"}),
    "erase": (_erase, {"p": 0.5, "size": 0.5}),
}
