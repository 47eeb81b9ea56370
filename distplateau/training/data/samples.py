"""What training and validation draw from: samples in memory or streamed, and the sets of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


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
