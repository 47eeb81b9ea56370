"""Image data sets by name that fit into memory: digits, MNIST, Fashion-MNIST, CIFAR-10; found or downloaded."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import math
import os
import socket
import tempfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from distplateau.errors import InputError, closest
from distplateau.training.data.order import seeded, split_validation, validation_count
from distplateau.training.data.samples import DataSet, Split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

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


def check_data(section: DataSection) -> None:
    """Find out that the data can be had, downloading it if need be, without reading it. Any rank may call it.

    Raises
    ------
    InputError
        For an unknown name, data that is nowhere, or a validation size that leaves one of the sets empty. A file that
        is there but damaged is found by `load_data`.
    """
    source = _source(section)
    validation_count(source.train_samples, section.validation_size)
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
    validation_count(source.train_samples, section.validation_size)
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
    order = torch.randperm(len(labels), generator=seeded("digits"))
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
