"""A sampler for plain DDP that deals out a validation set without padding."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.utils.data import Sampler

from distplateau.lockstep import consensus

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized


class ShardSampler(Sampler[int]):
    """Every sample on exactly one rank: rank r of n gets r, r + n, r + 2n, ...

    `torch.utils.data.DistributedSampler` repeats samples until the shares are even, which counts them twice in a mean.
    Shares here may be uneven or empty, which `GlobalMean` allows.

    Parameters
    ----------
    dataset
        Anything with a length.
    rank, world_size
        Default: those of the default process group.
    """

    def __init__(self, dataset: Sized, rank: int | None = None, world_size: int | None = None) -> None:
        self.samples = len(dataset)
        self.rank = consensus.rank() if rank is None else rank
        self.world_size = consensus.world_size() if world_size is None else world_size
        if not 0 <= self.rank < self.world_size:
            raise ValueError(f"rank {self.rank} is not one of {self.world_size} ranks")

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, self.samples, self.world_size))

    def __len__(self) -> int:
        return len(range(self.rank, self.samples, self.world_size))
