"""Image data sets as tensors in memory, and the order in which ranks see them.

The order is a pure function of (seed, epoch), cut into global batches of which each rank takes its slice: it does not
depend on the number of ranks, and a run resumes at any step without reading what it skips.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distplateau.errors import InputError, closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from distplateau.config import DataSection

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_TEST_SAMPLES = 360
_IDX_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@dataclass(frozen=True)
class Split:
    """Part of a data set.

    Parameters
    ----------
    images
        uint8, [samples, channels, height, width].
    labels
        int64, [samples].
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class DataSet:
    """A data set in memory, with its validation set carved out of the training set.

    Parameters
    ----------
    mean, std
        Per channel, over the whole official training set, in units of the uint8 values.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    def to(self, device: torch.device) -> DataSet:
        """Return the data set on a device."""
        return replace(
            self, train=self.train.to(device), validation=self.validation.to(device), test=self.test.to(device)
        )

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 images into float32 of mean 0 and deviation 1 per channel, on their device."""
        mean = torch.tensor(self.mean, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        scale = 1 / torch.tensor(self.std, dtype=torch.float32, device=images.device).view(-1, 1, 1)
        return images.float().sub_(mean).mul_(scale)


def load_data(section: DataSection, seed: int) -> DataSet:
    """Load a data set and carve out its validation set.

    Parameters
    ----------
    seed
        Decides which training samples become the validation set; nothing else.

    Raises
    ------
    InputError
        For an unknown name, data that cannot be had, or a validation size that leaves one of the sets empty.
    """
    load = _LOADERS.get(section.name)
    if load is None:
        raise InputError("data.name", "there is no such data set", closest(section.name, _LOADERS), value=section.name)
    official, test, classes = load(Path(section.root).expanduser())
    kept, held_out = split_validation(len(official), section.validation_size, seed)
    mean, std = _statistics(official.images)
    return DataSet(
        name=section.name,
        train=Split(official.images[kept], official.labels[kept]),
        validation=Split(official.images[held_out], official.labels[held_out]),
        test=test,
        classes=classes,
        mean=mean,
        std=std,
    )


def split_validation(samples: int, size: float, seed: int) -> tuple[Tensor, Tensor]:
    """Divide the indices of the training set: what stays, and what becomes the validation set.

    Parameters
    ----------
    size
        Number of validation samples, or their share if it is a float.

    Returns
    -------
    tuple of Tensor
        Two sorted int64 tensors that are disjoint and together hold every index. A pure function of the arguments.

    Raises
    ------
    InputError
        If one of them would be empty.
    """
    count = size if isinstance(size, int) else round(size * samples)
    if not 0 < count < samples:
        raise InputError(
            "data.validation_size",
            f"leaves no {'training' if count >= samples else 'validation'} sample of the {samples:,} there are",
            f"use a number from 1 to {samples - 1}, or a share between 0 and 1",
            value=size,
        )
    order = torch.randperm(samples, generator=_generator("validation", seed))
    return order[count:].sort().values, order[:count].sort().values


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order of the training samples in an epoch: int64, [samples], a pure function of the arguments."""
    return torch.randperm(samples, generator=_generator("epoch", seed, epoch))


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part of ``start:stop`` that a rank takes: contiguous, in order of the ranks, sizes one apart at most.

    A slice is empty where there are fewer samples than ranks.
    """
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def deal_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Cut ``0:samples`` into batches in order, the last one possibly short, and deal them out to the ranks in turn.

    A sample is in the same batch at any number of ranks, so that its loss is computed in the same shape.
    """
    starts = range(rank * batch_size, samples, world_size * batch_size)
    return [(start, min(start + batch_size, samples)) for start in starts]


def _generator(*seed: str | int) -> torch.Generator:
    mixed = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(mixed, "little") >> 1)


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return mean and deviation per channel from integer sums, which do not depend on an order."""
    channels = images.transpose(0, 1).reshape(images.shape[1], -1)
    mean, std = [], []
    for channel in channels:
        histogram = torch.bincount(channel, minlength=256).tolist()
        count = sum(histogram)
        total = sum(value * times for value, times in enumerate(histogram))
        squares = sum(value * value * times for value, times in enumerate(histogram))
        mean.append(total / count)
        std.append(max((count * squares - total * total) ** 0.5 / count, 1e-6))
    return tuple(mean), tuple(std)


Loaded = tuple[Split, Split, tuple[str, ...]]


def _digits(_root: Path) -> Loaded:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    order = torch.randperm(len(labels), generator=_generator("digits"))
    test, train = order[:_DIGITS_TEST_SAMPLES], order[_DIGITS_TEST_SAMPLES:]
    classes = tuple(str(name) for name in digits.target_names)
    return Split(images[train], labels[train]), Split(images[test], labels[test]), classes


def _fashion_mnist(root: Path) -> Loaded:
    from torchvision.datasets import FashionMNIST

    return _mnist_like(FashionMNIST, "fashion-mnist", root, (root, DEBIAN_FASHION_MNIST))


def _mnist(root: Path) -> Loaded:
    from torchvision.datasets import MNIST

    return _mnist_like(MNIST, "mnist", root, (root,))


def _cifar10(root: Path) -> Loaded:
    from torchvision.datasets import CIFAR10

    both = _from_root_or_download(CIFAR10, "cifar10", root)
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets)) for part in both
    ]
    return splits[0], splits[1], tuple(both[0].classes)


def _mnist_like(kind: Any, name: str, root: Path, idx_folders: tuple[Path, ...]) -> Loaded:
    for folder in idx_folders:
        if all(_idx_file(folder, file) for file in _IDX_FILES):
            with tempfile.TemporaryDirectory() as scratch:
                both = _read_idx_folder(kind, folder, Path(scratch))
            break
    else:
        both = _from_root_or_download(kind, name, root)
    splits = [Split(part.data[:, None].contiguous(), part.targets.long()) for part in both]
    return splits[0], splits[1], tuple(both[0].classes)


def _read_idx_folder(kind: Any, folder: Path, scratch: Path) -> tuple[Any, Any]:
    """Lay the four original files out as torchvision expects them, and let it read them."""
    raw = scratch / kind.__name__ / "raw"
    raw.mkdir(parents=True)
    for file in _IDX_FILES:
        source = _idx_file(folder, file)
        assert source is not None
        try:
            with gzip.open(source) if source.suffix == ".gz" else source.open("rb") as packed:
                (raw / file).write_bytes(packed.read())
        except (OSError, EOFError) as error:
            raise InputError(str(source), f"is damaged ({error})", "replace it by the original file") from None
    try:
        return kind(scratch, train=True), kind(scratch, train=False)
    except Exception as error:  # torchvision raises whatever its parser meets
        raise InputError(
            str(folder), f"holds files that are no IDX data ({type(error).__name__}: {error})", "replace them"
        ) from None


def _idx_file(folder: Path, file: str) -> Path | None:
    return next((path for path in (folder / f"{file}.gz", folder / file) if path.is_file()), None)


def _from_root_or_download(kind: Any, name: str, root: Path) -> tuple[Any, Any]:
    """Read torchvision's own layout below `root`; where it is not there, download it once per machine."""
    with contextlib.suppress(RuntimeError):  # torchvision's way to say that it is not there
        return _open_both(kind, root)
    with _exclusive(root, name):
        with contextlib.suppress(RuntimeError):  # another rank was faster
            return _open_both(kind, root)
        try:
            with open("/dev/null", "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
                with contextlib.redirect_stderr(nowhere):
                    kind(root, train=True, download=True)
            return _open_both(kind, root)
        except Exception as error:  # URLError, RuntimeError, OSError, ... from the network or the disk
            raise _not_available(kind, name, root, f"the download failed: {_short(error)}") from None


def _open_both(kind: Any, root: Path) -> tuple[Any, Any]:
    try:
        return kind(root, train=True), kind(root, train=False)
    except RuntimeError:
        raise
    except Exception as error:
        raise InputError(
            str(root / kind.__name__),
            f"holds damaged files ({type(error).__name__}: {error})",
            "remove the folder, it is loaded anew",
        ) from None


@contextlib.contextmanager
def _exclusive(root: Path, name: str) -> Iterator[None]:
    """Let one process of the machine download; there is no process group yet."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{name}.lock").open("w")
    except OSError as error:
        raise InputError(
            "data.root",
            f"{name} is not there and nothing can be downloaded to it ({error.strerror})",
            "choose a folder that can be written",
            value=str(root),
        ) from None
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _not_available(kind: Any, name: str, root: Path, reason: str) -> InputError:
    ways = [f"put torchvision's {kind.__name__} folder into data.root"]
    if name in {"mnist", "fashion-mnist"}:
        ways = [f"put the four *-ubyte.gz files of {name} into data.root"]
    if name == "fashion-mnist":
        ways.append("apt-get install dataset-fashion-mnist")
    ways.append("run once where the internet can be reached")
    numbered = ", or ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
    return InputError("data.root", f"{name} is not there, and {reason}", numbered, value=str(root))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


_LOADERS: dict[str, Callable[[Path], Loaded]] = {
    "digits": _digits,
    "mnist": _mnist,
    "fashion-mnist": _fashion_mnist,
    "cifar10": _cifar10,
}
