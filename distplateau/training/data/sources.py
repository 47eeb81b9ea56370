"""Where streamed data comes from: folders of images, and data sets that a function of the user's returns."""

from __future__ import annotations

import contextlib
import io
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from distplateau.errors import InputError, closest
from distplateau.training.data.loader import (
    ITEM_FORM,
    ItemSpec,
    MapStyle,
    StreamedSplit,
    WrongItemError,
    image_and_label,
    kind_of,
    raised,
    repeatable,
)
from distplateau.training.data.order import split_validation
from distplateau.training.data.samples import DataSet
from distplateau.training.parts.imports import check_arguments, import_function, short, signature_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    Transform = Callable[[Tensor], Tensor]

IMAGE_FOLDER = "image-folder"
IMAGENET_MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
IMAGENET_STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
_LAYOUT = "lay it out as train/<class>/*.jpg and test/<class>/*.jpg, or val/<class>/*.jpg"


def is_streamed(name: str) -> bool:
    """Return whether a data set of this name is one that `load_streamed` loads."""
    return name == IMAGE_FOLDER or ":" in name


def check_streamed(name: str, root: Path, args: Mapping[str, Any]) -> None:
    """Find out that the data set is there and takes these arguments, without listing or reading samples.

    A user's module is imported; its function is not called.

    Raises
    ------
    InputError
        For missing folders, a function that does not exist, or arguments that do not fit.
    """
    if name == IMAGE_FOLDER:
        _folder_args(args)
        _folders(root.expanduser())
    else:
        _user_function(name, args)


def load_streamed(
    name: str, root: Path, args: Mapping[str, Any], validation_size: int | float, seed: int, workers: int
) -> DataSet:
    """List the files or call the user's function, and look at one sample of each part.

    Any rank may call it; no process group is used, and no global random state is changed.

    Parameters
    ----------
    name
        ``image-folder``, or ``package.module:function``: called with the root and `args`, it returns the data sets
        (train, test) or (train, validation, test). Their items are (tensor [c, h, w] of uint8 or float, int label).
        An attribute `classes` (or `targets`) of one of them tells the number of classes, `mean` and `std` of the
        training set the normalization.
    root
        ``data.root``. An image folder holds ``train/<class>/*.jpg`` and likewise ``test`` or ``val``; where it has
        both, ``val`` is the validation set.
    args
        ``data.args``. For an image folder: `size` of the square images, `resize` of their shorter side before the
        central crop that evaluation sees, `scale` (smallest and largest share of the area that a training crop takes)
        and `flip`.
    validation_size, seed
        As for `data.split_validation`; without effect where there is a validation set. What is carved out of an image
        folder is not augmented; what is carved out of a user's training set has the transforms of that set.

    Raises
    ------
    InputError
        With the dotted key, the value and the fix, for whatever of this is wrong.
    """
    root = root.expanduser()
    if name == IMAGE_FOLDER:
        found = _load_image_folder(root, args)
    else:
        with repeatable(seed):  # a split that the function draws must be the same on every rank
            found = _call_function(name, root, args)
    spec, image = _common_spec(name, found)
    mean, std = _normalization(name, found, image)

    def split(dataset: MapStyle, part: str, indices: Tensor | None = None) -> StreamedSplit:
        return StreamedSplit(dataset, spec, workers, indices, name, part)

    kept = None
    validation = found.validation
    if validation is None:
        kept, held_out = split_validation(len(found.train), validation_size, seed)
        # They are numbered as in the training set.
        carved = split(found.train_for_evaluation, "training", held_out)
    else:
        carved = split(validation, "validation")
    return DataSet(
        name=name,
        train=split(found.train, "training", kept),
        validation=carved,
        test=split(found.test, "test"),
        classes=found.classes,
        mean=mean,
        std=std,
    )


@dataclass(frozen=True)
class _Found:
    """What a source gives.

    Parameters
    ----------
    train_for_evaluation
        The same samples as `train`, as a validation sees them.
    mean, std
        None where the source has none.
    """

    train: MapStyle
    train_for_evaluation: MapStyle
    validation: MapStyle | None
    test: MapStyle
    classes: tuple[str, ...]
    mean: Any = None
    std: Any = None

    def parts(self) -> dict[str, MapStyle]:
        """Return the data sets by name, the training set first."""
        named = {"training": self.train, "validation": self.validation, "test": self.test}
        return {part: dataset for part, dataset in named.items() if dataset is not None}


def _common_spec(name: str, found: _Found) -> tuple[ItemSpec, Tensor]:
    """Look at the first sample of each part now rather than when all ranks are waiting for it.

    Returns
    -------
    tuple
        What the samples are like, and the first input of the training set.
    """
    spec, first = None, torch.empty(0)
    for part, dataset in found.parts().items():
        try:
            with repeatable(0):
                item = dataset[0]
            image, _ = image_and_label(item)
            if spec is None:
                first = image
                channels, height, width = image.shape
                spec = ItemSpec((channels, height, width), image.dtype, len(found.classes))
            spec.check(item)
        except WrongItemError as error:
            raise InputError("data.name", f"sample 0 of its {part} set {error}", ITEM_FORM, value=name) from None
        except Exception as error:  # the user's code, or a damaged file
            problem = f"sample 0 of its {part} set {raised(error)}"
            raise InputError("data.name", problem, "mend or remove it", value=name) from error
    assert spec is not None, "there is a training set"
    return spec, first


def _normalization(name: str, found: _Found, image: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation per channel, in units of the values, which the first image shows."""
    channels = len(image)
    if found.mean is None and found.std is None:
        return (0.0,) * channels, (255.0 if image.dtype == torch.uint8 else 1.0,) * channels
    mean, std = _numbers(found.mean), _numbers(found.std)
    if not len(mean) == len(std) == channels or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        problem = f"its training set has mean {found.mean!r} and std {found.std!r} for {channels} channels"
        raise InputError("data.name", problem, "give one number per channel for both, std above 0", value=name)
    if image.dtype == torch.uint8 and max(std) <= 1 and int(image.max()) > 1:
        problem = f"its images have values to 255, and its std {list(std)} is one of values to 1"
        raise InputError("data.name", problem, "multiply its mean and std by 255", value=name)
    return mean, std


def _numbers(values: Any) -> tuple[float, ...]:
    try:
        return tuple(float(value) for value in values)
    except (TypeError, ValueError):
        return ()


@dataclass(frozen=True)
class _FolderArgs:
    size: int
    resize: int
    scale: tuple[float, float]
    flip: bool


def _folder_args(args: Mapping[str, Any]) -> _FolderArgs:
    """Return the arguments of an image folder with what they are if not given."""
    valid = ("size", "resize", "scale", "flip")
    for key, value in args.items():
        if key not in valid:
            raise InputError(
                f"data.args.{key}", f"unknown argument of {IMAGE_FOLDER}", closest(key, valid), value=value
            )
    size = args.get("size", 224)
    resize = args.get("resize", round(size * 256 / 224) if type(size) is int else 0)
    scale, flip = args.get("scale", [0.08, 1.0]), args.get("flip", True)
    if type(size) is not int or size < 1:
        raise InputError("data.args.size", "is no number of pixels", "write it like 224", value=size)
    if type(resize) is not int or resize < size:
        raise InputError("data.args.resize", "is no number of pixels", f"use {size} or more", value=resize)
    numbers = isinstance(scale, list | tuple) and all(type(value) in {int, float} for value in scale)
    if not numbers or len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        raise InputError("data.args.scale", "is no range of shares", "write it like [0.08, 1.0]", value=scale)
    if not isinstance(flip, bool):
        raise InputError("data.args.flip", "is neither true nor false", "use one of them", value=flip)
    return _FolderArgs(size, resize, (float(scale[0]), float(scale[1])), flip)


def _transforms(args: _FolderArgs) -> tuple[Transform, Transform]:
    """Return the transforms of training and of evaluation: uint8 [3, h, w] -> uint8 [3, size, size]."""
    from torchvision.transforms import v2

    flip = [v2.RandomHorizontalFlip()] if args.flip else []
    train = v2.Compose([v2.RandomResizedCrop(args.size, scale=args.scale, antialias=True), *flip])
    return train, v2.Compose([v2.Resize(args.resize, antialias=True), v2.CenterCrop(args.size)])


def _folders(root: Path) -> dict[str, Path]:
    """Return the folders of the parts: ``train``, ``test`` and perhaps ``val``; each has folders of classes."""
    folders = {part: root / part for part in ("train", "val", "test") if (root / part).is_dir()}
    if not root.is_dir():
        raise InputError("data.root", "there is no such folder", _LAYOUT, value=str(root))
    if "train" not in folders or len(folders) == 1:
        missing = "'test' or 'val'" if "train" in folders else "'train'"
        raise InputError("data.root", f"it has no folder {missing}", _LAYOUT, value=str(root))
    if "test" not in folders:
        folders["test"] = folders.pop("val")
    for folder in folders.values():
        if not _class_names(folder):
            raise InputError(str(folder), "has no folders of classes", _LAYOUT)
    return folders


def _class_names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())


def _load_image_folder(root: Path, args: Mapping[str, Any]) -> _Found:
    for_training, for_evaluation = _transforms(_folder_args(args))
    folders = _folders(root)
    classes = tuple(_class_names(folders["train"]))
    listed = {part: _list_images(folder, classes) for part, folder in folders.items()}
    empty = set(range(len(classes))) - set(listed["train"].labels.tolist())
    if empty:
        problem = f"holds no image of the class {classes[min(empty)]!r}"
        raise InputError(str(folders["train"]), problem, "put some there, or remove its folder")
    return _Found(
        train=_Images(listed["train"], for_training),
        train_for_evaluation=_Images(listed["train"], for_evaluation),
        validation=_Images(listed["val"], for_evaluation) if "val" in listed else None,
        test=_Images(listed["test"], for_evaluation),
        classes=classes,
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
    )


class _ImageFiles:
    """Paths and labels of images, in three arrays rather than in a Python object each.

    Reading a Python object writes to its reference count, so that in time each worker would have a copy of them all.
    """

    def __init__(self, folder: Path, samples: Sequence[tuple[str, int]]) -> None:
        names = [os.fsencode(os.path.relpath(path, folder)) for path, _ in samples]
        self.folder = folder
        self.names = b"".join(names)
        self.ends = np.cumsum([0, *map(len, names)])
        self.labels = np.array([label for _, label in samples], np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> Path:
        """Return the path of an image."""
        return self.folder / os.fsdecode(self.names[self.ends[index] : self.ends[index + 1]])


class _Images:
    """Images of a folder: (uint8 [3, size, size], label)."""

    def __init__(self, files: _ImageFiles, transform: Transform) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self.files.path(index)
        try:
            return self.transform(_read_image(path)), int(self.files.labels[index])
        except Exception as error:  # decoders do not say which file they were reading
            raise OSError(f"{path}: {short(error)}") from error


def _list_images(folder: Path, classes: Sequence[str]) -> _ImageFiles:
    """List the images of a part with the numbers that the classes have in training, whichever of them it has."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    unknown = sorted(set(_class_names(folder)) - set(classes))
    if unknown:
        raise InputError(str(folder / unknown[0]), "is no class of the training set", "remove or rename the folder")
    numbers = {name: number for number, name in enumerate(classes)}
    samples = make_dataset(folder, numbers, extensions=IMG_EXTENSIONS, allow_empty=True)
    if not samples:
        raise InputError(str(folder), f"holds no images ({', '.join(IMG_EXTENSIONS)})", _LAYOUT)
    return _ImageFiles(folder, samples)


def _read_image(path: Path) -> Tensor:
    """Return uint8 [3, h, w], with the channels of a pixel side by side in memory: resizing is faster that way."""
    from PIL import Image
    from torchvision.io import ImageReadMode, decode_jpeg

    content = path.read_bytes()
    if content.startswith(b"\xff\xd8"):
        # What it refuses PIL may still read, and says better what is wrong.
        with contextlib.suppress(RuntimeError):
            encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
            return decode_jpeg(encoded, ImageReadMode.RGB)  # pyright: ignore[reportReturnType]  # one in, one out
    with Image.open(io.BytesIO(content)) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _user_function(name: str, args: Mapping[str, Any]) -> Callable[..., Any]:
    function = import_function("data.name", name)
    root = [next(iter(signature_of(function) or ()), "root")]
    check_arguments("data.args", name, function, args, provided=root)
    return function


def _call_function(name: str, root: Path, args: Mapping[str, Any]) -> _Found:
    function = _user_function(name, args)
    try:
        result = function(root, **args)
    except Exception as error:  # the user's code
        problem = f"it raised {type(error).__name__}: {short(error)}"
        raise InputError("data.name", problem, "mend the function", value=name) from error
    datasets = _map_style_datasets(name, result)
    train, test = datasets[0], datasets[-1]
    return _Found(
        train=train,
        train_for_evaluation=train,
        validation=datasets[1] if len(datasets) == 3 else None,
        test=test,
        classes=_classes(name, datasets),
        mean=_attribute(train, "mean"),
        std=_attribute(train, "std"),
    )


def _map_style_datasets(name: str, result: Any) -> Sequence[MapStyle]:
    fix = "return the data sets (train, test) or (train, validation, test), each with __len__ and __getitem__"
    if not isinstance(result, tuple | list) or len(result) not in {2, 3}:
        raise InputError("data.name", f"it returned {kind_of(result)}", fix, value=name)
    for dataset in result:
        proper = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not proper or isinstance(dataset, IterableDataset | dict | str):
            raise InputError("data.name", f"it returned {kind_of(dataset)} among the data sets", fix, value=name)
        if not len(dataset):
            raise InputError("data.name", "it returned a data set without samples", fix, value=name)
    return result


def _classes(name: str, datasets: Iterable[MapStyle]) -> tuple[str, ...]:
    """Return the names of the classes, or their numbers where there are no names."""
    for dataset in datasets:
        named = _attribute(dataset, "classes")
        if isinstance(named, tuple | list) and named:
            return tuple(map(str, named))
    highest = -1
    for targets in filter(lambda values: values is not None, (_attribute(dataset, "targets") for dataset in datasets)):
        highest = max(highest, int(np.asarray(targets).max()))
    if highest < 0:
        problem = "its data sets do not say how many classes there are"
        raise InputError("data.name", problem, "give one an attribute `classes`: a list of their names", value=name)
    return tuple(map(str, range(highest + 1)))


def _attribute(dataset: Any, name: str) -> Any:
    """Return an attribute of a data set, or of the one that it is a subset of; None if there is none."""
    while dataset is not None:
        if getattr(dataset, name, None) is not None:
            return getattr(dataset, name)
        dataset = getattr(dataset, "dataset", None)
    return None
