"""Image data sets as tensors in memory, and the order in which ranks see them.

The order is a pure function of (seed, epoch), cut into global batches of which each rank takes its slice: it does not
depend on the number of ranks, and a run resumes at any step without reading what it skips.
"""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import hashlib
import math
import os
import socket
import tempfile
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

from distplateau.errors import InputError, closest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from distplateau.config import DataSection

DEBIAN_FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
_DIGITS_TEST_SAMPLES = 360
# The four files of MNIST, and of Fashion-MNIST which copied its format to the byte: unpacked size of each.
_IDX_FILES = {
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
# A compute node's firewall often swallows packets; torchvision itself would wait for minutes, once per mirror.
_NETWORK_TIMEOUT_S = 10.0


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

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return tuple(self.images.shape[1:])

    def to(self, device: torch.device) -> Split:
        """Return the split on a device."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(
        self, slices: Sequence[Tensor], device: torch.device, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Slice batches out of memory; as `StreamedSplit.batches`. The seeds do nothing here."""
        del device, seeds
        for place in range(len(slices)):
            indices = slices[place]
            yield self.images[indices], self.labels[indices]


class Samples(Protocol):
    """A part of a data set: in memory (`Split`) or read while it is used (`loader.StreamedSplit`)."""

    def __len__(self) -> int: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        ...

    def to(self, device: torch.device, /) -> Samples:
        """Return the samples on a device, where they are kept in memory."""
        ...

    def batches(
        self, slices: Sequence[Tensor], device: torch.device, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Give inputs and labels on `device` for each slice of indices in turn."""
        ...


@dataclass(frozen=True)
class DataSet:
    """A data set with its validation set, which is carved out of the training set where it has none of its own.

    Parameters
    ----------
    mean, std
        Per channel, over the whole official training set, in units of the uint8 values.
    channels_last
        How normalized images lie in memory.
    """

    name: str
    train: Samples
    validation: Samples
    test: Samples
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    channels_last: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.train.shape
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
        """Turn uint8 images [n, c, h, w] into float32 of mean 0 and deviation 1 per channel, on their device.

        Without a mean they are a user's own inputs and stay as they are.
        """
        if not self.mean:
            return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images
        mean, scale = _normalization(self.mean, self.std, images.device)
        normalized = images.float().sub_(mean).mul_(scale)
        return normalized.contiguous(memory_format=torch.channels_last) if self.channels_last else normalized


@cache
def _normalization(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept: a copy to a GPU for each batch would wait for it.
    shift = torch.tensor(mean, dtype=torch.float32, device=device).view(-1, 1, 1)
    return shift, 1 / torch.tensor(std, dtype=torch.float32, device=device).view(-1, 1, 1)


def check_data(section: DataSection) -> None:
    """Find out that the data can be had, downloading it if need be, without reading it. Any rank may call it.

    Raises
    ------
    InputError
        For an unknown name, data that is nowhere, or a validation size that leaves one of the sets empty. A file that
        is there but damaged is found by `load_data`.
    """
    source = _source(section)
    _validation_count(source.train_samples, section.validation_size)
    _obtain(source, section)


def load_data(section: DataSection, seed: int) -> DataSet:
    """Load a data set and carve out its validation set. Any rank may call it; no process group is used.

    Several ranks of a machine may start at once: one downloads, the others wait for it.

    Parameters
    ----------
    seed
        Decides which training samples become the validation set; nothing else.

    Raises
    ------
    InputError
        For an unknown name, data that cannot be had or is damaged, or a validation size that leaves one of the sets
        empty.
    """
    source = _source(section)
    _validation_count(source.train_samples, section.validation_size)
    official, test, classes = source.read(_obtain(source, section))
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
    samples
        Size of the official training set. The test set is never part of it.
    size
        Number of validation samples, or their share if it is a float (rounded to whole samples).

    Returns
    -------
    tuple of Tensor
        Indices of the training and of the validation samples: two int64 tensors, each ascending, disjoint, together
        every index once. A pure function of the arguments.

    Raises
    ------
    InputError
        If one of them would be empty.
    """
    count = _validation_count(samples, size)
    order = torch.randperm(samples, generator=_generator("validation", seed))
    return order[count:].sort().values, order[:count].sort().values


def _validation_count(samples: int, size: float) -> int:
    count = size if isinstance(size, int) else round(size * samples)
    if not 0 < count < samples:
        raise InputError(
            "data.validation_size",
            f"leaves no {'training' if count >= samples else 'validation'} sample of the {samples:,} there are",
            f"use a number from 1 to {samples - 1}, or a share between 0 and 1",
            value=size,
        )
    return count


def epoch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Return the order in which an epoch goes through the training samples.

    A pure function of the arguments: it knows no rank, no world size and no position, so a run continues at step k by
    cutting the k-th global batch out of it, on any number of ranks, and reads nothing of what it skips. Seed and epoch
    are hashed rather than added, or epoch 2 of seed 1 would be epoch 1 of seed 2.

    Returns
    -------
    Tensor
        int64, [samples], on the CPU: every index of ``0:samples`` once. torch's global random state is not used. The
        bits are those of the CPU generator of the installed torch, which does not promise them across its versions.
    """
    return torch.randperm(samples, generator=_generator("epoch", seed, epoch))


def rank_slice(start: int, stop: int, rank: int, world_size: int) -> tuple[int, int]:
    """Return the part of the global batch ``start:stop`` that a rank takes.

    Laid end to end in the order of the ranks, the slices are the batch. Their sizes are at most one apart, and some
    are empty where there are fewer samples than ranks: no sample is dropped and none is repeated for padding, so the
    ranks must weight their gradients by sample count.

    Returns
    -------
    tuple of int
        First position and the position behind the last, ``start <= first <= last <= stop``.
    """
    assert start <= stop and 0 <= rank < world_size
    size = stop - start
    return start + size * rank // world_size, start + size * (rank + 1) // world_size


def deal_batches(samples: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """Return the batches of ``0:samples`` that a rank evaluates.

    The cuts are made in global order, before anything is known of ranks, and only the last batch may be short; whole
    batches are then dealt out in turn. So a sample shares its batch with the same others at any number of ranks and
    its loss is computed in the same shape: kernels round differently at other batch sizes.

    Returns
    -------
    list of tuple of int
        ``(first, position behind the last)`` of each batch, ascending; empty for a rank that gets none.
    """
    assert batch_size > 0 and 0 <= rank < world_size
    starts = range(rank * batch_size, samples, world_size * batch_size)
    return [(start, min(start + batch_size, samples)) for start in starts]


def derived_seed(*parts: str | int) -> int:
    """Return a seed below 2**63 that follows from all the parts."""
    # Python's hash() of a text changes from process to process; the ranks must agree.
    mixed = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(mixed, "little") >> 1


def _generator(*seed: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derived_seed(*seed))


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
        # A channel that is constant stays at 0 instead of being divided by 0.
        std.append(math.sqrt(count * squares - total * total) / count or 1.0)
    return tuple(mean), tuple(std)


Loaded = tuple[Split, Split, tuple[str, ...]]


@dataclass(frozen=True)
class _Source:
    """How to come by one data set.

    Parameters
    ----------
    train_samples
        Size of the official training set.
    find
        From ``data.root`` to the folder or file that holds the data, None if it is nowhere on this machine.
    read
        From what `find` returned to training set, test set and class names.
    torchvision_class
        The class of `torchvision.datasets` that can download it.
    by_hand
        The ways to get it without the internet.
    """

    train_samples: int
    find: Callable[[Path], Path | None]
    read: Callable[[Path], Loaded]
    torchvision_class: str = ""
    by_hand: tuple[str, ...] = ()


def _source(section: DataSection) -> _Source:
    source = _SOURCES.get(section.name)
    if source is None:
        raise InputError(
            "data.name",
            "there is no such data set",
            closest(section.name, [*_SOURCES, "image-folder"]),
            value=section.name,
        )
    return source


def _obtain(source: _Source, section: DataSection) -> Path:
    """Return where the data lies, downloading it to `data.root` if it is nowhere."""
    root = Path(section.root).expanduser()
    return source.find(root) or _download_once(source, section, root)


# The embedded digits.


def _read_digits(_root: Path) -> Loaded:
    from sklearn.datasets import load_digits

    digits: Any = load_digits()
    images = torch.from_numpy(digits.images.astype(np.uint8))[:, None]
    labels = torch.from_numpy(digits.target.astype(np.int64))
    # They come without a test set. This one is the same for every run, whatever its seed.
    order = torch.randperm(len(labels), generator=_generator("digits"))
    test, train = order[:_DIGITS_TEST_SAMPLES], order[_DIGITS_TEST_SAMPLES:]
    classes = tuple(str(name) for name in digits.target_names)
    return Split(images[train], labels[train]), Split(images[test], labels[test]), classes


# MNIST and Fashion-MNIST: four IDX files, packed or not.


def _find_mnist(root: Path) -> Path | None:
    return _first_idx_folder(root / "MNIST" / "raw", root)


def _find_fashion_mnist(root: Path) -> Path | None:
    return _first_idx_folder(root / "FashionMNIST" / "raw", root, DEBIAN_FASHION_MNIST)


def _first_idx_folder(*folders: Path) -> Path | None:
    return next((folder for folder in folders if all(_idx_file(folder, name) for name in _IDX_FILES)), None)


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if _is_there(path, Path.is_file)), None)


def _read_mnist(folder: Path) -> Loaded:
    from torchvision.datasets import MNIST

    return _read_idx(MNIST, folder)


def _read_fashion_mnist(folder: Path) -> Loaded:
    from torchvision.datasets import FashionMNIST

    return _read_idx(FashionMNIST, folder)


def _read_idx(kind: Any, folder: Path) -> Loaded:
    """Lay the four files out as torchvision's class expects them, and let it read them."""
    with tempfile.TemporaryDirectory(prefix="distplateau-") as scratch:
        raw = Path(scratch) / kind.__name__ / "raw"
        raw.mkdir(parents=True)
        for name in _IDX_FILES:
            _unpack(folder, name, raw)
        try:
            parts = kind(scratch, train=True), kind(scratch, train=False)
            train, test = (Split(part.data[:, None].contiguous(), part.targets.long()) for part in parts)
        except Exception as error:  # torchvision raises whatever its parser meets
            problem = f"holds files that are no IDX data ({type(error).__name__}: {_short(error)})"
            raise InputError(str(folder), problem, "put the original files there") from None
    classes = tuple(parts[0].classes)
    for split in (train, test):
        if int(split.labels.max()) >= len(classes):
            problem = f"holds a label above {len(classes) - 1}"
            raise InputError(str(folder), problem, "put the original files there")
    return train, test, classes


def _unpack(folder: Path, name: str, raw: Path) -> None:
    """Put one file, whole and unpacked, into `raw`."""
    source = _idx_file(folder, name)
    assert source is not None, "find() looked for it"
    try:
        content = gzip.decompress(source.read_bytes()) if source.suffix == ".gz" else source.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(source, f"cannot be unpacked ({_short(error)})") from None
    if len(content) != _IDX_FILES[name]:
        raise _damaged(source, f"has {len(content):,} bytes of data where {_IDX_FILES[name]:,} belong")
    try:
        (raw / name).write_bytes(content)
    except OSError as error:
        problem = f"there is no room to unpack {source} ({_short(error)})"
        raise InputError(str(raw), problem, "let TMPDIR name a folder with 60 MB of room") from None


# CIFAR-10: torchvision's folder, or the archive that it is unpacked from.


def _find_cifar10(root: Path) -> Path | None:
    folder, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    if _is_there(folder, Path.is_dir):
        return folder
    return archive if _is_there(archive, Path.is_file) else None


def _read_cifar10(location: Path) -> Loaded:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    with tempfile.TemporaryDirectory(prefix="distplateau-") as scratch:
        root = location.parent
        if location.suffix == ".gz":
            # Checked first: torchvision would replace a damaged archive by a download.
            if not check_integrity(location, CIFAR10.tgz_md5):
                raise _damaged(location, "is damaged (its MD5 is not the original's)")
            root = Path(scratch)
            (root / location.name).symlink_to(location.resolve())
            with _quiet():
                CIFAR10(root, download=True)  # finds the archive and unpacks it
        expected = [*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
        for name, md5 in expected:
            path = root / CIFAR10.base_folder / name
            if not check_integrity(path, md5):
                raise _damaged(path, "is damaged (its MD5 is not the original's)" if path.exists() else "is missing")
        parts = CIFAR10(root, train=True), CIFAR10(root, train=False)
    splits = [
        Split(torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in parts
    ]
    return splits[0], splits[1], tuple(parts[0].classes)


# Downloading.


def _download_once(source: _Source, section: DataSection, root: Path) -> Path:
    """Let one process of the machine download while the others wait; there is no process group yet."""
    with _lock(source, section, root) as (lock, waited):
        found = source.find(root)  # another process may have been faster
        if found:
            return found
        reason = lock.read() if waited else ""
        if not reason:
            lock.truncate(0)
            reason = _download(source, section, root)
            lock.write(reason)
            lock.flush()
        found = None if reason else source.find(root)
        if found is None:
            raise _not_available(source, section, reason or "the download brought other files than expected")
        return found


@contextlib.contextmanager
def _lock(source: _Source, section: DataSection, root: Path) -> Iterator[tuple[IO[str], bool]]:
    """Hold the lock file, which says why the last download failed; True comes with it if another process held it.

    Those who waited for a download that failed need not try one by one what has just been found not to work.
    """
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = (root / f".{section.name}.lock").open("a+", encoding="utf-8")
        waited = False
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waited = True
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.seek(0)
    except OSError as error:
        reason = f"nothing can be written there to download it ({error.strerror})"
        raise _not_available(source, section, reason) from None
    with lock:
        yield lock, waited


def _download(source: _Source, section: DataSection, root: Path) -> str:
    """Download to `root` and return why that failed, or nothing.

    The files arrive in a folder of their own and are moved when all are there, so that nobody ever reads half of one.
    """
    from torchvision import datasets

    try:
        with tempfile.TemporaryDirectory(prefix=f".{section.name}.", dir=root) as arriving, _quiet(), _impatient():
            getattr(datasets, source.torchvision_class)(arriving, download=True)
            for file in sorted(path for path in Path(arriving).rglob("*") if path.is_file()):
                target = root / file.relative_to(arriving)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)
    except Exception as error:  # URLError, RuntimeError, OSError, ... from the network or the disk
        return f"the download failed: {_short(error)}"
    return ""


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torchvision's prints and progress bars off the terminal."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


@contextlib.contextmanager
def _impatient() -> Iterator[None]:
    """Give up on a network that does not answer; torchvision has no setting for it."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_NETWORK_TIMEOUT_S)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


def _not_available(source: _Source, section: DataSection, reason: str) -> InputError:
    ways = [*source.by_hand, "run once where the internet can be reached, to have it downloaded into data.root"]
    numbered = ", or ".join(f"({number}) {way}" for number, way in enumerate(ways, start=1))
    return InputError("data.root", f"{section.name} is not there, and {reason}", numbered, value=section.root)


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(str(path), problem, "replace it by the original file, or remove it to have it fetched anew")


def _is_there(path: Path, kind: Callable[[Path], bool]) -> bool:
    try:
        return kind(path)
    except OSError:  # a folder that may not be entered holds nothing for us
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__


_SOURCES = {
    "digits": _Source(1_797 - _DIGITS_TEST_SAMPLES, lambda root: root, _read_digits),
    "mnist": _Source(
        60_000, _find_mnist, _read_mnist, "MNIST", ("put the four *-ubyte.gz files of mnist into data.root",)
    ),
    "fashion-mnist": _Source(
        60_000,
        _find_fashion_mnist,
        _read_fashion_mnist,
        "FashionMNIST",
        ("put the four *-ubyte.gz files of fashion-mnist into data.root", "apt-get install dataset-fashion-mnist"),
    ),
    "cifar10": _Source(
        50_000,
        _find_cifar10,
        _read_cifar10,
        "CIFAR10",
        ("put cifar-10-python.tar.gz, or its folder cifar-10-batches-py, into data.root",),
    ),
}
