"""Data sets that do not fit in memory: worker processes read each batch shortly before it is used.

What a batch holds is a function of its indices and its seed alone. It does not depend on the number of workers, nor on
the batches before it, so a run resumes at any step without reading what it skips.
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import operator
import os
import random
import signal
import threading
import traceback
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from distplateau.errors import InputError
from distplateau.training.parts.imports import short

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    Transform = Callable[[Tensor], Tensor]

# Batches that each worker has ready or in work.
_PREFETCH = 2
_WATCH_INTERVAL_S = 1.0
ITEM_FORM = "give (tensor [c, h, w] of uint8 or float on the CPU, int label)"


class MapStyle(Protocol):
    """A data set whose samples have numbers: ``dataset[i]`` is (input tensor [c, h, w], int label)."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


class Spec(Protocol):
    """What all samples of a data set have in common.

    Parameters
    ----------
    form
        How a sample has to be, as advice.
    """

    form: ClassVar[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of one input."""
        ...

    def check(self, item: Any) -> tuple[Tensor, Any]:
        """Return input and target of a sample that is as it should be; raise `WrongItemError` for another."""
        ...

    def collate(self, samples: Sequence[tuple[Tensor, Any]]) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch, which may be empty."""
        ...


class WrongItemError(Exception):
    """What a data set gave for a sample is not what it should be; the text goes on where 'sample 3' ends."""


@dataclass(frozen=True)
class ItemSpec:
    """What all samples of a data set of labelled images have in common.

    Parameters
    ----------
    shape
        Channels, height, width.
    dtype
        uint8 or a floating type.
    num_classes
        Labels are from 0 to below it.
    """

    form: ClassVar[str] = ITEM_FORM

    shape: tuple[int, int, int]
    dtype: torch.dtype
    num_classes: int

    def check(self, item: Any) -> tuple[Tensor, int]:
        """Return input and label of a sample that is as it should be."""
        image, label = image_and_label(item)
        if image.shape != self.shape or image.dtype != self.dtype:
            raise WrongItemError(f"is {kind_of(image)} where others are {str(self.dtype)[6:]} {list(self.shape)}")
        if not 0 <= label < self.num_classes:
            raise WrongItemError(f"has the label {label}, and there are {self.num_classes} classes")
        return image, label

    def collate(self, samples: Sequence[tuple[Tensor, int]]) -> tuple[Tensor, Tensor]:
        """Return [n, c, h, w] and int64 [n], in shared memory if this is a worker. There may be no samples."""
        labels = torch.tensor([label for _, label in samples], dtype=torch.int64)
        if not samples:
            return torch.empty(0, *self.shape, dtype=self.dtype), labels
        return default_collate([image for image, _ in samples]), labels


@dataclass(frozen=True)
class PairSpec:
    """What all samples of a data set of any (input, target) pairs have in common."""

    form: ClassVar[str] = "give (input, target): two tensors or numbers, of one shape and dtype for all samples"

    shape: tuple[int, ...]
    dtype: torch.dtype
    target_shape: tuple[int, ...]
    target_dtype: torch.dtype

    @classmethod
    def of(cls, item: Any) -> PairSpec:
        """Return what a sample is like."""
        inputs, target = _tensor_pair(item)
        return cls(tuple(inputs.shape), inputs.dtype, tuple(target.shape), target.dtype)

    def check(self, item: Any) -> tuple[Tensor, Tensor]:
        """Return input and target of a sample that is as it should be."""
        inputs, target = _tensor_pair(item)
        for found, shape, dtype in (
            (inputs, self.shape, self.dtype),
            (target, self.target_shape, self.target_dtype),
        ):
            if tuple(found.shape) != shape or found.dtype != dtype:
                raise WrongItemError(f"has {kind_of(found)} where others have {str(dtype)[6:]} {list(shape)}")
        return inputs, target

    def collate(self, samples: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Return inputs [n, ...] and targets [n, ...]. There may be no samples."""
        if not samples:
            inputs = torch.empty(0, *self.shape, dtype=self.dtype)
            return inputs, torch.empty(0, *self.target_shape, dtype=self.target_dtype)
        return default_collate([inputs for inputs, _ in samples]), default_collate([target for _, target in samples])


@dataclass(frozen=True, eq=False)
class StreamedSplit:
    """Part of a data set that is read while it is used.

    Parameters
    ----------
    dataset
        Gives the samples. Forked workers have it as it is when an iteration begins: it need not be picklable, and what
        they change in it is lost. Random numbers must come from python's `random`, ``numpy.random``'s global functions
        or torch's global generator: a generator of its own is not seeded here.
    workers
        Processes that read, for each iteration in progress. With 0 the calling process reads.
    indices
        int64, [samples]: the samples of `dataset` that make up this part; all if None.
    source, part
        ``data.name`` and the part's name, for errors.
    """

    dataset: MapStyle
    spec: Spec
    workers: int = 0
    indices: Tensor | None = None
    source: str = "image-folder"
    part: str = "training"

    def __len__(self) -> int:
        return len(self.dataset) if self.indices is None else len(self.indices)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input."""
        return self.spec.shape

    def to(self, _device: torch.device) -> StreamedSplit:
        """Return itself: each batch goes to a device on its own."""
        return self

    def batches(
        self, slices: Sequence[Tensor], device: torch.device, seeds: Sequence[int] | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Read batches, some of them ahead. Any rank may call it; no global random state is changed.

        Parameters
        ----------
        slices
            One int64 tensor [n] on the CPU per batch: positions in this split. n may differ and be 0. Looked up one by
            one as the reading proceeds, so that one iteration can span a whole training, whose workers are then started
            once.
        device
            Where the tensors go; to a GPU from pinned memory, without waiting for the copy.
        seeds
            One number per batch: what the random transforms in it follow from. Without, all batches have the same.

        Yields
        ------
        tuple of Tensor
            Inputs [n, ...] of the data set's dtype and targets [n, ...], for each slice in turn.

        Raises
        ------
        InputError
            When its turn has come: a sample that cannot be read or is not like the others, or a worker that died.

        Notes
        -----
        Workers are started at the first batch. They end with the iteration, with `close()` of the iterator or when it
        is dropped, and within about a second after this process was killed.
        """
        assert seeds is None or len(seeds) == len(slices), "one seed for each slice"
        return self._iterate(_Requests(slices, seeds, self.indices), device)

    def _iterate(self, requests: _Requests, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        iterator = _start(self._loader(requests, pin=device.type == "cuda"))
        try:
            for _ in range(len(requests)):
                inputs, labels = self._next(iterator)
                yield inputs.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        finally:
            _shut_down(iterator)

    def _loader(self, requests: _Requests, *, pin: bool) -> DataLoader[Any]:
        # A single batch is read before a worker has started.
        workers = min(self.workers, len(requests)) if len(requests) > 1 else 0
        return DataLoader(
            _BatchReader(self.dataset, self.spec),
            batch_size=None,  # an item of the reader is a batch
            sampler=requests,
            collate_fn=_as_it_is,
            num_workers=workers,
            pin_memory=pin,
            prefetch_factor=_PREFETCH if workers else None,
            # Not forkserver, the default from Python 3.14 on: a data set of the user's need not be picklable.
            multiprocessing_context="fork" if workers else None,
            worker_init_fn=partial(_start_worker, os.getpid()),
            # Else torch draws from the global one at each start.
            generator=torch.Generator(),
        )

    def _next(self, iterator: Iterator[Any]) -> tuple[Tensor, Tensor]:
        try:
            batch = next(iterator)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            problem = f"a worker process died ({short(error)})"
            fix = "use fewer workers, or see that memory and /dev/shm suffice"
            raise InputError("data.workers", problem, fix, value=self.workers) from None
        if isinstance(batch, _Failure):
            batch.throw(self.source, self.part)
        return batch


@dataclass(frozen=True)
class _Request:
    indices: list[int]
    seed: int


class _Requests:
    """What the reader is asked for, batch by batch."""

    def __init__(self, slices: Sequence[Tensor], seeds: Sequence[int] | None, indices: Tensor | None) -> None:
        self.slices, self.seeds, self.indices = slices, seeds, indices

    def __len__(self) -> int:
        return len(self.slices)

    def __iter__(self) -> Iterator[_Request]:
        for place in range(len(self.slices)):
            positions = self.slices[place]
            assert positions.dtype == torch.int64 and positions.ndim == 1 and positions.device.type == "cpu"
            indices = positions if self.indices is None else self.indices[positions]
            yield _Request(indices.tolist(), 0 if self.seeds is None else self.seeds[place])


@dataclass(frozen=True)
class _Failure:
    """Comes in place of a batch: torch would raise in a worker's name an error of whose type it knows nothing."""

    index: int
    problem: str
    fix: str
    details: str

    def throw(self, source: str, part: str) -> NoReturn:
        """Raise it in the process that asked for the batch."""
        problem = f"sample {self.index} of its {part} set {self.problem}"
        raise InputError("data.name", problem, self.fix, value=source) from RuntimeError(self.details)


class _BatchReader(Dataset[Any]):
    """A data set whose items are batches."""

    def __init__(self, dataset: MapStyle, spec: Spec) -> None:
        self.dataset, self.spec = dataset, spec

    def __getitem__(self, request: _Request) -> tuple[Tensor, Tensor] | _Failure:
        samples = []
        with repeatable(request.seed):
            for index in request.indices:
                try:
                    samples.append(self.spec.check(self.dataset[index]))
                except WrongItemError as error:
                    return _Failure(index, str(error), self.spec.form, "")
                except Exception as error:  # the user's code, or a damaged file
                    return _Failure(index, raised(error), "mend or remove it", traceback.format_exc())
        return self.spec.collate(samples)


@contextlib.contextmanager
def repeatable(seed: int) -> Iterator[None]:
    """Let what is computed inside follow from the seed; the caller's random numbers go on as if nothing had been."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    threads = torch.get_num_threads()
    # A worker has one thread, and a sum over several is rounded in another way.
    torch.set_num_threads(1)
    # python and numpy have the same generator: one number for both would give both the same sequence.
    digest = hashlib.blake2b(str(seed).encode(), digest_size=24).digest()
    words = np.frombuffer(digest, np.uint32)
    random.seed(digest[:8])
    np.random.seed(words[2:4])
    # Not through torch.manual_seed, which keeps a stack trace for each call while CUDA sleeps.
    torch.default_generator.manual_seed(int.from_bytes(digest[16:], "little") >> 1)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        torch.set_num_threads(threads)


def _start(loader: DataLoader[Any]) -> Iterator[Any]:
    """Start the workers; they leave what this process had alone.

    Their garbage collector would find what this one was yet to collect: the process group and the threads of a model
    that was trained before, whose ends in a fork are a segmentation fault.
    """
    gc.freeze()
    try:
        return iter(loader)
    finally:
        gc.unfreeze()


def _start_worker(parent: int, _worker: int) -> None:
    """Leave a worker to its parent alone.

    Slurm signals every process of a step, a terminal every process in the foreground, and a fork has inherited the
    handlers. The parent still needs batches until the ranks have agreed to stop.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_obey, args=(parent,), daemon=True).start()


def _obey(parent: int) -> None:
    """End the process when its parent is gone or terminates it, even in the middle of a sample.

    torch's own watch looks only between batches, and every 5 s; a worker holds the dead parent's sockets open, so that
    the other ranks would wait as long.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _WATCH_INTERVAL_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)


def _shut_down(iterator: object) -> None:
    # torch does it when the iterator is collected, but the traceback of an error may keep it.
    shut_down = getattr(iterator, "_shutdown_workers", None)
    if shut_down is not None:
        shut_down()


def _as_it_is(batch: Any) -> Any:
    return batch


def image_and_label(item: Any) -> tuple[Tensor, int]:
    """Take an item apart; raises `WrongItemError` for one that is no image with a label."""
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise WrongItemError(f"is {kind_of(item)}")
    image, label = item
    proper = isinstance(image, Tensor) and image.ndim == 3 and image.device.type == "cpu"
    if not proper or not (image.dtype == torch.uint8 or image.is_floating_point()):
        raise WrongItemError(f"has {kind_of(image)} for its input")
    try:
        # Also numpy's integers and tensors of one.
        number = operator.index(label)
    except TypeError:
        raise WrongItemError(f"has {kind_of(label)} for its label") from None
    return image.detach().as_subclass(Tensor), number


def _tensor_pair(item: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(item, tuple | list) or len(item) != 2:
        raise WrongItemError(f"is {kind_of(item)}")
    try:
        inputs, target = (torch.as_tensor(part).detach().as_subclass(Tensor) for part in item)
    except (TypeError, ValueError, RuntimeError) as error:
        raise WrongItemError(f"has no tensors ({short(error)})") from None
    return inputs, target


def kind_of(thing: Any) -> str:
    """Describe a value for an error: its dtype and shape, or its type."""
    if isinstance(thing, Tensor):
        where = "" if thing.device.type == "cpu" else f" on {thing.device}"
        return f"a {str(thing.dtype)[6:]} tensor {list(thing.shape)}{where}"
    if isinstance(thing, tuple | list):
        return f"a {type(thing).__name__} of {len(thing)}"
    return f"a {type(thing).__name__}"


def raised(error: Exception) -> str:
    """Say that a sample cannot be loaded, and what was raised."""
    return f"cannot be loaded ({type(error).__name__}: {short(error)})"
